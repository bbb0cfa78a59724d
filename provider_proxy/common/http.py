"""What our HTTP clients need against whoever answers, who may be hostile, or broken: bounded bodies,
no cookies, and what a request may raise.

Works under trio and asyncio. Sizes are those of what arrives: a compressed body is refused, because a
few bytes of it can be gigabytes.
"""

from __future__ import annotations

from http.cookiejar import CookieJar, DefaultCookiePolicy

import anyio
import httpx

from provider_proxy.errors import ReplyError

IDENTITY = {"Accept-Encoding": "identity"}
"""Headers of a request whose answer `read_body` reads."""

NO_ANSWER = (httpx.HTTPError, httpx.InvalidURL, UnicodeError)
"""What a request raises where the other side is at fault. httpx parses a Location that it does not
follow (InvalidURL, idna's UnicodeError), and stumbles over cookies that are no ASCII on sending them."""


def no_cookies() -> CookieJar:
    """A jar that stays empty: else a server's cookies grow for as long as its client lives."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))


async def read_body(response: httpx.Response, limit: int, who: str) -> bytes:
    """The body of a streamed response.

    Args:
        limit: in bytes.
        who: answers, for messages: "the proxy".

    Raises:
        ReplyError: it is larger, or compressed.
        httpx.HTTPError: it does not come whole.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ReplyError(f"{who} sends a compressed answer, which nobody asked for")
    body = bytearray()
    # Cancelled, not left: so httpx's generators end where they are and the connection is closed, where
    # a break would leave them to the garbage collector (trio warns of it).
    with anyio.CancelScope() as enough:
        async for chunk in response.aiter_bytes():
            if len(body) + len(chunk) > limit:
                enough.cancel()
            else:
                body += chunk
    if enough.cancel_called:
        raise ReplyError(f"{who} sends an answer larger than {limit} bytes")
    return bytes(body)
