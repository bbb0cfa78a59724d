"""A real PostgreSQL for tests and benchmarks: a cluster of its own, on a unix socket alone, thrown away
afterwards. Nothing in it outlives a crash of the machine."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from provider_proxy.errors import HostError

START_LIMIT_S = 60
USER = "postgres"
SETTINGS = (
    *("-c", "listen_addresses="),
    *("-c", "fsync=off"),
    *("-c", "synchronous_commit=off"),
    *("-c", "full_page_writes=off"),
    *("-c", "max_connections=40"),
)


def find_bin() -> Path | None:
    """The folder of PostgreSQL's programs; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    if found:
        return found[0].parent
    there = shutil.which("initdb")
    return Path(there).parent if there else None


class Postgres:
    """A running cluster.

    Attributes:
        dsn: for libpq, without a database's name.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._programs = programs
        # The server refuses to run as root.
        self._user = USER if os.geteuid() == 0 else None
        self.dsn = f"host={folder} user={USER} dbname=postgres connect_timeout=5"

    def pids(self) -> list[int]:
        """The server's processes, the first one first."""
        first = int((self.data / "postmaster.pid").read_text().splitlines()[0])
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [first, *map(int, children)]

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs to its end."""
        subprocess.run(
            [self._programs / program, *arguments],
            user=self._user,
            cwd=self.folder,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=START_LIMIT_S,
        )

    def start(self, *settings: str) -> None:
        """Start the server, and wait until it answers.

        Args:
            settings: "name=value", beside and over the usual ones.
        """
        more = [word for setting in settings for word in ("-c", setting)]
        options = " ".join((*SETTINGS, "-k", str(self.folder), *more))
        log = str(self.folder / "log")
        self.run("pg_ctl", "start", "-w", "-D", str(self.data), "-l", log, "-o", options)

    def give(self, *paths: Path) -> None:
        """Make files the server's own."""
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            for path in paths:
                os.chown(path, entry.pw_uid, entry.pw_gid)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a folder of the server's, which is stopped, in place of what is there."""
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["/bin/cp", "-a", source, target], check=True, timeout=START_LIMIT_S)

    def stop(self, how: str = "immediate") -> None:
        """Stop the server."""
        self.run("pg_ctl", "stop", "-w", "-m", how, "-D", str(self.data))


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A cluster for as long as the context lasts.

    Raises:
        HostError: PostgreSQL is not installed.
    """
    programs = find_bin()
    if programs is None:
        raise HostError("PostgreSQL is not installed (postgresql on Debian)")
    # A short path: a socket's has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="pg") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            entry = pwd.getpwnam(USER)
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        server = Postgres(folder, programs)
        server.run(
            *("initdb", "-D", str(server.data), "-U", USER, "--auth=trust", "--no-sync"),
            *("--locale=C", "--encoding=UTF8"),
        )
        server.start()
        try:
            yield server
        finally:
            server.stop()
