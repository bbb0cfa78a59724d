"""Reads a running vTPM's EKs from its state: copies the file, and starts a temporary swtpm on the copy.

The running swtpm is not disturbed. It replaces its file atomically, so a copy is always consistent. A
state in swtpm's linear format is written in place, so a copy can be inconsistent: swtpm then refuses it,
and it is read again. The file belongs to the swtpm user and is hostile input: symbolic links are not
followed, owner, type and size are checked, and the swtpm that reads it has no privileges and limits on
memory and time. Only keys that a TPM generated itself and that cannot leave it are accepted as EKs,
because a guest can put another key at an EK's handle.

Does not check: that the running swtpm uses this file. Processes of the swtpm user can replace it, so
the result is only as trustworthy as that user, who runs the VM's vTPM anyway.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from provider_proxy.common.files import is_there
from provider_proxy.errors import EvidenceFormatError, HostError, VtpmError
from provider_proxy.evidence.tpm_keys import (
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    RESTRICTED,
    SENSITIVE_DATA_ORIGIN,
    SIGN,
    parse_public,
)
from provider_proxy.host.vtpm.entries import Ek, ek_of
from provider_proxy.host.vtpm.helper.secrets import NoSecretError, passphrase_fd
from provider_proxy.host.vtpm.helper.status import StatePlace

STATE_FILE = "tpm2-00.permall"
LINEAR_FILE = "state"
MAX_STATE_BYTES = 2 * 1024 * 1024  # a new one has 6 kB, one with a full NV 200 kB
MAX_LINEAR_BYTES = 16 * 1024 * 1024  # Proxmox makes volumes of 4 MiB
COPY_PREFIX = "readback-"
# Where swtpm_setup makes EKs persistent: RSA-2048, P-384 (or P-256), RSA-3072.
EK_HANDLES = (0x81010001, 0x81010016, 0x8101001C)
EK_MUST_HAVE = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | RESTRICTED | DECRYPT
# swtpm's header of a state file: version, least version, size, flags, length (swtpm_nvstore.h)
STATE_HEADER = struct.Struct(">BBHHI")
FLAG_ENCRYPTED = 0x1
# Its linear format: magic, version, a byte, size of this header, and files of (offset, bytes, room, a
# word), of which the first is the permanent state; all little-endian (swtpm_nvstore_linear.h).
LINEAR_HEADER = struct.Struct("<QBBHII")
LINEAR_MAGIC = 0x737774706D6C696E
# TPM 2.0 Part 2, 6.9 and 6.5.2; Part 3, 12.4 (ReadPublic)
NO_SESSIONS = 0x8001
CC_READ_PUBLIC = 0x173
READ_PUBLIC = struct.Struct(">HIII")
RESPONSE_HEADER = struct.Struct(">HII")
MAX_RESPONSE_BYTES = 4096
# Root gives the copy to this user: even without capabilities, uid 0 owns the host's files.
NOBODY = 65534  # the kernel's overflowuid
# prlimit(1): a valid state takes 0.1 s and 20 MB
CPU_LIMIT_S = 10
MEMORY_LIMIT_BYTES = 512 * 1024 * 1024
FILE_LIMIT_BYTES = MAX_LINEAR_BYTES


Stamp = tuple[int, int, int, int]  # device, inode, mtime in ns, size


class EncryptedError(VtpmError):
    """The vTPM's state is encrypted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSource:
    """Where vTPMs' states are, and who must own them.

    Attributes:
        root: libvirt's directory of vTPMs.
        uid: of the swtpm user, who must own a state.
        work: our directory for copies; best in memory, because a copy holds the vTPM's secrets.
        limit_s: the time limit for reading one, in seconds.
        secrets: socket of provider-proxy-vtpm-secret; None where encrypted states are not read.
    """

    root: Path
    uid: int
    work: Path
    limit_s: float = 15.0
    secrets: Path | None = None

    def stamp(self, vm: uuid.UUID, place: StatePlace) -> Stamp | None:
        """Changes when the state is written; None where the state cannot be examined."""
        try:
            with self._opened(vm, place) as fd:
                return _stamp_of(os.fstat(fd))
        except (OSError, VtpmError):
            return None

    async def read_eks(
        self, vm: uuid.UUID, place: StatePlace, secret: uuid.UUID | None = None
    ) -> tuple[Ek, ...]:
        """The EKs in a vTPM's state.

        Args:
            secret: UUID of libvirt's secret, where the state is encrypted with one.

        Raises:
            EncryptedError: the state is encrypted, and its passphrase is not available.
            VtpmError: the file is missing, not acceptable, or holds no EK.
            HostError: swtpm, setpriv or prlimit is missing or cannot be started, or the disk is full.
        """
        folder, is_secret = await trio.to_thread.run_sync(self.copy, vm, place)
        try:
            with ExitStack() as stack:
                key = None
                if is_secret:
                    key = await self._key(stack, secret)
                with trio.fail_after(self.limit_s):
                    return await _ask_swtpm(folder, key)
        except trio.TooSlowError as exc:
            raise VtpmError(f"the vTPM's state was not read within {self.limit_s:g} s") from exc
        except OSError as exc:  # no more files, processes or memory
            raise HostError(f"cannot start swtpm to read a vTPM back: {exc.strerror}") from exc
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))

    async def _key(self, stack: ExitStack, secret: uuid.UUID | None) -> int:
        """A descriptor with the passphrase; the stack closes it. Raises: EncryptedError."""
        if secret is None:
            raise EncryptedError("the vTPM's state is encrypted")
        opened = passphrase_fd(self.secrets, secret)
        try:
            return await trio.to_thread.run_sync(stack.enter_context, opened)
        except NoSecretError as exc:
            raise EncryptedError(f"the vTPM's state is encrypted: {exc}") from exc

    def copy(self, vm: uuid.UUID, place: StatePlace) -> tuple[Path, bool]:
        """Copy a vTPM's state into a new directory in `work`; and whether it is encrypted.

        Raises:
            VtpmError: it is missing, a link, not owned by the swtpm user, or too large.
            HostError: there is no room for the copy.
        """
        limit = MAX_LINEAR_BYTES if place.is_file else MAX_STATE_BYTES
        try:
            with self._opened(vm, place) as fd:
                self._check(os.fstat(fd))
                with open(fd, "rb", closefd=False) as file:
                    data = file.read(limit + 1)
        except OSError as exc:
            raise VtpmError(f"cannot read the vTPM's state: {exc.strerror}") from exc
        if len(data) > limit:
            raise VtpmError(f"the vTPM's state has more than {limit} bytes")
        is_secret = is_encrypted(data, linear=place.is_file)
        try:
            folder = Path(tempfile.mkdtemp(prefix=COPY_PREFIX, dir=self.work))
            path = folder / (LINEAR_FILE if place.is_file else STATE_FILE)
            try:
                path.write_bytes(data)
                if os.geteuid() == 0:
                    os.chown(path, NOBODY, NOBODY)
                    os.chown(folder, NOBODY, NOBODY)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)  # a partial copy holds secrets, too
                raise
        except OSError as exc:
            raise HostError(f"cannot copy a vTPM's state into {self.work}: {exc.strerror}") from exc
        return folder, is_secret

    def _check(self, status: os.stat_result) -> None:
        is_plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        is_roots_volume = stat.S_ISBLK(status.st_mode) and self.uid == 0
        if status.st_uid != self.uid or not (is_plain or is_roots_volume):
            raise VtpmError("the vTPM's state is not a regular file owned by the swtpm user")

    @contextmanager
    def _opened(self, vm: uuid.UUID, place: StatePlace) -> Iterator[int]:
        """Open a state from directory to directory: no link below the root is followed.

        A place that libvirt names was set by root, so root's links on the way to it are followed.
        """
        names: tuple[str, ...] = (str(vm), "tpm2", STATE_FILE)
        start = self.root
        if place.path is not None:
            start = place.path.parent if place.is_file else place.path
            names = (place.path.name,) if place.is_file else (STATE_FILE,)
            if place.is_file and place.path.is_symlink() and place.path.lstat().st_uid == 0:
                start, names = place.path.resolve().parent, (place.path.resolve().name,)
        fd = os.open(start, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for number, name in enumerate(names, 1):
                kind = os.O_NONBLOCK if number == len(names) else os.O_DIRECTORY
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind
                deeper = os.open(name, flags, dir_fd=fd)
                os.close(fd)
                fd = deeper
            yield fd
        finally:
            os.close(fd)


def _stamp_of(status: os.stat_result) -> Stamp:
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def is_encrypted(data: bytes, *, linear: bool) -> bool:
    """Whether a state is encrypted, from swtpm's header.

    Raises:
        VtpmError: it is too short, or not of that format.
    """
    offset = 0
    if linear:
        if len(data) < LINEAR_HEADER.size:
            raise VtpmError("the vTPM's state is shorter than its header")
        magic, _, _, _, offset, length = LINEAR_HEADER.unpack_from(data)
        if magic != LINEAR_MAGIC or length == 0:
            raise VtpmError("the vTPM's state is not in swtpm's linear format, or empty")
    if len(data) < offset + STATE_HEADER.size:
        raise VtpmError("the vTPM's state is shorter than its header")
    return bool(STATE_HEADER.unpack_from(data, offset)[3] & FLAG_ENCRYPTED)


def remove_copies(work: Path) -> None:
    """Remove copies left by a helper that was killed."""
    for path in work.glob(COPY_PREFIX + "*"):
        shutil.rmtree(path, ignore_errors=True)


async def _ask_swtpm(folder: Path, key: int | None) -> tuple[Ek, ...]:
    """Start swtpm on one end of a pair of sockets and read the EKs at the other."""
    ours, theirs = socket.socketpair()
    async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
        with theirs:
            process = await trio.lowlevel.open_process(
                _command(theirs.fileno(), linear=is_there(folder / LINEAR_FILE), key=key),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),) if key is None else (theirs.fileno(), key),
                env={"LC_ALL": "C", "HOME": str(folder)},
                cwd=folder,
            )
        try:
            found = [await _read_ek(stream, handle) for handle in EK_HANDLES]
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise VtpmError("swtpm cannot load the vTPM's state") from exc
        except EvidenceFormatError as exc:
            raise VtpmError(f"the vTPM holds a key that cannot be read: {exc}") from exc
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    eks = tuple(ek for ek in found if ek is not None)
    if not eks:
        raise VtpmError("the vTPM has no EK yet")
    return _one_of_each(eks)


def _one_of_each(eks: tuple[Ek, ...]) -> tuple[Ek, ...]:
    """The first key of each family; a later one is not swtpm_setup's."""
    kept: dict[str, Ek] = {}
    for ek in eks:
        kept.setdefault(ek.family, ek)
    return tuple(kept.values())


def _command(fd: int, *, linear: bool = False, key: int | None = None) -> list[str]:
    """swtpm's command line for the state in its directory, without privileges and with limits. swtpm
    ends when our end of the socket closes."""
    programs = {name: shutil.which(name) for name in ("setpriv", "prlimit", "swtpm")}
    for name, path in programs.items():
        if path is None:
            raise HostError(f"reading vTPMs back needs {name}: run `apt install swtpm util-linux`")
    # A daemon under systemd has ambient capabilities; inheritable ones alone give nothing to a
    # program without file capabilities.
    setpriv = [str(programs["setpriv"]), "--no-new-privs", "--ambient-caps=-all"]
    if os.geteuid() == 0:
        setpriv += ["--bounding-set=-all", f"--reuid={NOBODY}", f"--regid={NOBODY}"]
        setpriv += ["--clear-groups"]
    return [
        *setpriv,
        *(str(programs["prlimit"]), f"--cpu={CPU_LIMIT_S}", f"--as={MEMORY_LIMIT_BYTES}"),
        *("--core=0", f"--fsize={FILE_LIMIT_BYTES}"),
        *(str(programs["swtpm"]), "socket", "--tpm2"),
        *("--tpmstate", f"backend-uri=file://{LINEAR_FILE}" if linear else "dir=."),
        *(
            () if key is None else ("--key", f"pwdfd={key},mode=aes-256-cbc,kdf=pbkdf2")
        ),  # libvirt's
        *("--fd", str(fd), "--flags", "not-need-init,startup-clear"),
    ]


async def _read_ek(stream: trio.SocketStream, handle: int) -> Ek | None:
    """The EK at a handle; None where the handle is empty or holds a key that is not an EK."""
    command = READ_PUBLIC.pack(NO_SESSIONS, READ_PUBLIC.size, CC_READ_PUBLIC, handle)
    await stream.send_all(command)
    header = await _receive(stream, RESPONSE_HEADER.size)
    _, size, code = RESPONSE_HEADER.unpack(header)
    if not RESPONSE_HEADER.size <= size <= MAX_RESPONSE_BYTES:
        raise EvidenceFormatError("swtpm's response has an impossible size")
    body = await _receive(stream, size - RESPONSE_HEADER.size)
    if code != 0:
        return None
    length = 2 + int.from_bytes(body[:2], "big")  # the names follow it
    public = parse_public(body[:length])
    is_ek = public.attributes & EK_MUST_HAVE == EK_MUST_HAVE and not public.attributes & SIGN
    return ek_of(public.public_key) if is_ek else None


async def _receive(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await stream.receive_some(count - len(data))
        if not part:
            raise trio.BrokenResourceError("swtpm closed the connection")
        data += part
    return data
