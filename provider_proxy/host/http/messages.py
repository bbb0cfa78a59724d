"""Requests and responses of our servers, as values; `http.server` reads and sends them.

A JSON response is in Keylime's envelope. Nothing here reads a socket or waits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import h11

from provider_proxy.errors import ProviderProxyError, RequestError, ServiceError
from provider_proxy.evidence.wire import encode_envelope

MAX_TARGET_CHARS = 2048
JOIN_BYTES = 64 * 1024  # small parts go in one write; an IMA list is not copied again
CLIENT_CERT = b"client-cert"  # RFC 9440
CLIENT_CERT_CHAIN = b"client-cert-chain"
JSON = b"application/json"
HTML = b"text/html; charset=utf-8"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"

REASONS = {
    200: b"OK",
    400: b"Bad Request",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    414: b"URI Too Long",
    421: b"Misdirected Request",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The other end of a connection, as far as the socket tells.

    Attributes:
        name: address and port, or the unix socket's connection number; never a secret.
        is_gone: True once the client has hung up.
        certificate: the client's, DER, verified by TLS; None if it showed none.
        chain: from it to the CA that is trusted, DER, as TLS verified them; empty where that is not
            known, which a resumed session does not tell.
        uid: of the process at the other end of a unix socket; None for TCP.
        limit: sets how many seconds the present request may still take; after them it is
            cancelled and answered with a `DeadlineError`.
    """

    name: str
    is_gone: Callable[[], bool]
    limit: Callable[[float], None]
    certificate: bytes | None = None
    chain: tuple[bytes, ...] = ()
    uid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request without body: path and query of its target, still percent-encoded.

    Attributes:
        host: the Host header: what the client calls this server. Untrusted.
        client_certs, client_chains: the values of all `Client-Cert` and `Client-Cert-Chain` headers on
            a front's listener; empty elsewhere.
    """

    method: str
    path: str
    query: str
    peer: Peer
    host: str = ""
    client_certs: tuple[str, ...] = ()
    client_chains: tuple[str, ...] = ()


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


ALLOW = (b"Allow", b"GET, HEAD, OPTIONS")
WHAT_IS_ALLOWED = Response(headers=(ALLOW,))
"""The answer to OPTIONS, which load balancers send as a health check."""

BUSY_STATUSES = (429, 503, 504)

Handler = Callable[[Request], Awaitable[Response]]
Observer = Callable[[int, str], None]
"""Called with status and reason of each response."""


def error_response(error: ProviderProxyError, busy_status: int = 503) -> Response:
    """One of our errors as a response in Keylime's envelope.

    Args:
        busy_status: for every request that may be repeated unchanged. Keylime's verifier tries
            again after 408 and 500 only, and gives an agent up after 429, 503 and 504.
    """
    status, headers, closes = 500, [], False
    results: dict[str, object] = {}
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    if isinstance(error, RequestError | ServiceError):
        status, closes = error.status, error.closes
    if busy_status != 503 and status in BUSY_STATUSES:
        status = busy_status
    if isinstance(error, RequestError) and error.parameter is not None:
        results["parameter"] = error.parameter
    if retry_after_s is not None:
        headers.append((b"Retry-After", b"%d" % max(1, round(retry_after_s))))
    if status == 405:
        headers.append(ALLOW)
    return Response(
        status=status,
        body=(encode_envelope(status, str(error), results),),
        headers=tuple(headers),
        reason=type(error).__name__,
        closes=closes,
    )


def refuse(status: int, text: str, reason: str) -> Response:
    """A response to something that is not a valid HTTP request; the connection closes."""
    return Response(
        status=status, body=(encode_envelope(status, text, {}),), reason=reason, closes=True
    )


def refuse_body() -> Response:
    """The refusal of a request with a body."""
    return refuse(400, "a request must not have a body", "body")


def refuse_protocol(error: h11.RemoteProtocolError) -> Response:
    """The refusal of what h11 does not accept as a request."""
    status = error.error_status_hint or 400
    return refuse(status, f"not a valid HTTP request: {error}", "protocol")


def joined(parts: Iterable[bytes]) -> list[bytes]:
    """Small parts joined for one write; large ones (an IMA list) are not copied."""
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


def is_chunked(head: h11.Request) -> bool:
    """Chunks beside a Content-Length serve to smuggle requests; a GET does not need them."""
    return b"transfer-encoding" in [name.lower() for name, _ in head.headers.raw_items()]


def to_request(head: h11.Request, peer: Peer, *, front: bool = False) -> Request | Response:
    """Our form of h11's request; or the refusal of one that is too long or of another HTTP version.

    Args:
        front: the peer is a front, whose `Client-Cert` headers count.
    """
    if not head.http_version.startswith(b"1."):
        return refuse(505, "this server supports HTTP/1.1 only", "version")
    if len(head.target) > MAX_TARGET_CHARS:
        return refuse(414, f"the target is longer than {MAX_TARGET_CHARS} characters", "target")
    target = head.target.decode("ascii", "replace")
    if target[:8].lower().startswith(("http://", "https://")):  # absolute form: RFC 9112, 3.2.2
        target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
    path, _, query = target.partition("?")
    # h11 has checked that there is exactly one.
    host = next((value for name, value in head.headers if name == b"host"), b"")
    return Request(
        method=head.method.decode("ascii"),
        path=path,
        query=query,
        peer=peer,
        host=host.decode("ascii", "replace"),
        client_certs=_values(head, CLIENT_CERT) if front else (),
        client_chains=_values(head, CLIENT_CERT_CHAIN) if front else (),
    )


def _values(head: h11.Request, wanted: bytes) -> tuple[str, ...]:
    """The values of all headers of a name, in their order."""
    return tuple(value.decode("latin-1") for name, value in head.headers if name == wanted)
