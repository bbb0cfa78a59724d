"""Reads one connection's requests: a plain GET with a regular expression, everything else with h11.

h11 reads each request with a new parser, from its first byte. What a client sends early is kept for the
next request. Sets no deadline: the connection's owner does.
"""

from __future__ import annotations

from collections.abc import Callable

import h11
import trio

from provider_proxy.common.streams import SocketStream
from provider_proxy.host.http.messages import (
    Peer,
    Request,
    Response,
    is_chunked,
    refuse_body,
    refuse_protocol,
    to_request,
)
from provider_proxy.host.http.plain import client_certs, plain_get

EMPTY_LINE = b"\r\n"


class RequestReader:
    """One client's requests.

    Args:
        max_head_bytes: of an incomplete request.
        front: the client is a front, whose `Client-Cert` headers count.

    Attributes:
        keeps: the connection can be used for another request after the last one.
        head_only: the answer to the last request is sent without its body.
    """

    def __init__(self, stream: SocketStream, max_head_bytes: int, *, front: bool = False) -> None:
        self._stream = stream
        self._front = front
        self._max_head_bytes = max_head_bytes
        self._ahead = b""  # of the next request, sent too early
        self.keeps = True
        self.head_only = False

    async def next(self, peer: Peer, started: Callable[[], None]) -> Request | Response | None:
        """The next request; a refusal of invalid input; None at the end of the connection.

        Args:
            started: called when a part of a request has come, and not all of it.

        Raises:
            trio.BrokenResourceError: the connection failed.
        """
        self.keeps, self.head_only = True, False
        if self._ahead:
            await trio.lowlevel.checkpoint()  # a client with many requests must not block others
        data = self._ahead or await self._stream.receive_some()
        while data.startswith(EMPTY_LINE):
            data = _without_empty_lines(data) or await self._stream.receive_some()
        plain = plain_get(data)
        if plain is None:
            self._ahead = b""
            incoming = await self._judged(data, peer, started)
            if isinstance(incoming, Response):
                self.keeps = False
            return incoming
        target, host, end, self.keeps = plain
        self._ahead = data[end:]
        path, _, query = target.partition("?")
        if not self._front:
            return Request(method="GET", path=path, query=query, peer=peer, host=host)
        certs, chains = client_certs(data[:end])
        return Request(
            method="GET",
            path=path,
            query=query,
            peer=peer,
            host=host,
            client_certs=certs,
            client_chains=chains,
        )

    async def _judged(
        self, data: bytes, peer: Peer, started: Callable[[], None]
    ) -> Request | Response | None:
        """The same with h11: for a request that is not a plain GET, or did not come in one piece."""
        conn = h11.Connection(h11.SERVER, max_incomplete_event_size=self._max_head_bytes)
        head: h11.Request | None = None
        is_new = bool(data)
        try:
            conn.receive_data(data)
            while True:
                event = conn.next_event()
                if head is not None:
                    if not isinstance(event, h11.EndOfMessage):
                        return refuse_body()
                    self._ahead, _ = conn.trailing_data
                    self.keeps = _keeps(conn)
                    return to_request(head, peer, front=self._front)
                if event is h11.NEED_DATA:
                    if is_new:
                        started()
                        is_new = False
                    conn.receive_data(await self._stream.receive_some())
                elif isinstance(event, h11.Request):
                    head = event
                    self.head_only = head.method == b"HEAD"
                    if is_chunked(head):
                        return refuse_body()
                else:  # ConnectionClosed
                    return None
        except h11.RemoteProtocolError as exc:
            return refuse_protocol(exc)


def _without_empty_lines(data: bytes) -> bytes:
    """What follows empty lines, which a server should pass over: RFC 9112, section 2.2."""
    end = 0
    while data.startswith(EMPTY_LINE, end):
        end += len(EMPTY_LINE)
    return data[end:]


def _keeps(conn: h11.Connection) -> bool:
    """True where another request may follow the one that h11 has read to its end."""
    if conn.their_state not in (h11.DONE, h11.MUST_CLOSE):
        # CONNECT or Upgrade: h11 waits for our answer, which switches no protocol.
        conn.send(h11.Response(status_code=404, headers=[(b"Content-Length", b"0")]))
    return bool(conn.their_state is h11.DONE)
