"""Hands the outbox's reports of one's own shards to every receiver, again until they are taken.

The next report of a host goes when the one before it was taken, so that receivers get them in order.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial

import trio

from provider_proxy.common.backoff import backoff_s
from provider_proxy.errors import first_of
from provider_proxy.tenant.fleet import outbox
from provider_proxy.tenant.fleet.database import Database, DatabaseError
from provider_proxy.tenant.watch.reports import Sink

log = logging.getLogger(__name__)

DELIVER_EVERY_S = 0.5
CLEAN_EVERY_S = 3600.0
DELIVERIES_AT_ONCE = 8


class Delivery:
    """Delivers.

    Args:
        sinks: every receiver; without any, a report counts as delivered at once.
        held: the shards whose reports are this member's to deliver.
    """

    def __init__(
        self,
        database: Database,
        sinks: Sequence[Sink],
        held: Callable[[], Sequence[int]],
        *,
        rng: random.Random,
    ) -> None:
        self._database = database
        self._sinks = sinks
        self._held = held
        self._rng = rng

    async def run(self) -> None:
        """Hand the outbox's reports to every receiver, for ever."""
        limit = trio.CapacityLimiter(DELIVERIES_AT_ONCE)
        while True:
            await trio.sleep(DELIVER_EVERY_S)
            shards = self._held()
            if not shards:
                continue
            try:
                waiting = await self._database.run(partial(outbox.next_reports, shards=shards))
                if not self._sinks:
                    ids = [report.id for report in waiting]
                    await self._database.run(partial(outbox.delivered, ids=ids))
                    continue
                async with trio.open_nursery() as nursery:
                    for report in waiting:
                        nursery.start_soon(self._deliver_one, limit, report)
            except* DatabaseError as group:
                log.warning("the outbox waits: %s", first_of(group))

    async def _deliver_one(self, limit: trio.CapacityLimiter, report: outbox.Waiting) -> None:
        async with limit:
            taken = [await sink.deliver(report.body) for sink in self._sinks]
        if all(taken):
            await self._database.run(partial(outbox.delivered, ids=[report.id]))
            return
        wait_s = backoff_s(
            report.tries + 1, first_s=outbox.FIRST_RETRY_S, longest_s=outbox.LONGEST_RETRY_S
        )
        await self._database.run(partial(outbox.failed, id_=report.id, wait_s=wait_s))

    async def clean(self) -> None:
        """Forget old reports, for ever; any member may."""
        while True:
            await trio.sleep(CLEAN_EVERY_S * self._rng.uniform(0.5, 1))
            try:
                await self._database.run(outbox.forget_old)
            except DatabaseError as exc:
                log.warning("old reports stay for now: %s", exc)
