"""The leases of shards in PostgreSQL: who serves which hosts, by the database's clock.

Members find each other in the table `member`. Each renews what it holds, takes a fair share of what
nobody holds, and gives back what is more than its share. A shard's epoch rises each time that it is
taken, so that a write under an old one can be told and refused.

Synchronous: runs in the database's worker threads, each call one transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

_ALIVE = """
insert into member (id, name, version, started, until)
values (%(me)s, %(name)s, %(version)s, fleet_now(), fleet_now() + make_interval(secs => %(lease)s))
on conflict (id) do update set until = excluded.until
returning draining
"""
_RENEW = """
update lease set until = fleet_now() + make_interval(secs => %(lease)s)
where owner = %(me)s and until > fleet_now()
returning shard, epoch
"""
_COUNT = """
select (select count(*) from member where until > fleet_now() and not draining),
       (select count(*) from lease)
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
        name: for people: where it runs.
        lease_s: how long its leases last, in seconds.
    """

    id: uuid.UUID
    name: str
    version: str
    lease_s: float

    def values(self) -> dict[str, object]:
        """As the statements take it."""
        return {
            "me": self.id,
            "name": self.name,
            "version": self.version,
            "lease": self.lease_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The answer to a renewal.

    Attributes:
        epochs: the shards that the member holds now, with their epochs.
        fresh: those of them that it did not hold last: what it knows of their hosts may be old.
        given: shards that it gave back, because others have less.
        members: how many members serve, this one included unless it drains.
    """

    epochs: Mapping[int, int]
    fresh: frozenset[int]
    given: frozenset[int]
    members: int


def renew(connection: Connection[Any], member: Member, *, own_only: bool = False) -> Share:
    """Say that the member lives, keep its leases, and move towards a fair share.

    A lease that has run out is not renewed, even where nobody has taken it: between its end and now
    somebody may have. It is taken again under a new epoch instead.

    Args:
        own_only: take only what this member held last. After an outage of the database every lease has
            run out, and everybody is to have its own again.
    """
    values = member.values()
    with connection.transaction():
        row = connection.execute(_ALIVE, values).fetchone()
        draining = bool(row and row[0])
        held = dict(connection.execute(_RENEW, values).fetchall())
        counted = connection.execute(_COUNT).fetchone()
        assert counted is not None
        members, shards = counted
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
    kept = {shard: epoch for shard, epoch in held.items() if shard not in given}
    return Share(epochs=kept, fresh=frozenset(fresh), given=given, members=members)


def leave(connection: Connection[Any], member: Member) -> None:
    """Give everything back at once: others need not wait for the leases to end."""
    with connection.transaction():
        connection.execute(
            "update lease set owner = null, until = '-infinity' where owner = %s", (member.id,)
        )
        connection.execute("delete from member where id = %s", (member.id,))


def fenced(connection: Connection[Any], member: Member, epochs: Mapping[int, int]) -> set[int]:
    """Which of these leases hold now. Call it first in the transaction that writes under them.

    The rows stay locked until that transaction ends: nobody takes the shards before.
    """
    values = member.values() | {"shards": list(epochs), "epochs": list(epochs.values())}
    return {shard for (shard,) in connection.execute(_FENCE, values)}
