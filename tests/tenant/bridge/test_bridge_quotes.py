"""What the bridge makes of its own: keys, quotes, nonces, clocks, ports. Nobody takes it for a host."""

from __future__ import annotations

import base64
import hashlib
import hmac
import stat
import struct
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from provider_proxy.errors import (
    ClockError,
    EvidenceFormatError,
    HostError,
    UntrustedAkError,
)
from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import AkName, AttestationKey, ClockState, HashAlg
from provider_proxy.evidence.tpm_keys import BRIDGE_POLICY, parse_ak, parse_public
from provider_proxy.evidence.tpm_writer import AK_ATTRIBUTES, encode_public
from provider_proxy.evidence.wire import parse_quote
from provider_proxy.tenant.bridge import keys as bridge_keys
from provider_proxy.tenant.bridge import quoting
from provider_proxy.tenant.bridge.keys import BridgeKeys, load_keys, make_keys
from provider_proxy.tenant.bridge.ports import PortTable
from provider_proxy.trust.pins import PinStore


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "state/keys.pem"
    load_keys(path, make_for="192.0.2.7")
    return path


@pytest.fixture(scope="module")
def keys(file: Path) -> BridgeKeys:
    return load_keys(file, make_for=None)


# --- keys -------------------------------------------------------------------------------------------


def test_keys_are_made_once_and_for_their_owner_alone(file: Path, keys: BridgeKeys) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load_keys(file, make_for="192.0.2.8").ak_name == keys.ak_name
    file.chmod(0o644)
    with pytest.raises(HostError, match="must not be readable by others"):
        load_keys(file, make_for=None)
    file.chmod(0o600)


def test_keys_that_must_be_there_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot read"):
        load_keys(tmp_path / "keys.pem", make_for=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [b"-----BEGIN PUBLIC KEY", b"-----BEGIN CERTIFICATE"])
def test_damaged_keys_are_not_replaced(file: Path, tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "keys.pem"
    path.touch(0o600)
    path.write_bytes(file.read_bytes().partition(cut)[0])
    with pytest.raises(HostError, match="is damaged"):
        load_keys(path, make_for="192.0.2.7")


def test_another_s_certificate_is_damage(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    path.touch(0o600)
    ours, theirs = file.read_bytes(), make_keys("192.0.2.7")
    mark = b"-----BEGIN CERTIFICATE"
    head, tail = ours.split(mark), theirs.split(mark)
    path.write_bytes(mark.join([*head[:2], *tail[2:]]))
    with pytest.raises(HostError, match="for another EK"):
        load_keys(path, make_for=None)


def test_the_private_keys_in_the_file_are_three(file: Path, keys: BridgeKeys) -> None:
    """TLS, AK and EK: neither the CA's nor the payloads' was written down."""
    text = file.read_bytes()
    assert text.count(b"PRIVATE KEY-----\n") == 3 * 2
    found = [
        serialization.load_pem_private_key(part + b"-----END PRIVATE KEY-----\n", None)
        for part in text.split(b"-----END PRIVATE KEY-----\n")[:-1]
        for part in [part[part.index(b"-----BEGIN PRIVATE KEY") :]]
    ]
    publics = {
        key.public_key().public_bytes(
            bridge_keys.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for key in found
    }
    ca = x509.load_pem_x509_certificate(keys.ek_ca).public_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    assert ca.public_bytes(bridge_keys.PEM, spki) not in publics
    assert keys.nk_pem.encode() not in publics


def test_the_ek_s_certificate_is_one_of_the_profile(keys: BridgeKeys) -> None:
    certificate = x509.load_der_x509_certificate(keys.ek_cert)
    ca = x509.load_pem_x509_certificate(keys.ek_ca)
    certificate.verify_directly_issued_by(ca)
    assert list(certificate.subject) == []
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert "no TPM" in str(names.value)
    assert parse_public(keys.ek_public).public_key == certificate.public_key()
    other = x509.load_pem_x509_certificate(
        bridge_keys.parse_keys(make_keys("::1"), Path("x")).ek_ca
    )
    assert other.subject != ca.subject  # Keylime looks for a CA by its name


# --- no host's --------------------------------------------------------------------------------------


def test_the_ak_is_no_host_s(keys: BridgeKeys, tmp_path: Path) -> None:
    with pytest.raises(UntrustedAkError, match="provider-proxy bridge"):
        parse_ak(keys.ak_public)
    with pytest.raises(UntrustedAkError, match="provider-proxy bridge"):
        PinStore(tmp_path).pin("host-17", keys.ak_public)


def test_nor_is_a_key_that_claims_a_tpm_besides(keys: BridgeKeys) -> None:
    claiming = encode_public(keys.ak.public_key(), AK_ATTRIBUTES, BRIDGE_POLICY)
    with pytest.raises(UntrustedAkError, match="provider-proxy bridge"):
        parse_ak(claiming)
    parse_ak(encode_public(keys.ak.public_key(), AK_ATTRIBUTES))  # the policy makes the difference


def test_an_agent_s_id_is_of_this_bridge_and_this_host(keys: BridgeKeys) -> None:
    ids = {quoting.agent_id_of(ek, name) for ek in (keys.ek_public, b"x") for name in ("a", "b")}
    assert len(ids) == 4
    assert quoting.agent_id_of(keys.ek_public, "a") in ids


# --- credentials ------------------------------------------------------------------------------------


def credential(ek: rsa.RSAPublicKey, ak_name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """TPM2_MakeCredential (TPM 2.0 Part 1, section 24), as Keylime's registrar does it."""
    seed = bytes(range(32))
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=b"IDENTITY\0")
    wrapped = ek.encrypt(seed, oaep)
    storage = bridge_keys._kdfa(seed, b"STORAGE", ak_name, 128)
    plain = struct.pack(">H", len(secret)) + secret
    encrypted = Cipher(algorithms.AES(storage), CFB(bytes(16))).encryptor().update(plain)
    integrity = bridge_keys._kdfa(seed, b"INTEGRITY", b"", 256)
    tag = hmac.digest(integrity, encrypted + ak_name, "sha256")
    blob = struct.pack(">H", len(tag)) + tag + encrypted
    return struct.pack(">H", len(blob)) + blob, struct.pack(">H", len(wrapped)) + wrapped


async def test_a_registrar_s_challenge_is_solved(keys: BridgeKeys) -> None:
    await trio.lowlevel.checkpoint()
    made = credential(keys.ek.public_key(), keys.ak_name, b"k" * 32)
    assert await keys.activate_credential(*made) == b"k" * 32


async def test_a_challenge_for_another_ak_is_not(keys: BridgeKeys) -> None:
    made = credential(keys.ek.public_key(), b"\x00\x0b" + bytes(32), b"k" * 32)
    with pytest.raises(EvidenceFormatError, match="not for these keys"):
        await keys.activate_credential(*made)


@pytest.mark.parametrize("place", [0, 1])
async def test_a_broken_challenge_is_an_error_of_its_own(keys: BridgeKeys, place: int) -> None:
    made = list(credential(keys.ek.public_key(), keys.ak_name, b"k" * 32))
    made[place] = made[place][:2] + b"\0" * (len(made[place]) - 2)
    with pytest.raises(EvidenceFormatError):
        await keys.activate_credential(*made)


# --- quotes -----------------------------------------------------------------------------------------


def test_a_quote_is_keylime_s(keys: BridgeKeys) -> None:
    pcrs = {0: b"\1" * 32, 16: b"\2" * 32}
    clock = ClockState(reset_count=3, restart_count=0, clock_ms=77)
    text = quoting.make_quote(keys, nonce=b"abcDEF123", pcrs=pcrs, clock=clock, firmware=9)
    quote = parse_quote(text)
    attest = attestation.parse_attest(quote.attest)
    assert attest.extra_data == b"abcDEF123"
    assert (attest.clock, attest.clock_safe, attest.firmware_version) == (clock, True, 9)
    assert attest.mask == 1 | 1 << 16
    assert attest.pcr_digest == hashlib.sha256(b"\1" * 32 + b"\2" * 32).digest()
    signature = attestation.parse_signature(quote.signature)
    ak = AttestationKey(
        public_key=keys.ak.public_key(),
        name=AkName(keys.ak_name),
        sign_alg="rsassa",
        signature_hash=HashAlg.SHA256,
    )
    attestation.check_signature(quote.attest, signature, ak)


def test_the_host_s_nonce_is_made_of_its_parts() -> None:
    random, nonce, agent = b"r" * 32, b"n" * 20, "agent-1"
    made = quoting.host_nonce(random, nonce, agent)
    text = b"provider-proxy/bridge/1\0" + random + b"\x14" + nonce + b"\x07" + b"agent-1"
    assert made == hashlib.sha256(text).hexdigest().encode()
    # No two questions can be taken for one another.
    assert made != quoting.host_nonce(random, nonce + b"\x07", agent)


def test_the_shown_clock_rises_with_the_host_s() -> None:
    states = [
        ClockState(reset_count=1, restart_count=0, clock_ms=10**9),
        ClockState(reset_count=1, restart_count=4, clock_ms=10**9 + 1),
        ClockState(reset_count=2, restart_count=0, clock_ms=0),
        ClockState(reset_count=2, restart_count=0, clock_ms=5),
    ]
    shown = [quoting.shown_clock(state) for state in states]
    assert [state.clock_ms for state in shown] == sorted({state.clock_ms for state in shown})
    assert {state.restart_count for state in shown} == {0}
    assert [state.reset_count for state in shown] == [1, 1, 2, 2]


@pytest.mark.parametrize(("resets", "clock_ms"), [(1 << 23, 0), (1, 1 << 41)])
def test_what_cannot_be_shown_is_refused(resets: int, clock_ms: int) -> None:
    with pytest.raises(ClockError):
        quoting.shown_clock(ClockState(reset_count=resets, restart_count=0, clock_ms=clock_ms))


@pytest.mark.parametrize("resets", [0, 1, (1 << 31) - 1, (1 << 32) - 1])
def test_boottime_is_never_nought_and_fits_keylime_s_column(resets: int) -> None:
    made = quoting.shown_boottime(ClockState(reset_count=resets, restart_count=0, clock_ms=0))
    assert 0 < made < 1 << 31


def test_pcr_16_is_the_key_s_text() -> None:
    digest = hashlib.sha256(b"text").digest()
    assert quoting.data_pcr("text") == hashlib.sha256(bytes(32) + digest).digest()


# --- ports ------------------------------------------------------------------------------------------


def test_ports_stay_whoever_comes_and_goes(tmp_path: Path) -> None:
    first = PortTable(tmp_path, 100, 110).ports_of(["b", "a"])
    assert first == {"b": 100, "a": 101}
    again = PortTable(tmp_path, 100, 110).ports_of(["c", "a"])  # b is gone, c is new
    assert again == {"c": 102, "a": 101}
    assert PortTable(tmp_path, 200, 210).ports_of(["b", "d"]) == {"b": 100, "d": 200}


def test_ports_run_out_with_words(tmp_path: Path) -> None:
    directory = PortTable(tmp_path, 100, 101)
    directory.ports_of(["a", "b"])
    with pytest.raises(HostError, match="no port is left for c"):
        directory.ports_of(["a", "c"])


def test_a_port_that_could_not_be_written_is_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be another host's after a restart."""
    directory = PortTable(tmp_path, 100, 103)
    directory.ports_of(["a"])

    def full(path: Path, data: bytes) -> None:
        raise HostError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("provider_proxy.tenant.bridge.ports.write_private", full)
        with pytest.raises(HostError, match="no space"):
            directory.ports_of(["a", "b"])
    with pytest.raises(HostError, match="no port is left"):
        PortTable(tmp_path, 100, 101).ports_of(["a", "c", "d"])
    given = directory.ports_of(["a", "b"])
    assert PortTable(tmp_path, 100, 103).ports_of(["c", "a", "b"]) == {**given, "c": 102}


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"format": "provider-proxy/bridge-ports/1", "ports": {"a": 1, "b": 1}}',
        '{"format": "provider-proxy/bridge-ports/1", "ports": {"a": "1"}}',
        '{"format": "provider-proxy/bridge-ports/1", "ports": {"a": 0}}',
        '{"format": "provider-proxy/bridge-ports/1", "ports": {"a": 1, "a": 2}}',
        '{"format": "provider-proxy/bridge-ports/1", "ports": {"a": 1}',
        '{"format": "provider-proxy/bridge-ports/2", "ports": {}}',
        "",
    ],
)
def test_damaged_ports_are_not_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "ports.json").write_text(text)
    with pytest.raises(HostError, match="is damaged"):
        PortTable(tmp_path, 100, 110)


def test_base64_of_a_quote_is_of_one_bank(keys: BridgeKeys) -> None:
    text = quoting.make_quote(
        keys,
        nonce=b"a",
        pcrs={16: bytes(32)},
        clock=ClockState(reset_count=1, restart_count=0, clock_ms=1),
        firmware=0,
    )
    blob = base64.b64decode(text.split(":")[2])
    assert blob[:4] == b"\1\0\0\0"
