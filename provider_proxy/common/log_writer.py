"""Writes a program's log from a thread of its own, so that no task waits for the log's reader.

A pipe without a reader, a full disk or a journal that hangs stops that thread and nothing else. Lines
that do not fit into the buffer are dropped and counted; the log says so once there is room again.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

MAX_BYTES = 4 * 1024 * 1024  # some 20,000 lines
MAX_WRITE_BYTES = 64 * 1024
CLOSE_LIMIT_S = 1.0  # at the end, for a reader that is slow
POLL_MS = 1000


class LineWriter:
    """Takes lines, and writes them in their order while `start` has been called and `close` has not.

    Args:
        write: takes some bytes, may block, may raise OSError.
        say: makes the line that tells of dropped ones, from their number.

    Attributes:
        dropped: how many lines so far.
    """

    def __init__(
        self,
        write: Callable[[bytes], object],
        say: Callable[[int], bytes],
        *,
        most_bytes: int = MAX_BYTES,
    ) -> None:
        self._write = write
        self._say = say
        self._most = most_bytes
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._unsaid = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self.dropped = 0

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Have a line written; never waits for its reader, never raises."""
        with self._changed:
            if self._bytes + len(line) > self._most:
                self.dropped += 1
                self._unsaid += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            self._changed.notify()

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> None:
        """Write what is left, as far as its reader lets us within this time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(limit_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closing:
                    self._changed.wait()
                if not self._lines and not self._unsaid:
                    return
                data = self._next()
            try:
                self._write(data)
            except OSError:
                with self._changed:
                    self.dropped += data.count(b"\n")
                    self._unsaid += data.count(b"\n")
                    if self._closing:
                        return
                time.sleep(
                    POLL_MS / 1000
                )  # a full disk, a reader that has gone: do not retry at once

    def _next(self) -> bytes:
        parts = []
        size = 0
        while self._lines and size < MAX_WRITE_BYTES:
            parts.append(self._lines.popleft())
            size += len(parts[-1])
        self._bytes -= size
        if self._unsaid and not self._lines:
            parts.append(self._say(self._unsaid))
            self._unsaid = 0
        return b"".join(parts)


def write_to(number: int, data: bytes) -> None:
    """Write all of it to a file descriptor, and wait as long as it takes.

    Raises:
        OSError: it has no reader any more, or there is no room for it.
    """
    with memoryview(data) as view:
        sent = 0
        while sent < len(view):
            try:
                sent += os.write(number, view[sent:])
            except OSError as exc:
                if exc.errno != errno.EAGAIN:
                    raise
                poll = select.poll()  # another process has made it non-blocking
                poll.register(number, select.POLLOUT)
                poll.poll(POLL_MS)
