"""Whether root's hook has marked that a VM's vTPM is being made: a file for each VM in the hooks' folder.

provider-proxy-vmhook writes it at libvirt's `prepare` and removes it at `start`. A file survives a
restart of the daemon and the helper, and only root can write one. It counts for a limited time, in case
libvirtd dies in between.
"""

from __future__ import annotations

import os
import stat
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from provider_proxy.errors import EvidenceFormatError, HostError
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.host.vtpm.helper.status import StatePlace

VERSION = 1
MAX_MARK_BYTES = 8 * 1024
MAX_PATH_CHARS = 4096
MAX_AGE_S = 900.0  # swtpm_localca may take a minute to make its own CA, on a slow host several


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What the hook wrote at `prepare`, for a VM that had no vTPM yet.

    Attributes:
        place: where the state will be made.
        secret: UUID of libvirt's secret that encrypts it; None if it will not be encrypted.
    """

    place: StatePlace
    secret: uuid.UUID | None


def read_mark(folder: Path, vm: uuid.UUID, *, owner: int = 0) -> Mark | None:
    """The hook's file about a VM; None where it is missing, not valid or too old.

    Args:
        owner: whose files count: root's, except in tests.

    Raises:
        HostError: this process may not read it.
    """
    try:
        fd = os.open(folder / str(vm), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != owner:
                return None
            data = file.read(MAX_MARK_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise HostError(f"cannot read {folder / str(vm)}: {exc.strerror}") from exc
    try:
        return _parse(data)
    except EvidenceFormatError:
        return None


def _parse(data: bytes) -> Mark | None:
    fields = Fields(parse_json_object(data[:MAX_MARK_BYTES], "mark"), "mark")
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - fields.number("at_s")
    if fields.integer("version", 100) != VERSION or not 0 <= age_s <= MAX_AGE_S:
        return None
    path, secret = fields.text("path", MAX_PATH_CHARS), fields.text("secret", 36)
    place = StatePlace()
    if path.startswith("/"):
        place = StatePlace(path=Path(path), is_file=fields.text("kind", 8) == "file")
    try:
        return Mark(place=place, secret=uuid.UUID(secret) if secret else None)
    except ValueError:
        return None
