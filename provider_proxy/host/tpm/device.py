"""Why a TPM's device cannot be opened, and what to do about it: tpm2-tss only says "IO failure"."""

from __future__ import annotations

import errno
import grp
import os
import pwd
from pathlib import Path

DEVICE = "device:"


def problem(tcti: str) -> str | None:
    """Why the device of a tpm2-tss string cannot be opened; None if it can, or without a device.

    Opens it for a moment, which disturbs only a program that wants /dev/tpm0 exclusively.
    """
    path = Path(tcti.removeprefix(DEVICE))
    if not tcti.startswith(DEVICE) or not path.is_absolute():
        return None
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        return _words(path, exc)
    os.close(fd)
    return None


def _words(path: Path, exc: OSError) -> str:
    match exc.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return (
                f"{path} does not exist: is a TPM enabled in the firmware, and is its driver loaded "
                "(ls /dev/tpm*)? In a container, pass the device to it"
            )
        case errno.EACCES | errno.EPERM:
            return f"{_user()} may not open {path}: {_remedy(path)}"
        case errno.EBUSY:
            return (
                f"{path} is in use by another program, exclusively: use the kernel's resource "
                'manager, tcti = "device:/dev/tpmrm0"'
            )
        case errno.EISDIR:
            return f"{path} is a directory"
        case _:
            return f"{path} cannot be opened: {exc.strerror}"


def _user() -> str:
    try:
        return f"the user {pwd.getpwuid(os.geteuid()).pw_name}"
    except KeyError:
        return f"the user {os.geteuid()}"


def _remedy(path: Path) -> str:
    try:
        group = grp.getgrgid(path.stat().st_gid).gr_name
    except (OSError, KeyError):
        return "see `ls -l`"
    return f"add it to the group {group} (usermod -aG {group}, or SupplementaryGroups= in the unit)"
