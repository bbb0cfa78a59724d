"""A fleet as a whole: members as processes, a real PostgreSQL, fake proxies with real evidence.

Members are killed, stopped and let go on again, and cut off; the database stalls and goes away.
"""

from __future__ import annotations

import json
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fleet_helpers import FLIPPED, HOSTS, SHARDS, Fleet, new_fleet
from needs_postgres import needs_postgres

from provider_proxy.tenant.fleet import views
from provider_proxy.testing.postgres import Postgres, postgres

pytestmark = [needs_postgres, pytest.mark.real]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def fleet(server: Postgres, tmp_path: Path) -> Iterator[Fleet]:
    with new_fleet(server, tmp_path) as made:
        yield made


def test_members_share_take_over_and_give_back(fleet: Fleet) -> None:
    first = fleet.start("first")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    second = fleet.start("second")
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share each")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")

    second.end(signal.SIGKILL)
    fleet.until(lambda: fleet.shares() == [SHARDS], "the first to take over")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")

    third = fleet.start("third")
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share each")
    assert first.end(signal.SIGTERM) == 0
    given = fleet.connection.execute("select count(*) from lease where owner is null").fetchone()
    taken = fleet.shares() == [SHARDS]
    assert taken or given == (SHARDS // 2,), "given back at once, not when the leases end"
    fleet.until(lambda: fleet.shares() == [SHARDS], "the rest to be taken")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")

    fleet.fakes.flip()
    fleet.until(
        lambda: fleet.view().by_state == {"TRUSTED": HOSTS - FLIPPED, "INVALID_QUOTE": FLIPPED},
        "the changed PCR",
    )
    fleet.until(lambda: fleet.view().waiting_reports == 0, "the outbox empty")
    assert third.end(signal.SIGTERM) == 0
    counted = Counter(report["state"] for report in fleet.reports())
    assert counted == {"TRUSTED": HOSTS, "INVALID_QUOTE": FLIPPED}
    fleet.check_reports()


def test_a_stopped_member_that_goes_on_writes_nothing(fleet: Fleet) -> None:
    first, second = fleet.start("first"), fleet.start("second")
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share each")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    first.process.send_signal(signal.SIGSTOP)
    fleet.until(lambda: fleet.shares() == [SHARDS], "the second to take over")
    first.process.send_signal(signal.SIGCONT)
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share again")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    assert second.process.poll() is None
    fleet.check_reports()


def test_nobody_watches_nothing_passes(fleet: Fleet) -> None:
    """A host whose process died is not trusted for longer than its verdict's bound."""
    member = fleet.start("only")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    member.end(signal.SIGKILL)
    fleet.until(
        lambda: fleet.view().by_state == {views.NOT_VERIFIED: HOSTS}, "every verdict too old"
    )
    assert "NOT_VERIFIED_SINCE" in fleet.cli("status")
    listed = json.loads(fleet.cli("hosts", "--json", "--like", "h1%").splitlines()[-1])
    assert {host["state"] for host in listed["hosts"]} == {views.NOT_VERIFIED}


def test_a_database_that_is_away_changes_nothing(fleet: Fleet) -> None:
    """Longer than the leases: everybody goes on from memory, and takes back its own."""
    fleet.start("first")
    fleet.start("second")
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share each")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    owners: dict[int, uuid.UUID] = dict(
        fleet.connection.execute("select shard, owner from lease").fetchall()
    )
    fleet.connection.close()
    fleet.server.stop("fast")
    time.sleep(7)
    fleet.fakes.flip()
    time.sleep(2)
    told = [report for report in fleet.reports() if report["state"] == "INVALID_QUOTE"]
    assert len(told) == FLIPPED
    assert all(report["unfenced"] for report in told)
    assert [m.ask("/readyz")[0] for m in fleet.members] == [503, 503]
    assert fleet.members[0].ask("/hosts")[0] == 503
    fleet.server.start()
    fleet.connection = psycopg.connect(fleet.server.dsn, autocommit=True)
    fleet.until(
        lambda: fleet.view().by_state == {"TRUSTED": HOSTS - FLIPPED, "INVALID_QUOTE": FLIPPED},
        "what was found meanwhile",
        10,
    )
    assert dict(fleet.connection.execute("select shard, owner from lease").fetchall()) == owners
    fleet.until(lambda: fleet.view().waiting_reports == 0, "the outbox empty")
    fleet.check_reports()


def test_a_database_whose_disk_is_full_holds_no_report_up(fleet: Fleet) -> None:
    """Leases are renewed, nothing can be written: what is found is sent, and saved when there is room."""
    fleet.start("first")
    fleet.start("second")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    fleet.connection.execute(
        "create function full_disk() returns trigger language plpgsql as $$ begin"
        " raise exception 'could not extend file: No space left on device' using errcode = '53100';"
        " end $$; create trigger full_disk before insert or update on host_state"
        " for each statement execute function full_disk()"
    )
    fleet.fakes.flip()

    def refused() -> list[dict[str, Any]]:
        return [report for report in fleet.reports() if report["state"] == "INVALID_QUOTE"]

    fleet.until(lambda: len(refused()) == FLIPPED, "the changed PCR to be told")
    assert all("No space left on device" in member.log.read_text() for member in fleet.members)
    assert fleet.view().waiting_reports == 0  # none of them is in the outbox
    fleet.connection.execute("drop trigger full_disk on host_state")
    fleet.until(
        lambda: fleet.view().by_state == {"TRUSTED": HOSTS - FLIPPED, "INVALID_QUOTE": FLIPPED},
        "what was found meanwhile",
    )
    fleet.until(lambda: len(refused()) == 2 * FLIPPED, "each of them again, from the outbox")
    fleet.check_reports()


def test_what_is_imported_is_taken_up(fleet: Fleet) -> None:
    fleet.start("only")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    fleet.source = fleet.config("import", hosts=HOSTS + 3, flipped=0)
    shown = fleet.cli("import")
    assert "nothing was changed; add --apply" in shown
    assert f"3 new, {FLIPPED} changed, 0 removed, {HOSTS - FLIPPED} the same" in shown
    assert fleet.view().by_state == {"TRUSTED": HOSTS}
    fleet.cli("import", "--apply")
    fleet.until(lambda: fleet.trusted() == HOSTS + 3, "the new hosts")
    fleet.source = fleet.config("import", hosts=2)
    assert "- h10 (stays; --remove removes it)" in fleet.cli("import", "--apply")
    fleet.cli("import", "--apply", "--remove")
    fleet.until(lambda: fleet.view().by_state == {"TRUSTED": 2}, "two hosts to be left")


def test_a_silence_holds_reports_back_until_it_ends(fleet: Fleet) -> None:
    fleet.start("only")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    fleet.until(lambda: fleet.view().waiting_reports == 0, "the outbox empty")
    assert f"reports of {HOSTS} hosts wait until" in fleet.cli(
        "silence", "--like", "h%", "--minutes", "5", "--why", "new kernels"
    )
    fleet.fakes.flip()
    fleet.until(lambda: fleet.view().waiting_reports == FLIPPED, "reports that wait")
    time.sleep(1)
    assert fleet.view().waiting_reports == FLIPPED
    fleet.connection.execute("update silence set ends = fleet_now()")
    fleet.until(lambda: fleet.view().waiting_reports == 0, "the outbox empty")
    assert sum(report["state"] == "INVALID_QUOTE" for report in fleet.reports()) == FLIPPED


def test_a_member_that_drains_serves_nothing(fleet: Fleet) -> None:
    first, second = fleet.start("first"), fleet.start("second")
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share each")
    assert first.ask("/readyz") == (200, "ready\n")
    assert "1 member will give back all shards" in fleet.cli("drain", "first")
    fleet.until(lambda: fleet.shares() == [0, SHARDS], "one to have all")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    assert "draining" in fleet.cli("status")
    fleet.until(lambda: first.ask("/readyz")[0] == 503, "the first not to be ready")
    assert "draining" in first.ask("/readyz")[1]
    assert second.ask("/readyz") == (200, "ready\n")
    assert f"provider_proxy_fleet_shards {SHARDS}.0" in second.ask("/metrics")[1]
    found = json.loads(second.ask("/hosts?q=h1&state=TRUSTED")[1])["results"]
    assert {host["name"] for host in found["hosts"]} == {f"h{n}" for n in (1, *range(10, 20))}
    shown = json.loads(first.ask("/fleet?hours=24")[1])["results"]
    assert (shown["by"]["name"], shown["hosts"]) == ("first", {"TRUSTED": HOSTS})
    for bad in (
        "/hosts?q=a&q=b",
        "/hosts?after=x",
        "/fleet?hours=2",
        "/hosts?x=1",
        "/hosts?state=%00",
    ):
        assert first.ask(bad)[0] == 400
    assert first.ask("/nothing")[0] == 404
