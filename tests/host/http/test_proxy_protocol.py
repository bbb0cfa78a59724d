"""The PROXY protocol: both versions, invalid headers, and whose connection it is then."""

from __future__ import annotations

import ipaddress
import os
import random
import struct

import pytest
import trio
from helpers import LIMIT_S, Wire, connect, get_bytes, server_on_port
from hypothesis import given
from hypothesis import strategies as st

from provider_proxy.common.addresses import Networks
from provider_proxy.host.http.messages import Request, Response
from provider_proxy.host.http.proxy_protocol import (
    MAX_V1_BYTES,
    V2_SIGNATURE,
    Client,
    ProxyHeaderError,
    read_header,
)
from provider_proxy.host.http.server import HttpServer


def v2(address: str, port: int, *, command: int = 1, extra: bytes = b"") -> bytes:
    ip = ipaddress.ip_address(address)
    body = ip.packed + ip.packed + struct.pack(">HH", port, 8890) + extra
    family = 0x11 if ip.version == 4 else 0x21
    return V2_SIGNATURE + struct.pack(">BBH", 0x20 | command, family, len(body)) + body


async def read(data: bytes) -> tuple[Client | None, bytes]:
    """What a header says, and what is left unread."""
    left = bytearray(data)

    async def take(count: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if len(left) < count:
            raise trio.BrokenResourceError("cut off")
        taken = bytes(left[:count])
        del left[:count]
        return taken

    return await read_header(take), bytes(left)


GOOD: dict[str, tuple[bytes, Client | None]] = {
    "v1, IPv4": (
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n",
        Client(address="192.0.2.7", port=56324),
    ),
    "v1, IPv6": (
        b"PROXY TCP6 2001:DB8::7 ::1 1 443\r\n",
        Client(address="2001:db8::7", port=1),
    ),
    "v1, unknown": (b"PROXY UNKNOWN\r\n", None),
    "v1, unknown with more": (b"PROXY UNKNOWN ffff::1 ffff::1 65535 65535\r\n", None),
    "v2, IPv4": (v2("192.0.2.7", 56324), Client(address="192.0.2.7", port=56324)),
    "v2, IPv6": (v2("2001:db8::7", 1), Client(address="2001:db8::7", port=1)),
    "v2, local": (v2("192.0.2.7", 1, command=0), None),
    "v2, extensions": (
        v2("192.0.2.7", 1, extra=b"\x04\x00\x03abc"),
        Client(address="192.0.2.7", port=1),
    ),
    "v2, no address": (V2_SIGNATURE + b"\x21\x00\x00\x00", None),
    "v2, a unix socket": (V2_SIGNATURE + b"\x21\x31\x00\xd8" + bytes(216), None),
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_header_is_read_and_no_byte_more(name: str) -> None:
    header, client = GOOD[name]
    assert await read(header + b"\x16\x03\x01 what TLS sends") == (
        client,
        b"\x16\x03\x01 what TLS sends",
    )


BAD = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    "HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "v1, small letters": b"proxy TCP4 192.0.2.7 198.51.100.1 56324 443\r\n",
    "v1, no port": b"PROXY TCP4 192.0.2.7 198.51.100.1 443\r\n",
    "v1, a name": b"PROXY TCP4 localhost 198.51.100.1 1 443\r\n",
    "v1, another family": b"PROXY TCP4 ::1 ::1 1 443\r\n",
    "v1, a port too large": b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 443\r\n",
    "v1, LF alone": b"PROXY TCP4 192.0.2.7 198.51.100.1 1 443\n",
    "v1, two spaces": b"PROXY TCP4  192.0.2.7 198.51.100.1 1 443\r\n",
    "v1, without an end": b"PROXY UNKNOWN " + b"x" * 200,
    "v2, version 1": V2_SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
    "v2, another command": V2_SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12),
    "v2, too long": V2_SIGNATURE + b"\x21\x11\xff\xff" + bytes(65535),
    "v2, cut": V2_SIGNATURE + b"\x21\x11\x00\x08" + bytes(8),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_is_no_header(name: str) -> None:
    with pytest.raises(ProxyHeaderError):
        await read(BAD[name])
    assert MAX_V1_BYTES == 107  # the specification's


@given(st.binary(max_size=300), st.sampled_from([b"", b"PROXY ", V2_SIGNATURE]))
def test_whatever_comes_is_a_header_or_an_error(data: bytes, begin: bytes) -> None:
    try:
        trio.run(read, begin + data)
    except (ProxyHeaderError, trio.BrokenResourceError):
        return


# --- the server ---------------------------------------------------------------------------------------


class Site:
    def __init__(self, *trusted: str, max_per_address: int = 4096) -> None:
        self.names: list[str] = []
        self.seen: list[tuple[int, str]] = []
        self.server = HttpServer(
            self.handle,
            observe=lambda status, reason: self.seen.append((status, reason)),
            max_per_address=max_per_address,
            passed_on=Networks(trusted).holds,
        )

    async def handle(self, request: Request) -> Response:
        self.names.append(request.peer.name)
        return Response(body=(b"ok",))


async def ask(wire: Wire, header: bytes) -> int:
    await wire.send(header + get_bytes("/ok"))
    with trio.fail_after(LIMIT_S):
        return (await wire.reply()).status


@pytest.mark.parametrize("header", [GOOD["v1, IPv4"][0], GOOD["v2, IPv4"][0]])
async def test_the_client_is_the_one_that_the_proxy_names(header: bytes) -> None:
    site = Site("127.0.0.0/8")
    async with server_on_port(site.server) as address, connect(address) as wire:
        assert await ask(wire, header) == 200
        assert await ask(wire, b"") == 200  # once a connection
    assert site.names == ["192.0.2.7:56324"] * 2


async def test_a_proxy_that_speaks_for_itself() -> None:
    site = Site("127.0.0.1")
    async with server_on_port(site.server) as address, connect(address) as wire:
        assert await ask(wire, b"PROXY UNKNOWN\r\n") == 200
    assert site.names[0].startswith("127.0.0.1:")


async def test_a_named_proxy_must_say_it() -> None:
    site = Site("127.0.0.1")
    async with server_on_port(site.server) as address, connect(address) as wire:
        await wire.send(get_bytes("/ok"))
        assert await wire.is_closed()
    assert (site.names, site.seen) == ([], [(0, "no PROXY header")])


async def test_nobody_else_may_say_it() -> None:
    """From an address that is not named it is what it looks like: no HTTP."""
    site = Site("192.0.2.0/24")
    async with server_on_port(site.server) as address, connect(address) as wire:
        assert await ask(wire, GOOD["v1, IPv4"][0]) == 400
    assert site.names == []


async def test_clients_behind_a_proxy_have_limits_of_their_own() -> None:
    site = Site("127.0.0.1", max_per_address=2)
    async with server_on_port(site.server) as address:
        async with connect(address) as one, connect(address) as two, connect(address) as other:
            for wire, client in ((one, "192.0.2.1"), (two, "192.0.2.1"), (other, "192.0.2.2")):
                assert await ask(wire, v2(client, 1)) == 200
            async with connect(address) as third:
                await third.send(v2("192.0.2.1", 9) + get_bytes("/ok"))
                assert await third.is_closed()
    assert (0, "too many connections of an address") in site.seen


async def test_a_proxy_that_says_nothing_is_let_go(
    autojump_clock: trio.testing.MockClock,
) -> None:
    site = Site("127.0.0.1")
    async with server_on_port(site.server) as address:
        host, _, port = address.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(b"PROX")
            assert await stream.receive_some() == b""
    assert site.seen == [(0, "no PROXY header")]


def test_networks() -> None:
    networks = Networks(["10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32"])
    for inside in ("10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1", "192.0.2.7"):
        assert networks.holds(inside)
    for outside in ("11.0.0.1", "192.0.2.8", "::1", "fe80::1%eth0"):
        assert not networks.holds(outside)
    assert not Networks(()).holds("10.0.0.1")


def test_random_v1_lines() -> None:
    dice = random.Random(os.environ.get("FUZZ_SEED", "1"))
    for _ in range(300):
        line = bytearray(b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n")
        line[dice.randrange(6, len(line))] = dice.randrange(256)
        try:
            client, _ = trio.run(read, bytes(line) + bytes(120))
        except ProxyHeaderError:
            continue
        assert client is None or ipaddress.ip_address(client.address).version == 4
