"""The quoter over a real swtpm: keys, authorisations, refusals, quotes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from helpers import LIMIT_S, children_of, is_alive, until
from manufactured import manufacture
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE
from tpm2_pytss.types import (
    TPM2B_EVENT,
    TPM2B_NAME,
    TPM2B_PUBLIC,
    TPML_DIGEST_VALUES,
    TPMT_HA,
    TPMT_SYM_DEF,
    TPMU_HA,
)
from tpm2_pytss.utils import make_credential as make_credential_for

from provider_proxy.common.files import write_private
from provider_proxy.errors import HostError, QuoteError, TpmError
from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import AttestationKey, HashAlg, Quote, pcrs_of
from provider_proxy.evidence.tpm_keys import parse_ak, parse_public
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import circuit, local_tpm
from provider_proxy.host.quoters.ak_store import AkStore
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.quoters.tpm_opener import uuid_of_ek
from provider_proxy.host.tpm import keys, pace
from provider_proxy.host.tpm.chip import Chip, open_context
from provider_proxy.host.tpm.ek import find_or_make_ek
from provider_proxy.host.tpm.embedded import EmbeddedTpm
from provider_proxy.testing.broker import Broker
from provider_proxy.testing.disturb import CC_QUOTE, Action
from provider_proxy.testing.faulty import FaultyContext

ALL = 0xFFFFFF
QUALIFYING = b"abcdefghijklmnopqrstuvwxyz234567"
EK_HANDLE = 0x81010001
AK_HANDLE = 0x81000100
EMBEDDED = Tpm(tcti="embedded", max_duty=1.0)
BANKS = (HashAlg.SHA1, HashAlg.SHA256, HashAlg.SHA384, HashAlg.SHA512)


def open_quoter(
    settings: Tpm, state_dir: Path, *, metrics: Metrics | None = None, **more: Any
) -> AbstractAsyncContextManager[EsysQuoter]:
    return local_tpm.open_quoter(settings, state_dir, metrics or Metrics(), **more)


def check(quote: Quote, ak: AttestationKey, qualifying: bytes, bank: HashAlg, mask: int) -> None:
    """As a tenant would: signed, over this, and with the values of these PCRs."""
    attest = attestation.parse_attest(quote.attest)
    attestation.check_signature(quote.attest, attestation.parse_signature(quote.signature), ak)
    attestation.check_pcrs(attest, quote.pcrs, ak.signature_hash)
    assert attest.extra_data == qualifying
    assert (attest.bank, attest.mask) == (bank, mask)
    assert quote.pcrs.bank is bank
    assert [pcr for pcr, _ in quote.pcrs.values] == list(pcrs_of(mask))


REAL = pytest.mark.real


# --- keys -------------------------------------------------------------------------------------------


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[EmbeddedTpm]:
    """A swtpm that outlives the quoters on it."""
    made = EmbeddedTpm(tmp_path / "chip")
    made.start()
    yield made
    made.stop()


def on(tpm: EmbeddedTpm, **more: Any) -> Tpm:
    return Tpm(tcti=tpm.tcti, max_duty=1.0, **more)


def tool(tpm: EmbeddedTpm, *words: str | Path) -> str:
    """Run one of tpm2-tools."""
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, "TPM2TOOLS_TCTI": tpm.tcti},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def persistent(tpm: EmbeddedTpm) -> dict[str, str]:
    """Handle to name of what the TPM keeps."""
    handles = tool(tpm, "tpm2_getcap", "handles-persistent").split()[1::2]
    found = {}
    for handle in handles:
        lines = tool(tpm, "tpm2_readpublic", "-c", handle).splitlines()
        found[handle.lower()] = next(line.split()[1] for line in lines if line.startswith("name:"))
    return found


def put_foreign_key(tpm: EmbeddedTpm, handle: int, folder: Path, kind: str = "-C o") -> None:
    """A storage key, or whatever `kind` says, at a persistent handle."""
    context = folder / "foreign.ctx"
    tool(tpm, "tpm2_createprimary", "-Q", *kind.split(), "-c", context)
    tool(tpm, "tpm2_flushcontext", "-t")
    tool(tpm, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", context, hex(handle))
    tool(tpm, "tpm2_flushcontext", "-t")


async def identity_of(settings: Tpm, state_dir: Path) -> tuple[bytes, bytes, str]:
    """AK name, EK and host id of a quoter that is opened and closed."""
    with trio.fail_after(LIMIT_S):
        async with open_quoter(settings, state_dir) as opened:
            check(
                await opened.quote(QUALIFYING, HashAlg.SHA256, 1),
                opened.ak,
                QUALIFYING,
                HashAlg.SHA256,
                1,
            )
            identity = opened.identity
            assert parse_ak(identity.ak_public).name == opened.ak.name
            return opened.ak.name, identity.ek_public, str(identity.host_uuid)


async def refusal_of(settings: Tpm, state_dir: Path) -> str:
    """The message of the `HostError` that opening ends with."""
    with trio.fail_after(LIMIT_S):
        try:
            async with open_quoter(settings, state_dir):
                pass
        except HostError as exc:
            message = str(exc)
            exc.__traceback__ = None
            return message
    raise AssertionError("it opened")


@REAL
@pytest.mark.parametrize("algorithm", ["ecc", "rsa"])
async def test_keys_are_made_once(
    tmp_path: Path, algorithm: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = Tpm(tcti="embedded", max_duty=1.0, ak_algorithm=algorithm)
    first = await identity_of(settings, tmp_path)
    assert [m for m in caplog.messages if " made at " in m] == [
        "EK made at 0x81010001",
        "AK made at 0x81000100",
    ]
    stored = read_text(tmp_path / "ak.json")
    caplog.clear()
    assert await identity_of(settings, tmp_path) == first
    assert not [m for m in caplog.messages if " made at " in m]
    assert read_text(tmp_path / "ak.json") == stored
    assert json.loads(stored)["name"] == first[0].hex()


def read_text(path: Path) -> str:
    return path.read_text()


@REAL
async def test_each_host_has_keys_of_its_own(tmp_path: Path) -> None:
    one, two = [await identity_of(EMBEDDED, tmp_path / name) for name in "ab"]
    assert all(a != b for a, b in zip(one, two, strict=True))


@REAL
async def test_the_embedded_tpm_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_quoter(EMBEDDED, tmp_path) as opened:
        assert opened.identity.software
    assert any("NOT a hardware TPM" in message for message in caplog.messages)


@REAL
async def test_the_host_id_follows_from_the_ek_or_the_configuration(
    tmp_path: Path, tpm: EmbeddedTpm
) -> None:
    async with open_quoter(on(tpm), tmp_path / "s") as opened:
        assert opened.identity.software  # a swtpm, started by any program
        assert opened.identity.host_uuid == uuid_of_ek(opened.identity.ek_public)
    given = uuid.uuid4()
    async with open_quoter(on(tpm), tmp_path / "s", host_uuid=given) as opened:
        assert opened.identity.host_uuid == given


@REAL
@pytest.mark.parametrize("algorithm", ["ecc", "rsa"])
async def test_the_aks_attributes(tmp_path: Path, algorithm: str) -> None:
    """docs/design: restricted, signing, made inside, never leaves, no dictionary-attack lockout."""
    settings = Tpm(tcti="embedded", max_duty=1.0, ak_algorithm=algorithm)
    async with open_quoter(settings, tmp_path) as opened:
        public = parse_public(opened.identity.ak_public)
    bits = {
        "fixedTPM": 1,
        "fixedParent": 4,
        "sensitiveDataOrigin": 5,
        "userWithAuth": 6,
        "noDA": 10,
        "restricted": 16,
        "sign": 18,
    }
    assert public.attributes == sum(1 << bit for bit in bits.values())
    assert not public.has_symmetric
    assert public.scheme_hash == HashAlg.SHA256
    assert public.public_key.key_size == (256 if algorithm == "ecc" else 2048)


@REAL
async def test_the_ek_is_the_tcg_default(tmp_path: Path) -> None:
    async with open_quoter(EMBEDDED, tmp_path) as opened:
        public = parse_public(opened.identity.ek_public)
        assert opened.identity.ek_cert is None
    # fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt
    assert public.attributes == 0x000300B2
    assert public.public_key.key_size == 2048


@REAL
async def test_other_handles(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    settings = on(tpm, ek_handle=0x81010042, ak_handle=0x81000042)
    await identity_of(settings, tmp_path / "s")
    assert sorted(persistent(tpm)) == ["0x81000042", "0x81010042"]
    assert tool(tpm, "tpm2_getcap", "handles-transient").split() == []
    assert tool(tpm, "tpm2_getcap", "handles-loaded-session").split() == []


@REAL
async def test_the_aks_auth_is_needed(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    """A user who may open the device may not quote with our AK."""
    await identity_of(on(tpm), tmp_path / "s")
    with pytest.raises(AssertionError, match=r"(?i)auth"):
        tool(tpm, "tpm2_quote", "-c", hex(AK_HANDLE), "-l", "sha256:0", "-q", "abcd")
    auth = json.loads(read_text(tmp_path / "s" / "ak.json"))["auth"]
    tool(
        tpm,
        "tpm2_quote",
        "-Q",
        "-c",
        hex(AK_HANDLE),
        "-l",
        "sha256:0",
        "-q",
        "abcd",
        "-p",
        f"hex:{auth}",
    )


# --- what is refused, and left as it is -------------------------------------------------------------


@REAL
@pytest.mark.parametrize("known", [False, True], ids=["no ak.json", "ak.json"])
async def test_a_foreign_key_at_the_aks_handle(
    tmp_path: Path, tpm: EmbeddedTpm, known: bool
) -> None:
    put_foreign_key(tpm, AK_HANDLE, tmp_path)
    before = persistent(tpm)
    if known:
        AkStore(tmp_path / "s").auth_for(is_new=True)
    message = await refusal_of(on(tpm), tmp_path / "s")
    assert hex(AK_HANDLE) in message or "tpm.ak_handle" in message
    assert persistent(tpm)[hex(AK_HANDLE)] == before[hex(AK_HANDLE)]


@REAL
@pytest.mark.parametrize(
    "kind",
    [
        "-C e -G ecc:ecdsa-sha256:null -a fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign",
        "-C e -G rsa:null:null -a fixedtpm|fixedparent|sensitivedataorigin|userwithauth|decrypt",
    ],
    ids=["signing", "unrestricted"],
)
async def test_a_foreign_key_at_the_eks_handle(tmp_path: Path, tpm: EmbeddedTpm, kind: str) -> None:
    put_foreign_key(tpm, EK_HANDLE, tmp_path, kind)
    before = persistent(tpm)
    message = await refusal_of(on(tpm), tmp_path / "s")
    assert hex(EK_HANDLE) in message
    assert persistent(tpm) == before


@REAL
async def test_an_unrestricted_key_of_ours_is_no_ak(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    """Its authValue fits, its attributes do not: a signing key that signs anything."""
    auth = AkStore(tmp_path / "s").auth_for(is_new=True).hex()
    kind = (
        "-C e -G ecc:ecdsa-sha256:null -a "
        f"fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign -p hex:{auth}"
    )
    put_foreign_key(tpm, AK_HANDLE, tmp_path, kind)
    before = persistent(tpm)[hex(AK_HANDLE)]
    assert "is not an AK" in await refusal_of(on(tpm), tmp_path / "s")
    assert persistent(tpm)[hex(AK_HANDLE)] == before


@REAL
async def test_an_ak_of_the_other_kind(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    name, _, _ = await identity_of(on(tpm), tmp_path / "s")
    message = await refusal_of(on(tpm, ak_algorithm="rsa"), tmp_path / "s")
    assert "tpm.ak_algorithm" in message
    assert (await identity_of(on(tpm), tmp_path / "s"))[0] == name


@REAL
async def test_an_ak_without_ak_json(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    await identity_of(on(tpm), tmp_path / "s")
    before = persistent(tpm)
    message = await refusal_of(on(tpm), tmp_path / "other")
    assert str(tmp_path / "other" / "ak.json") in message
    assert persistent(tpm) == before


@REAL
async def test_a_cleared_tpm(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    name, _, _ = await identity_of(on(tpm), tmp_path / "s")
    stored = read_text(tmp_path / "s" / "ak.json")
    tool(tpm, "tpm2_clear", "-c", "p")
    message = await refusal_of(on(tpm), tmp_path / "s")
    assert "cleared or replaced" in message
    assert name.hex() in message
    assert hex(AK_HANDLE) not in persistent(tpm)
    assert read_text(tmp_path / "s" / "ak.json") == stored


@REAL
async def test_another_ak_with_our_auth(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    """The handle holds an AK of the right kind and authValue, but not the one that tenants know."""
    name, _, _ = await identity_of(on(tpm), tmp_path / "s")
    tool(tpm, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", hex(AK_HANDLE))
    stored = json.loads(read_text(tmp_path / "s" / "ak.json"))
    copy_of_auth(tmp_path / "t", stored["auth"])
    other, _, _ = await identity_of(on(tpm), tmp_path / "t")
    message = await refusal_of(on(tpm), tmp_path / "s")
    assert name.hex() in message
    assert other.hex() in message
    assert persistent(tpm)[hex(AK_HANDLE)] == other.hex()


def copy_of_auth(state_dir: Path, auth: str) -> None:
    write_private(state_dir / "ak.json", json.dumps({"auth": auth}).encode())


@REAL
async def test_a_wrong_auth(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    await identity_of(on(tpm), tmp_path / "s")
    before = persistent(tpm)
    copy_of_auth(tmp_path / "s", "ab" * 32)
    message = await refusal_of(on(tpm), tmp_path / "s")
    assert "authValue" in message
    assert persistent(tpm) == before


@REAL
async def test_a_crash_between_the_key_and_its_name(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    """ak.json has the authValue, the TPM has the key, the name was never stored."""
    name, _, _ = await identity_of(on(tpm), tmp_path / "s")
    stored = json.loads(read_text(tmp_path / "s" / "ak.json"))
    copy_of_auth(tmp_path / "s", stored["auth"])
    assert (await identity_of(on(tpm), tmp_path / "s"))[0] == name
    assert json.loads(read_text(tmp_path / "s" / "ak.json")) == stored


@REAL
@pytest.mark.parametrize(
    "tcti",
    [
        "device:/nonexistent/tpm",
        "swtpm:path=/nonexistent/socket",
        "nonsense:x",
        "nonsense",
        "device:/dev/null",
    ],
)
async def test_no_tpm(tmp_path: Path, tcti: str) -> None:
    message = await refusal_of(Tpm(tcti=tcti), tmp_path / "s")
    assert tcti in message or tcti == "device:/dev/null"
    assert os.listdir(tmp_path) == []


@REAL
async def test_a_damaged_ak_json_stops_before_the_tpm_is_touched(
    tmp_path: Path, tpm: EmbeddedTpm
) -> None:
    write_private(tmp_path / "s" / "ak.json", b"{")
    assert "damaged" in await refusal_of(on(tpm), tmp_path / "s")
    assert persistent(tpm) == {}


# --- authorisations ---------------------------------------------------------------------------------


def secret(path: Path, value: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(value + "\n")
    return path


@REAL
async def test_hierarchies_with_authorisations(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    tool(tpm, "tpm2_changeauth", "-c", "owner", "own3r")
    tool(tpm, "tpm2_changeauth", "-c", "endorsement", "end0rse")
    owner = secret(tmp_path / "owner", "own3r")
    endorsement = secret(tmp_path / "endorsement", "end0rse")
    wrong = secret(tmp_path / "wrong", "wr0ng")
    for files in (
        {},
        {"owner_auth_file": owner},
        {"endorsement_auth_file": endorsement},
        {"owner_auth_file": wrong, "endorsement_auth_file": endorsement},
        {"owner_auth_file": owner, "endorsement_auth_file": wrong},
    ):
        message = await refusal_of(on(tpm, **files), tmp_path / "s")
        assert "owner_auth_file" in message
        assert "endorsement_auth_file" in message
        assert "wr0ng" not in message
        assert hex(AK_HANDLE) not in persistent(tpm)
    good = on(tpm, owner_auth_file=owner, endorsement_auth_file=endorsement)
    first = await identity_of(good, tmp_path / "s")
    assert await identity_of(on(tpm), tmp_path / "s") == first  # keys that are there need none


@REAL
@pytest.mark.parametrize("which", ["owner", "endorsement"])
async def test_a_wrong_authorisation_where_only_the_ak_is_missing(
    tmp_path: Path, tpm: EmbeddedTpm, which: str
) -> None:
    """The EK is there already; the failed start leaves an authValue, the next one uses it."""
    await identity_of(on(tpm), tmp_path / "first")
    tool(tpm, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", hex(AK_HANDLE))
    tool(tpm, "tpm2_changeauth", "-c", which, "s3cret")
    message = await refusal_of(on(tpm), tmp_path / "s")
    assert f"{which}_auth_file" in message
    good = {f"{which}_auth_file": secret(tmp_path / which, "s3cret")}
    await identity_of(on(tpm, **good), tmp_path / "s")
    assert tool(tpm, "tpm2_getcap", "handles-transient").split() == []
    assert tool(tpm, "tpm2_getcap", "handles-loaded-session").split() == []


@REAL
async def test_an_authorisation_file_that_others_can_read(tmp_path: Path, tpm: EmbeddedTpm) -> None:
    path = secret(tmp_path / "owner", "x")
    os.chmod(path, 0o644)
    message = await refusal_of(on(tpm, owner_auth_file=path), tmp_path / "s")
    assert message.startswith("tpm.owner_auth_file: ")
    assert persistent(tpm) == {}


# --- a manufactured TPM with an EK certificate ------------------------------------------------------


@pytest.fixture(scope="module")
def manufactured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State of a swtpm that swtpm_setup made, with a CA of its own; no system file is touched."""
    folder = tmp_path_factory.mktemp("made")
    manufacture(folder)
    assert (folder / "ca/issuercert.pem").is_file()
    return folder


def copy_state(manufactured: Path, state_dir: Path) -> Path:
    shutil.copytree(manufactured / "state", state_dir / "swtpm")
    return state_dir


@REAL
async def test_the_ek_of_a_certificate(manufactured: Path, tmp_path: Path) -> None:
    """Found where the manufacturer put it, or made again from the certificate's template: the same."""
    state = copy_state(manufactured, tmp_path / "s")
    eks = set()
    for ek_handle, ak_handle in ((EK_HANDLE, AK_HANDLE), (0x81010042, 0x81000042)):
        settings = Tpm(tcti="embedded", max_duty=1.0, ek_handle=ek_handle, ak_handle=ak_handle)
        async with open_quoter(settings, state) as opened:
            identity = opened.identity
        assert identity.ek_cert is not None
        cert = x509.load_der_x509_certificate(identity.ek_cert)
        assert cert.public_key() == parse_public(identity.ek_public).public_key
        issuer = x509.load_pem_x509_certificate(
            read_text(manufactured / "ca/issuercert.pem").encode()
        )
        cert.verify_directly_issued_by(issuer)
        eks.add(identity.ek_public)
        remove(state / "ak.json")  # the second handle's AK is another one
    assert len(eks) == 1


def remove(path: Path) -> None:
    path.unlink()


@REAL
async def test_an_ek_that_is_not_the_certificates(manufactured: Path, tmp_path: Path) -> None:
    """Somebody put another storage key where the EK belongs."""
    state = copy_state(manufactured, tmp_path / "s")
    tpm = EmbeddedTpm(state / "swtpm")
    tpm.start()
    try:
        put_foreign_key(tpm, 0x81010042, tmp_path, "-C e")
    finally:
        tpm.stop()
    message = await refusal_of(Tpm(tcti="embedded", max_duty=1.0, ek_handle=0x81010042), state)
    assert "0x81010042" in message
    assert "certificate" in message


@REAL
async def test_a_bank_that_the_tpm_has_not(manufactured: Path, tmp_path: Path) -> None:
    """swtpm_setup allocated SHA-256 alone."""
    state = copy_state(manufactured, tmp_path / "s")
    settings = Tpm(tcti="embedded", max_duty=1.0, banks=(HashAlg.SHA256, HashAlg.SHA1))
    assert "sha1" in await refusal_of(settings, state)
    async with open_quoter(EMBEDDED, state) as opened:
        quote = await opened.quote(QUALIFYING, HashAlg.SHA256, ALL)
        check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, ALL)


# --- the chip: PCRs that move -----------------------------------------------------------------------


class Moving:
    """An ESAPI context whose PCR 10 (or another) somebody else extends around our commands.

    PCR 16, unlike PCR 10, does not count in the pcrUpdateCounter that a read returns.
    """

    def __init__(self, context: ESAPI) -> None:
        self._context = context
        self.pcr = 10
        self.reads = 0
        self.quotes = 0
        self.before_quote: Callable[[int], bool] = lambda n: False
        self.after_quote: Callable[[int], bool] = lambda n: False
        self.after_read: Callable[[int], bool] = lambda n: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def extend(self) -> None:
        self._context.pcr_event(ESYS_TR(self.pcr), TPM2B_EVENT(os.urandom(8)))

    def pcr_read(self, *args: Any) -> Any:
        self.reads += 1
        result = self._context.pcr_read(*args)
        if self.after_read(self.reads):
            self.extend()
        return result

    def quote(self, *args: Any) -> Any:
        self.quotes += 1
        if self.before_quote(self.quotes):
            self.extend()
        result = self._context.quote(*args)
        if self.after_quote(self.quotes):
            self.extend()
        return result


@pytest.fixture
def moving(tpm: EmbeddedTpm) -> Iterator[tuple[Moving, Chip, AttestationKey]]:
    context = open_context(tpm.tcti)
    ek = find_or_make_ek(context, EK_HANDLE, keys.Auths())
    ak = keys.find_or_make_ak(context, AK_HANDLE, "ecc", ek, keys.Auths(), lambda made: b"auth")
    wrapped = Moving(context)
    yield wrapped, Chip(wrapped, ek=ek.handle, ak=ak.handle), ak.key
    context.close()


BOTH = 1 << 10 | 1 << 16


@REAL
def test_twenty_four_pcrs_at_eight_a_call(moving: tuple[Moving, Chip, AttestationKey]) -> None:
    context, chip, ak = moving
    free = (*range(17), 23)  # 17 to 22 are for other localities
    for context.pcr in free:
        context.extend()
    check(
        chip.quote(QUALIFYING, HashAlg.SHA256, ALL, HashAlg.SHA256),
        ak,
        QUALIFYING,
        HashAlg.SHA256,
        ALL,
    )
    assert (context.reads, context.quotes) == (3, 1)
    values, _ = chip.read_pcrs(HashAlg.SHA256, ALL)
    assert len({digest for pcr, digest in values.values if pcr in free}) == len(free)


@REAL
@pytest.mark.parametrize("mask", [BOTH, ALL])
@pytest.mark.parametrize("bank", BANKS)
def test_a_pcr_that_moves_before_the_quote(
    moving: tuple[Moving, Chip, AttestationKey], mask: int, bank: HashAlg
) -> None:
    context, chip, ak = moving
    context.before_quote = lambda n: n == 1
    check(chip.quote(QUALIFYING, bank, mask, HashAlg.SHA256), ak, QUALIFYING, bank, mask)


@REAL
def test_a_pcr_that_moves_after_the_quote(moving: tuple[Moving, Chip, AttestationKey]) -> None:
    context, chip, ak = moving
    context.after_quote = lambda n: True
    quote = chip.quote(QUALIFYING, HashAlg.SHA256, BOTH, HashAlg.SHA256)
    check(quote, ak, QUALIFYING, HashAlg.SHA256, BOTH)
    assert context.quotes == 1  # the values of before are those of the quote


@REAL
def test_a_pcr_that_moves_on_both_sides_for_a_while(
    moving: tuple[Moving, Chip, AttestationKey],
) -> None:
    context, chip, ak = moving
    context.before_quote = context.after_quote = lambda n: n <= 3
    quote = chip.quote(QUALIFYING, HashAlg.SHA256, BOTH, HashAlg.SHA256)
    check(quote, ak, QUALIFYING, HashAlg.SHA256, BOTH)


@REAL
def test_a_pcr_that_never_rests(moving: tuple[Moving, Chip, AttestationKey]) -> None:
    context, chip, _ = moving
    context.before_quote = context.after_quote = lambda n: True
    with pytest.raises(TpmError, match="PCRs changed during every"):
        chip.quote(QUALIFYING, HashAlg.SHA256, BOTH, HashAlg.SHA256)
    assert context.quotes < 20


@REAL
@pytest.mark.parametrize("moves", [{1}, {2}, {1, 2}])
@pytest.mark.parametrize("pcr", [10, 16])
def test_a_pcr_that_moves_while_it_is_read(
    moving: tuple[Moving, Chip, AttestationKey], moves: set[int], pcr: int
) -> None:
    """Parts of two states are never put together."""
    context, chip, ak = moving
    context.pcr = pcr
    context.after_read = lambda n: n in moves
    quote = chip.quote(QUALIFYING, HashAlg.SHA256, ALL, HashAlg.SHA256)
    check(quote, ak, QUALIFYING, HashAlg.SHA256, ALL)


@REAL
def test_pcrs_that_move_during_every_read(moving: tuple[Moving, Chip, AttestationKey]) -> None:
    context, chip, _ = moving
    context.after_read = lambda n: True
    with pytest.raises(TpmError, match="PCRs changed during every"):
        chip.read_pcrs(HashAlg.SHA256, ALL)
    assert context.reads < 50


@REAL
def test_the_manufacturer(moving: tuple[Moving, Chip, AttestationKey]) -> None:
    assert moving[1].manufacturer() == "IBM"


@REAL
def test_an_extended_pcr_is_what_it_should_be(moving: tuple[Moving, Chip, AttestationKey]) -> None:
    """The values' order and width, against a value computed here."""
    context, chip, _ = moving
    digest = sha256(b"event").digest()
    values = TPML_DIGEST_VALUES([TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=digest))])
    context.pcr_extend(ESYS_TR.PCR16, values)
    read, _ = chip.read_pcrs(HashAlg.SHA256, 0x30000)
    assert read.values == ((16, sha256(bytes(32) + digest).digest()), (17, b"\xff" * 32))


# --- trouble while it serves ------------------------------------------------------------------------


def faulty(plan: Callable[[int], Action | None]) -> Callable[[str], ESAPI]:
    return partial(FaultyContext, plan=plan)


def flip(answer: bytes) -> bytes:
    return answer[:40] + bytes([answer[40] ^ 1]) + answer[41:]


PASSING = {
    "retry": Action(code=0x922),
    "yielded": Action(code=0x908),
    "canceled": Action(code=0x909),
    "testing": Action(code=0x90A),
    "session memory": Action(code=0x903),
    "object memory": Action(code=0x902),
    "retry by the resource manager": Action(code=0xB0922),
    "no quote": Action(garble=lambda answer: bytes.fromhex("80010000000a00000000")),
    "cut": Action(garble=lambda answer: answer[:40]),
    "a bit": Action(garble=flip),
    "broken": Action(drop=True),
}


@REAL
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("name", PASSING)
async def test_what_passes_is_not_told(tmp_path: Path, name: str, times: int) -> None:
    """A busy chip, a broken connection, a garbled answer: the tenant's quote comes all the same."""
    actions: list[Action] = []
    metrics = Metrics()

    def plan(command: int) -> Action | None:
        return actions.pop() if command == CC_QUOTE and actions else None

    async with open_quoter(
        EMBEDDED, tmp_path, metrics=metrics, open_context=faulty(plan)
    ) as opened:
        actions += [PASSING[name]] * times
        for _ in range(2):
            with trio.fail_after(LIMIT_S):
                quote = await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
            check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, 1)
        assert opened.state.trouble is None
        assert actions == []
    counted = [line for line in metrics.text().decode().splitlines() if "tpm_errors_total{" in line]
    total = sum(float(line.split()[-1]) for line in counted)
    # tpm2-tss tries again by itself where a chip says RETRY, YIELDED or TESTING.
    assert total == times or (name in ("retry", "yielded", "testing") and total == 0)


def take_sessions(context: ESAPI, count: int) -> None:
    for _ in range(count):
        context.start_auth_session(
            ESYS_TR.NONE,
            ESYS_TR.NONE,
            TPM2_SE.POLICY,
            TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL),
            TPM2_ALG.SHA256,
        )


@REAL
async def test_others_who_hold_every_session_do_not_stop_quotes(tmp_path: Path) -> None:
    """A quote needs none. The sessions are somebody else's on the same chip."""
    tpm = EmbeddedTpm(tmp_path / "chip")
    tpm.start()
    try:
        with Broker(tpm.tcti) as broker:
            others = open_context(broker.tcti)
            async with open_quoter(Tpm(tcti=broker.tcti, max_duty=1.0), tmp_path / "s") as opened:
                with pytest.raises(TSS2_Exception):
                    take_sessions(others, 100)
                with trio.fail_after(LIMIT_S):
                    quote = await opened.quote(QUALIFYING, HashAlg.SHA256, ALL)
                check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, ALL)
            others.close()
    finally:
        tpm.stop()


@REAL
@pytest.mark.parametrize("code", [0x101, 0x100, 0x921, 0x9A2])
async def test_a_fatal_code_opens_the_circuit_until_the_chip_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(circuit, "PROBE_S", 0.05)
    ill = False
    asked = 0
    metrics = Metrics()

    def plan(command: int) -> Action | None:
        nonlocal asked
        asked += command == CC_QUOTE
        return Action(code=code) if ill and command == CC_QUOTE else None

    async with open_quoter(
        EMBEDDED, tmp_path, metrics=metrics, open_context=faulty(plan)
    ) as opened:
        ill = True
        with trio.fail_after(LIMIT_S), pytest.raises(QuoteError) as caught:
            await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        assert caught.value.retry_after_s is not None
        assert opened.state.trouble is not None
        assert "circuit_open 1.0" in metrics.text().decode()
        before = asked
        for _ in range(20):  # at once, and the chip is not asked
            with trio.fail_after(1), pytest.raises(QuoteError):
                await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
            with trio.fail_after(1):
                await opened.ready()
        assert asked <= before + 5  # probes may have come in between
        ill = False
        await until(lambda: opened.state.trouble is None, "the circuit's closing")
        quote = await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, 1)
        assert "circuit_open 0.0" in metrics.text().decode()


def clear_and_make_keys(tcti: str, auth: bytes, *, make: bool) -> None:
    """As an owner does who clears the TPM; and who perhaps makes keys like ours."""
    context = open_context(tcti)
    context.clear(ESYS_TR.PLATFORM)
    if make:
        ek = find_or_make_ek(context, EK_HANDLE, keys.Auths())
        keys.find_or_make_ak(context, AK_HANDLE, "ecc", ek, keys.Auths(), lambda made: auth)
    context.close()


@REAL
@pytest.mark.parametrize("make", [False, True], ids=["no AK", "another AK"])
async def test_a_tpm_that_comes_back_with_another_ak_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make: bool
) -> None:
    """Cleared while we ran: no quote under a key that the tenants do not know, though it takes our
    authValue."""
    monkeypatch.setattr(circuit, "PROBE_S", 0.02)
    tpm = EmbeddedTpm(tmp_path / "chip")
    tpm.start()
    ill = False

    def plan(command: int) -> Action | None:
        return Action(drop=True) if ill else None

    try:
        with Broker(tpm.tcti) as broker:
            settings = Tpm(tcti=broker.tcti, max_duty=1.0)
            async with open_quoter(settings, tmp_path / "s", open_context=faulty(plan)) as opened:
                name = opened.ak.name
                auth = bytes.fromhex(json.loads(read_text(tmp_path / "s" / "ak.json"))["auth"])
                ill = True
                with trio.fail_after(LIMIT_S), pytest.raises(QuoteError):  # the connection breaks
                    await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
                clear_and_make_keys(broker.tcti, auth, make=make)
                caplog.clear()
                ill = False
                await until(lambda: any(r.levelname == "CRITICAL" for r in caplog.records))
                assert opened.state.trouble is not None
                assert name.hex() in caplog.text
                with pytest.raises(QuoteError):
                    await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
    finally:
        tpm.stop()


@REAL
async def test_a_replayed_answer_is_not_taken(tmp_path: Path) -> None:
    """Signed by our AK, and over other data: an answer of before, once more."""
    answers: list[bytes] = []
    armed = False
    replays = 0

    def keep(answer: bytes) -> bytes:
        answers.append(answer)
        return answer

    def replay(_answer: bytes) -> bytes:
        nonlocal replays
        replays += 1
        return answers[0]

    def plan(command: int) -> Action | None:
        if command != CC_QUOTE:
            return None
        return Action(garble=replay if armed and not replays else keep)

    async with open_quoter(EMBEDDED, tmp_path, open_context=faulty(plan)) as opened:
        armed = True
        with trio.fail_after(LIMIT_S):
            quote = await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, 1)
    assert replays == 1


@REAL
async def test_a_killed_swtpm_is_started_again(tmp_path: Path) -> None:
    async with open_quoter(EMBEDDED, tmp_path) as opened:
        (first,) = children_of(os.getpid())
        os.kill(first, signal.SIGKILL)
        await until(lambda: not is_alive(first))
        with trio.fail_after(LIMIT_S):
            quote = await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, 1)
        assert [pid for pid in children_of(os.getpid()) if is_alive(pid)] != [first]
    assert not [pid for pid in children_of(os.getpid()) if is_alive(pid)]


def trio_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "trio" in thread.name.lower()]


@REAL
async def test_the_swtpm_outlives_idle_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trio ends a worker thread that idles for ten seconds, and Linux signals a parent's death when the
    thread dies that started the child: the swtpm must not go with it."""
    monkeypatch.setattr("trio._core._thread_cache.IDLE_TIMEOUT", 0.01)
    async with open_quoter(EMBEDDED, tmp_path) as opened:
        (pid,) = children_of(os.getpid())
        clock = attestation.parse_attest(
            (await opened.quote(QUALIFYING, HashAlg.SHA256, 1)).attest
        ).clock
        await until(lambda: not trio_threads(), "the threads' end")
        with trio.move_on_after(0.2) as scope:
            await until(lambda: not is_alive(pid))
        assert scope.cancelled_caught, "the swtpm went with an idle thread"
        quote = await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        assert attestation.parse_attest(quote.attest).clock.reset_count == clock.reset_count


@REAL
async def test_a_hanging_command_is_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "HANG_LEAST_S", 0.02)
    monkeypatch.setattr(pace, "HANG_FACTOR", 1)
    hold = threading.Event()
    armed = False

    def plan(command: int) -> Action | None:
        return Action(hold=hold) if armed and command == CC_QUOTE else None

    async with open_quoter(EMBEDDED, tmp_path, open_context=faulty(plan)) as opened:
        assert opened.state.in_flight_s == 0
        armed = True
        with trio.move_on_after(0.01):
            await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        await until(lambda: opened.state.trouble is not None, "trouble")
        assert opened.state.in_flight_s > 0.02
        armed = False
        hold.set()
        await until(lambda: opened.state.trouble is None, "its end")
        quote = await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, 1)


@REAL
async def test_closing_gives_up_on_a_command_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_tpm, "CLOSE_LIMIT_S", 0.05)
    hold = threading.Event()
    armed = False

    def plan(command: int) -> Action | None:
        return Action(hold=hold) if armed and command == CC_QUOTE else None

    try:
        with trio.fail_after(LIMIT_S):
            async with open_quoter(EMBEDDED, tmp_path, open_context=faulty(plan)) as opened:
                armed = True
                with trio.move_on_after(0.01):
                    await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
    finally:
        hold.set()
    await until(lambda: opened.state.in_flight_s == 0)


@REAL
async def test_a_lying_chip_does_not_get_through_the_start(tmp_path: Path) -> None:
    """The first quote is verified: one with a bit turned is refused before anybody is served."""
    lie = Action(garble=lambda answer: answer[:40] + bytes([answer[40] ^ 1]) + answer[41:])

    def plan(command: int) -> Action | None:
        return lie if command == CC_QUOTE else None

    with trio.fail_after(LIMIT_S), pytest.raises(HostError):
        async with open_quoter(EMBEDDED, tmp_path, open_context=faulty(plan)):
            raise AssertionError("it opened")
    assert "name" not in json.loads(read_text(tmp_path / "ak.json"))


# --- credential activation --------------------------------------------------------------------------


def make_credential(ek_public: bytes, ak_name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """What a registrar sends: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""
    public, _ = TPM2B_PUBLIC.unmarshal(ek_public)
    blob, wrapped = make_credential_for(public, secret, TPM2B_NAME(ak_name))
    return blob.marshal(), wrapped.marshal()


@REAL
@pytest.mark.parametrize("algorithm", ["ecc", "rsa"])
async def test_a_credential_is_activated(tmp_path: Path, tpm: EmbeddedTpm, algorithm: str) -> None:
    secret = os.urandom(32)
    async with open_quoter(on(tpm, ak_algorithm=algorithm), tmp_path / "s") as opened:
        credential = make_credential(opened.identity.ek_public, opened.ak.name, secret)
        for _ in range(5):  # no session is left behind
            with trio.fail_after(LIMIT_S):
                assert await opened.activate_credential(*credential) == secret
        quote = await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, 1)
    assert tool(tpm, "tpm2_getcap", "handles-loaded-session").split() == []


@REAL
async def test_a_foreign_credential_is_refused_and_the_quotes_go_on(
    tmp_path: Path, tpm: EmbeddedTpm
) -> None:
    async with open_quoter(on(tpm), tmp_path / "s") as opened:
        ek = opened.identity.ek_public
        good = make_credential(ek, opened.ak.name, b"secret")
        for credential in (
            make_credential(ek, b"\x00\x0b" + bytes(32), b"secret"),
            (good[0], good[1][:-1] + bytes([good[1][-1] ^ 1])),
            (good[0][:-1] + bytes([good[0][-1] ^ 1]), good[1]),
            (b"", b""),
            (b"garbage", b"garbage"),
            (good[0][:10], good[1]),
        ):
            with trio.fail_after(LIMIT_S), pytest.raises(QuoteError):
                await opened.activate_credential(*credential)
            assert opened.state.trouble is None
        with trio.fail_after(LIMIT_S):
            assert await opened.activate_credential(*good) == b"secret"
            quote = await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
        check(quote, opened.ak, QUALIFYING, HashAlg.SHA256, 1)
    assert tool(tpm, "tpm2_getcap", "handles-loaded-session").split() == []


# --- the end ----------------------------------------------------------------------------------------


@REAL
async def test_closing_waits_for_a_command_that_nobody_waits_for(tmp_path: Path) -> None:
    hold = threading.Event()
    armed = False

    def plan(command: int) -> Action | None:
        return Action(hold=hold) if armed and command == CC_QUOTE else None

    timer = threading.Timer(0.1, hold.set)
    with trio.fail_after(LIMIT_S):
        async with open_quoter(EMBEDDED, tmp_path, open_context=faulty(plan)) as opened:
            armed = True
            with trio.move_on_after(0.01) as scope:
                await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
            assert scope.cancelled_caught
            timer.start()
        assert hold.is_set()  # the context was closed after the command, not under it
    timer.join()


@REAL
async def test_cancelled_while_it_quotes(tmp_path: Path) -> None:
    """The daemon is cancelled: the context is not closed under a command, the swtpm ends, and the keys
    are there at the next start."""
    hold = threading.Event()
    armed = False
    closed_at: list[bool] = []

    class Watched(FaultyContext):
        def close(self) -> None:
            closed_at.append(hold.is_set())
            super().close()

    def plan(command: int) -> Action | None:
        return Action(hold=hold) if armed and command == CC_QUOTE else None

    opened: EsysQuoter | None = None
    timer = threading.Timer(0.1, hold.set)
    with trio.fail_after(LIMIT_S):
        with trio.CancelScope() as scope:
            async with open_quoter(
                EMBEDDED, tmp_path, open_context=partial(Watched, plan=plan)
            ) as opened:
                armed = True
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(opened.quote, QUALIFYING, HashAlg.SHA256, 1)
                    await trio.sleep(0.02)
                    timer.start()
                    scope.cancel()
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(timer.join)
        assert False not in closed_at
        assert opened is not None
        assert (await identity_of(EMBEDDED, tmp_path))[0] == opened.ak.name
