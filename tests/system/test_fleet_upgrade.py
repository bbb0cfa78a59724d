"""Upgrades of a fleet, and a backup that is restored under it: real members, a real PostgreSQL."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fleet_helpers import FLIPPED, HOSTS, LIMIT_S, SHARDS, Fleet, command, new_fleet
from needs_postgres import needs_postgres

from provider_proxy.errors import UsageError
from provider_proxy.tenant.fleet import leases, schema, views
from provider_proxy.testing.postgres import Postgres, postgres

pytestmark = [needs_postgres, pytest.mark.real]

# What a next version may do beside members of this one: columns with defaults, tables, indexes.
EXPAND = """
alter table host_state add column next_flag boolean not null default false;
alter table report add column next_kind text not null default 'verdict';
create table next_table (id integer primary key);
create index next_index on host_state (verdict_at);
"""
NEWER = schema.VERSION + 1
NEXT = (*schema.MIGRATIONS, schema.Migration(statements=EXPAND))
# And what it may not: this version's statements need that column.
CONTRACT = schema.Migration(
    statements="alter table member drop column knows", needs=schema.VERSION + 2
)
# A program of the next version: it knows those tables, and does with nothing less.
NEXT_PROGRAM = (
    "-c",
    "from provider_proxy.tenant.fleet import schema\n"
    f"schema.MIGRATIONS += (schema.Migration(statements={EXPAND!r}),)\n"
    f"schema.VERSION = schema.OLDEST_COMPATIBLE = {NEWER}\n"
    "from provider_proxy.cli.main import main\n"
    "main()\n",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def fleet(server: Postgres, tmp_path: Path) -> Iterator[Fleet]:
    with new_fleet(server, tmp_path) as made:
        yield made


def taken(fleet: Fleet) -> int:
    row = fleet.connection.execute("select sum(epoch)::bigint from lease").fetchone()
    assert row is not None
    return int(row[0])


def test_old_and_new_run_side_by_side(fleet: Fleet) -> None:
    """Tables first, then members one by one; what older members would miss cannot be taken away."""
    old = fleet.start("old")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    refused = subprocess.run(
        command("watch", "--config", fleet.config("early"), program=NEXT_PROGRAM),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert refused.returncode == 3
    assert "run `provider-proxy fleet migrate`" in refused.stderr

    before = taken(fleet)
    assert schema.migrate(fleet.connection, migrations=NEXT) == (schema.VERSION, NEWER)
    new = fleet.start("new", NEXT_PROGRAM)
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share each")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    assert taken(fleet) == before + SHARDS // 2  # those that were given, and no others
    fleet.fakes.flip()
    fleet.until(
        lambda: fleet.view().by_state == {"TRUSTED": HOSTS - FLIPPED, "INVALID_QUOTE": FLIPPED},
        "the changed PCR, found by both",
    )
    knows: dict[str, int] = dict(
        fleet.connection.execute("select name, knows from member").fetchall()
    )
    assert knows == {"old": schema.VERSION, "new": NEWER}

    with pytest.raises(UsageError, match=r"old \(.*upgrade and restart them first"):
        schema.migrate(fleet.connection, migrations=(*NEXT, CONTRACT))
    assert schema.version_of(fleet.connection) == NEWER

    assert old.end(signal.SIGTERM) == 0
    fleet.until(lambda: fleet.shares() == [SHARDS], "the new one to have all")
    fleet.until(lambda: fleet.view().waiting_reports == 0, "the outbox empty")
    assert new.end(signal.SIGTERM) == 0
    fleet.check_reports()
    schema.migrate(fleet.connection, migrations=(*NEXT, CONTRACT))
    late = fleet.start("late")
    assert late.process.wait(LIMIT_S) == 3
    assert "this program is too old for them" in late.log.read_text()


def clocks(fleet: Fleet) -> dict[str, tuple[int, int, int]]:
    rows = fleet.connection.execute(
        "select name, resets, restarts, clock_ms from host_state where resets is not null"
    )
    return {name: tuple(state) for name, *state in rows}


def epochs_of(fleet: Fleet) -> dict[int, int]:
    return dict(fleet.connection.execute("select shard, epoch from lease").fetchall())


def reconnect(fleet: Fleet) -> None:
    fleet.connection = psycopg.connect(fleet.server.dsn, autocommit=True)


def stop(fleet: Fleet) -> None:
    fleet.connection.close()
    fleet.server.stop("fast")


def test_a_backup_that_is_restored_under_running_members(fleet: Fleet, tmp_path: Path) -> None:
    """No clock goes back for a member that has seen it; epochs rise; nothing old is shown as trusted."""
    server, backup = fleet.server, fleet.server.folder / "backup"
    first = fleet.start("first")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    stop(fleet)
    server.copy(server.data, backup)
    server.start()
    reconnect(fleet)
    old = clocks(fleet)
    # A takeover, so that epochs are given out that the backup does not know.
    second = fleet.start("second")
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share each")
    second.end(signal.SIGKILL)
    fleet.until(lambda: fleet.shares() == [SHARDS], "the first to have all")
    fleet.until(
        lambda: all(state > old[name] for name, state in clocks(fleet).items()),
        "every clock to have gone on",
    )
    newer = clocks(fleet)
    epochs = epochs_of(fleet)
    fleet.connection.execute("create table made_after_the_backup ()")

    stop(fleet)
    server.copy(backup, server.data)
    server.start()
    reconnect(fleet)
    # The members write again at once, so the clocks of the backup may not be seen; that it is there is.
    found = fleet.connection.execute("select to_regclass('made_after_the_backup')").fetchone()
    assert found == (None,)
    fleet.until(lambda: fleet.shares() == [SHARDS], "the first to have all again")
    fleet.until(
        lambda: all(state > newer[name] for name, state in clocks(fleet).items()),
        "every clock beyond what was seen",
    )
    again = epochs_of(fleet)
    assert all(again[shard] > epoch for shard, epoch in epochs.items())

    said = fleet.cli("restored")
    assert f"{HOSTS} hosts are shown as not verified" in said
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted, by new verdicts")
    assert min(epochs_of(fleet).values()) > leases.RESTORED_STEP
    fleet.fakes.flip()
    fleet.until(
        lambda: sum(r["state"] == "INVALID_QUOTE" for r in fleet.reports()) == FLIPPED,
        "the changed PCR to be reported",
    )
    highest: dict[str, int] = {}
    for report in told_by(first.lines):  # a receiver that drops lower epochs drops none of them
        assert report["epoch"] >= highest.get(report["host"], 0)
        highest[report["host"]] = report["epoch"]


def told_by(lines: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in list(lines) if line.endswith(b"\n")]


def test_what_was_restored_is_not_trusted_until_it_is_verified(fleet: Fleet) -> None:
    """Where every member was down meanwhile, nobody has seen anything newer."""
    only = fleet.start("only")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    only.end(signal.SIGKILL)
    fleet.cli("restored")
    assert fleet.view().by_state == {views.NOT_VERIFIED: HOSTS}
