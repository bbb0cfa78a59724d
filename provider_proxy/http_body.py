"""Reads the body of an answer, bounded: whoever answers may be hostile, or broken.

Works under trio and asyncio. Sizes are those of what arrives: a compressed body is refused, because a
few bytes of it can be gigabytes.
"""

from __future__ import annotations

import anyio
import httpx

from provider_proxy.errors import ReplyError

IDENTITY = {"Accept-Encoding": "identity"}
"""Headers of a request whose answer `read_body` reads."""


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
