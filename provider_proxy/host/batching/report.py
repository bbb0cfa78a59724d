"""Reports a finished batch in the metrics and in one line of the log.

One line for each batch, not for each request. It has numbers, the union of the masks and the reason
of a failure; never a nonce, a salt or a PCR value.
"""

from __future__ import annotations

import logging

from provider_proxy.common.log import Event
from provider_proxy.errors import SelfCheckError
from provider_proxy.host.batching.batch import Batch
from provider_proxy.host.metrics import Metrics

log = logging.getLogger("provider_proxy.batch_report")  # a documented name, not the module's


def report(batch: Batch, metrics: Metrics) -> None:
    """Count and log a batch whose waiters have their answers or their error."""
    wait_s = batch.sealed - batch.opened
    metrics.batches.labels(batch.outcome).inc()
    metrics.sealed.labels(batch.sealed_by.value).inc()
    metrics.wait_seconds.observe(wait_s)
    if batch.error is None:
        metrics.leaves.observe(len(batch.waiters))
        metrics.quote_seconds.observe(batch.quote_s)
    fields: dict[str, object] = {
        "batch": batch.number,
        "leaves": len(batch.waiters),
        "size": batch.size,
        "bank": batch.bank.label,
        "mask": hex(batch.mask),
        "wait_ms": round(wait_s * 1000, 1),
        "quote_ms": round(batch.quote_s * 1000, 1),
        "sealed_by": batch.sealed_by.value,
        "outcome": batch.outcome,
    }
    level = logging.INFO
    if batch.error is not None:
        fields["reason"] = str(batch.error.__cause__ or batch.error)
        level = logging.CRITICAL if isinstance(batch.error, SelfCheckError) else logging.ERROR
    log.log(level, Event("batch", fields))
