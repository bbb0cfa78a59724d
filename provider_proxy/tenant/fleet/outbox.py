"""The outbox: reports that were written with their verdicts, until every receiver has them.

A shard's holder delivers its hosts' reports, in order for each host, and repeats until they are accepted:
at least once, the same bytes each time. A silence holds a host's reports back until it ends.

Synchronous; runs in the database's worker threads.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

MAX_AT_ONCE = 200
FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 300.0
KEEP_DAYS = 30  # delivered reports, for `fleet reports`; and those that no receiver accepts

_NEXT = """
select distinct on (host) r.id, r.host, r.body, r.tries, r.next_try <= fleet_now() as due,
    exists (
        select from silence s
        where s.begins <= fleet_now() and s.ends > fleet_now() and r.host like s.hosts
    ) as silent
from report r
where delivered is null and shard = any(%(shards)s)
order by host, sequence
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The next report of a host.

    Attributes:
        tries: how many deliveries failed.
    """

    id: uuid.UUID
    host: str
    body: bytes
    tries: int


def next_reports(connection: Connection[Any], shards: Sequence[int]) -> list[Waiting]:
    """The reports to deliver now, one a host."""
    rows = connection.execute(
        f"select id, host, body, tries from ({_NEXT}) n where due and not silent"  # noqa: S608
        " limit %(most)s",
        {"shards": list(shards), "most": MAX_AT_ONCE},
    )
    return [
        Waiting(id=id_, host=host, body=bytes(body), tries=tries) for id_, host, body, tries in rows
    ]


def delivered(connection: Connection[Any], ids: Sequence[uuid.UUID]) -> None:
    """Mark reports that every receiver has, whether or not this member still holds the shard."""
    connection.execute(
        "update report set delivered = fleet_now() where id = any(%s) and delivered is null",
        (list(ids),),
    )


def failed(connection: Connection[Any], id_: uuid.UUID, wait_s: float) -> None:
    """A receiver did not accept this one; try again after a while."""
    connection.execute(
        "update report set tries = tries + 1,"
        " next_try = fleet_now() + make_interval(secs => %s) where id = %s",
        (wait_s, id_),
    )


def forget_old(connection: Connection[Any]) -> int:
    """Remove old reports and old silences.

    Reports that were not delivered for as long are removed, too, so that the table is bounded.

    Returns:
        How many reports were removed that had not been delivered.
    """
    values = (KEEP_DAYS,)
    connection.execute(
        "delete from silence where ends < fleet_now() - make_interval(days => %s)", values
    )
    connection.execute(
        "delete from report where delivered < fleet_now() - make_interval(days => %s)", values
    )
    done = connection.execute(
        "delete from report where delivered is null"
        " and made < fleet_now() - make_interval(days => %s)",
        values,
    )
    return done.rowcount
