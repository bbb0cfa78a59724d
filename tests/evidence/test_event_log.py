"""The firmware's event log: made-up logs of both forms, tampered ones, any bytes."""

from __future__ import annotations

import json
import struct

import pytest
from event_log_helpers import (
    ACTION,
    BODY,
    EVENTS,
    LOG,
    MEASURED,
    expected,
    header,
    locality,
    new,
    old,
)
from hypothesis import example, given
from hypothesis import strategies as st

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs import event_log
from provider_proxy.evidence.logs.boot_policy import parse_boot_policy
from provider_proxy.evidence.logs.event_log import (
    EV_NO_ACTION,
    MAX_LOG_BYTES,
    parse_event_log,
    replay,
)
from provider_proxy.evidence.logs.judge import check_boot_log
from provider_proxy.evidence.model import AkName, ClockState, HashAlg, VerifiedQuote


def quote(bank: HashAlg = HashAlg.SHA256, **changes: bytes) -> VerifiedQuote:
    """What was signed, with PCRs 0 to 7."""
    values = {pcr: bytes(bank.digest_bytes) for pcr in range(8)} | expected(bank, 3)
    values |= {int(name[3:]): value for name, value in changes.items()}
    return VerifiedQuote(
        bank=bank,
        pcrs=values,
        clock=ClockState(reset_count=1, restart_count=0, clock_ms=1),
        clock_safe=True,
        firmware_version=1,
        was_reset=False,
        ak_name=AkName(b""),
        claims=None,
    )


@pytest.mark.parametrize("bank", [HashAlg.SHA1, HashAlg.SHA256, HashAlg.SHA384])
def test_a_crypto_agile_log(bank: HashAlg) -> None:
    events = parse_event_log(LOG)
    assert [event.pcr for event in events if event.kind != EV_NO_ACTION] == [0, 1, 7, 0, 7, 4]
    assert replay(events, bank) == expected(bank, 3)
    assert replay(parse_event_log(header() + BODY), bank) == expected(bank)
    check_boot_log(LOG, quote(bank), MEASURED)


def test_a_log_of_sha_1_alone() -> None:
    log = b"".join(old(*event) for event in EVENTS)
    assert replay(parse_event_log(log), HashAlg.SHA1) == expected(HashAlg.SHA1)
    with pytest.raises(LogError, match="no digests of bank sha256"):
        replay(parse_event_log(log), HashAlg.SHA256)


def test_an_event_that_is_no_measurement_extends_nothing() -> None:
    log = LOG + new(0, EV_NO_ACTION, b"SP800-155 Event3") + new(0xFFFFFFFF, EV_NO_ACTION, b"x")
    check_boot_log(log, quote(), MEASURED)


@pytest.mark.parametrize(
    "log",
    [
        LOG + new(0, ACTION, b"more"),
        header() + locality(3) + BODY[: -len(new(*EVENTS[-1]))],
        header() + locality(4) + BODY,
        header() + BODY,
        header() + locality(3) + new(*EVENTS[1]) + BODY,
        LOG.replace(HashAlg.SHA256.digest(b"loader"), HashAlg.SHA256.digest(b"evil")),
        None,
    ],
)
def test_a_tampered_log_is_refused(log: bytes | None) -> None:
    with pytest.raises(LogError):
        check_boot_log(log, quote(), MEASURED)


def test_only_the_pcrs_that_are_asked_for_must_come_out() -> None:
    other = quote(pcr4=HashAlg.SHA256.digest(b"kexec"))
    check_boot_log(LOG, other, 0x83)
    with pytest.raises(LogError, match="PCR 4"):
        check_boot_log(LOG, other, 0x10)


@pytest.mark.parametrize("mask", [0xFF, 0x04, 0x13 | 1 << 5])
def test_a_pcr_that_was_never_extended_says_nothing(mask: int) -> None:
    with pytest.raises(LogError, match=r"PCR [25] was never extended"):
        check_boot_log(LOG, quote(), mask)


def test_a_locality_alone_extends_nothing() -> None:
    log = header() + locality(3)
    with pytest.raises(LogError, match="PCR 0 was never extended"):
        check_boot_log(log, quote(pcr0=bytes(31) + b"\3"), 0x01)


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (b"", "ends early"),
        (LOG[:-1], "ends early"),
        (LOG + b"\0", "ends early"),
        (LOG + bytes(40), "more digests|no digests|ends early"),
        (header({}), "too many hash algorithms, or none"),
        (header(dict.fromkeys(range(100, 109), 32)), "too many hash algorithms"),
        (header({0x0B: 20}), "incorrectly"),
        (header({0x0B: 32}) + new(0, ACTION, b"x", {0x04: 20}), "an undeclared algorithm"),
        (header({0x0B: 32}) + new(0, ACTION, b"x", {0x04: 20, 0x0B: 32}), "more digests"),
        (LOG + new(24, ACTION, b"x"), "a PCR that does not exist"),
        (LOG + locality(3), "misplaced startup locality"),
        (header() + locality(1) + BODY, "misplaced startup locality"),
        (bytes(MAX_LOG_BYTES + 1), "too large"),
    ],
)
def test_what_is_no_log_is_refused(log: bytes, why: str) -> None:
    with pytest.raises(LogError, match=why):
        replay(parse_event_log(log), HashAlg.SHA256)


def test_too_many_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("provider_proxy.evidence.logs.event_log.MAX_EVENTS", 3)
    with pytest.raises(LogError, match="too many events"):
        parse_event_log(LOG)


def test_limits_are_the_documented_ones() -> None:
    assert event_log.MAX_LOG_BYTES == 4_194_304
    assert event_log.MAX_EVENTS == 50_000
    assert event_log.MAX_ALGORITHMS == 8
    assert frozenset((0, 3, 4)) == event_log.LOCALITIES


def test_a_log_may_reach_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MAX_LOG_BYTES", len(LOG))
    monkeypatch.setattr(event_log, "MAX_EVENTS", len(parse_event_log(LOG)))
    assert len(parse_event_log(LOG)) == event_log.MAX_EVENTS
    monkeypatch.setattr(event_log, "MAX_EVENTS", event_log.MAX_EVENTS - 1)
    with pytest.raises(LogError, match="too many events"):
        parse_event_log(LOG)
    monkeypatch.setattr(event_log, "MAX_LOG_BYTES", len(LOG) - 1)
    with pytest.raises(LogError, match="too large"):
        parse_event_log(LOG)


@pytest.mark.parametrize("count", [1, 8])
def test_a_log_has_one_to_eight_algorithms(count: int) -> None:
    algorithms = {0x0B: 32} | dict.fromkeys(range(100, 99 + count), 16)
    event = struct.pack("<III", 3, ACTION, count)
    for alg, size in algorithms.items():
        event += struct.pack("<H", alg) + bytes([alg]) * size
    (found,) = parse_event_log(header(algorithms) + event + struct.pack("<I", 2) + b"ab")
    assert (found.pcr, found.kind, found.data) == (3, ACTION, b"ab")
    assert found.digests == {HashAlg.SHA256: b"\x0b" * 32}


@pytest.mark.parametrize("value", range(7))
def test_pcr_0_begins_with_a_locality_that_there_is(value: int) -> None:
    log = header() + locality(value) + new(0, ACTION, b"x")
    if value not in (0, 3, 4):
        with pytest.raises(LogError, match="startup locality"):
            replay(parse_event_log(log), HashAlg.SHA256)
        return
    first = bytes(31) + bytes([value])
    expected_0 = HashAlg.SHA256.digest(first + HashAlg.SHA256.digest(b"x"))
    assert replay(parse_event_log(log), HashAlg.SHA256) == {0: expected_0}


def test_a_locality_of_another_length_is_out_of_place() -> None:
    for extra in (b"", b"\3\0"):
        log = header() + new(0, EV_NO_ACTION, b"StartupLocality\0" + extra)
        with pytest.raises(LogError, match="startup locality"):
            replay(parse_event_log(log), HashAlg.SHA256)
    elsewhere = header() + new(1, EV_NO_ACTION, b"StartupLocality\0\7")
    assert replay(parse_event_log(elsewhere), HashAlg.SHA256) == {}


@pytest.mark.parametrize(("pcr", "good"), [(23, True), (24, False), (0xFFFFFFFF, False)])
def test_an_event_s_pcr_is_one_that_there_is(pcr: int, good: bool) -> None:
    assert len(parse_event_log(header() + new(pcr, EV_NO_ACTION, b"x"))) == 1
    if good:
        assert parse_event_log(header() + new(pcr, ACTION, b"x"))[0].pcr == pcr
        return
    with pytest.raises(LogError, match="a PCR that does not exist"):
        parse_event_log(header() + new(pcr, ACTION, b"x"))


@pytest.mark.parametrize(
    "data",
    [
        b'{"4": 5}',
        b'{"4": [5]}',
        b'{"4": {"ab": 1}}',
        b'{"4": null}',
        b'{"4": ["zz"]}',
        b'{"4": "ab"}',
    ],
)
def test_a_boot_policy_has_lists_of_hex(data: bytes) -> None:
    with pytest.raises(UsageError, match="PCR 4 is not a list of hex digests"):
        parse_boot_policy(data, bank=HashAlg.SHA256)


def test_a_boot_policy_may_name_every_pcr() -> None:
    every = json.dumps({str(pcr): [] for pcr in range(24)}).encode()
    assert parse_boot_policy(every, bank=HashAlg.SHA256).mask == 0xFFFFFF
    with pytest.raises(UsageError, match="not an object of PCR numbers"):
        parse_boot_policy(every.replace(b'"23"', b'"24"'), bank=HashAlg.SHA256)


@pytest.mark.parametrize(
    "first", [(EV_NO_ACTION, b"something"), (ACTION, b"Spec ID Event03\0" + bytes(20))]
)
def test_a_log_without_its_header_is_of_sha_1(first: tuple[int, bytes]) -> None:
    kind, data = first
    events = parse_event_log(old(0, kind, data) + old(1, ACTION, b"x"))
    assert [event.kind for event in events] == [kind, ACTION]
    assert set(events[0].digests) == {HashAlg.SHA1}


def test_a_locality_comes_before_what_is_measured_into_pcr_0() -> None:
    first = header() + new(1, ACTION, b"x") + locality(3)
    assert replay(parse_event_log(first), HashAlg.SHA256)[0] == bytes(31) + b"\3"
    with pytest.raises(LogError, match="misplaced startup locality"):
        replay(parse_event_log(header() + new(0, ACTION, b"x") + locality(3)), HashAlg.SHA256)


def digests(pcr: int) -> list[str]:
    return [HashAlg.SHA256.digest(data).hex() for n, _, data in EVENTS if n == pcr]


def test_a_boot_policy() -> None:
    good = parse_boot_policy(
        json.dumps({"4": digests(4), "7": digests(7)}).encode(), bank=HashAlg.SHA256
    )
    check_boot_log(LOG, quote(), MEASURED, good)
    bad = parse_boot_policy(json.dumps({"4": digests(7)}).encode(), bank=HashAlg.SHA256)
    with pytest.raises(LogError, match=r"PCR 4 was extended with .* 0x80000003"):
        check_boot_log(LOG, quote(), MEASURED, bad)
    unmeasured = header() + b"".join(new(*event) for event in EVENTS if event[0] != 4)
    with pytest.raises(LogError, match="PCR 4 was never extended"):  # a loader that nobody measured
        check_boot_log(
            unmeasured, quote(PCR4=bytes(32), PCR0=expected(HashAlg.SHA256)[0]), MEASURED, good
        )
    untouched = parse_boot_policy(b'{"3": []}', bank=HashAlg.SHA256)
    check_boot_log(LOG, quote(), MEASURED | 1 << 3, untouched)
    nothing = parse_boot_policy(b'{"1": []}', bank=HashAlg.SHA256)
    with pytest.raises(LogError, match="PCR 1"):
        check_boot_log(LOG, quote(), MEASURED, nothing)


@pytest.mark.parametrize(
    "bad",
    [b"", b"[]", b"{}", b'{"24":[]}', b'{"00":[]}', b'{"0":"ab"}', b'{"0":["ab"]}', b"[" * 9999],
)
def test_what_is_no_boot_policy_is_refused(bad: bytes) -> None:
    with pytest.raises(UsageError):
        parse_boot_policy(bad, bank=HashAlg.SHA256)


@given(st.binary(max_size=300), st.integers(0, len(LOG)), st.integers(0, len(LOG)))
@example(b"\xff" * 4, len(header()) + 8, len(header()) + 12)
def test_any_bytes_give_typed_errors_alone(data: bytes, start: int, end: int) -> None:
    """Bytes alone, and in the middle of a good log."""
    for log in (data, LOG[:start] + data + LOG[end:]):
        try:
            check_boot_log(log, quote(), MEASURED)
        except LogError:
            continue
        # What leads to the signed values extends the same, whatever else it says.
        assert replay(parse_event_log(log), HashAlg.SHA256) == expected(HashAlg.SHA256, 3)
