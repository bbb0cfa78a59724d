"""Room for large answers: never more than there is, a share for each provider, no wait for ever."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio
import trio.testing

from provider_proxy.evidence.wire import MAX_EVIDENCE_WITH_LOGS_BYTES
from provider_proxy.tenant.watch.budget import SHARE_BYTES, SMALL_BYTES, TOTAL_BYTES, Budget

BIG = SMALL_BYTES + 1


def test_the_largest_answer_fits_a_share() -> None:
    assert SMALL_BYTES < MAX_EVIDENCE_WITH_LOGS_BYTES <= SHARE_BYTES <= TOTAL_BYTES // 2


async def test_small_answers_hold_nothing() -> None:
    budget = Budget(total=BIG, share=BIG)
    async with budget.room("a") as full:
        await full.take(BIG)
        async with budget.room("a") as room:
            await room.take(SMALL_BYTES)
        assert budget.held == BIG
    assert budget.held == 0


async def test_room_is_taken_once_and_given_back() -> None:
    budget = Budget()
    async with budget.room("a") as room:
        await room.take(BIG)
        await room.take(5 * BIG)  # chunk after chunk of the same answer
        assert budget.held == BIG
    assert budget.held == 0


async def test_one_provider_s_hosts_hold_up_nobody_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    budget = Budget(total=4 * BIG, share=2 * BIG)

    async def stalls(name: str) -> None:
        async with budget.room(name) as room:
            await room.take(BIG)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(stalls, "bad")
        await trio.testing.wait_all_tasks_blocked()
        assert budget.held == 2 * BIG
        with trio.fail_after(1):
            async with budget.room("good") as room:
                await room.take(2 * BIG)
        nursery.cancel_scope.cancel()
    assert budget.held == 0


async def test_a_large_one_is_not_overtaken_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    budget = Budget(total=4 * BIG, share=4 * BIG)
    order: list[str] = []

    async def answer(name: str, size: int) -> None:
        async with budget.room(name) as room:
            await room.take(size)
            order.append(name)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for name, size in (("one", 2 * BIG), ("large", 4 * BIG), ("late", BIG), ("later", BIG)):
            nursery.start_soon(answer, name, size)
            await trio.testing.wait_all_tasks_blocked()
    assert order[:2] == ["one", "large"]


async def test_who_gives_up_waiting_lets_the_others_in(
    autojump_clock: trio.testing.MockClock,
) -> None:
    budget = Budget(total=4 * BIG, share=4 * BIG)
    async with budget.room("a") as held, trio.open_nursery() as nursery:
        await held.take(2 * BIG)

        async def gives_up() -> None:
            with trio.move_on_after(1):
                async with budget.room("b") as room:
                    await room.take(4 * BIG)

        nursery.start_soon(gives_up)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(2):
            async with budget.room("c") as room:
                await room.take(BIG)


@pytest.mark.parametrize("seed", range(5))
async def test_any_crowd_keeps_the_bounds_and_comes_to_an_end(
    autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    rng = random.Random(seed)
    total, share = 10 * BIG, 4 * BIG
    budget = Budget(total=total, share=share)
    holds: Counter[str] = Counter()
    done = 0

    async def answer(name: str, size: int, takes_s: float, patience_s: float) -> None:
        nonlocal done
        await trio.sleep(rng.random())
        with trio.move_on_after(patience_s):
            async with budget.room(name) as room:
                await room.take(size)
                holds[name] += min(size, share)
                try:
                    assert holds[name] <= share
                    assert holds.total() <= budget.held <= total
                    await trio.sleep(takes_s)
                finally:
                    holds[name] -= min(size, share)
        done += 1

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                name = rng.choice("abcdef")
                size = BIG * rng.randrange(1, 6)
                nursery.start_soon(answer, name, size, rng.random(), rng.choice((0.5, 2, 500)))
    assert done == 200
    assert budget.held == 0
