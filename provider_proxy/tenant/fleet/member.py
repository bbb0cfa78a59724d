"""A member of a fleet: holds shards, watches their hosts, writes what it finds under their leases.

    run ─┬─ _renew      keeps the leases, takes and gives back shards; starts and stops hosts
         ├─ hosts       a task a host, as in `watch`
         ├─ _refresh    takes up changes that were imported
         ├─ _write      verdicts, clock states and reports, in batches
         ├─ delivery    the outbox, until every receiver has each report
         └─ reporter    sinks; reports that no lease covers go there at once

While the database is away nobody can take a shard over, or nobody can say so: the member goes on with
the hosts that it has, from memory. Its reports say `unfenced` once its own deadline has passed. When the
database is back every member takes its own shards again before it looks at others'.
"""

from __future__ import annotations

import logging
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import trio
from psycopg import Connection

from provider_proxy.common import memory
from provider_proxy.errors import ConfigError, ProviderProxyError, first_of
from provider_proxy.tenant.fleet import leases, rows, schema
from provider_proxy.tenant.fleet.database import Database, DatabaseError, read_address
from provider_proxy.tenant.fleet.delivery import Delivery
from provider_proxy.tenant.fleet.hosts import PolicyCache, RowAks, rules_from_json
from provider_proxy.tenant.fleet.lease import Holdings, LeaseTimes
from provider_proxy.tenant.fleet.metrics import FleetMetrics
from provider_proxy.tenant.fleet.writer import Writer
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.host import HostWatch, Shared
from provider_proxy.tenant.watch.metrics import WatchMetrics, write_often
from provider_proxy.tenant.watch.policy import HostPolicy
from provider_proxy.tenant.watch.questions import Setting
from provider_proxy.tenant.watch.reports import DRAIN_LIMIT_S, Reporter, open_sinks
from provider_proxy.tenant.watch.store import HostRecords
from provider_proxy.tenant.watch.tables import WatchConfig
from provider_proxy.tenant.watch.watcher import STARTS_PER_S, Endpoints

log = logging.getLogger(__name__)

WRITE_EVERY_S = 0.2  # a batch; 10,000 hosts at 10 s make 200 verdicts each
REFRESH_EVERY_S = 2.0
LEASE_LIMIT_S = 3.0  # for a renewal: a slower answer is of no use


def boottime_s() -> float:
    """A clock that also counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class FleetMember:
    """One process of a fleet.

    Args:
        config: the watcher's file; its hosts do not count, the database's do.
        address: of the database.
        name: for people.
        version: this program's.
        write: for JSON lines; None for none.
        times: how long leases last.

    Raises:
        UsageError: the address is wrong, or holds a password; ek_dir is set.
    """

    def __init__(
        self,
        config: WatchConfig,
        address: str,
        *,
        name: str,
        version: str,
        write: Callable[[bytes], object] | None = None,
        times: LeaseTimes | None = None,
        rng: random.Random | None = None,
        now: Callable[[], float] = boottime_s,
    ) -> None:
        if config.ek_dir is not None:
            raise ConfigError("ek_dir is for a watcher of its own file: leave it out, or state")
        self._config = config
        self._database = Database(read_address(address, name=name))
        self._times = times or LeaseTimes()
        self._member = leases.Member(
            id=uuid.uuid4(), name=name, version=version, lease_s=self._times.lease_s
        )
        self._write_line = write
        self._rng = rng or random.Random()  # noqa: S311  # spreads; no secret
        self._now = now
        self.metrics = WatchMetrics()
        self.fleet_metrics = FleetMetrics(self.metrics.registry)
        self._budget = Budget()
        self._records = HostRecords()
        self._holdings = Holdings(self._times)
        self._aks = RowAks()
        self._cache = PolicyCache(config.state_dir / "policies")
        self._endpoints = Endpoints()
        self._scopes: dict[str, trio.CancelScope] = {}
        self._shards: dict[str, int] = {}  # of the hosts that run
        self._changes: dict[int, int] = {}  # of each shard that is served: the newest change seen
        self._grace = 0  # renewals left in which only one's own shards are taken
        self._away = False
        self.hosts: dict[str, HostWatch] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until SIGTERM or SIGINT; give everything back on the way out.

        Raises:
            HostError: the database is away at the start, or nobody reads stdout any more.
        """
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            try:
                await self._serve(signals, task_status)
            except BaseExceptionGroup as group:
                ours, others = group.split(ProviderProxyError)
                if ours is None or others is not None:
                    raise
                raise first_of(ours) from group
            finally:
                self._database.close()

    async def _serve(self, signals: AsyncIterator[int], task_status: trio.TaskStatus[None]) -> None:
        shards = await self._database.run(schema.shards_of)
        async with AsyncExitStack() as stack:
            self._sinks = await open_sinks(stack, self._config, self._write_line, rng=self._rng)
            self._reporter = Reporter(self._sinks, self.metrics)
            self._writer = Writer(
                self._records,
                self._holdings,
                shards,
                now=self._now,
                unfenced=self._reporter.tell_body,
            )
            async with trio.open_nursery() as outer:
                outer.start_soon(self._reporter.run)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._renew, nursery)
                    nursery.start_soon(self._refresh, nursery)
                    nursery.start_soon(self._write)
                    delivery = Delivery(self._database, self._sinks, self._held, rng=self._rng)
                    nursery.start_soon(delivery.run)
                    nursery.start_soon(delivery.clean)
                    nursery.start_soon(memory.collect)
                    nursery.start_soon(
                        write_often,
                        self.metrics,
                        self._config.metrics,
                        lambda: [host.state for host in self.hosts.values()],
                    )
                    task_status.started()
                    async for _ in signals:
                        break
                    log.info("stopping")
                    nursery.cancel_scope.cancel()
                await self._leave()
                self._reporter.close()
                outer.cancel_scope.deadline = trio.current_time() + DRAIN_LIMIT_S

    async def _leave(self) -> None:
        """Write what is there, then give the shards back: others need not wait for the leases."""
        try:
            await self._write_once()
            await self._database.run(partial(leases.leave, member=self._member), limit_s=5)
        except DatabaseError as exc:
            log.error("not given back, others wait for the leases to end: %s", exc)

    async def _renew(self, nursery: trio.Nursery) -> None:
        """Keep the leases, for ever; start and stop hosts as shards come and go."""
        while True:
            begin = trio.current_time()
            asked_s = self._now()
            try:
                share = await self._database.run(
                    partial(leases.renew, member=self._member, own_only=self._grace > 0),
                    limit_s=LEASE_LIMIT_S,
                )
            except DatabaseError as exc:
                self._is_away(exc)
            else:
                self._grace = max(0, self._grace - 1)
                self._is_back()
                await self._hold(nursery, asked_s, share)
            await trio.sleep_until(begin + self._times.renew_s)

    def _held(self) -> list[int]:
        """The shards that may be served now."""
        return list(self._holdings.epochs(self._now()))

    def _is_away(self, error: DatabaseError) -> None:
        if not self._away:
            log.error("%s; watching on from memory", error)
        self._away = True
        # After an outage every lease may have run out: first everybody takes back its own.
        self._grace = 1 + round(self._times.lease_s / self._times.renew_s)
        self.fleet_metrics.database_up.set(0)

    def _is_back(self) -> None:
        if self._away:
            log.warning("the database is back")
        self._away = False
        self.fleet_metrics.database_up.set(1)

    async def _hold(self, nursery: trio.Nursery, asked_s: float, share: leases.Share) -> None:
        """Make the hosts that run those of the shards that are held."""
        self._holdings.granted(asked_s, share.epochs)
        for shard in [s for s in self._changes if s not in share.epochs or s in share.fresh]:
            del self._changes[shard]
        self._stop_hosts([n for n, shard in self._shards.items() if shard not in self._changes])
        self.fleet_metrics.shards.set(len(share.epochs))
        self.fleet_metrics.members.set(share.members)
        new = sorted(share.epochs.keys() - self._changes.keys())
        if new:
            self.fleet_metrics.takeovers.inc(len(new))
            log.info(
                "holding %d of the fleet's shards, %d of them new", len(share.epochs), len(new)
            )
            await self._start_shards(nursery, new)

    async def _start_shards(self, nursery: trio.Nursery, shards: Sequence[int]) -> None:
        since = dict.fromkeys(shards, rows.ALL)

        def read(
            connection: Connection[Any],
        ) -> tuple[list[rows.HostRow], dict[str, rows.Known]]:
            with connection.transaction():
                return rows.read_hosts(connection, since), rows.read_known(connection, shards)

        try:
            found, known = await self._database.run(read)
            await self._fetch_policies(found)
        except DatabaseError as exc:
            log.error("cannot read the hosts of %d shards: %s", len(shards), exc)
            self._holdings.drop(shards)
            return
        self._changes |= since
        self._start_hosts(nursery, found, known)

    async def _fetch_policies(self, found: Iterable[rows.HostRow]) -> None:
        """Have the policies of some hosts on this machine."""
        wanted = {digest for row in found for digest in row.files.values()}
        for digest in sorted(wanted):
            if not await trio.to_thread.run_sync(self._cache.has, digest):
                data = await self._database.run(partial(rows.read_policy, digest=digest))
                await trio.to_thread.run_sync(self._cache.put, digest, data)

    def _start_hosts(
        self,
        nursery: trio.Nursery,
        found: Sequence[rows.HostRow],
        known: Mapping[str, rows.Known],
    ) -> None:
        """Watch these from now on; their beginnings are spread over an interval at most."""
        files = PolicyFiles()
        due_s = trio.current_time()
        for row in found:
            self._changes[row.shard] = max(row.change, self._changes[row.shard])
            self._stop_hosts([row.name])
            try:
                setting = self._setting(row, files)
            except ProviderProxyError as exc:
                log.error("%s is not watched: %s", row.name, exc)
                continue
            what = known.get(row.name)
            self._records.put(row.name, what.record if what is not None else None)
            self._writer.begin(row.name, what.sequence if what is not None else 0)
            shared = Shared(
                store=self._records,
                metrics=self.metrics,
                tell=self._writer.tell,
                settled=self._writer.settled,
                budget=self._budget,
                rng=self._rng,
            )
            last = what.verdict if what is not None else None
            host = HostWatch(row.name, setting, shared, last=last)
            self.hosts[row.name], self._shards[row.name] = host, row.shard
            scope = self._scopes[row.name] = trio.CancelScope()
            if setting.endpoint is None:
                continue
            nursery.start_soon(_within, scope, host, due_s)
            due_s += min(1 / STARTS_PER_S, setting.rules.interval_s / len(found))

    def _setting(self, row: rows.HostRow, files: PolicyFiles) -> Setting:
        """How a host is asked and judged. Raises: UsageError, HostError: its row is wrong."""
        paths = {key: self._cache.path_of(digest) for key, digest in row.files.items()}
        rules = rules_from_json(row.name, row.rules, paths)
        endpoint = None
        if rules.need_provider_quote:
            self._aks.put(row.name, row.pin)
            HostPolicy(rules, files)
            endpoint = self._endpoints.of(row.name, rules)
        return Setting(rules=rules, files=files, aks=self._aks, endpoint=endpoint)

    def _stop_hosts(self, names: Iterable[str]) -> None:
        for name in [name for name in names if name in self._scopes]:
            self._scopes.pop(name).cancel()
            del self.hosts[name], self._shards[name]
            self._records.forget(name)
            self._writer.forget([name])
            self._aks.forget(name)
            self.metrics.forget_host(name)

    async def _refresh(self, nursery: trio.Nursery) -> None:
        """Take up what was imported, for ever."""
        while True:
            await trio.sleep(REFRESH_EVERY_S)
            since = dict(self._changes)
            shards = list(since)
            try:
                changed = await self._database.run(partial(rows.read_hosts, since=since))
                names = await self._database.run(partial(rows.read_names, shards=shards))
                known = await self._database.run(partial(rows.read_known, shards=shards))
                await self._fetch_policies(changed)
            except DatabaseError as exc:
                log.warning("changes are not taken up: %s", exc)
                continue
            gone = [n for n, shard in self._shards.items() if shard in since and n not in names]
            self._stop_hosts(gone)
            mine = [row for row in changed if row.shard in self._changes]
            if mine:
                await self._write_or_log()  # what is known of them, before it is read again
                self._start_hosts(nursery, mine, known)
            if mine or gone:
                log.info("taken up: %d hosts new or changed, %d removed", len(mine), len(gone))

    async def _write(self) -> None:
        """Write what was found, for ever."""
        while True:
            await trio.sleep(WRITE_EVERY_S)
            await self._write_or_log()

    async def _write_or_log(self) -> None:
        try:
            await self._write_once()
        except DatabaseError as exc:
            if not self._away:
                log.error("not saved yet: %s", exc)
        self.fleet_metrics.unsaved_seconds.set(self._writer.oldest_s())
        self.fleet_metrics.lost_reports.set(self._writer.dropped_reports)

    async def _write_once(self) -> None:
        """Raises: DatabaseError; nothing is lost."""
        epochs, updates = self._writer.take()
        if not updates:
            return
        good: set[int] | None = None
        try:
            good = await self._database.run(
                partial(rows.write, member=self._member, epochs=epochs, updates=updates)
            )
        finally:
            if good is None:
                self._writer.put_back(updates)
        lost = set(epochs) - good
        if lost:
            self.fleet_metrics.refused_writes.inc(len(lost))
            self._holdings.drop(lost)
            for shard in lost:
                self._changes.pop(shard, None)
            self._stop_hosts([name for name, shard in self._shards.items() if shard in lost])


async def _within(scope: trio.CancelScope, host: HostWatch, due_s: float) -> None:
    with scope:
        await host.run(due_s)
