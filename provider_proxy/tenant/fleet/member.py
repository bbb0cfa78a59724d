"""A member of a fleet: holds shards, watches their hosts, writes what it finds under their leases.

    run ─┬─ _renew      keeps the leases, takes and gives back shards; starts and stops hosts
         ├─ hosts       a task a host, as in `watch`
         ├─ served      starts hosts of new shards, applies imported changes
         ├─ _write      verdicts, clock states and reports, in batches
         ├─ delivery    the outbox, until every receiver has each report
         └─ reporter    sinks; reports without a lease go there at once

While the database is not reachable, no shard can be taken over, so the member keeps watching its hosts,
from memory. Its reports say `unfenced` once its own deadline has passed. When the database is back, every
member takes its own shards again before it takes others.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial

import trio

from provider_proxy.common import memory
from provider_proxy.common.addresses import split_address
from provider_proxy.errors import HostError, ProviderProxyError, first_of
from provider_proxy.tenant.fleet import leases, overview, rows, schema
from provider_proxy.tenant.fleet.admin import FleetAdmin, Standing
from provider_proxy.tenant.fleet.database import Database, DatabaseError, Lane, read_address
from provider_proxy.tenant.fleet.delivery import Delivery
from provider_proxy.tenant.fleet.eks import FleetEks
from provider_proxy.tenant.fleet.hosts import PolicyCache
from provider_proxy.tenant.fleet.lease import Holdings, LeaseTimes
from provider_proxy.tenant.fleet.metrics import FleetMetrics
from provider_proxy.tenant.fleet.seen import SeenRecords
from provider_proxy.tenant.fleet.served import Served
from provider_proxy.tenant.fleet.writer import Writer
from provider_proxy.tenant.watch.alive import beat
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.ek_directory import EkDirectory
from provider_proxy.tenant.watch.host import Shared
from provider_proxy.tenant.watch.http_server import TenantHttpServer, listen
from provider_proxy.tenant.watch.metrics import WatchMetrics, write_often
from provider_proxy.tenant.watch.reports import (
    DRAIN_LIMIT_S,
    Reporter,
    Settled,
    open_sinks,
)
from provider_proxy.tenant.watch.tables import WatchConfig

log = logging.getLogger(__name__)

WRITE_EVERY_S = 0.2  # a batch; 10,000 hosts at 10 s make 200 verdicts each
LOOK_EVERY_S = 20.0
UNREADY_S = 30.0  # with unsaved results
LEASE_LIMIT_S = 3.0  # for a renewal: a slower answer is of no use


def boottime_s() -> float:
    """A clock that also counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class FleetMember:
    """One process of a fleet.

    Args:
        config: the watcher's file; the hosts come from the database instead.
        address: of the database.
        name: for people.
        version: this program's.
        write: for JSON lines; None for no output.
        times: how long leases last.

    Raises:
        UsageError: the address is wrong, or holds a password.
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
        self._records = SeenRecords()
        self._holdings = Holdings(self._times)
        self._cache = PolicyCache(config.state_dir / "policies")
        self._eks: FleetEks | None = None
        self._epochs: dict[int, int] = {}  # the highest that this member has seen of each shard
        self._grace = 0  # renewals left in which it takes only its own shards
        self._away = True  # until it has answered
        self._draining = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until SIGTERM or SIGINT; give everything back at the end. SIGHUP reads everything again.

        Raises:
            HostError: the database is not reachable at the start, or stdout was closed.
        """
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
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
            self._reporter = Reporter(
                await open_sinks(stack, self._config, self._write_line, rng=self._rng), self.metrics
            )
            # The outbox retries by itself, so an hour without a receiver delays nothing else.
            once = dataclasses.replace(self._config.webhook, max_tries=1)
            sinks = await open_sinks(
                stack,
                dataclasses.replace(self._config, webhook=once),
                self._write_line,
                rng=self._rng,
            )
            self._writer = Writer(
                self._records,
                self._holdings,
                shards,
                now=self._now,
                unfenced=self._unfenced,
            )
            shared = Shared(
                store=self._records,
                metrics=self.metrics,
                tell=self._writer.tell,
                settled=self._settled,
                budget=Budget(),
                rng=self._rng,
            )
            self._served = Served(
                self._database,
                self._cache,
                self._records,
                self._writer,
                shared,
                metrics=self.metrics,
                write=self._write_once,
                rng=self._rng,
            )
            eks = self._eks = self._open_eks(stack)
            async with trio.open_nursery() as outer:
                outer.start_soon(self._reporter.run)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._renew)
                    nursery.start_soon(self._served.run, nursery)
                    nursery.start_soon(self._served.refresh, nursery)
                    nursery.start_soon(self._write)
                    delivery = Delivery(self._database, sinks, self._held, rng=self._rng)
                    nursery.start_soon(delivery.run)
                    nursery.start_soon(delivery.clean)
                    nursery.start_soon(self._look)
                    nursery.start_soon(beat, *(() if eks is None else (eks.is_true,)))
                    if eks is not None:
                        nursery.start_soon(eks.run)
                    nursery.start_soon(memory.collect)
                    if self._config.admin is not None:
                        nursery.start_soon(self._show, self._config.admin)
                    nursery.start_soon(
                        write_often,
                        self.metrics,
                        self._config.metrics,
                        lambda: [host.state for host in self._served.hosts.values()],
                    )
                    nursery.start_soon(beat)
                    task_status.started()
                    async for number in signals:
                        if number != signal.SIGHUP:
                            break
                        log.info("reading all hosts and TLS files again")
                        await self._write_or_log()
                        self._served.begin_again()
                    log.info("stopping")
                    nursery.cancel_scope.cancel()
                await self._leave()
                self._reporter.close()
                outer.cancel_scope.deadline = trio.current_time() + DRAIN_LIMIT_S

    def _open_eks(self, stack: AsyncExitStack) -> FleetEks | None:
        """Raises: HostError: the directory cannot be used."""
        if self._config.ek_dir is None:
            return None
        directory = EkDirectory(self._config.ek_dir)
        directory.open()
        stack.callback(directory.close)
        return FleetEks(self._database, self._cache, directory, lambda: self._served.hosts)

    def _settled(self, settled: Settled) -> None:
        self._writer.settled(settled)
        if self._eks is not None:
            self._eks.settled(settled)

    def _unfenced(self, body: bytes) -> None:
        self.fleet_metrics.unfenced_reports.inc()
        self._reporter.tell_body(body)

    def standing(self) -> Standing:
        """The status of this member."""
        unsaved_s = self._writer.oldest_s()
        trouble = None
        if self._away:
            trouble = "the database is not reachable; hosts are watched from memory"
        elif unsaved_s > UNREADY_S:
            trouble = f"results have not been saved for {unsaved_s:.0f} s"
        elif self._draining:
            trouble = "draining: this member was told to give its shards back"
        return Standing(self._member.name, self._member.version, trouble)

    def _metrics_text(self) -> bytes:
        self.metrics.count_states(host.state for host in self._served.hosts.values())
        return self.metrics.text()

    async def _show(self, address: str) -> None:
        """Serve the page, for ever. Raises: HostError where the port cannot be opened."""
        ip, port = split_address(address)
        try:
            listener = listen(ip, port)
        except OSError as exc:
            raise HostError(f"admin: cannot listen at {address}: {exc.strerror}") from exc
        admin = FleetAdmin(self._database, self.standing, self._metrics_text)
        await TenantHttpServer(admin.answer, None).serve(listener)

    async def _look(self) -> None:
        """Query the whole fleet at an interval, for its history and the metrics, for ever."""
        metrics = self.fleet_metrics
        while True:
            await trio.sleep(LOOK_EVERY_S * self._rng.uniform(0.5, 1))
            try:
                await self._database.run(overview.remember)
                states = await self._database.run(overview.latest)
                waiting = partial(overview.waiting, shards=self._held())
                count, age_s = await self._database.run(waiting)
            except DatabaseError as exc:
                log.warning("cannot query the fleet: %s", exc)
                continue
            metrics.hosts.clear()
            for state, hosts in states.items():
                metrics.hosts.labels(state).set(hosts)
            metrics.outbox_reports.set(count)
            metrics.outbox_seconds.set(age_s)

    async def _leave(self) -> None:
        """Write what is unsaved, then give the shards back, so that others need not wait."""
        try:
            await self._write_once()
            await self._database.run(partial(leases.leave, member=self._member), limit_s=5)
        except DatabaseError as exc:
            log.error("cannot give the shards back, others wait for the leases to end: %s", exc)

    async def _renew(self) -> None:
        """Keep the leases, for ever; start and stop hosts as shards come and go."""
        while True:
            begin = trio.current_time()
            asked_s = self._now()
            try:
                share = await self._database.run(
                    partial(
                        leases.renew,
                        member=self._member,
                        own_only=self._grace > 0,
                        seen=dict(self._epochs),
                    ),
                    limit_s=LEASE_LIMIT_S,
                    lane=Lane.LEASES,
                )
            except DatabaseError as exc:
                self._is_away(exc)
            else:
                self._is_back()
                self._grace = max(0, self._grace - 1)
                self._hold(asked_s, share)
            await trio.sleep_until(begin + self._times.renew_s)

    @property
    def _grace_renewals(self) -> int:
        """As many renewals as a lease lasts: by then every member is back."""
        return 1 + round(self._times.lease_s / self._times.renew_s)

    def _held(self) -> list[int]:
        """The shards that may be served now."""
        return list(self._holdings.epochs(self._now()))

    def _is_away(self, error: DatabaseError) -> None:
        if not self._away:
            log.error("%s; hosts are watched from memory", error)
        self._away = True
        # After an outage every lease may have expired: first every member takes back its own.
        self._grace = self._grace_renewals
        self.fleet_metrics.database_up.set(0)

    def _is_back(self) -> None:
        if self._away and self._grace:
            log.warning("the database is back")
        self._away = False
        self.fleet_metrics.database_up.set(1)

    def _hold(self, asked_s: float, share: leases.Share) -> None:
        """Start and stop hosts so that those of the held shards run."""
        self._holdings.granted(asked_s, share.epochs)
        if share.lapsed:
            self._grace = self._grace_renewals
        if share.rolled_back:
            self.fleet_metrics.rolled_back.inc(share.rolled_back)
            log.error(
                "in %d shards the database is older than what this member has seen, which is kept. "
                "If a backup was restored, run `provider-proxy fleet restored`",
                share.rolled_back,
            )
        for shard, epoch in share.epochs.items():
            self._epochs[shard] = max(epoch, self._epochs.get(shard, 0))
        new = self._served.hold(share.epochs, share.fresh)
        self.fleet_metrics.shards.set(len(share.epochs))
        self.fleet_metrics.members.set(share.members)
        self.fleet_metrics.free_shards.set(share.free)
        self._draining = share.draining
        if new:
            self.fleet_metrics.takeovers.inc(new)
            log.info("holding %d of the fleet's shards, %d of them new", len(share.epochs), new)

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
                log.error("cannot save results yet: %s", exc)
            self._writer.send_overdue()
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
                partial(
                    rows.write,
                    member=self._member,
                    epochs=epochs,
                    updates=updates,
                    now=self._now,
                )
            )
        finally:
            if good is None:
                self._writer.put_back(updates)
        lost = set(epochs) - good
        if lost:
            self.fleet_metrics.refused_writes.inc(len(lost))
            self._holdings.drop(lost)
            self._served.lost(lost)
