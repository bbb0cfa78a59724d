"""The process's stdin, stdout and stderr, made usable whatever the caller did to them.

A result that cannot be written to stdout (a full disk, a closed descriptor, a reader that has gone)
does not count: the command ends with exit code 3. A message that cannot be written to stderr is
dropped: the exit code says the result. A descriptor that the caller closed is opened on /dev/null, so
that no socket and no file of ours gets its number.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TextIO

STDIN, STDOUT, STDERR = 0, 1, 2


class OutputLostError(Exception):
    """What a command wrote to stdout was lost. Its text is the system's reason."""


class _Out(io.FileIO):
    """stdout. Remembers the first failure, for callers in between may swallow the exception."""

    lost: OSError | None = None

    def write(self, data: memoryview, /) -> int:  # type: ignore[override]  # from a BufferedWriter
        try:
            while (written := super().write(data)) is None:  # the caller made it non-blocking
                select.select([], [self], [])
        except OSError as exc:
            self.lost = self.lost or exc
            raise OutputLostError(exc.strerror or str(exc)) from exc
        return written


class _Messages(io.FileIO):
    """stderr. What cannot be written is dropped."""

    def write(self, data: memoryview, /) -> int:  # type: ignore[override]  # from a BufferedWriter
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return data.nbytes if written is None else written


def _open_missing() -> None:
    """Give 0, 1 and 2 to /dev/null where they are closed; a write to such a stdout still fails."""
    for number, flags in ((STDIN, os.O_RDONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise
            opened = os.open(os.devnull, flags)  # the lowest free number: this one
            os.set_inheritable(opened, True)


def _text(raw: io.FileIO, *, line_buffering: bool, like: TextIO | None) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",  # nothing is lost to a locale without the character
        line_buffering=line_buffering,
    )


class Streams:
    """stdout and stderr from now on. Streams that a caller in this process has replaced stay."""

    __slots__ = ("_out",)

    def __init__(self) -> None:
        _open_missing()
        self._out: _Out | None = None
        if sys.stdout is sys.__stdout__:
            self._out = _Out(STDOUT, "w", closefd=False)
            sys.stdout = _text(self._out, line_buffering=self._out.isatty(), like=sys.__stdout__)
        if sys.stderr is sys.__stderr__:
            raw = _Messages(STDERR, "w", closefd=False)
            sys.stderr = _text(raw, line_buffering=True, like=sys.__stderr__)

    def flush(self) -> None:
        """Write what stdout still holds.

        Raises:
            OutputLostError: it does not get there.
        """
        sys.stdout.flush()

    def lost(self) -> str | None:
        """Why output was lost; empty where its reader has gone, None where all was written."""
        if self._out is None or self._out.lost is None:
            return None
        if self._out.lost.errno == errno.EPIPE:
            return ""
        return self._out.lost.strerror or str(self._out.lost)

    def abandon(self) -> None:
        """Drop what stdout still holds: the interpreter would try again at its end, and exit with 120."""
        if self._out is not None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, STDOUT)
            os.close(null)
