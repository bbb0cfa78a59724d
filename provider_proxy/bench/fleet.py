"""`bench fleet`: hosts that two watchers share on a real PostgreSQL, while both and the database fail.

The members are the real command, the hosts `bench.fakes` with real evidence, the database is Debian's,
made for this run. First punctuality at rest; then members are killed, stopped until another has taken
over and let go on, and cut off from the database, in random order; then the database stalls, and is away.

What must never happen is counted by the database itself (a trigger looks at each write's lease) and by a
look at every host's clock and verdict once a second.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from provider_proxy.bench.watch import Fakes
from provider_proxy.errors import HostError
from provider_proxy.tenant.fleet import imports, schema, views
from provider_proxy.tenant.fleet.hosts import ImportedFleet, ImportedHost, digest_of
from provider_proxy.testing.postgres import Postgres, postgres
from provider_proxy.trust.pins import PinStore

HOSTS = int(os.environ.get("FLEET_HOSTS", "10000"))
FAULTS = int(os.environ.get("FLEET_FAULTS", "20"))
INTERVAL_S = 10.0
FLIPPED_HOSTS = 100
WARM_UP_S = 2 * INTERVAL_S + 5
MEASURED_S = 3 * INTERVAL_S
STALL_S = 5.0
AWAY_S = 60.0
LIMIT_S = 120.0
STEP_S = 0.05
FILES_RESERVE = 500
Say = Callable[[str], None]

WATCHES = """
create table bench_lost (at timestamptz default clock_timestamp(), what text, shard integer);
create function bench_look() returns trigger language plpgsql as $$ begin
    if not exists (select from lease where shard = new.shard and epoch = new.epoch
            and until > clock_timestamp()) then
        insert into bench_lost (what, shard) values (tg_table_name, new.shard);
    end if;
    return new;
end $$;
create trigger bench_look before insert on report for each row execute function bench_look();
create table bench_taken (at timestamptz default clock_timestamp(), shard integer);
create function bench_take() returns trigger language plpgsql as $$ begin
    if new.owner is not null and old.owner is not null and new.owner <> old.owner then
        insert into bench_taken (shard) values (new.shard);
    end if;
    return new;
end $$;
create trigger bench_take before update on lease for each row execute function bench_take();
"""


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns the figures.

    Raises:
        HostError: PostgreSQL is missing, or the members did not hold the hosts.
    """
    rng = random.Random(seed)  # noqa: S311  # which fault comes next; no secret
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    hosts = min(HOSTS, hard - FILES_RESERVE)
    try:
        with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name, postgres() as db:
            fakes = Fakes(sorted(os.sched_getaffinity(0))[0])
            try:
                fleet = _Fleet(Path(name), db, fakes, hosts)
                try:
                    return _measure(fleet, rng, say)
                finally:
                    fleet.stop()
            finally:
                fakes.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class _Member:
    """A member as a process, its reports read as they come."""

    def __init__(self, config: Path) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "provider_proxy", "--log-level", "error"),
                *("watch", "--config", str(config)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self.lines: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass(slots=True)
class _Seen:
    """What a look at all hosts, once a second, has found."""

    clocks: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    went_back: int = 0
    false_pass: int = 0
    looks: int = 0


class _Fleet:
    """Database, members, and who watches them."""

    def __init__(self, folder: Path, server: Postgres, fakes: Fakes, hosts: int) -> None:
        self._folder, self.server, self.fakes, self.hosts = folder, server, fakes, hosts
        self.connection = self.connect()
        schema.migrate(self.connection)
        self.connection.execute(WATCHES.encode())
        imports.apply(self.connection, self._imported(), remove=False)
        self.names = itertools.count()
        self.members: dict[str, _Member] = {}
        self.ended: list[_Member] = []
        self.seen = _Seen()
        self.flipped_at: float | None = None

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.server.dsn, autocommit=True)

    def _imported(self) -> ImportedFleet:
        pins = PinStore(self._folder / "pins")
        files = []
        for place, ak in enumerate(self.fakes.about["aks"]):
            pins.pin(f"group-{place}", base64.b64decode(ak))
            files.append(pins.path_of(f"group-{place}").read_bytes())
        policy = json.dumps({"0": [self.fakes.about["good"]]}).encode()
        hosts = []
        for number in range(self.hosts):
            place = int(number < FLIPPED_HOSTS)
            rules: dict[str, object] = {
                "provider_ip": "127.0.0.1",
                "provider_port": self.fakes.about["ports"][place],
                "insecure_plaintext": True,
                "interval_s": INTERVAL_S,
                "jitter": 0.0,
                "timeout_s": 5.0,
                "round_limit_s": 10.0,
            }
            made = {"tpm_policy": digest_of(policy)}
            hosts.append(ImportedHost(name=f"h{number}", rules=rules, files=made, pin=files[place]))
        return ImportedFleet(hosts=tuple(hosts), policies={digest_of(policy): policy})

    def start(self) -> str:
        name = f"m{next(self.names)}"
        # A role of its own, so that it alone can be shut out.
        self.connection.execute(
            sql.SQL("create role {} login superuser").format(sql.Identifier(name))
        )
        config = self._folder / f"{name}.toml"
        config.write_text(
            f'state = "postgresql:///postgres?host={self.server.folder}&user={name}"\n'
            f'state_dir = "{self._folder / name}"\nmember = "{name}"\n'
        )
        self.members[name] = _Member(config)
        return name

    def cut(self, name: str) -> None:
        """The database lets a member in no more."""
        self.connection.execute(sql.SQL("alter role {} nologin").format(sql.Identifier(name)))
        self.connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", (name,)
        )

    def kill(self, name: str) -> None:
        member = self.members.pop(name)
        member.end()
        self.ended.append(member)

    def stop(self) -> None:
        for name in list(self.members):
            self.kill(name)

    def ask(self, statement: str, *values: object) -> Any:
        row = self.connection.execute(statement.encode(), values).fetchone()
        assert row is not None
        return row[0]

    def held_by(self, name: str) -> int:
        views_ = views.fleet_view(self.connection).members
        return sum(member.shards for member in views_ if member.name == name)

    def until(self, condition: Callable[[], bool], what: str) -> float:
        """Wait, looking at all hosts once a second; how long it took, in seconds."""
        begin = looked = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - begin > LIMIT_S:
                raise HostError(f"not within {LIMIT_S:g} s: {what}")
            if now - looked > 1:
                self.look()
                looked = now
            time.sleep(STEP_S)
        self.look()
        return time.monotonic() - begin

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()
            time.sleep(1)

    def look(self) -> None:
        """No clock goes back; no host that was changed is shown as trusted by a newer verdict."""
        rows = self.connection.execute(
            "select name, resets, restarts, clock_ms, verdict = 'TRUSTED' and"
            " fresh_until > fleet_now(), extract(epoch from verdict_at)::float8"
            " from host_state where resets is not null"
        ).fetchall()
        seen = self.seen
        seen.looks += 1
        for name, resets, restarts, clock_ms, shown, verdict_at in rows:
            state = (resets, restarts, clock_ms)
            if state < seen.clocks.get(name, state):
                seen.went_back += 1
            seen.clocks[name] = state
            changed = self.flipped_at is not None and int(name[1:]) < FLIPPED_HOSTS
            # A quote may have been taken just before the change, and judged just after.
            if changed and shown and verdict_at > (self.flipped_at or 0) + 1:
                seen.false_pass += 1

    def trusted(self) -> int:
        return views.fleet_view(self.connection).by_state.get("TRUSTED", 0)

    def is_shared(self) -> bool:
        view = views.fleet_view(self.connection)
        return view.free_shards == 0 and len(view.members) == len(self.members) == sum(
            member.shards > 0 for member in view.members
        )


def _measure(fleet: _Fleet, rng: random.Random, say: Say) -> dict[str, object]:
    say(f"{fleet.hosts} hosts every {INTERVAL_S:g} s over two members")
    fleet.start()
    fleet.start()
    fleet.until(fleet.is_shared, "two members with shards")
    fleet.until(lambda: fleet.trusted() == fleet.hosts, "all hosts trusted")
    fleet.rest(WARM_UP_S)
    fleet.fakes.ask("take")
    fleet.rest(MEASURED_S)
    gaps = [gap for group in fleet.fakes.ask("take") for gap in group["gaps_s"]]
    late_ms = sorted(max(0.0, gap - INTERVAL_S) * 1000 for gap in gaps)
    takeovers, counts = [], {"kill": 0, "stop": 0, "cut": 0}
    for number in range(FAULTS):
        what = rng.choice(sorted(counts))
        counts[what] += 1
        say(f"fault {number + 1} of {FAULTS}: {what}")
        takeovers += _fault(fleet, rng, what)
        if number == FAULTS // 2:
            fleet.fakes.ask("flip")
            fleet.flipped_at = time.time()
        fleet.until(fleet.is_shared, "two members with shards again")
        fleet.rest(rng.uniform(1, INTERVAL_S / 2))
    say("the database stalls")
    stalled = _stall(fleet)
    say("the database is away")
    saved_s, away = _away(fleet)
    fleet.until(lambda: views.fleet_view(fleet.connection).waiting_reports == 0, "an empty outbox")
    lines = [line for m in (*fleet.ended, *fleet.members.values()) for line in list(m.lines)]
    return {
        "hosts": fleet.hosts,
        "interval_s": INTERVAL_S,
        "lateness_p99_ms": round(late_ms[int(len(late_ms) * 0.99)], 1) if late_ms else None,
        "gaps": len(gaps),
        "faults": counts,
        "takeover_s_max": round(max(takeovers, default=0.0), 2),
        "takeover_s_median": round(sorted(takeovers)[len(takeovers) // 2], 2) if takeovers else 0,
        "two_rows_for_one_event": _doubled(fleet.connection),
        **_redelivered(lines),
        "clock_went_back": fleet.seen.went_back,
        "accepted_from_lost_lease": fleet.ask("select count(*) from bench_lost"),
        "false_pass": fleet.seen.false_pass,
        "looks": fleet.seen.looks,
        "stall_takeovers": stalled,
        "away_takeovers": away,
        "away_saved_s": round(saved_s, 2),
    }


def _fault(fleet: _Fleet, rng: random.Random, what: str) -> list[float]:
    """One fault of one member; how long its shards were without a holder, in seconds."""
    name = rng.choice(sorted(fleet.members))
    if what == "kill":
        fleet.kill(name)
        took = fleet.until(lambda: _is_taken(fleet, name), "a takeover")
        fleet.start()
        return [took]
    if what == "stop":
        fleet.members[name].process.send_signal(signal.SIGSTOP)
        took = fleet.until(lambda: _is_taken(fleet, name), "a takeover")
        fleet.members[name].process.send_signal(signal.SIGCONT)
        return [took]
    fleet.cut(name)
    took = fleet.until(lambda: _is_taken(fleet, name), "a takeover")
    fleet.connection.execute(sql.SQL("alter role {} login").format(sql.Identifier(name)))
    return [took]


def _is_taken(fleet: _Fleet, name: str) -> bool:
    view = views.fleet_view(fleet.connection)
    return view.free_shards == 0 and fleet.held_by(name) == 0


def _stall(fleet: _Fleet) -> int:
    """Stop every process of the server for a while; how many shards changed hands."""
    before = fleet.ask("select count(*) from bench_taken")
    pids = fleet.server.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(STALL_S)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    fleet.rest(INTERVAL_S)
    return int(fleet.ask("select count(*) from bench_taken") - before)


def _away(fleet: _Fleet) -> tuple[float, int]:
    """Stop the server; how long after its return everything is saved, and shards that changed hands."""
    before = fleet.ask("select count(*) from bench_taken")
    fleet.connection.close()
    fleet.server.stop("fast")
    time.sleep(AWAY_S)
    fleet.server.start()
    fleet.connection = fleet.connect()
    back = time.monotonic()
    now = fleet.ask("select extract(epoch from now())::float8")
    fleet.until(
        lambda: (
            fleet.ask(
                "select count(*) from host_state where extract(epoch from verdict_at) < %s",
                now - INTERVAL_S - 1,
            )
            == 0
        ),
        "the states saved",
    )
    saved_s = time.monotonic() - back
    fleet.rest(INTERVAL_S)
    return saved_s, int(fleet.ask("select count(*) from bench_taken") - before)


def _doubled(connection: psycopg.Connection[Any]) -> int:
    """Rows that say of a host what the row before it said."""
    last: dict[str, tuple[object, object]] = {}
    doubled = 0
    for host, body in connection.execute("select host, body from report order by host, sequence"):
        told = json.loads(bytes(body))
        if told["kind"] == "verdict":
            event = (told["state"], told["error"])
            doubled += last.get(host) == event
            last[host] = event
    return doubled


def _redelivered(lines: list[bytes]) -> dict[str, int]:
    """Reports that came more than once, and how many of those differed."""
    bodies: dict[str, list[bytes]] = {}
    for line in lines:
        if line.endswith(b"\n"):
            bodies.setdefault(json.loads(line)["id"], []).append(line)
    return {
        "redelivered": sum(len(found) - 1 for found in bodies.values()),
        "redelivered_otherwise": sum(len(set(found)) > 1 for found in bodies.values()),
    }
