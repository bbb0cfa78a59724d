"""Which VMs with a vTPM run here, as their swtpm processes show.

libvirt keeps a file with the process id of each swtpm; a file may be stale, so the process is looked
at: it must be a swtpm of the swtpm user, on the state of the VM. Blocks for some file reads.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from pathlib import Path

from provider_proxy.errors import HostError

MAX_PID_FILES = 100_000
MAX_PID_BYTES = 32
MAX_COMMAND_BYTES = 64 * 1024
PROC = Path("/proc")
SCARCE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))  # says nothing of what runs


def running_vms(run_root: Path, state_root: Path, uid: int) -> frozenset[uuid.UUID]:
    """The VMs whose swtpm runs.

    Args:
        run_root: libvirt's folder of `*.pid` files; where it is missing nothing runs.
        state_root: libvirt's folder of vTPMs.
        uid: of the swtpm user.

    Raises:
        HostError: this process may not look.
    """
    state_re = re.compile(re.escape(os.fsencode(state_root)) + rb"/([0-9a-f-]{36})/tpm2(?![^,\0])")
    found = set()
    for path in _pid_files(run_root):
        pid = _read_pid(path)
        if pid is None:
            continue
        match = state_re.search(_swtpm_command(pid, uid))
        if match:
            try:
                found.add(uuid.UUID(match[1].decode("ascii")))
            except ValueError:
                continue
    return frozenset(found)


def _pid_files(run_root: Path) -> list[Path]:
    try:
        with os.scandir(run_root) as folder:
            names = [entry.name for entry in folder if entry.name.endswith(".pid")]
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise HostError(f"vtpm.run_root: cannot read {run_root}: {exc.strerror}") from exc
    return [run_root / name for name in names[:MAX_PID_FILES]]


def _read_pid(path: Path) -> int | None:
    """The process id in a file that the swtpm user may have written; None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            text = os.read(fd, MAX_PID_BYTES).decode("ascii", "replace").strip()
        finally:
            os.close(fd)
    except PermissionError as exc:
        raise HostError(f"vtpm.run_root: cannot read {path}: {exc.strerror}") from exc
    except OSError as exc:
        _check_scarce(exc)
        return None  # gone, or no plain file
    if not text.isascii() or not text.isdecimal() or len(text) > 10:
        return None
    return int(text)


def _check_scarce(error: OSError) -> None:
    """Raises: HostError where it was this process that could not look."""
    if error.errno in SCARCE:
        raise HostError(f"cannot see what runs: {error.strerror}") from error


def _swtpm_command(pid: int, uid: int) -> bytes:
    """The command line of a process, if it is the swtpm user's swtpm; empty where it is not."""
    folder = PROC / str(pid)
    try:
        if folder.stat().st_uid != uid:
            return b""
        with (folder / "cmdline").open("rb") as file:
            command = file.read(MAX_COMMAND_BYTES)
    except OSError as exc:
        _check_scarce(exc)
        if _is_hidden(pid):
            raise HostError(
                f"process {pid} is hidden from this one: ProtectProc= must be `default` for vtpm"
            ) from exc
        return b""
    return command if os.path.basename(command.partition(b"\0")[0]) == b"swtpm" else b""


def _is_hidden(pid: int) -> bool:
    """True where the process is there and /proc does not show it (hidepid, ProtectProc=invisible)."""
    try:
        os.kill(pid, 0)  # asks, sends nothing
    except PermissionError:
        return not (PROC / str(pid)).exists()
    except OSError:
        return False
    return False
