"""Where requests wait for a batch: admission, one line a batch key, turns.

Synchronous, without a clock and without tasks: `batcher` says what time it is and when to take.
Whatever may refuse a request does so here, before it takes a place. Lines take turns on the chip,
tenants take turns within a line, and everything is bounded: requests, lines, lines a tenant.
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
        isolate_mask: PCRs that only those share a batch who ask for the same of them.
        max_queue: requests that may wait at once, over all lines.
    """

    window_s: float = 0.05
    max_leaves: int = 1024
    isolate_mask: int
    max_queue: int = 8192


class Line:
    """Those who wait under one batch key: a queue a tenant, tenants in turns.

    An `OrderedDict` gives up its first and any other in one step. A `dict` looks through the places
    of those that were taken before: in a line of ten thousand each would cost more than in a short one.
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
        """Remove and return at most `most` waiters: one of each tenant, then again in turn.

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
            chip_idle: nothing is being quoted. Where nobody waits either, and nobody was admitted for
                `TRY_AGAIN_S`, the estimate does not count: a try is how a wrong one is unlearnt.

        Returns:
            The waiter, and True where its line may have become ripe sooner than it was.

        Raises:
            ParameterError: a PCR that this tenant may not see.
            TenantLimitError: the tenant waits in too many lines.
            OverloadedError: no room, or no answer within `timeout_s` to be expected.
        """
        foreign = request.mask & ~tenant.pcr_allow
        if foreign:
            raise ParameterError("mask", f"{foreign:#x} is not among the PCRs allowed to you")
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
        """About how long a request that comes now would wait."""
        turns = len(self._lines) - (line is not None)
        if line is not None:
            turns += line.count // self._settings.max_leaves
        return self._settings.window_s + chip.expected_s + turns * chip.turn_s

    def retry_after_s(self) -> float:
        """When the present load will be gone, spread by half so that not all return at once."""
        turns = max(len(self._lines), self.waiting / self._settings.max_leaves)
        spread = random.uniform(1.0, 1.5)  # noqa: S311  # jitter is no secret
        return max(1.0, turns * self._chip().turn_s) * spread

    def leave(self, waiter: Waiter) -> None:
        """A waiter that was not taken goes: timed out, or cancelled."""
        self.waiting -= 1
        line = self._lines[waiter.key]
        line.remove(waiter)
        if not line.count:
            del self._lines[waiter.key]

    def ripe_at(self) -> float:
        """When the next window ends; infinite where nobody waits."""
        opened = min((line.oldest for line in self._lines.values()), default=math.inf)
        return opened + self._settings.window_s

    def ripe(self, now: float, *, every: bool = False) -> list[BatchKey]:
        """The lines whose window is over or that are full (or every one), next turn first."""
        window, most = self._settings.window_s, self._settings.max_leaves
        return [
            key
            for key, line in self._lines.items()
            if every or now >= line.oldest + window or line.count >= most
        ]

    def take(self, key: BatchKey) -> tuple[list[Waiter], float]:
        """Take a batch's worth out of a line; what is left of it goes behind the other lines.

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
