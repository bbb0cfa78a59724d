"""Rows under leases, on a real PostgreSQL: nothing goes back, nothing without a lease."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from needs_postgres import needs_postgres

from provider_proxy.errors import HostError, UsageError
from provider_proxy.evidence.model import AkName, ClockState
from provider_proxy.tenant.fleet import imports, leases, outbox, rows, schema, views
from provider_proxy.tenant.fleet.database import (
    Database,
    DatabaseError,
    connect,
    read_address,
    translated,
)
from provider_proxy.tenant.fleet.hosts import ImportedFleet, ImportedHost
from provider_proxy.tenant.watch.reports import Verdict
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.store import HostRecord
from provider_proxy.testing.postgres import Postgres, postgres

pytestmark = [needs_postgres, pytest.mark.real]

SHARDS = 4
AK, OTHER_AK = AkName(b"\0\x0b" + bytes(32)), AkName(b"\0\x0b" + b"\1" * 32)
MEMBER = leases.Member(id=uuid.uuid4(), name="m", version="1", lease_s=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def connection(server: Postgres) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server.dsn, autocommit=True) as opened:
        opened.execute("drop schema public cascade; create schema public")
        schema.migrate(opened, shards=SHARDS)
        imports.apply(opened, fleet_of("a", "b"), remove=False)
        yield opened


def fleet_of(*names: str, interval_s: float = 5.0) -> ImportedFleet:
    return ImportedFleet(
        hosts=tuple(
            ImportedHost(
                name=name, rules={"interval_s": interval_s}, files={"tpm_policy": "d1"}, pin=b""
            )
            for name in names
        ),
        policies={"d1": b"{}"},
    )


def clock(resets: int, clock_ms: int) -> ClockState:
    return ClockState(reset_count=resets, restart_count=0, clock_ms=clock_ms)


def record(newest: ClockState, ak: AkName = AK) -> HostRecord:
    return HostRecord(ak_name=ak, newest=newest, first_use={0: b"\1" * 32})


def write(connection: psycopg.Connection[Any], **values: Any) -> set[int]:
    update = rows.Update(host="a", shard=rows.shard_of("a", SHARDS), **values)
    epochs = leases.renew(connection, MEMBER).epochs
    mine = {update.shard: epochs[update.shard]}
    return rows.write(connection, MEMBER, mine, [update])


def known(connection: psycopg.Connection[Any]) -> rows.Known:
    return rows.read_known(connection, range(SHARDS))["a"]


def test_a_clock_never_goes_back(connection: psycopg.Connection[Any]) -> None:
    for newest in (clock(2, 500), clock(2, 400), clock(1, 9000)):
        assert write(connection, record=record(newest))
    assert known(connection).record == record(clock(2, 500))
    write(connection, record=record(clock(3, 1)))
    assert known(connection).record == record(clock(3, 1))
    write(connection, record=record(clock(1, 1), OTHER_AK))  # pinned again: another TPM's clock
    assert known(connection).record == record(clock(1, 1), OTHER_AK)


def test_without_the_lease_nothing_is_written(connection: psycopg.Connection[Any]) -> None:
    shard = rows.shard_of("a", SHARDS)
    epoch = leases.renew(connection, MEMBER).epochs[shard]
    report = rows.Outgoing(id=uuid.uuid4(), sequence=1, body=b"{}")
    update = rows.Update(
        host="a", shard=shard, record=record(clock(1, 1)), verdict=Verdict(State.TRUSTED),
        good_for_s=60, reports=(report,),
    )  # fmt: skip
    assert rows.write(connection, MEMBER, {shard: epoch - 1}, [update]) == set()
    assert known(connection) == rows.NOTHING
    assert views.report_views(connection) == []
    assert rows.write(connection, MEMBER, {shard: epoch}, [update]) == {shard}
    assert known(connection) == rows.Known(
        record=record(clock(1, 1)), verdict=Verdict(State.TRUSTED), sequence=1
    )


def test_a_verdict_has_an_end(connection: psycopg.Connection[Any]) -> None:
    states = [host.state for host in views.host_views(connection)]
    assert states == [views.NEVER_VERIFIED] * 2
    write(connection, verdict=Verdict(State.TRUSTED), age_s=1, good_for_s=60)
    assert views.host_views(connection, like="a")[0].state == "TRUSTED"
    write(connection, verdict=Verdict(State.TRUSTED), age_s=61, good_for_s=60)
    assert views.host_views(connection, like="a")[0].state == views.NOT_VERIFIED
    assert views.fleet_view(connection).by_state == {
        views.NEVER_VERIFIED: 1,
        views.NOT_VERIFIED: 1,
    }


def test_a_host_that_was_removed_meanwhile_leaves_no_row(
    connection: psycopg.Connection[Any],
) -> None:
    imports.apply(connection, fleet_of("b"), remove=True)
    assert write(connection, record=record(clock(1, 1)), verdict=Verdict(State.TRUSTED))
    assert rows.read_known(connection, range(SHARDS)) == {"b": rows.NOTHING}


def test_an_import_shows_what_it_changes(connection: psycopg.Connection[Any]) -> None:
    fleet = fleet_of("a", "c", interval_s=9.0)
    plan = imports.plan(connection, fleet)
    assert (plan.added, plan.removed, plan.same) == (("c",), ("b",), 0)
    assert plan.changed == {"a": ("interval_s 5.0 -> 9.0",)}
    since = dict.fromkeys(range(SHARDS), rows.ALL)
    before = {row.name: row.change for row in rows.read_hosts(connection, since)}
    assert imports.apply(connection, fleet, remove=False) == plan
    after = {row.name: row.change for row in rows.read_hosts(connection, since)}
    assert after["a"] > before["a"]
    assert after["b"] == before["b"]
    assert imports.apply(connection, fleet, remove=False).same == 2
    imports.apply(connection, ImportedFleet(hosts=(), policies={}), remove=True)
    assert rows.read_policy(connection, "d1") is None


def test_reports_wait_in_order_for_each_host(connection: psycopg.Connection[Any]) -> None:
    first, second = (
        rows.Outgoing(id=uuid.uuid4(), sequence=n, body=json.dumps({"n": n}).encode())
        for n in (1, 2)
    )
    write(connection, verdict=Verdict(State.TRUSTED), reports=(first, second))
    shards = list(range(SHARDS))
    (waiting,) = outbox.next_reports(connection, shards)
    assert waiting.id == first.id
    outbox.failed(connection, first.id, 60)
    assert outbox.next_reports(connection, shards) == []  # the second does not overtake it
    outbox.delivered(connection, [first.id])
    (waiting,) = outbox.next_reports(connection, shards)
    assert (waiting.id, waiting.body) == (second.id, second.body)
    assert outbox.forget_old(connection) == 0


def test_a_silence_is_about_hosts_that_are_there(connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(UsageError, match="no host matches"):
        views.silence(connection, "x%", minutes=1, why="none")
    with pytest.raises(UsageError, match="no live member 'x'"):
        views.drain(connection, "x")


def test_migrations_are_applied_once_and_shards_stay(connection: psycopg.Connection[Any]) -> None:
    assert schema.migrate(connection, shards=9) == (schema.VERSION, schema.VERSION)
    assert schema.shards_of(connection) == SHARDS
    connection.execute("delete from fleet_version")
    with pytest.raises(HostError, match="fleet migrate"):
        schema.check_version(connection)
    with pytest.raises(UsageError, match="shards must be from 1 to 4096"):
        schema.migrate(connection, shards=0)


def test_the_daily_role_has_rows_and_no_tables(
    server: Postgres, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("drop role if exists daily; create role daily login")
    schema.grant_daily(connection, "daily")
    with psycopg.connect(
        f"host={server.folder} user=daily dbname=postgres", autocommit=True
    ) as daily:
        assert leases.renew(daily, MEMBER).epochs
        assert write(daily, verdict=Verdict(State.TRUSTED), good_for_s=60)
        views.fleet_view(daily)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            daily.execute("alter table host add column x text")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            daily.execute("create table x (y text)")
    connection.execute("drop owned by daily; drop role daily")


def test_a_database_that_is_away_says_so(server: Postgres) -> None:
    with pytest.raises(DatabaseError, match="the database: "):
        connect(f"host={server.folder}/nowhere user=postgres dbname=postgres")
    assert "\n" not in str(translated(psycopg.OperationalError("one\ntwo")))


async def test_a_connection_that_breaks_at_any_point_is_a_database_error(
    server: Postgres, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is opened, while its tables are looked at, in the middle of the work; then it goes on."""
    database = Database(server.dsn)

    def broken(_: psycopg.Connection[Any]) -> None:
        raise psycopg.OperationalError("terminating connection")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(schema, "check_version", broken)
            with pytest.raises(DatabaseError, match="terminating connection"):
                await database.run(schema.shards_of)
        with pytest.raises(DatabaseError, match="terminating connection"):
            await database.run(broken)
        assert await database.run(schema.shards_of) == SHARDS

        def end_itself(used: psycopg.Connection[Any]) -> None:
            used.execute("select pg_terminate_backend(pg_backend_pid())")

        with pytest.raises(DatabaseError, match="terminating connection"):
            await database.run(end_itself)
        assert await database.run(schema.shards_of) == SHARDS
    finally:
        database.close()


def report_of(sequence: int) -> rows.Outgoing:
    return rows.Outgoing(id=uuid.uuid4(), sequence=sequence, body=b"{}")


def test_a_host_that_comes_back_goes_on_with_its_numbers(
    connection: psycopg.Connection[Any],
) -> None:
    """Its old reports are there still, and two with one number would hold up a whole batch for ever."""
    write(connection, verdict=Verdict(State.TRUSTED), reports=(report_of(1), report_of(2)))
    imports.apply(connection, fleet_of("b"), remove=True)
    imports.apply(connection, fleet_of("a", "b"), remove=False)
    assert known(connection) == rows.Known(sequence=2)
    assert write(connection, verdict=Verdict(State.TRUSTED), reports=(report_of(3),))


def test_one_damaged_record_is_one_host_s_affair(connection: psycopg.Connection[Any]) -> None:
    write(connection, record=record(clock(1, 1)))
    connection.execute("update host_state set record = '{}'")
    found = known(connection)
    assert found.record is None
    assert "the database's record of a is damaged" in str(found.damage)
    assert rows.read_known(connection, range(SHARDS))["b"] == rows.NOTHING


def test_a_verdict_is_no_younger_than_it_is(connection: psycopg.Connection[Any]) -> None:
    """However long its write has waited."""
    shard = rows.shard_of("a", SHARDS)
    epoch = leases.renew(connection, MEMBER).epochs[shard]
    update = rows.Update(
        host="a", shard=shard, made_s=100.0, verdict=Verdict(State.TRUSTED), age_s=5, good_for_s=20
    )
    rows.write(connection, MEMBER, {shard: epoch}, [update], now=lambda: 116.0)
    (host,) = views.host_views(connection, like="a")
    assert host.state == views.NOT_VERIFIED  # 21 s old


def test_a_verdict_of_the_future_is_not_shown(connection: psycopg.Connection[Any]) -> None:
    """The database's clock went back: what its old time says of freshness means nothing."""
    write(connection, verdict=Verdict(State.TRUSTED), good_for_s=60)
    assert views.host_views(connection, like="a")[0].state == "TRUSTED"
    connection.execute(
        "update host_state set verdict_at = fleet_now() + interval '1 hour',"
        " fresh_until = fleet_now() + interval '2 hours'"
    )
    assert views.host_views(connection, like="a")[0].state == views.NOT_VERIFIED


def test_every_change_of_hosts_is_seen_by_one_number(connection: psycopg.Connection[Any]) -> None:
    before = schema.change_of(connection)
    imports.apply(connection, fleet_of("a", "b"), remove=False)
    assert schema.change_of(connection) == before  # nothing differed
    imports.apply(connection, fleet_of("a"), remove=True)
    assert schema.change_of(connection) > before


def test_silences_are_listed_and_ended(connection: psycopg.Connection[Any]) -> None:
    id_, count, _ = views.silence(connection, "a%", minutes=5, why="kernels")
    assert count == 1
    write(connection, verdict=Verdict(State.TRUSTED), reports=(report_of(1),))
    assert outbox.next_reports(connection, range(SHARDS)) == []
    assert [one.id for one in views.silence_views(connection)] == [id_]
    views.end_silence(connection, str(id_))
    assert views.silence_views(connection) == []
    assert len(outbox.next_reports(connection, range(SHARDS))) == 1
    with pytest.raises(UsageError, match="no active silence"):
        views.end_silence(connection, str(id_))


async def test_two_transactions_that_wait_for_each_other_come_again(
    server: Postgres, connection: psycopg.Connection[Any]
) -> None:
    database, tries = Database(server.dsn), []

    def work(used: psycopg.Connection[Any]) -> int:
        tries.append(used)
        if len(tries) == 1:
            raise psycopg.errors.DeadlockDetected("deadlock detected")
        return schema.shards_of(used)

    try:
        assert await database.run(work) == SHARDS
        assert tries[0] is tries[1]
    finally:
        database.close()


def connect_often(dsn: str) -> None:
    for _ in range(50):  # until the server has read its settings
        connect(read_address(dsn)).close()


def test_a_standby_is_refused(connection: psycopg.Connection[Any], server: Postgres) -> None:
    """It takes no writes; of several servers the one that does is used."""
    connection.execute("alter system set default_transaction_read_only = on")
    connection.execute("select pg_reload_conf()")
    try:
        with pytest.raises(DatabaseError, match="read-only"):
            connect_often(server.dsn)
    finally:
        connection.execute("set default_transaction_read_only = off")
        connection.execute("alter system reset default_transaction_read_only")
        connection.execute("select pg_reload_conf()")
