"""Each tenant's own limits: a token bucket, requests in flight, bytes of logs.

Over one of them is 429 with a computed, jittered Retry-After: the tenant's fault, and nobody else's
wait. What a tenant may hold of the shared queue follows from its requests in flight.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import trio

from provider_proxy.errors import TenantLimitError
from provider_proxy.evidence.model import Tenant

LOG_BYTES_PER_S = 2 * 1024 * 1024  # an IMA list of 15,000 lines a second, whatever the rate
LOG_BURST_BYTES = 32 * 1024 * 1024  # so that a long list can be fetched in one go
MAX_REMEMBERED = 10_000  # quotas of tenants who are not here now


@dataclass(slots=True)
class Quota:
    """What a tenant has left.

    Attributes:
        tokens: requests that may begin now.
        log_bytes: that may still be sent; negative where the last answer took more.
    """

    tokens: float
    log_bytes: float
    inflight: int
    refilled: float


class Quotas:
    """All tenants' quotas, by name.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = trio.current_time) -> None:
        self._now = now
        self._quotas: dict[str, Quota] = {}

    def enter(self, tenant: Tenant, *, wants_logs: bool) -> Quota:
        """Count a request that begins; give what is returned to `leave` when it ends.

        Raises:
            TenantLimitError: over a limit; nothing was counted.
        """
        now = self._now()
        quota = self._quotas.get(tenant.name)
        if quota is None:
            self._forget(now)
            quota = self._quotas[tenant.name] = Quota(tenant.burst, LOG_BURST_BYTES, 0, now)
        passed = now - quota.refilled
        quota.refilled = now
        quota.tokens = min(float(tenant.burst), quota.tokens + passed * tenant.rate)
        quota.log_bytes = min(LOG_BURST_BYTES, quota.log_bytes + passed * LOG_BYTES_PER_S)
        if quota.inflight >= tenant.max_inflight:
            raise TenantLimitError(
                f"you have {quota.inflight} requests in flight", retry_after_s=_spread(1.0)
            )
        if quota.tokens < 1:
            wait_s = (1 - quota.tokens) / tenant.rate
            raise TenantLimitError(
                f"more than {tenant.rate:g} requests a second", retry_after_s=_spread(wait_s)
            )
        if wants_logs and quota.log_bytes <= 0:
            wait_s = -quota.log_bytes / LOG_BYTES_PER_S
            raise TenantLimitError(
                "too many bytes of logs; ask with ima_ml_entry", retry_after_s=_spread(wait_s)
            )
        quota.tokens -= 1
        quota.inflight += 1
        return quota

    def leave(self, quota: Quota, *, log_bytes: int = 0) -> None:
        """Count a request that ended, and the logs that it was sent."""
        quota.inflight -= 1
        quota.log_bytes -= log_bytes

    def _forget(self, now: float) -> None:
        """Bound the memory: who is idle and would be full again is as good as new."""
        if len(self._quotas) < MAX_REMEMBERED:
            return
        for name, quota in list(self._quotas.items()):
            if not quota.inflight and now - quota.refilled > LOG_BURST_BYTES / LOG_BYTES_PER_S:
                del self._quotas[name]


def _spread(seconds: float) -> float:
    """With jitter, so that not all come back at once."""
    return max(1.0, seconds) * random.uniform(1.0, 1.5)  # noqa: S311  # jitter is no secret
