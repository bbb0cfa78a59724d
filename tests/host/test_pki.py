"""`provider-proxy pki`: what OpenSSL and TLS say of its certificates, and that it overwrites nothing."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from helpers import LIMIT_S, free_port, run_command, run_here
from package_modules import CRYPTOGRAPHY, brought_by
from places import DOCS

from provider_proxy.cli import pki as cli
from provider_proxy.cli.main import EXIT_ENVIRONMENT, EXIT_GOOD, EXIT_USAGE
from provider_proxy.errors import HostError, UsageError
from provider_proxy.host import pki

Done = subprocess.CompletedProcess[str]
DOC = DOCS / "tls.md"
INIT_FILES = ["ca.crt", "ca.key", "crl.pem", "server.crt", "server.key"]
HOSTS = ("--host", "localhost", "--host", "127.0.0.1", "--host", "::1")
MINUTE = timedelta(minutes=1)


class Site:
    """A CA's directory `ca` in a folder, and the commands on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca"

    def run(self, action: str, *words: str | Path) -> Done:
        return run_here("pki", action, "ca", *words, cwd=self.folder)

    def good(self, action: str, *words: str | Path) -> Done:
        done = self.run(action, *words)
        assert (done.returncode, done.stderr) == (EXIT_GOOD, "")
        return done

    def json(self, action: str, *words: str | Path) -> dict[str, Any]:
        values = json.loads(self.good(action, *words, "--json").stdout.splitlines()[-1])
        assert isinstance(values, dict)
        return values

    def tenant(self, name: str = "acme", *words: str) -> x509.Certificate:
        self.good("tenant", name, *words)
        return self.certificate(f"tenants/{name}.crt")

    def certificate(self, name: str) -> x509.Certificate:
        return pki.load_certificate(self.ca / name)

    def crl(self) -> x509.CertificateRevocationList:
        return pki.load_crl(self.ca, self.certificate("ca.crt"))

    def contents(self) -> dict[str, bytes]:
        """Everything below the folder; directories end with a slash."""
        return {
            f"{path.relative_to(self.folder)}{'/' if path.is_dir() else ''}": b""
            if path.is_dir()
            else path.read_bytes()
            for path in self.folder.rglob("*")
        }

    def openssl(self, name: str, *words: str) -> Done:
        """`openssl verify` of a certificate, as strict as it gets."""
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", *words, name]
        return subprocess.run(
            command, cwd=self.ca, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `init` makes, once; every file of it is synced to the disk, which takes its time."""
    made = Site(tmp_path_factory.mktemp("fresh"))
    made.good("init", *HOSTS)
    return made.ca


@pytest.fixture
def site(fresh: Path, tmp_path: Path) -> Site:
    made = Site(tmp_path)
    shutil.copytree(fresh, made.ca)
    return made


@pytest.fixture
def bare(tmp_path: Path) -> Site:
    return Site(tmp_path)


def expect(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr + done.stdout
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> Any:
    return certificate.extensions.get_extension_for_class(kind)


# --- what OpenSSL says ------------------------------------------------------------------------------

CRL_CHECK = ("-crl_check", "-CRLfile", "crl.pem")


@pytest.mark.real
def test_openssl_takes_server_and_tenant_for_what_they_are(site: Site) -> None:
    site.tenant()
    for name, purpose, other in (
        ("server.crt", "sslserver", "sslclient"),
        ("tenants/acme.crt", "sslclient", "sslserver"),
    ):
        done = site.openssl(name, "-purpose", purpose, *CRL_CHECK)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}: OK\n", "")
        done = site.openssl(name, "-purpose", other, *CRL_CHECK)
        assert done.returncode != 0
        assert "purpose" in done.stderr


@pytest.mark.parametrize(
    ("words", "good"),
    [
        (("-verify_hostname", "localhost"), True),
        (("-verify_hostname", "provider-proxy"), False),  # the CN
        (("-verify_hostname", "example.org"), False),
        (("-verify_ip", "127.0.0.1"), True),
        (("-verify_ip", "::1"), True),
        (("-verify_ip", "127.0.0.2"), False),
    ],
)
@pytest.mark.real
def test_openssl_finds_the_hosts_and_no_other(
    site: Site, words: tuple[str, ...], good: bool
) -> None:
    assert (site.openssl("server.crt", *words).returncode == 0) is good


@pytest.mark.real
def test_openssl_refuses_who_was_revoked_and_nobody_else(site: Site) -> None:
    site.tenant("acme")
    site.tenant("other")
    site.good("revoke", "acme")
    done = site.openssl("tenants/acme.crt", *CRL_CHECK)
    assert done.returncode != 0
    assert "certificate revoked" in done.stderr
    assert site.openssl("tenants/acme.crt").returncode == 0  # it is the CRL that says so
    assert site.openssl("tenants/other.crt", *CRL_CHECK).returncode == 0


@pytest.mark.real
def test_openssl_refuses_another_ca_s(site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    stranger = Site(tmp_path_factory.mktemp("stranger"))
    stranger.good("init", *HOSTS)
    done = stranger.openssl(str(site.ca / "server.crt"))
    assert done.returncode != 0
    assert "unable to get local issuer certificate" in done.stderr


@pytest.mark.real
def test_openssl_refuses_a_ca_below_this_one(site: Site) -> None:
    """pathlen 0, and a tenant's certificate is no CA."""
    site.tenant()
    key = load_pem_private_key((site.ca / "tenants/acme.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    false_ca = pki.Holder(certificate=site.certificate("tenants/acme.crt"), key=key)
    false = issue(false_ca, "false", days=1)
    (site.ca / "false.crt").write_bytes(pki.pem(false.certificate))
    done = site.openssl("false.crt", "-untrusted", "tenants/acme.crt")
    assert done.returncode != 0
    assert "invalid CA certificate" in done.stderr


def issue(ca: pki.Holder, name: str, *, days: int, now: datetime | None = None) -> pki.Holder:
    names = [x509.UniformResourceIdentifier(f"spiffe://x/{name}")]
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH
    return pki.issue(ca, name, names, purpose, days=days, now=now or datetime.now(UTC))


# --- what TLS says ----------------------------------------------------------------------------------


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> dict[str, Any]:
    """Shake hands over loopback and exchange a byte each way; the tenant as the server sees it.

    Raises:
        ssl.SSLError, OSError: one of them refused; the server's reason where there is one.
    """
    seen: dict[str, Any] = {}
    failed: list[Exception] = []

    def serve(listening: socket.socket) -> None:
        try:
            plain, _ = listening.accept()
            plain.settimeout(LIMIT_S)
            with plain, server.wrap_socket(plain, server_side=True) as stream:
                seen.update(stream.getpeercert() or {})
                stream.sendall(stream.recv(1))
        except (OSError, ssl.SSLError) as exc:
            failed.append(exc)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(LIMIT_S)
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=LIMIT_S) as plain,
                client.wrap_socket(plain, server_hostname=host) as stream,
            ):
                stream.sendall(b"x")
                if stream.recv(1) != b"x":
                    raise ConnectionError("the server hung up")
        except OSError:
            thread.join(LIMIT_S)
            if failed and isinstance(failed[0], ssl.SSLCertVerificationError):
                raise failed[0] from None
            raise
        finally:
            thread.join(LIMIT_S)
    return seen


def server_context(site: Site, *, crl: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.ca / "server.crt", site.ca / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(site.ca / "ca.crt")
    if crl:
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        context.load_verify_locations(site.ca / "crl.pem")
    return context


def client_context(site: Site, tenant: str | None = "acme") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(site.ca / "ca.crt"))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if tenant is not None:
        tenants = site.ca / "tenants"
        context.load_cert_chain(tenants / f"{tenant}.crt", tenants / f"{tenant}.key")
    return context


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_both_sides_of_tls_are_satisfied(site: Site, host: str) -> None:
    site.tenant()
    seen = handshake(server_context(site, crl=True), client_context(site), host)
    assert seen["subjectAltName"] == (("URI", "spiffe://provider-proxy/tenant/acme"),)
    assert seen["subject"] == ((("commonName", "acme"),),)


def test_tls_refuses_another_host(site: Site) -> None:
    site.tenant()
    for host in ("example.org", "127.0.0.2", "provider-proxy"):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
            handshake(server_context(site), client_context(site), host)


def test_tls_refuses_who_has_no_certificate(site: Site) -> None:
    with pytest.raises(OSError):
        handshake(server_context(site), client_context(site, tenant=None), "localhost")


def test_tls_refuses_who_was_revoked(site: Site) -> None:
    site.tenant("acme")
    site.tenant("other")
    site.good("revoke", "acme")
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        handshake(server_context(site, crl=True), client_context(site), "localhost")
    handshake(server_context(site, crl=True), client_context(site, "other"), "localhost")


def test_a_server_is_no_tenant_and_a_tenant_no_server(site: Site) -> None:
    site.tenant()
    for name in ("server.crt", "server.key"):
        shutil.copy(site.ca / name, site.ca / "tenants")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(server_context(site), client_context(site, "server"), "localhost")
    for suffix in ("crt", "key"):
        shutil.copy(site.ca / f"tenants/acme.{suffix}", site.ca / f"server.{suffix}")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(server_context(site), client_context(site), "localhost")


# --- what is in them --------------------------------------------------------------------------------


def test_the_ca(site: Site) -> None:
    ca = site.certificate("ca.crt")
    constraints = extension(ca, x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = extension(ca, x509.KeyUsage)
    assert usage.critical
    assert usage_of(usage.value) == {"key_cert_sign", "crl_sign"}
    check_life(ca, pki.CA_DAYS)
    assert ca.subject == ca.issuer


def test_two_cas_have_two_names() -> None:
    names = {pki.new_authority(datetime.now(UTC)).certificate.subject for _ in range(2)}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("name", "purpose", "days"),
    [
        ("server.crt", ExtendedKeyUsageOID.SERVER_AUTH, 397),
        ("tenants/acme.crt", ExtendedKeyUsageOID.CLIENT_AUTH, 90),
    ],
)
def test_a_leaf(site: Site, name: str, purpose: x509.ObjectIdentifier, days: int) -> None:
    site.tenant()
    leaf, ca = site.certificate(name), site.certificate("ca.crt")
    constraints = extension(leaf, x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca is False
    usage = extension(leaf, x509.KeyUsage)
    assert usage.critical
    assert usage_of(usage.value) == {"digital_signature"}
    assert list(extension(leaf, x509.ExtendedKeyUsage).value) == [purpose]
    ski = extension(ca, x509.SubjectKeyIdentifier).value.digest
    assert extension(leaf, x509.AuthorityKeyIdentifier).value.key_identifier == ski
    assert extension(leaf, x509.SubjectKeyIdentifier).value.digest != ski
    check_life(leaf, days)


def usage_of(usage: x509.KeyUsage) -> set[str]:
    names = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment"]
    names += ["key_agreement", "key_cert_sign", "crl_sign"]
    return {name for name in names if getattr(usage, name)}


def check_life(certificate: x509.Certificate, days: int) -> None:
    now = datetime.now(UTC)
    begin = now - pki.SKEW
    assert begin - MINUTE < certificate.not_valid_before_utc <= begin
    end = now + timedelta(days=days)
    assert end - MINUTE < certificate.not_valid_after_utc <= end


def test_the_server_sends_its_chain(site: Site) -> None:
    chain = x509.load_pem_x509_certificates((site.ca / "server.crt").read_bytes())
    assert chain[1:] == [site.certificate("ca.crt")]
    names = extension(chain[0], x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("127.0.0.1"),
        ipaddress.ip_address("::1"),
    ]


def test_a_host_given_twice_is_there_once(bare: Site) -> None:
    values = bare.json("init", "--host", "Example.ORG", "--host", "example.org")
    assert values["identities"] == ["dns:example.org"]


def test_keys_are_p256_and_belong_to_their_certificates(site: Site) -> None:
    site.tenant()
    seen = set()
    for name in ("ca", "server", "tenants/acme"):
        key = load_pem_private_key((site.ca / f"{name}.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP256R1)
        assert key.public_key() == site.certificate(f"{name}.crt").public_key()
        seen.add(key.private_numbers().private_value)
    assert len(seen) == 3


def test_serials_are_159_random_bits() -> None:
    ca = pki.new_authority(datetime.now(UTC))
    serials = [issue(ca, "x", days=1).certificate.serial_number for _ in range(64)]
    assert len(set(serials)) == 64
    assert all(0 < serial < 1 << 159 for serial in serials)
    assert any(serial >> 158 for serial in serials)  # 2^-64 that it is not so
    assert len({serial & 0xFFFF for serial in serials}) > 32


@pytest.mark.parametrize("days", [1, 3650])
def test_days(bare: Site, days: int) -> None:
    bare.good("init", *HOSTS, "--days", str(days))
    check_life(bare.certificate("server.crt"), days)


@pytest.mark.parametrize("days", ["0", "-1", "3651", "9" * 20])
def test_days_that_are_too_few_or_too_many(bare: Site, days: str) -> None:
    expect(bare.run("init", *HOSTS, f"--days={days}"), EXIT_USAGE, "--days must be in 1..3650")
    assert bare.contents() == {}


@pytest.mark.parametrize("days", ["1e3", "1.5", "x", ""])
def test_days_that_are_none(bare: Site, days: str) -> None:
    expect(bare.run("init", *HOSTS, f"--days={days}"), EXIT_USAGE, "--days")
    assert bare.contents() == {}


def test_nobody_outlives_the_ca(site: Site) -> None:
    ca = pki.new_authority(datetime.now(UTC) - timedelta(days=pki.CA_DAYS - 90, seconds=-30))
    (site.ca / "ca.crt").write_bytes(pki.pem(ca.certificate))
    (site.ca / "ca.key").write_bytes(ca.key_pem())
    expect(
        site.run("tenant", "acme", "--days", "91"),
        EXIT_USAGE,
        "outlive the CA, which expires on 20",
    )
    site.good("tenant", "acme", "--days", "90")
    with pytest.raises(UsageError, match="outlive the CA, which expires on"):
        issue(ca, "late", days=1, now=datetime.now(UTC) + timedelta(days=90))


# --- identities -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "identities"),
    [
        ((), ["spiffe://provider-proxy/tenant/acme"]),
        (("--spiffe", "spiffe://example.org/a/B_c.d-1"), ["spiffe://example.org/a/B_c.d-1"]),
        (("--dns", "Verifier.Example.org"), ["dns:verifier.example.org"]),
        (("--email", "Ops+tpm@Example.org"), ["email:Ops+tpm@example.org"]),
        (
            ("--email", "a@b.example", "--dns", "b.example", "--spiffe", "spiffe://b.example/t"),
            ["spiffe://b.example/t", "dns:b.example", "email:a@b.example"],
        ),
    ],
)
def test_identities_are_what_the_daemon_reads(
    site: Site, words: tuple[str, ...], identities: list[str]
) -> None:
    tenants = pytest.importorskip("provider_proxy.host.api.identity")
    assert site.json("tenant", "acme", *words)["identities"] == identities
    certificate = site.certificate("tenants/acme.crt")
    read = tenants.parse_chain((certificate.public_bytes(Encoding.DER),)).identities
    assert list(read[:-1]) == identities  # the last is its digest
    (common,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert common.value == "acme"


def test_a_certificate_with_a_cn_alone_is_shown_by_it(site: Site) -> None:
    ca = pki.load_authority(site.ca)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(ca.certificate.subject, subject, key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + MINUTE)
        .sign(ca.key, SHA256())
    )
    assert cli.identities_of(made) == ("cn:old",)


GOOD_NAMES = ["a", "0", "acme", "Acme-1_x.y", "a" * 63, "a.crt", "a.key", "a."]
BAD_NAMES = [
    *("", ".", "..", "../x", "a/b", "/a", "a/..", "a..b", "a\n", "\n", "a b", "a\0", "ä", "٣"),
    *("-a", ".a", "_a", "a:b", "a*", "a" * 64, "~", "a\\b", "%2e%2e"),
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(site: Site, name: str) -> None:
    site.good("tenant", "--", name)
    tenants = site.ca / "tenants"
    assert sorted(os.listdir(tenants)) == sorted([f"{name}.crt", f"{name}.key"])
    assert mode(tenants / f"{name}.key") == 0o600
    assert mode(tenants / f"{name}.crt") == 0o644
    site.good("revoke", "--", name)


@pytest.mark.parametrize("action", ["tenant", "revoke"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(site: Site, action: str, name: str) -> None:
    before = site.contents()
    expect(site.run(action, "--", name), EXIT_USAGE, "NAME has up to 63 letters")
    assert site.contents() == before


LABEL = "a" * 63
LONG_DNS = ".".join([LABEL] * 3 + ["b" * 61])
BAD_DNS = [
    *("", ".", "a.", ".a", "a..b", "-a", "a-", "a.-b", "a_b", "a b", "a\n", "a\0b", "*", "*.a"),
    *("ä.example", "\u212aelvin", "1", "1.2.3", "1.2.3.4.5", "10.0.0.256", "0x7f.1", "127.1"),
    *(f"{LABEL}a", f"{LONG_DNS}b", "https://a", "a:8890", "a/b", "a,b", "user@a"),
]


@pytest.mark.parametrize("text", ["a", "localhost", "A.example", "1a.x-y", LABEL, LONG_DNS])
def test_good_dns(text: str) -> None:
    assert len(LONG_DNS) == 253
    assert cli.parse_host(text) == cli.parse_dns("--dns", text) == x509.DNSName(text.lower())


@pytest.mark.parametrize("text", BAD_DNS)
def test_bad_dns(text: str) -> None:
    for parse in (cli.parse_host, lambda name: cli.parse_dns("--dns", name)):
        with pytest.raises(UsageError, match="must be a DNS name"):
            parse(text)
    with pytest.raises(UsageError):
        cli.parse_email(f"name@{text}")


@pytest.mark.parametrize(
    "text", ["0.0.0.0", "::", "192.0.2.1", "::1", "2001:DB8::1", "::ffff:192.0.2.1"]
)
def test_good_addresses(text: str) -> None:
    assert cli.parse_host(text) == x509.IPAddress(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["[::1]", "::1%lo", ":::1", "192.0.2.1/24", "::1/64", "٣.1.1.1"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="--host must be"):
        cli.parse_host(text)


@pytest.mark.parametrize(
    "text", ["a@b", "a.b+c@d.example", "o'x@d.example", f"{'a' * 64}@b", "a/b@c.example"]
)
def test_good_email(text: str) -> None:
    assert cli.parse_email(text) == x509.RFC822Name(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "@", "a", "a@", "@b", "a@b@c", ".a@b", "a.@b", "a..b@c", "a b@c", "a@b c", "a@b\n"),
        *("a\n@b", "A <a@b>", '"a"@b', "a@[127.0.0.1]", "ä@b", "a\0@b", "a,b@c", "a@127.0.0.1"),
        *(f"{'a' * 65}@b", f"a@{LONG_DNS}"),
    ],
)
def test_bad_email(text: str) -> None:
    with pytest.raises(UsageError, match="--email"):
        cli.parse_email(text)


LONG_SPIFFE = "spiffe://a/".ljust(2000, "b")


@pytest.mark.parametrize("text", ["spiffe://a/b", "spiffe://a.b-c_d/e/F.1_-", LONG_SPIFFE])
def test_good_spiffe(text: str) -> None:
    assert cli.parse_spiffe(text) == x509.UniformResourceIdentifier(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "a",
            "spiffe:",
            "spiffe://",
            "spiffe://a",
            "spiffe://a/",
            "spiffe:///b",
            "spiffe:/a/b",
        ),
        *("spiffe://A/b", "SPIFFE://a/b", "https://a/b", "spiffe://a/b/", "spiffe://a//b"),
        *("spiffe://a/./b", "spiffe://a/../b", "spiffe://a/..", "spiffe://a/b?c", "spiffe://a/b#c"),
        *("spiffe://u@a/b", "spiffe://a:1/b", "spiffe://a/%41", "spiffe://a/ä", "spiffe://a/b c"),
        *("spiffe://a/b\n", "spiffe://a/b\0", " spiffe://a/b", f"spiffe://{'a' * 256}/b"),
        f"{LONG_SPIFFE}b",
    ],
)
def test_bad_spiffe(text: str) -> None:
    with pytest.raises(UsageError, match="--spiffe must be"):
        cli.parse_spiffe(text)


@pytest.mark.parametrize("words", [("--dns", "*"), ("--email", "a"), ("--spiffe", "spiffe://a/..")])
def test_a_bad_identity_makes_nothing(site: Site, words: tuple[str, str]) -> None:
    before = site.contents()
    expect(site.run("tenant", "acme", *words), EXIT_USAGE, words[0], repr(words[1]))
    assert site.contents() == before


def test_a_bad_host_makes_nothing(bare: Site) -> None:
    expect(bare.run("init", "--host", "good", "--host", "no good"), EXIT_USAGE, "--host", "no good")
    expect(bare.run("init"), EXIT_USAGE, "--host")
    assert bare.contents() == {}


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes(bare: Site, umask: int) -> None:
    before = os.umask(umask)
    try:
        bare.good("init", *HOSTS)
        bare.good("tenant", "acme")
        bare.good("revoke", "acme")
    finally:
        os.umask(before)
    assert sorted(path for path in os.listdir(bare.ca) if path[0] != ".") == [
        *INIT_FILES,
        "tenants",
    ]
    assert sorted(os.listdir(bare.ca / "tenants")) == ["acme.crt", "acme.key"]
    for directory in (bare.ca, bare.ca / "tenants"):
        assert mode(directory) == 0o700
    for path in bare.ca.rglob("*.*"):
        public = path.suffix in (".crt", ".pem")
        assert mode(path) == (0o644 & ~umask if public else 0o600), path


def test_init_makes_five_files_and_leaves_nothing_else(bare: Site) -> None:
    done = bare.good("init", *HOSTS)
    assert sorted(os.listdir(bare.ca)) == INIT_FILES
    assert sorted(done.stdout.split()) == [f"ca/{name}" for name in INIT_FILES]


def test_an_empty_directory_is_fine_and_one_with_other_files_too(bare: Site) -> None:
    bare.ca.mkdir(mode=0o700)
    (bare.ca / "notes").write_text("mine")
    bare.good("init", *HOSTS)
    assert (bare.ca / "notes").read_text() == "mine"


def test_parents_are_made(tmp_path: Path) -> None:
    done = run_here("pki", "init", "a/b/c", "--host", "x", cwd=tmp_path)
    assert done.returncode == EXIT_GOOD
    assert sorted(os.listdir(tmp_path / "a/b/c")) == INIT_FILES


@pytest.mark.parametrize("open_to", [0o750, 0o701, 0o755, 0o770])
def test_a_directory_that_is_open_to_others_is_refused(bare: Site, open_to: int) -> None:
    bare.ca.mkdir()
    bare.ca.chmod(open_to)
    expect(bare.run("init", *HOSTS), EXIT_ENVIRONMENT, "with mode 0700")
    assert os.listdir(bare.ca) == []
    bare.ca.chmod(0o700)
    bare.good("init", *HOSTS)
    (bare.ca / "tenants").mkdir()
    (bare.ca / "tenants").chmod(open_to)
    expect(bare.run("tenant", "acme"), EXIT_ENVIRONMENT, "ca/tenants", "with mode 0700")


def test_init_twice(site: Site) -> None:
    before = site.contents()
    expect(site.run("init", *HOSTS), EXIT_USAGE, "ca/ca.crt exists already; nothing was made")
    assert site.contents() == before


def test_tenant_twice(site: Site) -> None:
    site.tenant()
    before = site.contents()
    expect(site.run("tenant", "acme"), EXIT_USAGE, "ca/tenants/acme.crt exists already")
    assert site.contents() == before


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"precious"),
    "directory": lambda path: path.mkdir(),
    "symlink": lambda path: path.symlink_to("/nonexistent"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("name", INIT_FILES)
def test_init_overwrites_no_single_file(bare: Site, name: str, obstacle: str) -> None:
    bare.ca.mkdir(mode=0o700)
    OBSTACLES[obstacle](bare.ca / name)
    expect(bare.run("init", *HOSTS), EXIT_USAGE, f"ca/{name} exists already")
    check_untouched(bare.ca, name, obstacle)


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("name", ["acme.crt", "acme.key"])
def test_tenant_overwrites_no_single_file(site: Site, name: str, obstacle: str) -> None:
    tenants = site.ca / "tenants"
    tenants.mkdir(mode=0o700)
    OBSTACLES[obstacle](tenants / name)
    expect(site.run("tenant", "acme"), EXIT_USAGE, f"ca/tenants/{name} exists already")
    check_untouched(tenants, name, obstacle)


def check_untouched(directory: Path, name: str, obstacle: str) -> None:
    path = directory / name
    assert os.listdir(directory) == [name]
    if obstacle == "file":
        assert path.read_bytes() == b"precious"
    assert path.is_symlink() == (obstacle == "symlink")
    assert path.is_dir() == (obstacle == "directory")


@pytest.mark.parametrize("name", INIT_FILES)
def test_a_file_that_comes_while_we_work_is_not_overwritten(
    bare: Site, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the temporary files are written."""
    bare.ca.mkdir(mode=0o700)
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        (bare.ca / name).write_bytes(b"precious")
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    expect(bare.run("init", *HOSTS), EXIT_USAGE, f"ca/{name} exists already; nothing was made")
    check_untouched(bare.ca, name, "file")


class Interrupted(BaseException):
    """As a Ctrl-C is."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()])
@pytest.mark.parametrize("call", ["link", "fsync"])
@pytest.mark.parametrize("nth", range(5))
def test_what_fails_halfway_leaves_nothing_behind(
    bare: Site, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, error: BaseException
) -> None:
    real = getattr(os, call)
    calls = iter(range(100))

    def fail(*args: Any) -> None:
        if next(calls) == nth:
            raise error
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if isinstance(error, OSError):
            expect(bare.run("init", *HOSTS), EXIT_ENVIRONMENT, "cannot write in ca: No space left")
        else:
            with pytest.raises(Interrupted):
                bare.run("init", *HOSTS)
    assert bare.contents() == {}
    bare.ca.mkdir(mode=0o700)  # one that was there stays
    calls = iter(range(100))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) if isinstance(error, Interrupted) else pytest.raises(HostError):
        pki.create(bare.ca, dict.fromkeys(INIT_FILES, b"x"))
    assert bare.contents() == {"ca/": b""}


def test_a_directory_that_is_a_file(bare: Site) -> None:
    bare.ca.write_text("x")
    bare.ca.chmod(0o600)
    expect(bare.run("init", *HOSTS), EXIT_ENVIRONMENT, "must be a directory")
    expect(
        run_here("pki", "init", "ca/below", *HOSTS, cwd=bare.folder),
        EXIT_ENVIRONMENT,
        "cannot write in ca/below: Not a directory",
    )
    assert bare.ca.read_text() == "x"


# --- two processes ----------------------------------------------------------------------------------

RACER = """
import sys
from provider_proxy.cli.main import run
rounds = int(sys.argv[1])
print("ready", flush=True)
for n in range(rounds):
    sys.stdin.readline()  # both at once
    print(run([word.replace("ROUND", str(n)) for word in sys.argv[2:]]) , flush=True)
"""
ROUNDS = 15


def race(folder: Path, *commands: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
    """Run commands at once, a process each, for `ROUNDS` rounds; their exit codes, round by round.

    ROUND in a command is the number of the round.
    """
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(ROUNDS), "pki", *words],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for words in commands
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for _ in range(ROUNDS):
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write("\n")
                racer.stdin.flush()
            yield tuple(int(exit_code(racer)) for racer in racers)
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def exit_code(racer: subprocess.Popen[str]) -> str:
    """The last line of a command's output; what it printed before is its result."""
    assert racer.stdout is not None
    for line in racer.stdout:
        if line.strip().isdecimal():
            return line
    raise AssertionError("the racer died")


def check_pair(directory: Path, name: str) -> None:
    key = load_pem_private_key((directory / f"{name}.key").read_bytes(), None)
    assert pki.load_certificate(directory / f"{name}.crt").public_key() == key.public_key()


def test_two_inits_at_once(tmp_path: Path) -> None:
    words = ("init", "ROUND", "--host", "x")
    for number, codes in enumerate(race(tmp_path, words, words)):
        assert sorted(codes) == [EXIT_GOOD, EXIT_USAGE]
        directory = tmp_path / str(number)
        assert sorted(os.listdir(directory)) == INIT_FILES
        check_pair(directory, "ca")
        check_pair(directory, "server")
        ca = pki.load_authority(directory).certificate
        pki.load_certificate(directory / "server.crt").verify_directly_issued_by(ca)
        pki.load_crl(directory, ca)


def test_two_tenants_of_one_name_at_once(site: Site) -> None:
    words = ("tenant", "ca", "t-ROUND")
    for number, codes in enumerate(race(site.folder, words, words)):
        assert sorted(codes) == [EXIT_GOOD, EXIT_USAGE]
        check_pair(site.ca / "tenants", f"t-{number}")
    assert len(os.listdir(site.ca / "tenants")) == 2 * ROUNDS


def test_two_revocations_at_once(site: Site) -> None:
    for number in range(ROUNDS):
        for who in "ab":
            site.tenant(f"{who}-{number}")
    for codes in race(site.folder, ("revoke", "ca", "a-ROUND"), ("revoke", "ca", "b-ROUND")):
        assert codes == (EXIT_GOOD, EXIT_GOOD)
    assert len(site.crl()) == 2 * ROUNDS
    assert pki.crl_number(site.crl()) == 1 + 2 * ROUNDS
    assert not list(site.ca.glob(".*.part"))


# --- revocation -------------------------------------------------------------------------------------


def check_crl_life(crl: x509.CertificateRevocationList) -> None:
    now = datetime.now(UTC)
    assert now - pki.SKEW - MINUTE < crl.last_update_utc <= now - pki.SKEW
    assert crl.next_update_utc is not None
    due = now + timedelta(days=30)
    assert due - MINUTE < crl.next_update_utc <= due


def test_the_first_crl_is_empty(site: Site) -> None:
    crl = site.crl()
    assert (len(crl), pki.crl_number(crl)) == (0, 1)
    ski = site.certificate("ca.crt").extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    aki = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    assert aki.value.key_identifier == ski.value.digest
    check_crl_life(crl)


def test_revoke(site: Site) -> None:
    first, second = site.tenant("first"), site.tenant("second")
    before = site.contents()
    for number, certificate in ((2, first), (3, second)):
        name = "first" if certificate is first else "second"
        values = site.json("revoke", name)
        assert values["crl"] == "ca/crl.pem"
        assert (values["number"], values["revoked"]) == (number, number - 1)
        crl = site.crl()
        assert pki.is_revoked(crl, certificate)
        assert pki.crl_number(crl) == number
        check_crl_life(crl)
    entry = site.crl().get_revoked_certificate_by_serial_number(first.serial_number)
    assert entry is not None
    assert datetime.now(UTC) - MINUTE < entry.revocation_date_utc <= datetime.now(UTC)
    after = site.contents()
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {"ca/crl.pem", "ca/.lock"}


def test_revoking_twice_is_revoking_once(site: Site) -> None:
    site.tenant()
    once = site.json("revoke", "acme")
    before = site.contents()
    assert site.json("revoke", "acme") == once
    assert site.contents() == before


def test_a_new_certificate_under_an_old_name_is_good(site: Site) -> None:
    site.tenant()
    site.good("revoke", "acme")
    for suffix in ("crt", "key"):
        (site.ca / f"tenants/acme.{suffix}").rename(site.ca / f"tenants/acme.old.{suffix}")
    site.tenant()
    assert [entry["revoked"] for entry in site.json("show")["certificates"]] == [
        *(False, False),  # CA, server
        *(False, True),  # acme, acme.old
    ]


@pytest.mark.real
def test_the_crl_is_signed_anew(site: Site) -> None:
    revoked = site.tenant()
    site.good("revoke", "acme")
    ca = pki.load_authority(site.ca)
    old = datetime.now(UTC) - timedelta(days=40)
    (site.ca / "crl.pem").write_bytes(pki.pem(pki.sign_crl(ca, 7, site.crl(), old)))
    assert "has expired" in site.openssl("server.crt", *CRL_CHECK).stderr
    assert site.json("crl")["number"] == 8
    check_crl_life(site.crl())
    assert pki.is_revoked(site.crl(), revoked)
    assert site.openssl("server.crt", *CRL_CHECK).returncode == 0


def test_revoke_without_such_a_tenant(site: Site) -> None:
    before = site.contents()
    expect(site.run("revoke", "nobody"), EXIT_USAGE, "there is no ca/tenants/nobody.crt")
    assert site.contents() == before


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_garbage(path: Path) -> None:
    path.write_bytes(b"-----BEGIN X509 CRL-----\n-----END X509 CRL-----\n")


def damage_flipped(path: Path) -> None:
    """A CRL of the same issuer whose signature is not right."""
    crl = x509.load_pem_x509_crl(path.read_bytes())
    data = bytearray(crl.public_bytes(Encoding.DER))
    data[-1] ^= 1
    path.write_bytes(x509.load_der_x509_crl(bytes(data)).public_bytes(Encoding.PEM))


def damage_another_ca_s(path: Path) -> None:
    now = datetime.now(UTC)
    path.write_bytes(pki.pem(pki.sign_crl(pki.new_authority(now), 1, (), now)))


def damage_no_number(path: Path) -> None:
    ca, now = pki.load_authority(path.parent), datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder(ca.certificate.subject, now, now + MINUTE)
    path.write_bytes(pki.pem(builder.sign(ca.key, SHA256())))


def damage_other_name(path: Path) -> None:
    """Signed with the CA's key, in another's name."""
    ca, now = pki.load_authority(path.parent), datetime.now(UTC)
    other = pki.Holder(certificate=pki.new_authority(now).certificate, key=ca.key)
    path.write_bytes(pki.pem(pki.sign_crl(other, 1, (), now)))


CRL_DAMAGES = (
    damage_missing,
    damage_garbage,
    damage_flipped,
    damage_another_ca_s,
    damage_no_number,
    damage_other_name,
)


@pytest.mark.parametrize("damage", CRL_DAMAGES)
def test_a_damaged_crl_is_not_begun_afresh(site: Site, damage: Callable[[Path], None]) -> None:
    """A revoked certificate would be good again."""
    site.tenant()
    damage(site.ca / "crl.pem")
    before = site.contents()
    for words in (("revoke", "acme"), ("crl",), ("show",)):
        expect(site.run(*words), EXIT_ENVIRONMENT, "crl.pem")
    assert {**site.contents(), "ca/.lock": b""} == {**before, "ca/.lock": b""}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crl_that_cannot_be_written_stays_as_it_was(
    site: Site, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    site.tenant()
    before = site.contents()

    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    expect(site.run("revoke", "acme"), EXIT_ENVIRONMENT, "cannot write in ca: No space left")
    assert site.contents() == {**before, "ca/.lock": b""}


# --- the CA's own files -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("tenant", "acme"), ("revoke", "acme"), ("crl",), ("show",)])
def test_without_a_ca(bare: Site, words: tuple[str, ...]) -> None:
    expect(bare.run(*words), EXIT_ENVIRONMENT, "cannot read ca/ca.crt: No such file")
    assert bare.contents() == {}


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "is empty"), (b"x", "is not PEM"), (b"-----BEGIN CERTIFICATE-----\nx\n", "is not PEM")],
)
def test_a_ca_certificate_that_is_none(site: Site, data: bytes, words: str) -> None:
    (site.ca / "ca.crt").write_bytes(data)
    done = site.run("tenant", "acme")
    expect(done, EXIT_ENVIRONMENT, f"the certificate of the CA: ca/ca.crt {words}")


def test_keys_that_are_not_the_ca_s(site: Site) -> None:
    site.tenant()
    path = site.ca / "ca.key"
    own = load_pem_private_key(path.read_bytes(), None)
    foreign = rsa.generate_private_key(65537, 1024)
    locked = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    plain = foreign.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    before = None
    for data, words in (
        (b"x", "not PEM"),
        (locked, "encrypted"),
        (plain, "not the key of the certificate ca/ca.crt"),
        ((site.ca / "server.key").read_bytes(), "not the key of the certificate ca/ca.crt"),
    ):
        path.write_bytes(data)
        before = site.contents()
        for action in (("tenant", "new"), ("revoke", "acme"), ("crl",)):
            expect(site.run(*action), EXIT_ENVIRONMENT, f"ca/ca.key is {words}")
        assert site.contents() == before
    path.chmod(0o644)
    expect(site.run("crl"), EXIT_ENVIRONMENT, "the key of the CA: ca/ca.key must not be readable")
    site.good("show")  # needs no key, which is offline


def test_a_tenant_of_another_ca_is_not_revoked(site: Site, tmp_path: Path) -> None:
    site.tenant()
    other = Site(tmp_path / "other")
    other.folder.mkdir()
    other.good("init", *HOSTS)
    other.tenant("acme")
    shutil.copy(other.ca / "tenants/acme.crt", site.ca / "tenants/acme.crt")
    for words in (("revoke", "acme"), ("show",)):
        expect(site.run(*words), EXIT_ENVIRONMENT, "acme.crt was not signed by the CA in ca.crt")
    assert len(site.crl()) == 0


# --- show, JSON, the command itself -----------------------------------------------------------------


def test_show(site: Site) -> None:
    site.tenant("b-tenant", "--dns", "b.example")
    site.tenant("a-tenant")
    site.good("revoke", "b-tenant")
    ca = pki.load_authority(site.ca)
    past = issue(ca, "past", days=1, now=datetime.now(UTC) - timedelta(days=2))
    (site.ca / "tenants/past.crt").write_bytes(pki.pem(past.certificate))
    table = [line.split("  ") for line in site.good("show").stdout.splitlines()]
    assert [(row[0], row[1], row[3]) for row in table[:-1]] == [
        ("ca", table[0][1], "good"),
        ("server", "dns:localhost ip:127.0.0.1 ip:::1", "good"),
        ("tenants/a-tenant", "spiffe://provider-proxy/tenant/a-tenant", "good"),
        ("tenants/b-tenant", "dns:b.example", "revoked"),
        ("tenants/past", "spiffe://x/past", "expired"),
    ]
    assert table[0][1].startswith("cn:provider-proxy CA ")
    end = site.certificate("tenants/a-tenant.crt").not_valid_after_utc
    assert datetime.fromisoformat(table[2][2]) == end
    due = site.crl().next_update_utc
    assert due is not None
    assert table[-1] == ["crl", "number 2", due.isoformat(), "good"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_copy_of_the_crl_for_the_daemon(site: Site, umask: int) -> None:
    """For its user, who may not look into the CA's folder; replaced as a whole."""
    before = os.umask(umask)
    try:
        out = site.folder / "crl-of-the-daemon.pem"
        out.write_bytes(b"old")
        inode = out.stat().st_ino
        site.tenant()
        lines = site.good("revoke", "acme", "--out", out).stdout.splitlines()
        assert lines == ["ca/crl.pem", str(out)]
        assert out.read_bytes() == (site.ca / "crl.pem").read_bytes()
        assert (stat.S_IMODE(out.stat().st_mode), out.stat().st_ino != inode) == (0o644, True)
        assert site.json("crl", "--out", out)["crl"] == str(out)
        assert x509.load_pem_x509_crl(out.read_bytes()).is_signature_valid(
            site.certificate("ca.crt").public_key()  # type: ignore[arg-type]
        )
        missing = site.folder / "none" / "crl.pem"
        expect(site.run("crl", "--out", missing), EXIT_ENVIRONMENT, f"cannot write {missing}")
    finally:
        os.umask(before)


def test_show_says_when_the_crl_has_run_out(site: Site) -> None:
    ca = pki.load_authority(site.ca)
    old = datetime.now(UTC) - timedelta(days=40)
    (site.ca / "crl.pem").write_bytes(pki.pem(pki.sign_crl(ca, 2, (), old)))
    assert site.good("show").stdout.splitlines()[-1].endswith("  expired")


def test_show_json(site: Site) -> None:
    acme = site.tenant()
    site.good("revoke", "acme")
    values = site.json("show")
    ca, server, tenant = values["certificates"]
    assert (ca["name"], server["name"]) == ("ca", "server")
    assert tenant == {
        "name": "tenants/acme",
        "identities": ["spiffe://provider-proxy/tenant/acme"],
        "serial": f"{acme.serial_number:x}",
        "not_after": acme.not_valid_after_utc.isoformat(),
        "revoked": True,
    }
    assert not ca["revoked"]
    assert not server["revoked"]
    due = site.crl().next_update_utc
    assert due is not None
    assert values["crl"] == {"number": 2, "next_update": due.isoformat(), "revoked": 1}


def test_show_without_the_server(site: Site) -> None:
    """On the CA's machine it may be put aside."""
    (site.ca / "server.crt").unlink()
    assert [entry["name"] for entry in site.json("show")["certificates"]] == ["ca"]


def test_json_of_what_was_made(bare: Site) -> None:
    made = bare.json("init", *HOSTS)
    assert sorted(made["files"]) == [f"ca/{name}" for name in INIT_FILES]
    server = bare.certificate("server.crt")
    assert made["serial"] == f"{server.serial_number:x}"
    assert made["not_after"] == server.not_valid_after_utc.isoformat()
    made = bare.json("tenant", "acme")
    assert made["files"] == ["ca/tenants/acme.crt", "ca/tenants/acme.key"]
    assert made["identities"] == ["spiffe://provider-proxy/tenant/acme"]


def test_as_a_command(tmp_path: Path) -> None:
    done = run_command("pki", "init", "ca", "--host", "x", "--json", cwd=tmp_path)
    expect(done, EXIT_GOOD)
    assert len(done.stdout.splitlines()) == 1
    expect(run_command("pki", "init", "ca", "--host", "x", cwd=tmp_path), EXIT_USAGE, "ca/ca.crt")
    expect(run_command("pki", "show", "none", cwd=tmp_path), EXIT_ENVIRONMENT, "none/ca.crt")
    expect(run_command("pki", cwd=tmp_path), EXIT_USAGE, "ACTION")


def test_nothing_but_cryptography_is_needed() -> None:
    assert brought_by("provider_proxy.cli.pki") <= {"provider_proxy"} | CRYPTOGRAPHY


# --- docs/tls.md ------------------------------------------------------------------------------------


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.M | re.S)


def block(word: str) -> str:
    (found,) = (block for block in blocks() if word in block)
    return found


def shell(folder: Path, script: str, *, limit_s: float = 60) -> Done:
    """Run a script with `provider-proxy` on its path; whatever it left running goes with it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["sh", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    finally:
        if process.poll() is None:  # the group is this script's alone
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
    return subprocess.CompletedProcess(script, process.returncode, output, output)


def test_the_first_set_up_takes_five_commands() -> None:
    script = re.sub(r"<<'END'\n.*?^END$", "", block("tls.toml"), flags=re.M | re.S)
    assert len(script.splitlines()) == 5


@pytest.mark.real
@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
def test_the_first_set_up_runs(tmp_path: Path) -> None:
    """And then: nobody without a certificate, and nobody who was revoked."""
    fetch = "provider-proxy fetch https://localhost:8890 --pcrs 0 --evidence no --ca pki/ca.crt"
    own = "--cert pki/tenants/acme.crt --key pki/tenants/acme.key"
    script = f"""
{block("tls.toml")}
{fetch} && echo WITHOUT CERTIFICATE
{block("pki revoke")}
kill -HUP $!
while {fetch} {own}; do sleep 1; done
kill $!; wait $!
"""
    script = script.replace("8890", str(free_port())).replace("sleep 1", "sleep 0.1")
    done = shell(tmp_path, script)
    assert done.returncode == 0, done.stdout
    assert "evidence in evidence.json" in done.stdout
    assert json.loads((tmp_path / "evidence.json").read_text())["code"] == 200
    assert "WITHOUT CERTIFICATE" not in done.stdout
    assert re.search(r"^tenants/acme .* revoked$", done.stdout, re.M)
    assert "your certificate was revoked" in done.stdout
    assert "INFO stopped" in done.stdout


@pytest.mark.real
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_other_commands_of_the_document_run(tmp_path: Path) -> None:
    made = "".join(block("tls.toml").splitlines(True)[:2])
    lines = [
        *("set -ex", made),
        *(block("$old"), block("x509toreq"), block("both.crt")),
        *(block("pki crl"), block("openssl verify"), block("pki revoke")),
    ]
    done = shell(tmp_path, "\n".join(lines))
    assert done.returncode == 0, done.stdout
    site = Site(tmp_path)
    site.ca = tmp_path / "pki"
    (old,) = (path.stem for path in site.ca.glob("tenants/acme.until.*.crt"))
    for name in ("server", "tenants/acme", f"tenants/{old}"):
        assert f"pki/{name}.crt: OK\n" in done.stdout
    shown = run_here("pki", "show", "pki", cwd=tmp_path).stdout.splitlines()
    states = {line.split("  ")[0]: line.split("  ")[-1] for line in shown}
    assert (states["tenants/acme"], states[f"tenants/{old}"]) == ("revoked", "good")
    check_pair(site.ca, "server")
    end = site.certificate("server.crt").not_valid_after_utc
    assert abs(end - datetime.now(UTC) - timedelta(days=cli.SERVER_DAYS)) < MINUTE
    handshake_across(tmp_path)


def handshake_across(folder: Path) -> None:
    """With both CAs trusted, a tenant of either comes to a server of either, renewed or new."""
    for number in ("", "2"):
        run_here("pki", "tenant", f"pki{number}", "other", cwd=folder)
    for server_ca in ("pki", "pki2"):
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(folder / server_ca / "server.crt", folder / server_ca / "server.key")
        server.verify_mode = ssl.CERT_REQUIRED
        server.load_verify_locations(folder / "both.crt")
        for client_ca in ("pki", "pki2"):
            tenants = folder / client_ca / "tenants"
            client = ssl.create_default_context(cafile=str(folder / "both.crt"))
            client.load_cert_chain(tenants / "other.crt", tenants / "other.key")
            handshake(server, client, "127.0.0.1")


def test_documented_days_and_modes_are_the_code_s(site: Site) -> None:
    text = DOC.read_text(encoding="utf-8")
    for words in (
        f"| CA | {pki.CA_DAYS} days |",
        f"| server | {cli.SERVER_DAYS} days, or `--days` |",
        f"| tenant | {cli.TENANT_DAYS} days, or `--days` |",
        f"**A CRL is good for {pki.CRL_DAYS} days**",
    ):
        assert words in text
    site.tenant("NAME")
    listed = re.findall(r"^\| `([\w./]+)` \| (0\d+) \|", text, re.M)
    assert {(name, int(octal, 8)) for name, octal in listed} == {
        (path.relative_to(site.ca).as_posix(), mode(path))
        for path in site.ca.rglob("*")
        if path.is_file()
    }
