"""A persistent connection to one proxy: h11 on a trio stream, for a process that asks thousands.

A pool for all hosts costs a millisecond or more for each request, and more with each connection in it.
So each host has its own connection, with one request at a time. Nothing that comes back is trusted:
head, body and time are bounded, redirects are not followed, and anything unexpected closes the
connection.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import h11
import trio

from provider_proxy.common.failures import CLOSED, why
from provider_proxy.common.http import in_crumbs
from provider_proxy.common.streams import SocketStream
from provider_proxy.errors import ReplyError
from provider_proxy.tenant.replies import refused
from provider_proxy.tenant.watch.budget import SMALL_BYTES, Room

CONNECT_LIMIT_S = 10.0
MAX_HEAD_BYTES = 16 * 1024  # the proxy's has 200 bytes
MAX_INTERIM = 8  # 1xx answers before the answer; the proxy sends none, a front at most one
RECEIVE_BYTES = 64 * 1024
MAX_ERROR_BYTES = 16 * 1024  # Keylime's envelope with one line of text

Connect = Callable[[], Awaitable[trio.abc.Stream]]
"""Opens a stream to the proxy. Raises OSError or ssl.SSLError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a proxy answers.

    Attributes:
        host: IP address or name.
        context: for TLS; None for plaintext.
        server_name: the name that the certificate must have.
        tls: digest of the files that the context was made from; it distinguishes contexts.
    """

    host: str
    port: int
    context: ssl.SSLContext | None = field(compare=False)
    server_name: str
    tls: bytes = b""

    async def connect(self) -> trio.abc.Stream:
        """Open a stream; with TLS including the handshake."""
        stream = await _open_tcp(self.host, self.port)
        if self.context is None:
            return stream
        sock = socket.socket(fileno=stream.socket.detach())
        secured = SocketStream(sock, self.context, server_name=self.server_name)
        try:
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(secured)
            raise
        return secured


async def _open_tcp(host: str, port: int) -> trio.SocketStream:
    """Connect. For an IP address, which nearly all hosts have, no tasks and timers are needed.

    Raises:
        OSError: the connection failed.
    """
    try:
        is_v6 = ipaddress.ip_address(host).version == 6
    except ValueError:
        return await _open_by_name(host, port)
    sock = trio.socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET)
    try:
        await sock.connect((host, port))
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


async def _open_by_name(host: str, port: int) -> trio.SocketStream:
    try:
        return await trio.open_tcp_stream(host, port)
    except OSError as exc:
        # trio's list of each address's error refers to the frames that made it: a cycle.
        if isinstance(exc.__cause__, BaseExceptionGroup):
            for each in exc.__cause__.exceptions:
                each.__traceback__ = None
        raise


class ProxyConnection:
    """A proxy, asked again and again over one connection while it lasts.

    Args:
        connect: opens a stream.
        authority: of the Host header.
    """

    def __init__(self, connect: Connect, authority: str) -> None:
        self._connect = connect
        self._authority = authority.encode("ascii", "replace")
        self._stream: trio.abc.Stream | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def get(self, target: str, limit: int, room: Room) -> bytes:
        """The body of a good answer.

        A kept connection may have been closed meanwhile: if no byte came back, the request is sent once
        more on a new one. The caller bounds the time.

        Args:
            target: path and query.
            limit: of the body, in bytes.
            room: reserved before more than a small part of the body is read.

        Raises:
            ReplyError: no answer, an HTTP error, or too large an answer.
        """
        tries = (True, False) if self._stream is not None else (False,)
        try:
            for again in tries:
                try:
                    return await self._exchange(target, limit, room)
                except _NothingCameError as exc:
                    await self._drop()
                    if not again:
                        raise ReplyError(f"the proxy gave no answer: {why(exc)}") from exc
            raise AssertionError("unreachable")
        finally:
            if self._http.our_state is not h11.IDLE:
                await self._drop()

    async def aclose(self) -> None:
        """Close the connection, if there is one."""
        await self._drop()

    async def _drop(self) -> None:
        stream, self._stream = self._stream, None
        self._http = h11.Connection(h11.CLIENT)
        if stream is not None:
            await trio.aclose_forcefully(stream)

    async def _open(self) -> trio.abc.Stream:
        if self._stream is not None:
            return self._stream
        try:
            with trio.fail_after(CONNECT_LIMIT_S):
                self._stream = await self._connect()
        except trio.TooSlowError as exc:
            raise ReplyError(f"no connection within {CONNECT_LIMIT_S:g} s") from exc
        except (OSError, trio.BrokenResourceError) as exc:  # ssl.SSLError is an OSError
            raise ReplyError(f"no connection: {why(exc)}") from exc
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        return self._stream

    async def _exchange(self, target: str, limit: int, room: Room) -> bytes:
        stream = await self._open()
        http = self._http
        head = http.send(
            h11.Request(method=b"GET", target=target, headers=[(b"Host", self._authority)])
        )
        assert head is not None
        http.send(h11.EndOfMessage())
        try:
            await stream.send_all(head)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise _NothingCameError from exc
        try:
            response, body = await self._answer(stream, limit, room)
        except h11.RemoteProtocolError as exc:
            raise ReplyError(f"the proxy's answer is not valid HTTP: {why(exc)}") from exc
        if response.status_code != 200:
            retry_after = dict(response.headers).get(b"retry-after", b"")
            raise refused(response.status_code, body, retry_after.decode("ascii", "replace"))
        return body

    async def _answer(
        self, stream: trio.abc.Stream, limit: int, room: Room
    ) -> tuple[h11.Response, bytes]:
        """Head and body; the connection is then ready for the next request, or marked to be closed."""
        http = self._http
        response: h11.Response | None = None
        came = False
        parts: list[bytes] = []
        size = interim = 0
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                try:
                    data = bytes(await stream.receive_some(RECEIVE_BYTES))
                except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                    if not came:
                        raise _NothingCameError from exc
                    raise ReplyError("the connection broke during the answer") from exc
                if not data and not came:
                    raise _NothingCameError(CLOSED)
                came = True
                http.receive_data(data)
            elif isinstance(event, h11.Response):
                response = event
                if response.status_code != 200:
                    limit = MAX_ERROR_BYTES
                declared = _declared_bytes(response)
                if declared > limit:
                    raise ReplyError(f"the proxy's answer is larger than {limit} bytes")
                await room.take(declared)
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
                size += len(event.data)
                if in_crumbs(len(parts), size):
                    raise ReplyError("the proxy's answer comes in too many pieces")
                if size > limit:
                    raise ReplyError(f"the proxy's answer is larger than {limit} bytes")
                if size > SMALL_BYTES:  # chunks, whose total size is not known
                    await room.take(limit)
            elif isinstance(event, h11.EndOfMessage):
                assert response is not None
                if http.our_state is h11.DONE and http.their_state is h11.DONE:
                    http.start_next_cycle()
                return response, b"".join(parts)
            elif not isinstance(event, h11.InformationalResponse):
                raise ReplyError("the connection ended during the answer")
            else:
                interim += 1
                if interim > MAX_INTERIM:
                    raise ReplyError("the proxy sends too many interim answers")


def _declared_bytes(response: h11.Response) -> int:
    """Content-Length, which h11 has checked; 0 without one."""
    return int(next((value for name, value in response.headers if name == b"content-length"), 0))


class _NothingCameError(Exception):
    """The connection ended before the first byte of an answer; never leaves this module."""
