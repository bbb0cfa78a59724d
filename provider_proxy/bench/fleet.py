"""`bench fleet`: hosts that two watchers share on a real PostgreSQL, while both and the database fail.

The members are the real command, the hosts `bench.fakes` with real evidence, the database is Debian's,
made for this run. First punctuality without faults; then members are killed, stopped until another has
taken over and then continued, and cut off from the database, in random order; then the database stalls,
and stops.

What must never happen is counted by the database itself (a trigger looks at each write's lease) and by a
look at every host's clock and verdict once a second.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from provider_proxy.bench.fleet_parts import FLIPPED_HOSTS, INTERVAL_S, BenchFleet
from provider_proxy.bench.watch import Fakes
from provider_proxy.tenant.fleet import views
from provider_proxy.testing.postgres import postgres

HOSTS = int(os.environ.get("FLEET_HOSTS", "10000"))
FAULTS = int(os.environ.get("FLEET_FAULTS", "20"))
KINDS = ("kill", "stop", "cut")
WARM_UP_S = 2 * INTERVAL_S + 5
MEASURED_S = 3 * INTERVAL_S
STALL_S = 5.0
AWAY_S = 60.0
FILES_RESERVE = 500
Say = Callable[[str], None]


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
                fleet = BenchFleet(Path(name), db, fakes, hosts)
                try:
                    return _measure(fleet, rng, say)
                finally:
                    fleet.stop()
            finally:
                fakes.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _measure(fleet: BenchFleet, rng: random.Random, say: Say) -> dict[str, object]:
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
    takeovers = []
    kinds = list(itertools.islice(itertools.cycle(KINDS), FAULTS))
    rng.shuffle(kinds)
    counts = {kind: kinds.count(kind) for kind in KINDS}
    for number, what in enumerate(kinds):
        if number == FAULTS // 2:
            fleet.flipped_at = time.time()
            fleet.fakes.ask("flip")
        say(f"fault {number + 1} of {FAULTS}: {what}")
        takeovers += _fault(fleet, rng, what)
        fleet.until(fleet.is_shared, "two members with shards again")
        fleet.rest(rng.uniform(1, INTERVAL_S / 2))
    say("the database stalls")
    stalled = _stall(fleet)
    fleet.until(lambda: fleet.trusted() == fleet.hosts - FLIPPED_HOSTS, "what has changed")
    say("the database is stopped")
    saved_s, away, lost = _away(fleet)
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
        "away_lost": lost,
    }


def _fault(fleet: BenchFleet, rng: random.Random, what: str) -> list[float]:
    """One fault of one member; how long its shards were without a holder, in seconds."""
    name = rng.choice(sorted(fleet.members))
    if what == "kill":
        fleet.kill(name)
        took = fleet.until(lambda: fleet.is_taken(name), "a takeover")
        fleet.start()
        return [took]
    if what == "stop":
        fleet.members[name].process.send_signal(signal.SIGSTOP)
        took = fleet.until(lambda: fleet.is_taken(name), "a takeover")
        fleet.members[name].process.send_signal(signal.SIGCONT)
        return [took]
    fleet.cut(name)
    took = fleet.until(lambda: fleet.is_taken(name), "a takeover")
    fleet.connection.execute(sql.SQL("alter role {} login").format(sql.Identifier(name)))
    return [took]


def _stall(fleet: BenchFleet) -> int:
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


def _away(fleet: BenchFleet) -> tuple[float, int, int]:
    """Stop the server, and have hosts reboot meanwhile.

    Returns:
        How long after its return everything is saved, in seconds; shards that changed hands; and how
        many of the hosts' reports (of the reboot, and of being trusted again) are missing.
    """
    before = fleet.ask("select count(*) from bench_taken")
    fleet.connection.close()
    fleet.server.stop("fast")
    fleet.flipped_at = None
    fleet.fakes.ask("reset")
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
    told = fleet.ask(
        "select count(distinct (host, j->>'kind')) from (select host, epoch, sequence,"
        " convert_from(body, 'UTF8')::jsonb as j from report) r"
        " where j->>'kind' = 'reset' or j->>'previous' = 'INVALID_QUOTE' and j->>'state' = 'TRUSTED'"
    )
    changed = int(fleet.ask("select count(*) from bench_taken") - before)
    return saved_s, changed, 2 * min(FLIPPED_HOSTS, fleet.hosts) - told


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
