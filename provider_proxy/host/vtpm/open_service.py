"""Opens what the link needs on the host: the swtpm user, the registry's file, the hooks' socket."""

from __future__ import annotations

import errno
import logging
import os
import pwd
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from provider_proxy.errors import HostError
from provider_proxy.host.config.chip_tables import Vtpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.vtpm.registry import Registry
from provider_proxy.host.vtpm.requests import Issuer
from provider_proxy.host.vtpm.service import VtpmService

log = logging.getLogger(__name__)

REGISTRY_FILE = "vtpm.sqlite"
ACL = "system.posix_acl_access"
ACL_VERSION = struct.Struct("<I")  # linux/posix_acl_xattr.h
ACL_ENTRY = struct.Struct("<HHI")  # tag, permissions, id
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
NO_ID = 0xFFFFFFFF
SHARED_MODE = 0o660
OPEN_MODE = 0o666


@asynccontextmanager
async def open_vtpm_service(
    settings: Vtpm, state_dir: Path, metrics: Metrics, issuer: Issuer | None
) -> AsyncIterator[VtpmService | None]:
    """A vTPM service over the registry in `state_dir`; None where `vtpm.enabled` is false.

    Raises:
        HostError: the user does not exist, or the registry cannot be read.
    """
    if not settings.enabled:
        yield None
        return
    registry = Registry(state_dir / REGISTRY_FILE, max_vms=settings.max_vms)
    try:
        uid = _swtpm_user(settings).pw_uid
        yield VtpmService(settings, registry, metrics, uid=uid, issuer=issuer)
    finally:
        registry.close()


def share_socket(settings: Vtpm) -> None:
    """Let the swtpm user connect, besides root and ourselves; the server also checks the peer's uid.

    Raises:
        HostError: the user does not exist, or the socket's mode cannot be set.
    """
    user = _swtpm_user(settings)
    try:
        try:
            os.setxattr(settings.socket, ACL, access_of(user.pw_uid))
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            _share_by_mode(settings.socket, user.pw_gid)
    except OSError as exc:
        raise HostError(
            f"vtpm.socket: cannot set the mode of {settings.socket}: {exc.strerror}"
        ) from exc


def access_of(uid: int) -> bytes:
    """A POSIX ACL: only the owner and this user may read and write. Source: acl(5)."""
    entries = ((USER_OBJ, 6, NO_ID), (USER, 6, uid), (GROUP_OBJ, 0, NO_ID), (MASK, 6, NO_ID))
    return ACL_VERSION.pack(2) + b"".join(
        ACL_ENTRY.pack(*entry) for entry in (*entries, (OTHER, 0, NO_ID))
    )


def _share_by_mode(path: Path, group: int) -> None:
    """Set the mode where the file system has no ACLs. Raises: OSError."""
    try:
        os.chown(path, -1, group)
        path.chmod(SHARED_MODE)
    except PermissionError:  # systemd's system call filter, or a group that we are not in
        path.chmod(OPEN_MODE)
        log.warning(
            "vtpm.socket: %s is open to every user of this host, because its file system has no ACLs; "
            "other users are refused after they connect. Put the socket below /run",
            path,
        )


def _swtpm_user(settings: Vtpm) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(settings.swtpm_user)
    except (KeyError, ValueError) as exc:
        raise HostError(
            f"vtpm.swtpm_user: the user {settings.swtpm_user!r} does not exist"
        ) from exc
