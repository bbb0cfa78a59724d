"""The hosts of the shards that a member holds: read from the database, started, stopped, updated.

Reading and starting tens of thousands of hosts takes seconds, and leases are renewed every second. So
this is a separate task that handles a few shards at a time and lets others run in between. A shard that
is lost meanwhile is not started.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import trio
from psycopg import Connection

from provider_proxy.errors import HostError, ProviderProxyError
from provider_proxy.evidence.vtpm_link import spire_name
from provider_proxy.tenant.fleet import rows, schema
from provider_proxy.tenant.fleet.database import Database, DatabaseError
from provider_proxy.tenant.fleet.hosts import PolicyCache, RowAks, rules_from_json
from provider_proxy.tenant.fleet.seen import SeenRecords
from provider_proxy.tenant.fleet.writer import Writer
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.watch.host import HostWatch, Shared
from provider_proxy.tenant.watch.metrics import WatchMetrics
from provider_proxy.tenant.watch.policy import HostPolicy
from provider_proxy.tenant.watch.questions import Setting
from provider_proxy.tenant.watch.watcher import STARTS_PER_S, Endpoints

log = logging.getLogger(__name__)

REFRESH_EVERY_S = 2.0
SHARDS_AT_ONCE = 4
HOSTS_AT_ONCE = 20  # started before other tasks may run: some 5 ms
AGAIN_S = 1.0  # until hosts that could not be read are read again


class Served:
    """Starts and stops hosts.

    Args:
        write: writes what is known of all hosts; raises DatabaseError.
        shared: what the hosts have in common.
    """

    def __init__(
        self,
        database: Database,
        cache: PolicyCache,
        records: SeenRecords,
        writer: Writer,
        shared: Shared,
        *,
        metrics: WatchMetrics,
        write: Callable[[], Any],
        rng: random.Random,
    ) -> None:
        self._database = database
        self._cache = cache
        self._records = records
        self._writer = writer
        self._shared = shared
        self._metrics = metrics
        self._write = write
        self._rng = rng
        self._aks = RowAks()
        self._endpoints = Endpoints()
        self._scopes: dict[str, trio.CancelScope] = {}
        self._shards: dict[str, int] = {}  # of the hosts that run
        self._changes: dict[int, int] = {}  # of each shard that is served: the newest change seen
        self._todo: set[int] = set()  # held, and not served yet
        self._wake = trio.Event()
        self._next_due_s = 0.0
        self._hosts_change = -1  # of the database's hosts, as last read
        self.hosts: dict[str, HostWatch] = {}

    def hold(self, shards: Iterable[int], fresh: Iterable[int]) -> int:
        """Set the shards that are held now.

        Args:
            fresh: another member had them since, or may have: what is known of their hosts is old.

        Returns:
            How many of them are new.
        """
        held, old = set(shards), set(fresh)
        self._drop([shard for shard in self._changes if shard not in held or shard in old])
        new = held - self._changes.keys() - self._todo
        self._todo = (self._todo & held) | new
        if new:
            self._wake.set()
        return len(new)

    def begin_again(self) -> None:
        """Read the hosts of all shards again, with the TLS files as they are now."""
        self._endpoints = Endpoints()
        shards = list(self._changes)
        self._drop(shards)
        self._todo |= set(shards)
        self._wake.set()

    def lost(self, shards: Iterable[int]) -> None:
        """Drop shards that another member has: the database refused a write."""
        self._drop([shard for shard in shards if shard in self._changes])

    def _drop(self, shards: Sequence[int]) -> None:
        for shard in shards:
            del self._changes[shard]
        if shards:
            self._stop([name for name, shard in self._shards.items() if shard not in self._changes])

    async def run(self, nursery: trio.Nursery) -> None:
        """Start the hosts of new shards, for ever."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._todo:
                shards = sorted(self._todo)[:SHARDS_AT_ONCE]
                try:
                    await self._begin(nursery, shards)
                except DatabaseError as exc:
                    log.error("cannot read the hosts of %d shards: %s", len(shards), exc)
                    await trio.sleep(AGAIN_S)

    async def _begin(self, nursery: trio.Nursery, shards: Sequence[int]) -> None:
        since = dict.fromkeys(shards, rows.ALL)

        def read(
            connection: Connection[Any],
        ) -> tuple[list[rows.HostRow], dict[str, rows.Known]]:
            with connection.transaction():
                return rows.read_hosts(connection, since), rows.read_known(connection, shards)

        waiting = len(self._todo)
        found, known = await self._database.run(read)
        await self._fetch_policies(found)
        mine = [shard for shard in shards if shard in self._todo]  # and not lost meanwhile
        self._todo.difference_update(mine)
        self._changes |= {shard: since[shard] for shard in mine}
        await self._start(nursery, found, known, of_all=len(found) * waiting / len(shards))

    async def _fetch_policies(self, found: Iterable[rows.HostRow]) -> None:
        """Make sure that the policies of some hosts are on this machine. Raises: DatabaseError."""
        wanted = {digest for row in found for digest in row.files.values()}
        for digest in sorted(wanted):
            if not await trio.to_thread.run_sync(self._cache.has, digest):
                data = await self._database.run(partial(rows.read_policy, digest=digest))
                try:
                    await trio.to_thread.run_sync(self._cache.put, digest, data)
                except HostError as exc:  # its hosts are not watched, the others are
                    log.error("policy %s: %s", digest, exc)

    async def _start(
        self,
        nursery: trio.Nursery,
        found: Sequence[rows.HostRow],
        known: Mapping[str, rows.Known],
        *,
        of_all: float,
    ) -> None:
        """Watch these from now on; their first rounds are spread over at most an interval.

        Args:
            of_all: about how many hosts begin now, these included.
        """
        files = PolicyFiles()
        self._next_due_s = max(self._next_due_s, trio.current_time())
        for number, row in enumerate(found):
            if number % HOSTS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if row.shard not in self._changes:
                continue  # lost meanwhile
            self._changes[row.shard] = max(row.change, self._changes[row.shard])
            self._stop([row.name])
            what = known.get(row.name) or rows.NOTHING
            try:
                if what.damage is not None:
                    raise HostError(what.damage)
                setting = self._setting(row, files)
            except ProviderProxyError as exc:
                log.error("%s is not watched: %s", row.name, exc)
                continue
            self._records.begin(row.name, what.record)
            self._writer.begin(row.name, what.sequence)
            host = HostWatch(row.name, setting, self._shared, last=what.verdict)
            self.hosts[row.name], self._shards[row.name] = host, row.shard
            scope = self._scopes[row.name] = trio.CancelScope()
            if setting.endpoint is None:
                continue
            nursery.start_soon(_within, scope, host, self._next_due_s)
            self._next_due_s += min(
                1 / STARTS_PER_S, setting.rules.interval_s / max(of_all, len(found))
            )

    def _setting(self, row: rows.HostRow, files: PolicyFiles) -> Setting:
        """How a host is asked and judged. Raises: UsageError, HostError: its row is wrong."""
        paths = {key: self._cache.path_of(digest) for key, digest in row.files.items()}
        rules = rules_from_json(row.name, row.rules, paths)
        endpoint = None
        if rules.need_provider_quote:
            self._aks.put(row.name, row.pin)
            HostPolicy(rules, files)
            endpoint = self._endpoints.of(row.name, rules)
        ek_name = None if rules.vm_ek is None else spire_name(files.ek(rules.vm_ek))
        return Setting(rules=rules, files=files, aks=self._aks, endpoint=endpoint, ek_name=ek_name)

    def _stop(self, names: Iterable[str]) -> None:
        for name in [name for name in names if name in self._scopes]:
            self._scopes.pop(name).cancel()
            del self.hosts[name], self._shards[name]
            self._records.forget(name)
            self._writer.forget([name])
            self._aks.forget(name)
            self._metrics.forget_host(name)

    async def refresh(self, nursery: trio.Nursery) -> None:
        """Apply imported changes, for ever."""
        while True:
            await trio.sleep(REFRESH_EVERY_S)
            try:
                await self._refresh_once(nursery)
            except DatabaseError as exc:
                log.warning("cannot apply imported changes now: %s", exc)

    async def _refresh_once(self, nursery: trio.Nursery) -> None:
        """Raises: DatabaseError."""
        change = await self._database.run(schema.change_of)
        if change == self._hosts_change:
            return
        since = dict(self._changes)
        shards = list(since)
        changed = await self._database.run(partial(rows.read_hosts, since=since))
        names = await self._database.run(partial(rows.read_names, shards=shards))
        await self._fetch_policies(changed)
        await self._write()  # save what is known of them, before it is read again
        read = partial(rows.read_known, shards=shards, names=[row.name for row in changed])
        known = await self._database.run(read)
        gone = [n for n, shard in self._shards.items() if shard in since and n not in names]
        self._stop(gone)
        await self._start(nursery, changed, known, of_all=len(changed))
        self._hosts_change = change
        if changed or gone:
            log.info(
                "applied imported changes: %d hosts new or changed, %d removed",
                len(changed),
                len(gone),
            )


async def _within(scope: trio.CancelScope, host: HostWatch, due_s: float) -> None:
    with scope:
        await host.run(due_s)
