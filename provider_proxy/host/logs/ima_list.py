"""A copy of the host's IMA list, of any length: appended to, and handed out in parts.

The copy is a file without a name, so that it takes none of the daemon's memory and disappears with it.
Marks every 64 kB serve to find any line. Runs in worker threads, one at a time; uses neither trio nor the
kernel's file.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import os
import re
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path

MAX_LIST_BYTES = 1024 * 1024 * 1024  # six million lines; bounds the disk space of the copy
MARK_BYTES = 64 * 1024
MAX_ENTRY_BYTES = 64 * 1024  # no real entry is longer
_ENTRY_RE = re.compile(rb"\n(?= ?[0-9]{1,2} [0-9a-f]{40})")


class TooLongError(Exception):
    """The list is longer than `MAX_LIST_BYTES`; what was appended before is still there."""


class ImaList:
    """The copy.

    Args:
        directory: where its file is made.

    Attributes:
        lines: whole lines.
        size: their bytes.

    Raises:
        OSError: there is no space for the file.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._fd, name = tempfile.mkstemp(dir=directory, prefix=".ima-")
        os.unlink(name)
        self._close = weakref.finalize(self, os.close, self._fd)
        self.clear()

    def clear(self) -> None:
        """Forget the list."""
        os.ftruncate(self._fd, 0)
        self._rest = b""  # an incomplete line
        self._mark_lines, self._mark_offsets = array("Q", (0,)), array("Q", (0,))
        self.lines = self.size = 0

    def close(self) -> None:
        """Remove the copy."""
        self._close()

    def append(self, data: bytes) -> None:
        """Append more of the list.

        Raises:
            TooLongError: the list becomes longer than the limit.
            OSError: there is no space for it.
        """
        whole, feed, rest = data.rpartition(b"\n")
        if not feed:
            self._rest += data
        else:
            self._write(self._rest + whole + feed)
            self._rest = rest
        if self.size + len(self._rest) > MAX_LIST_BYTES:
            raise TooLongError

    def _write(self, lines: bytes) -> None:
        at = 0
        while at < len(lines):
            end = min(len(lines), at + MARK_BYTES)
            if end < len(lines):
                end = lines.rfind(b"\n", at, end) + 1 or lines.find(b"\n", end) + 1
            piece = lines[at:end]
            if os.pwrite(self._fd, piece, self.size) != len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.size += len(piece)
            self.lines += piece.count(b"\n")
            if self.size - self._mark_offsets[-1] >= MARK_BYTES:
                self._mark_lines.append(self.lines)
                self._mark_offsets.append(self.size)
            at = end

    def bytes_at(self, at: int, count: int) -> bytes:
        """Some bytes of the list; fewer at its end."""
        return os.pread(self._fd, min(count, max(0, self.size - at)), at)

    def ends_with(self, tail: bytes) -> bool:
        """Whether these are the last bytes that were appended."""
        known = os.pread(self._fd, len(tail), max(0, self.size - len(tail)))
        return (known + self._rest).endswith(tail)

    def find_line(self, line: bytes) -> int | None:
        """The position of a line, including its line feed; None if it is not in the list."""
        if not self.size:
            return None
        with mmap.mmap(self._fd, self.size, prot=mmap.PROT_READ) as data:
            at = data.find(line)
            while at > 0 and data[at - 1] != 10:
                at = data.find(line, at + 1)
            return None if at < 0 else at

    def pieces(self, entry: int, size: int) -> tuple[int, Iterator[bytes]]:
        """The list from an entry on, in pieces of whole entries.

        Returns:
            The first entry, and the pieces. If the entry is beyond the end, the whole list from 0,
            as Keylime's agent does: the host has rebooted since the tenant counted.
        """
        start = entry if entry <= self.lines else 0
        mark = bisect.bisect_right(self._mark_lines, start) - 1
        offset = self._mark_offsets[mark]
        skip = start - self._mark_lines[mark]
        data, at = b"", 0
        while skip:
            found = data.find(b"\n", at) + 1
            if found:
                at, skip = found, skip - 1
            else:
                data += self.bytes_at(offset + len(data), 2 * MARK_BYTES)
        return start, self._pieces_from(offset + at, self.size, size)

    def _pieces_from(self, at: int, end: int, size: int) -> Iterator[bytes]:
        while at < end:
            # Enough beyond a piece to contain the beginning of the next entry.
            data = self.bytes_at(at, min(end - at, size + MAX_ENTRY_BYTES))
            cut = len(data) if at + len(data) == end <= at + size else entry_after(data, size)
            yield data[:cut]
            at += cut


def entry_after(data: bytes, at: int) -> int:
    """The start of the next entry after the line at a position, or the end of the data.

    A file name with line feeds makes an entry of several lines, which must not be split.
    """
    found = _ENTRY_RE.search(data, at, at + MAX_ENTRY_BYTES)
    if found:
        return found.end()
    return len(data) if len(data) - at < MAX_ENTRY_BYTES else data.find(b"\n", at) + 1 or len(data)
