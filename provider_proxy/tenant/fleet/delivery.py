"""Delivers the outbox's reports of this member's shards to every receiver, and retries until accepted.

The next report of a host is sent when the one before it was accepted, so that receivers get them in
order. An unreachable receiver is tried with a few reports at growing intervals; a receiver that refuses
one report does not delay those of other hosts.
"""

from __future__ import annotations

import logging
import random
import uuid
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
LONGEST_PAUSE_S = 30.0  # between two tries of an unreachable receiver
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
        self._taken: dict[uuid.UUID, set[str]] = {}  # of reports that not all receivers accepted
        self._failed_in_row = 0
        self._failed_rounds = 0

    async def run(self) -> None:
        """Deliver the outbox's reports to every receiver, for ever."""
        while True:
            await trio.sleep(self._pause_s())
            shards = self._held()
            if not shards:
                continue
            try:
                await self._round(shards)
            except* DatabaseError as group:
                log.warning("cannot deliver the outbox's reports now: %s", first_of(group))

    def _pause_s(self) -> float:
        if not self._failed_rounds:
            return DELIVER_EVERY_S
        return backoff_s(
            self._failed_rounds, first_s=DELIVER_EVERY_S, longest_s=LONGEST_PAUSE_S, rng=self._rng
        )

    async def _round(self, shards: Sequence[int]) -> None:
        """Deliver what is due. Raises: DatabaseError, in a group or alone."""
        waiting = await self._database.run(partial(outbox.next_reports, shards=shards))
        if not self._sinks:
            ids = [report.id for report in waiting]
            await self._database.run(partial(outbox.delivered, ids=ids))
            return
        self._failed_in_row = 0
        limit = trio.CapacityLimiter(DELIVERIES_AT_ONCE)
        done: list[uuid.UUID] = []
        failed: list[outbox.Waiting] = []
        async with trio.open_nursery() as nursery:
            for report in waiting:
                nursery.start_soon(self._deliver_one, limit, report, done, failed)
        if waiting:
            self._failed_rounds = 0 if done or not failed else self._failed_rounds + 1
        await self._settle(done, failed)

    async def _settle(self, done: Sequence[uuid.UUID], failed: Sequence[outbox.Waiting]) -> None:
        if done:
            await self._database.run(partial(outbox.delivered, ids=done))
            for id_ in done:
                self._taken.pop(id_, None)
        for report in failed:
            wait_s = backoff_s(
                report.tries + 1, first_s=outbox.FIRST_RETRY_S, longest_s=outbox.LONGEST_RETRY_S
            )
            await self._database.run(partial(outbox.failed, id_=report.id, wait_s=wait_s))
        # Forget what some receivers accepted and another member delivers by now.
        if len(self._taken) > outbox.MAX_AT_ONCE * 10:
            self._taken.clear()

    async def _deliver_one(
        self,
        limit: trio.CapacityLimiter,
        report: outbox.Waiting,
        done: list[uuid.UUID],
        failed: list[outbox.Waiting],
    ) -> None:
        async with limit:
            if self._failed_in_row >= DELIVERIES_AT_ONCE:
                return  # the receiver is unreachable: do not try the rest
            taken = self._taken.setdefault(report.id, set())
            for sink in self._sinks:
                if sink.name not in taken and await sink.deliver(report.body):
                    taken.add(sink.name)
        if len(taken) == len(self._sinks):
            self._failed_in_row = 0
            done.append(report.id)
        else:
            self._failed_in_row += 1
            failed.append(report)

    async def clean(self) -> None:
        """Forget old reports, for ever; any member may."""
        while True:
            await trio.sleep(CLEAN_EVERY_S * self._rng.uniform(0.5, 1))
            try:
                lost = await self._database.run(outbox.forget_old)
            except DatabaseError as exc:
                log.warning("cannot remove old reports now: %s", exc)
                continue
            if lost:
                log.error(
                    "%d reports were dropped: not every receiver accepted them within 30 days", lost
                )
