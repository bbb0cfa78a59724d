"""The audit log's file: records are appended a batch at once, and read back.

Records are written in a worker thread; errors of the file or its disk do not reach the caller.
Lines that are read back are untrusted: a line that is not a record is reported and skipped. Reading needs
`cryptography` only, so that a tenant can do it; trio is imported where records are written.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from provider_proxy.errors import EvidenceFormatError, HostError
from provider_proxy.host.audit.records import (
    MAX_LINE_BYTES,
    AuditRecord,
    encode_record,
    parse_record,
)

log = logging.getLogger("provider_proxy.audit")  # without a file, records go there too

DEFAULT_MAX_BYTES = 64 << 20  # some 50,000 records a file
DEFAULT_KEEP = 8
MAX_KEEP = 99  # numbers that a reader tries; files with a date (.20260101) are not touched
WRITE_LIMIT_S = 5.0  # an append takes milliseconds; a disk that hangs must not hold the batches up


class AuditLog:
    """Appends records to a file that it rotates, or gives them to the logger.

    The file is opened for each batch, so that it may be moved or removed at any time.

    Args:
        path: the file; None for the logger "provider_proxy.audit", at INFO.
        max_bytes: the file's size limit, except for a single batch that is larger.
        keep: how many older files are kept; `path.1` is the newest.
        in_worker: runs the append; a thread, except in tests of timing.
        on_loss: called with each batch that could not be recorded completely.

    Attributes:
        failures: batches that could not be recorded completely.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        keep: int = DEFAULT_KEEP,
        in_worker: Callable[..., Awaitable[Any]] | None = None,
        on_loss: Callable[[], object] = lambda: None,
    ) -> None:
        import trio  # only here and in `write`: a tenant who reads a log may not have it

        if max_bytes < 1 or not 1 <= keep <= MAX_KEEP:
            raise ValueError(f"max_bytes must be at least 1, keep 1 to {MAX_KEEP}")
        self.failures = 0
        self._on_loss = on_loss
        self._path, self._max_bytes, self._keep = path, max_bytes, keep
        self._one = trio.CapacityLimiter(1)
        self._in_worker = in_worker or functools.partial(
            trio.to_thread.run_sync, abandon_on_cancel=True, limiter=self._one
        )
        self._streak = 0
        self._hangs = False

    async def write(self, records: Sequence[AuditRecord]) -> None:
        """Record a batch. Raises nothing for a file or disk that fails: it is logged and counted.

        It is shielded from cancellation, so that the last batch at drain is recorded, and returns
        after `WRITE_LIMIT_S` whatever the disk does. Without records it checks that the file opens.
        """
        import trio

        if self._hangs and not self._one.available_tokens:
            self._failed("the previous write has not returned")
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope(deadline=trio.current_time() + WRITE_LIMIT_S, shield=True):
            try:
                await self._in_worker(self._write, records)
            except OSError as exc:
                self._failed(exc.strerror or str(exc))
            else:
                self._succeeded()
            return
        self._hangs = True
        self._failed(f"a write takes longer than {WRITE_LIMIT_S:g} s")

    def _failed(self, problem: str) -> None:
        self.failures += 1
        self._on_loss()
        self._streak += 1
        if self._streak == 1:
            log.error("cannot write the audit log; records are lost: %s", problem)

    def _succeeded(self) -> None:
        self._hangs = False
        if self._streak:
            log.warning(
                "the audit log can be written again; %d batches are missing from it", self._streak
            )
            self._streak = 0

    def _write(self, records: Sequence[AuditRecord]) -> None:
        """In the worker. Raises: OSError."""
        lines = [encode_record(record) for record in records]
        if self._path is not None:
            self._append(self._path, b"".join(lines))
            return
        for line in lines:
            log.info("%s", line.decode("ascii").rstrip())

    def _append(self, path: Path, data: bytes) -> None:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":  # cut off by a crash or a full disk
                data = b"\n" + data
            is_full = size > 0 and size + len(data) > self._max_bytes
            while data and not is_full:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
        if is_full:
            self._rotate(path)
            self._append(path, data.removeprefix(b"\n"))  # to an empty file, which is never full

    def _rotate(self, path: Path) -> None:
        """Move each file one number up, as far as the first gap, which a crash in here can leave."""
        gap = next((n for n in range(1, self._keep) if _is_free(_older(path, n))), self._keep)
        for number in range(gap, 1, -1):
            _older(path, number - 1).replace(_older(path, number))
        path.replace(_older(path, 1))
        for number in range(self._keep + 1, MAX_KEEP + 1):
            _older(path, number).unlink(missing_ok=True)


def _is_free(path: Path) -> bool:
    """True if the name is free; a file that cannot be examined counts as existing. Raises: OSError."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    return False


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


OnDamage = Callable[[Path, int, str], None]
"""Called with a line that is not a record: file, line number from 1, and why; never its content."""


def warn_of_damage(path: Path, number: int, problem: str) -> None:
    """The usual `OnDamage`."""
    log.warning("skipping %s:%d: %s", path, number, problem)


def read_records(path: Path, on_damage: OnDamage = warn_of_damage) -> Iterator[AuditRecord]:
    """The records of a log and its older files, oldest first; untrusted bytes.

    May run while the log is rotated: a record that is kept is returned exactly once.

    Raises:
        HostError: the log does not exist, or cannot be read.
    """
    with contextlib.ExitStack() as stack:
        # The newest is opened first: a file rotated meanwhile appears again under the next name.
        files: dict[tuple[int, int], tuple[Path, BinaryIO]] = {}
        try:
            for name in (path, *(_older(path, number) for number in range(1, MAX_KEEP + 1))):
                with contextlib.suppress(FileNotFoundError):
                    file: BinaryIO = stack.enter_context(name.open("rb"))
                    stat = os.fstat(file.fileno())
                    files.setdefault((stat.st_dev, stat.st_ino), (name, file))
            if not files:
                raise HostError(f"cannot read {path}: No such file or directory")
            for name, file in reversed(files.values()):
                for number, line in enumerate(_lines(file), 1):
                    try:
                        record = parse_record(line)
                    except EvidenceFormatError as exc:
                        on_damage(name, number, str(exc))
                    else:
                        yield record
        except OSError as exc:
            raise HostError(f"cannot read {path}: {exc.strerror}") from exc


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines; of a line that is too long only the beginning, which is still too long."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        yield line
