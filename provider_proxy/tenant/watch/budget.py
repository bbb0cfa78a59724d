"""What all watched hosts share: memory for large answers, and the lock to process one.

Nearly all answers are small and reserve nothing. A large one must reserve memory for its largest possible
size before it is read, so that a read that begins can finish; otherwise it stays with its sender. Each
provider has a share: its hosts wait for each other, and not for those of other providers.

Invariants: what is held never exceeds `TOTAL_BYTES`, and of one provider never `SHARE_BYTES`. A slow or
silent host holds only the memory of its own answer.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

T = TypeVar("T")

SMALL_BYTES = 64 * 1024  # an answer without logs; read, parsed and judged at once
TOTAL_BYTES = 64 * 1024 * 1024
SHARE_BYTES = 16 * 1024 * 1024  # of each provider: the largest answer, and half of another


@dataclass(slots=True, eq=False)
class _Waiting:
    provider: str
    size: int
    event: trio.Event = field(default_factory=trio.Event)


class Budget:
    """Room for large answers, over all hosts and for each provider.

    Args:
        in_worker: parses large answers; a thread, except in tests of timing.

    Attributes:
        held: bytes that are reserved now.
        turn: the lock of the one large answer that is parsed and judged.
    """

    def __init__(
        self,
        *,
        total: int = TOTAL_BYTES,
        share: int = SHARE_BYTES,
        in_worker: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        self._total = total
        self._share = share
        self._of: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []
        self.turn = trio.Lock()
        self.in_worker = in_worker
        self.held = 0

    def room(self, provider: str) -> Room:
        """Room for one answer of a provider, empty at first. Use it as a context manager."""
        return Room(self, provider)

    async def take(self, provider: str, size: int) -> None:
        """Wait until there is room for so many bytes, and hold it."""
        waiting = _Waiting(provider, min(size, self._share, self._total))
        self._waiting.append(waiting)
        self._admit()
        try:
            await waiting.event.wait()
        except BaseException:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._admit()  # those behind it may have waited only for it
            else:
                self.give(provider, waiting.size)
            raise

    def give(self, provider: str, size: int) -> None:
        """Give room back."""
        size = min(size, self._share, self._total)
        self.held -= size
        self._of[provider] -= size
        if not self._of[provider]:
            del self._of[provider]
        self._admit()

    def _admit(self) -> None:
        """Admit those that have waited the longest, while there is room; a provider whose share is
        used up does not delay other providers."""
        for waiting in list(self._waiting):
            if self._of[waiting.provider] + waiting.size > self._share:
                continue
            if self.held + waiting.size > self._total:
                return  # those behind it must not overtake it for ever
            self._waiting.remove(waiting)
            self.held += waiting.size
            self._of[waiting.provider] += waiting.size
            waiting.event.set()


class Room:
    """Room for one answer, held from `take` until the context ends."""

    def __init__(self, budget: Budget, provider: str) -> None:
        self._budget = budget
        self._provider = provider
        self._size = 0

    async def __aenter__(self) -> Room:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._size:
            self._budget.give(self._provider, self._size)
            self._size = 0

    def turn(self) -> AbstractAsyncContextManager[object]:
        """Held while an answer is parsed and judged: large ones one at a time, small ones at once."""
        return self._budget.turn if self._size else contextlib.nullcontext()

    async def work(self, parse: Callable[[bytes], T], body: bytes) -> T:
        """Parse the answer: a large one in a thread, because other hosts use the event loop as well."""
        if not self._size:
            return parse(body)
        parsed: T = await self._budget.in_worker(parse, body)
        return parsed

    async def take(self, size: int) -> None:
        """Make sure that an answer of so many bytes has room; a small one needs none."""
        if size > SMALL_BYTES and not self._size:
            await self._budget.take(self._provider, size)
            self._size = size
