"""What the daemon remembers of its last minutes for the status: batches, and how requests ended.

Everything here is bounded: a ring of batches, and counts of (tenant, reason) for each minute, both of
fixed size. Never a nonce, a salt, a PCR value, a VM or a claim: the operator may see all of it. Nothing
here is sent to a tenant.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from provider_proxy.host.batching.batch import Batch
from provider_proxy.host.status.turned_away import TurnedAway

RING = 240  # a quarter of an hour at the default duty and 2 s a poll; half a minute flat out
SPAN_MINUTES = 5
MAX_PAIRS = 4096  # (tenant, reason) counted in a minute; the rest is counted under OTHERS
MAX_LISTED = 100  # tenants in a status
MAX_NAME_CHARS = 128
FRESH_S = 0.5  # summing up many tenants takes milliseconds, and many clients may ask
OTHERS = "(others)"
STRANGERS = "(no tenant)"
OK = "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class PastBatch:
    """A finished batch.

    Attributes:
        opened, sealed, done: seconds since the epoch: first nonce, seal, answers or error.
        leaves, size: tenants' requests; leaves of the tree, padding included.
        wait_ms: from the first nonce until the seal.
        quote_ms: of the quote, or of the attempts at it.
        sealed_by: "window", "chip", "full" or "drain".
        outcome: "ok", or the name of an error's class.
        reason: of a failure, for the operator; empty for "ok".
    """

    number: int
    opened: float
    sealed: float
    done: float
    leaves: int
    size: int
    mask: int
    bank: str
    wait_ms: float
    quote_ms: float
    sealed_by: str
    outcome: str
    reason: str

    def values(self) -> dict[str, object]:
        """As JSON has it; the mask in hex, as tenants write it."""
        return {
            "number": self.number,
            "opened": round(self.opened, 3),
            "sealed": round(self.sealed, 3),
            "done": round(self.done, 3),
            "leaves": self.leaves,
            "size": self.size,
            "mask": hex(self.mask),
            "bank": self.bank,
            "wait_ms": round(self.wait_ms, 1),
            "quote_ms": round(self.quote_ms, 1),
            "sealed_by": self.sealed_by,
            "outcome": self.outcome,
            "reason": self.reason,
        }


class Recent:
    """The last batches and minutes.

    Args:
        clock: seconds since the epoch.
        monotonic: the clock that batches' times are of.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = trio.current_time,
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._batches: deque[PastBatch] = deque(maxlen=RING)
        self.turned_away = TurnedAway(now=clock)
        self._summary: tuple[float, dict[str, object]] | None = None
        self._minutes: deque[tuple[int, dict[tuple[str, str], int]]] = deque(maxlen=SPAN_MINUTES)

    def batch_done(self, batch: Batch) -> None:
        """Remember a batch; a `batcher.Observe`."""
        now = self._clock()
        ahead = now - self._monotonic()
        reason = "" if batch.error is None else str(batch.error.__cause__ or batch.error)
        self._batches.append(
            PastBatch(
                number=batch.number,
                opened=batch.opened + ahead,
                sealed=batch.sealed + ahead,
                done=now,
                leaves=len(batch.waiters),
                size=batch.size,
                mask=batch.mask,
                bank=batch.bank.label,
                wait_ms=(batch.sealed - batch.opened) * 1000,
                quote_ms=batch.quote_s * 1000,
                sealed_by=batch.sealed_by.value,
                outcome=batch.outcome,
                reason=reason[:200],
            )
        )

    @property
    def last(self) -> PastBatch | None:
        """The newest batch; None before the first."""
        return self._batches[-1] if self._batches else None

    def count(self, tenant: str, reason: str) -> None:
        """Count how a tenant's request ended: "ok", or the name of an error's class."""
        minute = int(self._monotonic()) // 60
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append((minute, {}))
        counts = self._minutes[-1][1]
        key = (tenant[:MAX_NAME_CHARS], reason)
        if key not in counts and len(counts) >= MAX_PAIRS:
            key = (OTHERS, reason)
        counts[key] = counts.get(key, 0) + 1

    def batches(self) -> list[dict[str, object]]:
        """The last batches, oldest first."""
        return [batch.values() for batch in self._batches]

    def tenants(self) -> dict[str, object]:
        """The tenants with their answers and refusals by reason; those refused most often come first.

        Half a second old at most.

        Returns:
            `span_s`, `answered`, `refused`, `listed` (name, answered, refused by reason) and `more`,
            the number of tenants that `listed` leaves out.
        """
        now = self._monotonic()
        if self._summary is None or not 0 <= now - self._summary[0] < FRESH_S:
            self._summary = now, self._sum_up(int(now) // 60 - SPAN_MINUTES)
        return self._summary[1]

    def _sum_up(self, first: int) -> dict[str, object]:
        found: dict[str, dict[str, int]] = {}
        for minute, counts in self._minutes:
            if minute <= first:
                continue
            for (tenant, reason), count in counts.items():
                reasons = found.setdefault(tenant, {})
                reasons[reason] = reasons.get(reason, 0) + count
        answered = {name: reasons.pop(OK, 0) for name, reasons in found.items()}
        refused = {name: sum(reasons.values()) for name, reasons in found.items()}
        order = sorted(found, key=lambda name: (-refused[name], -answered[name], name))
        return {
            "span_s": SPAN_MINUTES * 60,
            "answered": sum(answered.values()),
            "refused": sum(refused.values()),
            "listed": [
                {"name": name, "answered": answered[name], "refused": found[name]}
                for name in order[:MAX_LISTED]
            ],
            "more": max(0, len(order) - MAX_LISTED),
        }
