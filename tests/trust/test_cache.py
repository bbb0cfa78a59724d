"""The cache under concurrent misses, on trio and on asyncio: one call, everybody served, nobody lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from provider_proxy.errors import NotRegisteredError, ParameterError, ProviderProxyError, ReplyError
from provider_proxy.trust.cache import SingleFlightCache

TTL_S, ERROR_TTL_S = 300.0, 5.0
CALLERS = 10
Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs an async function on each backend, ten seconds at most."""

    def go(function: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            with anyio.fail_after(10):
                await function()

        anyio.run(bounded, backend=request.param)

    return go


class Source:
    """Counts calls; each waits for `gate` where there is one; an error where one is planted."""

    def __init__(self, *, ttl_s: float = TTL_S, max_entries: int = 100) -> None:
        self.now_s = 1000.0
        self.calls: list[str] = []
        self.gate: anyio.Event | None = None
        self.error: ProviderProxyError | None = None
        self.takes_s = 0.0
        self.cache = SingleFlightCache(
            self._fetch,
            ttl_s=ttl_s,
            error_ttl_s=lambda error: ERROR_TTL_S,
            max_entries=max_entries,
            clock=lambda: self.now_s,
        )

    async def _fetch(self, key: str) -> str:
        self.calls.append(key)
        number = len(self.calls)
        await checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        self.now_s += self.takes_s
        if self.error is not None:
            raise self.error
        return f"{key} {number}"

    async def in_flight(self, count: int) -> None:
        """Wait until so many calls were made."""
        while len(self.calls) < count:
            await checkpoint()


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(50):
        await checkpoint()


async def ask(source: Source, into: list[object], key: str = "a") -> None:
    try:
        into.append(await source.cache.get(key))
    except ProviderProxyError as exc:
        into.append(exc)


def test_concurrent_misses_share_one_call(run: Run) -> None:
    async def body() -> None:
        source, got = Source(), list[object]()
        async with anyio.create_task_group() as tasks:
            for _ in range(CALLERS):
                tasks.start_soon(ask, source, got)
        assert got == ["a 1"] * CALLERS
        assert source.calls == ["a"]

    run(body)


def test_two_keys_do_not_wait_for_each_other(run: Run) -> None:
    async def body() -> None:
        source, got = Source(), list[object]()
        source.gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, source, got, "a")
            tasks.start_soon(ask, source, got, "b")
            await source.in_flight(2)
            source.gate.set()
        assert sorted(source.calls) == ["a", "b"]
        assert len(got) == 2

    run(body)


def test_the_leader_s_cancellation_loses_nobody(run: Run) -> None:
    """Leader after leader is cancelled; each time one of the others takes over."""

    async def body() -> None:
        source, got = Source(), list[object]()
        source.gate = anyio.Event()
        scopes = [anyio.CancelScope() for _ in range(CALLERS)]

        async def caller(scope: anyio.CancelScope) -> None:
            with scope:
                await ask(source, got)

        async with anyio.create_task_group() as tasks:
            for scope in scopes[:3]:
                tasks.start_soon(caller, scope)
                await settle()
            for scope in scopes[3:]:
                tasks.start_soon(caller, scope)
            await settle()
            assert source.calls == ["a"]
            for number, scope in enumerate(scopes[:3]):
                scope.cancel()  # the first is the leader; the next leader may be any of them
                await settle()
                assert len(source.calls) <= number + 2
            assert len(source.calls) >= 2
            source.gate.set()
        assert len(got) == CALLERS - 3
        assert len(set(map(str, got))) == 1
        assert not source.cache._flights

    run(body)


def test_a_cancelled_follower_disturbs_nobody(run: Run) -> None:
    async def body() -> None:
        source, got = Source(), list[object]()
        source.gate = anyio.Event()
        scope = anyio.CancelScope()

        async def follower() -> None:
            with scope:
                await ask(source, got)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, source, got)
            await source.in_flight(1)
            tasks.start_soon(follower)
            tasks.start_soon(ask, source, got)
            await settle()
            scope.cancel()
            await settle()
            source.gate.set()
        assert got == ["a 1"] * 2
        assert source.calls == ["a"]

    run(body)


@pytest.mark.parametrize(
    "error", [ReplyError("away", status=500), NotRegisteredError("no"), ParameterError("a", "b")]
)
def test_an_error_reaches_all_and_each_gets_an_object_of_his_own(
    run: Run, error: ProviderProxyError
) -> None:
    async def body() -> None:
        source, got = Source(), list[Any]()
        source.error = error
        async with anyio.create_task_group() as tasks:
            for _ in range(CALLERS):
                tasks.start_soon(ask, source, got)
        assert source.calls == ["a"]
        assert {type(e) for e in got} == {type(error)}
        assert {str(e) for e in got} == {str(error)}
        assert len({id(e) for e in got}) == CALLERS
        assert [vars(e) for e in got] == [vars(error)] * CALLERS

    run(body)


def test_a_bug_in_the_call_lets_nobody_wait(run: Run) -> None:
    async def body() -> None:
        async def broken(key: str) -> str:
            await checkpoint()
            raise ZeroDivisionError

        cache = SingleFlightCache(
            broken, ttl_s=1, error_ttl_s=lambda e: 1, max_entries=9, clock=lambda: 0.0
        )
        failed = 0

        async def caller() -> None:
            nonlocal failed
            with pytest.raises(ZeroDivisionError):
                await cache.get("a")
            failed += 1

        async with anyio.create_task_group() as tasks:
            for _ in range(CALLERS):
                tasks.start_soon(caller)
        assert failed == CALLERS

    run(body)


def test_nothing_is_served_past_its_time(run: Run) -> None:
    async def body() -> None:
        source = Source()
        assert await source.cache.get("a") == "a 1"
        source.now_s += TTL_S - 0.001
        assert await source.cache.get("a") == "a 1"
        source.now_s += 0.001
        assert await source.cache.get("a") == "a 2"

    run(body)


def test_the_time_counts_from_the_start_of_the_call(run: Run) -> None:
    """The registrar may have read its database at once and answered late."""

    async def body() -> None:
        source = Source()
        source.takes_s = 200.0
        assert await source.cache.get("a") == "a 1"
        source.now_s += 101
        assert await source.cache.get("a") == "a 2"

    run(body)


def test_who_comes_late_does_not_get_what_is_too_old(run: Run) -> None:
    """The second asks while a call is under way that began longer ago than the time to live."""

    async def body() -> None:
        source, got = Source(ttl_s=10), list[object]()
        source.gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, source, got)
            await source.in_flight(1)
            source.now_s += 11
            for _ in range(CALLERS):
                tasks.start_soon(ask, source, got)
            await settle()
            source.gate.set()
        assert got[0] == "a 1"
        assert got[1:] == ["a 2"] * CALLERS

    run(body)


def test_without_a_time_to_live_every_question_is_new_but_shared(run: Run) -> None:
    async def body() -> None:
        source, got = Source(ttl_s=0), list[object]()
        assert await source.cache.get("a") == "a 1"
        assert await source.cache.get("a") == "a 2"
        assert len(source.cache) == 0
        async with anyio.create_task_group() as tasks:
            for _ in range(CALLERS):
                tasks.start_soon(ask, source, got)
        assert got == ["a 3"] * CALLERS

    run(body)


def test_errors_are_kept_briefly(run: Run) -> None:
    async def body() -> None:
        source = Source()
        source.error = NotRegisteredError("no")
        for _ in range(3):
            with pytest.raises(NotRegisteredError):
                await source.cache.get("a")
        assert source.calls == ["a"]
        source.error = None
        source.now_s += ERROR_TTL_S
        assert await source.cache.get("a") == "a 2"

    run(body)


def test_the_least_recently_used_goes_first(run: Run) -> None:
    async def body() -> None:
        source = Source(max_entries=2)
        for key in ("a", "b", "a", "c"):
            await source.cache.get(key)
        assert len(source.cache) == 2
        await source.cache.get("a")
        assert source.calls == ["a", "b", "c"]
        await source.cache.get("b")
        assert source.calls == ["a", "b", "c", "b"]

    run(body)


def test_what_is_forgotten_is_asked_again(run: Run) -> None:
    async def body() -> None:
        source = Source()
        assert source.cache.age_s("a") == 0
        await source.cache.get("a")
        source.now_s += 7
        assert source.cache.age_s("a") == 7
        source.cache.forget("a")
        assert await source.cache.get("a") == "a 2"

    run(body)


def test_asyncio_s_own_cancellation_loses_nobody() -> None:
    """Tenants' programs cancel tasks and use `asyncio.timeout`, not anyio's scopes."""

    async def body() -> None:
        source = Source()
        source.gate = anyio.Event()
        callers = [asyncio.create_task(source.cache.get("a")) for _ in range(CALLERS)]
        await source.in_flight(1)
        callers[0].cancel()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await source.cache.get("a")
        await source.in_flight(2)
        callers[5].cancel()
        await settle()
        source.gate.set()
        got = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(one) for one in got].count(asyncio.CancelledError) == 2
        assert len({one for one in got if isinstance(one, str)}) == 1

    asyncio.run(asyncio.wait_for(body(), 10))
