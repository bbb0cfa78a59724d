"""What `GET /status` tells the operator: one object, made from the daemon's parts.

Read-only, and for the operator only, because it names tenants. It holds no secrets: no nonces, salts,
PCR values or claims. `VERSION` rises when a key changes its meaning or is removed; keys may be added.
docs/http-api.md lists the keys; a test compares the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from provider_proxy.common.dates import Calendar
from provider_proxy.evidence.model import pcrs_of
from provider_proxy.host.batching.batcher import Queue
from provider_proxy.host.config.tables import Config
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.status.recent import Recent
from provider_proxy.host.tpm.state import ReadState

VERSION = 1
READY = "ready"
DRAINING = "draining"
TROUBLE = "trouble"


class StatusBoard:
    """Makes the status.

    Args:
        chip: gives the state of the quoter's chip.
        queue: gives the requests that wait now.
        draining: True once the daemon is shutting down.
        calendar: the end dates of certificates and revocation lists.
        host: constant facts of the host: its id, its AK's name, whether the TPM is software.
    """

    def __init__(
        self,
        config: Config,
        chip: ReadState,
        queue: Callable[[], Queue],
        recent: Recent,
        metrics: Metrics,
        *,
        draining: Callable[[], bool],
        host: Mapping[str, object],
        program: str,
        calendar: Calendar | None = None,
    ) -> None:
        self._config = config
        self._chip = chip
        self._queue = queue
        self._recent = recent
        self._metrics = metrics
        self._draining = draining
        self._host = dict(host)
        self._program = program
        self._calendar = calendar or Calendar()
        self._started = time.time()

    def not_ready(self) -> str | None:
        """Why the daemon accepts no requests now; None while it does."""
        if self._draining():
            return DRAINING
        return self._chip().trouble or self._calendar.not_ready()

    def results(self) -> dict[str, object]:
        """The status as of now."""
        now = time.time()
        why = self.not_ready()
        state = READY if why is None else DRAINING if self._draining() else TROUBLE
        return {
            "version": VERSION,
            "program": self._program,
            "now": round(now, 3),
            "started": round(self._started, 3),
            "state": state,
            "why": why,
            "host": self._host,
            "chip": self._chip_values(),
            "batching": self._batching_values(),
            "queue": self._queue_values(),
            "batches": self._recent.batches(),
            "tenants": self._recent.tenants(),
            "selfcheck_failures": self._metrics.selfcheck_failure_count(),
            "audit_lost": self._metrics.audit_lost_count(),
            "dates": self._calendar.values(),
            "turned_away": self._recent.turned_away.values(),
        }

    def _chip_values(self) -> dict[str, object]:
        chip = self._chip()
        return {
            "trouble": chip.trouble,
            "duty": round(chip.duty, 3),
            "max_duty": round(min(self._config.tpm.max_duty, chip.max_duty), 3),
            "learnt_quote_ms": round(chip.expected_s * 1000, 1),
            "rest_ms": round(chip.pause_s * 1000, 1),
            "in_flight_ms": round(chip.in_flight_s * 1000, 1),
            "errors": self._metrics.tpm_error_counts(),
        }

    def _batching_values(self) -> dict[str, object]:
        batch = self._config.batch
        return {
            "window_ms": batch.window_ms,
            "max_leaves": batch.max_leaves,
            "isolate_pcrs": list(pcrs_of(batch.isolate_pcrs)),
        }

    def _queue_values(self) -> dict[str, object]:
        queue = self._queue()
        return {
            "waiting": queue.waiting,
            "lines": queue.lines,
            "oldest_ms": round(queue.oldest_s * 1000, 1),
            "max_queue": self._config.limits.max_queue,
        }
