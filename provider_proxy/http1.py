"""HTTP/1.1 over trio: h11's state machine, one connection at a time, limits on everything.

Knows requests and responses, not what they are about: a `Handler` answers. A response's status,
headers and body leave in one write. Whatever a client does wrong gets a 4xx in Keylime's envelope;
the connection is kept or closed as RFC 9112 says.

Invariants: a connection holds at most one request; no byte is read past the limits; each wait on the
client has a deadline. `Door.finish` never cuts off a request that is being answered.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import select
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from email.utils import formatdate

import h11
import trio

from provider_proxy.errors import ProviderProxyError, RequestError, ServiceError
from provider_proxy.wire import encode_envelope

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024  # ours have 300 bytes; proxies in between add cookies and traces
MAX_TARGET_CHARS = 2048
RECEIVE_BYTES = 16 * 1024
HEAD_LIMIT_S = 10.0  # from the first byte of a request to its last
IDLE_LIMIT_S = 75.0  # Keylime's verifier asks every 2 s; browsers and proxies keep about a minute
SEND_LIMIT_S = 30.0  # a client that does not read its 3 kB; an IMA list takes longer, see below
SEND_BYTES_PER_S = 64 * 1024  # what a slow reader must take on top of that
HANDSHAKE_LIMIT_S = 10.0
CLOSE_LIMIT_S = 1.0  # for TLS's close_notify
LINGER_S = 1.0
LINGER_READS = 16  # 256 kB of a refused body
JOIN_BYTES = 64 * 1024  # one write for what is small; an IMA list is not copied once more
JSON = b"application/json"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"

REASONS = {
    200: b"OK",
    400: b"Bad Request",
    404: b"Not Found",
    405: b"Method Not Allowed",
    414: b"URI Too Long",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end, as far as the socket tells.

    Attributes:
        name: address and port, or the unix socket's connection number; never a secret.
        is_gone: True once the client has hung up.
    """

    name: str
    is_gone: Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request without body: path and query of its target, still percent-encoded."""

    method: str
    path: str
    query: str
    peer: Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a handler answers.

    Attributes:
        reason: why, for the metrics; the class name of an error.
        closes: True where the connection must not be used again.
    """

    status: int = 200
    body: tuple[bytes, ...] = ()
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    reason: str = "ok"
    closes: bool = False


Handler = Callable[[Request], Awaitable[Response]]
Observer = Callable[[int, str], None]
"""Called with status and reason of each response."""


def error_response(error: ProviderProxyError) -> Response:
    """An error of ours as a response in Keylime's envelope."""
    status, headers, closes = 500, [], False
    results: dict[str, object] = {}
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    if isinstance(error, RequestError | ServiceError):
        status = error.status
    if isinstance(error, RequestError) and error.parameter is not None:
        results["parameter"] = error.parameter
    if isinstance(error, ServiceError):
        closes = error.closes
    if retry_after_s is not None:
        headers.append((b"Retry-After", b"%d" % max(1, round(retry_after_s))))
    if status == 405:
        headers.append((b"Allow", b"GET"))
    return Response(
        status=status,
        body=(encode_envelope(status, str(error), results),),
        headers=tuple(headers),
        reason=type(error).__name__,
        closes=closes,
    )


def refuse(status: int, text: str, reason: str) -> Response:
    """A response to something that is no proper HTTP request; the connection closes."""
    return Response(
        status=status, body=(encode_envelope(status, text, {}),), reason=reason, closes=True
    )


_unix_numbers = itertools.count(1)


class Door:
    """Serves one kind of listener.

    Args:
        handler: answers requests; a `ProviderProxyError` of it becomes its response.
        observe: counts responses.
        max_connections: connections beyond wait, unread, until another ends.
    """

    def __init__(self, handler: Handler, *, observe: Observer, max_connections: int = 4096) -> None:
        self._handler = handler
        self._observe = observe
        self._slots = trio.CapacityLimiter(max_connections)
        self._idle: set[trio.CancelScope] = set()
        self._closing = False
        self._open = 0
        self._ended = trio.Event()
        self._date = (0, b"")

    async def serve(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        """Serve one connection until it ends; closes it."""
        async with self._slots:
            self._open += 1
            try:
                if not self._closing:
                    await self._serve(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # the client went away
            except Exception:
                # A bug that one connection meets must not end the service of all others.
                log.exception("a connection ended with an unexpected error")
                self._observe(500, "bug")
            finally:
                with trio.move_on_after(CLOSE_LIMIT_S) as scope:
                    scope.shield = True
                    with contextlib.suppress(trio.BrokenResourceError):
                        await stream.aclose()
                self._open -= 1
                self._ended.set()

    async def _serve(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        raw = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
        if isinstance(stream, trio.SSLStream):
            with trio.move_on_after(HANDSHAKE_LIMIT_S) as scope:
                await stream.do_handshake()
            if scope.cancelled_caught:
                return
        peer = _peer_of(raw.socket)
        conn = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        while True:
            incoming = await self._next_request(stream, conn, peer)
            if incoming is None:
                return
            if isinstance(incoming, Request):
                try:
                    response = await self._handler(incoming)
                except ProviderProxyError as exc:
                    response = error_response(exc)
            else:
                response = incoming
            self._observe(response.status, response.reason)
            head_only = isinstance(incoming, Request) and incoming.method == "HEAD"
            await self._send(stream, conn, response, head_only=head_only)
            if conn.our_state is not h11.DONE or conn.their_state is not h11.DONE or self._closing:
                if conn.our_state is h11.MUST_CLOSE or response.closes:
                    await _linger(stream, raw)
                return
            conn.start_next_cycle()

    async def _next_request(
        self, stream: trio.abc.Stream, conn: h11.Connection, peer: Peer
    ) -> Request | Response | None:
        """The next request; a refusal of what is none; None where the client has ended."""
        head: h11.Request | None = None
        with trio.CancelScope(deadline=trio.current_time() + IDLE_LIMIT_S) as scope:
            self._idle.add(scope)
            try:
                while True:
                    event = conn.next_event()
                    if event is h11.NEED_DATA:
                        data = await stream.receive_some(RECEIVE_BYTES)
                        if scope in self._idle and data:  # the first byte: now it is a request
                            self._idle.discard(scope)
                            scope.deadline = trio.current_time() + HEAD_LIMIT_S
                        conn.receive_data(bytes(data))
                    elif isinstance(event, h11.Request):
                        self._idle.discard(scope)
                        if _has_body(event):
                            return refuse(400, "body: a GET has none here", "body")
                        head = event
                    elif isinstance(event, h11.EndOfMessage) and head is not None:
                        return _to_request(head, peer)
                    else:  # ConnectionClosed, or a state that only a confused peer reaches
                        return None
            except h11.RemoteProtocolError as exc:
                if conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                    return None
                status = exc.error_status_hint or 400
                return refuse(status, f"not a proper HTTP request: {exc}", "protocol")
            finally:
                self._idle.discard(scope)
        return None  # too slow, or told to close while idle

    async def _send(
        self,
        stream: trio.abc.Stream,
        conn: h11.Connection,
        response: Response,
        *,
        head_only: bool,
    ) -> None:
        length = sum(map(len, response.body))
        headers = [
            (b"Date", self._now()),
            (b"Content-Type", response.content_type),
            (b"Content-Length", b"%d" % length),
            (b"Cache-Control", b"no-store"),
            *response.headers,
        ]
        if response.closes or self._closing:
            headers.append((b"Connection", b"close"))
        head = conn.send(
            h11.Response(
                status_code=response.status,
                headers=headers,
                reason=REASONS.get(response.status, b""),
            )
        )
        parts = [head or b""]
        for part in () if head_only else response.body:
            parts.append(conn.send(h11.Data(data=part)) or b"")
        parts.append(conn.send(h11.EndOfMessage()) or b"")
        limit = SEND_LIMIT_S + length / SEND_BYTES_PER_S
        with trio.move_on_after(limit) as scope:
            for chunk in _joined(parts):
                await stream.send_all(chunk)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError

    def _now(self) -> bytes:
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True).encode("ascii"))
        return self._date[1]

    async def finish(self) -> None:
        """Close connections that wait for a request; return when the others had their answer."""
        self._closing = True
        for scope in list(self._idle):
            scope.cancel()
        while self._open:
            self._ended = trio.Event()
            await self._ended.wait()


def _joined(parts: Iterable[bytes]) -> list[bytes]:
    chunks: list[bytes] = []
    small: list[bytes] = []
    for part in parts:
        if len(part) > JOIN_BYTES:
            chunks.append(b"".join(small))
            chunks.append(part)
            small = []
        else:
            small.append(part)
    chunks.append(b"".join(small))
    return [chunk for chunk in chunks if chunk]


def _has_body(head: h11.Request) -> bool:
    """Known before it comes: who says `Expect: 100-continue` would wait for us."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
        for name, value in head.headers
    )


def _to_request(head: h11.Request, peer: Peer) -> Request | Response:
    if len(head.target) > MAX_TARGET_CHARS:
        return refuse(414, f"the target is longer than {MAX_TARGET_CHARS} characters", "target")
    target = head.target.decode("ascii", "replace")
    path, _, query = target.partition("?")
    return Request(method=head.method.decode("ascii"), path=path, query=query, peer=peer)


async def _linger(stream: trio.abc.Stream, raw: trio.SocketStream) -> None:
    """Let the client read our last words: closing on unread bytes would reset the connection."""
    with trio.move_on_after(LINGER_S), contextlib.suppress(trio.BrokenResourceError):
        if stream is raw:
            await raw.send_eof()
        for _ in range(LINGER_READS):
            if not await raw.receive_some(RECEIVE_BYTES):
                return


def _peer_of(sock: trio.socket.SocketType) -> Peer:
    try:
        name = sock.getpeername() if sock.family != socket.AF_UNIX else None
    except OSError as exc:
        raise trio.BrokenResourceError from exc  # gone before we looked
    poll = select.poll()
    # RDHUP: the peer closed its sending half. Seen without reading, TLS records or not.
    poll.register(sock.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    return Peer(
        name=f"{name[0]}:{name[1]}" if name else f"unix:{next(_unix_numbers)}",
        is_gone=lambda: bool(poll.poll(0)),
    )
