"""The doctor: what it finds on a real swtpm, that it leaves nothing behind, and what it concludes from
the limits of other chips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.x509.oid import AuthorityInformationAccessOID
from soft_ek import Authority, ek_certificate, rsa_ek
from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR
from tpm2_pytss.types import TPM2B_SENSITIVE_CREATE
from tpm_helpers import (
    CC_CREATE_PRIMARY,
    CC_GET_CAPABILITY,
    CC_PCR_READ,
    CC_QUOTE,
    FIRST_LOADED_SESSION,
    FIRST_PERSISTENT,
    FIRST_TRANSIENT,
    Faults,
    handles,
    raw_tpm,
    take_loaded_sessions,
    take_object_slots,
)

from provider_proxy.errors import TpmError
from provider_proxy.evidence.tpm_keys import PublicKey
from provider_proxy.evidence.vtpm_link import spki_digest
from provider_proxy.host.tpm import capabilities, doctor
from provider_proxy.host.tpm.chip import close_context, open_context
from provider_proxy.host.tpm.ek import EK_KINDS, EkCertificates
from provider_proxy.host.tpm.ek_urls import issuer_urls
from provider_proxy.testing.disturb import CC_PCR_EXTEND, Action
from provider_proxy.trust.ek_certificate import parse_certificate

WRITES = (0x120, 0x126, 0x12A, 0x137, 0x13C, 0x13D, 0x144, 0x145, 0x182)
"""EvictControl, Clear, NV_DefineSpace, NV_Write, PCR_Event, PCR_Reset, Startup, Shutdown,
PCR_Extend: nothing for a doctor."""
CC_HASH = 0x17D


class Patient:
    """A raw TPM on which somebody else may be too."""

    def __init__(self, tcti: str, faults: Faults) -> None:
        self.tcti = tcti
        self.faults = faults
        self.other = open_context(tcti)

    def examine(self) -> doctor.Report:
        context = open_context(self.tcti)
        try:
            return doctor.examine(context)
        finally:
            close_context(context)

    def in_use(self) -> list[list[int]]:
        kinds = (FIRST_LOADED_SESSION, FIRST_TRANSIENT, FIRST_PERSISTENT)
        return [handles(self.other, first) for first in kinds]


@pytest.fixture(scope="module")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    faults = Faults()
    with raw_tpm(tmp_path_factory.mktemp("chip"), faults) as broker:
        made = Patient(broker.tcti, faults)
        yield made
        close_context(made.other)


@pytest.fixture
def patient(chip: Patient) -> Iterator[Patient]:
    yield chip
    chip.faults.clear()
    assert chip.in_use()[:2] == [[], []], "the test, or the doctor, left something behind"


# --- on a swtpm -------------------------------------------------------------------------------------


@pytest.mark.real
def test_what_a_swtpm_is(patient: Patient) -> None:
    report = patient.examine()
    assert report.manufacturer == "IBM"
    assert report.vendor == "SWTPM" or report.vendor.startswith("SW")
    assert report.revision == pytest.approx(1.64, abs=0.3)
    assert len(report.firmware.split(".")) == 4
    assert {"sha256", "sha384"} <= set(report.pcr_banks)
    assert {"rsa", "ecc", "rsassa", "ecdsa", "sha256"} <= set(report.algorithms)
    assert report.ek_certificates == ()
    limits = report.limits
    assert limits["sessions_max"] == 64
    assert limits["sessions_loaded_free"] == 3
    assert limits["transient_free"] == 3
    assert limits["context_gap_max"] == 0xFFFF
    assert limits["digest_max_bytes"] == 64
    assert limits["lockout_counter"] < limits["lockout_limit"]
    assert set(report.quote_ms) == {"ecc", "rsa"}
    assert all(0 < ms < 5000 for ms in report.quote_ms.values())
    assert any("software TPM" in line for line in report.consequences)


@pytest.mark.real
def test_it_reads_and_leaves_nothing(patient: Patient) -> None:
    """Twice: what it says has not changed, and nothing that persists was touched."""
    before = patient.in_use()
    one = patient.examine()
    del patient.faults.seen[:]
    two = patient.examine()
    seen = set(patient.faults.seen)
    assert patient.in_use() == before
    assert seen.isdisjoint(WRITES)
    assert patient.faults.count(CC_CREATE_PRIMARY) == 2
    assert (one.limits, one.persistent, one.pcr_banks) == (
        two.limits,
        two.persistent,
        two.pcr_banks,
    )


@pytest.mark.real
def test_persistent_keys_are_shown(patient: Patient) -> None:
    context = patient.other
    key = context.create_primary(TPM2B_SENSITIVE_CREATE(), "ecc", ESYS_TR.OWNER)[0]
    kept = context.evict_control(ESYS_TR.OWNER, key, 0x81000077)
    context.flush_context(key)
    assert patient.examine().persistent == (0x81000077,)
    context.evict_control(ESYS_TR.OWNER, kept, 0)
    assert patient.examine().persistent == ()


@pytest.mark.real
def test_taken_sessions_are_seen(patient: Patient) -> None:
    taken = take_loaded_sessions(patient.other)
    report = patient.examine()
    for session in taken:
        patient.other.flush_context(session)
    assert report.limits["sessions_loaded_free"] == 0
    assert set(report.quote_ms) == {"ecc", "rsa"}  # a quote needs none
    assert any("Every session is in use" in line for line in report.consequences)


@pytest.mark.real
def test_taken_object_slots_are_seen(patient: Patient) -> None:
    taken = take_object_slots(patient.other)
    report = patient.examine()
    for slot in taken:
        patient.other.flush_context(slot)
    assert report.limits["transient_free"] == 0
    assert report.quote_ms == {}
    assert any("Every object slot is in use" in line for line in report.consequences)
    assert not any("ak_algorithm" in line for line in report.consequences)


@pytest.mark.real
@pytest.mark.parametrize("code", [0x2C3, 0x2D2, 0x143, 0x184], ids=hex)
def test_a_chip_without_p256_keys(patient: Patient, code: int) -> None:
    """Its own words for it: an asymmetric algorithm, a scheme, a command or a value it does not have."""
    patient.faults.next(CC_CREATE_PRIMARY, Action(code=code))
    report = patient.examine()
    assert set(report.quote_ms) == {"rsa"}
    assert any("makes no P-256 key" in line for line in report.consequences)


@pytest.mark.real
@pytest.mark.parametrize("code", [0x902, 0x909, 0x921, 0x923], ids=hex)
def test_a_chip_that_makes_no_key_just_now_is_not_said_to_make_none(
    patient: Patient, code: int
) -> None:
    """Full, cancelled, locked, worn: no reason for an operator to change `ak_algorithm`."""
    patient.faults.next(CC_CREATE_PRIMARY, Action(code=code))
    try:
        report = patient.examine()
    except TpmError:
        return
    assert not any("makes no P-256 key" in line for line in report.consequences)


@pytest.mark.real
@pytest.mark.parametrize("command", [CC_GET_CAPABILITY, CC_CREATE_PRIMARY, CC_QUOTE], ids=hex)
def test_a_chip_that_goes_meanwhile_is_an_error(patient: Patient, command: int) -> None:
    """Half a report must not pass for a whole one: it says what failed."""
    patient.faults.next(command, Action(drop=True))
    context = open_context(patient.tcti)
    try:
        if command == CC_GET_CAPABILITY:
            with pytest.raises(TpmError):
                doctor.examine(context)
        else:
            report = doctor.examine(context)
            assert report.manufacturer == "IBM"
            assert "TPM2_" in report.failures[0]
            assert "Check the failures" in report.todo[-1]
    finally:
        close_context(context)
    for handle in handles(
        patient.other, FIRST_TRANSIENT
    ):  # its key; with a resource manager it goes
        patient.other.flush_context(patient.other.tr_from_tpmpublic(handle))


@pytest.mark.real
def test_a_quote_that_fails_leaves_no_key(patient: Patient) -> None:
    patient.faults.next(CC_QUOTE, Action(code=0x101))
    report = patient.examine()
    assert "TPM2_Quote" in report.failures[0]
    assert "failure mode: power the host off and on" in report.failures[0]
    assert report.todo


@pytest.mark.real
def test_the_time_of_a_quote_is_measured(patient: Patient) -> None:
    patient.faults.always(CC_QUOTE, Action(delay_s=0.02))
    report = patient.examine()
    assert all(20 <= ms < 1000 for ms in report.quote_ms.values())
    slowest = max(report.quote_ms.values())
    assert f"One after the other, it makes at most {1000 / slowest:.1f} quotes a second." in (
        report.consequences
    )


@pytest.mark.real
def test_the_times_of_small_commands_are_measured(patient: Patient) -> None:
    """No PCR is extended for it: TPM2_Hash stands in."""
    patient.faults.always(CC_PCR_READ, Action(delay_s=0.02))
    patient.faults.always(CC_HASH, Action(delay_s=0.04))
    del patient.faults.seen[:]
    report = patient.examine()
    assert 20 <= report.command_ms["pcr_read"] < 1000
    assert 40 <= report.command_ms["extend"] < 1000
    assert 0 < report.command_ms["other"] < 1000
    assert CC_PCR_EXTEND not in patient.faults.seen


@pytest.mark.real
def test_a_command_that_the_chip_does_not_have_is_left_out(patient: Patient) -> None:
    patient.faults.always(CC_HASH, Action(code=0x143))
    assert set(patient.examine().command_ms) == {"pcr_read", "other"}


# --- what a chip tells in parts ---------------------------------------------------------------------


class PagedChip:
    """Answers capabilities a few at a time, as small chips do."""

    def __init__(self, properties: dict[int, int], found: list[int], page: int) -> None:
        self._properties = properties
        self._found = found
        self._page = page
        self.asked = 0

    def get_capability(self, capability: int, first: int, count: int) -> tuple[bool, Any]:
        self.asked += 1
        assert self.asked < 1000, "it asks for ever"
        if int(capability) == 6:  # TPM2_CAP_TPM_PROPERTIES
            tags = [tag for tag in sorted(self._properties) if tag >= first]
            listed = [
                SimpleNamespace(property=tag, value=self._properties[tag])
                for tag in tags[: min(count, self._page)]
            ]
            data = SimpleNamespace(data=SimpleNamespace(tpmProperties=listed))
            return len(tags) > len(listed), data
        more = [handle for handle in self._found if handle >= first]
        part = more[: min(count, self._page)]
        return len(more) > len(part), SimpleNamespace(data=SimpleNamespace(handles=part))


@pytest.mark.parametrize("page", [1, 3, 100])
def test_properties_are_read_to_their_end(page: int) -> None:
    properties = {0x100 + n: n for n in range(0, 0x30, 2)} | {0x200 + n: n for n in range(0x12)}
    chip = PagedChip(properties, [], page)
    assert capabilities.properties(cast(ESAPI, chip)) == properties


@pytest.mark.parametrize("page", [1, 3, 100])
def test_handles_are_read_to_their_end_and_no_further(page: int) -> None:
    persistent = [0x81000000 + n for n in (0, 1, 7, 0x100, 0x10001)]
    chip = PagedChip({}, [0x01C00002, *persistent, 0x82000000], page)
    assert capabilities.handles(cast(ESAPI, chip), FIRST_PERSISTENT) == tuple(persistent)


def test_a_chip_that_always_has_more_comes_to_an_end() -> None:
    """`moreData` without data: a chip's own mistake."""

    class Endless(PagedChip):
        def get_capability(self, capability: int, first: int, count: int) -> tuple[bool, Any]:
            return True, super().get_capability(capability, first, count)[1]

    chip = Endless({0x100: 1, 0x2FF: 2}, [0x81000000], 5)
    assert capabilities.properties(cast(ESAPI, chip))[0x100] == 1
    assert capabilities.handles(cast(ESAPI, chip), FIRST_PERSISTENT) == (0x81000000,)


# --- what follows -----------------------------------------------------------------------------------

GOOD_LIMITS = {
    "context_gap_max": 0xFFFF,
    "sessions_loaded_free": 3,
    "transient_free": 3,
    "lockout_counter": 0,
    "lockout_limit": 32,
    "digest_max_bytes": 48,
}


def consequences(
    *,
    manufacturer: str = "IFX",
    banks: tuple[str, ...] = ("sha256",),
    ecc: float | None = 71.0,
    rsa: float | None = 188.0,
    **limits: int,
) -> str:
    times = {kind: ms for kind, ms in (("ecc", ecc), ("rsa", rsa)) if ms is not None}
    lacks = ["ecc"] if ecc is None else []
    return "\n".join(
        doctor._consequences(manufacturer, {**GOOD_LIMITS, **limits}, banks, times, lacks)
    )


def test_a_good_chip_of_medium_speed() -> None:
    assert consequences().splitlines() == [
        'ak_algorithm = "ecc" quotes 2.6 times as fast as "rsa" here.',
        "One after the other, it makes at most 5.3 quotes a second.",
    ]


CASES: dict[str, tuple[Callable[[], str], str, bool]] = {
    "a software TPM": (lambda: consequences(manufacturer="IBM"), "software TPM", True),
    "a hardware TPM": (lambda: consequences(), "software TPM", False),
    "no SHA-256": (lambda: consequences(banks=("sha1",)), "No SHA-256 bank", True),
    "SHA-256 among others": (lambda: consequences(banks=("sha1", "sha256")), "SHA-256 bank", False),
    "fast anyway": (lambda: consequences(ecc=6.0, rsa=11.0), "ak_algorithm", False),
    "no P-256": (lambda: consequences(ecc=None), "makes no P-256 key", True),
    "no RSA": (lambda: consequences(rsa=None), "P-256", False),
    "no keys at all": (lambda: consequences(ecc=None, rsa=None), "times a second", False),
    "an AMD fTPM's gap": (lambda: consequences(context_gap_max=255), "context gap", True),
    "a common gap": (lambda: consequences(context_gap_max=0xFFFF), "context gap", False),
    "no free session": (lambda: consequences(sessions_loaded_free=0), "session is in use", True),
    "one free session": (lambda: consequences(sessions_loaded_free=1), "session is in use", False),
    "no free slot": (lambda: consequences(transient_free=0), "slot is in use", True),
    "one free slot": (lambda: consequences(transient_free=1), "slot is in use", False),
    "lockout": (lambda: consequences(lockout_counter=32), "in lockout", True),
    "nearly": (lambda: consequences(lockout_counter=31), "in lockout", False),
    "SHA-256 at most": (lambda: consequences(digest_max_bytes=32), "34 bytes", True),
    "more than that": (lambda: consequences(digest_max_bytes=48), "34 bytes", False),
}


@pytest.mark.parametrize("name", CASES)
def test_what_follows(name: str) -> None:
    text, words, expected = CASES[name]
    assert (words in text()) is expected


def test_a_limit_that_the_chip_does_not_tell_is_not_made_up() -> None:
    """Old chips leave properties out."""
    assert list(doctor._consequences("STM", {}, ("sha256",), {"ecc": 49.0})) == [
        "One after the other, it makes at most 20.4 quotes a second."
    ]


# --- what to do -------------------------------------------------------------------------------------

EK = rsa_ek().public_key()
MAKER = Authority(
    "maker",
    others=(
        x509.AuthorityInformationAccess(
            [
                x509.AccessDescription(
                    AuthorityInformationAccessOID.CA_ISSUERS,
                    x509.UniformResourceIdentifier("http://pki.example/root.crt"),
                )
            ]
        ),
    ),
)


def advised(
    manufacturer: str = "IFX",
    banks: tuple[str, ...] | None = ("sha256",),
    certificates: EkCertificates | None = None,
    *,
    ek: PublicKey | None = EK,
    failures: tuple[str, ...] = (),
) -> str:
    nothing = EkCertificates({}, {})
    return "\n".join(doctor.advice(manufacturer, banks, certificates or nothing, ek, failures))


def test_advice_for_a_chip_with_a_certificate() -> None:
    cert = parse_certificate(ek_certificate(MAKER, rsa_ek()))
    found = EkCertificates({EK_KINDS[0]: cert}, {})
    assert advised(certificates=found) == (
        "Tenants need the CA 'CN=maker' of the EK certificate RSA-2048: see the TPM maker's web site."
    )
    passed = EkCertificates({EK_KINDS[0]: cert}, {0x01C00002: "why"})
    assert "NV indices that were skipped" in advised(certificates=passed)
    other = EkCertificates({EK_KINDS[0]: parse_certificate(ek_certificate(MAKER, rsa_ek(1)))}, {})
    assert "Tenants need the CA" not in advised(certificates=other)
    issuing = parse_certificate(MAKER.der())
    assert issuer_urls(issuing) == ("http://pki.example/root.crt",)


def test_advice_for_a_chip_without_one() -> None:
    digest = spki_digest(EK).hex()
    assert advised() == (
        "If there is no certificate, tenants vouch for the EK themselves: provider-proxy pin add "
        f"--ek-sha256 {digest}."
    )
    for manufacturer, server in (("INTC", "ekop.intel.com"), ("AMD", "ftpm.amd.com")):
        text = advised(manufacturer)
        assert f"https://{server}/" in text
        assert "tpm.ek_cert_file" in text
    assert advised(ek=None) == "Make the EK and the AK: provider-proxy tpm ak create."


@pytest.mark.parametrize(
    ("banks", "words"),
    [
        ((), ("tpm2_pcrallocate sha256:all, then reboot",)),
        (("sha1",), ("tpm2_pcrallocate", "tpm.insecure_sha1_bank = true")),
        (("sha1", "sha384"), ("tpm2_pcrallocate", 'tpm.banks = ["sha384"]')),
    ],
)
def test_advice_about_banks(banks: tuple[str, ...], words: tuple[str, ...]) -> None:
    text = advised(banks=banks)
    for word in words:
        assert word in text
    assert "insecure" not in text or banks == ("sha1",)
    assert "tpm2_pcrallocate" not in advised(banks=None, failures=("no answer",))
    assert "Check the failures" in advised(banks=None, failures=("no answer",))
