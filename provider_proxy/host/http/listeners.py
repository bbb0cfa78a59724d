"""Opens what the daemon listens on: TCP and unix sockets, or those that systemd hands over, and TLS."""

from __future__ import annotations

import errno
import socket
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path

import trio

from provider_proxy.common.settings.values import is_loopback
from provider_proxy.errors import ConfigError, HostError
from provider_proxy.host.config.load import split_address
from provider_proxy.host.config.tables import Listen

BACKLOG = 1024  # a burst of tenants that all begin at once; the kernel caps it at somaxconn
UNIX_SOCKET_MODE = 0o660


class TlsListener(trio.abc.Listener[trio.SSLStream[trio.SocketStream]]):
    """Accepts TLS connections; `context` may be replaced, which holds for those that come after."""

    def __init__(self, plain: trio.SocketListener, context: ssl.SSLContext) -> None:
        self.plain = plain
        self.context = context

    async def accept(self) -> trio.SSLStream[trio.SocketStream]:
        """Accept a connection; the handshake comes with its first use."""
        stream = await self.plain.accept()
        return trio.SSLStream(stream, self.context, server_side=True, https_compatible=True)

    async def aclose(self) -> None:
        """Close the listening socket."""
        await self.plain.aclose()


Listener = trio.SocketListener | TlsListener


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
                listeners.append(trio.SocketListener(_bind_unix(key, Path(address[5:]))))
            else:
                listeners += [_with_tls(sock, context) for sock in _bind_tcp(key, address)]
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
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError("the inherited socket does not listen (is it Accept=no?)")
        is_unix = sock.family == socket.AF_UNIX
        if context is None and not is_unix and not is_loopback(sock.getsockname()[0]):
            raise ConfigError(
                "listen.insecure_plaintext is for loopback and unix sockets only, and the "
                f"inherited socket listens on {sock.getsockname()[0]}"
            )
        listeners.append(
            _with_tls(trio.socket.from_stdlib_socket(sock), None if is_unix else context)
        )
    return listeners


def close_all(listeners: Sequence[Listener]) -> None:
    """Close listeners; those that are closed already stay so."""
    for listener in listeners:
        _socket_of(listener).close()


def remove_unix_sockets(names: Sequence[str]) -> None:
    """Remove the files of unix sockets, by the names that `describe` gave."""
    for name in names:
        if name.startswith("unix:"):
            Path(name[5:]).unlink(missing_ok=True)


def _bind_tcp(key: str, address: str) -> list[trio.socket.SocketType]:
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
            sock.listen(BACKLOG)
    except (OSError, UnicodeError) as exc:
        for sock in sockets:
            sock.close()
        raise HostError(f"{key}: cannot listen on {address}: {exc}") from exc
    return [trio.socket.from_stdlib_socket(sock) for sock in sockets]


def _bind_unix(key: str, path: Path) -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(str(path))
        path.chmod(UNIX_SOCKET_MODE)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise HostError(f"{key}: cannot listen on unix:{path}: {exc}") from exc
    return trio.socket.from_stdlib_socket(sock)


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on; leave one that is in use, and anything else."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another process listens there")


def _with_tls(sock: trio.socket.SocketType, context: ssl.SSLContext | None) -> Listener:
    listener = trio.SocketListener(sock)
    if context is None:
        return listener
    return TlsListener(listener, context)


def _socket_of(listener: Listener) -> trio.socket.SocketType:
    return (listener.plain if isinstance(listener, TlsListener) else listener).socket


def describe(listeners: Sequence[Listener]) -> list[str]:
    """The addresses that listeners really have (port 0 resolved), as the configuration writes them."""
    names = []
    for listener in listeners:
        sock = _socket_of(listener)
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            names.append(f"unix:{name}")
        elif sock.family == socket.AF_INET6:
            names.append(f"[{name[0]}]:{name[1]}")
        else:
            names.append(f"{name[0]}:{name[1]}")
    return names


def tls_context(listen: Listen) -> ssl.SSLContext | None:
    """The door's TLS: 1.2 at least, clients' certificates where `client_ca` is set.

    Raises:
        HostError: a file is missing, is no PEM, or the key is not the certificate's.
    """
    if listen.tls_cert is None or listen.tls_key is None:
        return None
    _check_private(listen.tls_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(listen.tls_cert, listen.tls_key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as exc:
        raise HostError(f"listen.tls_cert, listen.tls_key: {exc}") from exc
    if listen.client_ca is not None:
        try:
            context.load_verify_locations(cafile=listen.client_ca)
        except (OSError, ssl.SSLError) as exc:
            raise HostError(f"listen.client_ca: {exc}") from exc
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted; a daemon has nobody to ask for the password")


def _check_private(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        raise HostError(f"listen.tls_key: cannot read {path}: {exc.strerror}") from exc
    if mode & 0o007:
        raise HostError(f"listen.tls_key: {path} must not be readable by others")
