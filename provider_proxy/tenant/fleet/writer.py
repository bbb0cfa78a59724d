"""Collects what a member finds and writes it in batches, each under the leases of its shards.

A verdict and its report are written in one transaction, so that neither exists without the other. While
the database is not reachable everything waits here, only the newest state of each host; reports are
bounded. What waits for a shard that another member now has is dropped: its new holder finds it again.

It reads no clock: the caller gives the time (CLOCK_BOOTTIME seconds).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from provider_proxy.tenant.fleet.lease import Holdings
from provider_proxy.tenant.fleet.rows import Outgoing, Update, shard_of
from provider_proxy.tenant.watch.reports import Report, Settled, Verdict
from provider_proxy.tenant.watch.store import HostRecord, HostRecords

log = logging.getLogger(__name__)

MAX_WAITING_REPORTS = 100_000  # 60 MB; two for each host of the largest member
UNFENCED = "unfenced"


@dataclass(slots=True)
class _Waiting:
    """The unwritten results of one host."""

    shard: int
    since_s: float
    record: HostRecord | None = None
    settled: Settled | None = None
    settled_at_s: float = 0.0
    reports: list[Outgoing] = field(default_factory=list)
    overdue: bool = False  # its reports have been sent although they are not written


class Writer:
    """Collects updates.

    Args:
        now: CLOCK_BOOTTIME in seconds.
        unfenced: called with each report that cannot get into the outbox now: made without a lease
            for its shard, or not written for `overdue_s`. It is sent at once.
        overdue_s: how long a report may wait for the outbox, in seconds.
    """

    def __init__(
        self,
        records: HostRecords,
        holdings: Holdings,
        shards: int,
        *,
        now: Callable[[], float],
        unfenced: Callable[[bytes], None],
        overdue_s: float = 5.0,
    ) -> None:
        self._records = records
        self._holdings = holdings
        self._shards = shards
        self._now = now
        self._unfenced = unfenced
        self._overdue_s = overdue_s
        self._waiting: dict[str, _Waiting] = {}
        self._sequence: dict[str, int] = {}
        self._epochs: dict[int, int] = {}
        self._reports = 0
        self.dropped_reports = 0

    def begin(self, host: str, sequence: int) -> None:
        """Begin to collect for a host; `sequence` is that of its newest report."""
        self._sequence[host] = sequence

    def forget(self, hosts: Iterable[str]) -> None:
        """Forget hosts that another member has now."""
        for host in hosts:
            self._sequence.pop(host, None)
            gone = self._waiting.pop(host, None)
            self._reports -= len(gone.reports) if gone is not None else 0

    def tell(self, report: Report) -> None:
        """Take a report that belongs to no verdict."""
        self._report(self._place(str(report["host"])), report)

    def settled(self, settled: Settled) -> None:
        """Take the end of a round."""
        place = self._place(settled.host)
        place.settled, place.settled_at_s = settled, self._now()
        if settled.report is not None:
            self._report(place, settled.report)

    def _place(self, host: str) -> _Waiting:
        found = self._waiting.get(host)
        if found is None:
            shard = shard_of(host, self._shards)
            found = self._waiting[host] = _Waiting(shard=shard, since_s=self._now())
        return found

    def _report(self, place: _Waiting, report: Report) -> None:
        host = str(report["host"])
        epoch = self._holdings.epoch(place.shard, self._now())
        unfenced = epoch is None or place.overdue
        if epoch is None:
            epoch = self._epochs.get(place.shard, 0)
        else:
            self._epochs[place.shard] = epoch
        sequence = self._sequence[host] = self._sequence.get(host, 0) + 1
        values = {**report, "epoch": epoch, "sequence": sequence, UNFENCED: unfenced}
        body = json.dumps(values, separators=(",", ":")).encode("ascii")
        if unfenced:
            self._unfenced(body)
        if self._reports >= MAX_WAITING_REPORTS:
            self.dropped_reports += 1
            log.error(
                "%s: a report was lost: %d already wait for the database", host, self._reports
            )
            return
        self._reports += 1
        made = Outgoing(
            id=uuid.UUID(str(report["id"])), sequence=sequence, body=body, was_sent=unfenced
        )
        place.reports.append(made)

    def send_overdue(self) -> None:
        """Send what has waited too long for the outbox: leases may be held while writes fail.

        The same bytes are written later, so that a receiver recognises them.
        """
        now = self._now()
        for place in self._waiting.values():
            if not place.overdue and now - place.since_s > self._overdue_s:
                place.overdue = True
                for report in place.reports:
                    if not report.was_sent:
                        self._unfenced(report.body)

    @property
    def waiting_reports(self) -> int:
        """Reports that are not in the outbox yet."""
        return self._reports

    def oldest_s(self) -> float:
        """How long the oldest update has waited, in seconds; 0 where none waits."""
        return max((self._now() - place.since_s for place in self._waiting.values()), default=0.0)

    def take(self) -> tuple[Mapping[int, int], list[Update]]:
        """What can be written now, with the epochs for it."""
        for host, record in self._records.take_changed().items():
            self._place(host).record = record
        now = self._now()
        epochs = self._holdings.epochs(now)
        updates = []
        for host, place in list(self._waiting.items()):
            if place.shard in epochs:
                updates.append(_update_of(host, place, now))
                del self._waiting[host]
                self._reports -= len(place.reports)
        used = {update.shard for update in updates}
        return {shard: epoch for shard, epoch in epochs.items() if shard in used}, updates

    def put_back(self, updates: Iterable[Update]) -> None:
        """Take back what was not written, because the database did not answer; newer results are kept."""
        for update in updates:
            if update.host not in self._sequence:
                continue  # forgotten meanwhile
            place = self._place(update.host)
            place.overdue |= update.overdue
            place.since_s = min(place.since_s, update.made_s - update.waits_s)
            place.record = place.record or update.record
            if place.settled is None and update.verdict is not None:
                place.settled = Settled(
                    update.host, update.verdict, update.reason, update.good_for_s, None
                )
                place.settled_at_s = update.made_s - update.age_s
            place.reports[:0] = update.reports
            self._reports += len(update.reports)


def _update_of(host: str, place: _Waiting, now: float) -> Update:
    update = Update(
        host=host,
        shard=place.shard,
        made_s=now,
        record=place.record,
        reports=tuple(place.reports),
        waits_s=now - place.since_s,
        overdue=place.overdue,
    )
    settled = place.settled
    if settled is None:
        return update
    return dataclasses.replace(
        update,
        verdict=Verdict(settled.verdict.state, settled.verdict.error),
        reason=settled.reason,
        age_s=now - place.settled_at_s,
        good_for_s=settled.good_for_s,
    )
