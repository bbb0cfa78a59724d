"""Opens the daemon's listeners: TCP and unix sockets, or those that systemd hands over, and TLS."""

from __future__ import annotations

import errno
import logging
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NoReturn

import trio

from provider_proxy.common.addresses import is_loopback
from provider_proxy.common.streams import SocketStream
from provider_proxy.common.tls import server_context
from provider_proxy.errors import ConfigError, HostError
from provider_proxy.host.config.material import listen_files
from provider_proxy.host.config.tables import Listen
from provider_proxy.host.http.binding import bind_tcp, bind_unix

FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
NOT_OURS = frozenset(
    {errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT}
    | {errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH}
)
"""Errors of the one connection that accept(2) was about to return."""
SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
RETRY_S = 0.1  # a shortage does not end sooner, and a busy loop costs a core
REPORT_S = 60.0

log = logging.getLogger(__name__)


class Listener(trio.abc.Listener[SocketStream]):
    """A listening socket.

    Args:
        sock: closed with the listener.
        context: TLS for what is accepted; None for plaintext. It may be replaced, which affects the
            connections that come after.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None = None) -> None:
        sock.setblocking(False)
        self._is_ip = sock.family != socket.AF_UNIX
        if self._is_ip:  # accepted sockets inherit it, without a call of their own
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.context = context
        self._report_after = -math.inf
        self._unreported = 0

    async def accept(self) -> SocketStream:
        """The next connection; a TLS handshake is left to the stream's user.

        Raises:
            OSError: the system is short of descriptors or memory.
            trio.ClosedResourceError: the listener was closed.
        """
        while True:
            if self.socket.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self.socket)
            try:
                sock, peer = self.socket.accept()
            except BlockingIOError:
                continue
            except OSError as exc:
                if exc.errno in NOT_OURS:
                    continue
                raise
            return SocketStream(sock, self.context, peer=peer[:2] if self._is_ip else None)

    async def serve(self, handler: Callable[[SocketStream], Awaitable[None]]) -> NoReturn:
        """Serve each connection in a task of its own, until cancelled; closes the listener.

        While the system is short of descriptors or memory, connections wait in the kernel's queue and
        are tried again; nothing needs a restart.

        Args:
            handler: closes its stream; must not raise.
        """
        async with trio.open_nursery() as nursery, self:
            while True:
                try:
                    stream = await self.accept()
                except OSError as exc:
                    if exc.errno not in SHORTAGES:
                        raise
                    self._report(exc)
                    await trio.sleep(RETRY_S)
                else:
                    nursery.start_soon(handler, stream)

    def _report(self, exc: OSError) -> None:
        """Say that connections cannot be accepted, once in `REPORT_S`."""
        now = trio.current_time()
        if now < self._report_after:
            self._unreported += 1
            return
        log.error(
            "cannot accept a connection: %s; trying again every %g s%s",
            exc.strerror,
            RETRY_S,
            f" ({self._unreported} earlier failures were not logged)" if self._unreported else "",
        )
        self._report_after = now + REPORT_S
        self._unreported = 0

    async def aclose(self) -> None:
        """Close the listening socket."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once; a task that accepts is woken. Closing twice is fine."""
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()


def open_listeners(
    key: str, addresses: Sequence[str], context: ssl.SSLContext | None
) -> list[Listener]:
    """Bind and listen.

    Args:
        key: of the configuration, for messages.
        context: TLS for TCP sockets; None for plaintext. Unix sockets are plaintext always.

    Raises:
        HostError: an address is taken or not ours.
    """
    listeners: list[Listener] = []
    try:
        for address in addresses:
            if address.startswith("unix:"):
                listeners.append(Listener(bind_unix(key, Path(address[5:]))))
            else:
                listeners += [Listener(sock, context) for sock in bind_tcp(key, address)]
    except HostError:
        remove_unix_sockets(describe(listeners))
        close_all(listeners)
        raise
    return listeners


def adopt_listeners(
    sockets: Sequence[socket.socket], context: ssl.SSLContext | None
) -> list[Listener]:
    """Take over sockets from systemd.

    Raises:
        ConfigError: plaintext on a socket that others can reach; `Accept=yes` sockets.
    """
    listeners: list[Listener] = []
    for sock in sockets:
        if sock.type != socket.SOCK_STREAM or sock.family not in FAMILIES:
            raise ConfigError(
                f"the socket from systemd is {sock.family.name} {sock.type.name}, which the daemon "
                "cannot use: the .socket unit must have ListenStream= alone"
            )
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(
                "the socket from systemd does not listen: set Accept=no in the .socket unit; with "
                "Accept=yes each connection would start a daemon"
            )
        is_unix = sock.family == socket.AF_UNIX
        if context is None and not is_unix and not is_loopback(sock.getsockname()[0]):
            raise ConfigError(
                "listen.insecure_plaintext is for loopback and unix sockets only, and the socket "
                f"from systemd listens on {sock.getsockname()[0]}"
            )
        listeners.append(Listener(sock, None if is_unix else context))
    return listeners


def close_all(listeners: Sequence[Listener]) -> None:
    """Close listeners; closing one twice is allowed."""
    for listener in listeners:
        listener.close()


def remove_unix_sockets(names: Sequence[str]) -> None:
    """Remove the files of unix sockets, by the names that `describe` gave."""
    for name in names:
        if name.startswith("unix:"):
            Path(name[5:]).unlink(missing_ok=True)


def describe(listeners: Sequence[Listener]) -> list[str]:
    """The addresses that listeners really have (port 0 resolved), as the configuration writes them."""
    names = []
    for listener in listeners:
        sock = listener.socket
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            names.append(f"unix:{name}")
        elif sock.family == socket.AF_INET6:
            names.append(f"[{name[0]}]:{name[1]}")
        else:
            names.append(f"{name[0]}:{name[1]}")
    return names


def tls_context(listen: Listen) -> ssl.SSLContext | None:
    """The server's TLS: 1.2 at least, clients' certificates where `client_ca` is set.

    Raises:
        HostError: a file is wrong; the message says which and why.
    """
    if listen.tls_cert is None:
        return None
    context = server_context(listen_files(listen))
    context.set_alpn_protocols(["http/1.1"])
    return context
