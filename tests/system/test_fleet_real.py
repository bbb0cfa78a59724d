"""A fleet as a whole: members as processes, a real PostgreSQL, fake proxies with real evidence.

Members are killed, stopped and let go on again, and cut off; the database stalls and goes away.
"""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from needs_postgres import needs_postgres

from provider_proxy.tenant.fleet import views
from provider_proxy.testing.postgres import Postgres, postgres
from provider_proxy.trust.pins import PinStore

pytestmark = [needs_postgres, pytest.mark.real]

HOSTS = 60
FLIPPED = 6
SHARDS = 8
INTERVAL_S = 1.0
LIMIT_S = 40.0


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "provider_proxy", "--log-level", "info", *map(str, words)]


class Fakes:
    """Fake proxies: two groups of hosts, the second of which changes a PCR when told."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "provider_proxy.bench.fakes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._line()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def flip(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("flip\n")
        self._process.stdin.flush()
        self._line()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class Member:
    """A member as a process, its reports read as they come."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.name = name
        self.log = fleet.folder / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command("watch", "--config", fleet.config(name)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.lines: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += iter(self.process.stdout.readline, b"")

    def end(self, number: int = signal.SIGKILL) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        code = self.process.wait(LIMIT_S)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


class Fleet:
    """A fleet of fake hosts on a database of its own."""

    def __init__(self, server: Postgres, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.members: list[Member] = []
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute("drop schema public cascade; create schema public")
        self.connection = psycopg.connect(server.dsn, autocommit=True)
        self.fakes = Fakes()
        pins = PinStore(folder / "pins")
        for place, ak in enumerate(self.fakes.about["aks"]):
            pins.pin(f"group-{place}", base64.b64decode(ak))
        (folder / "policy.json").write_text(json.dumps({"0": [self.fakes.about["good"]]}))
        self.source = self.config("import", hosts=HOSTS)
        self.cli("migrate", "--shards", str(SHARDS))
        self.cli("import", "--apply")

    def config(self, name: str, *, hosts: int = 0, flipped: int = FLIPPED) -> Path:
        lines = [
            f'state = "postgresql:///postgres?host={self.server.folder}&user=postgres"',
            f'state_dir = "{self.folder / name}"',
            f'member = "{name}"',
            f'pins = "{self.folder / "pins"}"',
            "[defaults]",
            f"interval_s = {INTERVAL_S}",
            *("max_retries = 1", "retry_interval_s = 0.2", "max_retry_s = 0.5", "timeout_s = 2.0"),
            "round_limit_s = 5.0",
            "insecure_plaintext = true",
            'tpm_policy = "policy.json"',
        ]
        for number in range(hosts):
            place = int(number < flipped)
            lines += [
                f"[hosts.h{number}]",
                'provider_ip = "127.0.0.1"',
                f"provider_port = {self.fakes.about['ports'][place]}",
                f'pin = "group-{place}"',
            ]
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def cli(self, part: str, *words: str) -> str:
        done = subprocess.run(
            command("fleet", part, "--config", self.source, *words),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str) -> Member:
        member = Member(self, name)
        self.members.append(member)
        return member

    def view(self) -> views.FleetView:
        return views.fleet_view(self.connection)

    def until(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> float:
        begin = time.monotonic()
        while not condition():
            if time.monotonic() - begin > limit_s:
                logs = "\n".join(m.log.read_text()[-2000:] for m in self.members)
                logs += self.cli("hosts", "--state", "FAILED")
                pytest.fail(f"not within {limit_s} s: {what}; {self.view()}\n{logs}")
            time.sleep(0.05)
        return time.monotonic() - begin

    def trusted(self) -> int:
        return self.view().by_state.get("TRUSTED", 0)

    def shares(self) -> list[int]:
        return sorted(member.shards for member in self.view().members)

    def stop(self) -> None:
        for member in self.members:
            member.end()
        self.fakes.stop()
        self.connection.close()

    def reports(self) -> list[dict[str, Any]]:
        """What receivers got, from all members."""
        lines = [line for member in self.members for line in list(member.lines)]
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def check_reports(self) -> None:
        """No event has two rows, and what came twice came byte for byte."""
        rows = self.connection.execute("select host, sequence, body from report order by 1, 2")
        last: dict[str, Any] = {}
        for host, _, body in rows.fetchall():
            told = json.loads(bytes(body))
            event = (told["state"], told["error"])
            assert last.get(host) != event, f"{host}: {event} twice"
            last[host] = event
        bodies: dict[str, set[bytes]] = {}
        for member in self.members:
            for line in list(member.lines):
                bodies.setdefault(json.loads(line)["id"], set()).add(line)
        assert all(len(found) == 1 for found in bodies.values())


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@contextmanager
def new_fleet(server: Postgres, folder: Path) -> Iterator[Fleet]:
    made = Fleet(server, folder)
    try:
        yield made
    finally:
        made.stop()


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


def test_what_is_imported_is_taken_up(fleet: Fleet) -> None:
    fleet.start("only")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    fleet.source = fleet.config("import", hosts=HOSTS + 3, flipped=0)
    shown = fleet.cli("import")
    assert "nothing is changed; add --apply" in shown
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
    fleet.start("first")
    fleet.start("second")
    fleet.until(lambda: fleet.shares() == [SHARDS // 2] * 2, "a fair share each")
    assert "1 member will give back all shards" in fleet.cli("drain", "first")
    fleet.until(lambda: fleet.shares() == [0, SHARDS], "one to have all")
    fleet.until(lambda: fleet.trusted() == HOSTS, "all hosts trusted")
    assert "draining" in fleet.cli("status")
