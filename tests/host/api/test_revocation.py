"""Revocation over the whole chain, from files of several CRLs to the server; names that look alike."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from helpers import LIMIT_S, Certs, make_certs, server_on_port

from provider_proxy.common.crl import Crl, load_crls
from provider_proxy.common.tls import load_certificates
from provider_proxy.errors import HostError, UnknownTenantError
from provider_proxy.host.api.identity import TenantDirectory, load_tenant_directory, parse_chain
from provider_proxy.host.config.tables import Listen, TenantRules
from provider_proxy.host.http.listeners import tls_context
from provider_proxy.host.http.messages import Peer, Request, Response
from provider_proxy.host.http.server import HttpServer

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
NEVER = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\x05\x00")


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclasses.dataclass(frozen=True)
class Holder:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    def revokes(
        self, *holders: Holder, delta: bool = False, extension: x509.ExtensionType | None = None
    ) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(NOW - DAY)
            .next_update(NOW + DAY)
        )
        if delta:
            builder = builder.add_extension(x509.DeltaCRLIndicator(1), critical=True)
        if extension is not None:
            builder = builder.add_extension(extension, critical=True)
        for holder in holders:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(holder.certificate.serial_number)
                .revocation_date(NOW - DAY)
                .build()
            )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def issue(
    text: str,
    issuer: Holder | None = None,
    names: Iterable[x509.GeneralName] | None = None,
    *,
    raw: bytes | None = None,
    days: int = 1,
) -> Holder:
    """A CA's certificate, or with `names` or `raw` (the extension's value) a client's."""
    key = ec.generate_private_key(ec.SECP256R1())
    is_ca = names is None and raw is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(text))
        .issuer_name(issuer.certificate.subject if issuer else name(text))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 2 * DAY)
        .not_valid_after(NOW + days * DAY)
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
    )
    if is_ca:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    if raw is not None:
        extension = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, raw)
        builder = builder.add_extension(extension, critical=False)
    elif names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signer = issuer.key if issuer else key
    return Holder(builder.sign(signer, hashes.SHA256()), key)


ROOT = issue("root")
INTER = issue("inter", ROOT)
OTHER = issue("other", ROOT)
LEAF = issue("leaf", INTER, [x509.DNSName("acme.example")])
CHAIN = (LEAF.der(), INTER.der(), ROOT.der())


def lists_of(
    folder: Path, *crls: bytes, trusted: Iterable[Holder] = (ROOT, INTER)
) -> tuple[Crl, ...]:
    ca, crl = folder / "ca.pem", folder / "crl.pem"
    ca.write_bytes(b"".join(each.pem() for each in trusted))
    crl.write_bytes(b"".join(crls))
    return load_crls("listen.client_crl", crl, load_certificates("listen.client_ca", ca))


def is_revoked(lists: tuple[Crl, ...]) -> bool:
    return any(each.holds(issued) for each in lists for issued in parse_chain(CHAIN).issued)


# --- the file ---------------------------------------------------------------------------------------


def test_every_certificate_of_the_chain_is_looked_at(tmp_path: Path) -> None:
    assert not is_revoked(lists_of(tmp_path, ROOT.revokes(), INTER.revokes()))
    assert is_revoked(lists_of(tmp_path, ROOT.revokes(INTER)))
    assert is_revoked(lists_of(tmp_path, INTER.revokes(LEAF)))
    assert not is_revoked(lists_of(tmp_path, ROOT.revokes(OTHER)))


def test_every_crl_of_a_file_counts(tmp_path: Path) -> None:
    for crls in ((ROOT.revokes(), INTER.revokes(LEAF)), (INTER.revokes(LEAF), ROOT.revokes())):
        assert is_revoked(lists_of(tmp_path, *crls))
    assert is_revoked(lists_of(tmp_path, ROOT.revokes(OTHER), ROOT.revokes(INTER)))


def test_a_number_counts_for_its_own_issuer_alone(tmp_path: Path) -> None:
    """Two CAs may give the same number; and a CA's name may be written by another."""
    namesake = issue("inter", ROOT)
    assert not is_revoked(
        lists_of(tmp_path, namesake.revokes(LEAF), trusted=(ROOT, INTER, namesake))
    )


def test_a_ca_without_a_list_is_named_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lists_of(tmp_path, ROOT.revokes())
    listen = Listen(client_ca=tmp_path / "ca.pem", client_crl=tmp_path / "crl.pem")
    for strict in (False, True):
        directory = load_tenant_directory(
            dataclasses.replace(listen, crl_strict=strict), TenantRules(accept_unlisted=True), {}
        )
        assert "no CRL of CN=inter" in caplog.text
        if not strict:
            assert directory.find(peer(CHAIN)).name == "dns:acme.example"
            continue
        with pytest.raises(UnknownTenantError, match="no revocation list"):
            directory.find(peer(CHAIN))


@pytest.mark.parametrize(
    ("crls", "words"),
    [
        ((OTHER.revokes(),), "has a CRL of 'CN=other' that none of the trusted CAs signed"),
        ((ROOT.revokes(), OTHER.revokes()), "CN=other"),
        ((ROOT.revokes(), ROOT.pem()), "holds text that belongs to no CRL"),
        ((ROOT.revokes(), b"-----BEGIN X509 CRL-----\nMII"), "holds text that belongs to no CRL"),
        (
            (ROOT.revokes(), b"-----BEGIN X509 CRL-----\nMII\n-----END X509 CRL-----"),
            "is not a CRL",
        ),
        ((ROOT.revokes(delta=True),), "of a kind that is not supported"),
        ((ROOT.revokes(extension=NEVER),), "of a kind that is not supported"),
        ((b"",), "is empty"),
    ],
)
def test_what_would_not_count_is_refused(
    tmp_path: Path, crls: tuple[bytes, ...], words: str
) -> None:
    with pytest.raises(HostError, match=words):
        lists_of(tmp_path, *crls)


# --- the directory ----------------------------------------------------------------------------------


def test_who_it_is_that_is_revoked_is_said(tmp_path: Path) -> None:
    cases = [
        (ROOT.revokes(INTER), "a CA above your"),
        (INTER.revokes(LEAF), "^your certificate was"),
        (INTER.revokes() + ROOT.revokes(INTER), "a CA above your"),
        (ROOT.revokes() + INTER.revokes(LEAF), "^your certificate was"),
    ]
    for crl, words in cases:
        directory = TenantDirectory(
            TenantRules(accept_unlisted=True),
            {},
            certificates=True,
            crls=lists_of(tmp_path, crl),
            now=lambda: NOW,
        )
        with pytest.raises(UnknownTenantError, match=words):
            directory.find(peer(CHAIN))
        with pytest.raises(UnknownTenantError, match="connect again"):
            directory.find(
                dataclasses.replace(peer(CHAIN), chain=())
            )  # what cannot be told is refused


def test_a_ca_that_is_over_ends_its_certificates(tmp_path: Path) -> None:
    short = issue("inter", ROOT, days=1)
    leaf = issue("leaf", short, [x509.DNSName("acme.example")], days=9)
    now = [NOW]
    directory = TenantDirectory(
        TenantRules(accept_unlisted=True), {}, certificates=True, now=lambda: now[0]
    )
    chain = (leaf.der(), short.der(), issue("root", days=9).der())
    assert directory.find(peer(chain)).name == "dns:acme.example"
    now[0] += 2 * DAY
    with pytest.raises(UnknownTenantError, match="not valid now"):
        directory.find(peer(chain))


def peer(chain: tuple[bytes, ...]) -> Peer:
    return Peer(
        name="192.0.2.1:5",
        is_gone=lambda: False,
        limit=lambda seconds: None,
        certificate=chain[0],
        chain=chain,
    )


# --- names ------------------------------------------------------------------------------------------


def names_of(names: Iterable[x509.GeneralName] = (), raw: bytes | None = None) -> list[str]:
    holder = issue("the common name", ROOT, names, raw=raw)
    return [
        each for each in parse_chain((holder.der(),)).identities if not each.startswith("sha256")
    ]


def der(tag: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([tag, len(data)]) + data


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ["cn:the common name"]),
        ([x509.DNSName("Keylime.ACME.example")], ["dns:keylime.acme.example"]),
        ([x509.RFC822Name("Ops@ACME.example")], ["email:Ops@acme.example"]),
        (
            [x509.UniformResourceIdentifier("SPIFFE://Example.ORG/Acme")],
            ["spiffe://example.org/Acme"],
        ),
        ([x509.UniformResourceIdentifier("https://attacker.example/")], []),
        ([x509.UniformResourceIdentifier("no uri at all")], []),
        ([x509.IPAddress(ipaddress.ip_address("10.0.0.1"))], []),
        ([x509.DirectoryName(name("another"))], []),
        ([x509.RegisteredID(x509.ObjectIdentifier("1.2.3.4"))], []),
        ([x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), der(12, b"upn@x"))], []),
    ],
)
def test_names(names: list[x509.GeneralName], expected: list[str]) -> None:
    """The CN counts only where the certificate has no alternative name, of whatever kind."""
    assert names_of(names) == expected


def test_an_empty_list_of_names_is_no_common_name() -> None:
    assert names_of(raw=der(0x30, b"")) == []


@pytest.mark.parametrize(
    "raw",
    [
        der(0x82, "\u212aeylime.acme.example".encode()),  # the Kelvin sign
        der(0x82, b"b\xfccher.example"),
        der(0x82, b"acme.example\x00.evil.example"),
        der(0x82, b"a\nb.example"),
        der(0x81, "ops@\u212a.example".encode()),
        der(0x86, "spiffe://\u212a.example/a".encode()),
        der(0x86, b"spiffe://a.example/1") + der(0x86, b"spiffe://b.example/2"),
    ],
)
def test_names_that_could_be_taken_for_others_are_refused(raw: bytes) -> None:
    with pytest.raises(UnknownTenantError):
        names_of(raw=der(0x30, raw))


# --- the server -------------------------------------------------------------------------------------


@asynccontextmanager
async def server(folder: Path, certs: Certs, seen: list[Peer]) -> AsyncIterator[str]:
    ca = folder / "clients.pem"
    ca.write_bytes(ROOT.pem())  # the client sends the intermediate
    listen = Listen(tls_cert=certs.cert, tls_key=certs.key, client_ca=ca)

    async def answer(request: Request) -> Response:
        seen.append(request.peer)
        return Response(body=(b"{}",))

    made = HttpServer(answer, observe=lambda status, reason: None)
    async with server_on_port(made, tls_context(listen)) as address:
        yield address


@pytest.mark.parametrize("number", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_the_chain_is_known_in_a_resumed_session_too(
    tmp_path: Path, number: ssl.TLSVersion
) -> None:
    certs = make_certs(tmp_path)
    pem = tmp_path / "leaf.pem"
    key = LEAF.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem.write_bytes(LEAF.pem() + INTER.pem() + key)
    client = certs.client()
    client.load_cert_chain(pem)
    client.minimum_version = client.maximum_version = number
    seen: list[Peer] = []
    reused: list[bool | None] = []

    def ask(address: str, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
        host, _, port = address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), LIMIT_S) as sock,
            client.wrap_socket(sock, server_hostname="localhost", session=session) as tls,
        ):
            tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert tls.recv(100)
            reused.append(tls.session_reused)
            return tls.session

    async with server(tmp_path, certs, seen) as address:
        session = await trio.to_thread.run_sync(ask, address, None)
        await trio.to_thread.run_sync(ask, address, session)
    assert reused == [False, True]
    assert [each.certificate for each in seen] == [LEAF.der()] * 2
    assert [each.chain for each in seen] == [CHAIN] * 2
