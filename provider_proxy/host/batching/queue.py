"""The request queue: admission, one line for each batch key, and whose turn is next.

Synchronous, without a clock and without tasks: `batcher` passes the time and decides when to seal.
A request is refused here, before it gets a place. Lines take turns on the chip and tenants take turns
within a line. Everything is bounded: requests, lines, lines of a tenant.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from provider_proxy.errors import OverloadedError, ParameterError, TenantLimitError
from provider_proxy.evidence.model import QuoteRequest, Tenant
from provider_proxy.host.batching.batch import BatchKey, Waiter
from provider_proxy.host.tpm.state import ChipState, ReadState

MAX_LINES = 64  # (bank, isolation class, allowed PCRs) in use at once, over all tenants
MAX_LINES_PER_TENANT = 2  # so that one tenant's many masks cannot take the chip's turns
TRY_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """The batching rule's numbers.

    Attributes:
        window_s: how long a batch collects after its first request.
        max_leaves: a batch is sealed when it holds so many requests.
        isolate_mask: requests share a batch only if they ask for the same of these PCRs.
        max_queue: requests that may wait at once, over all lines.
    """

    window_s: float = 0.05
    max_leaves: int = 1024
    isolate_mask: int
    max_queue: int = 8192


class Line:
    """The waiters of one batch key: a queue for each tenant, and tenants in turns.

    An `OrderedDict` removes its first entry, or any other, in one step. A `dict` searches the places
    of entries removed before: in a line of ten thousand each removal would cost more than in a short one.
    """

    def __init__(self) -> None:
        self.oldest = math.inf
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()  # as they came
        self._queues: OrderedDict[str, OrderedDict[Waiter, None]] = OrderedDict()

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        queue = self._queues.get(waiter.tenant.name)
        if queue is None:
            queue = self._queues[waiter.tenant.name] = OrderedDict()
        queue[waiter] = None
        self._waiters[waiter] = None
        self.oldest = min(self.oldest, waiter.arrived)

    def remove(self, waiter: Waiter) -> None:
        queue = self._queues[waiter.tenant.name]
        del queue[waiter]
        if not queue:
            del self._queues[waiter.tenant.name]
        del self._waiters[waiter]

    def holds(self, tenant: Tenant) -> bool:
        return tenant.name in self._queues

    def take(self, most: int) -> list[Waiter]:
        """Remove and return at most `most` waiters: one of each tenant in turn, and so on.

        Tenants whom the size left out come first the next time.
        """
        taken: list[Waiter] = []
        queues = self._queues
        while queues and len(taken) < most:
            name, queue = queues.popitem(last=False)
            waiter, _ = queue.popitem(last=False)
            del self._waiters[waiter]
            taken.append(waiter)
            if queue:
                queues[name] = queue  # behind the others
        self.oldest = next((waiter.arrived for waiter in self._waiters), math.inf)
        return taken


class RequestQueue:
    """All the lines.

    Args:
        chip: what a quote costs, as learnt so far.
    """

    def __init__(
        self,
        settings: BatchSettings,
        chip: ReadState,
    ) -> None:
        self._settings = settings
        self._chip = chip
        self._lines: dict[BatchKey, Line] = {}
        self._tried: float | None = None
        self.waiting = 0

    @property
    def lines(self) -> int:
        """How many kinds of requests wait."""
        return len(self._lines)

    def admit(
        self,
        request: QuoteRequest,
        tenant: Tenant,
        chip: ChipState,
        *,
        now: float,
        timeout_s: float,
        is_gone: Callable[[], bool] | None,
        chip_idle: bool = False,
    ) -> tuple[Waiter, bool]:
        """Give a request a place.

        Args:
            chip: what a quote costs now.
            chip_idle: nothing is being quoted. If also no request waits and none was admitted for
                `TRY_AGAIN_S`, the estimate is not used: only a new quote can correct a wrong one.

        Returns:
            The waiter, and True where its line may now be ripe earlier.

        Raises:
            ParameterError: a PCR that this tenant may not see.
            TenantLimitError: the tenant waits in too many lines.
            OverloadedError: the queue is full, or no answer is expected within `timeout_s`.
        """
        foreign = request.mask & ~tenant.pcr_allow
        if foreign:
            raise ParameterError("mask", f"you are not allowed to ask for the PCRs {foreign:#x}")
        if self.waiting >= self._settings.max_queue:
            raise OverloadedError("the queue is full", retry_after_s=self.retry_after_s())
        key = (request.bank, request.mask & self._settings.isolate_mask, tenant.pcr_allow)
        line = self._lines.get(key)
        many = len(self._lines) >= MAX_LINES_PER_TENANT
        if many and (line is None or not line.holds(tenant)):
            self._check_lines(tenant, is_new=line is None)
        estimate = self._estimate_s(line, chip)
        if self._tried is None:
            self._tried = now
        may_try = chip_idle and not self._lines and now - self._tried > TRY_AGAIN_S
        if estimate > timeout_s and not may_try:
            raise OverloadedError(
                f"the answer would take about {estimate:.1f} s, longer than your timeout",
                retry_after_s=self.retry_after_s(),
            )
        if line is None:
            line = self._lines[key] = Line()
        waiter = Waiter(request, tenant, key, now, now + timeout_s, is_gone)
        line.add(waiter)
        self._tried = now
        self.waiting += 1
        return waiter, line.count in (1, self._settings.max_leaves)

    def _check_lines(self, tenant: Tenant, *, is_new: bool) -> None:
        if sum(line.holds(tenant) for line in self._lines.values()) >= MAX_LINES_PER_TENANT:
            raise TenantLimitError(
                f"you have requests of {MAX_LINES_PER_TENANT} kinds (bank, isolated PCRs) waiting",
                retry_after_s=self.retry_after_s(),
            )
        if is_new and len(self._lines) >= MAX_LINES:
            raise OverloadedError(
                "too many kinds of requests are waiting", retry_after_s=self.retry_after_s()
            )

    def _estimate_s(self, line: Line | None, chip: ChipState) -> float:
        """An estimate of how long a request that comes now would wait."""
        turns = len(self._lines) - (line is not None)
        if line is not None:
            turns += line.count // self._settings.max_leaves
        return self._settings.window_s + chip.expected_s + turns * chip.turn_s

    def retry_after_s(self) -> float:
        """When the present load will be served, plus up to half at random so that clients spread out."""
        turns = max(len(self._lines), self.waiting / self._settings.max_leaves)
        spread = random.uniform(1.0, 1.5)  # noqa: S311  # jitter need not be secret
        return max(1.0, turns * self._chip().turn_s) * spread

    def leave(self, waiter: Waiter) -> None:
        """Remove a waiter that was not sealed and has timed out or was cancelled."""
        self.waiting -= 1
        line = self._lines[waiter.key]
        line.remove(waiter)
        if not line.count:
            del self._lines[waiter.key]

    def ripe_at(self) -> float:
        """When the next window ends; infinite where no request waits."""
        opened = min((line.oldest for line in self._lines.values()), default=math.inf)
        return opened + self._settings.window_s

    def ripe(self, now: float, *, every: bool = False) -> list[BatchKey]:
        """The lines whose window is over or that are full (or every line), in order of their turns."""
        window, most = self._settings.window_s, self._settings.max_leaves
        return [
            key
            for key, line in self._lines.items()
            if every or now >= line.oldest + window or line.count >= most
        ]

    def take(self, key: BatchKey) -> tuple[list[Waiter], float]:
        """Take one batch out of a line; a line with waiters left goes behind the other lines.

        Returns:
            The waiters, sealed, and when the first of them came.
        """
        line = self._lines.pop(key)
        opened = line.oldest
        taken = line.take(self._settings.max_leaves)
        if line.count:
            self._lines[key] = line
        self.waiting -= len(taken)
        for waiter in taken:
            waiter.sealed = True
        return taken, opened
