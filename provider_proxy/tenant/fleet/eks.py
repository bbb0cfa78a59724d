"""`ek_dir` in a fleet: every member that has one keeps a file for each EK of the whole fleet.

A SPIRE server reads one directory, and VMs may be on any host. So a member uses its own hosts' verdicts
as they come, and those of all others from the database. A file lives as long as a verdict's proof,
counted from the verdict, even while the database is not reachable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from psycopg import Connection

from provider_proxy.errors import ProviderProxyError
from provider_proxy.evidence.vtpm_link import spire_name
from provider_proxy.tenant.fleet import rows
from provider_proxy.tenant.fleet.database import Database, DatabaseError
from provider_proxy.tenant.fleet.hosts import PolicyCache, rules_from_json
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.watch.ek_directory import EkDirectory, lives_s
from provider_proxy.tenant.watch.host import HostWatch
from provider_proxy.tenant.watch.reports import Settled
from provider_proxy.tenant.watch.states import State

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
KEY = "vm_ek"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A host that is trusted now, with the link of its VM's EK proven.

    Attributes:
        digest: of the EK file, in the table of policies.
        age_s: of the verdict, in seconds.
    """

    host: str
    digest: str
    rules: Mapping[str, object]
    age_s: float


def read_proofs(connection: Connection[Any]) -> list[Proof]:
    """All hosts with an EK whose verdict is TRUSTED and recent enough."""
    found = connection.execute(
        "select h.name, h.files->>'vm_ek', h.rules,"
        " extract(epoch from fleet_now() - s.verdict_at)::float8"
        " from host h join host_state s on s.name = h.name"
        " where h.files ? 'vm_ek' and s.verdict = 'TRUSTED' and s.fresh_until > fleet_now()"
        " and s.verdict_at <= fleet_now() + interval '1 s'"
    )
    return [
        Proof(host=host, digest=digest, rules=rules, age_s=max(0.0, age_s))
        for host, digest, rules, age_s in found
    ]


class FleetEks:
    """Keeps the directory.

    Args:
        own: the hosts that this member watches itself.
    """

    def __init__(
        self,
        database: Database,
        cache: PolicyCache,
        directory: EkDirectory,
        own: Callable[[], Mapping[str, HostWatch]],
    ) -> None:
        self._database = database
        self._cache = cache
        self._directory = directory
        self._own = own
        self._names: dict[str, str] = {}  # of EKs, by digest
        self._others: set[str] = set()  # hosts that other members have proven

    def settled(self, settled: Settled) -> None:
        """Note the end of a round of one of this member's hosts."""
        host = self._own().get(settled.host)
        if host is None or host.ek_name is None:
            return
        if settled.verdict.state is State.TRUSTED:
            self._directory.proven(settled.host, host.ek_name, lives_s(host.rules))
        else:
            self._directory.refuted(settled.host)

    def is_true(self) -> bool:
        """Whether the directory shows nothing that is no longer proven."""
        return self._directory.is_true()

    async def run(self) -> None:
        """Follow the database, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._directory.run)
            while True:
                try:
                    await self.look()
                except DatabaseError as exc:
                    log.warning("ek_dir has only what this member proves itself: %s", exc)
                await trio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Read what other members have proven. Raises: DatabaseError."""
        proofs = await self._database.run(read_proofs)
        proven = set()
        for proof in proofs:
            if proof.host in self._own():
                continue
            try:
                life_s = lives_s(rules_from_json(proof.host, proof.rules, {})) - proof.age_s
                name = await self._name_of(proof.digest)
            except DatabaseError:
                raise
            except ProviderProxyError as exc:
                log.error("ek_dir: %s: %s", proof.host, exc)
                continue
            if life_s > 0:
                proven.add(proof.host)
                self._directory.proven(proof.host, name, life_s)
        for host in self._others - proven - self._own().keys():
            self._directory.refuted(host)
        self._others = proven

    async def _name_of(self, digest: str) -> str:
        """The file name of an EK in `ek_directory`. Raises: DatabaseError, HostError, UsageError."""
        if digest not in self._names:
            if not await trio.to_thread.run_sync(self._cache.has, digest):
                data = await self._database.run(partial(rows.read_policy, digest=digest))
                await trio.to_thread.run_sync(self._cache.put, digest, data)
            self._names[digest] = spire_name(PolicyFiles().ek(self._cache.path_of(digest)))
        return self._names[digest]
