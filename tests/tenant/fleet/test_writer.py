"""What a member found, on its way to the database: nothing lost, nothing written without a lease."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

from provider_proxy.evidence.model import AkName, ClockState
from provider_proxy.tenant.fleet.lease import Holdings, LeaseTimes
from provider_proxy.tenant.fleet.rows import shard_of
from provider_proxy.tenant.fleet.writer import Writer
from provider_proxy.tenant.watch.reports import Settled, Verdict
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.store import HostRecords

SHARDS = 4
AK = AkName(bytes(34))
TIMES = LeaseTimes(lease_s=5, renew_s=1, margin_s=1)


class Bench:
    """A writer, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.records = HostRecords()
        self.holdings = Holdings(TIMES)
        self.sent: list[dict[str, Any]] = []
        self.writer = Writer(
            self.records,
            self.holdings,
            SHARDS,
            now=lambda: self.now,
            unfenced=lambda body: self.sent.append(json.loads(body)),
        )

    def hold(self, epoch: int = 1) -> None:
        self.holdings.granted(self.now, dict.fromkeys(range(SHARDS), epoch))

    def settle(self, host: str = "h1", state: State = State.TRUSTED, *, told: bool = True) -> None:
        report = {"id": str(uuid.uuid4()), "host": host, "state": state.value} if told else None
        self.writer.settled(Settled(host, Verdict(state), None, 20.0, report))


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.writer.begin("h1", 7)
    made.writer.begin("h2", 0)
    return made


def test_a_report_carries_epoch_and_sequence(bench: Bench) -> None:
    bench.hold(epoch=3)
    bench.settle()
    bench.settle(state=State.INVALID_QUOTE)
    epochs, (update,) = bench.writer.take()
    assert epochs == {shard_of("h1", SHARDS): 3}
    assert update.verdict == Verdict(State.INVALID_QUOTE)
    assert [report.sequence for report in update.reports] == [8, 9]
    values = json.loads(update.reports[0].body)
    assert (values["epoch"], values["sequence"], values["unfenced"]) == (3, 8, False)
    assert bench.sent == []
    assert bench.writer.take() == ({}, [])


def test_without_a_lease_reports_go_at_once_and_are_written_later(bench: Bench) -> None:
    """The bytes that were sent are the bytes in the outbox."""
    bench.settle()
    assert [report["unfenced"] for report in bench.sent] == [True]
    assert bench.writer.take() == ({}, [])
    bench.now += 60
    assert bench.writer.oldest_s() == 60
    bench.hold(epoch=2)
    _, (update,) = bench.writer.take()
    assert json.loads(update.reports[0].body) == bench.sent[0]
    assert update.age_s == 60
    assert bench.writer.oldest_s() == 0


def test_what_was_not_written_comes_again_and_the_newer_verdict_wins(bench: Bench) -> None:
    bench.hold()
    bench.settle(state=State.INVALID_QUOTE)
    _, updates = bench.writer.take()
    bench.now += 1
    bench.settle()
    bench.writer.put_back(updates)
    _, (update,) = bench.writer.take()
    assert update.verdict == Verdict(State.TRUSTED)
    states = [json.loads(report.body)["state"] for report in update.reports]
    assert states == ["INVALID_QUOTE", "TRUSTED"]


def test_a_verdict_that_is_put_back_grows_older_meanwhile(bench: Bench) -> None:
    bench.hold()
    bench.settle(told=False)
    bench.now += 2
    _, updates = bench.writer.take()
    assert updates[0].age_s == 2
    bench.now += 1
    bench.writer.put_back(updates)
    bench.hold()
    _, (update,) = bench.writer.take()
    assert update.age_s == pytest.approx(3)


def test_a_host_that_is_somebody_else_s_is_dropped(bench: Bench) -> None:
    bench.hold()
    bench.settle("h1")
    bench.settle("h2")
    _, updates = bench.writer.take()
    bench.writer.forget(["h1"])
    bench.writer.put_back(updates)
    _, after = bench.writer.take()
    assert [update.host for update in after] == ["h2"]


def test_the_newest_clock_is_written(bench: Bench) -> None:
    bench.hold()
    history = bench.records.history("h1", AK, None)
    for clock in (1000, 2000):
        history.accept(ClockState(reset_count=1, restart_count=0, clock_ms=clock))
    _, (update,) = bench.writer.take()
    assert update.record is not None
    assert update.record.newest == ClockState(reset_count=1, restart_count=0, clock_ms=2000)
    assert update.verdict is None


def test_reports_are_bounded_and_the_loss_is_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("provider_proxy.tenant.fleet.writer.MAX_WAITING_REPORTS", 2)
    for _ in range(3):
        bench.settle()
    assert bench.writer.dropped_reports == 1
    assert len(bench.sent) == 3  # they were sent all the same
    bench.hold()
    _, (update,) = bench.writer.take()
    assert len(update.reports) == 2


def test_reports_that_cannot_be_written_are_sent_after_a_while(bench: Bench) -> None:
    """Leases are held, and the database takes no writes: its disk is full."""
    bench.hold()
    bench.settle(state=State.INVALID_QUOTE)
    _, updates = bench.writer.take()
    bench.writer.put_back(updates)
    bench.writer.send_overdue()
    assert bench.sent == []
    bench.now += 6
    bench.hold()
    bench.writer.send_overdue()
    bench.writer.send_overdue()
    assert [report["unfenced"] for report in bench.sent] == [False]  # as it will be written
    bench.settle(state=State.TRUSTED)
    assert [report["unfenced"] for report in bench.sent] == [False, True]  # and the next at once
    _, updates = bench.writer.take()
    bench.writer.put_back(updates)
    bench.now += 6
    bench.writer.send_overdue()
    assert len(bench.sent) == 2  # each once
    bench.hold()
    _, (update,) = bench.writer.take()
    assert [json.loads(report.body) for report in update.reports] == bench.sent
    bench.settle()
    assert len(bench.sent) == 2  # all was written: the outbox is there again


def test_what_is_put_back_waits_since_it_was_found(bench: Bench) -> None:
    bench.records.put("h1", None)
    bench.hold()
    bench.settle()
    for _ in range(3):
        bench.now += 2
        bench.hold()
        _, updates = bench.writer.take()
        bench.writer.put_back(updates)
    assert bench.writer.oldest_s() == 6
