"""The other end of a connection: what the socket tells, and what TLS has verified."""

from __future__ import annotations

import itertools
import select
import socket
import ssl
import struct
from collections.abc import Callable

import trio

from provider_proxy.common.streams import SocketStream
from provider_proxy.host.http.messages import Peer
from provider_proxy.host.http.proxy_protocol import Client

MAX_CHAINS = 4096  # of a few kB each
CROWDED_OUT = "crowded_out"  # too many handshakes were in progress, and this was the oldest
SILENT = "silent"  # the client never sent a byte, like a load balancer's probe of the port

_UCRED = struct.Struct("=iII")  # pid, uid, gid: unix(7)
_unix_numbers = itertools.count(1)


class Chains:
    """Remembers the CAs above a client's certificate, for resumed TLS sessions: they give the client's
    certificate only. A ticket is valid under one TLS context only, so a client that resumes has made a
    full handshake under it before, which put its chain here."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[bytes, ...]] = {}

    def of(self, stream: SocketStream, certificate: bytes) -> tuple[bytes, ...]:
        """The chain of the certificate that a stream's handshake has verified."""
        chain = stream.verified_chain()
        if not chain:
            return self._known.get(certificate, ())
        if len(self._known) >= MAX_CHAINS:
            self._known.clear()
        self._known[certificate] = chain
        return chain


def handshake_failure(cause: BaseException | None) -> str:
    """Why a handshake failed, from a bounded set of words.

    Args:
        cause: the error of OpenSSL or the system; None where the client left.
    """
    gone = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
    if not isinstance(cause, ssl.SSLError) or isinstance(cause, gone):
        return "client_gone"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "bad_certificate"
    if cause.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "no_certificate"
    return "protocol"


def peer_of(
    stream: SocketStream,
    chains: Chains,
    limit: Callable[[float], None],
    client: Client | None = None,
) -> Peer:
    """The peer of a stream, after TLS's handshake where there is one.

    Args:
        chains: of the listener.
        limit: see `Peer`.
        client: the client whose connection a TCP proxy passes on; None where it is the peer's own.

    Raises:
        trio.BrokenResourceError: it is gone already.
    """
    sock = stream.socket
    name = stream.peer() if client is None else (client.address, client.port)
    uid = None
    if name is None:
        try:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        except OSError as exc:
            raise trio.BrokenResourceError from exc  # it has gone already
        uid = _UCRED.unpack(credentials)[1]
    certificate = stream.certificate()
    poll = select.poll()
    # RDHUP: the peer closed its sending half. Seen without reading, TLS records or not.
    poll.register(sock.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    return Peer(
        name=f"{name[0]}:{name[1]}" if name else f"unix:{next(_unix_numbers)}",
        is_gone=lambda: bool(poll.poll(0)),
        limit=limit,
        certificate=certificate,
        chain=() if certificate is None else chains.of(stream, certificate),
        uid=uid,
    )
