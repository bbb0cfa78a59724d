"""Response codes, the circuit and opening again over a real swtpm, with faults between tpm2-tss and the
chip; and the same as tenants see it, through the daemon's sockets."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from helpers import LIMIT_S, Asker, Wire, connect, get, get_bytes, quote_target, trusted_ak, until
from tpm_helpers import (
    CC_PCR_READ,
    CC_QUOTE,
    CC_READ_PUBLIC,
    CC_START_AUTH_SESSION,
    QUALIFYING,
    SERVICE_BACK_S,
    FakeTime,
    Faults,
    Hold,
    Swtpm,
    ask,
    check,
    check_refusal,
    daemon_over,
    errors_counted,
    is_ready,
    move_pcr,
    open_quoter,
    plain_config,
    quote_once,
    raw_tpm,
    sample,
    swtpm_at,
    until_ready,
    until_served,
)

from provider_proxy.errors import HostError, QuoteError, TpmError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.config.tables import Config
from provider_proxy.host.daemon import Started
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import circuit, local_tpm
from provider_proxy.host.quoters.tpm_opener import TpmOpener
from provider_proxy.host.tpm import pace
from provider_proxy.host.tpm.chip import Chip
from provider_proxy.host.tpm.gate import Gate
from provider_proxy.testing.disturb import Action, refusal
from provider_proxy.testing.ima import extend

pytestmark = pytest.mark.real

T = TypeVar("T")

HEADER = 10  # tag, size, code


@pytest.fixture
def faults() -> Faults:
    return Faults()


def resized(answer: bytes) -> bytes:
    """An answer whose header says how long it is."""
    return answer[:2] + len(answer).to_bytes(4, "big") + answer[6:]


# --- what passes is not told ------------------------------------------------------------------------

PASSING = {
    "canceled": Action(code=0x909),
    "object memory": Action(code=0x902),
    "session memory": Action(code=0x903),
    "context gap": Action(code=0x901),
    "out of memory by the resource manager": Action(code=0xB0904),
    "cut": Action(garble=lambda answer: answer[:-3]),
    "cut, and says so": Action(garble=lambda answer: resized(answer[:-3])),
    "more than it says": Action(garble=lambda answer: answer + b"more"),
    "success and nothing else": Action(garble=lambda answer: refusal(0)),
    "a broken connection": Action(drop=True),
}


async def test_a_fault_of_a_pcr_read_is_not_told(tmp_path: Path, faults: Faults) -> None:
    """Once or twice: the quote comes all the same, and is good."""
    async with open_quoter("embedded", tmp_path, faults=faults) as opened:
        for action in PASSING.values():
            for times in (1, 2):
                await move_pcr(opened)
                faults.next(CC_PCR_READ, *[action] * times)
                await quote_once(opened)
                assert faults.pending < times  # one that did no harm needs no second reading
                faults.clear()
        await quote_once(opened, mask=0xFFFFFF)
        assert opened.state.trouble is None


LIKE_A_CODE = {
    "nothing": Action(garble=lambda answer: b""),
    "less than a header": Action(garble=lambda answer: answer[:7]),
    "noise": Action(garble=lambda answer: bytes(range(200))),
}


@pytest.mark.parametrize("command", [CC_PCR_READ, CC_QUOTE, CC_READ_PUBLIC], ids=hex)
async def test_what_may_pass_for_a_fatal_code_is_an_outage_until_the_next_probe(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, command: int
) -> None:
    """tpm2-tss reads on in its own buffer where an answer is too short, and finds some code there."""
    monkeypatch.setattr(circuit, "PROBE_S", 0.01)
    async with open_quoter("embedded", tmp_path, faults=faults) as opened:
        for action in LIKE_A_CODE.values():
            if command == CC_READ_PUBLIC:
                faults.next(CC_QUOTE, Action(drop=True))
            await move_pcr(opened)
            faults.next(command, action)
            with contextlib.suppress(QuoteError):
                await quote_once(opened)
            assert faults.pending == 0
            await until(lambda: opened.state.trouble is None, "the circuit's closing")
            await quote_once(opened)


async def test_each_retry_is_counted_by_its_code(tmp_path: Path, faults: Faults) -> None:
    metrics = Metrics()
    async with open_quoter("embedded", tmp_path, faults=faults, metrics=metrics) as opened:
        faults.next(CC_QUOTE, *[Action(code=code) for code in (0x909, 0x909, 0x902)])
        await quote_once(opened)
        await move_pcr(opened)
        faults.next(CC_PCR_READ, Action(drop=True), Action(code=0xB0903))
        await quote_once(opened)
        assert errors_counted(metrics) == {
            ("CANCELED", "again"): 2,
            ("OBJECT_MEMORY", "clean"): 1,
            ("IO", "clean"): 1,
            ("SESSION_MEMORY", "clean"): 1,
        }
        faults.next(CC_QUOTE, Action(code=0x921))
        with pytest.raises(QuoteError):
            await quote_once(opened)
        assert errors_counted(metrics)["LOCKOUT", "fatal"] == 1


async def test_a_busy_chip_is_tried_again_after_tpm2_tss_gave_up(
    tmp_path: Path, faults: Faults
) -> None:
    """tpm2-tss sends a command that got RETRY again by itself, some times and at once."""
    metrics = Metrics()
    async with open_quoter("embedded", tmp_path, faults=faults, metrics=metrics) as opened:
        faults.next(CC_QUOTE, *[Action(code=0x922)] * 20)
        await quote_once(opened)
        assert faults.pending == 0
        counted = errors_counted(metrics)
        assert set(counted) == {("RETRY", "again")}
        assert 1 < counted["RETRY", "again"] < 20


@pytest.mark.parametrize("code", [0x902, 0x909, 0x904])
async def test_a_busy_chip_while_it_is_opened_anew_is_no_outage(
    tmp_path: Path, faults: Faults, code: int
) -> None:
    """The same trouble that stopped the quote stops ReadPublic too, for a moment."""
    async with open_quoter("embedded", tmp_path, faults=faults) as opened:
        faults.next(CC_QUOTE, Action(code=0x902))
        faults.next(CC_READ_PUBLIC, Action(code=code), Action(code=code))
        await quote_once(opened)
        assert faults.pending == 0
        assert opened.state.trouble is None


# --- whatever a chip answers ------------------------------------------------------------------------


class Served:
    """An open chip, used synchronously."""

    def __init__(self, state_dir: Path) -> None:
        self.faults = Faults()
        self.opener = TpmOpener(
            Tpm(tcti="embedded"), state_dir, host_uuid=None, open_context=self.faults.open_context
        )
        self.chip: Chip | None = self.opener.open()

    def close(self) -> None:
        if self.chip is not None:
            self.chip.close()
            self.chip = None

    def reopen(self) -> None:
        self.close()
        self.chip = self.opener.reopen()

    def move(self) -> None:
        """Extend the PCR that is quoted, so that the next quote reads it."""
        assert self.chip is not None
        extend(self.chip.context, 0)

    def quote(self) -> None:
        """A good quote, or a `TpmError`."""
        assert self.chip is not None
        check(self.opener.quote(self.chip, QUALIFYING, HashAlg.SHA256, 1), self.opener.ak)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.faults.clear()
    made.close()
    made.opener.stop()


def pcr_answer(change: Callable[[bytearray], object]) -> Action:
    """Change a PCR read's answer: counter at 10, selection from 14, digests behind it."""

    def garble(answer: bytes) -> bytes:
        data = bytearray(answer)
        change(data)
        return resized(bytes(data))

    return Action(garble=garble)


def set_bytes(at: int, data: bytes) -> Callable[[bytearray], None]:
    def change(answer: bytearray) -> None:
        answer[at : at + len(data)] = data

    return change


def shorten(answer: bytearray) -> None:
    """PCR 0's value of 32 bytes becomes one of 31."""
    assert answer[-34:-32] == b"\x00\x20"
    answer[-34:-32] = b"\x00\x1f"
    del answer[-1]


def lengthen(answer: bytearray) -> None:
    answer[-34:-32] = b"\x00\x21"
    answer += b"!"


def double(answer: bytearray) -> None:
    """Two values for one PCR."""
    count = len(answer) - 38
    answer[count : count + 4] = b"\x00\x00\x00\x02"
    answer += answer[-34:]


LIES = {
    "a value that is too short": shorten,
    "a value that is too long": lengthen,
    "an empty value": lambda data: data.__setitem__(slice(-34, None), b"\x00\x00"),
    "two values for one PCR": double,
    "another PCR": set_bytes(21, b"\x02\x00\x00"),
    "two PCRs": set_bytes(21, b"\x03\x00\x00"),
    "no PCR": set_bytes(21, b"\x00\x00\x00"),
    "another bank": set_bytes(18, b"\x00\x04"),
    "an unknown bank": set_bytes(18, b"\x77\x77"),
    "no selection": lambda data: data.__setitem__(slice(14, 24), bytes(4)),
    "another value": set_bytes(-1, b"\xff"),
    "another counter": set_bytes(10, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_pcr_read_that_makes_no_sense(served: Served, lie: str) -> None:
    """Is an error of the chip's or is put right by reading again; it is nothing else."""
    served.reopen()
    for times in (1, 3):
        served.move()
        served.faults.next(CC_PCR_READ, *[pcr_answer(LIES[lie])] * times)
        try:
            served.quote()
        except TpmError:
            served.faults.clear()
        assert served.faults.pending < times
        served.faults.clear()
        served.quote()


def garbler(dice: random.Random) -> Callable[[bytes], bytes]:
    """Changes an answer at random: cuts, bits, noise, insertions with and without a true length."""

    def garble(answer: bytes) -> bytes:
        data = bytearray(answer)
        at = dice.randrange(HEADER, len(data)) if len(data) > HEADER else 0
        match dice.randrange(6):
            case 0:
                del data[dice.randrange(len(data) + 1) :]
            case 1:
                for _ in range(dice.randrange(1, 4)):
                    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            case 2:
                data = bytearray(dice.randbytes(dice.randrange(300)))
            case 3:
                data[at:] = dice.randbytes(len(data) - at)
            case 4:
                data[at : at + dice.randrange(5)] = dice.randbytes(dice.randrange(5))
                return resized(bytes(data))
            case _:
                data += dice.randbytes(dice.randrange(1, 9))
                return resized(bytes(data))
        return bytes(data)

    return garble


@pytest.mark.parametrize("command", [CC_PCR_READ, CC_QUOTE, CC_READ_PUBLIC], ids=hex)
def test_any_garbled_answer_is_an_error_of_the_hosts(served: Served, command: int) -> None:
    """Nothing else comes out of it, and no quote that does not verify."""
    action = Action(garble=garbler(random.Random(command)))
    refused = 0
    served.faults.clear()
    served.reopen()
    for _ in range(120):
        served.move()
        served.faults.next(command, action)
        try:
            if command == CC_READ_PUBLIC:
                served.reopen()
            served.quote()
        except HostError:
            refused += 1
            served.faults.clear()
            served.reopen()
        served.faults.clear()
    assert refused > 40
    served.quote()


async def test_an_old_answer_is_not_taken_for_a_new_one(tmp_path: Path, faults: Faults) -> None:
    """Well signed by the very AK, over the same PCRs, and not over what was asked."""
    answers: list[bytes] = []

    def remember(answer: bytes) -> bytes:
        answers.append(answer)
        return answer

    async with open_quoter("embedded", tmp_path, faults=faults) as opened:
        faults.next(CC_QUOTE, Action(garble=remember))
        with trio.fail_after(LIMIT_S):
            await opened.quote(b"another nonce of 32 characters..", HashAlg.SHA256, 1)
        faults.next(CC_QUOTE, *[Action(garble=lambda answer: answers[0])] * 2)
        await quote_once(opened)
        assert faults.pending == 0


# --- the gate: shares and leaks ---------------------------------------------------------------------


class RecordingGate(Gate):
    """Notes each turn at the chip."""

    turns: list[tuple[float, float]] = []  # noqa: RUF012  # each test sets its own

    async def run(
        self, command: Callable[[], T], *, learn: bool = False, gives_way: bool = False
    ) -> T:
        def recorded() -> T:
            begin = time.monotonic()
            try:
                return command()
            finally:
                self.turns.append((begin, time.monotonic()))

        return await super().run(recorded, learn=learn, gives_way=gives_way)


LEAST_TURNS = 16
DUTY_LIMIT_S = 120.0  # a turn of half a second, on a machine that is busy, rests for one and a half


@pytest.mark.parametrize("duty", [0.25, 0.5])
async def test_all_our_commands_together_keep_the_duty(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, duty: float
) -> None:
    """Quotes, retries, opening again, activations, probes and what nobody waits for any more: over any
    stretch of time at most that share, and one turn more. Every command is within a turn."""
    turns: list[tuple[float, float]] = []
    monkeypatch.setattr(RecordingGate, "turns", turns)
    monkeypatch.setattr(local_tpm, "Gate", RecordingGate)
    monkeypatch.setattr(circuit, "PROBE_S", 0.02)
    dice = random.Random(7)
    slow = Action(delay_s=0.01)
    async with open_quoter("embedded", tmp_path, faults=faults, max_duty=duty) as opened:

        async def use(number: int) -> None:
            while len(turns) < LEAST_TURNS:  # not so many times: a slow machine gets fewer turns
                with trio.move_on_after(dice.uniform(0.02, 0.3)):
                    try:
                        if number:
                            await opened.quote(QUALIFYING, HashAlg.SHA256, 1)
                        else:
                            await opened.activate_credential(b"\0\0", b"\0\0")
                    except QuoteError:
                        await trio.sleep(0.02)

        faults.next(CC_QUOTE, slow, slow, Action(drop=True), slow, Action(code=0x101), slow)
        faults.next(CC_PCR_READ, slow, Action(code=0x909), slow, slow)
        faults.next(CC_START_AUTH_SESSION, slow, Action(code=0x903), slow)
        with trio.fail_after(DUTY_LIMIT_S):
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(use, number)
    for begin, end in itertools.combinations_with_replacement(range(len(turns)), 2):
        stretch = turns[begin : end + 1]
        busy = sum(b - a for a, b in stretch)
        longest = max(b - a for a, b in stretch)
        assert busy <= duty * (stretch[-1][1] - stretch[0][0]) + longest
    outside = [t for t in faults.times if not any(a <= t <= b for a, b in turns)]
    assert outside == []


SPAN_S = 10.0  # over which the duty holds


def busy_within(turns: list[tuple[float, float]], begin: float, end: float) -> tuple[float, float]:
    """How long the chip worked for us in a stretch of time, and the longest command that it met."""
    parts = [(min(b, end) - max(a, begin), b - a) for a, b in turns if a < end and b > begin]
    return sum(part for part, _ in parts), max(whole for _, whole in parts)


@pytest.mark.parametrize("duty", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("slowest_s", [0.3, 4.0, 8.0, 30.0])
async def test_the_duty_holds_over_every_ten_seconds_whatever_commands_take(
    monkeypatch: pytest.MonkeyPatch, duty: float, slowest_s: float
) -> None:
    """A chip of 20 ms, of which some commands, or all of a while, take much longer."""
    clock = FakeTime()
    monkeypatch.setattr("provider_proxy.host.tpm.gate.time", clock)
    gate = Gate(duty)
    dice = random.Random(f"{duty}/{slowest_s}")
    turns: list[tuple[float, float]] = []

    def command(seconds: float) -> None:
        begin = clock.monotonic()
        clock.ahead_s += seconds
        turns.append((begin, clock.monotonic()))

    for number in range(150):
        slow = 50 <= number < 80 or dice.random() < 0.1
        seconds = dice.uniform(0.3, 1.0) * slowest_s if slow else dice.uniform(0.015, 0.025)
        await gate.run(functools.partial(command, seconds), learn=dice.random() < 0.8)
        clock.ahead_s += max(0.0, gate._rest_until - clock.monotonic())  # instead of sleeping
    edges = [begin for begin, _ in turns] + [end - SPAN_S for _, end in turns]
    for edge in edges:
        busy, longest = busy_within(turns, edge, edge + SPAN_S)
        assert busy <= duty * SPAN_S + longest + 0.01


async def test_opening_anew_leaks_nothing(tmp_path: Path, faults: Faults) -> None:
    """Ten broken connections later no more files are open than before."""
    with raw_tpm(tmp_path / "chip", faults) as broker:
        async with open_quoter(broker.tcti, tmp_path / "s") as opened:
            await quote_once(opened)
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(10):
                faults.next(CC_QUOTE, Action(drop=True))
                await quote_once(opened)
            assert faults.pending == 0
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the files' closing")


async def test_the_time_of_a_quote_follows_the_chip(tmp_path: Path, faults: Faults) -> None:
    """Learnt from the first one on, and again when the chip gets faster."""
    faults.always(CC_QUOTE, Action(delay_s=0.08))
    async with open_quoter("embedded", tmp_path, faults=faults, max_duty=0.5) as opened:
        assert 0.08 <= opened.state.expected_s < 0.5
        assert opened.state.pause_s == pytest.approx(opened.state.expected_s)
        slow = opened.state.expected_s
        faults.clear()
        for _ in range(8):
            await quote_once(opened)
        assert opened.state.expected_s < slow / 2


async def test_one_hang_is_not_learnt_as_the_chips_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates go on as before; a chip that has become slow is learnt all the same."""
    clock = FakeTime()
    monkeypatch.setattr("provider_proxy.host.tpm.gate.time", clock)
    gate = Gate(1.0)

    def command(seconds: float) -> None:
        clock.ahead_s += seconds

    for _ in range(5):
        await gate.run(functools.partial(command, 0.1), learn=True)
    await gate.run(functools.partial(command, 60.0), learn=True)
    assert 0.1 <= gate.pace.expected_s < 0.2
    for _ in range(40):
        await gate.run(functools.partial(command, 2.0), learn=True)
    assert gate.pace.expected_s == pytest.approx(2.0, rel=0.2)


async def test_a_hang_does_not_keep_the_gate_shut_for_as_long_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The duty holds over 10 s; a command that took a minute does not cause a pause of another, and
    service has to be back 5 s after a fault has ended."""
    clock = FakeTime()
    monkeypatch.setattr("provider_proxy.host.tpm.gate.time", clock)
    gate = Gate(0.5)

    def hang() -> None:
        clock.ahead_s += 60

    await gate.run(hang)
    clock.ahead_s += SERVICE_BACK_S
    with trio.move_on_after(0.5) as scope:
        await gate.ready()
    assert not scope.cancelled_caught, "the gate rests longer than 5 s"


# --- as tenants see it ------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Site:
    """A daemon, one tenant and its connections."""

    started: Started
    asker: Asker
    wires: list[Wire]
    metrics: Metrics

    @property
    def wire(self) -> Wire:
        return self.wires[0]

    async def send(self, wire: Wire, timeout_ms: int) -> None:
        """Ask, and do not wait."""
        challenge = self.asker.challenge(timeout_ms=timeout_ms)
        await wire.send(get_bytes(quote_target(challenge)))

    async def check_alive(self) -> None:
        """The servers themselves are fine."""
        assert (await get(self.started.addresses[0], "/version")).status == 200
        assert (await get(self.started.admin_addresses[0], "/healthz")).status == 200


@asynccontextmanager
async def site(config: Config, faults: Faults | None = None, count: int = 1) -> AsyncIterator[Site]:
    metrics: list[Metrics] = []
    async with daemon_over(config, faults, metrics=metrics) as started, AsyncExitStack() as stack:
        address = started.addresses[0]
        asker = Asker(await trusted_ak(address))
        wires = [await stack.enter_async_context(connect(address)) for _ in range(count)]
        made = Site(started=started, asker=asker, wires=wires, metrics=metrics[0])
        assert (await ask(made.wire, asker)).status == 200
        yield made
        assert sample(made.metrics, "selfcheck_failures_total") == 0


@pytest.mark.parametrize("code", [0x101, 0x9A2], ids=hex)
async def test_a_fatal_state_is_told_and_ends_without_a_restart(
    tmp_path: Path, faults: Faults, code: int
) -> None:
    async with site(plain_config(tmp_path), faults, count=3) as at:
        assert await is_ready(at.started)
        faults.always(CC_QUOTE, Action(code=code))
        for _ in range(2):  # by the failed batch, then by the open circuit
            for wire in at.wires:
                check_refusal(await ask(wire, at.asker), 503, retry_after=True)
        assert not await is_ready(at.started)
        assert sample(at.metrics, "tpm_circuit_open") == 1
        await at.check_alive()
        faults.clear()
        assert await until_served(at.wire, at.asker) < SERVICE_BACK_S
        assert await is_ready(at.started)
        assert sample(at.metrics, "tpm_circuit_open") == 0


async def test_a_garbled_answer_does_not_end_the_service(tmp_path: Path, faults: Faults) -> None:
    async with site(plain_config(tmp_path), faults) as at:
        for lie in LIES.values():
            faults.next(CC_QUOTE, Action(drop=True))  # opened again, the chip's PCRs are read
            faults.next(CC_PCR_READ, pcr_answer(lie))
            assert await until_served(at.wire, at.asker) < SERVICE_BACK_S
            assert faults.pending == 0
        assert at.wire.stream is not None


async def test_a_killed_tpm_is_told_and_found_again(tmp_path: Path) -> None:
    """SIGKILL; somebody else starts it again, at the same address and with the same keys."""
    with swtpm_at(tmp_path / "chip") as tpm:
        async with site(plain_config(tmp_path / "s", tpm.tcti), count=3) as at:
            name = at.asker.host.ak.name
            await trio.to_thread.run_sync(tpm.kill)
            for wire in at.wires:
                check_refusal(await ask(wire, at.asker), 503, retry_after=True)
            assert not await is_ready(at.started)
            await at.check_alive()
            await trio.to_thread.run_sync(tpm.start)
            assert await until_served(at.wire, at.asker) < SERVICE_BACK_S
            assert await is_ready(at.started)
            assert (await trusted_ak(at.started.addresses[0])).name == name


async def test_another_tpm_in_its_place_is_not_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has an AK of its own at that very handle. The tenants know the first one's name."""
    monkeypatch.setattr(circuit, "PROBE_S", 0.2)
    with swtpm_at(tmp_path / "other") as tpm:
        async with open_quoter(tpm.tcti, tmp_path / "t") as opened:
            other = opened.ak.name
        await trio.to_thread.run_sync(tpm.stop)
        tpm.state = make(tmp_path / "chip")
        tpm.start()
        async with site(plain_config(tmp_path / "s", tpm.tcti)) as at:
            await change_tpm(tpm, tmp_path / "other")

            def said(times: int) -> bool:
                loud = [r.message for r in caplog.records if r.levelname == "CRITICAL"]
                return (
                    sum(at.asker.host.ak.name.hex() in m and other.hex() in m for m in loud)
                    >= times
                )

            for times in (1, 2):  # by the quote or a probe, and by the next probe
                check_refusal(await ask(at.wire, at.asker), 503, retry_after=True)
                await until(lambda n=times: said(n), "the loud message")  # type: ignore[misc]
                assert not await is_ready(at.started)
            await change_tpm(tpm, tmp_path / "chip")
            assert await until_served(at.wire, at.asker) < SERVICE_BACK_S


def make(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


async def change_tpm(tpm: Swtpm, state: Path) -> None:
    def change() -> None:
        tpm.stop()
        tpm.state = state
        tpm.start()

    await trio.to_thread.run_sync(change)


async def test_a_hang_is_told_until_it_ends(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """504 at each one's own deadline; then not ready, and 503 at once; the gate stays shut; then good
    again, in the same process."""
    monkeypatch.setattr(pace, "HANG_LEAST_S", 0.5)
    hold = Hold()
    async with site(plain_config(tmp_path), faults, count=3) as at:
        try:
            faults.next(CC_QUOTE, Action(hold=hold))
            begin = trio.current_time()
            for wire, timeout_ms in zip(at.wires, (300, 100, 200), strict=True):
                await at.send(wire, timeout_ms)
            for wire, timeout_ms in sorted(
                zip(at.wires, (300, 100, 200), strict=True), key=by_time
            ):
                check_refusal(await wire.reply(), 504)
                assert trio.current_time() - begin >= timeout_ms / 1000
            await until_ready(at.started, ready=False)
            await at.check_alive()
            seen = len(faults.seen)
            for wire in at.wires:
                begin = trio.current_time()
                check_refusal(await ask(wire, at.asker), 503, retry_after=True)
                assert trio.current_time() - begin < 5  # at once, not at the deadline of 30 s
            assert len(faults.seen) == seen, "a command went past one that hangs"
        finally:
            hold.set()
        assert await until_served(at.wire, at.asker) < SERVICE_BACK_S
        assert await is_ready(at.started)
        for wire in at.wires:  # nothing came late to those who had been answered
            assert (await ask(wire, at.asker)).status == 200


def by_time(pair: tuple[Wire, int]) -> int:
    return pair[1]


async def test_who_waits_behind_a_hang_is_answered_at_its_deadline(
    tmp_path: Path, faults: Faults
) -> None:
    """They are in no batch yet: the chip is not ready for one."""
    hold = Hold()
    async with site(plain_config(tmp_path), faults, count=4) as at:
        try:
            faults.next(CC_QUOTE, Action(hold=hold))
            await at.send(at.wires[0], 50)
            check_refusal(await at.wires[0].reply(), 504)
            for wire in at.wires[1:]:
                await at.send(wire, 150)
            for wire in at.wires[1:]:
                check_refusal(await wire.reply(), 504)
            assert sample(at.metrics, "queue") == 0
        finally:
            hold.set()
        assert await until_served(at.wire, at.asker) < SERVICE_BACK_S


async def test_tenants_in_a_hurry_are_served_again_after_a_hang(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a hang taught must not keep everybody out for ever: who is not admitted teaches nothing."""
    clock = FakeTime()
    monkeypatch.setattr("provider_proxy.host.tpm.gate.time", clock)
    monkeypatch.setattr("provider_proxy.host.quoters.local_tpm.time", clock)
    hold = Hold()
    async with site(plain_config(tmp_path), faults) as at:
        try:
            faults.next(CC_QUOTE, Action(hold=hold))
            check_refusal(await ask(at.wire, at.asker, timeout_ms=100), 504)
            clock.ahead_s += 60
        finally:
            hold.set()
        with trio.move_on_after(SERVICE_BACK_S) as scope:
            await until_served(at.wire, at.asker, timeout_ms=5000)
        assert not scope.cancelled_caught, "refused for more than 5 s after the hang"


async def test_an_estimate_beyond_the_timeout_is_refused_with_a_time(
    tmp_path: Path, faults: Faults
) -> None:
    """By the time that was learnt on this chip."""
    faults.always(CC_QUOTE, Action(delay_s=0.2))
    async with site(plain_config(tmp_path), faults) as at:
        reply = await ask(at.wire, at.asker, timeout_ms=150)
        check_refusal(reply, 503, retry_after=True)
        assert "longer than your timeout" in str(reply.envelope()["status"])
        assert (await ask(at.wire, at.asker, timeout_ms=3000)).status == 200
