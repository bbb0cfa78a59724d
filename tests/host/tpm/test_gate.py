"""The gate to the chip: order, cancellation, duty, learning. Real threads and short real sleeps; only
orders and lower bounds are asserted."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import trio
from helpers import LIMIT_S, until

from provider_proxy.errors import TpmError
from provider_proxy.host.tpm import gate as gate_module
from provider_proxy.host.tpm.gate import Gate
from provider_proxy.host.tpm.pace import FIRST_GUESS_S, BusyTime

COMMAND_S = 0.02
TICK_S = 0.002  # clocks and sleeps are no finer


class Chip:
    """Commands that note when they ran, and that nobody else did meanwhile."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self.names: list[str] = []
        self._busy = threading.Lock()

    def command(self, name: str = "", seconds: float = COMMAND_S) -> Callable[[], str]:
        def run() -> str:
            assert self._busy.acquire(blocking=False), "two commands at once"
            try:
                begin = time.monotonic()
                time.sleep(seconds)
                self.names.append(name)
                self.spans.append((begin, time.monotonic()))
            finally:
                self._busy.release()
            return name

        return run

    def rests(self) -> list[tuple[float, float]]:
        """For each command but the last: how long it took, and the rest after it."""
        return [
            (end - begin, following - end)
            for (begin, end), (following, _) in zip(self.spans, self.spans[1:], strict=False)
        ]


def test_busy_time_is_that_of_the_last_ten_seconds() -> None:
    busy = BusyTime()
    assert busy.share(1000.0) == 0
    busy.add(1000.25, 1000.75)
    busy.add(1001.5, 1003.5)  # over three seconds
    assert busy.share(1003.5) == pytest.approx(0.25)
    assert busy.share(1010.9) == pytest.approx(0.2)  # the first is over
    assert busy.share(1012.5) == pytest.approx(0.05)
    assert busy.share(1020.0) == 0
    busy.add(1020.0, 1090.0)  # one that hung
    assert 0.9 <= busy.share(1090.0) <= 1.0


async def test_the_duty_is_seen_while_a_command_runs() -> None:
    gate, chip = Gate(0.5), Chip()
    assert (gate.duty, gate.pace.max_duty) == (0, 0.5)
    await gate.run(chip.command(seconds=0.05))
    assert 0.004 < gate.duty < 0.5
    before, release = gate.duty, threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.run, lambda: release.wait(LIMIT_S))
        await until(lambda: gate.duty > before + 0.002)
        release.set()


async def test_a_command_gives_its_result_or_its_error() -> None:
    gate = Gate(1.0)
    assert await gate.run(lambda: 42) == 42

    def fail() -> None:
        raise TpmError("broken", code=0x101)

    with pytest.raises(TpmError, match="broken"):
        await gate.run(fail)
    assert await gate.run(lambda: 43) == 43


async def test_one_at_a_time_in_a_thread_of_its_own() -> None:
    gate, chip = Gate(1.0), Chip()
    main = threading.get_ident()
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(gate.run, chip.command(str(number), 0.005))
    assert sorted(chip.names) == sorted(map(str, range(8)))
    assert await gate.run(threading.get_ident) != main


async def test_the_loop_goes_on_while_a_command_runs() -> None:
    gate, chip = Gate(1.0), Chip()
    ticks = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.run, chip.command(seconds=0.05))
        while not chip.spans:
            await trio.sleep(0.001)
            ticks += 1
    assert ticks > 5


async def test_a_cancelled_caller_returns_at_once_and_the_next_one_waits() -> None:
    gate, chip = Gate(1.0), Chip()
    release = threading.Event()

    def stuck() -> None:
        assert release.wait(LIMIT_S)
        chip.command("stuck", 0)()

    with trio.move_on_after(0.01) as scope:
        await gate.run(stuck)
    assert scope.cancelled_caught  # while the command still runs
    assert chip.names == []
    assert gate.in_flight_since is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.run, chip.command("next", 0))
        with trio.move_on_after(0.03):
            await gate.ready()
            raise AssertionError("ready while a command is in flight")
        assert chip.names == []
        release.set()
    assert chip.names == ["stuck", "next"]
    assert gate.in_flight_since is None


async def test_in_flight_since_is_set_while_a_command_runs() -> None:
    gate = Gate(1.0)
    before = time.monotonic()
    since = await gate.run(lambda: gate.in_flight_since)
    assert since is not None
    assert before <= since <= time.monotonic()
    assert gate.in_flight_since is None


@pytest.mark.parametrize("duty", [0.5, 0.25])
async def test_the_rest_after_a_command_keeps_the_duty(duty: float) -> None:
    gate, chip = Gate(duty), Chip()
    with trio.fail_after(LIMIT_S):
        for _ in range(3):
            await gate.run(chip.command())
    for took, rest in chip.rests():
        assert rest >= took * (1 / duty - 1) - TICK_S


async def test_the_duty_is_kept_whoever_asks() -> None:
    """Several at once share one duty: each command is followed by its rest."""
    gate, chip = Gate(0.5), Chip()
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(gate.run, chip.command())
    assert len(chip.spans) == 4
    for took, rest in chip.rests():
        assert rest >= took - TICK_S


async def test_the_rest_follows_a_command_that_fails_or_was_given_up() -> None:
    gate, chip = Gate(0.5), Chip()
    begins: list[float] = []

    def fail() -> None:
        chip.command()()
        raise TpmError("broken")

    with pytest.raises(TpmError):
        await gate.run(fail)
    await gate.ready()
    with trio.move_on_after(COMMAND_S / 2):
        await gate.run(chip.command())
    await until(lambda: len(chip.spans) == 2)
    with trio.fail_after(LIMIT_S):
        await gate.run(lambda: begins.append(time.monotonic()))
    (took, rest), (_, second_end) = chip.rests()[0], chip.spans[1]
    assert rest >= took - TICK_S
    assert begins[0] - second_end >= COMMAND_S - TICK_S


async def test_ready_waits_for_the_rest() -> None:
    gate, chip = Gate(0.5), Chip()
    with trio.fail_after(LIMIT_S):
        await gate.ready()  # at once: nothing ran yet
        await gate.run(chip.command())
        await gate.ready()
    begin, end = chip.spans[0]
    assert time.monotonic() - end >= end - begin - TICK_S


async def test_full_duty_rests_not_at_all() -> None:
    gate = Gate(1.0)
    assert gate.pace.pause_s == 0
    with trio.fail_after(LIMIT_S):
        for _ in range(50):
            await gate.run(lambda: None)


async def test_the_time_of_a_quote_is_learnt() -> None:
    gate, chip = Gate(0.5), Chip()
    assert gate.pace.expected_s == FIRST_GUESS_S
    assert gate.pace.pause_s == FIRST_GUESS_S
    await gate.run(chip.command())  # no quote
    assert gate.pace.expected_s == FIRST_GUESS_S
    await gate.run(chip.command(), learn=True)  # the first is believed
    first = gate.pace.expected_s
    begin, end = chip.spans[-1]
    assert COMMAND_S - TICK_S <= first < FIRST_GUESS_S
    assert first == pytest.approx(end - begin, abs=0.01)
    assert gate.pace.pause_s == pytest.approx(first)
    await gate.run(chip.command(seconds=3 * COMMAND_S), learn=True)  # later ones in part
    begin, end = chip.spans[-1]
    assert first < gate.pace.expected_s < end - begin


async def test_a_failed_quote_teaches_nothing() -> None:
    gate = Gate(0.5)

    def fail() -> None:
        raise TpmError("broken")

    with pytest.raises(TpmError):
        await gate.run(fail, learn=True)
    assert gate.pace.expected_s == FIRST_GUESS_S


async def test_close_waits_for_the_command_in_flight() -> None:
    gate, chip = Gate(1.0), Chip()
    with trio.move_on_after(0.005):
        await gate.run(chip.command("last"))
    with trio.fail_after(LIMIT_S):
        await gate.close()
    assert chip.names == ["last"]


async def test_after_close_nothing_runs() -> None:
    gate, chip = Gate(1.0), Chip()
    await gate.close()
    with trio.move_on_after(0.02) as scope:
        await gate.run(chip.command("late", 0))
    assert scope.cancelled_caught
    assert chip.names == []


# --- rank ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duty", [1.0, 0.5])
async def test_a_batch_waits_for_one_command_of_low_rank_at_most(
    duty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many registrars' activations wait; whenever a quote is wanted, at most one goes before it."""
    monkeypatch.setattr(gate_module, "GIVE_WAY_S", 1.0)  # a busy machine needs longer for the tree
    gate, chip = Gate(duty), Chip()
    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(partial(gate.run, chip.command("low"), gives_way=True))
        for _ in range(5):
            await until(lambda: gate.in_flight_since is not None, "one of low rank in flight")
            before = len(chip.names)
            await gate.ready()
            await trio.sleep(TICK_S)  # the batch's tree
            await gate.run(chip.command("quote"))
            assert chip.names[before:] == ["low", "quote"], chip.names
        nursery.cancel_scope.cancel()


async def test_commands_of_low_rank_are_not_starved_by_quotes() -> None:
    gate, chip = Gate(1.0), Chip()
    async with trio.open_nursery() as nursery:

        async def quotes() -> None:
            while True:
                await gate.ready()
                await gate.run(chip.command("quote", 0.005))

        nursery.start_soon(quotes)
        with trio.fail_after(LIMIT_S):
            for _ in range(5):
                await gate.run(chip.command("low", 0.005), gives_way=True)
        nursery.cancel_scope.cancel()
    where = [n for n, name in enumerate(chip.names) if name == "low"]
    assert all(b - a >= 2 for a, b in itertools.pairwise(where)), chip.names


async def test_commands_of_low_rank_go_on_where_nobody_wants_a_quote() -> None:
    gate, chip = Gate(0.5), Chip()
    with trio.fail_after(LIMIT_S):
        for _ in range(3):
            await gate.run(chip.command("low"), gives_way=True)
    assert chip.names == ["low"] * 3
    for took, rest in chip.rests():  # they count in the duty
        assert rest >= took - TICK_S


async def test_who_gives_way_and_is_cancelled_lets_the_next_one_go() -> None:
    gate, chip = Gate(1.0), Chip()
    await gate.run(chip.command("low"), gives_way=True)
    with trio.move_on_after(TICK_S):
        await gate.run(chip.command("cancelled"), gives_way=True)
    with trio.fail_after(LIMIT_S):
        await gate.run(chip.command("next"), gives_way=True)
    assert chip.names == ["low", "next"]
