"""What a member has seen itself outlives a database that is older."""

from __future__ import annotations

from provider_proxy.evidence.model import AkName, ClockState
from provider_proxy.tenant.fleet.seen import SeenRecords
from provider_proxy.tenant.watch.store import HostRecord

AK, OTHER = AkName(bytes(34)), AkName(b"\1" * 34)


def clock(ms: int) -> ClockState:
    return ClockState(reset_count=1, restart_count=0, clock_ms=ms)


def record(ms: int, ak: AkName = AK) -> HostRecord:
    return HostRecord(ak_name=ak, newest=clock(ms), first_use={0: b"\1"})


def watched(ms: int) -> SeenRecords:
    """A host that was watched here, and is somebody else's since."""
    records = SeenRecords()
    records.begin("h", record(1))
    records.history("h", AK, None).accept(clock(ms))
    records.forget("h")
    return records


def test_an_older_database_does_not_turn_a_clock_back() -> None:
    records = watched(900)
    assert records.begin("h", record(500))
    assert records.history("h", AK, None).newest() == clock(900)
    assert records.first_use("h", AK) == {0: b"\1"}
    changed = records.take_changed()  # and the newer one is written again
    assert changed["h"].newest == clock(900)


def test_a_newer_database_counts() -> None:
    records = watched(900)
    assert not records.begin("h", record(1000))
    assert records.history("h", AK, None).newest() == clock(1000)
    assert records.take_changed() == {}


def test_a_round_that_ends_after_its_host_was_forgotten_saves_nothing() -> None:
    records = SeenRecords()
    records.begin("h", record(1))
    late = records.history("h", AK, None)
    records.forget("h")
    late.accept(clock(900))
    records.trust_first_use("h", AK, {0: b"\2"})
    assert records.take_changed() == {}


def test_another_chip_has_another_clock() -> None:
    records = watched(900)
    assert not records.begin("h", record(5, OTHER))
    assert records.history("h", OTHER, None).newest() == clock(5)


def test_a_host_that_was_removed_and_came_back_goes_on() -> None:
    records = watched(900)
    assert records.begin("h", None)
    assert records.history("h", AK, None).newest() == clock(900)


def test_what_was_read_and_not_asked_yet_is_seen_too() -> None:
    records = SeenRecords()
    records.begin("h", record(700))
    records.forget("h")
    assert records.begin("h", record(600))
    assert records.history("h", AK, None).newest() == clock(700)
