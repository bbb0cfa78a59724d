"""systemd's protocols: notification, watchdog and socket activation.

Source: sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3). Without systemd all are silent.
"""

from __future__ import annotations

import math
import os
import socket

from provider_proxy.errors import ConfigError

LISTEN_FDS_START = 3
MAX_LISTEN_FDS = 64
NOTIFY_LIMIT_S = (
    1.0  # a manager reads at once; net.unix.max_dgram_qlen unread messages block a sender
)


def notify(state: str, *, limit_s: float = NOTIFY_LIMIT_S) -> None:
    """Tell the service manager ("READY=1", "STOPPING=1"); does nothing without one.

    Args:
        limit_s: how long to wait for a manager that does not read; then the message is lost.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path or path[0] not in "/@":
        return
    address = "\0" + path[1:] if path[0] == "@" else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(limit_s)
        try:
            sock.connect(address)
            sock.send(state.encode("utf-8"))
        except OSError:
            return  # a manager that went away must not take the service with it, nor one that hangs


def notify_status(line: str) -> None:
    """Set the line that `systemctl status` shows; line feeds in it are blanks. Does not wait."""
    notify("STATUS=" + line.replace("\n", " "), limit_s=0)


def watchdog_s() -> float:
    """How often at least systemd wants to hear WATCHDOG=1, in seconds; infinite where it does not.

    Source: sd_watchdog_enabled(3).
    """
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    usec = os.environ.get("WATCHDOG_USEC", "")
    if pid != str(os.getpid()) or not usec.isascii() or not usec.isdecimal() or int(usec) == 0:
        return math.inf
    return int(usec) / 1e6


def take_listen_sockets() -> list[socket.socket]:
    """The sockets that systemd opened for this process, whatever their names. Raises: ConfigError."""
    return [sock for _, sock in take_named_sockets()]


def take_named_sockets() -> list[tuple[str, socket.socket]]:
    """The sockets that systemd opened for this process, each with its FileDescriptorName=; empty where it
    opened none.

    The variables are removed, so that a child does not take them for its own.

    Raises:
        ConfigError: something else than a socket was handed over.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isascii() or not count.isdecimal():
        return []
    sockets = []
    for fd in range(LISTEN_FDS_START, LISTEN_FDS_START + min(int(count), MAX_LISTEN_FDS)):
        os.set_inheritable(fd, False)
        try:
            name = names[fd - LISTEN_FDS_START] if fd - LISTEN_FDS_START < len(names) else ""
            sockets.append((name, socket.socket(fileno=fd)))
        except OSError as exc:
            raise ConfigError(
                f"the inherited descriptor {fd} is not a socket: the .socket unit may have "
                "only ListenStream="
            ) from exc
    return sockets
