"""The hosts and what is known of them, as rows: read when a shard is taken, written under its lease.

No state goes back: a clock state is written only if it is not older than the one in the database, and
every write has the epoch of its shard's lease (`leases.fenced`). Synchronous; runs in the database's
worker threads.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import Connection
from psycopg.types.json import Jsonb

from provider_proxy.errors import EvidenceFormatError
from provider_proxy.tenant.fleet import leases
from provider_proxy.tenant.watch.reports import Verdict
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.store import HostRecord, parse_record, record_values


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRow:
    """A host as it was imported.

    Attributes:
        rules: its keys of the watcher's file, defaults included.
        files: policy files by key: the digest of each one's content.
        pin: the pin's file.
        change: rises with each change of any host.
    """

    name: str
    shard: int
    rules: Mapping[str, object]
    files: Mapping[str, str]
    pin: bytes
    change: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a host.

    Attributes:
        record: None where nothing was accepted yet.
        verdict: the last reported one; None before the first.
        sequence: of its newest report.
        damage: what is wrong with the record; None if nothing is.
    """

    record: HostRecord | None = None
    verdict: Verdict | None = None
    sequence: int = 0
    damage: str | None = None


NOTHING = Known()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A report on its way to the outbox.

    Attributes:
        body: the exact bytes that receivers get, at every delivery.
        was_sent: it was sent to receivers although it is not in the outbox.
    """

    id: uuid.UUID
    sequence: int
    body: bytes
    was_sent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What to write of one host; the parts that are None stay as they are.

    Attributes:
        made_s: when this was put together, CLOCK_BOOTTIME seconds.
        age_s: how long before that the verdict was reached, in seconds.
        good_for_s: how long it may be shown from then on.
        waits_s: how long the oldest part of it has waited to be written, in seconds.
        overdue: its reports have been sent, see `Outgoing.was_sent`.
    """

    host: str
    shard: int
    made_s: float = 0.0
    record: HostRecord | None = None
    verdict: Verdict | None = None
    reason: str | None = None
    age_s: float = 0.0
    good_for_s: float = 0.0
    reports: Sequence[Outgoing] = ()
    waits_s: float = 0.0
    overdue: bool = False


def shard_of(name: str, shards: int) -> int:
    """The shard of a host: the same in every member and release."""
    return int.from_bytes(hashlib.sha256(name.encode("ascii")).digest()[:8], "big") % shards


def read_hosts(connection: Connection[Any], since: Mapping[int, int]) -> list[HostRow]:
    """The hosts of some shards that changed after a change number, given for each shard."""
    rows = connection.execute(
        "select name, h.shard, rules, files, pin, change from host h"
        " join unnest(%s::int[], %s::bigint[]) as s (shard, since)"
        " on h.shard = s.shard and h.change > s.since order by name",
        (list(since), list(since.values())),
    )
    return [
        HostRow(name=name, shard=shard, rules=rules, files=files, pin=pin or b"", change=change)
        for name, shard, rules, files, pin, change in rows
    ]


ALL = -1  # before every change


def read_names(connection: Connection[Any], shards: Sequence[int]) -> set[str]:
    """The names of all hosts of some shards."""
    rows = connection.execute("select name from host where shard = any(%s)", (list(shards),))
    return {name for (name,) in rows}


def read_policy(connection: Connection[Any], digest: str) -> bytes | None:
    """A policy file's content; None where it is not there."""
    row = connection.execute("select body from policy where digest = %s", (digest,)).fetchone()
    return bytes(row[0]) if row is not None else None


def read_known(
    connection: Connection[Any], shards: Sequence[int], names: Sequence[str] | None = None
) -> dict[str, Known]:
    """What is known of the hosts of some shards.

    Args:
        names: only of these hosts; None for all.
    """
    # A host that was removed and came back has reports, and no state: its numbers continue.
    rows = connection.execute(
        "select h.name, s.record, s.verdict, s.error, greatest(s.sequence,"
        " (select max(r.sequence) from report r where r.host = h.name), 0)"
        " from host h left join host_state s on s.name = h.name"
        " where h.shard = any(%s) and (%s::text[] is null or h.name = any(%s))",
        (list(shards), names, names),
    )
    found = {}
    for name, values, state, error, sequence in rows:
        record, damage = None, None
        try:
            record = None if values is None else parse_record(name, values)
            verdict = None if state is None else Verdict(State(state), error)
        except (EvidenceFormatError, ValueError) as exc:  # this host's history is not known
            verdict, damage = None, f"the database's record of {name} is damaged: {exc}"
        found[name] = Known(record=record, verdict=verdict, sequence=sequence, damage=damage)
    return found


def write(
    connection: Connection[Any],
    member: leases.Member,
    epochs: Mapping[int, int],
    updates: Sequence[Update],
    *,
    now: Callable[[], float] = lambda: 0.0,
) -> set[int]:
    """Write what shards' holders found, with its reports, in one transaction.

    Args:
        epochs: under which the writer holds the shards of the updates.
        now: CLOCK_BOOTTIME in seconds.

    Returns:
        The shards whose lease is valid. Nothing was written for the others.
    """
    with connection.transaction(), connection.cursor() as cursor:
        good = leases.fenced(connection, member, epochs)
        # One moment on both clocks, this program's read last: a verdict may seem older than it is, never
        # younger, however long a statement takes.
        (moment,) = cursor.execute("select fleet_now()").fetchone() or (None,)
        now_s = now()
        mine = [update for update in updates if update.shard in good]
        records = [update for update in mine if update.record is not None]
        if records:
            cursor.executemany(_RECORD, [_record_values(update) for update in records])
        verdicts = [update for update in mine if update.verdict is not None]
        if verdicts:
            cursor.executemany(_VERDICT, [_verdict_values(u, moment, now_s) for u in verdicts])
        reports = [
            (
                *(report.id, update.host, update.shard, epochs[update.shard]),
                *(report.sequence, report.body),
            )
            for update in mine
            for report in update.reports
        ]
        if reports:
            cursor.executemany(_REPORT, reports)
            last = [(update.reports[-1].sequence, update.host) for update in mine if update.reports]
            cursor.executemany("update host_state set sequence = %s where name = %s", last)
    return good


# A host that was removed meanwhile has no row in `host`, and none is written.
_RECORD = """
insert into host_state as s (name, shard, ak_name, resets, restarts, clock_ms, record)
select h.name, h.shard, %(ak_name)s, %(resets)s, %(restarts)s, %(clock_ms)s, %(record)s
from host h where h.name = %(name)s
on conflict (name) do update set
    shard = excluded.shard, ak_name = excluded.ak_name, resets = excluded.resets,
    restarts = excluded.restarts, clock_ms = excluded.clock_ms, record = excluded.record
where s.ak_name is distinct from excluded.ak_name
    or s.resets is null
    or (s.resets, s.restarts, s.clock_ms)
        <= (excluded.resets, excluded.restarts, excluded.clock_ms)
"""
_VERDICT = """
insert into host_state as s (name, shard, verdict, verdict_at, fresh_until, error, reason)
select h.name, h.shard, %(verdict)s, %(moment)s - make_interval(secs => %(age)s),
    %(moment)s - make_interval(secs => %(age)s) + make_interval(secs => %(good_for)s),
    %(error)s, %(reason)s
from host h where h.name = %(name)s
on conflict (name) do update set
    shard = excluded.shard, verdict = excluded.verdict, verdict_at = excluded.verdict_at,
    fresh_until = excluded.fresh_until, error = excluded.error, reason = excluded.reason
"""
_REPORT = """
insert into report (id, host, shard, epoch, sequence, made, next_try, body)
values (%s, %s, %s, %s, %s, fleet_now(), fleet_now(), %s)
on conflict (id) do nothing
"""


def _record_values(update: Update) -> dict[str, object]:
    record = update.record
    assert record is not None
    newest = record.newest
    return {
        "name": update.host,
        "ak_name": record.ak_name,
        "resets": newest and newest.reset_count,
        "restarts": newest and newest.restart_count,
        "clock_ms": newest and newest.clock_ms,
        "record": Jsonb(record_values(record)),
    }


def _verdict_values(update: Update, moment: object, now_s: float) -> dict[str, object]:
    assert update.verdict is not None
    return {
        "moment": moment,
        "name": update.host,
        "verdict": update.verdict.state.value,
        "error": update.verdict.error,
        "reason": update.reason,
        "age": update.age_s + max(0.0, now_s - update.made_s),
        "good_for": update.good_for_s,
    }
