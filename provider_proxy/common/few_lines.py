"""A bound on log lines that strangers can cause: so many a minute; the rest are counted, not written."""

from __future__ import annotations

import time
from collections.abc import Callable


class FewLines:
    """Counts lines of one kind.

    Args:
        a_minute: how many are written.
        now: seconds; of any clock.
    """

    def __init__(self, a_minute: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._a_minute = a_minute
        self._now = now
        self._minute = -1
        self._lines = 0
        self._unwritten = 0

    def take(self) -> str | None:
        """Room for a line: what is to stand at its end; None where there is no room this minute."""
        minute = int(self._now()) // 60
        if minute != self._minute:
            self._minute, self._lines = minute, 0
        self._lines += 1
        if self._lines > self._a_minute:
            self._unwritten += 1
            return None
        more = f" ({self._unwritten} more were not written)" if self._unwritten else ""
        self._unwritten = 0
        return more
