"""Protects HTTP clients from a server that is hostile or broken: bounded bodies, no cookies, and one list
of what a request may raise.

Works under trio and asyncio. Sizes are of what arrives: a compressed body is refused, because a few
bytes of it can expand to gigabytes.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterator
from http.cookiejar import CookieJar, DefaultCookiePolicy

import anyio
import httpx

from provider_proxy.common import http_head
from provider_proxy.common.failures import why
from provider_proxy.errors import ReplyError

CONNECT_LIMIT_S = 10.0
IDENTITY = {"Accept-Encoding": "identity"}
"""Headers of a request whose answer `read_body` reads."""

MAX_FEW_PIECES = 1000
LEAST_PIECE_BYTES = 256  # on average, of a body in many pieces

NO_ANSWER = (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OSError)
"""What a request raises where the other side is at fault. httpx parses a Location that it does not
follow (InvalidURL, idna's UnicodeError), and fails on cookies that are not ASCII when it sends them.
A server of TLS 1.3 refuses a client's certificate after the handshake: then the `ssl.SSLError`, an
OSError, comes out of a read, where httpcore under asyncio does not translate it."""


def no_cookies() -> CookieJar:
    """A jar that stays empty: else a server's cookies grow for as long as its client lives."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))


def http_client(
    context: ssl.SSLContext | None,
    *,
    read_limit_s: float,
    connect_limit_s: float = CONNECT_LIMIT_S,
    pool: int | None = None,
    tls_name: str | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """A client that connects only to the host in its URL: no cookies, no proxies or netrc from the
    environment, no redirects, no compressed answers, a bounded number of interim answers.

    Args:
        context: see `tls.client_context`; None where the URL is http://; no CA is trusted then.
        read_limit_s: for each wait, in seconds; the caller bounds the whole exchange.
        tls_name: what the other side's certificate must be for, where it is not the URL's host.
        pool: connections at most, one of which is kept; None for httpx's own numbers.
        transport: what carries requests; tests put theirs there.
    """

    async def extend(request: httpx.Request) -> None:
        request.extensions["trace"] = http_head.trace
        if tls_name is not None:
            request.extensions["sni_hostname"] = tls_name

    if pool is None:
        limits = httpx.Limits()
    else:
        limits = httpx.Limits(max_connections=pool, max_keepalive_connections=1)
    context = context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.AsyncClient(
        transport=transport or http_head.bounded_transport(context, limits),
        trust_env=False,
        cookies=no_cookies(),
        timeout=httpx.Timeout(read_limit_s, connect=min(connect_limit_s, read_limit_s)),
        headers=IDENTITY,
        event_hooks={"request": [extend]},
    )


@contextlib.contextmanager
def no_answer(who: str, error: Callable[[str], Exception] = ReplyError) -> Iterator[None]:
    """Turn what a request raises where the other side is at fault into an error of ours.

    Args:
        who: was asked: "the proxy".
        error: makes it, of a message that says why.
    """
    try:
        yield
    except NO_ANSWER as exc:
        raise error(f"{who} gave no answer: {why(exc)}") from exc


def in_crumbs(pieces: int, size: int) -> bool:
    """Whether a body comes in pieces so small that reading it is an attack.

    A piece costs some 20 microseconds however small it is, and HTTP's chunks may have a byte each: 12 MB
    of them keep an event loop busy for minutes.
    """
    return pieces > MAX_FEW_PIECES + size // LEAST_PIECE_BYTES


async def read_body(response: httpx.Response, limit: int, who: str) -> bytes:
    """The body of a streamed response.

    Args:
        limit: in bytes.
        who: answers, for messages: "the proxy".

    Raises:
        ReplyError: it is larger, compressed, or in crumbs.
        httpx.HTTPError: it does not come whole.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ReplyError(f"{who} sent a compressed answer, although it was asked not to")
    body = bytearray()
    pieces = 0
    # Cancelled, not left: so httpx's generators end where they are and the connection is closed, where
    # a break would leave them to the garbage collector (trio warns of it).
    with anyio.CancelScope() as enough:
        async for chunk in response.aiter_bytes():
            pieces += 1
            if in_crumbs(pieces, len(body)) or len(body) + len(chunk) > limit:
                enough.cancel()
            else:
                body += chunk
    if in_crumbs(pieces, len(body)):
        raise ReplyError(f"{who} sent an answer in too many pieces")
    if enough.cancel_called:
        raise ReplyError(f"{who} sent an answer larger than {limit} bytes")
    return bytes(body)
