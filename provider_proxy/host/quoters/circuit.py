"""The circuit breaker of a quoter: open while quotes fail, closed again by a probe that succeeds.

While it is open, tenants get an error at once and do not wait for a quote that will not come.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from provider_proxy.errors import AkChangedError, HostError
from provider_proxy.host.metrics import Metrics

log = logging.getLogger(__name__)

PROBE_S = 1.0  # between two probes: service resumes soon after the fault is gone


class Circuit:
    """Open or closed, and why.

    Args:
        what: the quoter's name for the log and for tenants: "the TPM".

    Attributes:
        why: the reason that tenants get while it is open; None while it is closed.
    """

    def __init__(self, metrics: Metrics, what: str) -> None:
        self._metrics = metrics
        self._what = what
        self._opened = trio.Event()
        self.why: str | None = None

    def open(self, cause: str) -> None:
        """Refuse tenants from now on."""
        if self.why is None:
            log.critical("%s is out of order; tenants get 503: %s", self._what, cause)
            self._metrics.tpm_circuit_open.set(1)
            self.why = f"{self._what} is out of order"
            self._opened.set()

    async def run(self, probe: Callable[[], Awaitable[None]]) -> None:
        """Probe while it is open, until cancelled.

        Args:
            probe: returns when quotes work again; raises `HostError` while they do not.
        """
        while True:
            await self._opened.wait()
            await trio.sleep(PROBE_S)
            try:
                await probe()
            except HostError as exc:
                level = logging.CRITICAL if isinstance(exc, AkChangedError) else logging.WARNING
                log.log(level, "%s is still out of order: %s", self._what, exc)
                continue
            log.warning("%s works again", self._what)
            self._metrics.tpm_circuit_open.set(0)
            self.why = None
            self._opened = trio.Event()
