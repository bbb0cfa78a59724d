"""The database queries of the fleet's page: the fleet over time, and hosts by search, page by page.

Every query has a time limit on the server and every answer a limit of rows, so that the page does not
slow the members down. Text from a search is data: `%` and `_` in it are literal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from provider_proxy.errors import UsageError
from provider_proxy.tenant.fleet import views

QUERY_LIMIT = "3s"
MAX_SEARCH_CHARS = 200
MAX_PAGE = 100
MAX_COUNTED = 10_000  # more matches than this are "more than"
KEEP_HISTORY_DAYS = 31
BARS = 120
HOURS = (1, 24, 168, 720)
TROUBLE = ("INVALID_QUOTE", "FAILED", views.NOT_VERIFIED, views.NEVER_VERIFIED)
"""The states that a person must look at, the worst first."""
_RANK = "array_position(array[" + ", ".join(f"'{state}'" for state in TROUBLE) + "]::text[], state)"
_HOSTS = (
    f"select h.name, h.shard, {views.STATE} as state, s.verdict_at, s.error, s.reason {views.FROM}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Which hosts.

    Attributes:
        text: a part of the name; empty for all.
        state: their state; "trouble" for `TROUBLE`; empty for all.
        after: the last host of the page before, from `HostPage.next`; empty for the first page.
    """

    text: str = ""
    state: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        """Raises: UsageError."""
        if len(self.text) > MAX_SEARCH_CHARS or not self.text.isprintable():
            raise UsageError(f"q must be printable, and at most {MAX_SEARCH_CHARS} characters")
        if self.state and not re.fullmatch(r"[A-Za-z_]{1,40}", self.state):
            raise UsageError("state is not a known state")
        if self.after and not re.fullmatch(r"[0-9]{1,2}:[!-~]{1,255}", self.after):
            raise UsageError("after must be a value of `next`")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPage:
    """A page of hosts.

    Attributes:
        count: of all that match, counted up to `MAX_COUNTED` + 1.
        next: for `Search.after`; None on the last page.
    """

    hosts: tuple[views.HostView, ...]
    count: int
    next: str | None


def search(connection: Connection[Any], wanted: Search, *, most: int = MAX_PAGE) -> HostPage:
    """Hosts, those that need a person's attention first, then by name."""
    rank, _, name = wanted.after.partition(":")
    values = {
        "like": "%" + re.sub(r"([\\%_])", r"\\\1", wanted.text) + "%",
        "states": _states_of(wanted.state),
        "rank": int(rank or -1),
        "name": name,
        "most": most + 1,
        "counted": MAX_COUNTED + 1,
    }
    matching = (
        f"select *, coalesce({_RANK}, 99) as rank from ({_HOSTS}) all_hosts"  # noqa: S608
        " where name ilike %(like)s and (%(states)s::text[] is null or state = any(%(states)s))"
    )
    with connection.transaction():
        connection.execute("select set_config('statement_timeout', %s, true)", (QUERY_LIMIT,))
        rows = connection.execute(
            f"select name, shard, state, verdict_at, error, reason, rank from ({matching}) m"  # noqa: S608
            " where (rank, name) > (%(rank)s, %(name)s) order by rank, name limit %(most)s",
            values,
        ).fetchall()
        counted = connection.execute(
            f"select count(*) from (select 1 from ({matching}) m limit %(counted)s) n",  # noqa: S608
            values,
        ).fetchone()
    assert counted is not None
    hosts = tuple(
        views.HostView(name=n, shard=shard, state=state, since=since, error=error, reason=reason)
        for n, shard, state, since, error, reason, _ in rows[:most]
    )
    more = len(rows) > most
    return HostPage(
        hosts=hosts,
        count=counted[0],
        next=f"{rows[most - 1][6]}:{hosts[-1].name}" if more else None,
    )


def _states_of(text: str) -> list[str] | None:
    if not text:
        return None
    return list(TROUBLE) if text == "trouble" else [text]


def remember(connection: Connection[Any]) -> None:
    """Record the number of hosts by state, once a minute in the whole fleet; remove old minutes."""
    with connection.transaction():
        (known,) = _row(
            connection,
            "select exists (select from history where at = date_trunc('minute', fleet_now()))",
        )
        if known:
            return
        connection.execute(
            "insert into history (at, state, hosts)"  # noqa: S608
            f" select date_trunc('minute', fleet_now()), state, count(*) from ({_HOSTS}) h"
            " group by state on conflict do nothing"
        )
        connection.execute(
            "delete from history where at < fleet_now() - make_interval(days => %s)",
            (KEEP_HISTORY_DAYS,),
        )


def latest(connection: Connection[Any]) -> dict[str, int]:
    """Hosts by state, as last recorded."""
    rows = connection.execute(
        "select state, hosts from history where at = (select max(at) from history)"
    )
    return dict(rows.fetchall())


def waiting(connection: Connection[Any], shards: list[int]) -> tuple[int, float]:
    """Undelivered reports of some shards: how many, and the age of the oldest in seconds."""
    count, age_s = _row(
        connection,
        "select count(*), coalesce(extract(epoch from fleet_now() - min(made)), 0)::float8"
        " from report where delivered is null and shard = any(%s)",
        (shards,),
    )
    return count, age_s


def history(connection: Connection[Any], hours: int) -> list[tuple[float, Mapping[str, int]]]:
    """Hosts by state, over time: `BARS` parts at most, the oldest first.

    Each part shows its worst minute, so that a short problem is visible.

    Returns:
        Seconds since the epoch, and hosts by state.

    Raises:
        UsageError: not one of `HOURS`.
    """
    if hours not in HOURS:
        raise UsageError(f"hours must be one of {', '.join(map(str, HOURS))}")
    rows = connection.execute(
        "with minutes as ("
        "  select at, floor(extract(epoch from at) / %(step)s) as part,"
        "    coalesce(sum(hosts) filter (where state = any(%(trouble)s)), 0) as bad"
        "  from history where at > fleet_now() - make_interval(hours => %(hours)s) group by at),"
        " worst as (select distinct on (part) at from minutes order by part, bad desc, at desc)"
        " select extract(epoch from at)::float8, state, hosts from history join worst using (at)"
        " order by at",
        {"step": max(60, hours * 3600 // BARS), "trouble": list(TROUBLE), "hours": hours},
    )
    found: dict[float, dict[str, int]] = {}
    for at, state, hosts in rows:
        found.setdefault(at, {})[state] = hosts
    return list(found.items())


def _row(connection: Connection[Any], statement: str, values: tuple[object, ...] = ()) -> Any:
    row = connection.execute(statement.encode("utf-8"), values).fetchone()
    assert row is not None  # an aggregate
    return row
