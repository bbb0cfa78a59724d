"""The lease rules, on a real PostgreSQL whose clock the test moves, against a model of their own.

Members step, stop and come back; clocks run on and jump; writes arrive late. Whatever happens: a shard
has one holder by the database's clock, its epoch never goes back, and no write under a lost lease is
accepted. Where the database's clock only runs forward at its own pace, two members never believe at the
same time that they hold one shard.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from needs_postgres import needs_postgres

from provider_proxy.tenant.fleet import leases, schema
from provider_proxy.tenant.fleet.lease import MAX_LEASE_S, Holdings, LeaseTimes
from provider_proxy.testing.postgres import Postgres, postgres

pytestmark = [needs_postgres, pytest.mark.real]

SHARDS = 5
MEMBERS = 3
TIMES = LeaseTimes(lease_s=5, renew_s=1, margin_s=1)
EPOCH = "2026-01-01 00:00:00+00"
CLOCK = f"""
create table test_clock (at double precision not null);
insert into test_clock values (0);
create or replace function fleet_now() returns timestamptz language sql volatile as
    'select timestamptz ''{EPOCH}'' + make_interval(secs => at) from test_clock';
create table written (shard integer, epoch bigint, value bigint);
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture(scope="module")
def connection(server: Postgres) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server.dsn, autocommit=True) as opened:
        schema.migrate(opened, shards=SHARDS)
        opened.execute(CLOCK.encode())
        yield opened


@dataclass(slots=True)
class Process:
    """A member as a process: its clock, its beliefs, a write that it has not sent yet."""

    member: leases.Member
    holdings: Holdings = field(default_factory=lambda: Holdings(TIMES))
    boot_s: float = 0.0
    late: dict[int, int] = field(default_factory=dict)
    suspended: bool = False


def new_member(name: str) -> leases.Member:
    return leases.Member(id=uuid.uuid4(), name=name, version="1", lease_s=TIMES.lease_s)


class Fleet(RuleBasedStateMachine):
    """Members that do anything in any order."""

    connection: psycopg.Connection[Any]

    @initialize()
    def begin(self) -> None:
        self.connection.execute(
            "truncate member, written; update lease set owner = null, epoch = 0, until = '-infinity';"
            " update test_clock set at = 0"
        )
        self.processes = [Process(new_member(f"m{n}")) for n in range(MEMBERS)]
        self.epochs = dict.fromkeys(range(SHARDS), 0)
        self.owners: dict[tuple[int, int], uuid.UUID] = {}
        self.jumped = False
        self.value = 0

    member = st.integers(0, MEMBERS - 1)

    def _tick(self, seconds: float) -> None:
        """Time passes for all; the members' clocks run up to 2 % apart from the database's."""
        self.connection.execute("update test_clock set at = at + %s", (seconds,))
        for number, process in enumerate(self.processes):
            process.boot_s += seconds * (1 + 0.02 * (number - 1))

    @rule(seconds=st.floats(0.01, 8))
    def time_passes(self, seconds: float) -> None:
        self._tick(seconds)

    @rule(seconds=st.floats(-20, 20))
    def the_database_s_clock_jumps(self, seconds: float) -> None:
        self.jumped = True
        self.connection.execute("update test_clock set at = at + %s", (seconds,))

    @rule(number=member, slow_s=st.floats(0, 3), before=st.booleans())
    def renew(self, number: int, slow_s: float, before: bool) -> None:
        """A renewal that takes a while, before the database has it or on the way back."""
        process = self.processes[number]
        asked = process.boot_s
        if before:
            self._tick(slow_s)
        share = leases.renew(self.connection, process.member)
        if not before:
            self._tick(slow_s)
        process.holdings.granted(asked, share.epochs)

    @rule(number=member, pause_s=st.sampled_from([0.0, 1.0, 4.5, 6.0]), behind=member)
    def works(self, number: int, pause_s: float, behind: int) -> None:
        """Renews and writes, with a pause between, in which another one may renew."""
        self.renew(number, 0.0, before=True)
        self.begins_a_write(number)
        self._tick(pause_s)
        if behind != number:
            self.renew(behind, 0.0, before=True)
        self.writes_late(number)

    @rule(number=member)
    def begins_a_write(self, number: int) -> None:
        """The process is stopped between its look at the clock and the write."""
        process = self.processes[number]
        process.late = process.holdings.epochs(process.boot_s)

    @rule(number=member)
    def writes_late(self, number: int) -> None:
        process = self.processes[number]
        self.value += 1
        before = self._holders()
        with self.connection.transaction():
            good = leases.fenced(self.connection, process.member, process.late)
            for shard in good:
                self.connection.execute(
                    "insert into written values (%s, %s, %s)",
                    (shard, process.late[shard], self.value),
                )
        for shard in good:  # nothing was accepted from a lost lease
            assert before[shard] == (process.member.id, process.late[shard])

    @rule(number=member)
    def drains(self, number: int) -> None:
        self.connection.execute(
            "update member set draining = true where id = %s", (self.processes[number].member.id,)
        )

    @rule(number=member)
    def leaves(self, number: int) -> None:
        process = self.processes[number]
        process.holdings.granted(process.boot_s, {})  # stops first, then gives back
        leases.leave(self.connection, process.member)

    @rule(number=member)
    def is_killed_and_starts_again(self, number: int) -> None:
        old = self.processes[number]
        self.processes[number] = Process(new_member(old.member.name), boot_s=old.boot_s)

    def _holders(self) -> dict[int, tuple[uuid.UUID, int] | None]:
        rows = self.connection.execute(
            "select shard, owner, epoch, owner is not null and until > fleet_now() from lease"
        )
        return {shard: (owner, epoch) if live else None for shard, owner, epoch, live in rows}

    @invariant()
    def epochs_never_go_back(self) -> None:
        for shard, epoch in self.connection.execute("select shard, epoch from lease").fetchall():
            assert epoch >= self.epochs[shard]
            self.epochs[shard] = epoch

    @invariant()
    def an_epoch_has_one_owner(self) -> None:
        rows = self.connection.execute(
            "select shard, epoch, owner from lease where owner is not null"
        )
        for shard, epoch, owner in rows:
            assert self.owners.setdefault((shard, epoch), owner) == owner

    @invariant()
    def writes_of_one_shard_have_rising_epochs(self) -> None:
        rows = self.connection.execute("select shard, epoch from written order by value").fetchall()
        last: dict[int, int] = {}
        for shard, epoch in rows:
            assert epoch >= last.get(shard, 0)
            last[shard] = epoch

    @precondition(lambda self: not self.jumped)
    @invariant()
    def one_believes_at_a_time(self) -> None:
        holders = self._holders()
        seen: set[int] = set()
        for process in self.processes:
            believed = process.holdings.epochs(process.boot_s)
            assert not seen & set(believed)
            seen |= set(believed)
            for shard, epoch in believed.items():
                assert holders[shard] == (process.member.id, epoch)


def test_whatever_happens_a_shard_has_one_holder(connection: psycopg.Connection[Any]) -> None:
    Fleet.connection = connection
    rules = settings(
        max_examples=100,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Fleet, settings=rules)


def reset(connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        "truncate member; update lease set owner = null, epoch = 0, until = '-infinity';"
        " update test_clock set at = 0"
    )


def pass_s(connection: psycopg.Connection[Any], seconds: float) -> None:
    connection.execute("update test_clock set at = at + %s", (seconds,))


def test_members_take_a_fair_share(connection: psycopg.Connection[Any]) -> None:
    reset(connection)
    first, second = new_member("first"), new_member("second")
    assert len(leases.renew(connection, first).epochs) == SHARDS
    assert leases.renew(connection, second).epochs == {}
    share = leases.renew(connection, first)
    assert (len(share.epochs), len(share.given), share.members) == (3, 2, 2)
    assert len(leases.renew(connection, second).epochs) == 2


def test_a_member_that_dies_is_replaced_when_its_leases_end(
    connection: psycopg.Connection[Any],
) -> None:
    reset(connection)
    first, second = new_member("first"), new_member("second")
    leases.renew(connection, first)
    pass_s(connection, TIMES.lease_s - 0.01)
    assert leases.renew(connection, second).epochs == {}
    pass_s(connection, 0.02)
    assert dict(leases.renew(connection, second).epochs) == dict.fromkeys(range(SHARDS), 2)
    assert leases.renew(connection, first).epochs == {}


def test_who_leaves_is_replaced_at_once(connection: psycopg.Connection[Any]) -> None:
    reset(connection)
    first, second = new_member("first"), new_member("second")
    leases.renew(connection, first)
    leases.leave(connection, first)
    assert len(leases.renew(connection, second).epochs) == SHARDS


def test_who_drains_gives_back_and_takes_nothing(connection: psycopg.Connection[Any]) -> None:
    reset(connection)
    member = new_member("only")
    leases.renew(connection, member)
    connection.execute("update member set draining = true")
    share = leases.renew(connection, member)
    assert (share.epochs, len(share.given)) == ({}, SHARDS)
    assert leases.renew(connection, member).epochs == {}


def test_one_shard_makes_active_and_standby(connection: psycopg.Connection[Any]) -> None:
    reset(connection)
    connection.execute("delete from lease where shard > 0")
    try:
        first, second = new_member("first"), new_member("second")
        assert leases.renew(connection, first).epochs == {0: 1}
        for _ in range(5):
            assert leases.renew(connection, second).epochs == {}
            assert leases.renew(connection, first).epochs == {0: 1}
    finally:
        connection.execute(
            "insert into lease (shard) select n from generate_series(1, %s - 1) n", (SHARDS,)
        )


def test_a_fence_holds_until_the_writer_is_done(
    server: Postgres, connection: psycopg.Connection[Any]
) -> None:
    """Between the look at the lease and the commit nobody takes the shard."""
    reset(connection)
    first, second = new_member("first"), new_member("second")
    epochs = leases.renew(connection, first).epochs
    with psycopg.connect(server.dsn, autocommit=True) as other:
        with other.transaction():
            assert leases.fenced(other, first, epochs) == set(range(SHARDS))
            pass_s(connection, TIMES.lease_s + 1)
            assert leases.renew(connection, second).epochs == {}
        assert len(leases.renew(connection, second).epochs) == SHARDS
        with other.transaction():
            assert leases.fenced(other, first, epochs) == set()


def test_a_write_under_an_epoch_of_before_is_refused(connection: psycopg.Connection[Any]) -> None:
    """Its writer lost the shard and has taken it again since: what it read then may be old."""
    reset(connection)
    member = new_member("only")
    before = leases.renew(connection, member).epochs
    pass_s(connection, TIMES.lease_s + 1)
    after = leases.renew(connection, member).epochs
    assert (before[0], after[0]) == (1, 2)
    with connection.transaction():
        assert leases.fenced(connection, member, before) == set()
        assert leases.fenced(connection, member, after) == set(range(SHARDS))


@pytest.mark.parametrize("times", [(5, 3, 1), (5, 0, 1), (1, 1, 1)])
def test_times_that_leave_no_room_are_refused(times: tuple[float, float, float]) -> None:
    lease_s, renew_s, margin_s = times
    with pytest.raises(ValueError, match="two renewals"):
        LeaseTimes(lease_s=lease_s, renew_s=renew_s, margin_s=margin_s)


def test_holdings_end_by_the_clock_from_before_the_question() -> None:
    holdings = Holdings(TIMES)
    holdings.granted(100.0, {3: 7, 4: 1})
    assert holdings.epoch(3, 103.9) == 7
    assert holdings.epoch(3, 104.0) is None
    assert holdings.epochs(103.9) == {3: 7, 4: 1}
    assert holdings.next_end_s == 104.0
    holdings.drop([3])
    assert holdings.epoch(3, 100.0) is None
    holdings.granted(200.0, {})
    assert holdings.epochs(200.0) == {}
    assert holdings.next_end_s is None


def test_a_clock_that_went_back_keeps_no_dead_member_s_shards(
    connection: psycopg.Connection[Any],
) -> None:
    """The living keep theirs; the dead one's are free within a minute, however far it went back."""
    reset(connection)
    pass_s(connection, 3600)
    dead, living = new_member("dead"), new_member("living")
    leases.renew(connection, dead)
    leases.renew(connection, living)
    leases.renew(connection, dead)
    mine = leases.renew(connection, living).epochs
    assert len(mine) == 2
    pass_s(connection, -3600)
    assert leases.renew(connection, living).epochs == mine
    for _ in range(int(MAX_LEASE_S) + 2):
        pass_s(connection, 1)
        held = leases.renew(connection, living).epochs
        assert mine.items() <= held.items()
    assert len(held) == SHARDS


def test_after_a_stall_everybody_has_its_own_again(connection: psycopg.Connection[Any]) -> None:
    """A renewal that waited while the database stood still finds all leases ended, and everybody dead."""
    reset(connection)
    first, second = new_member("first"), new_member("second")
    leases.renew(connection, first)
    leases.renew(connection, second)
    leases.renew(connection, first)
    leases.renew(connection, second)
    pass_s(connection, TIMES.lease_s + 1)
    shares = [leases.renew(connection, member) for member in (first, second)]
    assert [len(share.epochs) for share in shares] == [3, 2]
    assert all(share.lapsed and not share.fresh for share in shares)


def test_an_older_database_gives_out_no_epoch_again(connection: psycopg.Connection[Any]) -> None:
    reset(connection)
    first, second = new_member("first"), new_member("second")
    leases.renew(connection, first)
    assert leases.renew(connection, first, seen={1: 7, 2: 1}).rolled_back == 1
    assert leases.renew(connection, first).epochs == {0: 1, 1: 8, 2: 1, 3: 1, 4: 1}
    # Another one holds it: a member that has seen more raises it, and the holder learns of that.
    assert leases.renew(connection, second, seen={0: 9}).rolled_back == 1
    with connection.transaction():
        assert leases.fenced(connection, first, {0: 1, 3: 1}) == {3}
    assert leases.renew(connection, first).epochs[0] == 10


def test_restored_epochs_are_above_all_that_were_given_out(
    connection: psycopg.Connection[Any],
) -> None:
    reset(connection)
    member = new_member("only")
    leases.renew(connection, member)
    leases.restored(connection)
    share = leases.renew(connection, member)
    assert set(share.epochs.values()) == {leases.RESTORED_STEP + 2}
    assert share.fresh == set(range(SHARDS))


def test_a_lease_has_an_end_that_can_be_told_from_a_clock_s_jump() -> None:
    with pytest.raises(ValueError, match="at most 60 s"):
        LeaseTimes(lease_s=61, renew_s=1, margin_s=1)
