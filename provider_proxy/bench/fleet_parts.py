"""What `bench fleet` disturbs: a real PostgreSQL, members as processes, and an observer of both."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import sys
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
from provider_proxy.testing.postgres import Postgres
from provider_proxy.trust.pins import PinStore

INTERVAL_S = 10.0
FLIPPED_HOSTS = 100
LIMIT_S = 120.0
STEP_S = 0.05

WATCHES = """
create table bench_lost (at timestamptz default clock_timestamp(), what text, shard integer);
create function bench_look() returns trigger language plpgsql as $$ begin
    if not exists (select from lease where shard = new.shard and epoch = new.epoch
            and until > now()) then -- now(): when the transaction began, and its fence after that
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


class BenchFleet:
    """Database, members, and the observer."""

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

    def is_taken(self, name: str) -> bool:
        """Whether every shard has a holder, and none of them is this member."""
        count = self.ask(
            "select count(*) from lease l left join member m on m.id = l.owner"
            " where l.until <= fleet_now() or m.name = %s",
            name,
        )
        return int(count) == 0

    def until(self, condition: Callable[[], bool], what: str) -> float:
        """Wait, looking at all hosts once a second; how long it took, in seconds."""
        begin = looked = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - begin > LIMIT_S:
                raise HostError(f"not reached within {LIMIT_S:g} s: {what}")
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
        """Whether every shard has a holder, and every member a shard."""
        free, members, holders = self.connection.execute(
            "select (select count(*) from lease where until <= fleet_now()),"
            " (select count(*) from member where until > fleet_now()),"
            " (select count(distinct l.owner) from lease l join member m on m.id = l.owner"
            " where l.until > fleet_now() and m.until > fleet_now())"
        ).fetchone() or (1, 0, 0)
        return free == 0 and members == holders == len(self.members)
