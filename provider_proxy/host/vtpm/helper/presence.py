"""Which domains with a vTPM are here, from root's files only: libvirt's status files and QEMU's lock.

A domain counts only while all of these hold: its status file is a regular file of root's, under the
domain's own name, and not an old one that was replaced before; the process that it names holds the
lock on `NAME.pid`, which is root's too; and that process has not ended since it was first seen (a pidfd
refers to it, so that a new process with its number is not taken for it). Processes of the swtpm user or
QEMU's user can change none of that; they can at most remove files, and then the domain does not count.

Blocks for some file reads. Needs CAP_DAC_READ_SEARCH, because only root may read status files.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from provider_proxy.common.few_lines import FewLines
from provider_proxy.errors import HostError, VtpmError
from provider_proxy.host.vtpm.entries import Origin
from provider_proxy.host.vtpm.helper.status import Domain, parse_status

log = logging.getLogger(__name__)

MAX_STATUS_BYTES = 8 * 1024 * 1024  # a domain with much metadata has some hundred kB
MAX_DOMAINS = 100_000  # vtpm.max_vms at its most
PROC = Path("/proc")

LINES_A_MINUTE = 20
OLD_WORDS = 64  # replaced status files of a domain, which do not count again
# Errors that are about this process or host, and not about a file.
OUR_TROUBLE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM))

Lock = tuple[int, int]  # device, inode
Stamp = tuple[int, int, int]  # inode, mtime in ns, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """A domain that is here.

    Attributes:
        run: identifies this life of its QEMU: unique over all boots of this host.
        origin: where this life began, as the first state in which it ran showed; "unknown" before.
    """

    domain: Domain
    run: str
    origin: Origin


@dataclass(slots=True)
class _Read:
    """The last reading of a status file."""

    stamp: Stamp
    domain: Domain | None


@dataclass(slots=True)
class _Pin:
    """A QEMU process held by a pidfd."""

    pid: int
    fd: int
    run: str
    origin: Origin | None = None  # until it runs


class Presence:
    """Looks repeatedly at libvirt's status files.

    Args:
        root: libvirt's folder of status files.
        owner: whose files count: root's, except in tests.

    Raises:
        HostError: the folder cannot be opened.
    """

    def __init__(self, root: Path, *, owner: int = 0, proc: Path = PROC) -> None:
        self._root = root
        self._owner = owner
        self._proc = proc
        self._read: dict[str, _Read] = {}
        self._pins: dict[uuid.UUID, _Pin] = {}
        self._past: dict[uuid.UUID, deque[Stamp]] = {}
        self._lines = FewLines(LINES_A_MINUTE)
        try:
            self._boot = (proc / "sys/kernel/random/boot_id").read_text("ascii").strip()
            self.folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(f"cannot read {exc.filename}: {exc.strerror}") from exc
        self._ends = select.epoll()

    def close(self) -> None:
        """Close the descriptors of all processes and of the folder."""
        for vm in list(self._pins):
            self._unpin(vm)
        self._ends.close()
        os.close(self.folder)

    def ends_fd(self) -> int:
        """Readable once a QEMU that counts has ended."""
        return self._ends.fileno()

    def look(self) -> dict[uuid.UUID, Present]:
        """Every domain with a vTPM that is here now.

        Raises:
            HostError: this process cannot look, or the folder is no longer libvirt's.
        """
        try:
            if os.fstat(self.folder).st_nlink == 0:
                raise HostError(
                    f"{self._root} was removed; start this program again once libvirt runs"
                )
            domains = self._domains()
            holders = self._holders()
            found: dict[uuid.UUID, Present] = {}
            for vm, domain in domains.items():
                present = self._present(domain, holders)
                if present is not None:
                    found[vm] = present
        except OSError as exc:
            raise HostError(f"cannot see which VMs run: {exc.strerror}") from exc
        for vm in [vm for vm in self._pins if vm not in found]:
            self._unpin(vm)
        return found

    # --- files --------------------------------------------------------------------------------------

    def _domains(self) -> dict[uuid.UUID, Domain]:
        names = [name for name in os.listdir(self.folder) if name.endswith(".xml")][:MAX_DOMAINS]
        self._read = {name: self._read[name] for name in names if name in self._read}
        found: dict[uuid.UUID, Domain] = {}
        twice: set[uuid.UUID] = set()
        for name in names:
            domain = self._domain(name)
            if domain is None:
                continue
            if domain.vm in found:
                twice.add(domain.vm)
                self._warn("two status files name the VM %s; the VM is ignored", domain.vm)
            found[domain.vm] = domain
        for vm in twice:
            del found[vm]
        return found

    def _domain(self, name: str) -> Domain | None:
        try:
            with _opened(name, self.folder) as fd:
                status = os.fstat(fd)
                stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
                read = self._read.get(name)
                if read is None or read.stamp != stamp:
                    read = _Read(stamp, self._parse(name, fd, status))
                    self._read[name] = read
        except OSError as exc:
            if exc.errno in OUR_TROUBLE:
                raise
            return None  # gone, a link, or not a file
        domain = read.domain
        if domain is None:
            return None
        past = self._past.setdefault(domain.vm, deque(maxlen=OLD_WORDS))
        if stamp in past and stamp != past[-1]:
            return None  # an older file that had been replaced was put back
        if stamp not in past:
            past.append(stamp)
        return domain

    def _parse(self, name: str, fd: int, status: os.stat_result) -> Domain | None:
        if not self._is_ours(status) or status.st_size > MAX_STATUS_BYTES:
            self._warn("%s is not a regular file owned by root; it is ignored", name)
            return None
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_STATUS_BYTES + 1)
        try:
            domain = parse_status(data)
        except VtpmError as exc:
            self._warn("%s: %s", name, exc)
            return None
        if domain is not None and f"{domain.name}.xml" != name:
            self._warn("%s is about another domain; it is ignored", name)
            return None
        return domain

    def _warn(self, text: str, *values: object) -> None:
        """Log a line within a limit: the folder may belong to QEMU's user, who could fill the log."""
        more = self._lines.take()
        if more is not None:
            log.warning(text + "%s", *values, more)

    def _is_ours(self, status: os.stat_result) -> bool:
        return (
            stat.S_ISREG(status.st_mode) and status.st_uid == self._owner and status.st_nlink == 1
        )

    # --- processes ----------------------------------------------------------------------------------

    def _present(self, domain: Domain, holders: Mapping[Lock, int]) -> Present | None:
        try:
            status = os.stat(f"{domain.name}.pid", dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not self._is_ours(status) or holders.get((status.st_dev, status.st_ino)) != domain.pid:
            return None
        pin = self._pins.get(domain.vm)
        if pin is not None and pin.pid != domain.pid:
            self._unpin(domain.vm)
            pin = None
        if pin is None:
            pin = self._pin(domain)
            # The number may have belonged to another process when it was pinned: that holds no lock.
            if self._holders().get((status.st_dev, status.st_ino)) != domain.pid:
                if pin is not None:
                    self._unpin(domain.vm)
                return None
        if pin is None or _has_ended(pin.fd):
            return None
        if pin.origin is None and domain.runs:
            pin.origin = domain.origin
        return Present(domain=domain, run=pin.run, origin=pin.origin or "unknown")

    def _pin(self, domain: Domain) -> _Pin | None:
        try:
            fd = os.pidfd_open(domain.pid)
        except ProcessLookupError:
            return None
        try:
            began = self._began(domain.pid)
            self._ends.register(fd, select.EPOLLIN)
        except BaseException:
            os.close(fd)
            raise
        if began is None:
            os.close(fd)
            return None
        run = f"{self._boot}/{domain.pid}/{began}"
        pin = _Pin(pid=domain.pid, fd=fd, run=run)
        self._pins[domain.vm] = pin
        return pin

    def _began(self, pid: int) -> str | None:
        """When the process started, in ticks since the boot: field 22 of /proc/PID/stat."""
        try:
            text = (self._proc / str(pid) / "stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return text.rpartition(b")")[2].split()[19].decode("ascii")

    def _unpin(self, vm: uuid.UUID) -> None:
        os.close(self._pins.pop(vm).fd)  # this also removes it from the epoll

    def _holders(self) -> dict[Lock, int]:
        """Who holds the write lock on which file: proc_locks(5)."""
        found = {}
        for line in (self._proc / "locks").read_text("ascii").splitlines():
            words = line.split()
            if words[1:2] == ["POSIX"] and words[3:4] == ["WRITE"]:
                major, minor, inode = words[5].split(":")
                device = os.makedev(int(major, 16), int(minor, 16))
                found[device, int(inode)] = int(words[4])
        return found


@contextmanager
def _opened(name: str, folder: int) -> Iterator[int]:
    """A file of the folder; no link is followed, and no pipe is waited for."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
