"""Files read within a limit, and written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from provider_proxy.errors import HostError, UsageError


def read_file(path: Path, limit: int) -> bytes:
    """Read a whole file.

    Raises:
        HostError: it cannot be read.
        UsageError: it is larger than `limit` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}") from exc
    if len(data) > limit:
        raise UsageError(f"{path} is larger than {limit} bytes")
    return data


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read; after a crash it is the old one or the new one.

    Raises:
        HostError: it cannot be written.
    """
    try:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
    except ValueError as exc:
        raise HostError(f"cannot write {path}: it names no file") from exc
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as exc:
        raise HostError(f"cannot write {path}: {exc.strerror}") from exc
