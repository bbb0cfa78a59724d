"""A fleet of fake hosts with real evidence: members as processes on a real PostgreSQL."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from provider_proxy.tenant.fleet import views
from provider_proxy.testing.postgres import Postgres
from provider_proxy.trust.pins import PinStore

HOSTS = 60
FLIPPED = 6
SHARDS = 8
INTERVAL_S = 1.0
LIMIT_S = 40.0


PROGRAM = ("-m", "provider_proxy")


def command(*words: str | Path, program: Sequence[str] = PROGRAM) -> list[str]:
    return [sys.executable, *program, "--log-level", "info", *map(str, words)]


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


def admin_of(name: str) -> str:
    """Each member's admin listener: an address of its own for its name and this process."""
    number = int.from_bytes(hashlib.sha256(f"{os.getpid()} {name}".encode()).digest()[:2], "big")
    return f"127.77.{number >> 8}.{number & 255}:8898"


class Member:
    """A member as a process, its reports read as they come."""

    def __init__(self, fleet: Fleet, name: str, program: Sequence[str] = PROGRAM) -> None:
        self.name = name
        self.log = fleet.folder / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command("watch", "--config", fleet.config(name), program=program),
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

    def ask(self, path: str) -> tuple[int, str]:
        """What its admin listener answers."""
        answer = httpx.get(f"http://{admin_of(self.name)}{path}", trust_env=False, timeout=LIMIT_S)
        return answer.status_code, answer.text

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
            f'admin = "{admin_of(name)}"',
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

    def start(self, name: str, program: Sequence[str] = PROGRAM) -> Member:
        member = Member(self, name, program)
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


@contextmanager
def new_fleet(server: Postgres, folder: Path) -> Iterator[Fleet]:
    made = Fleet(server, folder)
    try:
        yield made
    finally:
        made.stop()
