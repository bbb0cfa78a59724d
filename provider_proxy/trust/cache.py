"""A bounded cache whose concurrent misses share one call, on trio and on asyncio alike.

It has no task of its own: the first caller that misses makes the call in its own task, and the others
wait for it. If that caller is cancelled, a waiting one takes over. An error of the call reaches all of
them. Nothing is handed out that is older than its time to live, counted from the *start* of the call
that fetched it, unless that call began after it was asked for. It knows nothing of registrars.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio

from provider_proxy.errors import ProviderProxyError

Value = TypeVar("Value")


class _Flight(Generic[Value]):
    """One call under way, and what came of it: a value, an error, or nothing if it was cancelled."""

    __slots__ = ("done", "error", "landed", "started_s", "ttl_s", "value")

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.done = anyio.Event()
        self.landed = False
        self.value: Value | None = None
        self.error: ProviderProxyError | None = None
        self.ttl_s = 0.0

    def outcome(self) -> Value:
        """The value. Raises: a copy of the error, so that tasks do not share a traceback."""
        if self.error is not None:
            raise self.error.copy() from self.error
        assert self.value is not None
        return self.value

    def is_good(self, now_s: float) -> bool:
        return now_s < self.started_s + self.ttl_s


class SingleFlightCache(Generic[Value]):
    """Values by key.

    Args:
        fetch: makes a value; every error of this package that it raises is an answer, too.
        ttl_s: how long a value is good, in seconds; 0 keeps nothing.
        error_ttl_s: how long an error is good.
        max_entries: the least recently used go first.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[Value]],
        *,
        ttl_s: float,
        error_ttl_s: Callable[[ProviderProxyError], float],
        max_entries: int,
        clock: Callable[[], float],
    ) -> None:
        self._fetch = fetch
        self._ttl_s = ttl_s
        self._error_ttl_s = error_ttl_s
        self._max_entries = max_entries
        self._clock = clock
        self._entries: OrderedDict[str, _Flight[Value]] = OrderedDict()
        self._flights: dict[str, _Flight[Value]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def age_s(self, key: str) -> float:
        """How long ago the call for the kept value began; 0 without a kept value."""
        entry = self._entries.get(key)
        return 0.0 if entry is None else self._clock() - entry.started_s

    def forget(self, key: str) -> None:
        """The next `get` makes a call, or joins one that began before."""
        self._entries.pop(key, None)

    def peek(self, key: str) -> Value | None:
        """The kept value, if it is good; None otherwise, and where an error is kept."""
        entry = self._entries.get(key)
        if entry is None or entry.value is None or not entry.is_good(self._clock()):
            return None
        self._entries.move_to_end(key)
        return entry.value

    async def get(self, key: str) -> Value:
        """The value of a key. A hit returns without a checkpoint.

        Raises:
            ProviderProxyError: what `fetch` raised, for this caller or for the one it waited for.
        """
        asked_s = self._clock()
        entry = self._entries.get(key)
        if entry is not None:
            if entry.is_good(asked_s):
                self._entries.move_to_end(key)
                return entry.outcome()
            del self._entries[key]
        while True:
            flight = self._flights.get(key)
            if flight is None:
                return await self._lead(key)
            await flight.done.wait()
            if flight.landed and (flight.started_s >= asked_s or flight.is_good(self._clock())):
                return flight.outcome()
            # Cancelled, or too old for a later caller: one of the waiting callers makes the next call.

    async def _lead(self, key: str) -> Value:
        flight: _Flight[Value] = _Flight(self._clock())
        self._flights[key] = flight
        try:
            try:
                flight.value = await self._fetch(key)
                flight.ttl_s = self._ttl_s
            except ProviderProxyError as exc:
                flight.error = exc
                flight.ttl_s = self._error_ttl_s(exc)
            flight.landed = True
            self._keep(key, flight)
            return flight.outcome()
        finally:
            del self._flights[key]
            flight.done.set()

    def _keep(self, key: str, flight: _Flight[Value]) -> None:
        if not flight.is_good(self._clock()):
            return
        self._entries[key] = flight
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)
