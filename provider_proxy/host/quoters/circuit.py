"""The circuit of a quoter: open while no quote can be had, closed again by a probe that succeeds.

While it is open nobody waits for a quote that will not come: tenants are told at once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from provider_proxy.errors import AkChangedError, HostError
from provider_proxy.host.metrics import Metrics

log = logging.getLogger(__name__)

PROBE_S = 1.0  # between two looks at what failed: service is back soon after it is


class Circuit:
    """Open or closed, and why.

    Args:
        what: what quotes, for the log and for tenants: "the TPM".

    Attributes:
        why: what tenants are told while it is open; None while it is closed.
    """

    def __init__(self, metrics: Metrics, what: str) -> None:
        self._metrics = metrics
        self._what = what
        self._opened = trio.Event()
        self.why: str | None = None

    def open(self, cause: str) -> None:
        """Refuse tenants from now on."""
        if self.why is None:
            log.critical("%s is out of order, tenants get 503: %s", self._what, cause)
            self._metrics.tpm_circuit_open.set(1)
            self.why = f"{self._what} is out of order"
            self._opened.set()

    async def run(self, probe: Callable[[], Awaitable[None]]) -> None:
        """Probe while it is open, until cancelled.

        Args:
            probe: returns when a quote can be had again; raises `HostError` while none can.
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
            log.warning("%s is in order again", self._what)
            self._metrics.tpm_circuit_open.set(0)
            self.why = None
            self._opened = trio.Event()
