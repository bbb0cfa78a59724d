"""One loader of certificates and keys: each wrong file is named, with what is wrong and what to do."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from helpers import Certs, make_certs

from provider_proxy.cli.http import open_client
from provider_proxy.common.files import read_private
from provider_proxy.common.tls import (
    TlsFiles,
    client_context,
    dates_of,
    demand_current,
    pinned_context,
    server_context,
)
from provider_proxy.errors import HostError, UsageError
from provider_proxy.host import pki
from provider_proxy.host.config.chip_tables import KeylimeAgent
from provider_proxy.host.config.material import agent_files, agent_registrar_files
from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.host.config.tables import Listen
from provider_proxy.host.http.listeners import tls_context
from provider_proxy.tenant.watch.preflight import host_files as watch_files
from provider_proxy.tenant.watch.registrars import open_client as open_watch_registrar
from provider_proxy.tenant.watch.reports import webhook_client
from provider_proxy.tenant.watch.tables import HostRules, Webhook
from provider_proxy.tenant.watch.tables import RegistrarTable as WatchRegistrar
from provider_proxy.trust.registration.client import tls_context as registrar_context

NAMES = ("--ca", "--cert", "--key")


def private(path: Path, data: bytes) -> Path:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path


@dataclass(frozen=True)
class Material:
    """Good files, and how to spoil them."""

    certs: Certs
    folder: Path

    def cert(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certs.client_cert.read_bytes())

    def key_as(self, encoding: Encoding, password: bytes | None = None) -> bytes:
        key = load_pem_private_key(self.certs.client_key.read_bytes(), None)
        how = BestAvailableEncryption(password) if password else NoEncryption()
        return key.private_bytes(encoding, PrivateFormat.PKCS8, how)

    def traditional(self) -> bytes:
        """OpenSSL's own form of an encrypted key, with a Proc-Type line."""
        key = load_pem_private_key(self.certs.client_key.read_bytes(), None)
        return key.private_bytes(
            Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"word")
        )


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return Material(make_certs(tmp_path), tmp_path)


Spoil = Callable[[Material], object]


def missing(of: Path) -> None:
    of.unlink()


def folder(of: Path) -> None:
    of.unlink()
    of.mkdir()


def device(of: Path) -> None:
    of.unlink()
    of.symlink_to(os.devnull)


CASES: dict[str, tuple[Spoil, str]] = {
    "ca missing": (lambda m: missing(m.certs.ca_file), "--ca: cannot read .*No such file"),
    "ca folder": (lambda m: folder(m.certs.ca_file), "--ca: cannot read .*it is a directory"),
    "ca empty": (lambda m: m.certs.ca_file.write_text("\n"), "--ca: .* is empty"),
    "ca text": (lambda m: m.certs.ca_file.write_text("CA"), "--ca: .* is not PEM"),
    "ca cut": (
        lambda m: m.certs.ca_file.write_bytes(m.certs.ca_file.read_bytes()[:300]),
        "--ca: .* is not PEM: it has no complete",
    ),
    "ca DER": (
        lambda m: m.certs.ca_file.write_bytes(m.cert().public_bytes(Encoding.DER)),
        "--ca: .* is DER, and must be PEM: openssl x509 -inform der -in ",
    ),
    "ca is a key": (
        lambda m: m.certs.ca_file.write_bytes(m.certs.key.read_bytes()),
        "--ca: .* holds a private key, not a certificate",
    ),
    "cert missing": (lambda m: missing(m.certs.client_cert), "--cert: cannot read "),
    "cert empty": (lambda m: m.certs.client_cert.write_text(""), "--cert: .* is empty"),
    "cert DER": (
        lambda m: m.certs.client_cert.write_bytes(m.cert().public_bytes(Encoding.DER)),
        "--cert: .* is DER, and must be PEM",
    ),
    "cert damaged": (
        lambda m: m.certs.client_cert.write_bytes(
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        ),
        "--cert: .* holds a certificate that cannot be read",
    ),
    "cert is a server's": (
        lambda m: pki_pair(m, ExtendedKeyUsageOID.SERVER_AUTH),
        "--cert: .* is not for clients: its extended key usage lacks clientAuth",
    ),
    "chain in a wrong order": (
        lambda m: m.certs.client_cert.write_bytes(
            m.certs.ca_file.read_bytes() + m.certs.client_cert.read_bytes()
        ),
        "--cert: .* must begin with the certificate of ",
    ),
    "swapped": (
        lambda m: swap(m.certs.client_cert, m.certs.client_key),
        "--cert: .* holds a private key, not a certificate: are the two files swapped",
    ),
    "key missing": (lambda m: missing(m.certs.client_key), "--key: cannot read "),
    "key folder": (lambda m: folder(m.certs.client_key), "--key: .*it is a directory"),
    "key empty": (lambda m: private(m.certs.client_key, b""), "--key: .* is empty"),
    "key DER": (
        lambda m: private(m.certs.client_key, m.key_as(Encoding.DER)),
        "--key: .* is DER, and must be PEM: openssl pkey",
    ),
    "key is a certificate": (
        lambda m: private(m.certs.client_key, m.certs.client_cert.read_bytes()),
        "--key: .* holds a certificate, not a private key: are the two files swapped",
    ),
    "key of another": (
        lambda m: private(m.certs.client_key, m.certs.key.read_bytes()),
        "--key: .* is not the key of the certificate ",
    ),
    "key damaged": (
        lambda m: private(
            m.certs.client_key, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
        ),
        "--key: .* holds a key that cannot be read",
    ),
    "key encrypted": (
        lambda m: private(m.certs.client_key, m.key_as(Encoding.PEM, b"word")),
        "--key: .* is encrypted, and this program never asks",
    ),
    "key encrypted, old form": (
        lambda m: private(m.certs.client_key, m.traditional()),
        "--key: .* is encrypted, and this program never asks",
    ),
    "key 0644": (
        lambda m: m.certs.client_key.chmod(0o644),
        "--key: .* must not be readable by others: chmod 06",
    ),
    "key a device": (
        lambda m: device(m.certs.client_key),
        "--key: .* must be a plain file",
    ),
    "cert too large": (
        lambda m: os.truncate(m.certs.client_cert, 1 << 30),
        "--cert: .* is larger than",
    ),
}


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def pki_pair(
    m: Material,
    purpose: x509.ObjectIdentifier,
    *,
    now: datetime | None = None,
    days: int = 1,
) -> None:
    """A pair of another purpose, or of another time."""
    now = now or datetime.now(UTC)
    holder = pki.issue(
        pki.new_authority(now), "x", [x509.DNSName("x")], purpose, days=days, now=now
    )
    m.certs.client_cert.write_bytes(pki.pem(holder.certificate))
    private(m.certs.client_key, holder.key_pem())


def files_of(certs: Certs) -> TlsFiles:
    return TlsFiles(ca=certs.ca_file, cert=certs.client_cert, key=certs.client_key, names=NAMES)


@pytest.mark.parametrize("name", list(CASES))
def test_a_wrong_file_is_named_with_what_to_do(material: Material, name: str) -> None:
    spoil, words = CASES[name]
    client_context(files_of(material.certs))  # good before
    spoil(material)
    with pytest.raises(HostError, match=words) as caught:
        client_context(files_of(material.certs))
    assert "\n" not in str(caught.value)
    assert "PEM lib" not in str(caught.value)


def test_files_of_another_user(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    key = material.certs.client_key
    if os.geteuid() == 0:
        os.chown(key, 65534, 65534)
    client_context(files_of(material.certs))  # root may use what it could read anyway
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(
        HostError, match=r"is owned by uid \d+; only root and this user are trusted"
    ):
        client_context(files_of(material.certs))


def test_root_s_files_may_be_a_group_s(tmp_path: Path) -> None:
    """PostgreSQL's rule, of fe-secure-openssl.c: 0640 where root owns it, else 0600."""
    path = private(tmp_path / "k", b"x")
    path.chmod(0o640)
    if os.geteuid() == 0:
        assert read_private(path, 10) == b"x"
        os.chown(path, 65534, 65534)
    with pytest.raises(HostError, match="chmod 0600"):
        read_private(path, 10)


def test_a_key_may_come_through_a_pipe(material: Material) -> None:
    """`--key <(vault read …)`: it can be read but once."""
    read, write = os.pipe()
    os.write(write, material.certs.client_key.read_bytes())
    os.close(write)
    path = Path(f"/dev/fd/{read}")
    client_context(TlsFiles(cert=material.certs.client_cert, key=path, names=NAMES))
    os.close(read)


def test_a_bundle_with_comments_and_several_cas(material: Material) -> None:
    other = trustme.CA().cert_pem.bytes()
    text = "Autorité racine\n".encode() + material.certs.ca_file.read_bytes() + b"# two\n" + other
    material.certs.ca_file.write_bytes(text)
    assert len(client_context(files_of(material.certs)).get_ca_certs()) == 2


def test_one_file_for_certificate_and_key(material: Material) -> None:
    both = private(
        material.folder / "both.pem",
        material.certs.client_key.read_bytes() + material.certs.client_cert.read_bytes(),
    )
    client_context(TlsFiles(cert=both, key=both, names=NAMES))


def test_half_a_pair() -> None:
    for half in ({"cert": Path("/c")}, {"key": Path("/k")}):
        with pytest.raises(UsageError, match="--cert and --key belong together: set both"):
            TlsFiles(**half, names=NAMES)


def test_a_server_s_certificate_is_for_servers(material: Material) -> None:
    pki_pair(material, ExtendedKeyUsageOID.CLIENT_AUTH)
    with pytest.raises(
        HostError, match="is not for servers: its extended key usage lacks serverAuth"
    ):
        server_context(files_of(material.certs))


def test_no_certificate_to_pin(material: Material) -> None:
    with pytest.raises(HostError, match="the expected server certificate cannot be read"):
        pinned_context(b"-----BEGIN", files_of(material.certs))


def test_a_key_log_that_cannot_be_written(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", "/nonexistent/keys")
    with pytest.raises(HostError, match=r"^SSLKEYLOGFILE: cannot write /nonexistent/keys: No such"):
        client_context(files_of(material.certs))


# --- every server uses it ---------------------------------------------------------------------------


def _listen(c: Certs) -> None:
    tls_context(Listen(tls_cert=c.client_cert, tls_key=c.client_key, client_ca=c.ca_file))


def _registrar(c: Certs) -> None:
    table = RegistrarTable(
        url="https://r", ca=c.ca_file, client_cert=c.client_cert, client_key=c.client_key
    )
    registrar_context("registrars.r", table)


def _agent(c: Certs) -> None:
    pinned_context(
        c.cert.read_bytes(),
        agent_files(KeylimeAgent(client_cert=c.client_cert, client_key=c.client_key)),
    )


def _agent_registrar(c: Certs) -> None:
    settings = KeylimeAgent(registrar_cert=c.client_cert, registrar_key=c.client_key)
    client_context(agent_registrar_files(settings))


def _watch_host(c: Certs) -> None:
    rules = HostRules(tls_ca=c.ca_file, tls_cert=c.client_cert, tls_key=c.client_key)
    client_context(watch_files("h", rules))


def _watch_registrar(c: Certs) -> None:
    table = WatchRegistrar(ca=c.ca_file, cert=c.client_cert, key=c.client_key)
    open_watch_registrar(name="r", table=table)


def _command(c: Certs) -> None:
    open_client(c.ca_file, c.client_cert, c.client_key, names=NAMES)


DOORS: dict[Callable[[Certs], None], str] = {
    _listen: "listen.tls_key",
    _registrar: "registrars.r.client_key",
    _agent: "keylime_agent.client_key",
    _agent_registrar: "keylime_agent.registrar_key",
    _watch_host: "hosts.h.tls_key",
    _watch_registrar: "registrars.r.key",
    _command: "--key",
}


@pytest.mark.parametrize("server", list(DOORS))
def test_every_door_has_the_same_rule_for_keys(
    material: Material, server: Callable[[Certs], None]
) -> None:
    certs = material.certs
    server(certs)
    certs.client_key.chmod(0o644)
    with pytest.raises(HostError, match=f"^{DOORS[server]}: .* must not be readable by others"):
        server(certs)
    private(certs.client_key, material.key_as(Encoding.PEM, b"word"))
    with pytest.raises(HostError, match=f"^{DOORS[server]}: .* is encrypted"):
        server(certs)


def test_the_webhook_s_ca(material: Material) -> None:
    settings = Webhook(url="https://x", ca=material.folder / "none")
    with pytest.raises(HostError, match=r"^webhook\.ca: cannot read "):
        webhook_client(settings)


def test_a_command_with_an_encrypted_key_ends_at_once(material: Material) -> None:
    """Before, OpenSSL asked on the terminal and waited for ever."""
    certs = material.certs
    private(certs.client_key, material.key_as(Encoding.PEM, b"word"))
    argv = ["-m", "provider_proxy", "identity", "https://127.0.0.1:1", "--ca", str(certs.ca_file)]
    done = subprocess.run(
        [sys.executable, *argv, "--cert", str(certs.client_cert), "--key", str(certs.client_key)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 3
    assert "is encrypted" in done.stderr
    assert "pass phrase" not in done.stderr + done.stdout


# --- dates ------------------------------------------------------------------------------------------


def test_dates(material: Material) -> None:
    certs = material.certs
    demand_current(files_of(certs))
    found = {each.name: each for each in dates_of(files_of(certs))}
    assert set(found) == {"--ca", "--cert"}
    assert found["--cert"].not_after == material.cert().not_valid_after_utc
    after = found["--cert"].not_after + timedelta(seconds=1)
    assert "expired on" in (found["--cert"].problem(after) or "")
    with pytest.raises(HostError, match=r"^--c(ert|a): .* expired on \d{4}-"):
        demand_current(files_of(certs), after)
    before = found["--cert"].not_before - timedelta(seconds=1)
    with pytest.raises(HostError, match="is the clock of this machine right"):
        demand_current(files_of(certs), before)


def test_a_command_with_an_expired_certificate_says_so(material: Material) -> None:
    past = datetime.now(UTC) - timedelta(days=9)
    pki_pair(material, ExtendedKeyUsageOID.CLIENT_AUTH, now=past)
    with pytest.raises(HostError, match=r"^--cert: .* expired on"):
        _command(material.certs)
    _registrar(material.certs)  # a daemon starts, and says so elsewhere


def test_of_a_bundle_the_last_ca_to_go_counts(material: Material) -> None:
    past = datetime.now(UTC) - timedelta(days=pki.CA_DAYS + 9)
    old = pki.pem(pki.new_authority(past).certificate)
    good = material.certs.ca_file.read_bytes()
    material.certs.ca_file.write_bytes(old + good)
    demand_current(files_of(material.certs))
    material.certs.ca_file.write_bytes(old)
    with pytest.raises(HostError, match=r"^--ca: .* expired on"):
        demand_current(files_of(material.certs))


def test_contexts_are_strict(material: Material) -> None:
    context = client_context(files_of(material.certs))
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    server = server_context(TlsFiles(cert=material.certs.cert, key=material.certs.key, names=NAMES))
    assert server.verify_mode is ssl.CERT_NONE
    assert server.minimum_version is ssl.TLSVersion.TLSv1_2
