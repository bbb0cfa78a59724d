"""A watched host over fake proxies, on a clock that jumps: rounds, retries, verdicts, continuity."""

from __future__ import annotations

import itertools
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from event_log_helpers import EVENTS, LOG, MEASURED
from ima_helpers import GOOD, HOST, certificate, line, text
from listed_tpms import ImaTpm, ima_proxy
from watch_helpers import FakeProxy, Rig, b64, response

from provider_proxy.errors import HostError, PinChangedError, ReplyError, UsageError
from provider_proxy.evidence.logs.ima import ReplayState
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.logs.ima_keys import file_key
from provider_proxy.evidence.model import AkName, ClockState, HashAlg, PcrValues, QuoteRequest
from provider_proxy.evidence.wire import encode_envelope
from provider_proxy.tenant.policies import LogRules, PolicyFiles
from provider_proxy.tenant.watch.reports import Verdict
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.store import (
    HostRecord,
    ImaRecord,
    StateStore,
    encode_record,
    parse_state,
)
from provider_proxy.testing.soft_tpm import SoftTpm

Jumping = trio.testing.MockClock
FIRMWARE = sha256(b"firmware").hexdigest()


@pytest.fixture
def rig(tmp_path: Path, nursery: trio.Nursery) -> Rig:
    made = Rig(tmp_path)
    made.proxy.serve_in(nursery)
    return made


def policy_file(directory: Path, value: str = FIRMWARE) -> Path:
    path = directory / "policy.json"
    path.write_text(json.dumps({"0": [value], "mask": "0x1"}))
    return path


# --- rounds -------------------------------------------------------------------------------------------


async def test_a_good_host_is_trusted_and_told_of_once(
    autojump_clock: Jumping, rig: Rig, tmp_path: Path
) -> None:
    host = rig.host(tpm_policy=policy_file(tmp_path))
    for _ in range(3):
        assert await host.round() is State.TRUSTED
    assert rig.states() == ["TRUSTED"]
    report = rig.reports[0]
    assert (report["host"], report["error"], report["previous"]) == ("h", None, None)
    assert report["ak_name"] == rig.proxy.tpm.ak.name.hex()
    assert report["time"].startswith("2027-01-15T")
    assert rig.checks("ok") == 3


async def test_nonces_are_fresh_and_the_connection_is_kept(
    autojump_clock: Jumping, rig: Rig
) -> None:
    host = rig.host()
    for _ in range(4):
        await host.round()
    nonces = {request.nonce for _, request in rig.proxy.asked}
    assert len(nonces) == len(rig.proxy.asked) == 4
    assert rig.proxy.connections == 1


async def test_a_changed_pcr_is_told_of_at_once(
    autojump_clock: Jumping, rig: Rig, tmp_path: Path
) -> None:
    host = rig.host(tpm_policy=policy_file(tmp_path))
    await host.round()
    rig.proxy.tpm.extend(0, b"evil")
    began = trio.current_time()
    assert await host.round() is State.INVALID_QUOTE
    assert trio.current_time() == began  # no retry stands between
    report = rig.reports[-1]
    assert (report["state"], report["previous"]) == ("INVALID_QUOTE", "TRUSTED")
    assert (report["error"], report["check"]) == ("PolicyError", 7)
    assert "PCR 0 is" in report["reason"]
    assert await host.round() is State.INVALID_QUOTE
    assert rig.states() == ["TRUSTED", "INVALID_QUOTE"]  # and not again for the same reason


async def test_a_foreign_key_is_refused(autojump_clock: Jumping, rig: Rig) -> None:
    rig.aks.tpm = SoftTpm()
    assert await rig.host().round() is State.INVALID_QUOTE
    assert rig.reports[-1]["error"] == "SignatureError"


async def test_an_old_answer_replayed_is_refused(autojump_clock: Jumping, rig: Rig) -> None:
    host = rig.host()
    await host.round()
    kept = rig.proxy.good(rig.proxy.asked[0][1])
    rig.proxy.answer = lambda request: kept
    assert await host.round() is State.INVALID_QUOTE
    assert rig.reports[-1]["error"] == "QualifyingDataError"


@pytest.mark.parametrize(
    "reply",
    [
        b"no http at all\r\n\r\n",
        response(200, b"x" * 70_000),
        response(200, b"", length=1 << 40),
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40_000,
        response(500, b"{}"),
        response(302, b"", "Location: http://elsewhere/"),
        response(200, b"half", length=10),
        b"",
        None,
    ],
)
async def test_without_evidence_there_are_retries_then_failed(
    autojump_clock: Jumping, rig: Rig, tmp_path: Path, reply: bytes | None
) -> None:
    rig.proxy.kept = False
    rig.proxy.answer = lambda request: reply
    host = rig.host(
        max_retries=2,
        retry_interval_s=1,
        timeout_s=5,
        first_use_pcrs=1 << 23,  # brings no log, so that a small answer is demanded
        insecure_trust_on_first_use=True,
    )
    before = trio.current_time()
    assert await host.round() is State.FAILED
    assert len({request.nonce for _, request in rig.proxy.asked}) == 3
    waited = trio.current_time() - before
    assert 0.5 + 1 <= waited <= 1 + 2 + 3 * 5
    assert rig.states() == ["FAILED"]
    assert rig.reports[0]["error"] == "ReplyError"
    assert rig.checks("ReplyError") == 3
    await host.aclose()


async def test_a_nonce_that_was_not_answered_well_is_never_good_again(
    autojump_clock: Jumping, rig: Rig
) -> None:
    history = rig.store.history("h", rig.proxy.tpm.ak.name, None)
    for reply in (response(503), response(200, b"{}"), None):
        rig.proxy.answer = lambda request, reply=reply: reply  # type: ignore[misc]
        await rig.host(max_retries=0).round()
        nonce = rig.proxy.asked[-1][1].nonce
        assert not history.is_open(nonce)


async def test_garbage_for_evidence_is_invalid(autojump_clock: Jumping, rig: Rig) -> None:
    rig.proxy.answer = lambda request: response(200, b"{}")
    assert await rig.host().round() is State.INVALID_QUOTE
    assert rig.reports[0]["error"] == "EvidenceFormatError"


async def test_retry_after_is_honoured_up_to_a_limit(autojump_clock: Jumping, rig: Rig) -> None:
    busy = encode_envelope(503, "busy\x1b[31m", {})
    for asked_s, least, most in ((20, 20, 25), (3000, 60, 75)):
        rig.proxy.answer = lambda request, asked_s=asked_s: response(  # type: ignore[misc]
            503, busy, f"Retry-After: {asked_s}"
        )
        host = rig.host(max_retries=1, retry_interval_s=1, max_retry_s=60)
        before = trio.current_time()
        assert await host.round() is State.FAILED
        assert least <= trio.current_time() - before <= most
    assert rig.reports[-1]["reason"] == "the proxy answered 503: busy?[31m"


async def test_a_retry_that_succeeds_is_no_news(autojump_clock: Jumping, rig: Rig) -> None:
    host = rig.host()
    await host.round()
    replies = iter([response(503), b""])
    rig.proxy.answer = lambda request: next(replies, None) or rig.proxy.good(request)
    assert await host.round() is State.TRUSTED
    assert rig.states() == ["TRUSTED"]
    assert rig.checks("ReplyError") >= 1


async def test_a_kept_connection_that_was_closed_is_no_failure(
    autojump_clock: Jumping, rig: Rig
) -> None:
    rig.proxy.kept = False
    host = rig.host(max_retries=0)
    for _ in range(3):
        assert await host.round() is State.TRUSTED
        await trio.sleep(100)
    assert rig.proxy.connections == 3


async def test_refused_connections_fail(autojump_clock: Jumping, rig: Rig) -> None:
    rig.proxy.refuses = True
    assert await rig.host(max_retries=0).round() is State.FAILED
    assert rig.reports[0]["reason"] == "no connection: connection refused: nothing listens there"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (PinChangedError("has since been pinned to another AK"), State.INVALID_QUOTE),
        (ReplyError("the registrar is away"), State.FAILED),
        (UsageError("not pinned"), State.FAILED),
        (HostError("the pin is damaged"), State.FAILED),
    ],
)
async def test_without_a_trusted_ak_nobody_is_asked(
    autojump_clock: Jumping, rig: Rig, error: Any, state: State
) -> None:
    rig.aks.error = error
    assert await rig.host(max_retries=0).round() is state
    assert not rig.proxy.asked
    assert rig.reports[0]["error"] == type(error).__name__


async def test_a_bug_fails_one_host_and_no_more(
    autojump_clock: Jumping, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("provider_proxy.tenant.watch.questions.parse_evidence", lambda body: 1 // 0)
    assert await rig.host().round() is State.FAILED
    assert rig.reports[0]["error"] == "HostError"


# --- the beat -----------------------------------------------------------------------------------------


async def test_questions_keep_their_beat(autojump_clock: Jumping, rig: Rig) -> None:
    host = rig.host(interval_s=10)
    with trio.move_on_after(95):
        await host.run(trio.current_time() + 3)
    times = [at for at, _ in rig.proxy.asked]
    assert times[0] == pytest.approx(3)
    assert 1 <= times[1] - times[0] <= 10  # shorter by chance, so that hosts part
    assert times[1:] == pytest.approx([times[1] + 10 * n for n in range(len(times) - 1)])
    assert len(times) >= 10


async def test_jitter_moves_each_question_within_its_bounds(
    autojump_clock: Jumping, rig: Rig
) -> None:
    host = rig.host(interval_s=10, jitter=0.2)
    with trio.move_on_after(400):
        await host.run(trio.current_time())
    times = [at for at, _ in rig.proxy.asked]
    gaps = [b - a for a, b in itertools.pairwise(times[1:])]
    assert all(8 <= gap <= 12 for gap in gaps)
    assert max(gaps) - min(gaps) > 1


async def test_missed_beats_are_not_made_up_for(autojump_clock: Jumping, rig: Rig) -> None:
    host = rig.host(interval_s=10, timeout_s=25, max_retries=0)
    slow = iter([False, True])
    rig.proxy.answer = lambda request: None if next(slow, False) else rig.proxy.good(request)
    with trio.move_on_after(75):
        await host.run(trio.current_time())
    times = [at for at, _ in rig.proxy.asked]
    gaps = [b - a for a, b in itertools.pairwise(times[1:])]
    assert gaps == pytest.approx([30, *(10 for _ in gaps[1:])])


async def test_after_an_invalid_quote_it_goes_on_or_stops(
    autojump_clock: Jumping, rig: Rig
) -> None:
    for on_invalid, least, most in (("continue", 10, 11), ("stop", 1, 1)):
        rig.proxy.asked.clear()
        rig.aks.tpm = SoftTpm()
        host = rig.host(interval_s=10, on_invalid=on_invalid)
        with trio.move_on_after(95):
            await host.run(trio.current_time())
        assert least <= len(rig.proxy.asked) <= most


async def test_a_renewed_host_takes_its_new_setting(
    autojump_clock: Jumping, rig: Rig, nursery: trio.Nursery
) -> None:
    host = rig.host(interval_s=1000)
    nursery.start_soon(host.run, trio.current_time())
    await trio.sleep(5)
    host.renew(rig.setting(interval_s=1))
    await trio.sleep(5)
    assert 4 <= len(rig.proxy.asked) <= 7
    host.renew(rig.setting(interval_s=1, need_provider_quote=False))
    await trio.sleep(2)
    asked = len(rig.proxy.asked)
    await trio.sleep(50)
    assert len(rig.proxy.asked) == asked
    assert host.verdict is None
    host.renew(rig.setting(interval_s=1))
    await trio.sleep(5)
    assert len(rig.proxy.asked) > asked


async def test_a_host_that_stopped_goes_on_when_renewed(
    autojump_clock: Jumping, rig: Rig, nursery: trio.Nursery
) -> None:
    good, rig.aks.tpm = rig.aks.tpm, SoftTpm()
    host = rig.host(interval_s=10, on_invalid="stop")
    nursery.start_soon(host.run, trio.current_time())
    await trio.sleep(50)
    rig.aks.tpm = good
    host.renew(rig.setting(interval_s=10, on_invalid="stop"))
    await trio.sleep(50)
    assert host.verdict is State.TRUSTED


# --- continuity ---------------------------------------------------------------------------------------


def clock(clock_ms: int, resets: int = 1) -> ClockState:
    return ClockState(reset_count=resets, restart_count=0, clock_ms=clock_ms)


async def test_a_rollback_is_refused_over_restarts(
    autojump_clock: Jumping, rig: Rig, tmp_path: Path
) -> None:
    rig.proxy.tpm.clock = clock(5000)
    rig.store.open()
    assert await rig.host().round() is State.TRUSTED
    rig.store.write(rig.store.snapshot())
    rig.store.close()
    rig.proxy.tpm.clock = clock(4000)
    again = Rig(tmp_path, proxy=rig.proxy)
    again.store.open()
    assert await again.host().round() is State.INVALID_QUOTE
    assert again.reports[-1]["error"] == "ClockError"
    again.store.close()


async def test_a_reset_is_told_of_and_good(autojump_clock: Jumping, rig: Rig) -> None:
    host = rig.host()
    await host.round()
    rig.proxy.tpm.clock = clock(10, resets=2)
    assert await host.round() is State.TRUSTED
    assert [report["kind"] for report in rig.reports] == ["verdict", "reset"]
    rig.proxy.tpm.clock = clock(10_000, resets=1)
    assert await host.round() is State.INVALID_QUOTE


async def test_the_pin_s_own_record_counts(autojump_clock: Jumping, rig: Rig) -> None:
    rig.aks.newest = clock(9000)
    rig.proxy.tpm.clock = clock(8000)
    assert await rig.host().round() is State.INVALID_QUOTE
    assert rig.reports[-1]["error"] == "ClockError"


async def test_another_ak_begins_afresh(autojump_clock: Jumping, rig: Rig, tmp_path: Path) -> None:
    rig.store.open()
    await rig.host().round()
    rig.store.write(rig.store.snapshot())
    rig.store.close()
    other = Rig(tmp_path, proxy=FakeProxy(SoftTpm(clock=clock(1))))
    other.proxy.serve_in(rig.proxy._nursery)  # type: ignore[arg-type]
    other.store.open()
    assert await other.host().round() is State.TRUSTED
    other.store.close()


async def test_first_use_is_remembered(autojump_clock: Jumping, rig: Rig, tmp_path: Path) -> None:
    rules = {"first_use_pcrs": 0x1, "insecure_trust_on_first_use": True}
    rig.store.open()
    assert await rig.host(**rules).round() is State.TRUSTED
    rig.store.write(rig.store.snapshot())
    rig.store.close()
    again = Rig(tmp_path, proxy=rig.proxy)
    again.store.open()
    host = again.host(**rules)
    assert await host.round() is State.TRUSTED
    rig.proxy.tpm.extend(0, b"x")
    assert await host.round() is State.INVALID_QUOTE
    assert "not its value at first use" in again.reports[-1]["reason"]
    again.store.close()


async def test_what_was_not_good_in_every_way_is_not_first_use(
    autojump_clock: Jumping, rig: Rig, tmp_path: Path
) -> None:
    host = rig.host(first_use_pcrs=0x1, insecure_trust_on_first_use=True, uefi=True)
    assert await host.round() is State.INVALID_QUOTE  # no log
    rig.proxy.tpm.extend(0, b"x")
    assert rig.store.first_use("h", rig.proxy.tpm.ak.name) is None


# --- logs ---------------------------------------------------------------------------------------------


@pytest.fixture
def ima_rig(tmp_path: Path, nursery: trio.Nursery) -> Rig:
    made = Rig(tmp_path, proxy=ima_proxy())
    made.proxy.serve_in(nursery)
    return made


async def test_the_ima_list_is_fetched_as_it_grows(autojump_clock: Jumping, ima_rig: Rig) -> None:
    tpm = ima_rig.proxy.tpm
    assert isinstance(tpm, ImaTpm)
    tpm.lines = 100
    host = ima_rig.host(ima=True)
    assert await host.round() is State.TRUSTED
    tpm.lines = 200
    assert await host.round() is State.TRUSTED
    assert await host.round() is State.TRUSTED
    assert [request.ima_ml_entry for _, request in ima_rig.proxy.asked] == [0, 100, 200]
    assert {request.mask for _, request in ima_rig.proxy.asked} == {1 << 10}


async def test_a_long_list_takes_several_questions(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: Jumping
) -> None:
    rig = Rig(tmp_path, proxy=ima_proxy(part=250))
    rig.proxy.serve_in(nursery)
    host = rig.host(ima=True)
    assert await host.round() is State.TRUSTED
    assert [request.ima_ml_entry for _, request in rig.proxy.asked] == [0, 250, 500]


async def test_a_long_list_comes_at_the_proxy_s_pace(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: Jumping
) -> None:
    """A 429 after a part of it is not a retry; a 429 after a 429 is."""
    rig = Rig(tmp_path, proxy=ima_proxy(part=50))
    rig.proxy.serve_in(nursery)
    part, busy = rig.proxy.answer, response(429, encode_envelope(429, "slow", {}), "Retry-After: 3")
    is_busy = itertools.cycle((False, True))
    rig.proxy.answer = lambda request: busy if next(is_busy) else part(request)
    before = trio.current_time()
    assert await rig.host(ima=True, max_retries=1).round() is State.TRUSTED
    asked = [request.ima_ml_entry for _, request in rig.proxy.asked]
    assert asked[:5] == [0, 50, 50, 100, 100]
    assert trio.current_time() - before >= 3 * (len(asked) // 2)

    rig.proxy.answer = lambda request: part(request) if request.ima_ml_entry == 0 else busy
    rig.proxy.asked.clear()
    rig.store = StateStore(tmp_path / "another")
    assert await rig.host(ima=True, max_retries=2).round() is State.FAILED
    assert [request.ima_ml_entry for _, request in rig.proxy.asked] == [0, 50, 50, 50]


async def test_a_tampered_list_is_invalid(autojump_clock: Jumping, ima_rig: Rig) -> None:
    host = ima_rig.host(ima=True)
    ima_rig.proxy.logs = {
        "ima_measurement_list": text(HOST[1:]),
        "ima_measurement_list_entry": 0,
    }
    ima_rig.proxy.answer = ima_rig.proxy.good
    assert await host.round() is State.INVALID_QUOTE
    assert ima_rig.reports[-1]["error"] == "LogError"


async def test_a_list_that_never_ends_is_invalid(autojump_clock: Jumping, ima_rig: Rig) -> None:
    tpm = ima_rig.proxy.tpm
    assert isinstance(tpm, ImaTpm)

    def endless(request: QuoteRequest) -> bytes:
        ima_rig.proxy.logs = {
            "ima_measurement_list": HOST[5].text + "\n",
            "ima_measurement_list_entry": request.ima_ml_entry,
        }
        return ima_rig.proxy.good(request)

    ima_rig.proxy.answer = endless
    assert await ima_rig.host(ima=True).round() is State.INVALID_QUOTE
    assert len(ima_rig.proxy.asked) <= 130


async def test_the_runtime_policy_is_judged(
    autojump_clock: Jumping, ima_rig: Rig, tmp_path: Path
) -> None:
    path = tmp_path / "runtime.json"
    path.write_text(json.dumps({"digests": {"boot_aggregate": [GOOD]}}))
    assert await ima_rig.host(ima=True, runtime_policy=path).round() is State.INVALID_QUOTE
    assert "entry 1: /usr/lib/systemd/systemd is not in" in ima_rig.reports[-1]["reason"]


class BootTpm(SoftTpm):
    """PCR values as the log of test_eventlog leads to them."""

    def read(self, bank: HashAlg, mask: int) -> PcrValues:
        values = {0: bytes(bank.digest_bytes - 1) + b"\3"}
        for pcr, _, data in EVENTS:
            before = values.get(pcr, bytes(bank.digest_bytes))
            values[pcr] = bank.digest(before + bank.digest(data))
        plain = dict(super().read(bank, mask).values)
        merged = {pcr: values.get(pcr, value) for pcr, value in plain.items()}
        return PcrValues(bank=bank, values=tuple(sorted(merged.items())))


async def test_the_event_log_is_replayed(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: Jumping
) -> None:
    rig = Rig(tmp_path, proxy=FakeProxy(BootTpm()))
    rig.proxy.serve_in(nursery)
    rig.proxy.logs = {"mb_measurement_list": b64(LOG)}
    boot_policy = tmp_path / "boot.json"
    boot_policy.write_text(json.dumps({"4": [sha256(b"loader").hexdigest()]}))
    host = rig.host(uefi=True, boot_policy=boot_policy, uefi_pcrs=MEASURED)
    assert await host.round() is State.TRUSTED
    assert rig.proxy.asked[0][1].mask == MEASURED
    rig.proxy.logs = {"mb_measurement_list": b64(LOG[:-40])}
    assert await host.round() is State.INVALID_QUOTE
    rig.proxy.logs = {}
    assert await host.round() is State.INVALID_QUOTE
    assert rig.reports[-1]["error"] == "LogError"


async def test_the_firmware_s_pcrs_must_have_been_extended(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: Jumping
) -> None:
    rig = Rig(tmp_path, proxy=FakeProxy(BootTpm()))
    rig.proxy.serve_in(nursery)
    rig.proxy.logs = {"mb_measurement_list": b64(LOG)}
    host = rig.host(uefi=True)
    assert await host.round() is State.INVALID_QUOTE
    assert rig.proxy.asked[0][1].mask == 0xFF
    assert "PCR 2 was never extended" in rig.reports[-1]["reason"]


@pytest.mark.parametrize(
    "logs",
    [
        {},
        {"ima_measurement_list": "", "ima_measurement_list_entry": 0},
        {"ima_measurement_list": text(HOST[:1]), "ima_measurement_list_entry": 0},
        {
            "ima_measurement_list": text([line("/x", violation=True)]),
            "ima_measurement_list_entry": 0,
        },
    ],
)
@pytest.mark.parametrize("with_policy", [False, True])
async def test_a_host_that_measures_nothing_is_invalid(
    autojump_clock: Jumping,
    ima_rig: Rig,
    tmp_path: Path,
    logs: dict[str, object],
    with_policy: bool,
) -> None:
    ima_rig.proxy.tpm = SoftTpm()  # zeros
    ima_rig.aks.tpm = ima_rig.proxy.tpm
    ima_rig.proxy.logs = logs
    ima_rig.proxy.answer = ima_rig.proxy.good
    rules: dict[str, object] = {"ima": True}
    if with_policy:
        path = tmp_path / "runtime.json"
        path.write_text(json.dumps({"digests": {"boot_aggregate": [GOOD]}, "excludes": [".*"]}))
        rules |= {"runtime_policy": path}
    assert await ima_rig.host(**rules).round() is State.INVALID_QUOTE
    assert ima_rig.reports[-1]["error"] == "LogError"


@pytest.mark.parametrize("choice", list(Violations))
async def test_violations_are_refused_or_counted(
    autojump_clock: Jumping, ima_rig: Rig, tmp_path: Path, choice: Violations
) -> None:
    path = tmp_path / "runtime.json"
    path.write_text(json.dumps({"digests": {}, "excludes": [".*", ".builtin"]}))
    host = ima_rig.host(ima=True, runtime_policy=path, ima_violations=choice)
    good = choice is Violations.COUNT
    assert await host.round() is (State.TRUSTED if good else State.INVALID_QUOTE)


async def test_each_round_settles_and_only_a_change_reports(
    autojump_clock: Jumping, rig: Rig, tmp_path: Path
) -> None:
    """Also where another process told the last verdict: it is not told twice."""
    policy = policy_file(tmp_path)
    host = rig.host(tpm_policy=policy)
    await host.round()
    await host.round()
    assert [each.report is not None for each in rig.settled] == [True, False]
    assert rig.settled[0].verdict == Verdict(State.TRUSTED)
    assert rig.settled[0].good_for_s > host.rules.interval_s
    taken_over = rig.host(last=rig.settled[-1].verdict, tpm_policy=policy)
    await taken_over.round()
    assert rig.settled[-1].report is None
    changed = rig.host(last=Verdict(State.INVALID_QUOTE, "PolicyError"), tpm_policy=policy)
    await changed.round()
    assert rig.reports[-1]["previous"] == "INVALID_QUOTE"


# --- a replay goes on over restarts and reloads -------------------------------------------------------


def entries(rig: Rig) -> list[int]:
    """What was asked for since the last time."""
    asked = [request.ima_ml_entry for _, request in rig.proxy.asked]
    rig.proxy.asked.clear()
    return asked


def restarted(rig: Rig) -> None:
    """Save, and read what was saved, as another process does."""
    rig.directory.joinpath("state").mkdir(exist_ok=True)
    rig.store.open()
    rig.store.write(rig.store.snapshot())
    rig.store.close()
    rig.store = StateStore(rig.directory / "state")
    rig.store.open()
    rig.store.close()


def runtime_file(directory: Path, **values: Any) -> Path:
    path = directory / "runtime.json"
    path.write_text(json.dumps({"digests": {}, "excludes": [".*"], **values}))
    return path


async def test_a_restart_goes_on_where_the_list_was(
    autojump_clock: Jumping, ima_rig: Rig, tmp_path: Path
) -> None:
    rules: dict[str, Any] = {
        "ima": True,
        "runtime_policy": runtime_file(tmp_path),
        "ima_violations": Violations.COUNT,
    }
    assert await ima_rig.host(**rules).round() is State.TRUSTED
    assert entries(ima_rig) == [0]
    restarted(ima_rig)
    assert await ima_rig.host(**rules).round() is State.TRUSTED
    assert entries(ima_rig) == [len(HOST)]
    # Another policy judges every line again; so does another choice of what becomes of violations.
    rules["runtime_policy"] = runtime_file(tmp_path, release=1)
    assert await ima_rig.host(**rules).round() is State.TRUSTED
    assert entries(ima_rig) == [0]
    restarted(ima_rig)
    del rules["ima_violations"]
    assert await ima_rig.host(**rules).round() is State.INVALID_QUOTE
    assert entries(ima_rig) == [0]


async def test_what_is_not_allowed_is_not_forgotten_over_a_restart(
    autojump_clock: Jumping, ima_rig: Rig, tmp_path: Path
) -> None:
    rules: dict[str, Any] = {"ima": True, "runtime_policy": runtime_file(tmp_path, excludes=[])}
    assert await ima_rig.host(**rules).round() is State.INVALID_QUOTE
    why = ima_rig.reports[-1]["reason"]
    assert "boot_aggregate is not in" in why
    restarted(ima_rig)
    assert await ima_rig.host(**rules).round() is State.INVALID_QUOTE
    assert entries(ima_rig) == [0, len(HOST)]
    assert ima_rig.reports[-1]["reason"] == why


async def test_another_ak_s_list_is_replayed_from_its_beginning(
    autojump_clock: Jumping, ima_rig: Rig
) -> None:
    await ima_rig.host(ima=True).round()
    entries(ima_rig)
    ima_rig.proxy.tpm = ima_rig.aks.tpm = ImaTpm()
    assert await ima_rig.host(ima=True).round() is State.TRUSTED
    assert entries(ima_rig) == [0]


async def test_a_reboot_while_nobody_watched_is_replayed_from_its_beginning(
    autojump_clock: Jumping, ima_rig: Rig
) -> None:
    tpm = ima_rig.proxy.tpm
    assert isinstance(tpm, ImaTpm)
    await ima_rig.host(ima=True).round()
    restarted(ima_rig)
    entries(ima_rig)
    tpm.lines = 100  # shorter: the proxy sends it whole
    assert await ima_rig.host(ima=True).round() is State.TRUSTED


async def test_a_renewed_setting_keeps_the_connection_and_the_replay(
    autojump_clock: Jumping, ima_rig: Rig, nursery: trio.Nursery
) -> None:
    host = ima_rig.host(ima=True, interval_s=10.0)
    nursery.start_soon(host.run, trio.current_time())
    await trio.sleep(1)
    host.renew(ima_rig.setting(ima=True, interval_s=10.0))
    await trio.sleep(25)
    assert ima_rig.proxy.connections == 1
    assert set(entries(ima_rig)[1:]) == {len(HOST)}
    host.renew(ima_rig.setting(ima=True, interval_s=10.0, provider_ip="192.0.2.2"))
    await trio.sleep(15)
    assert set(entries(ima_rig)) == {len(HOST)}


def test_learned_keys_are_saved(tmp_path: Path) -> None:
    key, _ = certificate()
    known = file_key(key.public_key())
    record = HostRecord(
        ak_name=AkName(b"\0\x0b" + bytes(32)),
        newest=None,
        first_use={},
        ima=ImaRecord(
            digest=bytes(32),
            state=ReplayState(
                next_entry=7,
                value=b"\1" * 32,
                keys=frozenset({known}),
                violations=2,
                others=3,
                problem="IMA entry 5: /\u00e9",
                is_open=True,
            ),
        ),
    )
    data = (
        b'{"format":"provider-proxy/watch-state/1","hosts":{' + encode_record("h", record) + b"}}"
    )
    assert parse_state(data, tmp_path) == {"h": record}
    for damaged in (
        data.replace(b'"ima_entry":7', b'"ima_entry":-7'),
        data.replace(b'"ima_keys":"', b'"ima_keys":"x'),
        data.replace(b'"ima_value":"01', b'"ima_value":"zz'),
    ):
        with pytest.raises(HostError, match="damaged"):
            parse_state(damaged, tmp_path)


def test_policy_files_that_have_not_changed_are_not_parsed_again(tmp_path: Path) -> None:
    path = runtime_file(tmp_path)
    rules = LogRules(runtime_policy=path)
    first = PolicyFiles()
    before = first.logs(rules, HashAlg.SHA256)
    second = PolicyFiles(first)
    again = second.logs(rules, HashAlg.SHA256)
    assert again.policy.runtime is before.policy.runtime
    assert again.lines is before.lines
    assert second.logs(rules, HashAlg.SHA384).digest != before.digest
    runtime_file(tmp_path, release=2)
    third = PolicyFiles(second).logs(rules, HashAlg.SHA256)
    assert third.policy.runtime is not before.policy.runtime
    assert third.digest != before.digest
