"""A small HTTP/1.1 server on trio and h11, for the agents' ports and the admin listener.

Keylime's verifier opens a TLS connection for each poll, so no connection is kept for long. Every wait for
a client has a deadline, every size a bound, and connections are counted: one more than `MAX_OPEN` on a
port ends the one that has waited for its client the longest. A `Handler` answers the requests.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import h11
import trio

from provider_proxy.common.streams import SocketStream

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 2 * 1024 * 1024  # a payload, which is refused, may have as much
RECEIVE_BYTES = 64 * 1024
REQUEST_LIMIT_S = 10.0  # from a connection's start, or its last answer, to the end of a request
IDLE_LIMIT_S = 30.0
SEND_LIMIT_S = 60.0
SEND_BYTES_PER_S = 64 * 1024  # the least; an IMA list of megabytes takes longer
CLOSE_LIMIT_S = 1.0
MAX_OPEN = 32  # of one port: a verifier has 10 connections a worker, and one for each agent
BACKLOG = 64
ACCEPT_AGAIN_S = 0.1  # when the process has no file descriptor left
# No file descriptor or memory left, and the errors of a connection that is already gone (accept(2)).
TRANSIENT = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ECONNABORTED,
    errno.EPROTO,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request.

    Attributes:
        target: path and query, percent-encoded.
        host: the Host header.
    """

    method: str
    target: str
    host: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


Handler = Callable[[Asked], Awaitable[Answer]]


def listen(ip: str, port: int) -> socket.socket:
    """Open a port.

    Raises:
        OSError: it cannot be opened: taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


class TenantHttpServer:
    """Serves one listener.

    Args:
        handler: answers requests; must raise nothing but cancellation.
        context: for TLS; None for plaintext.
    """

    def __init__(self, handler: Handler, context: ssl.SSLContext | None) -> None:
        self._handler = handler
        self._context = context
        self._open = 0
        self._slow: dict[
            trio.CancelScope, None
        ] = {}  # connections that wait for their client, the longest first

    async def serve(self, listener: socket.socket) -> None:
        """Serve until cancelled; closes the listener."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        sock, _ = listener.accept()
                    except BlockingIOError:
                        continue
                    except OSError as exc:
                        if exc.errno not in TRANSIENT:
                            raise
                        log.error("cannot accept a connection: %s", exc.strerror)
                        await trio.sleep(ACCEPT_AGAIN_S)
                        continue
                    if self._open >= MAX_OPEN and not self._make_room():
                        sock.close()
                        continue
                    self._open += 1
                    nursery.start_soon(self._connection, SocketStream(sock, self._context))
        finally:
            listener.close()

    def _make_room(self) -> bool:
        """End a connection on which no request has come yet; False without one."""
        scope = next(iter(self._slow), None)
        if scope is None:
            return False
        del self._slow[scope]
        scope.cancel()
        return True

    async def _connection(self, stream: SocketStream) -> None:
        try:
            await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as exc:
            log.debug("a connection ended: %r", exc.__cause__ or exc)
        except Exception:
            # A bug that one connection triggers must not end the service of all others.
            log.exception("a connection ended with an unexpected error")
        finally:
            self._open -= 1
            with trio.move_on_after(CLOSE_LIMIT_S) as scope:
                scope.shield = True
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.aclose()

    async def _converse(self, stream: SocketStream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        limit_s = REQUEST_LIMIT_S  # for the first request it includes the TLS handshake
        while True:
            asked: Asked | None = None
            answer: Answer | None = None
            with trio.move_on_after(limit_s) as scope:
                self._slow[scope] = None
                try:
                    await stream.do_handshake()
                    asked = await _read(http, stream)
                except h11.RemoteProtocolError as exc:
                    answer = Answer(status=exc.error_status_hint or 400, body=b"{}")
                finally:
                    self._slow.pop(scope, None)
            if asked is not None:
                answer = await self._handler(asked)
            if answer is None or not _may_send(http):
                return
            await _send(http, stream, answer)
            if not _is_kept(http):
                return
            http.start_next_cycle()
            limit_s = IDLE_LIMIT_S


def _may_send(http: h11.Connection) -> bool:
    return http.our_state in (h11.IDLE, h11.SEND_RESPONSE)


def _is_kept(http: h11.Connection) -> bool:
    return http.our_state is h11.DONE and http.their_state is h11.DONE


async def _read(http: h11.Connection, stream: SocketStream) -> Asked | None:
    """A complete request; None where the client has closed the connection.

    Raises:
        h11.RemoteProtocolError: it is not a valid request, or its body is too large.
    """
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(bytes(await stream.receive_some(RECEIVE_BYTES)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise h11.RemoteProtocolError("the body is too large", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            hosts = [value for name, value in head.headers if name == b"host"]
            return Asked(
                method=head.method.decode("ascii"),
                target=head.target.decode("ascii", "replace"),
                host=hosts[0].decode("ascii", "replace") if hosts else "",
                body=bytes(body),
            )
        else:
            return None


async def _send(http: h11.Connection, stream: SocketStream, answer: Answer) -> None:
    head = h11.Response(
        status_code=answer.status,
        headers=[
            (b"Content-Type", answer.content_type),
            (b"Content-Length", b"%d" % len(answer.body)),
            *answer.headers,
        ],
    )
    data = (http.send(head) or b"") + (http.send(h11.Data(answer.body)) or b"")
    data += http.send(h11.EndOfMessage()) or b""
    with trio.fail_after(SEND_LIMIT_S + len(data) / SEND_BYTES_PER_S):
        await stream.send_all(data)
