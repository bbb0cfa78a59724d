"""Where an EK's certificate comes from: a registrar that encodes it again, the host's own copy, a person.

`reencoded` is what registrars up to Keylime 7.12 store of a certificate that is not strict DER.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import httpx
import odd_certificates as odd
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from fake_registrar import FakeRegistrar
from helpers import run_here
from soft_ek import NOW, Authority, SoftHost, ek_certificate, rsa_ek

from provider_proxy.errors import BindingError, ReplyError, UntrustedEkError
from provider_proxy.evidence.tpm_keys import parse_public
from provider_proxy.evidence.vtpm_link import spki_digest
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.bindings import RegistrarBindings
from provider_proxy.trust.ek_certificate import parse_certificate
from provider_proxy.trust.ek_judges import EkJudge, HostCertificates, KnownEk, KnownEkDigest
from provider_proxy.trust.ek_store import EkStore
from provider_proxy.trust.pins import PinStore
from provider_proxy.trust.registration.round import same_certificate

MAKER = Authority("maker")
CHIP_CA = Authority("chip's own", MAKER)
EK = rsa_ek()
ODD = odd.edited(ek_certificate(MAKER, EK), odd.unordered_san, MAKER.key)
AGENT = "host"


def reencoded(data: bytes) -> bytes:
    """The same certificate in strict DER; its signature is over other bytes."""
    return parse_certificate(data).parsed.public_bytes(Encoding.DER)


class World:
    """A registrar that has a record of one host, and a tenant."""

    def __init__(self, folder: Path, recorded: bytes | None) -> None:
        (folder / "cas").mkdir()
        (folder / "cas/maker.pem").write_bytes(MAKER.pem())
        self.folder = folder
        self.tpm = SoftTpm()
        self.host = SoftHost(tpm=self.tpm, ek=EK, ek_cert=recorded)
        self.pins = PinStore(folder / "pins")
        self.eks = EkStore(folder / "cas", now=lambda: NOW)
        self.fake = FakeRegistrar()
        self.asked = 0
        assert self.fake.handle("POST", f"/v2.6/agents/{AGENT}", self.host.body()).is_success
        blob = json.loads(
            self.fake.handle("POST", f"/v2.6/agents/{AGENT}", self.host.body()).content
        )["results"]["blob"]
        tag = self.host.answer(base64.b64decode(blob), AGENT)
        body = json.dumps({"auth_tag": tag}).encode()
        assert self.fake.handle("PUT", f"/v2.6/agents/{AGENT}", body).is_success

    def bindings(self, judge: EkJudge | None = None) -> RegistrarBindings:
        client: httpx.AsyncClient = self.fake.client()
        return RegistrarBindings(
            client, self.fake.url, pins=self.pins, eks=judge or self.eks, ttl_s=300
        )

    def shows(self, cert: bytes | None, *chain: Authority) -> HostCertificates:
        return HostCertificates(ek_cert=cert, ek_chain=tuple(each.der() for each in chain))


async def test_a_reencoded_certificate_is_judged_by_the_host_s_own_copy(tmp_path: Path) -> None:
    assert reencoded(ODD) != ODD
    world = World(tmp_path, reencoded(ODD))
    ak = world.host.ak_public
    with pytest.raises(UntrustedEkError, match="the signature was not made by the CA"):
        await world.bindings().get(AGENT)
    bindings = world.bindings()
    bound = await bindings.check(AGENT, ODD, ak)
    assert bound.ek_verdict is not None
    assert bound.ek_verdict.anchor.certificate.name == "CN=maker"
    for shown in (ODD, ODD + b"\xff" * 100, reencoded(ODD)):
        assert (await bindings.check(AGENT, shown, ak)).host == bound.host
    # Another key's certificate, none, or one that nobody can read, is not what was registered.
    for wrong in (ek_certificate(MAKER, rsa_ek(1)), None, b"garbage"):
        with pytest.raises(BindingError, match="another EK certificate or AK"):
            await bindings.check(AGENT, wrong, ak)
    with pytest.raises(BindingError):
        await bindings.check(AGENT, ODD, SoftTpm().ak_public)


async def test_a_person_s_word_works_with_a_reencoded_certificate(tmp_path: Path) -> None:
    world = World(tmp_path, reencoded(ODD))
    digest = spki_digest(EK.public_key())
    for judge in (KnownEk(world.host.ek_public), KnownEkDigest(digest)):
        bindings = world.bindings(judge)
        bound = await bindings.check(AGENT, ODD, world.host.ak_public)
        assert bound.ek_verdict is None
    with pytest.raises(UntrustedEkError, match="another EK"):
        await world.bindings(KnownEkDigest(bytes(32))).get(AGENT)
    # Pinned by a person, a certificate that nobody can read stands in nobody's way.
    world.pins.pin(AGENT, world.host.ak_public, ek_public=world.host.ek_public, ek_by_hand=True)
    await world.bindings().check(AGENT, b"garbage", world.host.ak_public)


async def test_the_chain_that_the_host_shows(tmp_path: Path) -> None:
    cert = ek_certificate(CHIP_CA, EK)
    world = World(tmp_path, cert)
    bindings = world.bindings()

    async def ask_host() -> HostCertificates:
        world.asked += 1
        return world.shows(cert, CHIP_CA)

    with pytest.raises(UntrustedEkError, match='no CA named "CN=chip\'s own"'):
        await bindings.get(AGENT)
    bound = await bindings.get(AGENT, ask_host=ask_host)
    assert bound.ek_verdict is not None
    assert len(bound.ek_verdict.chain) == 2
    assert bound.ek_verdict.anchor.certificate.name == "CN=maker"
    await bindings.get(AGENT, ask_host=ask_host)
    assert world.asked == 1
    # Helpers are no anchors: the maker's CA is taken out, and nothing vouches any more.
    (tmp_path / "cas/maker.pem").write_bytes(Authority("another").pem())
    fresh = RegistrarBindings(
        world.fake.client(),
        world.fake.url,
        pins=PinStore(tmp_path / "other"),
        eks=EkStore(tmp_path / "cas", now=lambda: NOW),
        ttl_s=0,
    )
    with pytest.raises(UntrustedEkError, match="no CA named 'CN=maker'"):
        await fresh.get(AGENT, ask_host=ask_host)


async def test_the_host_is_not_asked_where_the_record_is_enough(tmp_path: Path) -> None:
    world = World(tmp_path, ek_certificate(MAKER, EK))

    async def ask_host() -> HostCertificates:
        raise AssertionError("not needed")

    await world.bindings().get(AGENT, ask_host=ask_host)


async def test_a_host_that_does_not_answer_leaves_the_record_s_reason(tmp_path: Path) -> None:
    world = World(tmp_path, reencoded(ODD))

    async def ask_host() -> HostCertificates:
        raise ReplyError("no answer")

    with pytest.raises(UntrustedEkError, match="signature"):
        await world.bindings().get(AGENT, ask_host=ask_host)


async def test_a_host_cannot_show_another_chip_s_certificate(tmp_path: Path) -> None:
    """A genuine certificate of somebody else's EK does not help a key in a file."""
    world = World(tmp_path, None)

    async def ask_host() -> HostCertificates:
        return world.shows(ek_certificate(MAKER, rsa_ek(1)), MAKER)

    with pytest.raises(UntrustedEkError, match="for another key than the EK"):
        await world.bindings().get(AGENT, ask_host=ask_host)


async def test_the_inventory_vouches_for_a_chip_without_any_certificate(tmp_path: Path) -> None:
    world = World(tmp_path, None)
    with pytest.raises(UntrustedEkError, match="pin add --ek-sha256"):
        await world.bindings().get(AGENT)
    world.pins.expected.add({AGENT: spki_digest(EK.public_key())})
    bound = await world.bindings().get(AGENT)
    assert bound.pinned.ek_by_hand
    world.pins.expected.add({AGENT: bytes(32)}, replace=True)
    with pytest.raises(UntrustedEkError, match="another EK"):
        await world.bindings().get(AGENT)


async def test_the_inventory_stands_above_a_maker_s_certificate(tmp_path: Path) -> None:
    """A genuine chip, and not the one of this host."""
    world = World(tmp_path, ek_certificate(MAKER, EK))
    world.pins.expected.add({AGENT: bytes(32)})
    with pytest.raises(UntrustedEkError, match="another EK"):
        await world.bindings().get(AGENT)
    assert not world.pins.has(AGENT)


def test_a_registration_is_not_renewed_for_an_encoding() -> None:
    plain = ek_certificate(MAKER, EK)
    assert same_certificate(plain, plain)
    assert same_certificate(reencoded(ODD), ODD)
    assert not same_certificate(None, ODD)
    assert not same_certificate(ek_certificate(MAKER, rsa_ek(1)), ODD)
    assert not same_certificate(b"garbage", ODD)
    assert not same_certificate(ek_certificate(MAKER, EK), plain)  # strict DER is stored as it came
    assert same_certificate(b"whatever", b"garbage")


# --- the commands --------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A registrar that the commands reach, whatever their options for TLS."""
    world = World(tmp_path, reencoded(ODD))
    monkeypatch.setattr(
        "provider_proxy.cli.registrar.open_client", lambda *files, **options: world.fake.client()
    )
    monkeypatch.setattr("provider_proxy.cli.registrar.EkStore", lambda *paths, **options: world.eks)
    return world


def test_pin_add_with_the_host_s_own_copy(served: World, tmp_path: Path) -> None:
    words = ("pin", "add", AGENT, "--pins", "pins", "--registrar", served.fake.url)
    done = run_here(*words, "--ek-ca", "cas", cwd=tmp_path)
    assert (done.returncode, "signature" in done.stderr) == (1, True), done.stderr
    (tmp_path / "ek.der").write_bytes(ODD)
    done = run_here(*words, "--ek-ca", "cas", "--ek-cert", "ek.der", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert (values["ek_maker"], values["ek_anchor"]) == ("Infineon", "CN=maker")
    (tmp_path / "empty").write_bytes(b"")
    assert run_here(*words, "--ek-ca", "cas", "--ek-cert", "empty", cwd=tmp_path).returncode == 2


def test_pin_add_by_digest_and_by_inventory(served: World, tmp_path: Path) -> None:
    words = ("pin", "add", AGENT, "--pins", "pins", "--registrar", served.fake.url)
    digest = spki_digest(EK.public_key()).hex()
    done = run_here(*words, "--ek-sha256", "00" * 32, cwd=tmp_path)
    assert (done.returncode, "another EK" in done.stderr) == (1, True)
    assert run_here(*words, "--ek-sha256", "00", cwd=tmp_path).returncode == 2
    done = run_here(*words, "--ek-sha256", digest, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert served.pins.load(AGENT).ek_by_hand
    assert run_here("pin", "remove", AGENT, "--pins", "pins", cwd=tmp_path).returncode == 0

    (tmp_path / "list.csv").write_text(f"{AGENT},{digest}\nother,{'00' * 32}\n")
    imported = ("pin", "import-eks", "list.csv", "--pins", "pins")
    done = run_here(*imported, "--json", cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == {"imported": 2, "hosts": 2}
    assert run_here("pin", "list", "--pins", "pins", "--json", cwd=tmp_path).returncode == 0
    done = run_here(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pinned = served.pins.load(AGENT)
    assert pinned.ek_by_hand
    assert pinned.ek_public is not None
    assert parse_public(pinned.ek_public).public_key == EK.public_key()
    (tmp_path / "list.csv").write_text(f"other {digest}\n")
    assert run_here(*imported, cwd=tmp_path).returncode == 1
    assert run_here(*imported, "--replace", cwd=tmp_path).returncode == 0
    (tmp_path / "list.csv").write_text("# nobody\n")
    assert run_here(*imported, cwd=tmp_path).returncode == 2
