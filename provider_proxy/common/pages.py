"""What a page of an admin listener is sent with, and whom such a listener answers.

A page is one file, its script and style in it. Its policy lets exactly these run, lets it talk to where
it came from, and nothing else. An admin listener has no password: a web page that an operator happens to
have open must not read it by a name that it points at 127.0.0.1 (ADR 0009).
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
    """Refuse a name that is not this machine's own.

    Args:
        host: the Host header, untrusted; empty where an old client sent none, which no browser does.

    Raises:
        WrongHostError: neither "localhost" nor an address on loopback.
    """
    name = _PORT.sub("", host)
    if host and not is_loopback(name.removeprefix("[").removesuffix("]")):
        raise WrongHostError("ask for this listener as localhost or by its address on loopback")


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
