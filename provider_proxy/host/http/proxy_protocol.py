"""The PROXY protocol, versions 1 and 2: a TCP proxy names the client whose connection it passes on.

Read before TLS, from the addresses in `listen.proxy_protocol_from` only. Such a
proxy must send the header: a connection without it is refused, so that no client passes for the proxy.
Specification: proxy-protocol.txt of HAProxy. Extensions (TLVs) are read and ignored.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

V2_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V1_SIGNATURE = b"PROXY "
MAX_V1_BYTES = 107  # the specification's worst case, with its CRLF
MAX_V2_BYTES = 4096  # behind the first 16; addresses take at most 216, the rest are extensions
_V1 = re.compile(
    rb"PROXY (?:UNKNOWN(?: [ -~]*)?"
    rb"|(TCP[46]) ([0-9A-Fa-f:.]+) [0-9A-Fa-f:.]+ ([0-9]{1,5}) [0-9]{1,5})\r\n"
)
_PORTS = struct.Struct(">HH")


class ProxyHeaderError(ValueError):
    """A proxy did not send a valid PROXY protocol header."""


Read = Callable[[int], Awaitable[bytes]]
"""Gives exactly so many bytes of the connection. Raises where it ends earlier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """The client of a connection.

    Attributes:
        address: an IP address in its usual form.
    """

    address: str
    port: int


async def read_header(read: Read) -> Client | None:
    """Read the header of either version.

    Returns:
        The client; None for the proxy's own connection (a health check) or without an IP address.

    Raises:
        ProxyHeaderError: the header is missing or not valid.
    """
    begin = await read(len(V2_SIGNATURE))
    if begin == V2_SIGNATURE:
        return await _read_v2(read)
    if begin.startswith(V1_SIGNATURE):
        line = begin
        while not line.endswith(b"\n") and len(line) < MAX_V1_BYTES:
            line += await read(1)  # not a byte of what follows the line
        return _parse_v1(line)
    raise ProxyHeaderError("the PROXY protocol's header is missing")


def _parse_v1(line: bytes) -> Client | None:
    found = _V1.fullmatch(line)
    if found is None:
        raise ProxyHeaderError("not a PROXY header of version 1")
    if found[1] is None:
        return None
    return _client(found[2].decode("ascii"), int(found[3]), 4 if found[1] == b"TCP4" else 6)


async def _read_v2(read: Read) -> Client | None:
    version, family, length = struct.unpack(">BBH", await read(4))
    if version >> 4 != 2 or version & 0xF > 1 or length > MAX_V2_BYTES:
        raise ProxyHeaderError("not a PROXY header of version 2")
    data = await read(length) if length else b""
    if version & 0xF == 0:  # LOCAL: the proxy's own connection
        return None
    if family not in (0x11, 0x21):  # TCP over IPv4, over IPv6
        return None
    size = 4 if family == 0x11 else 16
    if len(data) < 2 * size + _PORTS.size:
        raise ProxyHeaderError("the PROXY header of version 2 is truncated")
    port, _ = _PORTS.unpack_from(data, 2 * size)
    return Client(address=str(ipaddress.ip_address(data[:size])), port=port)


def _client(address: str, port: int, version: int) -> Client:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as exc:
        raise ProxyHeaderError("the PROXY header's address is not a valid IP address") from exc
    if parsed.version != version or port > 0xFFFF:
        raise ProxyHeaderError("the PROXY header's address does not match its address family")
    return Client(address=str(parsed), port=port)
