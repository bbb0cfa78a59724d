"""The simplest requests, recognised by one regular expression; and the bytes of a response.

h11 decides what a valid HTTP request is. This module accepts a small part of what h11 accepts, and reads
it the same way: a complete GET of a path in HTTP/1.1, with CRLF line ends, one Host, and no header that
frames a body or asks for another protocol. A differential test compares the two. Each quantifier is
possessive, so the time is linear in the length of the input.
"""

from __future__ import annotations

import re

from provider_proxy.host.http.messages import CLIENT_CERT, MAX_TARGET_CHARS, REASONS, Response

_NOT_HERE = rb"host|content-length|transfer-encoding|connection|upgrade|expect|te|trailer"
_OTHER = (
    rb"(?:(?!(?i:%b):)[-!#$%%&'*+.^_`|~0-9A-Za-z]++:[\t -~]*+\r\n"
    rb"|(?i:connection: ?+(?:keep-alive|close)\r\n))" % _NOT_HERE
)
_PLAIN_GET = re.compile(
    rb"GET (/[!-~]{0,%d}+) HTTP/1\.1\r\n(?:%b)*+(?i:host):[\t ]*+([!-~]*+)\r\n(?:%b)*+\r\n"
    % (MAX_TARGET_CHARS - 1, _OTHER, _OTHER)
)
_CLOSES = re.compile(rb"\r\n(?i:connection: ?+close)\r\n")
_CLIENT_CERT = re.compile(rb"\r\n(?i:%b)(?i:(-chain)?+):([\t -~]*+)(?=\r\n)" % CLIENT_CERT)


def plain_get(data: bytes) -> tuple[str, str, int, bool] | None:
    """Parse a plain GET that begins here and is complete.

    Args:
        data: untrusted bytes.

    Returns:
        Its target, its Host, its length in bytes, and False if it is the connection's last request;
        None where h11 must decide.
    """
    match = _PLAIN_GET.match(data)
    if match is None:
        return None
    target, host = match.groups()
    end = match.end()
    keeps = _CLOSES.search(data, 0, end) is None
    return target.decode("ascii"), host.decode("ascii"), end, keeps


def client_certs(head: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The values of the `Client-Cert` headers of a head that `plain_get` has accepted, and those of its
    `Client-Cert-Chain` headers."""
    values: tuple[list[str], list[str]] = ([], [])
    for chain, value in _CLIENT_CERT.findall(head):
        values[bool(chain)].append(value.decode("ascii").strip("\t "))
    return tuple(values[0]), tuple(values[1])


def response_head(response: Response, date: bytes, *, keeps: bool) -> bytes:
    """The status line and the headers of a response.

    Args:
        date: the value of the Date header.
        keeps: the connection can be used again.
    """
    head = (
        b"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n"
        b"Cache-Control: no-store\r\n"
        % (
            response.status,
            REASONS.get(response.status, b""),
            date,
            response.content_type,
            sum(map(len, response.body)),
        )
    )
    for name, value in response.headers:
        head += b"%b: %b\r\n" % (name, value)
    return head + (b"\r\n" if keeps else b"Connection: close\r\n\r\n")
