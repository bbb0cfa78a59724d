"""A load generator: many tenants on kept-alive connections, as cheap as Python allows.

asyncio's protocols cost a third of what streams do; the generator itself must not be the bottleneck.
Answers are kept and verified after the timing. Seeded: the same seed asks the same nonces and masks.
"""

from __future__ import annotations

import asyncio
import math
import random
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from provider_proxy.errors import HostError
from provider_proxy.evidence.model import Nonce, PcrMask, QuoteRequest, TrustedHost
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier

NONCE_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
NONCE_CHARS = 20  # Keylime's
BOOT_MASKS = 0x3FF  # PCRs 0 to 9: nobody is isolated, so all share one batch key
ISOLATED = (0, *(1 << pcr for pcr in (11, 12, 13, 14, 15, 16, 23)))  # a batch key each
CONNECT_AT_ONCE = 100
HANDSHAKES_AT_ONCE = 32  # the daemon cuts off the oldest of more than 64 from one address
ANSWER_LIMIT_S = 35.0  # above the daemon's default timeout
POLL_S = 0.02
TLS_NAME = "localhost"  # in the certificates of `overload`
REQUEST_TAIL = b" HTTP/1.1\r\nHost: proxy\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: what was asked, when (monotonic seconds), and what came."""

    request: QuoteRequest
    sent_s: float
    answered_s: float
    status: int
    body: bytes
    retry_after_s: float = 1.0

    @property
    def latency_ms(self) -> float:
        return (self.answered_s - self.sent_s) * 1000


@dataclass(slots=True)
class Load:
    """What a run gave."""

    replies: list[Reply] = field(default_factory=list)
    lost: int = 0
    hung: int = 0

    @property
    def refused(self) -> int:
        return sum(reply.status != 200 for reply in self.replies)

    def latencies_ms(self) -> list[float]:
        """Of the good answers, ascending."""
        return sorted(reply.latency_ms for reply in self.replies if reply.status == 200)

    def within(self, begin_s: float, end_s: float) -> int:
        """Good answers that came within a stretch of time."""
        return sum(
            begin_s <= reply.answered_s < end_s for reply in self.replies if reply.status == 200
        )


class _Tenant(asyncio.Protocol):
    """One connection; sends a request, collects its answer, tells `on_reply`."""

    def __init__(
        self, seed: int, load: Load, on_reply: Callable[[_Tenant], None], isolated: int = 0
    ) -> None:
        self._isolated = isolated
        self._random = random.Random(seed)  # noqa: S311  # a load generator's nonces
        self._load = load
        self._on_reply = on_reply
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._need = 0
        self._request: QuoteRequest | None = None
        self._sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._request is not None:
            self._load.lost += 1

    def ask(self) -> None:
        """Send the next request; nothing while the last is unanswered."""
        if self._transport is None or self._request is not None:
            return
        nonce = "".join(self._random.choices(NONCE_ALPHABET, k=NONCE_CHARS)).encode("ascii")
        mask = self._random.randint(1, BOOT_MASKS) | self._isolated
        self._request = QuoteRequest(nonce=Nonce(nonce), mask=PcrMask(mask))
        query = encode_quote_query(self._request).encode("ascii")
        self._sent_s = time.monotonic()
        self._transport.write(b"GET /verifier/quote?" + query + REQUEST_TAIL)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._need:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            self._need = end + 4 + length
        if len(self._buffer) < self._need or self._request is None:
            return
        head = bytes(self._buffer[: self._buffer.find(b"\r\n\r\n")]).lower()
        retry_after = head.partition(b"retry-after:")[2].partition(b"\r\n")[0]
        body_at = self._buffer.find(b"\r\n\r\n") + 4
        self._load.replies.append(
            Reply(
                self._request,
                self._sent_s,
                time.monotonic(),
                int(self._buffer[9:12]),
                bytes(self._buffer[body_at : self._need]),
                float(retry_after or 1),
            )
        )
        del self._buffer[: self._need]
        self._need = 0
        self._request = None
        self._on_reply(self)

    @property
    def waits(self) -> bool:
        """True while a request is unanswered."""
        return self._request is not None

    def close(self) -> None:
        """Hang up; a request that is still unanswered hung."""
        self._load.hung += self.waits
        self._request = None
        if self._transport is not None:
            self._transport.close()


async def _connect(
    host: str,
    port: int,
    count: int,
    seed: int,
    load: Load,
    on_reply: Callable[[_Tenant], None],
    contexts: Sequence[ssl.SSLContext] | None = None,
    keys: int = 1,
) -> list[_Tenant]:
    """Open connections; with `contexts`, by mutual TLS, each tenant's in turn.

    With `keys`, the tenants ask for PCRs that make so many kinds of requests, which share no batch.
    """
    loop = asyncio.get_running_loop()

    async def connect(number: int) -> _Tenant:
        _, tenant = await loop.create_connection(
            lambda: _Tenant(seed + number, load, on_reply, ISOLATED[number % keys]),
            host,
            port,
            ssl=contexts[number % len(contexts)] if contexts else None,
            server_hostname=TLS_NAME if contexts else None,
        )
        return tenant

    tenants: list[_Tenant] = []
    at_once = HANDSHAKES_AT_ONCE if contexts else CONNECT_AT_ONCE
    for at in range(0, count, at_once):
        last = min(count, at + at_once)
        tenants += await asyncio.gather(*(connect(number) for number in range(at, last)))
    return tenants


async def closed_loop(
    host: str,
    port: int,
    *,
    tenants: int,
    seconds: float,
    seed: int,
    contexts: Sequence[ssl.SSLContext] | None = None,
    on_connected: Callable[[], None] = lambda: None,
) -> Load:
    """Every tenant asks again as soon as it has its answer."""
    load = Load()
    end_s = time.monotonic() + 3600

    def again(tenant: _Tenant) -> None:
        if time.monotonic() < end_s:
            tenant.ask()

    connected = await _connect(host, port, tenants, seed, load, again, contexts)
    on_connected()
    end_s = time.monotonic() + seconds
    for tenant in connected:
        tenant.ask()
    await asyncio.sleep(seconds)
    await _finish(connected)
    return load


async def at_once(host: str, port: int, *, tenants: int, limit_s: float, seed: int) -> Load:
    """Every tenant asks one question, all in the same moment."""
    load = Load()
    connected = await _connect(host, port, tenants, seed, load, lambda tenant: None)
    for tenant in connected:
        tenant.ask()
    await _finish(connected, limit_s)
    return load


async def _finish(connected: list[_Tenant], limit_s: float = ANSWER_LIMIT_S) -> None:
    """Wait for the answers that are due, then hang up."""
    end_s = time.monotonic() + limit_s
    # An event an answer would weigh on the timing.
    while any(t.waits for t in connected) and time.monotonic() < end_s:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
    for tenant in connected:
        tenant.close()
    await asyncio.sleep(0)


async def polling(
    host: str,
    port: int,
    *,
    tenants: int,
    interval_s: float,
    seconds: float,
    seed: int,
    contexts: Sequence[ssl.SSLContext] | None = None,
    keys: int = 1,
    redraw: bool = False,
    on_connected: Callable[[], None] = lambda: None,
) -> Load:
    """Every tenant asks once an interval, at a phase of its own; answers are waited for.

    With `redraw` the phase is another in each interval: the average over all phases comes sooner.
    """
    load = Load()
    connected = await _connect(host, port, tenants, seed, load, lambda tenant: None, contexts, keys)
    on_connected()
    loop = asyncio.get_running_loop()
    phase = random.Random(seed)  # noqa: S311
    begin = loop.time()
    for tenant in connected:
        own = phase.uniform(0, interval_s)
        for number in range(math.ceil(seconds / interval_s)):
            at = begin + number * interval_s + own
            if at < begin + seconds:
                loop.call_at(at, tenant.ask)
            if redraw:
                own = phase.uniform(0, interval_s)
    await asyncio.sleep(seconds)
    await _finish(connected)
    return load


async def with_retry_after(host: str, port: int, seed: int, limit_s: float) -> bool:
    """Ask until served, each time after the wait that the proxy names; False when the limit ends it."""
    load = Load()
    answered = asyncio.Event()
    (tenant,) = await _connect(host, port, 1, seed, load, lambda tenant: answered.set())
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        answered.clear()
        tenant.ask()
        try:
            await asyncio.wait_for(answered.wait(), end_s - time.monotonic())
        except TimeoutError:
            break
        reply = load.replies[-1]
        if reply.status == 200:
            tenant.close()
            return True
        await asyncio.sleep(min(reply.retry_after_s, max(0.0, end_s - time.monotonic())))
    tenant.close()
    return False


async def tls_trusted_host(host: str, port: int, context: ssl.SSLContext) -> TrustedHost:
    """As `trusted_host`, by mutual TLS."""
    reader, writer = await asyncio.open_connection(
        host, port, ssl=context, server_hostname=TLS_NAME
    )
    writer.write(b"GET /verifier/identity HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n")
    data = await reader.read()
    writer.close()
    return _host_of(data.partition(b"\r\n\r\n")[2])


def get(host: str, port: int, path: str) -> bytes:
    """One request for a small document; its body."""

    async def run() -> bytes:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(
            b"GET " + path.encode() + b" HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n"
        )
        data = await reader.read()
        writer.close()
        return data.partition(b"\r\n\r\n")[2]

    return asyncio.run(run())


def trusted_host(host: str, port: int) -> TrustedHost:
    """The AK that a measured daemon says it has; a benchmark has no registrar."""
    return _host_of(get(host, port, "/verifier/identity"))


def _host_of(body: bytes) -> TrustedHost:
    results = Fields(parse_json_object(body, "identity"), "identity").fields("results")
    return TrustedHost(ak=parse_ak(results.base64("ak_tpm", 1024)))


def verify_all(load: Load, host: TrustedHost) -> int:
    """Verify every good answer with the tenants' library; how many there were.

    Raises:
        VerificationError: the first that does not verify.
        HostError: there was none.
    """
    verifier = Verifier(UnsafeAcceptAny(), max_age_s=600)
    history = MemoryHistory()
    count = 0
    for reply in load.replies:
        if reply.status != 200:
            continue
        history.open(reply.request.nonce)
        verifier.verify(
            reply.body,
            Challenge(request=reply.request, made_at_s=reply.sent_s),
            host,
            history,
            now_s=reply.answered_s,
        )
        count += 1
    if not count:
        raise HostError("the benchmark got no answer at all")
    return count
