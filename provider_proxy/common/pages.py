"""The headers that an admin listener's page is sent with, and the hosts that such a listener answers for.

A page is one file, its script and style in it. Its policy lets exactly these run, and lets it talk only
to the server that it came from. An admin listener has no password: a web page that an operator happens to
have open must not read it through a name that resolves to 127.0.0.1 (ADR 0009).
"""

from __future__ import annotations

import base64
import re
from hashlib import sha256

from provider_proxy.common.addresses import is_loopback
from provider_proxy.errors import WrongHostError

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)
_PORT = re.compile(r":[0-9]{1,5}$", re.ASCII)
NO_SNIFF = (b"X-Content-Type-Options", b"nosniff")


def check_host(host: str) -> None:
    """Refuse a Host header that does not name this machine's loopback.

    Args:
        host: the Host header, untrusted; empty where an old client sent none, which no browser does.

    Raises:
        WrongHostError: neither "localhost" nor an address on loopback.
    """
    name = _PORT.sub("", host)
    if host and not is_loopback(name.removeprefix("[").removesuffix("]")):
        raise WrongHostError("use localhost or a loopback address to reach this listener")


def page_headers(page: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The headers that let the page run its own script and style, talk to us, and nothing else."""
    allowed: dict[bytes, list[bytes]] = {b"script": [], b"style": []}
    for kind, text in _INLINE.findall(page):
        allowed[kind].append(b"'sha256-" + base64.b64encode(sha256(text).digest()) + b"'")
    policy = (
        b"default-src 'none'",
        b"script-src " + b" ".join(allowed[b"script"]),
        b"style-src " + b" ".join(allowed[b"style"]),
        b"connect-src 'self'",
        b"img-src data:",  # its icon
        b"base-uri 'none'",
        b"form-action 'none'",
        b"frame-ancestors 'none'",
        b"require-trusted-types-for 'script'",
    )
    return (
        (b"Content-Security-Policy", b"; ".join(policy)),
        NO_SNIFF,
        (b"Referrer-Policy", b"no-referrer"),
        (b"X-Frame-Options", b"DENY"),
        (b"Cross-Origin-Opener-Policy", b"same-origin"),
        (b"Cross-Origin-Resource-Policy", b"same-origin"),
        (b"Permissions-Policy", b"camera=(), geolocation=(), microphone=()"),
    )
