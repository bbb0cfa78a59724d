"""Binds sockets of the addresses that a configuration names, or checks whether that would succeed."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from provider_proxy.common.addresses import split_address
from provider_proxy.errors import HostError

BACKLOG = 1024  # a burst of tenants that all start at once; the kernel caps it at somaxconn
UNIX_SOCKET_MODE = 0o660


def check_free(key: str, addresses: Sequence[str]) -> None:
    """Check whether `open_listeners` would succeed; what is opened for that is closed again.

    Raises:
        HostError: an address is in use or not of this host, or a unix socket cannot be made at its path.
    """
    for address in addresses:
        if not address.startswith("unix:"):
            for sock in bind_tcp(key, address, listen=False):
                sock.close()
            continue
        path = Path(address[5:])
        try:
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise HostError(
                    f"{key}: cannot listen on {address}: {path.parent} is missing, or not writable"
                )
            if _is_socket(path):
                _demand_stale(path)
        except OSError as exc:
            raise HostError(f"{key}: cannot listen on {address}: {_words(exc)}") from exc


def bind_tcp(key: str, address: str, *, listen: bool = True) -> list[socket.socket]:
    """Sockets of "host:port", one for each address of the host. Raises: HostError."""
    host, port = split_address(address)
    sockets = []
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
        for family, kind, proto, _, where in found:
            sock = socket.socket(family, kind, proto)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(where)
            if listen:
                sock.listen(BACKLOG)
    except (OSError, UnicodeError) as exc:
        for sock in sockets:
            sock.close()
        raise HostError(f"{key}: cannot listen on {address}: {_words(exc)}") from exc
    return sockets


def bind_unix(key: str, path: Path) -> socket.socket:
    """A socket at a path, for owner and group. Raises: HostError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(str(path))
        path.chmod(UNIX_SOCKET_MODE)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise HostError(f"{key}: cannot listen on unix:{path}: {_words(exc)}") from exc
    return sock


def _words(exc: OSError | UnicodeError) -> str:
    """Why, and what to do."""
    words = getattr(exc, "strerror", None) or str(exc)
    hints = {
        errno.EADDRINUSE: "find the process that uses it (ss -ltnp), or set another port",
        errno.EADDRNOTAVAIL: "this host does not have this address (see `ip address`)",
        errno.EACCES: "only root may open ports below 1024: let provider-proxy.socket listen",
    }
    hint = hints.get(getattr(exc, "errno", None) or 0)
    return words if hint is None else f"{words}: {hint}"


def _remove_stale(path: Path) -> None:
    """Remove a socket without a listener; leave one that is in use, and anything else."""
    if _is_socket(path):
        _demand_stale(path)
        path.unlink()


def _is_socket(path: Path) -> bool:
    """False where the path is free. Raises: OSError where it is something else."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "the path exists and is not a socket: remove it")
    return True


def _demand_stale(path: Path) -> None:
    """Raises: OSError where a process listens on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
    raise OSError(errno.EADDRINUSE, "another process listens there")
