"""Files read within a limit, written whole or not at all, and locked among processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

from provider_proxy.errors import HostError, UsageError

MAX_SECRET_BYTES = 4096
UNIT_CREDENTIALS = Path("/run/credentials/provider-proxy.service")  # systemd.exec(5)


def is_there(path: Path) -> bool:
    """False only where nothing is there: `Path.exists` raises, or says so, where it may not look.

    Raises:
        HostError: it cannot be looked at.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise HostError(f"cannot look at {path}: {exc.strerror}") from exc
    return True


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder with this ending, sorted; none where there is no such folder.

    Not glob(), which takes a folder that it may not read for an empty one.

    Raises:
        HostError: it cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(suffix))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise HostError(f"cannot read {folder}: {exc.strerror}") from exc


def read_file(path: Path, limit: int) -> bytes:
    """Read a whole file.

    Raises:
        HostError: it cannot be read.
        UsageError: it is larger than `limit` bytes.
    """
    return _read(path, limit, lambda _: None)


def read_private(path: Path, limit: int) -> bytes:
    """Read a file that others must not read: a key, a secret.

    PostgreSQL's rule: it belongs to this user and only its owner may read it (0600), or it belongs to
    root and a group may read it, too (0640). A credential of systemd's is the unit's by an ACL, whose
    mask stands in the place of the group's bits.

    Raises:
        HostError: it cannot be read, or others can read it.
        UsageError: it is larger than `limit` bytes.
    """

    def check(status: os.stat_result) -> None:
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
            raise HostError(f"{path} must be a plain file")
        is_credential = path.parent == credentials_directory()
        if status.st_uid not in (0, os.geteuid()) and os.geteuid() != 0:
            raise HostError(
                f"{path} is owned by uid {status.st_uid}; only root and this user are trusted"
            )
        others = 0o007 if is_credential else 0o037 if status.st_uid == 0 else 0o077
        if status.st_mode & others:
            mode = "0640" if status.st_uid == 0 else "0600"
            raise HostError(f"{path} must not be readable by others: chmod {mode} {path}")

    return _read(path, limit, check)


def _read(path: Path, limit: int, check: Callable[[os.stat_result], None]) -> bytes:
    try:
        with path.open("rb") as file:
            check(os.fstat(file.fileno()))
            data = file.read(limit + 1)
    except IsADirectoryError as exc:
        raise HostError(f"cannot read {path}: it is a directory") from exc
    except OSError as exc:
        hint = ""
        if isinstance(exc, FileNotFoundError) and path.parent == credentials_directory():
            hint = (
                f": credential:{path.name} exists only inside the unit and while it runs: check "
                "LoadCredential= in the unit, or write a path"
            )
        raise HostError(f"cannot read {path}: {exc.strerror}{hint}") from exc
    if len(data) > limit:
        raise UsageError(f"{path} is larger than {limit} bytes")
    return data


def read_trusted(path: Path, limit: int) -> bytes:
    """Read a file that is trusted: a configuration, a policy.

    Raises:
        HostError: it cannot be read, is not a plain file, or is world-writable.
        UsageError: it is larger than `limit` bytes.
    """
    try:
        # Not blocking: a FIFO without a writer must not hold this up.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise HostError(f"cannot read {path}: not a plain file")
            if status.st_mode & stat.S_IWOTH:
                raise HostError(f"{path}: everybody can write it: chmod o-w {path}")
            data = file.read(limit + 1)
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}") from exc
    if len(data) > limit:
        raise UsageError(f"{path} is larger than {limit} bytes")
    return data


def demand_ours(path: Path) -> None:
    """Raise unless only root and this process' user can change what is at `path`.

    This looks at the file or directory and at every directory on the way to it, with links followed and
    not. Each must be owned by one of the two and writable by no other user, unless its directory is
    sticky.

    Raises:
        HostError: another user can, or it is neither a file nor a directory, or cannot be examined.
    """
    try:
        real = path.resolve(strict=True)
        for part in dict.fromkeys((real, *real.parents, *path.absolute().parents)):
            status = part.stat()
            others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            is_sticky = part != real and status.st_mode & stat.S_ISVTX
            if status.st_uid not in (0, os.geteuid()) or (others_write and not is_sticky):
                raise HostError(
                    f"{path}: other users can change it: {part} must be owned by root or by the user of "
                    "this program, and not be writable by group or others"
                )
        if not (real.is_file() or real.is_dir()):
            raise HostError(f"{path} is neither a file nor a directory")
    except (OSError, RuntimeError, ValueError) as exc:  # RuntimeError: a circle of links
        raise HostError(f"cannot look at {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def make_private_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for their owner alone.

    `Path.mkdir` gives its mode to the last one only; the others are open to all.

    Raises:
        OSError: it cannot be made.
        HostError: what is there cannot be examined.
    """
    missing = []
    while not is_there(path):
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read; after a crash it is the old one or the new one.

    Raises:
        HostError: it cannot be written.
    """
    _write(path, data, 0o600, make_private_folder)


def write_public(path: Path, data: bytes) -> None:
    """The same for a file without secrets that others read, in a folder that is there.

    Raises:
        HostError: it cannot be written.
    """
    _write(path, data, 0o644, lambda folder: None)


def _write(path: Path, data: bytes, mode: int, prepare: Callable[[Path], None]) -> None:
    try:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
    except ValueError as exc:
        raise HostError(f"cannot write {path}: it is not the name of a file") from exc
    try:
        prepare(path.parent)
        part.unlink(missing_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask is
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
        with contextlib.suppress(OSError):  # a full disk leaves half of it
            part.unlink(missing_ok=True)
        raise HostError(f"cannot write {path}: {exc.strerror}") from exc


def _give_away(fd: int, above: Path) -> None:
    """What root made goes to the owner of the folder above. Raises: OSError."""
    status = os.fstat(fd)
    is_ours = stat.S_ISDIR(status.st_mode) or (status.st_nlink == 1 and status.st_size == 0)
    if (
        os.geteuid() == 0 and status.st_uid == 0 and is_ours
    ):  # not another user's link to another file
        owner = above.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)


class FileLock:
    """A lock among this host's processes; the kernel lets it go when its holder ends.

    What root makes here goes to the owner of the directory above, so that a command of root does not shut
    the daemon out.

    Args:
        path: of a file that is made where it is missing, and stays; its folder is made, too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def take(self) -> bool:
        """Take it, without waiting; False where another holds it.

        Raises:
            HostError: the file cannot be made.
        """
        try:
            folder = self._path.parent
            is_new = not is_there(folder)
            make_private_folder(folder)
            if is_new:
                directory = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    _give_away(directory, folder.parent)
                finally:
                    os.close(directory)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise HostError(f"cannot lock {self._path}: {exc.strerror}") from exc
        try:
            _give_away(fd, folder)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError as exc:
            os.close(fd)
            raise HostError(f"cannot lock {self._path}: {exc.strerror}") from exc
        self._fd = fd
        return True

    def release(self) -> None:
        """Let it go."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def credentials_directory() -> Path:
    """Where systemd puts the unit's credentials: $CREDENTIALS_DIRECTORY.

    Outside the unit, as for a command that reads the daemon's configuration, it is the unit's directory.
    """
    path = Path(os.environ.get("CREDENTIALS_DIRECTORY", ""))
    return path if path.is_absolute() else UNIT_CREDENTIALS


def read_secret(key: str, path: Path | None, *, limit: int = MAX_SECRET_BYTES) -> bytes:
    """Read a secret by its path, without a final newline; empty where there is no path.

    Raises:
        HostError: it cannot be read, is too large, or others can read it.
    """
    if path is None:
        return b""
    try:
        return read_private(path, limit).removesuffix(b"\n")
    except (HostError, UsageError) as exc:
        raise HostError(f"{key}: {exc}") from exc
