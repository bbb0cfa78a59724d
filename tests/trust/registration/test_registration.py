"""A registration's rounds and states, with a fake registrar and a TPM without a chip, on trio's clock."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing
from simulated_registrar import (
    FakeKeys,
    FakeRegistrar,
    FakeTpm,
    Stored,
    raw,
    refusal,
    reply,
    wrap_for_fake,
)

from provider_proxy.common.files import FileLock
from provider_proxy.errors import QuoteError
from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.trust.registration import client, registration
from provider_proxy.trust.registration import round as rounds
from provider_proxy.trust.registration.registration import Registration
from provider_proxy.trust.registration.state import GOOD, Report, State

ID = "agent-1"
URL = "http://registrar.test"
CONTACT = ("192.0.2.7", 8890)
CONTACT_TEXT = "192.0.2.7:8890"
CERT = Path("/client.crt")


def table(**changes: object) -> RegistrarTable:
    made = RegistrarTable(
        url=URL, client_cert=CERT, client_key=CERT, contact=CONTACT_TEXT, interval_s=300.0
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def make(
    registrar: FakeRegistrar, tpm: FakeTpm, *, lock: Path | None = None, **changes: object
) -> Registration:
    return Registration(
        "one",
        table(**changes),
        ID,
        tpm,
        open_http=registrar.open_http,
        lock=lock,
        now=trio.current_time,
    )


def names(report: Report) -> list[str]:
    return [step.name + ("" if step.good else "!") for step in report.steps]


@pytest.fixture
def registrar() -> FakeRegistrar:
    return FakeRegistrar()


@pytest.fixture
def tpm() -> FakeTpm:
    return FakeTpm()


FULL = ["version", "read", "register", "tpm", "activate", "confirm"]
LOOK = ["version", "read"]


async def test_a_round_registers_and_the_next_one_only_looks(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    mine = make(registrar, tpm)
    assert mine.status.state is State.PENDING
    report = await mine.once()
    assert (report.state, names(report), report.error) == (State.REGISTERED, FULL, None)
    assert registrar.records[ID].active
    assert (registrar.bodies[0]["ip"], registrar.bodies[0]["port"]) == CONTACT
    report = await mine.once()
    assert (report.state, names(report)) == (State.REGISTERED, LOOK)
    assert tpm.activations == 1
    assert registrar.records[ID].regcount == 1


async def test_a_record_that_is_gone_is_made_again(registrar: FakeRegistrar, tpm: FakeTpm) -> None:
    mine = make(registrar, tpm)
    await mine.once()
    registrar.records.clear()
    assert names(await mine.once()) == FULL
    assert registrar.records[ID].active


async def test_a_record_that_a_stranger_knocked_out_is_activated_again(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    mine = make(registrar, tpm)
    await mine.once()
    registrar.records[ID].active = False  # the same keys, posted by anybody
    assert names(await mine.once()) == FULL
    assert registrar.records[ID].active


async def test_another_contact_is_set_right(registrar: FakeRegistrar, tpm: FakeTpm) -> None:
    mine = make(registrar, tpm)
    await mine.once()
    registrar.records[ID].body["ip"] = "203.0.113.1"
    report = await mine.once()
    assert names(report) == FULL
    assert "another contact" in report.steps[1].text
    assert registrar.records[ID].body["ip"] == CONTACT[0]


async def test_without_a_contact_the_records_own_stays(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    mine = make(registrar, tpm, contact=None)
    await mine.once()
    registrar.records[ID].body |= {"ip": "203.0.113.1", "port": 1}
    assert names(await mine.once()) == LOOK


@pytest.mark.parametrize("key", ["ek_tpm", "aik_tpm"])
@pytest.mark.parametrize("active", [True, False])
async def test_another_tpms_record_is_left_as_it_is(
    registrar: FakeRegistrar, tpm: FakeTpm, key: str, active: bool
) -> None:
    """Before we came, or put in the place of ours while we serve."""
    mine, other = make(registrar, tpm), make(registrar, FakeTpm())
    await mine.once()
    ours = dict(registrar.records[ID].body)
    registrar.records.clear()
    await other.once()
    taken = registrar.records[ID]
    for name in {"ek_tpm", "aik_tpm"} - {key}:
        taken.body[name] = ours[name]
    taken.active = active
    before = (dict(taken.body), taken.key, taken.active, taken.regcount)
    report = await mine.once()
    assert report.state is State.CONFLICT
    assert names(report)[-1] in ("read!", "register!")
    assert report.error is not None
    assert "another TPM's" in report.error
    assert registrar.records[ID] is taken
    assert (taken.body, taken.key, taken.active, taken.regcount) == before
    registrar.records.clear()  # a person has settled it
    assert (await mine.once()).state is State.REGISTERED


async def test_a_certificate_that_a_stranger_added_is_a_conflict(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    """Anybody can certify our EK's public key; the registrar then refuses ours, which has none."""
    mine = make(registrar, tpm)
    await mine.once()
    registrar.records[ID].body["ekcert"] = "AAAA"
    report = await mine.once()
    assert (report.state, names(report)) == (State.CONFLICT, ["version", "read", "register!"])
    assert registrar.records[ID].active


async def test_without_a_certificate_a_round_registers_each_time(tpm: FakeTpm) -> None:
    registrar = FakeRegistrar(has_cert=False)
    mine = make(registrar, tpm, client_cert=None, client_key=None)
    for count in (1, 2):
        report = await mine.once()
        assert report.state is State.UNCONFIRMED
        assert names(report) == FULL[:-1]
        assert registrar.records[ID].regcount == count
        assert registrar.records[ID].active
    assert ("GET", f"/v2.6/agents/{ID}") not in registrar.calls


async def test_a_certificate_that_the_registrar_does_not_take_is_said(tpm: FakeTpm) -> None:
    report = await make(FakeRegistrar(has_cert=False), tpm).once()
    assert report.state is State.UNCONFIRMED
    assert names(report) == ["version", "read!", "register", "tpm", "activate"]
    assert "does not let our client_cert read the record" in report.steps[1].text


async def test_a_refused_ek(registrar: FakeRegistrar, tpm: FakeTpm) -> None:
    async def refuse(request: httpx.Request) -> httpx.Response | None:
        return reply(400, status="invalid data\x1b[2J") if request.method == "POST" else None

    registrar.intercept = refuse
    report = await make(registrar, tpm).once()
    assert (report.state, names(report)) == (State.REFUSED, ["version", "read", "register!"])
    assert report.error is not None
    assert report.error.isprintable()  # whatever the registrar wrote
    assert tpm.activations == 0


async def test_a_challenge_for_another_tpm_is_not_answered(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    """A wrong answer would delete the record."""
    stranger = FakeTpm()
    registrar._wrap = lambda ek, ak, key: registrar_wrap(stranger, key)
    report = await make(registrar, tpm).once()
    assert (report.state, names(report)[-1]) == (State.WRONG_CHALLENGE, "tpm!")
    assert ("PUT", f"/v2.6/agents/{ID}") not in registrar.calls
    assert ID in registrar.records


def registrar_wrap(tpm: FakeTpm, key: bytes) -> bytes:
    return wrap_for_fake(tpm.identity.ek_public, tpm.identity.ak_public, key)


@pytest.mark.parametrize("blob", [b"", b"nonsense", bytes.fromhex("badcc0de00000001") + b"\0" * 4])
async def test_a_challenge_that_is_none(
    registrar: FakeRegistrar, tpm: FakeTpm, blob: bytes
) -> None:
    registrar._wrap = lambda ek, ak, key: blob
    report = await make(registrar, tpm).once()
    assert (report.state, names(report)[-1]) == (State.WRONG_CHALLENGE, "tpm!")
    assert tpm.activations == 0


async def test_a_refused_answer_is_not_taken_for_success(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    """Somebody registers under our id between the two steps: our answer is a wrong one then."""

    async def meddle(request: httpx.Request) -> httpx.Response | None:
        if request.method == "PUT":
            registrar.records[ID].key = b"another challenge"
        return None

    registrar.intercept = meddle
    mine = make(registrar, tpm)
    report = await mine.once()
    assert (report.state, names(report)[-1]) == (State.WRONG_CHALLENGE, "activate!")
    assert ID not in registrar.records
    registrar.intercept = None
    assert (await mine.once()).state is State.REGISTERED


@pytest.mark.parametrize("method", ["PUT", "GET"])
async def test_a_registrar_that_forgets_in_between(
    registrar: FakeRegistrar, tpm: FakeTpm, method: str
) -> None:
    async def forget(request: httpx.Request) -> httpx.Response | None:
        if request.method == method:
            registrar.records.clear()
        return None

    registrar.intercept = forget
    mine = make(registrar, tpm)
    report = await mine.once()
    assert report.state is State.AWAY
    assert names(report)[-1] == {"PUT": "activate!", "GET": "confirm!"}[method]
    registrar.intercept = None
    assert (await mine.once()).state is State.REGISTERED


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (refusal(), State.WRONG_CHALLENGE),
        (refusal(0x084), State.WRONG_CHALLENGE),
        (refusal(0x08E), State.NO_TPM),  # a wrong authValue is our own
        (refusal(0x101), State.NO_TPM),
        (refusal(0x922), State.NO_TPM),
        (QuoteError("the TPM is out of order"), State.NO_TPM),
    ],
)
async def test_a_tpm_in_trouble_is_told_from_a_bad_challenge(
    registrar: FakeRegistrar, tpm: FakeTpm, error: QuoteError, state: State
) -> None:
    tpm.error = error
    assert (await make(registrar, tpm).once()).state is state
    tpm.error = None
    assert (await make(registrar, tpm).once()).state is State.REGISTERED


async def test_a_chip_that_does_not_answer_ends_the_round(
    registrar: FakeRegistrar, tpm: FakeTpm, autojump_clock: trio.testing.MockClock
) -> None:
    tpm.delay_s = 1e6
    report = await make(registrar, tpm).once()
    assert report.state is State.NO_TPM
    assert trio.current_time() >= rounds.TPM_LIMIT_S


async def test_a_round_ends_in_time_where_each_step_is_just_in_time(
    registrar: FakeRegistrar,
    tpm: FakeTpm,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A lock, a chip and a registrar that take all the time that each of them has."""

    async def late(_request: httpx.Request) -> httpx.Response | None:
        await trio.sleep(client.CALL_LIMIT_S - 1)
        return None

    registrar.intercept = late
    tpm.delay_s = rounds.TPM_LIMIT_S - 1
    lock = FileLock(tmp_path / "lock")
    assert lock.take()
    mine = make(registrar, tpm, lock=tmp_path / "lock")
    report = None

    async def go() -> None:
        nonlocal report
        report = await mine.once()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(go)
        await trio.sleep(registration.LOCK_LIMIT_S - 1)
        lock.release()
    assert trio.current_time() == registration.ROUND_LIMIT_S
    assert isinstance(report, Report)
    assert (report.state, names(report)[-1]) == (State.AWAY, "limit!")
    assert mine.status.last_error == "the round did not end within 240 s"
    registrar.intercept, tpm.delay_s = None, 0.0
    assert (
        await mine.once()
    ).state is State.REGISTERED  # the lock is free, what was half done is mended


# --- a registrar that is away, or answers nonsense ----------------------------------------------------


async def no_connection(_request: httpx.Request) -> httpx.Response | None:
    raise httpx.ConnectError("refused")


async def too_slow(_request: httpx.Request) -> httpx.Response | None:
    await trio.sleep_forever()


def always(answer: Callable[[], httpx.Response]) -> Callable[..., Awaitable[httpx.Response]]:
    async def give(_request: httpx.Request) -> httpx.Response:
        return answer()

    return give


BAD_ANSWERS: dict[str, Callable[..., Awaitable[httpx.Response | None]]] = {
    "no connection": no_connection,
    "too slow": too_slow,
    "500": always(lambda: raw(500, b"")),
    "503": always(lambda: reply(503)),
    "redirect": always(lambda: raw(302, b"", {"location": "http://elsewhere.test/"})),
    "punycode": always(lambda: raw(302, b"", {"location": "http://xn--/"})),
    "no JSON": always(lambda: raw(200, b"<html>")),
    "no object": always(lambda: raw(200, b"[]")),
    "no results": always(lambda: raw(200, b"{}")),
    "results": always(lambda: raw(200, b'{"results": []}')),
    "twice": always(lambda: raw(200, b'{"results": {}, "results": {}}')),
    "empty": always(lambda: reply(200)),
    "huge": always(lambda: raw(200, b" " * (client.MAX_BODY_BYTES + 1))),
    "packed": always(lambda: raw(200, b"", {"content-encoding": "gzip"})),
    "versions": always(lambda: reply(200, {"supported_versions": "2.6"})),
    "unknown versions": always(lambda: reply(200, {"supported_versions": ["1.0", "3.0", 2, "x"]})),
    "record": always(lambda: reply(200, {"supported_versions": ["2.6"], "ek_tpm": 7})),
    "blob": always(lambda: reply(200, {"supported_versions": ["2.6"], "blob": "?"})),
}


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_a_registrar_that_makes_no_sense_is_away(
    registrar: FakeRegistrar,
    tpm: FakeTpm,
    autojump_clock: trio.testing.MockClock,
    name: str,
    readable: bool,
) -> None:
    registrar.intercept = BAD_ANSWERS[name]
    mine = make(registrar, tpm) if readable else make(registrar, tpm, client_cert=None)
    report = await mine.once()
    # A record without keys is not ours: a conflict, not trouble.
    empty = name == "blob" and readable
    assert report.state is (State.CONFLICT if empty else State.AWAY)
    assert tpm.activations == 0
    registrar.intercept = None
    assert (await mine.once()).state in GOOD


async def test_a_drop_at_any_call_is_set_right_by_the_next_round(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    """Before the request arrived, and after it did and its answer was lost."""
    for lost in (False, True):
        for number in range(5):
            registrar.records.clear()
            mine, left = make(registrar, tpm), [number]

            async def drop(request: httpx.Request, left: list[int] = left) -> httpx.Response | None:
                left[0] -= 1
                if left[0] == -1:
                    if lost:  # noqa: B023
                        registrar.answer(request)
                    raise httpx.ReadError("connection reset")
                return None

            registrar.intercept = drop
            report = await mine.once()
            assert report.state is State.AWAY, (number, lost, names(report))
            assert (await mine.once()).state is State.REGISTERED
            assert registrar.records[ID].active


async def test_the_newest_version_that_both_know_is_spoken(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    for versions, spoken in ((["1.0", "2.1", "2.4"], "2.4"), (["2.3", "2.10", "3.0"], "2.3")):
        registrar.versions = versions
        registrar.calls.clear()
        assert (await make(registrar, tpm).once()).state is State.REGISTERED
        assert {path for _, path in registrar.calls} == {"/version", f"/v{spoken}/agents/{ID}"}


async def test_a_registrar_before_7_12_is_named(registrar: FakeRegistrar, tpm: FakeTpm) -> None:
    registrar.versions = ["1.0", "2.0", "2.1"]
    report = await make(registrar, tpm).once()
    assert (report.state, names(report)) == (State.AWAY, ["version!"])
    assert report.error is not None
    assert "API 2.1 at most, as Keylime before 7.12 does" in report.error
    assert {path for _, path in registrar.calls} == {"/version"}

    async def unknown(request: httpx.Request) -> httpx.Response | None:
        return reply(400, status="API Version not supported")

    registrar.intercept = unknown  # what its TLS port says
    report = await make(registrar, tpm).once()
    assert report.error is not None
    assert "7.12 or later is needed" in report.error


@pytest.mark.parametrize("newest", ["2.3", "2.4", "2.5", "2.6"])
@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("cert", [True, False])
async def test_nothing_is_registered_unread_where_it_could_be_another_s(
    tpm: FakeTpm, newest: str, allowed: bool, cert: bool
) -> None:
    """Up to 7.13 (API 2.4) a registrar replaces another host's record."""
    registrar = FakeRegistrar(has_cert=False)
    registrar.versions = [v for v in registrar.versions if v <= newest]
    mine = make(registrar, tpm, register_unread=allowed)
    if not cert:
        mine.table = replace(mine.table, client_cert=None, client_key=None)  # type: ignore[type-var]
    report = await mine.once()
    if allowed or newest >= "2.5":
        assert report.state is State.UNCONFIRMED
        return
    assert report.state is State.UNREAD
    assert report.error is not None
    assert "register_unread" in report.error
    assert registrar.records == {}


# --- for ever -----------------------------------------------------------------------------------------


async def run_for(mine: Registration, seconds: float) -> list[tuple[float, State]]:
    """Run it; when each round ended, and how."""
    seen: list[tuple[float, State]] = []
    mine.observe = lambda state: seen.append((trio.current_time(), state))
    begin = trio.current_time()
    with trio.move_on_after(seconds):
        await mine.run()
    return [(at - begin, state) for at, state in seen]


async def test_a_good_record_is_looked_at_at_the_interval(
    registrar: FakeRegistrar, tpm: FakeTpm, autojump_clock: trio.testing.MockClock
) -> None:
    rounds = await run_for(make(registrar, tpm), 3000)
    assert 10 <= len(rounds) <= 13
    pauses = [b - a for (a, _), (b, _) in itertools.pairwise(rounds)]
    assert all(270 <= pause <= 300 for pause in pauses)
    assert len({round(pause, 3) for pause in pauses}) > 1  # spread
    assert tpm.activations == 1


async def test_a_registrar_that_is_away_is_asked_ever_more_rarely(
    registrar: FakeRegistrar, tpm: FakeTpm, autojump_clock: trio.testing.MockClock
) -> None:
    registrar.intercept = no_connection
    mine = make(registrar, tpm)
    rounds = await run_for(mine, 3000)
    assert {state for _, state in rounds} == {State.AWAY}
    pauses = [b - a for (a, _), (b, _) in itertools.pairwise(rounds)]
    for number, pause in enumerate(pauses):
        longest = min(300.0, 2.0 * 2**number)
        assert longest / 2 <= pause <= longest
    assert len(pauses) > 8
    registrar.intercept = None
    rounds = await run_for(mine, 10)
    assert rounds[0][1] is State.REGISTERED


@pytest.mark.parametrize("state", [State.CONFLICT, State.REFUSED])
async def test_what_a_person_must_settle_is_looked_at_without_hurry(
    registrar: FakeRegistrar, tpm: FakeTpm, autojump_clock: trio.testing.MockClock, state: State
) -> None:
    if state is State.CONFLICT:
        await make(registrar, FakeTpm()).once()
    else:

        async def refuse(request: httpx.Request) -> httpx.Response | None:
            return reply(400) if request.method == "POST" else None

        registrar.intercept = refuse
    mine = make(registrar, tpm)
    rounds = await run_for(mine, 1000)
    assert [s for _, s in rounds] == [state] * len(rounds)
    assert 3 <= len(rounds) <= 5
    registrar.intercept = None
    registrar.records.clear()
    assert (await run_for(mine, 10))[0][1] is State.REGISTERED


async def test_changes_are_logged_once(
    registrar: FakeRegistrar,
    tpm: FakeTpm,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    mine = make(registrar, tpm)
    await run_for(mine, 1000)
    registrar.intercept = no_connection
    await run_for(mine, 1000)
    registrar.intercept = None
    await run_for(mine, 1000)
    registrar.records.clear()
    await make(registrar, FakeTpm()).once()
    await run_for(mine, 1000)
    ours = [record for record in caplog.records if record.name == registration.__name__]
    assert [record.levelname for record in ours] == ["INFO", "WARNING", "INFO", "ERROR"]


async def test_a_status_remembers_when_and_why(
    registrar: FakeRegistrar, tpm: FakeTpm, autojump_clock: trio.testing.MockClock
) -> None:
    mine = make(registrar, tpm)
    begin = trio.current_time()
    await mine.once()
    await trio.sleep(7)
    await mine.once()
    status = mine.status
    assert (status.since, status.last_success) == (begin, begin + 7)
    assert status.last_error is None
    registrar.intercept = no_connection
    await trio.sleep(5)
    for _ in range(3):
        await mine.once()
    status = mine.status
    assert (status.state, status.since, status.last_success) == (State.AWAY, begin + 12, begin + 7)
    assert status.last_error == "the registrar gave no answer: refused"
    assert status.last_error_at == begin + 12
    registrar.intercept = None
    await mine.once()
    assert mine.status.state is State.REGISTERED
    assert mine.status.last_error is not None  # of the past


# --- two processes of one host --------------------------------------------------------------------------


def test_what_root_makes_does_not_shut_the_daemon_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`register` by hand, as root: folder and file go to the owner of state_dir; nothing else does."""
    given: list[tuple[str, int]] = []

    def fchown(fd: int, uid: int, _gid: int) -> None:
        given.append((Path(f"/proc/self/fd/{fd}").readlink().name, uid))

    real_stat = os.fstat
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", fchown)
    monkeypatch.setattr(os, "fstat", lambda fd: made_by_root(real_stat(fd)))
    owner = tmp_path.stat().st_uid
    lock = FileLock(tmp_path / "locks" / "one.lock")
    assert lock.take()
    lock.release()
    assert given == [("locks", owner), ("one.lock", owner)]
    given.clear()
    (tmp_path / "locks" / "one.lock").write_text("a file that has a use")
    assert lock.take()
    lock.release()
    (tmp_path / "elsewhere").touch()
    os.link(tmp_path / "elsewhere", tmp_path / "locks" / "two.lock")
    other = FileLock(tmp_path / "locks" / "two.lock")
    assert other.take()
    other.release()
    assert given == []


def made_by_root(status: os.stat_result) -> os.stat_result:
    return os.stat_result((*status[:4], 0, 0, *status[6:]))


async def test_a_round_waits_for_that_of_another_process(
    registrar: FakeRegistrar,
    tpm: FakeTpm,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
) -> None:
    path = tmp_path / "locks" / "one.lock"
    other = FileLock(path)
    assert other.take()
    mine = make(registrar, tpm, lock=path)
    report = await mine.once()
    assert (report.state, names(report)) == (State.AWAY, ["lock!"])
    assert not registrar.calls
    other.release()
    assert (await mine.once()).state is State.REGISTERED
    assert other.take()  # it was let go
    other.release()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_bug_that_one_registrar_meets_ends_nothing(
    registrar: FakeRegistrar, tpm: FakeTpm, caplog: pytest.LogCaptureFixture
) -> None:
    async def meet(_request: httpx.Request) -> httpx.Response:
        raise RuntimeError("nobody thought of this")

    registrar.intercept = meet
    mine = make(registrar, tpm)
    report = await mine.once()
    assert (report.state, report.error) == (State.AWAY, "an unexpected error; see the log")
    assert "nobody thought of this" in caplog.text
    registrar.intercept = None
    assert (await mine.once()).state in GOOD


async def test_a_lock_that_cannot_be_made_is_said_and_done_without(
    registrar: FakeRegistrar, tpm: FakeTpm, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    report = await make(registrar, tpm, lock=tmp_path / "file" / "x.lock").once()
    assert (report.state, report.error) == (State.REGISTERED, None)
    assert names(report) == ["lock!", *FULL]
    assert report.steps[0].text.startswith("cannot lock ")


async def test_cancelled_anywhere_it_lets_go_and_the_next_round_sets_it_right(
    registrar: FakeRegistrar, tpm: FakeTpm, tmp_path: Path
) -> None:
    path = tmp_path / "one.lock"
    for number in range(6):
        registrar.records.clear()
        left = [number]

        async def hang(request: httpx.Request, left: list[int] = left) -> httpx.Response | None:
            left[0] -= 1
            if left[0] < 0:
                registrar.answer(request)
                scope.cancel()
                await trio.lowlevel.checkpoint()
            return None

        registrar.intercept = hang
        with trio.CancelScope() as scope:
            await make(registrar, tpm, lock=path).once()
        registrar.intercept = None
        assert (await make(registrar, tpm, lock=path).once()).state is State.REGISTERED


# --- certificates -------------------------------------------------------------------------------------


async def test_a_certificate_that_the_registrar_wrote_anew_is_no_difference(
    registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some vendors' certificates are no proper DER; the registrar keeps them in its own encoding."""
    tpm = FakeTpm()
    await make(registrar, tpm).once()
    registrar.records[ID].body["ekcert"] = "cmUtZW5jb2RlZA=="
    odd = FakeKeys(
        ak_public=tpm.identity.ak_public, ek_public=tpm.identity.ek_public, ek_cert=b"padded\xff"
    )
    monkeypatch.setattr(tpm, "identity", odd)
    assert names(await make(registrar, tpm).once()) == LOOK


async def test_an_empty_record_is_nobodys_and_not_ours(
    registrar: FakeRegistrar, tpm: FakeTpm
) -> None:
    registrar.records[ID] = Stored(body={}, key=b"", active=True)
    assert (await make(registrar, tpm).once()).state is State.CONFLICT
