"""The watchdog: what it tells systemd and when it ends the process. By the mock clock, and with the real
daemon as a process of its own."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import (
    LIMIT_S,
    NO_LOGS,
    Asker,
    FakeQuoter,
    Serving,
    connect,
    get,
    get_bytes,
    quote_target,
    serving,
    trusted_ak,
)
from tpm_helpers import (
    CC_QUOTE,
    SERVICE_BACK_S,
    Faults,
    Hold,
    ask,
    check_refusal,
    raw_tpm,
    until_served,
)

from provider_proxy.host.status import watchdog
from provider_proxy.host.tpm.gate import Gate
from provider_proxy.host.tpm.state import ChipState, ReadState
from provider_proxy.testing.broker import Broker
from provider_proxy.testing.disturb import Action

LIMIT = 7.0  # tpm.hang_limit_s


class Ended(Exception):
    """The process would have ended."""


class Pings:
    """What systemd heard, and when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times: list[float] = []
        monkeypatch.setattr("provider_proxy.common.systemd.notify", self._notify)

    def _notify(self, state: str, *, limit_s: float) -> None:
        assert (state, limit_s) == ("WATCHDOG=1", 0)
        self.times.append(trio.current_time())

    def longest_silence(self, begin: float, end: float) -> float:
        times = [begin, *[t for t in self.times if begin <= t <= end], end]
        return max(b - a for a, b in itertools.pairwise(times))


@pytest.fixture
def pings(monkeypatch: pytest.MonkeyPatch) -> Pings:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    return Pings(monkeypatch)


class Chip:
    """A chip whose commands take what a test says of trio's clock."""

    def __init__(self) -> None:
        self._since = math.inf

    def state(self) -> ChipState:
        in_flight_s = max(0.0, trio.current_time() - self._since)
        return ChipState(expected_s=0.1, pause_s=0.1, in_flight_s=in_flight_s)

    async def command(self, seconds: float) -> None:
        self._since = trio.current_time()
        await trio.sleep(seconds)
        self._since = math.inf


@asynccontextmanager
async def watched(chip: ReadState) -> AsyncIterator[Callable[[], float | None]]:
    """Gives a function that says when the process would have ended; None where it goes on."""
    ended: list[float] = []

    def end() -> None:
        ended.append(trio.current_time())
        raise Ended

    async def run() -> None:
        try:
            await watchdog.run(chip, LIMIT, end_process=end)
        except Ended:
            return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield lambda: ended[0] if ended else None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("wanted_s", [0.2, 1.0, 30.0, 600.0])
async def test_an_idle_daemon_is_heard_twice_as_often_as_asked(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    pings: Pings,
    wanted_s: float,
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(int(wanted_s * 1e6)))
    async with watched(Chip().state) as ended:
        begin = trio.current_time()
        await trio.sleep(1000)
        assert pings.longest_silence(begin, trio.current_time()) <= wanted_s / 2 + 1e-6
        assert ended() is None


async def test_nobody_is_told_who_does_not_ask(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, pings: Pings
) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    async with watched(Chip().state) as ended:
        await trio.sleep(1000)
        assert ended() is None
    assert pings.times == []


async def test_a_chip_that_answers_errors_is_no_reason(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, pings: Pings
) -> None:
    """Nothing is in flight; that nothing succeeds is the circuit's business."""
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    quoter = FakeQuoter()
    quoter.trouble = "the TPM is out of order"
    async with watched(lambda: quoter.state) as ended:
        begin = trio.current_time()
        await trio.sleep(10_000)
        assert ended() is None
        assert pings.longest_silence(begin, trio.current_time()) <= 1 + 1e-6


async def test_many_long_commands_are_no_hang(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, pings: Pings
) -> None:
    """Each returns before its limit; the chip is never idle."""
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    chip = Chip()
    async with watched(chip.state) as ended:
        begin = trio.current_time()
        for _ in range(50):
            await chip.command(LIMIT - 0.001)
        assert ended() is None
        assert pings.longest_silence(begin, trio.current_time()) <= 1 + 1e-6


@pytest.mark.parametrize("usec", ["", "300000000", "200000"])
async def test_a_command_in_flight_beyond_the_limit_ends_the_process(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    pings: Pings,
    caplog: pytest.LogCaptureFixture,
    usec: str,
) -> None:
    """Soon after, whatever systemd wants to hear and however seldom."""
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    chip = Chip()
    async with watched(chip.state) as ended:
        await trio.sleep(3.3)
        begin = trio.current_time()
        with trio.move_on_after(1000):
            await chip.command(math.inf)
        at = ended()
        assert at is not None
        assert LIMIT < at - begin <= LIMIT + watchdog.CHECK_S + 1e-6
    assert [r.levelname for r in caplog.records] == ["CRITICAL"]
    assert "has not returned" in caplog.text


async def test_a_command_that_returns_just_in_time_does_not(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    chip = Chip()
    async with watched(chip.state) as ended:
        await chip.command(LIMIT)
        await trio.sleep(100)
        assert ended() is None


async def test_the_gate_says_what_is_in_flight_though_nobody_waits_for_it() -> None:
    """The one who asked was cancelled long ago; the thread still hangs."""
    gate = Gate(1.0)
    hold = Hold()
    try:
        with trio.move_on_after(0.02):
            await gate.run(hold.wait)
        since = gate.in_flight_since
        assert since is not None
        await trio.sleep(0.02)
        assert gate.in_flight_since == since
        assert time.monotonic() - since >= 0.03
    finally:
        hold.set()
    with trio.fail_after(LIMIT_S):
        await gate.ready()
    assert gate.in_flight_since is None


# --- the daemon, a process of its own ---------------------------------------------------------------


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def chip(tmp_path: Path, faults: Faults) -> Iterator[Broker]:
    with raw_tpm(tmp_path / "chip", faults) as broker:
        yield broker


def toml(folder: Path, tcti: str) -> str:
    return (
        f'state_dir = "{folder / "s"}"\n'
        '[listen]\naddress = "127.0.0.1:0"\ninsecure_plaintext = true\n'
        '[admin]\naddress = "127.0.0.1:0"\n'
        f'[tpm]\ntcti = "{tcti}"\nmax_duty = 1.0\nhang_limit_s = 1\n'
        f"[batch]\nwindow_ms = 1\n{NO_LOGS}"
    )


async def heard(serve: Serving, count: int) -> None:
    """systemd hears so many pings, none of them late."""
    for _ in range(count):
        with trio.fail_after(SYSTEMD_WAITS_S):
            await serve.notify.ping()


SYSTEMD_WAITS_S = 3.0
WATCHDOG = {"WATCHDOG_USEC": "200000"}  # pings every 100 ms; a loaded machine may be late


@pytest.mark.real
async def test_idle_or_with_a_dead_chip_the_daemon_keeps_feeding_systemd(
    tmp_path: Path, faults: Faults, chip: Broker
) -> None:
    """For longer than `hang_limit_s`; and no restart is needed when the chip is well again."""
    async with serving(tmp_path, toml(tmp_path, chip.tcti), env=WATCHDOG) as serve:
        await heard(serve, 3)
        asker = Asker(await trusted_ak(serve.address))
        async with connect(serve.address) as wire:
            faults.every(Action(code=0x101))
            check_refusal(await ask(wire, asker), 503, retry_after=True)
            await heard(serve, 15)
            check_refusal(await ask(wire, asker), 503, retry_after=True)
            assert (await get(serve.admin, "/readyz")).status == 503
            faults.clear()
            assert await until_served(wire, asker) < SERVICE_BACK_S
        await heard(serve, 3)
        serve.process.send_signal(signal.SIGTERM)
        assert await serve.wait() == 0


@pytest.mark.real
async def test_a_command_that_never_returns_ends_the_daemon_with_3(
    tmp_path: Path, faults: Faults, chip: Broker
) -> None:
    """Its waiter has had 504 by then; a connection ends, nobody hangs."""
    hold = Hold()
    async with serving(tmp_path, toml(tmp_path, chip.tcti)) as serve:
        asker = Asker(await trusted_ak(serve.address))
        async with connect(serve.address) as wire, connect(serve.address) as patient:
            assert (await ask(wire, asker)).status == 200
            try:
                faults.always(CC_QUOTE, Action(hold=hold))
                await patient.send(get_bytes(quote_target(asker.challenge(timeout_ms=30_000))))
                check_refusal(await ask(wire, asker, timeout_ms=100), 504)
                assert await serve.wait() == 3
                assert await patient.is_closed()
            finally:
                hold.set()
        assert "has not returned" in serve.log
        assert "Traceback" not in serve.log
