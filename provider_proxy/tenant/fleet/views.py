"""What people see of a fleet, read from its database: members, shards, hosts, reports, silences.

A host is shown as trusted only while its verdict is recent enough; after that it is "not verified
since", whatever the last verdict was.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection

from provider_proxy.errors import UsageError

NOT_VERIFIED = "NOT_VERIFIED_SINCE"
NEVER_VERIFIED = "NEVER_VERIFIED"
NOT_ASKED = "NOT_ASKED"  # a host that is only listed
MAX_ROWS = 100_000
AHEAD = "1 s"  # a verdict further in the future is from before the database's clock went back
STATE = f"""
case when h.rules @> '{{"need_provider_quote": false}}' then '{NOT_ASKED}'
     when s.verdict is null then '{NEVER_VERIFIED}'
     when s.fresh_until <= fleet_now() or s.verdict_at > fleet_now() + interval '{AHEAD}'
         then '{NOT_VERIFIED}'
     else s.verdict end
"""
FROM = "from host h left join host_state s on s.name = h.name"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """A process that is alive.

    Attributes:
        seen_s: how long ago it renewed its leases, in seconds.
    """

    id: uuid.UUID
    name: str
    version: str
    shards: int
    draining: bool
    seen_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """The whole fleet.

    Attributes:
        free_shards: shards that no member holds: their hosts are not verified now.
        by_state: hosts by the state that is shown.
        oldest_verdict_s: age of the oldest verdict of a host that is asked, in seconds.
        waiting_reports: of the outbox.
        oldest_report_s: age of the oldest of those, in seconds.
    """

    members: tuple[MemberView, ...]
    shards: int
    free_shards: int
    by_state: dict[str, int]
    oldest_verdict_s: float | None
    waiting_reports: int
    oldest_report_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostView:
    """A host as it may be shown now."""

    name: str
    shard: int
    state: str
    since: datetime | None
    error: str | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportView:
    """A report in the outbox, or delivered."""

    id: uuid.UUID
    host: str
    made: datetime
    delivered: datetime | None
    tries: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SilenceView:
    """Reports that are held back.

    Attributes:
        hosts: SQL's pattern of names.
    """

    id: uuid.UUID
    hosts: str
    why: str
    ends: datetime


def fleet_view(connection: Connection[Any]) -> FleetView:
    """The fleet as of now."""
    members = connection.execute(
        "select m.id, m.name, m.version, m.draining,"
        " (select count(*) from lease l where l.owner = m.id and l.until > fleet_now()),"
        " extract(epoch from fleet_now() - m.until)::float8"
        " from member m where m.until > fleet_now() order by m.name, m.id"
    ).fetchall()
    (shards, free) = _row(
        connection, "select count(*), count(*) filter (where until <= fleet_now()) from lease"
    )
    states = connection.execute(f"select {STATE} as state, count(*) {FROM} group by 1")
    (oldest,) = _row(
        connection,
        "select extract(epoch from fleet_now() - min(s.verdict_at))::float8 from host_state s",
    )
    (waiting, report_s) = _row(
        connection,
        "select count(*), extract(epoch from fleet_now() - min(made))::float8"
        " from report where delivered is null",
    )
    return FleetView(
        members=tuple(
            MemberView(
                id=id_, name=name, version=version, shards=held, draining=draining, seen_s=-ago
            )
            for id_, name, version, draining, held, ago in members
        ),
        shards=shards,
        free_shards=free,
        by_state=dict(states.fetchall()),
        oldest_verdict_s=oldest,
        waiting_reports=waiting,
        oldest_report_s=report_s,
    )


def host_views(
    connection: Connection[Any], *, like: str = "%", state: str | None = None, most: int = MAX_ROWS
) -> list[HostView]:
    """Hosts by name.

    Args:
        like: SQL's pattern of names, "%" for any characters.
        state: only hosts in this state.
    """
    rows = connection.execute(
        f"select * from (select h.name, h.shard, {STATE} as state, s.verdict_at, s.error, s.reason"  # noqa: S608
        f" {FROM} where h.name like %s) v where %s::text is null or state = %s"
        " order by name limit %s",
        (like, state, state, most),
    )
    return [
        HostView(name=name, shard=shard, state=shown, since=since, error=error, reason=reason)
        for name, shard, shown, since, error, reason in rows
    ]


def report_views(
    connection: Connection[Any], *, like: str = "%", waiting: bool = False, most: int = 1000
) -> list[ReportView]:
    """The newest reports of some hosts, the newest last."""
    rows = connection.execute(
        "select id, host, made, delivered, tries, body from report"
        " where host like %s and (not %s or delivered is null)"
        " order by made desc, host, sequence desc limit %s",
        (like, waiting, most),
    ).fetchall()
    return [
        ReportView(id=id_, host=host, made=made, delivered=delivered, tries=tries, body=bytes(body))
        for id_, host, made, delivered, tries, body in reversed(rows)
    ]


def drain(connection: Connection[Any], name: str) -> int:
    """Make members give their shards back and take none, by name or id. Returns how many.

    Raises:
        UsageError: no such member is alive.
    """
    done = connection.execute(
        "update member set draining = true"
        " where (name = %s or id::text = %s) and until > fleet_now()",
        (name, name),
    )
    if not done.rowcount:
        raise UsageError(f"there is no live member {name!r}; see `provider-proxy fleet status`")
    return done.rowcount


def silence(
    connection: Connection[Any], hosts: str, *, minutes: float, why: str
) -> tuple[uuid.UUID, int, datetime]:
    """Hold the reports of some hosts back for a while.

    Args:
        hosts: SQL's pattern of names.

    Returns:
        Its id, how many hosts it matches now, and when it ends.

    Raises:
        UsageError: it matches no host.
    """
    (count,) = _row(connection, "select count(*) from host where name like %s", (hosts,))
    if not count:
        raise UsageError(f"no host matches {hosts!r}")
    id_ = uuid.uuid4()
    (ends,) = _row(
        connection,
        "insert into silence (id, hosts, why, begins, ends) values (%s, %s, %s, fleet_now(),"
        " fleet_now() + make_interval(secs => %s)) returning ends",
        (id_, hosts, why, minutes * 60),
    )
    return id_, count, ends


def silence_views(connection: Connection[Any], *, most: int = 1000) -> list[SilenceView]:
    """Silences that are active now, the first to end first."""
    rows = connection.execute(
        "select id, hosts, why, ends from silence"
        " where begins <= fleet_now() and ends > fleet_now() order by ends, id limit %s",
        (most,),
    )
    return [SilenceView(id=id_, hosts=hosts, why=why, ends=ends) for id_, hosts, why, ends in rows]


def end_silence(connection: Connection[Any], id_: str) -> None:
    """End a silence now; what it held back is delivered.

    Raises:
        UsageError: no silence with that id is active.
    """
    done = connection.execute(
        "update silence set ends = fleet_now() where id::text = %s and ends > fleet_now()"
        " and begins < fleet_now()",
        (id_,),
    )
    if not done.rowcount:
        raise UsageError(f"there is no active silence {id_!r}; see `provider-proxy fleet silences`")


def _row(connection: Connection[Any], statement: str, values: tuple[object, ...] = ()) -> Any:
    row = connection.execute(statement.encode("utf-8"), values).fetchone()
    assert row is not None  # an aggregate, or a returning insert
    return row
