"""HTTP/1.1 over trio: one connection at a time, one request at a time, limits on everything.

Knows requests and responses, not their meaning: a `Handler` answers. A response's status, headers
and body leave in one write. A client's error gets a 4xx in Keylime's envelope; the connection is kept
or closed as RFC 9112 says.

Invariants: a connection holds at most one request; no more than one read goes past a limit; each
wait on the client has a deadline. `HttpServer.finish` never cuts off a request that is being answered.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from email.utils import formatdate

import trio

from provider_proxy.common.streams import SocketStream
from provider_proxy.errors import DeadlineError, ProviderProxyError
from provider_proxy.host.http import proxy_protocol
from provider_proxy.host.http.handshakes import HandshakeLimits
from provider_proxy.host.http.messages import (
    Handler,
    Observer,
    Peer,
    Request,
    Response,
    error_response,
    joined,
)
from provider_proxy.host.http.peers import CROWDED_OUT, SILENT, Chains, handshake_failure, peer_of
from provider_proxy.host.http.plain import response_head
from provider_proxy.host.http.reader import RequestReader

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024  # ours have 300 bytes; proxies on the way add cookies and trace headers
HEAD_LIMIT_S = 10.0  # from the first byte of a request to its last
IDLE_LIMIT_S = 75.0  # Keylime's verifier asks every 2 s; browsers and proxies keep about a minute
LEAST_ANSWER_S = 10.0  # the time of a handler that sets no limit of its own
SEND_LIMIT_S = 30.0  # a client that does not read its 3 kB; an IMA list takes longer, see below
SEND_BYTES_PER_S = 64 * 1024  # the rate at which a slow reader must read after that
HANDSHAKE_LIMIT_S = 10.0
MAX_HANDSHAKES = 512  # in progress; a good one takes milliseconds
MAX_HANDSHAKES_PER_ADDRESS = 64  # many tenants may come through one address, one after the other
PROXY_LIMIT_S = 5.0  # a TCP proxy sends its header with the connection
CLOSE_LIMIT_S = 1.0  # for TLS's close_notify
LINGER_S = 1.0
LINGER_READS = 16  # 256 kB of a refused body
TIMED_OUT = "no quote within the request's timeout"

ObserveHandshake = Callable[[str], None]
"""Called after each TLS handshake, with "ok", `SILENT`, or why it failed: see `handshake_failure`."""


class HttpServer(HandshakeLimits):
    """Serves one kind of listener.

    Args:
        handler: answers requests; a `ProviderProxyError` of it becomes its response.
        observe: counts responses.
        observe_handshake, turned_away: told of each TLS handshake; the latter also of address and error.
        max_connections: one more closes the connection that has been idle, or slow, the longest; if
            all others are being answered, the new one is closed.
        max_per_address: one more from the same IP address is closed.
        max_handshakes: one more TLS handshake at a time closes the one that takes the longest; so does
            one more than `max_handshakes_per_address`, among those of its address.
        busy_status: see `error_response`.
        front: the clients are fronts; their requests' `Client-Cert` headers are handed on.
        passed_on: True for the address of a TCP proxy, which must name its client.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        observe: Observer,
        observe_handshake: ObserveHandshake = lambda reason: None,
        turned_away: Callable[[str, str, str], None] = lambda reason, address, words: None,
        max_connections: int = 4096,
        max_per_address: int = 4096,
        max_handshakes: int = MAX_HANDSHAKES,
        max_handshakes_per_address: int = MAX_HANDSHAKES_PER_ADDRESS,
        busy_status: int = 503,
        front: bool = False,
        passed_on: Callable[[str], bool] = lambda address: False,
    ) -> None:
        super().__init__(max_handshakes, max_handshakes_per_address)
        self.handler = handler
        self.front = front
        self.waiting: OrderedDict[_Connection, None] = OrderedDict()  # for a client, longest first
        self._passed_on = passed_on
        self._asked = 0  # proxies whose header has not come yet
        self.busy_status = busy_status
        self.observe = observe
        self.observe_handshake = observe_handshake
        self.turned_away = turned_away
        self.chains = Chains()
        self.closing = False
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._open: set[_Connection] = set()
        self._per_address: Counter[str] = Counter()
        self._ended = trio.Event()
        self._date = (0, b"")

    async def serve(self, stream: SocketStream) -> None:
        """Serve one connection until it ends; closes it."""
        connection = _Connection(self, stream)
        address = connection.address()
        if address and self._passed_on(address):
            address = await self._client_address(connection)
        if address is None or not self._has_room(address):
            await trio.aclose_forcefully(stream)
            return
        self._open.add(connection)
        self.waiting[connection] = None
        self._per_address[address] += 1
        try:
            await connection.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the client went away
        except Exception:  # a bug that shows on one connection must not end the service for all
            log.exception("a connection ended with an unexpected error")
            self.observe(500, "bug")
        finally:
            with trio.move_on_after(CLOSE_LIMIT_S) as scope:
                scope.shield = True
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.aclose()
            self._open.discard(connection)
            self.waiting.pop(connection, None)
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]
            self._ended.set()

    def _has_room(self, address: str) -> bool:
        """Make room for a new connection if needed; False where it must be closed itself."""
        if address and self._per_address[address] >= self._max_per_address:
            self.observe(0, "too many connections of an address")
            return False
        if len(self._open) < self._max_connections:
            return True
        if not self.waiting:
            self.observe(0, "too many connections")
            return False
        slowest, _ = self.waiting.popitem(last=False)
        slowest.cut_off()
        self.observe(0, "made room")
        return True

    def limit_connections(self, most: int) -> int:
        """Lower the limit of connections to `most`; the limit as of now."""
        self._max_connections = min(self._max_connections, most)
        return self._max_connections

    async def _client_address(self, connection: _Connection) -> str | None:
        """The client's address from a TCP proxy's header; None where the header is missing or late."""
        if self._asked >= self._max_connections:
            self.observe(0, "too many connections")
            return None
        self._asked += 1
        bad = (proxy_protocol.ProxyHeaderError, trio.BrokenResourceError)
        try:
            with contextlib.suppress(*bad), trio.move_on_after(PROXY_LIMIT_S):
                return await connection.ask_proxy()
        finally:
            self._asked -= 1
        self.observe(0, "no PROXY header")
        return None

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    async def finish(self) -> None:
        """Close idle connections; return when the others have their answers."""
        self.closing = True
        for connection in self._open:
            connection.close_if_idle()
        while self._open:
            self._ended = trio.Event()
            await self._ended.wait()

    def date(self) -> bytes:
        """The Date header's value, made again each second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True).encode("ascii"))
        return self._date[1]


class _Stage(enum.Enum):
    """What a connection does, and so what its deadline means."""

    IDLE = enum.auto()  # waits for a request's first byte
    READING = enum.auto()
    ANSWERING = enum.auto()
    SENDING = enum.auto()
    LATE = enum.auto()  # has an answer, made in the very moment in which its time was over


class _Connection:
    """One client. All its waits share one cancel scope, whose deadline moves from stage to stage;
    a scope for each wait would cost a tenth of a request."""

    def __init__(self, server: HttpServer, stream: SocketStream) -> None:
        self._server = server
        self._stream = stream
        self._reader = RequestReader(stream, MAX_HEAD_BYTES, front=server.front)
        self._client: proxy_protocol.Client | None = None  # from a TCP proxy's header
        self._stage = _Stage.IDLE
        self._scope = trio.CancelScope()
        self._cut_off = False
        self._crowded_out = False
        self._early: Request | Response | None = None  # came when the last deadline did
        self.since = trio.current_time()
        self._outgoing: list[bytes] = []

    def address(self) -> str | None:
        """The client's IP address; empty for a unix socket, None where the connection is gone."""
        if self._client is not None:
            return self._client.address
        try:
            peer = self._stream.peer()
        except trio.BrokenResourceError:
            return None
        return "" if peer is None else peer[0]

    async def ask_proxy(self) -> str | None:
        """Read a TCP proxy's header; the client's address, or the proxy's own.

        Raises:
            ProxyHeaderError, trio.BrokenResourceError: the header cannot be read.
        """
        self._client = await proxy_protocol.read_header(self._stream.receive_before_tls)
        return self.address()

    def cut_off(self) -> None:
        """End at once, to make room."""
        self._cut_off = True
        self._scope.cancel()

    def crowd_out(self) -> None:
        """End a handshake, to make room for another one."""
        self._crowded_out = True
        self.cut_off()

    def close_if_idle(self) -> None:
        if self._stage is _Stage.IDLE:
            self._scope.cancel()

    def _read_on(self) -> None:
        """A request has begun: the deadline for its head starts."""
        self._enter(_Stage.READING, HEAD_LIMIT_S)

    def _enter(self, stage: _Stage, seconds: float) -> None:
        self._stage = stage
        self._scope.deadline = trio.current_time() + seconds

    async def run(self) -> None:
        """Handshake, then requests, until either side ends."""
        if self._server.closing:
            return
        with self._scope:
            if self._stream.is_tls:
                self._enter(_Stage.READING, HANDSHAKE_LIMIT_S)
                await self._shake_hands()
            peer = peer_of(self._stream, self._server.chains, self._limit, self._client)
            self._scope.deadline = self.since + IDLE_LIMIT_S
            await self._converse(peer)
        while self._scope.cancelled_caught and self._goes_on():
            is_idle = self._stage is _Stage.IDLE
            begin = self.since if is_idle else trio.current_time()
            with trio.CancelScope(deadline=begin + IDLE_LIMIT_S) as self._scope:
                if not is_idle:
                    await self._send()
                    if not self._reader.keeps or self._server.closing:
                        return
                await self._converse(peer)

    def _goes_on(self) -> bool:
        """True where the connection continues after a deadline, under a new scope."""
        if self._stage is _Stage.IDLE:  # the last request's deadline; this wait has a longer one
            is_due = trio.current_time() >= self.since + IDLE_LIMIT_S and self._early is None
            return not (is_due or self._cut_off or self._server.closing)
        if self._stage is _Stage.ANSWERING:
            self._compose(error_response(DeadlineError(TIMED_OUT), self._server.busy_status))
        return self._stage in (_Stage.ANSWERING, _Stage.LATE)

    async def _shake_hands(self) -> None:
        """TLS's handshake, counted."""
        reason, words = "timeout", ""  # also where it was cancelled to make room, or at the end
        try:
            with self._server.shaking(self, self.address() or ""):
                await self._stream.do_handshake()
            reason = "ok"
        except trio.BrokenResourceError as exc:
            reason = handshake_failure(exc.__cause__)
            words = getattr(exc.__cause__, "verify_message", "")
            if reason != "client_gone":
                await self._linger()  # its alert says why
            raise
        finally:
            heard = reason if self._stream.heard else SILENT
            reason = CROWDED_OUT if self._crowded_out else heard
            self._server.observe_handshake(reason)
            self._server.turned_away(reason, self.address() or "", words)

    def _limit(self, seconds: float) -> None:
        """The handler sets how long it may take."""
        self._scope.deadline = trio.current_time() + seconds

    async def _converse(self, peer: Peer) -> None:
        while True:
            incoming = await self._next_request(peer)
            if incoming is None:
                return
            if isinstance(incoming, Request):
                # The deadline is still the one of reading; a handler that waits sets its own.
                self._stage = _Stage.ANSWERING
                self._server.waiting.pop(self, None)
                try:
                    response = await self._server.handler(incoming)
                except ProviderProxyError as exc:
                    response = error_response(exc, self._server.busy_status)
            else:
                response = incoming
            self._compose(response)
            await self._send()
            if not self._reader.keeps or self._server.closing:
                # After a refusal, unread bytes may follow. After an answer, TLS's close_notify is
                # enough: waiting for the client would delay one that reads to the end.
                if not self._stream.is_tls or not isinstance(incoming, Request):
                    await self._linger()
                return

    async def _next_request(self, peer: Peer) -> Request | Response | None:
        """The next request; a refusal of invalid input; None at the end of the connection."""
        incoming, self._early = self._early, None
        if incoming is None:
            if self._stage is not _Stage.IDLE:
                # The last request's deadline stays until a new one is needed: setting one costs time.
                self._stage = _Stage.IDLE
                self.since = trio.current_time()
                if not self._cut_off:
                    self._server.waiting[self] = None
            incoming = await self._reader.next(peer, self._read_on)
        now = trio.current_time()
        if self._cut_off or self._server.closing or self._scope.deadline < now + LEAST_ANSWER_S:
            if self._scope.cancel_called and self._stage is _Stage.IDLE:
                self._early = incoming
                await trio.lowlevel.checkpoint_if_cancelled()
            self._scope.deadline = now + IDLE_LIMIT_S
        return incoming

    def _compose(self, response: Response) -> None:
        """Make the bytes of a response; from here on it is the answer."""
        self._server.observe(response.status, response.reason)
        reader = self._reader
        if response.closes or self._server.closing:
            reader.keeps = False
        head = response_head(response, self._server.date(), keeps=reader.keeps)
        self._outgoing = joined((head, *(() if reader.head_only else response.body)))

    async def _send(self) -> None:
        """Send what `_compose` made; a write that succeeds at once needs no deadline."""
        if self._stage is not _Stage.LATE:
            self._stage = _Stage.SENDING
            first = self._outgoing[0]
            rest = first[self._stream.send_now(first) :]
            self._outgoing[:1] = [rest] if rest else []
            if not self._outgoing:
                return
            if self._scope.cancel_called:
                self._stage = _Stage.LATE
                await trio.lowlevel.checkpoint_if_cancelled()
        size = sum(map(len, self._outgoing))
        self._enter(_Stage.SENDING, SEND_LIMIT_S + size / SEND_BYTES_PER_S)
        for chunk in self._outgoing:
            await self._stream.send_all(chunk)
        self._outgoing = []

    async def _linger(self) -> None:
        """Let the client read our last answer: closing with unread bytes resets the connection."""
        self._enter(_Stage.SENDING, LINGER_S)
        await self._stream.end_sending()
        for _ in range(LINGER_READS):
            if not await self._stream.discard_some():
                return
