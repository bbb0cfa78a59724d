"""Follows the kernel's IMA list: continues reading where it stopped, into a copy.

The file stays open: the kernel walks its list from the head at each read(), and formats all of it again
for a reader that reopens it and seeks. A list that does not continue the earlier one is read from its
beginning; if the kernel has dropped its first entries, the copy still has them.
Runs in worker threads, one at a time.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from provider_proxy.host.logs.ima_list import ImaList, TooLongError

log = logging.getLogger(__name__)

READ_BYTES = 1024 * 1024  # securityfs returns a page at a time, whatever the size of the read
HEAD_BYTES = 4096  # by which a list is recognised
TAIL_BYTES = 1024
ABSENT, UNREADABLE, TOO_LONG = "absent", "unreadable", "too long"


class FollowedList:
    """The list of one file.

    Args:
        path: the kernel's file.
        directory: for the copy.

    Attributes:
        list: the copy; None before the first reading.
        missing: why there is no list; None if there is one.
    """

    def __init__(self, path: Path, directory: Path | None) -> None:
        self._path = path
        self._directory = directory
        self._fd: int | None = None
        self._offset = 0  # in the file
        self._base = 0  # in the copy: the position where the file begins
        self._too_long: bytes | None = None  # the beginning of a list that is too long to keep
        self._begins_late = False
        self.list: ImaList | None = None
        self.missing: str | None = None

    def read_on(self) -> None:
        """Read the new entries; sets `missing`."""
        try:
            self._read_on()
        except TooLongError:
            if self.list is not None:
                self._too_long = self.list.bytes_at(0, HEAD_BYTES)
            self._fail(TOO_LONG, "it is longer than the daemon keeps")
        except FileNotFoundError as exc:
            self._fail(ABSENT, exc.strerror or str(exc))
        except OSError as exc:
            self._fail(UNREADABLE, exc.strerror or str(exc))
        else:
            self.missing = None

    def _fail(self, missing: str, why: str) -> None:
        if self.missing != missing:
            log.warning("cannot read %s; answers do not contain it: %s", self._path, why)
        self.missing = missing
        self.close()

    def close(self) -> None:
        """Close the file and remove the copy."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self.list is not None:
            self.list.close()
            self.list = None

    def _read_on(self) -> None:
        if self._too_long is not None and self._fresh_head() == self._too_long:
            raise TooLongError  # do not read all of it again
        self._too_long = None
        if self.list is None:
            self.list = ImaList(self._directory)
        if self._fd is None or not self._goes_on(self._fd, self.list):
            self._begin(self.list)
        assert self._fd is not None
        while data := os.read(self._fd, READ_BYTES):
            self._offset += len(data)
            self.list.append(data)

    def _goes_on(self, fd: int, known: ImaList) -> bool:
        """Whether the path is still the open file, grown or not."""
        now, then = os.stat(self._path), os.fstat(fd)
        if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
            return False
        head = known.bytes_at(self._base, HEAD_BYTES)
        if head:
            fresh = self._fresh_head()
            length = min(len(head), len(fresh))
            if not length or head[:length] != fresh[:length]:
                return False
        if now.st_size == 0:  # as for all files of securityfs
            return True
        if now.st_size < self._offset:
            return False
        begin = max(0, self._offset - TAIL_BYTES)
        return known.ends_with(os.pread(fd, self._offset - begin, begin))

    def _fresh_head(self) -> bytes:
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.read(fd, HEAD_BYTES)
        finally:
            os.close(fd)

    def _begin(self, known: ImaList) -> None:
        """Open the file; its lines continue the copy if its beginning is in the copy."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._offset, self._base = fd, 0, 0
        first, feed, _ = self._fresh_head().partition(b"\n")
        at = known.find_line(first + feed) if feed else None
        if at and self._repeats(fd, known, at):
            log.warning("%s has lost its first entries; they are sent from the copy", self._path)
            self._offset, self._base = known.size - at, at
            return
        os.lseek(fd, 0, os.SEEK_SET)
        known.clear()
        begins_late = bool(feed) and b" boot_aggregate" not in first
        if begins_late and not self._begins_late:
            log.warning(
                "%s does not begin with boot_aggregate: a tenant without its first entries cannot "
                "verify it until the host reboots",
                self._path,
            )
        self._begins_late = begins_late

    @staticmethod
    def _repeats(fd: int, known: ImaList, at: int) -> bool:
        """Whether the file begins with the copy's content from a position on."""
        while at < known.size:
            data = os.read(fd, min(READ_BYTES, known.size - at))
            if not data or data != known.bytes_at(at, len(data)):
                return False
            at += len(data)
        return True
