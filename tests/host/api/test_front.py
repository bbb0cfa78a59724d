"""A front's listener: RFC 9440's header, the chain against OpenSSL's word, and who may be a front."""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
import subprocess
from dataclasses import dataclass, field, replace
from datetime import UTC
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from helpers import LIMIT_S, FakeQuoter, Wire, connect, daemon_with, get, get_bytes, make_certs

from provider_proxy.errors import ClientCertError, UnknownTenantError
from provider_proxy.host.api.front import (
    ClientChain,
    FrontJudge,
    parse_client_cert,
    parse_client_chain,
)
from provider_proxy.host.api.identity import TenantDirectory
from provider_proxy.host.config.tables import Admin, Config, Limits, Listen, TenantRules
from provider_proxy.host.http.messages import Peer, Request
from provider_proxy.host.status.recent import FRESH_S

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(UTC)


def header(der: bytes) -> str:
    return ":" + base64.b64encode(der).decode("ascii") + ":"


# --- the header -------------------------------------------------------------------------------------


def test_a_certificate_in_the_header() -> None:
    assert parse_client_cert([":MTIz:"]) == b"123"
    assert parse_client_cert([" :MTIz: \t"]) == b"123"


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        [":"],
        ["::"],
        ["MTIz"],
        [":MTIz"],
        ["MTIz:"],
        [":MTI:"],
        [":MT Iz:"],
        [":MTI_:"],
        [":MTIz:;a=1"],
        [":MTIz:, :MTIz:"],
        [":MTIz:", ":MTIz:"],
        [":" + base64.b64encode(bytes(9000)).decode() + ":"],
        ["-----BEGIN CERTIFICATE-----"],
        [":MTIz\u00e9:"],
    ],
)
def test_what_is_no_such_header(values: list[str]) -> None:
    with pytest.raises(ClientCertError) as caught:
        parse_client_cert(values)
    assert caught.value.status == 400
    assert caught.value.closes


def test_a_chain_in_its_header() -> None:
    assert parse_client_chain([]) == ()
    assert parse_client_chain([""]) == ()
    assert parse_client_chain([":MTIz:, :NDU2:"]) == (b"123", b"456")
    assert parse_client_chain([":MTIz:", ":NDU2:"]) == (b"123", b"456")


@pytest.mark.parametrize(
    "values",
    [["x"], [":MTIz:,"], [":MTIz:", ""], [",:MTIz:"], ["::"], [":MTIz: :NDU2:"], [":MTIz:"] * 9],
)
def test_what_is_no_chain(values: list[str]) -> None:
    with pytest.raises(ClientCertError) as caught:
        parse_client_chain(values)
    assert caught.value.closes


# --- the chain --------------------------------------------------------------------------------------


@dataclass
class Issued:
    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)


def issue(
    name: str,
    by: Issued | None = None,
    *,
    ca: bool = False,
    usage: x509.ObjectIdentifier | None = None,
    days: tuple[int, int] = (-1, 9),
    constraints: bool = True,
    path_length: int | None = None,
    signs: bool | None = None,
) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.cert.subject if by is not None else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + days[0] * DAY)
        .not_valid_after(NOW + days[1] * DAY)
    )
    if ca and constraints:
        limits = x509.BasicConstraints(ca=True, path_length=path_length)
        builder = builder.add_extension(limits, critical=True)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if signs is not None:
        builder = builder.add_extension(
            x509.KeyUsage(signs, False, not signs, False, False, False, False, False, False), True
        )
    signer = by.key if by is not None else key
    return Issued(builder.sign(signer, hashes.SHA256()), key)


ROOT = issue("root", ca=True)
OTHER = issue("root", ca=True)  # of the same name, and another key
BETWEEN = issue("between", ROOT, ca=True)
NO_CA = issue("no ca", ROOT)
SHORT = issue("short", ROOT, ca=True, path_length=0)
BELOW_SHORT = issue("below short", SHORT, ca=True)
OVER = issue("over", ROOT, ca=True, days=(-9, -1))
FILE = [ROOT, BETWEEN, NO_CA, SHORT, BELOW_SHORT, OVER]

LEAVES: dict[str, Issued] = {
    "of the root": issue("tenant", ROOT),
    "for clients": issue("tenant", ROOT, usage=ExtendedKeyUsageOID.CLIENT_AUTH),
    "of the CA between": issue("tenant", BETWEEN),
    "that may sign": issue("tenant", ROOT, signs=True),
    "for servers alone": issue("tenant", ROOT, usage=ExtendedKeyUsageOID.SERVER_AUTH),
    "of another root of that name": issue("tenant", OTHER),
    "of nobody": issue("tenant"),
    "of one that is no CA": issue("tenant", NO_CA),
    "too far below": issue("tenant", BELOW_SHORT),
    "of a CA that has run out": issue("tenant", OVER),
    "that has run out": issue("tenant", ROOT, days=(-9, -1)),
    "that is not good yet": issue("tenant", ROOT, days=(1, 9)),
    "that may not prove its key": issue("tenant", ROOT, signs=False),
}


def openssl_says(folder: Path, leaf: Issued) -> bool:
    """Whether the library under the other listeners' TLS takes it."""
    (folder / "ca.pem").write_bytes(b"".join(ca.cert.public_bytes(Encoding.PEM) for ca in FILE))
    (folder / "leaf.pem").write_bytes(leaf.cert.public_bytes(Encoding.PEM))
    command = ["openssl", "verify", "-purpose", "sslclient", "-CAfile"]
    done = subprocess.run(
        [*command, str(folder / "ca.pem"), str(folder / "leaf.pem")],
        capture_output=True,
        check=False,
        timeout=LIMIT_S,
    )
    return done.returncode == 0


@pytest.mark.parametrize("name", LEAVES)
def test_a_chain_is_judged_as_openssl_judges_it(tmp_path: Path, name: str) -> None:
    leaf = LEAVES[name]
    chain = ClientChain([ca.cert for ca in FILE])
    try:
        chain.check(leaf.cert.public_bytes(Encoding.DER))
        good = True
    except UnknownTenantError:
        good = False
    assert good == openssl_says(tmp_path, leaf)


def test_a_chain_is_looked_at_again_after_a_while() -> None:
    clock, date = [0.0], [NOW]
    chain = ClientChain([ROOT.cert], now=lambda: date[0], monotonic=lambda: clock[0])
    der = LEAVES["of the root"].cert.public_bytes(Encoding.DER)
    chain.check(der)
    date[0] += 100 * DAY
    chain.check(der)
    clock[0] += 61
    with pytest.raises(UnknownTenantError):
        chain.check(der)


def test_cas_in_between_that_the_front_sends() -> None:
    """They show the way to the CA, and make none."""
    der = {name: leaf.cert.public_bytes(Encoding.DER) for name, leaf in LEAVES.items()}
    between, other, no_ca = (
        each.cert.public_bytes(Encoding.DER) for each in (BETWEEN, OTHER, NO_CA)
    )
    chain = ClientChain([ROOT.cert])
    with pytest.raises(UnknownTenantError):
        chain.check(der["of the CA between"])
    found = chain.check(der["of the CA between"], [other, between])
    assert found == (der["of the CA between"], between, ROOT.cert.public_bytes(Encoding.DER))
    for name, helper in (
        ("of another root of that name", other),
        ("of one that is no CA", no_ca),
        ("of nobody", der["of nobody"]),
    ):
        with pytest.raises(UnknownTenantError):
            chain.check(der[name], [helper])
    with pytest.raises(ClientCertError, match="Client-Cert-Chain"):
        chain.check(der["of the root"], [b"123"])


def test_bytes_that_are_no_certificate() -> None:
    with pytest.raises(ClientCertError):
        ClientChain([ROOT.cert]).check(b"123")
    with pytest.raises(UnknownTenantError):
        ClientChain([BETWEEN.cert]).check(
            LEAVES["of the CA between"].cert.public_bytes(Encoding.DER)
        )


# --- who is the front -------------------------------------------------------------------------------

TENANT = LEAVES["of the root"].cert.public_bytes(Encoding.DER)
FRONT = Peer(name="unix:1", is_gone=lambda: False, limit=lambda s: None, uid=33)


def judge() -> FrontJudge:
    directory = TenantDirectory(TenantRules(accept_unlisted=True), {}, certificates=True)
    return FrontJudge(directory, ("uid:33", "cn:front"), ClientChain([ROOT.cert]))


def request(peer: Peer, *certs: bytes) -> Request:
    return Request(
        method="GET", path="/", query="", peer=peer, client_certs=tuple(map(header, certs))
    )


def test_the_tenant_is_the_certificates() -> None:
    admitted = judge().admit(request(FRONT, TENANT))
    assert (admitted.peer.certificate, admitted.peer.uid) == (TENANT, None)
    directory = TenantDirectory(TenantRules(accept_unlisted=True), {}, certificates=True)
    assert directory.find(admitted.peer).name == "cn:tenant"


def test_a_front_by_its_certificate() -> None:
    own = issue("front", ROOT).cert.public_bytes(Encoding.DER)
    peer = replace(FRONT, uid=None, certificate=own)
    assert judge().admit(request(peer, TENANT)).peer.certificate == TENANT


@pytest.mark.parametrize(
    "peer",
    [
        replace(FRONT, uid=34),
        replace(FRONT, uid=None),
        replace(FRONT, uid=None, certificate=TENANT),
        replace(
            FRONT,
            uid=None,
            certificate=issue("front", ROOT, days=(-9, -1)).cert.public_bytes(Encoding.DER),
        ),
    ],
)
def test_who_is_no_front(peer: Peer) -> None:
    with pytest.raises(UnknownTenantError):
        judge().admit(request(peer, TENANT))


@pytest.mark.parametrize("certs", [(), (TENANT, TENANT), (b"",)])
def test_a_front_that_does_not_pass_one_certificate_on(certs: tuple[bytes, ...]) -> None:
    with pytest.raises(ClientCertError):
        judge().admit(request(FRONT, *certs))


# --- the daemon -------------------------------------------------------------------------------------


async def reply_of(wire: Wire, *headers: str) -> int:
    await wire.send(get_bytes("/version", *headers))
    with trio.fail_after(LIMIT_S):
        return (await wire.reply()).status


async def tenants_seen(admin: str) -> set[str]:
    results = (await get(admin, "/status")).envelope()["results"]
    assert isinstance(results, dict)
    return {row["name"] for row in results["tenants"]["listed"]}


async def turned_away(admin: str) -> list[dict[str, object]]:
    results = (await get(admin, "/status")).envelope()["results"]
    assert isinstance(results, dict)
    listed: list[dict[str, object]] = results["turned_away"]
    return listed


async def test_a_daemon_with_a_front(tmp_path: Path) -> None:
    """One upstream connection, several tenants, and every way to get it wrong; the same headers do
    nothing at the tenants' own listener."""
    certs = make_certs(tmp_path)
    ca = certs.ca
    one = ca.issue_cert("one@example.org", common_name="one")
    two = ca.issue_cert("two@example.org", common_name="two")

    def der(leaf: object) -> bytes:
        pem = leaf.cert_chain_pems[0].bytes()  # type: ignore[attr-defined]
        return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)

    config = Config(
        state_dir=tmp_path,
        listen=Listen(
            address=("127.0.0.1:0",),
            tls_cert=certs.cert,
            tls_key=certs.key,
            client_ca=certs.ca_file,
            front=(f"unix:{tmp_path}/front",),
            front_peers=(f"uid:{os.getuid()}",),
        ),
        admin=Admin(address=("127.0.0.1:0",)),
        limits=Limits(),
        tenant_defaults=TenantRules(accept_unlisted=True),
    )
    good_one, good_two = (f"Client-Cert: {header(der(leaf))}" for leaf in (one, two))
    async with daemon_with(FakeQuoter(), config) as started:
        (front,) = started.front_addresses
        async with connect(front) as wire:
            assert await reply_of(wire, good_one) == 200
            assert await reply_of(wire, good_two) == 200
            # What h11 reads is the same as what the expression does.
            assert (
                await reply_of(wire, good_one.replace("Client-Cert", "client-CERT"), "TE: x") == 200
            )
        seen = await tenants_seen(started.admin_addresses[0])
        assert {"email:one@example.org", "email:two@example.org"} <= seen
        for headers in (
            (),
            (good_one, good_two),
            (good_one, good_one),
            (good_one, good_two, "TE: x"),
            (good_one, good_two.replace("Client-Cert", "CLIENT-CERT")),
            ("Client-Cert:",),
            ("Client-Cert: x",),
            (good_one[:40] + "\r\n " + good_one[40:],),  # folded, which h11 unfolds
            (
                good_one.replace(" ", "\r\n "),  # and so is the second of two
                good_one,
            ),
            (good_one[:-1] + "\t" + good_one[-1],),
            (good_one, "Client-Cert-Chain: x"),
            (good_one, "Client-Cert-Chain: x", "TE: x"),
            (good_one + ", " + good_two.partition(" ")[2],),
        ):
            async with connect(front) as wire:
                assert await reply_of(wire, *headers) == 400, headers
                assert await wire.is_closed()
        async with connect(front) as wire:  # two tenants' requests in one piece
            await wire.send(get_bytes("/version", good_one) + get_bytes("/version", good_two))
            with trio.fail_after(LIMIT_S):
                assert [(await wire.reply()).status for _ in range(2)] == [200, 200]
        async with connect(front) as wire:  # a refusal answers nothing behind it
            await wire.send(
                get_bytes("/version", "Client-Cert: x") + get_bytes("/version", good_two)
            )
            with trio.fail_after(LIMIT_S):
                assert (await wire.reply()).status == 400
            assert await wire.is_closed()
        async with connect(front) as wire:
            stranger = f"Client-Cert: {header(TENANT)}"
            assert await reply_of(wire, stranger) == 403
        away = await turned_away(started.admin_addresses[0])
        assert away[0]["reason"] == "your certificate was not issued by a CA in listen.client_ca"
        assert away[0]["fingerprint"] == hashlib.sha256(TENANT).hexdigest()
        assert away[-1] == {**away[-1], "reason": "the front sent no Client-Cert header"}
        assert away[-1]["fingerprint"] is None
        for elsewhere in (
            (good_one,),
            (good_one, good_two),
            ("Client-Cert: x",),
            (good_one, "TE: x"),
        ):
            async with connect(started.addresses[0], certs.client(with_cert=True)) as wire:
                assert await reply_of(wire, *elsewhere) == 200
        await trio.sleep(FRESH_S)
        assert "email:tenant@example.org" in await tenants_seen(started.admin_addresses[0])


async def test_a_process_that_is_no_front(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    config = Config(
        state_dir=tmp_path,
        listen=Listen(
            address=("127.0.0.1:0",),
            tls_cert=certs.cert,
            tls_key=certs.key,
            client_ca=certs.ca_file,
            front=(f"unix:{tmp_path}/front",),
            front_peers=("uid:4711",),
        ),
        admin=Admin(address=("127.0.0.1:0",)),
    )
    async with daemon_with(FakeQuoter(), config) as started:
        async with connect(started.front_addresses[0]) as wire:
            assert await reply_of(wire, f"Client-Cert: {header(TENANT)}") == 403
        (away,) = await turned_away(started.admin_addresses[0])
        assert away["reason"] == "only the provider's front may use this listener"
        assert away["fingerprint"] is None  # only a front's word about others counts
