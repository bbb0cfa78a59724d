"""Files read within a limit, written whole or not at all, and locked among processes."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from provider_proxy.errors import HostError, UsageError

MAX_SECRET_BYTES = 4096
UNIT_CREDENTIALS = Path("/run/credentials/provider-proxy.service")  # systemd.exec(5)


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


def read_trusted(path: Path, limit: int) -> bytes:
    """Read a file whose word counts: a configuration, a policy.

    Raises:
        HostError: it cannot be read, is no plain file, or everybody can write it.
        UsageError: it is larger than `limit` bytes.
    """
    try:
        # Not blocking: a FIFO that nobody writes to must not hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise HostError(f"cannot read {path}: not a plain file")
            if status.st_mode & stat.S_IWOTH:
                raise HostError(f"{path}: everybody can write it; see chmod o-w")
            data = file.read(limit + 1)
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}") from exc
    if len(data) > limit:
        raise UsageError(f"{path} is larger than {limit} bytes")
    return data


def demand_ours(path: Path) -> None:
    """Return where nobody but root and this process' user can change what stands at `path`.

    The file or directory itself, and every directory on the way to it, with links followed and not: the
    owner is one of the two, and nobody else may write (in a sticky directory he cannot replace anything).

    Raises:
        HostError: somebody else can, or it is neither file nor directory, or cannot be looked at.
    """
    try:
        real = path.resolve(strict=True)
        for part in dict.fromkeys((real, *real.parents, *path.absolute().parents)):
            status = part.stat()
            others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            is_sticky = part != real and status.st_mode & stat.S_ISVTX
            if status.st_uid not in (0, os.geteuid()) or (others_write and not is_sticky):
                raise HostError(
                    f"{path}: others can change it: {part} must belong to root or to the user of this "
                    "program, and not be writable by group or others"
                )
        if not (real.is_file() or real.is_dir()):
            raise HostError(f"{path} is neither a file nor a directory")
    except (OSError, RuntimeError, ValueError) as exc:  # RuntimeError: a circle of links
        raise HostError(f"cannot look at {path}: {getattr(exc, 'strerror', None) or exc}") from exc


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


def _give_away(fd: int, above: Path) -> None:
    """Where root made it: to the owner of what is above. Raises: OSError."""
    status = os.fstat(fd)
    is_ours = stat.S_ISDIR(status.st_mode) or (status.st_nlink == 1 and status.st_size == 0)
    if os.geteuid() == 0 and status.st_uid == 0 and is_ours:  # not somebody's link to another file
        owner = above.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)


class FileLock:
    """A lock among this host's processes; the kernel lets it go when its holder ends.

    What root makes here belongs to whoever the directory above belongs to, so that a command that root
    runs does not shut the daemon out.

    Args:
        path: of a file that is made where it is missing, and stays; in a folder that is made, too.
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
            is_new = not folder.exists()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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

    Outside the unit, as for a command on the daemon's configuration, it is where the unit has them.
    """
    path = Path(os.environ.get("CREDENTIALS_DIRECTORY", ""))
    return path if path.is_absolute() else UNIT_CREDENTIALS


def read_secret(key: str, path: Path | None, *, limit: int = MAX_SECRET_BYTES) -> bytes:
    """Read a secret by its path, without a final newline; empty where there is no path.

    Raises:
        HostError: it cannot be read, others can read it, or it is no plain file.
    """
    if path is None:
        return b""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            # systemd gives a credential to the unit's user by an ACL, whose mask stands in the
            # place of the group's bits.
            others = 0o007 if path.parent == credentials_directory() else 0o077
            if not stat.S_ISREG(status.st_mode) or status.st_mode & others:
                raise HostError(f"{key}: {path} must be a plain file that only its owner can read")
            return file.read(limit).removesuffix(b"\n")
    except OSError as exc:
        raise HostError(f"{key}: cannot read {path}: {exc.strerror}") from exc
