"""Opens what the link needs of the host: the swtpm user, the registry's file, the hooks' socket."""

from __future__ import annotations

import os
import pwd
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from provider_proxy.errors import HostError
from provider_proxy.host.config.chip_tables import Vtpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.vtpm.registry import Registry
from provider_proxy.host.vtpm.requests import Issuer
from provider_proxy.host.vtpm.service import Keeper

REGISTRY_FILE = "vtpm.sqlite"
SHARED_MODE = 0o660
OPEN_MODE = 0o666


@asynccontextmanager
async def open_keeper(
    settings: Vtpm, state_dir: Path, metrics: Metrics, issuer: Issuer | None
) -> AsyncIterator[Keeper | None]:
    """A keeper over the registry in `state_dir`; None where `vtpm.enabled` is false.

    Raises:
        HostError: there is no such user, or the registry cannot be read.
    """
    if not settings.enabled:
        yield None
        return
    registry = Registry(state_dir / REGISTRY_FILE, max_vms=settings.max_vms)
    try:
        uid = _swtpm_user(settings).pw_uid
        yield Keeper(settings, registry, metrics, uid=uid, issuer=issuer)
    finally:
        registry.close()


def share_socket(settings: Vtpm) -> None:
    """Let the swtpm user connect; who else may, the door asks the kernel for each connection.

    Raises:
        HostError: there is no such user, or the socket's mode cannot be set.
    """
    group = _swtpm_user(settings).pw_gid
    try:
        try:
            os.chown(settings.socket, -1, group)
            settings.socket.chmod(SHARED_MODE)
        except PermissionError:  # systemd's filter of system calls, or a group that is not ours
            settings.socket.chmod(OPEN_MODE)
    except OSError as exc:
        raise HostError(
            f"vtpm.socket: cannot set the mode of {settings.socket}: {exc.strerror}"
        ) from exc


def _swtpm_user(settings: Vtpm) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(settings.swtpm_user)
    except (KeyError, ValueError) as exc:
        raise HostError(f"vtpm.swtpm_user: there is no user {settings.swtpm_user!r}") from exc
