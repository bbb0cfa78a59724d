"""The fleet's tables in PostgreSQL, as numbered migrations.

`provider-proxy fleet migrate` applies them, under a role that may create tables; members run under one
that may not. Upgrade the tables first, then members one by one: a migration adds (expand), and members of
the previous program keep running beside the new ones. A later migration removes what they use (contract)
and `needs` a newer program: it is refused while an older member is alive, and an older program then
refuses the tables. `OLDEST_COMPATIBLE` says which tables are too old for this program.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import Connection, errors, sql

from provider_proxy.errors import HostError, UsageError
from provider_proxy.tenant.fleet.lease import DEFAULT_SHARDS

MAX_SHARDS = 4096
LOCK_KEY = 0x70726F7870  # one migration at a time; an arbitrary number for pg_advisory_xact_lock

# A migration waits for running statements, and members wait for it: so it gives up soon, and retries.
LOCK_WAIT = "1s"
LOCK_TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """A step from one version of the tables to the next.

    Attributes:
        needs: the lowest VERSION of a program that can use the tables after this step.
    """

    statements: str
    needs: int = 1


_FIRST = """
    create table fleet_settings (
        one boolean primary key default true check (one),
        shards integer not null check (shards between 1 and 4096)
    );
    -- The clock that decides between members. Tests put one that they can move in its place.
    create function fleet_now() returns timestamptz language sql volatile
        as 'select clock_timestamp()';
    create table member (
        id uuid primary key,
        name text not null,
        version text not null,
        started timestamptz not null,
        until timestamptz not null,
        draining boolean not null default false
    );
    create table lease (
        shard integer primary key,
        owner uuid,
        epoch bigint not null default 0,
        until timestamptz not null default '-infinity'
    );
    create table policy (
        digest text primary key,
        body bytea not null
    );
    create sequence host_change;
    create table host (
        name text primary key,
        shard integer not null references lease,
        rules jsonb not null,
        files jsonb not null,
        pin bytea,
        change bigint not null default nextval('host_change')
    );
    create index host_by_shard on host (shard, change);
    create table host_state (
        name text primary key references host on delete cascade,
        shard integer not null,
        ak_name bytea,
        resets bigint,
        restarts bigint,
        clock_ms bigint,
        record jsonb,
        verdict text,
        verdict_at timestamptz,
        fresh_until timestamptz,
        error text,
        reason text,
        sequence bigint not null default 0
    );
    create index host_state_by_verdict on host_state (verdict, name);
    create table report (
        id uuid primary key,
        host text not null,
        shard integer not null,
        epoch bigint not null,
        sequence bigint not null,
        made timestamptz not null,
        body bytea not null,
        tries integer not null default 0,
        next_try timestamptz not null,
        delivered timestamptz,
        unique (host, sequence)
    );
    create index report_waiting on report (shard, host, sequence) where delivered is null;
    create table silence (
        id uuid primary key,
        hosts text not null,
        why text not null,
        begins timestamptz not null,
        ends timestamptz not null check (ends > begins)
    );
    """
_SECOND = """
    alter table fleet_version add column needs integer not null default 1;
    -- Of members: the VERSION of their program.
    alter table member add column knows integer not null default 1;
    -- Members look at one number to see whether any host was changed, by a program of any version.
    alter table fleet_settings add column changed bigint not null default 0;
    create function fleet_host_changed() returns trigger language plpgsql as
        $$ begin update fleet_settings set changed = changed + 1; return null; end $$;
    create trigger fleet_host_changed after insert or update or delete on host
        for each statement execute function fleet_host_changed();
    create table history (
        at timestamptz,
        state text,
        hosts integer not null,
        primary key (at, state)
    );
    """
MIGRATIONS: tuple[Migration, ...] = (Migration(statements=_FIRST), Migration(statements=_SECOND))
VERSION = len(MIGRATIONS)
OLDEST_COMPATIBLE = 2  # tables of this version and later have all that this program uses
WITH_NEEDS = 2  # the first version that records what each migration needs
DAILY_TABLES = (
    *("fleet_version", "fleet_settings", "member", "lease", "policy", "host", "host_state"),
    *("report", "silence", "history"),
)


def version_of(connection: Connection[Any]) -> int:
    """The version of the tables; 0 if they do not exist."""
    there = connection.execute("select to_regclass('fleet_version') is not null").fetchone()
    if there is None or not there[0]:
        return 0
    row = connection.execute("select coalesce(max(version), 0) from fleet_version").fetchone()
    return int(row[0]) if row is not None else 0


def check_version(connection: Connection[Any]) -> None:
    """Check that this program can use the tables.

    Raises:
        HostError: they are missing, too old or too new; the message says what to do.
    """
    found = version_of(connection)
    if found < OLDEST_COMPATIBLE:
        what = "no fleet tables" if not found else f"tables of version {found}"
        raise HostError(f"the database has {what}; run `provider-proxy fleet migrate`")
    row = connection.execute("select max(needs) from fleet_version").fetchone()
    if row is not None and row[0] > VERSION:
        raise HostError(
            f"the database's tables are of version {found}, and this program is too old for them: it "
            f"knows version {VERSION}, and they need {row[0]}; install a newer provider-proxy"
        )


def migrate(
    connection: Connection[Any],
    *,
    shards: int = DEFAULT_SHARDS,
    migrations: Sequence[Migration] = MIGRATIONS,
) -> tuple[int, int]:
    """Bring the tables to this program's version, in one transaction.

    Args:
        shards: for a new fleet; an existing fleet keeps its number.
        migrations: all of them, the applied ones first.

    Returns:
        The version before and after.

    Raises:
        UsageError: shards are out of range, or live members could not use the new tables.
        HostError: the tables are in use, and could not be locked.
    """
    if not 1 <= shards <= MAX_SHARDS:
        raise UsageError(f"shards must be from 1 to {MAX_SHARDS}")
    for last in range(LOCK_TRIES - 1, -1, -1):
        try:
            return _migrate(connection, shards, migrations)
        except errors.LockNotAvailable as exc:
            if not last:
                raise HostError("the tables are in use by a long statement; try again") from exc
            time.sleep(0.5)
    raise AssertionError("the last try returns or raises")


def _migrate(
    connection: Connection[Any], shards: int, migrations: Sequence[Migration]
) -> tuple[int, int]:
    with connection.transaction():
        connection.execute("select set_config('lock_timeout', %s, true)", (LOCK_WAIT,))
        connection.execute("select pg_advisory_xact_lock(%s)", (LOCK_KEY,))
        connection.execute(
            "create table if not exists fleet_version ("
            " version integer primary key, applied timestamptz not null default now())"
        )
        before = version_of(connection)
        for number, migration in enumerate(migrations[before:], before + 1):
            if before:
                _demand_newer_members(connection, number, migration.needs)
            connection.execute(migration.statements.encode("utf-8"))
            connection.execute("insert into fleet_version (version) values (%s)", (number,))
            if number >= WITH_NEEDS:
                connection.execute(
                    "update fleet_version set needs = %s where version = %s",
                    (migration.needs, number),
                )
        if not before:
            connection.execute("insert into fleet_settings (shards) values (%s)", (shards,))
            connection.execute(
                "insert into lease (shard) select n from generate_series(0, %s - 1) as n", (shards,)
            )
    return before, max(before, len(migrations))


def _demand_newer_members(connection: Connection[Any], number: int, needs: int) -> None:
    if number <= WITH_NEEDS or needs <= 1:
        return
    rows = connection.execute(
        "select name, version from member where until > fleet_now() and knows < %s order by name",
        (needs,),
    ).fetchall()
    if rows:
        names = ", ".join(f"{name} ({version})" for name, version in rows[:5])
        raise UsageError(
            f"members run a program that cannot use tables of version {number}: {names}; "
            "upgrade and restart them first"
        )


def grant_daily(connection: Connection[Any], role: str) -> None:
    """Grant a role what members need: rows, but no tables."""
    name = sql.Identifier(role)
    tables = sql.SQL(", ").join(map(sql.Identifier, DAILY_TABLES))
    row = connection.execute("select current_schema").fetchone()
    assert row is not None
    with connection.transaction():
        schema = sql.Identifier(row[0])
        connection.execute(sql.SQL("grant usage on schema {} to {}").format(schema, name))
        connection.execute(
            sql.SQL("grant select, insert, update, delete on {} to {}").format(tables, name)
        )
        connection.execute(sql.SQL("grant usage on sequence host_change to {}").format(name))


def change_of(connection: Connection[Any]) -> int:
    """A number that rises with every change of hosts."""
    row = connection.execute("select changed from fleet_settings").fetchone()
    assert row is not None  # `migrate` writes it
    return int(row[0])


def shards_of(connection: Connection[Any]) -> int:
    """How many shards the fleet has."""
    row = connection.execute("select shards from fleet_settings").fetchone()
    assert row is not None  # `migrate` writes it
    return int(row[0])
