"""Each tenant's own limits: a token bucket, requests in flight, bytes of logs.

A request over one of them gets 429 with a computed, jittered Retry-After, and delays no other tenant. A
tenant's share of the queue is bounded by its requests in flight.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from provider_proxy.errors import TenantLimitError
from provider_proxy.evidence.model import Tenant

LOG_BYTES_PER_S = 2 * 1024 * 1024  # an IMA list of 15,000 lines a second, whatever the rate
LOG_BURST_BYTES = 32 * 1024 * 1024  # so that a long list can be fetched at once
MAX_REMEMBERED = 10_000  # above it, quotas that have refilled are forgotten
MAX_LOOKED_AT = 2  # quotas in use that a new tenant's request passes over: bounds the search


@dataclass(slots=True)
class Quota:
    """What remains of a tenant's limits.

    Attributes:
        tenant: with its limits at its last request.
        tokens: requests that may begin now.
        log_bytes: that may still be sent; negative where the last answer took more.
    """

    tenant: Tenant
    tokens: float
    log_bytes: float
    inflight: int
    refilled: float

    def is_as_new(self, now: float) -> bool:
        """True where a new quota would hold as much."""
        passed = now - self.refilled
        return (
            not self.inflight
            and self.tokens + passed * self.tenant.rate >= self.tenant.burst
            and self.log_bytes + passed * LOG_BYTES_PER_S >= LOG_BURST_BYTES
        )


class Quotas:
    """All tenants' quotas, by name; the one that was used longest ago comes first.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = trio.current_time) -> None:
        self._now = now
        self._quotas: OrderedDict[str, Quota] = OrderedDict()

    def enter(self, tenant: Tenant, *, wants_logs: bool) -> Quota:
        """Count a request that begins; give what is returned to `leave` when it ends.

        Raises:
            TenantLimitError: over a limit; nothing was counted.
        """
        now = self._now()
        quota = self._quotas.get(tenant.name)
        if quota is None:
            self._forget(now)
            quota = Quota(tenant, tenant.burst, LOG_BURST_BYTES, 0, now)
            self._quotas[tenant.name] = quota
        else:
            self._quotas.move_to_end(tenant.name)
            quota.tenant = tenant
        passed = now - quota.refilled
        quota.refilled = now
        quota.tokens = min(float(tenant.burst), quota.tokens + passed * tenant.rate)
        quota.log_bytes = min(LOG_BURST_BYTES, quota.log_bytes + passed * LOG_BYTES_PER_S)
        if quota.inflight >= tenant.max_inflight:
            raise TenantLimitError(
                f"you already have {quota.inflight} requests in flight", retry_after_s=_spread(1.0)
            )
        if quota.tokens < 1:
            wait_s = (1 - quota.tokens) / tenant.rate
            raise TenantLimitError(
                f"more than {tenant.rate:g} requests a second", retry_after_s=_spread(wait_s)
            )
        if wants_logs and quota.log_bytes <= 0:
            wait_s = -quota.log_bytes / LOG_BYTES_PER_S
            raise TenantLimitError(
                "too many bytes of logs; ask for new entries only, with ima_ml_entry",
                retry_after_s=_spread(wait_s),
            )
        quota.tokens -= 1
        quota.inflight += 1
        return quota

    def leave(self, quota: Quota, *, log_bytes: int = 0) -> None:
        """Count a request that ended, and the logs that it was sent."""
        quota.inflight -= 1
        quota.log_bytes -= log_bytes

    def _forget(self, now: float) -> None:
        """Bound the memory: forget those used longest ago, if they have refilled.

        Each is forgotten once, so a new tenant pays for one of them on average. One that cannot be
        forgotten, because it is in flight or refills slowly, goes to the end.
        """
        if len(self._quotas) < MAX_REMEMBERED:
            return
        kept = 0
        while self._quotas and kept < MAX_LOOKED_AT:
            name, quota = next(iter(self._quotas.items()))
            if quota.is_as_new(now):
                del self._quotas[name]
            else:
                self._quotas.move_to_end(name)
                kept += 1


def _spread(seconds: float) -> float:
    """With jitter, so that not all clients return at once."""
    return max(1.0, seconds) * random.uniform(1.0, 1.5)  # noqa: S311  # jitter need not be secret
