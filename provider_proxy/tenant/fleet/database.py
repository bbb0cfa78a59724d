"""PostgreSQL from trio: statements run in worker threads, on two connections: one for leases, one for the
rest, so that a renewal never waits for a batch or a search.

No PostgreSQL driver is trio's own, so psycopg's blocking connections are used in threads. Every
statement has a limit on the server, every connection one in the kernel, so that a thread comes back from
a database that stalls or vanishes. A connection that failed is closed and opened again by the next call.

libpq reads TLS settings, the service file and the password file. An address with a password is refused:
the password would be in a file with other settings, and in messages.
"""

from __future__ import annotations

import enum
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
import trio
from psycopg import Connection
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from provider_proxy.errors import HostError, UsageError
from provider_proxy.tenant.fleet import schema

T = TypeVar("T")

CONNECT_LIMIT_S = 3
STATEMENT_LIMIT_MS = 10_000
# A member that is stopped within a transaction locks its leases' rows, so that no member could take them.
MEMBER_PAUSE_MS = 2_000
LONG_PAUSE_MS = 3_600_000  # of an import, which compares a million hosts between two statements
# The kernel's: they notice a server that vanished without closing the connection.
TCP_LIMIT_MS = 5_000
# Two transactions waited for each other: the server ended one, and it can be repeated.
AGAIN = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
TRIES = 3
SECRETS = ("password", "sslpassword")
QUOTED_RE = re.compile(r"\".*\"?", re.DOTALL)
SCHEME_RE = re.compile(r"postgres(ql)?://", re.ASCII)


class DatabaseError(HostError):
    """The database is not reachable, or refuses; nothing was written."""


def is_database(text: str) -> bool:
    """Whether a setting names a database and not a directory."""
    return SCHEME_RE.match(text) is not None


def read_address(text: str, *, name: str = "") -> str:
    """A libpq URL, checked and with this program's limits.

    Args:
        name: of the member, for the server's list of connections.

    Raises:
        UsageError: it is not a PostgreSQL URL, or holds a password.
    """
    try:
        values = conninfo_to_dict(text)
    except psycopg.ProgrammingError as exc:
        # libpq's message quotes what it could not read, which may contain a password.
        reason = QUOTED_RE.sub("…", str(exc).strip())
        raise UsageError(f"not a PostgreSQL address: {reason}") from None
    if any(values.get(key) is not None for key in SECRETS):
        raise UsageError(
            "the address holds a password; put it in libpq's passfile (passfile=…), or name a "
            "service (service=…)"
        )
    limits: dict[str, str | int] = {
        "connect_timeout": CONNECT_LIMIT_S,
        "tcp_user_timeout": TCP_LIMIT_MS,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 2,
        # Of several hosts the one that is not a standby; a standby only is refused.
        "target_session_attrs": "read-write",
    }
    limits["application_name"] = f"provider-proxy {name}".strip()
    return make_conninfo(text, **{key: v for key, v in limits.items() if key not in values})


def connect(address: str, *, pause_ms: int = LONG_PAUSE_MS) -> Connection[Any]:
    """Open a connection in autocommit mode.

    Args:
        pause_ms: how long a transaction may wait for this program between two statements.

    Raises:
        DatabaseError: it cannot be reached, or refuses.
    """
    try:
        opened = psycopg.connect(address, autocommit=True)
        opened.execute(f"set statement_timeout = {STATEMENT_LIMIT_MS}")
        opened.execute(f"set lock_timeout = {STATEMENT_LIMIT_MS}")
        opened.execute(f"set idle_in_transaction_session_timeout = {pause_ms}")
    except psycopg.Error as exc:
        raise translated(exc) from exc
    return opened


def again(work: Callable[[Connection[Any]], T], connection: Connection[Any]) -> T:
    """Do some work, and repeat it if the server ended it because of a deadlock.

    Args:
        work: one transaction, or several of which each may be repeated.
    """
    for _ in range(TRIES - 1):
        try:
            return work(connection)
        except AGAIN:
            continue
    return work(connection)


def translated(error: psycopg.Error) -> DatabaseError:
    """psycopg's error as a `DatabaseError`: one line, with the server's own reason."""
    text = " ".join(str(error).split()) or type(error).__name__
    return DatabaseError(f"the database: {text}")


class Lane(enum.Enum):
    """Which of the two connections a statement runs on."""

    LEASES = enum.auto()
    REST = enum.auto()


class Database:
    """Runs functions of a connection in worker threads.

    Args:
        address: from `read_address`.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._limiters = {lane: trio.CapacityLimiter(1) for lane in Lane}
        self._idle: dict[Lane, Connection[Any]] = {}
        self._lock = threading.Lock()
        self._closed = False

    async def run(
        self,
        work: Callable[[Connection[Any]], T],
        *,
        limit_s: float = 30.0,
        lane: Lane = Lane.REST,
    ) -> T:
        """Run `work` with a connection of its own for that time.

        If cancelled, it returns at once; the statement continues to its own limit.

        Raises:
            DatabaseError: the database is not reachable, refuses, or does not answer within `limit_s`.
        """
        try:
            with trio.fail_after(limit_s):
                return await trio.to_thread.run_sync(
                    self._in_thread,
                    work,
                    lane,
                    limiter=self._limiters[lane],
                    abandon_on_cancel=True,
                )
        except trio.TooSlowError as exc:
            raise DatabaseError(f"the database: no answer within {limit_s:g} s") from exc

    def _in_thread(self, work: Callable[[Connection[Any]], T], lane: Lane) -> T:
        with self._lock:
            connection = self._idle.pop(lane, None)
        try:
            if connection is None:
                connection = connect(self._address, pause_ms=MEMBER_PAUSE_MS)
                schema.check_version(connection)
            result = again(work, connection)
        except BaseException as exc:
            if connection is not None:
                connection.close()
            if isinstance(exc, psycopg.Error):
                raise translated(exc) from exc
            raise
        with self._lock:
            if not self._closed:
                self._idle[lane] = connection
                return result
        connection.close()
        return result

    def close(self) -> None:
        """Close the connections that are idle; a busy one is closed when it is done."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for connection in idle.values():
            connection.close()
