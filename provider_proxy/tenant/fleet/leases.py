"""The leases of shards in PostgreSQL: which member serves which hosts, by the database's clock.

Members find each other in the table `member`. Each renews what it holds, takes a fair share of the
free shards, and gives back what exceeds its share. A shard's epoch rises each time that it is taken, so
that a write under an old one is recognised and refused.

Synchronous: runs in the database's worker threads, each call one transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from provider_proxy.tenant.fleet import schema
from provider_proxy.tenant.fleet.lease import MAX_LEASE_S

# If the database's clock went back, ends far in the future would keep the shards of dead members locked.
_CLAMP_LEASES = """
update lease set until = fleet_now() + make_interval(secs => %(most)s)
where shard in (
    select shard from lease where until > fleet_now() + make_interval(secs => %(most)s)
    for update skip locked
)
"""
_CLAMP_MEMBERS = """
update member set until = fleet_now() + make_interval(secs => %(most)s)
where id in (
    select id from member where until > fleet_now() + make_interval(secs => %(most)s)
    for update skip locked
)
"""
_LAPSED = """
select until <= fleet_now() from member where id = %(me)s
"""
# If a higher epoch than the row's was seen, the database is older than before: a backup was restored, or
# a standby that lacked something took over. A holder gets the new epoch when it renews.
_RAISE = """
update lease set epoch = behind.epoch + 1
from (
    select lease.shard, seen.epoch from lease
    join unnest(%(seen_shards)s::int[], %(seen_epochs)s::bigint[]) as seen (shard, epoch)
        on seen.shard = lease.shard and seen.epoch > lease.epoch
    for update of lease skip locked
) as behind
where lease.shard = behind.shard
"""
_ALIVE = """
insert into member (id, name, version, knows, started, until)
values (%(me)s, %(name)s, %(version)s, %(knows)s, fleet_now(),
    fleet_now() + make_interval(secs => %(lease)s))
on conflict (id) do update set until = excluded.until
returning draining
"""
# Rows are locked in the order of shards everywhere: a member's own writes wait for them meanwhile.
_MINE = """
select shard from lease where owner = %(me)s order by shard for update
"""
_RENEW = """
update lease set until = fleet_now() + make_interval(secs => %(lease)s)
where owner = %(me)s and until > fleet_now()
returning shard, epoch
"""
_COUNT = """
select (select count(*) from member where until > fleet_now() and not draining),
       (select count(*) from lease),
       (select count(*) from lease where until <= fleet_now())
"""
_TAKE = """
update lease set owner = %(me)s, epoch = lease.epoch + 1,
    until = fleet_now() + make_interval(secs => %(lease)s)
from (
    select shard, owner from lease
    where until <= fleet_now() and (owner = %(me)s or not %(own_only)s)
    order by (owner = %(me)s) desc nulls last, random() limit %(want)s for update skip locked
) as free
where lease.shard = free.shard
returning lease.shard, lease.epoch, free.owner is not distinct from %(me)s
"""
_GIVE = """
update lease set owner = null, until = '-infinity'
where owner = %(me)s and shard = any(%(shards)s) and until > fleet_now()
"""
_FENCE = """
select shard from lease
where owner = %(me)s and until > fleet_now()
    and (shard, epoch) in (select * from unnest(%(shards)s::int[], %(epochs)s::bigint[]))
order by shard for share
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process of the fleet. Each start of a process is a member of its own.

    Attributes:
        name: for people: the machine where it runs.
        lease_s: how long its leases last, in seconds.
    """

    id: uuid.UUID
    name: str
    version: str
    lease_s: float

    def values(self) -> dict[str, object]:
        """As the statements need it."""
        return {
            "me": self.id,
            "name": self.name,
            "version": self.version,
            "knows": schema.VERSION,
            "lease": self.lease_s,
            "most": MAX_LEASE_S,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The answer to a renewal.

    Attributes:
        epochs: the shards that the member holds now, with their epochs.
        fresh: those of them that it did not hold before: what it knows of their hosts may be old.
        given: shards that it gave back, because others have less.
        members: how many members serve, including this one unless it drains.
        free: shards that no member holds.
        draining: this member was told to give its shards back.
        lapsed: its leases had expired; for a while it takes only what it held before.
        rolled_back: shards whose epoch was lower than this member had seen, and was raised.
    """

    epochs: Mapping[int, int]
    fresh: frozenset[int]
    given: frozenset[int]
    members: int
    free: int = 0
    draining: bool = False
    lapsed: bool = False
    rolled_back: int = 0


def renew(
    connection: Connection[Any],
    member: Member,
    *,
    own_only: bool = False,
    seen: Mapping[int, int] | None = None,
) -> Share:
    """Record that the member is alive, renew its leases, and move towards a fair share.

    A lease that has expired is not renewed, even if no member has taken it: between its end and now a
    member may have. It is taken again under a new epoch instead.

    Args:
        own_only: take only what this member held before. After an outage of the database every lease has
            expired, and each member should get its own shards back. A member whose own leases have
            expired does the same: this very call may have waited while the database was stopped.
        seen: the highest epoch that this member has seen of each shard; none is given out again.
    """
    values = member.values()
    known = {"seen_shards": list(seen or ()), "seen_epochs": list((seen or {}).values())}
    with connection.transaction():
        row = connection.execute(_LAPSED, values).fetchone()
        lapsed = bool(row and row[0])
        own_only = own_only or lapsed
        row = connection.execute(_ALIVE, values).fetchone()
        connection.execute(_CLAMP_MEMBERS, values)
        connection.execute(_MINE, values)
        raised = connection.execute(_RAISE, known).rowcount
        draining = bool(row and row[0])
        renewed = connection.execute(_RENEW, values).fetchall()
        held = dict(renewed)
        counted = connection.execute(_COUNT).fetchone()
        assert counted is not None
        members, shards, free = counted
        fair = 0 if draining else -(-shards // max(1, members))
        given = frozenset(sorted(held)[fair:])
        if given:
            connection.execute(_GIVE, values | {"shards": list(given)})
        fresh: set[int] = set()
        if len(held) < fair:
            more = values | {"want": fair - len(held), "own_only": own_only}
            for shard, epoch, was_mine in connection.execute(_TAKE, more).fetchall():
                held[shard] = epoch
                if not was_mine:
                    fresh.add(shard)
        connection.execute(_CLAMP_LEASES, values)
    kept = {shard: epoch for shard, epoch in held.items() if shard not in given}
    taken = len(held) - len(renewed)
    return Share(
        epochs=kept,
        fresh=frozenset(fresh),
        given=given,
        members=members,
        free=free - taken + len(given),
        draining=draining,
        lapsed=lapsed,
        rolled_back=raised,
    )


def leave(connection: Connection[Any], member: Member) -> None:
    """Give everything back at once, so that others need not wait for the leases to end."""
    values = member.values()
    with connection.transaction():
        connection.execute(_MINE, values)
        connection.execute(
            "update lease set owner = null, until = '-infinity' where owner = %(me)s", values
        )
        connection.execute("delete from member where id = %(me)s", values)


RESTORED_STEP = 1 << 32  # more epochs than members can use between a backup and its restoration


def restored(connection: Connection[Any]) -> int:
    """After a backup was restored, or an incomplete standby took over: start above all earlier epochs.

    Epochs rise above all that were given out since, and no old verdict is shown any more.

    Returns:
        How many verdicts are not shown any more.
    """
    with connection.transaction():
        connection.execute("select shard from lease order by shard for update")
        connection.execute(
            "update lease set owner = null, until = '-infinity', epoch = epoch + %s",
            (RESTORED_STEP,),
        )
        done = connection.execute(
            "update host_state set fresh_until = '-infinity' where fresh_until > '-infinity'"
        )
    return done.rowcount


def fenced(connection: Connection[Any], member: Member, epochs: Mapping[int, int]) -> set[int]:
    """Which of these leases are valid now. Call it first in the transaction that writes under them.

    The rows stay locked until that transaction ends, so no member takes the shards before.
    """
    values = member.values() | {"shards": list(epochs), "epochs": list(epochs.values())}
    return {shard for (shard,) in connection.execute(_FENCE, values)}
