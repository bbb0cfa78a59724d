"""The HTTP/1.1 server: framing, limits, deadlines, refusals, and its end. Real sockets; where a deadline
is tested, a pair of unix sockets (no delay of the network's) under the autojump clock."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from helpers import (
    LIMIT_S,
    Certs,
    Wire,
    connect,
    connected,
    get_bytes,
    make_certs,
    server_on_port,
    until,
)

from provider_proxy.common.streams import SocketStream
from provider_proxy.errors import (
    ClientGoneError,
    DeadlineError,
    DrainingError,
    HostError,
    MethodError,
    NotFoundError,
    OverloadedError,
    ParameterError,
    ProviderProxyError,
    QuoteError,
    SelfCheckError,
    TenantLimitError,
    UnknownTenantError,
)
from provider_proxy.host.http import messages
from provider_proxy.host.http import server as http1
from provider_proxy.host.http.messages import Request, Response
from provider_proxy.host.http.server import HttpServer

OK = get_bytes("/ok")
BIG = 8 * 1024 * 1024


class Site:
    """A handler with a path for each behaviour, and what it saw."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.seen: list[tuple[int, str]] = []
        self.error: ProviderProxyError = NotFoundError("no such path")
        self.entered = trio.Event()
        self.release = trio.Event()
        self.server = HttpServer(
            self.handle, observe=lambda status, reason: self.note(status, reason)
        )

    def note(self, status: int, reason: str) -> None:
        self.seen.append((status, reason))

    async def handle(self, request: Request) -> Response:
        self.requests.append(request)
        self.entered.set()
        if request.method == "CONNECT":
            raise self.error
        match request.path:
            case "/ok":
                return Response(body=(b'{"a":', b"1}"))
            case "/wait":
                await self.release.wait()
                return Response(body=(b"waited",))
            case "/limit":
                request.peer.limit(float(request.query))
                await self.release.wait()
                return Response(body=(b"in time",))
            case "/big":
                return Response(body=(b"<", b"x" * (BIG - 2), b">"), content_type=messages.TEXT)
            case "/bug":
                raise RuntimeError("a bug")
            case "/error":
                raise self.error
        return Response(body=(f"{request.method} {request.path}?{request.query}".encode(),))


@pytest.fixture
async def site() -> Site:
    return Site()


def pair(site: Site) -> AbstractAsyncContextManager[Wire]:
    return connected(site.server)


@asynccontextmanager
async def open_port(site: Site, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """The server on a port of loopback."""
    async with server_on_port(site.server, context) as address:
        yield address


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    return make_certs(tmp_path_factory.mktemp("certs"))


def server_context(certs: Certs) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs.cert, certs.key)
    return context


# --- requests and responses -------------------------------------------------------------------------


async def test_a_response_is_exact(site: Site) -> None:
    async with pair(site) as wire:
        reply = await wire.get("/ok")
        assert not await _anything_more(wire)
    head, date = re.subn(
        rb"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", b"Date: D", reply.head
    )
    assert date == 1
    assert head == (
        b"HTTP/1.1 200 OK\r\nDate: D\r\nContent-Type: application/json\r\n"
        b"Content-Length: 7\r\nCache-Control: no-store"
    )
    assert reply.body == b'{"a":1}'
    assert site.seen == [(200, "ok")]


async def _anything_more(wire: Wire) -> bytes:
    """What is there already; nothing is waited for."""
    assert isinstance(wire.stream, trio.SocketStream)
    try:
        return wire.stream.socket._sock.recv(4096)  # type: ignore[attr-defined,no-any-return]
    except BlockingIOError:
        return b""


async def test_a_large_body_comes_whole(site: Site) -> None:
    async with open_port(site) as address, connect(address) as wire:
        reply = await wire.get("/big")
        assert reply.header("Content-Type") == messages.TEXT.decode()
        assert reply.body == b"<" + b"x" * (BIG - 2) + b">"
        assert (await wire.get("/ok")).status == 200


async def test_the_request_is_what_was_sent(site: Site) -> None:
    async with open_port(site) as address, connect(address) as wire:
        assert isinstance(wire.stream, trio.SocketStream)
        name = "{}:{}".format(*wire.stream.socket.getsockname()[:2])
        await wire.get("/a%20b?x=1&y=%2B?z")
        (request,) = site.requests
        assert (request.method, request.path, request.query) == ("GET", "/a%20b", "x=1&y=%2B?z")
        assert request.peer.name == name
        assert not request.peer.is_gone()


async def test_unix_connections_have_different_names(site: Site) -> None:
    async with pair(site) as one, pair(site) as two:
        await one.get("/ok")
        await one.get("/ok")
        await two.get("/ok")
    first, again, second = (request.peer.name for request in site.requests)
    assert first == again != second
    assert first.startswith("unix:")


async def test_a_connection_is_kept(site: Site) -> None:
    async with pair(site) as wire:
        for number in range(5):
            reply = await wire.get(f"/{number}")
            assert reply.body == b"GET /%d?" % number
            assert not reply.closes


async def test_pipelined_requests_are_answered_in_order(site: Site) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/wait") + get_bytes("/2") + get_bytes("/3"))
        with trio.fail_after(LIMIT_S):
            await site.entered.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert [r.path for r in site.requests] == ["/wait"]  # one request at a time
        site.release.set()
        assert [(await wire.reply()).body for _ in range(3)] == [b"waited", b"GET /2?", b"GET /3?"]


async def test_one_that_pipelines_does_not_keep_others_waiting(site: Site) -> None:
    """A thousand requests at once: between two of them everybody else has a turn."""
    turns: list[int] = []

    async def count() -> None:
        while True:
            turns.append(len(site.requests))
            await trio.lowlevel.checkpoint()

    async with pair(site) as wire, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await wire.send(get_bytes("/2") * 200)
        for _ in range(200):
            assert (await wire.reply()).body == b"GET /2?"
        nursery.cancel_scope.cancel()
    assert len(set(turns)) > 50  # one in two, for trio runs a turn in any order


async def test_a_request_that_comes_with_the_last_ones_deadline(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    """The deadline of the request before still stands while the client is idle, and ends nothing."""
    async with pair(site) as wire:
        await wire.send(get_bytes("/limit?20"))
        await trio.testing.wait_all_tasks_blocked()
        site.release.set()
        assert (await wire.reply()).body == b"in time"
        for _ in range(3):
            await trio.sleep(20)
            assert (await wire.get("/ok")).status == 200
        site.release = trio.Event()
        await wire.send(get_bytes("/limit?7"))
        assert (await wire.reply()).status == 504
        assert (await wire.get("/ok")).status == 200


async def test_a_handler_without_a_limit_has_time_of_its_own(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    """What is left of the last request's deadline is not its."""
    async with pair(site) as wire:
        await wire.send(get_bytes("/limit?20"))
        await trio.testing.wait_all_tasks_blocked()
        site.release.set()
        await wire.reply()
        site.release = trio.Event()
        await trio.sleep(19.5)
        await wire.send(get_bytes("/wait"))
        await trio.sleep(5)
        site.release.set()
        assert (await wire.reply()).body == b"waited"


async def test_a_request_in_tiny_writes(site: Site) -> None:
    async with pair(site) as wire:
        for byte in get_bytes("/tiny", "X-Filler: " + "x" * 200):
            await wire.send(bytes([byte]))
            await trio.lowlevel.checkpoint()
        assert (await wire.reply()).body == b"GET /tiny?"


async def test_connection_close_is_honoured(site: Site) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/ok", "Connection: close"))
        reply = await wire.reply()
        assert reply.status == 200
        assert reply.closes
        assert await wire.is_closed()


@pytest.mark.parametrize("headers", [(), ("Connection: keep-alive",)])
async def test_http_1_0_is_answered_and_closed(site: Site, headers: tuple[str, ...]) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/ok", *headers, version="1.0"))
        reply = await wire.reply()
        assert (reply.status, reply.body) == (200, b'{"a":1}')
        assert reply.closes
        assert await wire.is_closed()


async def test_http_1_0_needs_no_host(site: Site) -> None:
    async with pair(site) as wire:
        await wire.send(b"GET /ok HTTP/1.0\r\n\r\n")
        assert (await wire.reply()).status == 200


async def test_head_has_the_head_of_get_and_no_body(site: Site) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/ok", method="HEAD"))
        reply = await wire.reply(to_head=True)
        assert (reply.status, reply.header("Content-Length")) == (200, "7")
        assert (await wire.get("/next")).body == b"GET /next?"  # no byte of a body in between


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
async def test_other_methods_reach_the_handler(site: Site, method: str) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/x", method=method))
        assert (await wire.reply()).body == method.encode() + b" /x?"
        assert (await wire.get("/ok")).status == 200


async def test_connect_opens_no_tunnel(site: Site) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("example.org:443", method="CONNECT") + OK)
        assert (await wire.reply()).status == 404
        assert (await wire.reply()).status == 200  # what follows is the next request
        assert [r.method for r in site.requests] == ["CONNECT", "GET"]


async def test_absolute_form_is_accepted(site: Site) -> None:
    """RFC 9112, section 3.2.2: a server MUST accept the absolute-form in requests."""
    async with pair(site) as wire:
        reply = await wire.get("http://proxy.test/abs?x=1")
        assert (reply.status, reply.body) == (200, b"GET /abs?x=1")


@pytest.mark.parametrize("scheme", ["HTTP", "Https", "http"])
async def test_a_scheme_is_one_in_capitals_too(site: Site, scheme: str) -> None:
    async with pair(site) as wire:
        assert (await wire.get(f"{scheme}://proxy.test/abs?x=1")).body == b"GET /abs?x=1"


@pytest.mark.parametrize("lines", [b"\r\n", b"\r\n\r\n\r\n"])
async def test_empty_lines_before_a_request_are_passed_over(site: Site, lines: bytes) -> None:
    """RFC 9112, section 2.2: old clients send one behind a body."""
    async with pair(site) as wire:
        await wire.send(lines + OK)
        assert (await wire.reply()).status == 200
        await wire.send(lines)
        await trio.testing.wait_all_tasks_blocked()
        await wire.send(OK + lines + OK)
        assert [(await wire.reply()).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    "data",
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/3.0\r\nHost: x\r\n\r\n"],
)
async def test_another_version_of_http_is_505(site: Site, data: bytes) -> None:
    async with pair(site) as wire:
        await wire.send(data)
        reply = await wire.reply()
        assert (reply.status, reply.reason) == (505, "HTTP Version Not Supported")
        assert await wire.is_closed()
    assert site.requests == []


# --- bodies -----------------------------------------------------------------------------------------

BODIES = {
    "length": get_bytes("/ok", "Content-Length: 5") + b"hello",
    "chunked": get_bytes("/ok", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    "half": get_bytes("/ok", "Content-Length: 500") + b"hello",
    "expect": get_bytes("/ok", "Content-Length: 5", "Expect: 100-continue"),
    "expect chunked": get_bytes("/ok", "Transfer-Encoding: chunked", "Expect: 100-continue"),
    "post": get_bytes("/ok", "Content-Length: 5", method="POST") + b"hello",
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_is_refused_at_once(site: Site, name: str) -> None:
    async with pair(site) as wire:
        await wire.send(BODIES[name])
        reply = await wire.reply()  # and no "100 Continue" before it
        assert reply.status == 400
        assert "body" in str(reply.envelope()["status"])
        assert reply.closes
        assert await wire.is_closed()
    assert site.requests == []
    assert [status for status, _ in site.seen] == [400]


async def test_two_framings_at_once_end_the_connection(site: Site) -> None:
    """RFC 9112, section 6.1: after both, the server MUST close; what follows may be smuggled."""
    async with pair(site) as wire:
        both = get_bytes("/ok", "Content-Length: 4", "Transfer-Encoding: chunked")
        await wire.send(both + b"0\r\n\r\n" + get_bytes("/smuggled"))
        assert (await wire.reply()).closes
        assert await wire.is_closed()
    assert "/smuggled" not in [r.path for r in site.requests]


@pytest.mark.parametrize("headers", [("Content-Length: 0",), ("Expect: 100-continue",)])
async def test_an_empty_body_is_none(site: Site, headers: tuple[str, ...]) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/ok", *headers))
        assert (await wire.reply()).status == 200
        assert (await wire.get("/ok")).status == 200


async def test_a_refused_body_of_a_talkative_client_does_not_lose_the_answer(site: Site) -> None:
    async with open_port(site) as address, connect(address) as wire:
        await wire.send(get_bytes("/ok", "Content-Length: 100000") + b"x" * 100_000)
        reply = await wire.reply()
        assert reply.status == 400
        assert await wire.rest() == b""  # an end, and no reset, which may overtake the answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (get_bytes("/ok", "Content-Length: 5", method="HEAD") + b"hello", 400),
        (get_bytes("/" + "x" * 3000, method="HEAD"), 414),
    ],
    ids=["body", "target"],
)
async def test_a_refused_head_gets_an_answer(site: Site, data: bytes, status: int) -> None:
    async with pair(site) as wire:
        await wire.send(data)
        reply = await wire.reply(to_head=True)
        assert reply.status == status
        assert await wire.is_closed()
    assert "bug" not in [reason for _, reason in site.seen]


@pytest.mark.parametrize("after", [b"garbage\r\n\r\n", get_bytes("/ok", "Content-Length: 5")])
async def test_a_head_leaves_nothing_to_what_follows(site: Site, after: bytes) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/ok", method="HEAD"))
        assert (await wire.reply(to_head=True)).status == 200
        await wire.send(after)
        reply = await wire.reply()
        assert reply.status == 400
        assert reply.envelope()["results"] == {}
    assert "bug" not in [reason for _, reason in site.seen]


# --- what is not a proper request -------------------------------------------------------------------

BAD = {
    "no host": b"GET /ok HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /ok HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "no version": b"GET /ok\r\n\r\n",
    "bad version": b"GET /ok HTTP/x\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  /ok HTTP/1.1\r\nHost: a\r\n\r\n",
    "nul in target": b"GET /o\x00k HTTP/1.1\r\nHost: a\r\n\r\n",
    "escape in target": b"GET /o\x1b[31mk HTTP/1.1\r\nHost: a\r\n\r\n",
    "latin-1 in target": b"GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n",
    "nul in header": b"GET /ok HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
    "bare cr in header": b"GET /ok HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
    "space before colon": b"GET /ok HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n",
    "no colon": b"GET /ok HTTP/1.1\r\nHost: a\r\nnonsense\r\n\r\n",
    "folded first header": b"GET /ok HTTP/1.1\r\n Host: a\r\n\r\n",
    "bad length": get_bytes("/ok", "Content-Length: five"),
    "negative length": get_bytes("/ok", "Content-Length: -5"),
    "two lengths": get_bytes("/ok", "Content-Length: 0", "Content-Length: 5"),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD)
async def test_nonsense_gets_400_and_the_end(site: Site, name: str) -> None:
    async with pair(site) as wire:
        await wire.send(BAD[name])
        reply = await wire.reply()
        assert reply.status == 400
        assert reply.reason == "Bad Request"
        assert reply.envelope()["results"] == {}
        assert reply.closes
        assert await wire.is_closed()
    assert site.requests == []
    assert site.seen == [(400, "protocol")]


async def test_an_unknown_transfer_encoding_is_501(site: Site) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/ok", "Transfer-Encoding: gzip"))
        reply = await wire.reply()
        assert (reply.status, reply.reason) == (501, "Not Implemented")
        assert await wire.is_closed()


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (get_bytes("/ok", "X: " + "x" * 70_000), 431, "Request Header Fields Too Large"),
        (
            get_bytes("/ok", *(f"X-{n}: x" for n in range(9000))),
            431,
            "Request Header Fields Too Large",
        ),
        (get_bytes("/" + "x" * 100_000), 431, "Request Header Fields Too Large"),
        (get_bytes("/" + "x" * messages.MAX_TARGET_CHARS), 414, "URI Too Long"),
        (b"G" * 70_000, 431, "Request Header Fields Too Large"),
    ],
)
async def test_too_much_is_refused(site: Site, data: bytes, status: int, reason: str) -> None:
    async with open_port(site) as address, connect(address) as wire:
        await wire.send(data)
        reply = await wire.reply()
        assert (reply.status, reply.reason) == (status, reason)
        assert reply.closes
        assert await wire.is_closed()
    assert site.requests == []


async def test_the_longest_target_is_served(site: Site) -> None:
    async with pair(site) as wire:
        target = "/" + "x" * (messages.MAX_TARGET_CHARS - 1)
        assert (await wire.get(target)).body == b"GET %s?" % target.encode()


async def test_garbage_meets_no_bug(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Random bytes, and good requests with random bytes in them: answered with 4xx, or served."""
    rng = random.Random(20261122)
    good = get_bytes("/ok", "X-Some: header", "Accept: */*")
    for _ in range(300):
        data = bytearray(rng.randbytes(rng.randrange(1, 200)) if rng.random() < 0.3 else good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        async with pair(site) as wire:
            await wire.send(bytes(data))
            assert isinstance(wire.stream, trio.SocketStream)
            await wire.stream.send_eof()
            try:
                answer = await wire.rest()
            except trio.BrokenResourceError:
                continue
            assert answer[:10] in (b"", b"HTTP/1.1 2", b"HTTP/1.1 4", b"HTTP/1.1 5"), data
            assert not answer.startswith(b"HTTP/1.1 500"), data
    assert [reason for _, reason in site.seen if reason == "bug"] == []
    assert len([status for status, _ in site.seen if status >= 400]) > 100
    assert caplog.records == []


async def test_a_half_request_and_the_end_get_nothing(site: Site) -> None:
    async with pair(site) as wire:
        await wire.send(OK[:-2])
        assert isinstance(wire.stream, trio.SocketStream)
        await wire.stream.send_eof()
        answer = await wire.rest()
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert site.requests == []
    assert "bug" not in [reason for _, reason in site.seen]


# --- errors -----------------------------------------------------------------------------------------

ERRORS: list[tuple[ProviderProxyError, int, str, dict[str, str], bool]] = [
    (ParameterError("mask", "is wrong"), 400, "Bad Request", {}, False),
    (UnknownTenantError("you are no tenant"), 403, "Forbidden", {}, True),
    (NotFoundError("no such path"), 404, "Not Found", {}, False),
    (MethodError("only GET"), 405, "Method Not Allowed", {"Allow": "GET, HEAD, OPTIONS"}, False),
    (
        TenantLimitError("too many", retry_after_s=2.4),
        429,
        "Too Many Requests",
        {"Retry-After": "2"},
        False,
    ),
    (OverloadedError("full"), 503, "Service Unavailable", {}, False),
    (
        OverloadedError("full", retry_after_s=0.01),
        503,
        "Service Unavailable",
        {"Retry-After": "1"},
        False,
    ),
    (
        DrainingError("going", retry_after_s=7.0),
        503,
        "Service Unavailable",
        {"Retry-After": "7"},
        True,
    ),
    (ClientGoneError("gone"), 503, "Service Unavailable", {}, True),
    (
        QuoteError("no quote", retry_after_s=61.0),
        503,
        "Service Unavailable",
        {"Retry-After": "61"},
        False,
    ),
    (SelfCheckError("wrong"), 502, "Bad Gateway", {}, False),
    (DeadlineError("late"), 504, "Gateway Timeout", {}, False),
    (HostError("broken"), 500, "Internal Server Error", {}, False),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: f"{type(case[0]).__name__}-{case[1]}")
async def test_errors_as_responses(
    site: Site, case: tuple[ProviderProxyError, int, str, dict[str, str], bool]
) -> None:
    site.error, status, reason, headers, closes = case
    async with pair(site) as wire:
        reply = await wire.get("/error")
        assert (reply.status, reply.reason) == (status, reason)
        assert reply.header("Content-Type") == "application/json"
        assert {name: reply.header(name) for name in ("Allow", "Retry-After")} == {
            "Allow": None,
            "Retry-After": None,
            **headers,
        }
        parameter = {"parameter": "mask"} if status == 400 else {}
        assert reply.envelope() == {"code": status, "status": str(site.error), "results": parameter}
        assert reply.closes == closes
        if closes:
            assert await wire.is_closed()
        else:
            assert (await wire.get("/ok")).status == 200
    assert site.seen[0] == (status, type(site.error).__name__)


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: f"{type(case[0]).__name__}-{case[1]}")
async def test_busy_in_the_words_of_keylimes_verifier(
    site: Site, case: tuple[ProviderProxyError, int, str, dict[str, str], bool]
) -> None:
    """It tries again after 408 alone; what no second try can better stays what it is."""
    site.error, status, _, headers, closes = case
    site.server.busy_status = 408
    async with pair(site) as wire:
        reply = await wire.get("/error")
    expected = 408 if status in (429, 503, 504) else status
    assert reply.status == reply.envelope()["code"] == expected
    assert reply.header("Retry-After") == headers.get("Retry-After")
    assert reply.closes == closes
    assert site.seen[0] == (expected, type(site.error).__name__)


async def test_a_request_that_is_late_is_busy_too(site: Site) -> None:
    site.server.busy_status = 500
    async with pair(site) as wire:
        assert (await wire.get("/limit?0.01")).status == 500


async def test_a_private_cause_stays_private(site: Site) -> None:
    site.error = QuoteError("the TPM gave no quote")
    site.error.__cause__ = HostError("secret detail")
    async with pair(site) as wire:
        assert b"secret" not in (await wire.get("/error")).body


async def test_a_bug_closes_its_own_connection_only(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_port(site) as address, connect(address) as other:
        await other.get("/ok")
        async with connect(address) as wire:
            await wire.send(get_bytes("/bug"))
            answer = await wire.rest()
            assert b"a bug" not in answer
        assert (await other.get("/ok")).status == 200
        async with connect(address) as fresh:
            assert (await fresh.get("/ok")).status == 200
    assert site.seen.count((500, "bug")) == 1
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


# --- deadlines --------------------------------------------------------------------------------------


async def test_an_idle_connection_is_closed(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(site) as wire:
        await wire.get("/ok")
        begin = trio.current_time()
        assert await _closed_within(wire, http1.IDLE_LIMIT_S + 1)
        assert trio.current_time() - begin == pytest.approx(http1.IDLE_LIMIT_S)
    assert site.seen == [(200, "ok")]


async def _closed_within(wire: Wire, seconds: float) -> bool:
    with trio.move_on_after(seconds):
        try:
            while await wire.stream.receive_some(1 << 16):
                pass
        except trio.BrokenResourceError:
            return True  # closed on bytes that nobody read any more
        return True
    return False


async def test_a_silent_client_is_closed(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(site) as wire:
        assert await _closed_within(wire, http1.IDLE_LIMIT_S + 1)
        assert trio.current_time() == pytest.approx(http1.IDLE_LIMIT_S)


async def test_a_dripping_request_is_closed(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    """The head's limit counts from its first byte, however many more follow."""
    async with pair(site) as wire:
        await trio.sleep(http1.IDLE_LIMIT_S - 5)
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    for byte in get_bytes("/ok", "X: " + "x" * 500):
                        await wire.stream.send_all(bytes([byte]))
                        await trio.sleep(0.5)

            nursery.start_soon(drip)
            assert await _closed_within(wire, 2 * http1.HEAD_LIMIT_S)
            nursery.cancel_scope.cancel()
        assert trio.current_time() - begin == pytest.approx(http1.HEAD_LIMIT_S)
    assert site.requests == []


async def test_an_answer_may_take_as_long_as_its_handler_says(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/limit?10000"))
        await trio.sleep(9999)  # longer than a client may be idle
        site.release.set()
        assert (await wire.reply()).body == b"in time"
        await trio.sleep(http1.IDLE_LIMIT_S - 1)
        assert (await wire.get("/ok")).status == 200


async def test_a_part_of_the_next_request_counts_as_its_beginning(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(site) as wire:
        await wire.send(OK + OK[:10])
        await wire.reply()
        begin = trio.current_time()
        assert await _closed_within(wire, http1.IDLE_LIMIT_S)
        assert trio.current_time() - begin == pytest.approx(http1.HEAD_LIMIT_S)


async def test_each_request_has_the_whole_idle_time(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(site) as wire:
        for _ in range(3):
            await trio.sleep(http1.IDLE_LIMIT_S - 1)
            assert (await wire.get("/ok")).status == 200


async def test_who_does_not_read_is_closed(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/big"))
        limit = http1.SEND_LIMIT_S + BIG / http1.SEND_BYTES_PER_S
        await trio.sleep(limit - 1)
        assert site.server._open
        await trio.sleep(2)
        await trio.testing.wait_all_tasks_blocked()
        assert not site.server._open
        assert len(await wire.rest()) < BIG


async def test_a_slow_reader_is_served(site: Site, autojump_clock: trio.testing.MockClock) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/big"))
        got = 0
        while got < BIG:
            await trio.sleep(0.5)  # twice as fast as is asked
            want = http1.SEND_BYTES_PER_S
            while want > 0:
                data = await wire.stream.receive_some(want)
                assert data, f"cut off after {got} bytes"
                want -= len(data)
                got += len(data)
                if got > BIG:
                    break


@pytest.mark.parametrize("tls", [False, True])
async def test_a_tls_handshake_has_a_limit(
    site: Site, certs: Certs, autojump_clock: trio.testing.MockClock, tls: bool
) -> None:
    """A client that says nothing, or only the beginning of a ClientHello."""
    ours, theirs = socket.socketpair()
    server = SocketStream(theirs, server_context(certs))
    client = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(site.server.serve, server)
        if tls:
            await client.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        assert await _closed_within(Wire(client), 2 * http1.HANDSHAKE_LIMIT_S)
        assert trio.current_time() == pytest.approx(http1.HANDSHAKE_LIMIT_S)
    assert site.seen == []


async def test_a_handlers_own_limit_gives_504_and_keeps_the_connection(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(site) as wire:
        for number in range(3):  # each request has a limit of its own
            begin = trio.current_time()
            reply = await wire.get("/limit?2.5")
            assert trio.current_time() - begin == pytest.approx(2.5)
            assert (reply.status, reply.reason) == (504, "Gateway Timeout")
            assert reply.envelope()["results"] == {}
            assert not reply.closes
            await trio.sleep(60)  # and leaves nothing behind
            assert (await wire.get("/ok")).status == 200, number
        assert site.seen[0] == (504, "DeadlineError")


async def test_an_answer_in_time_is_not_cut_by_its_limit(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/limit?2.5"))
        await trio.sleep(2.4)
        site.release.set()
        assert (await wire.reply()).body == b"in time"
        await trio.sleep(60)
        assert (await wire.get("/ok")).status == 200


async def test_an_answer_at_the_very_moment_of_its_limit(
    site: Site, mock_clock: trio.testing.MockClock
) -> None:
    """The one or the other, but an answer."""
    async with pair(site) as wire:
        await wire.send(get_bytes("/limit?2.5"))
        await site.entered.wait()
        await trio.testing.wait_all_tasks_blocked()
        site.release.set()  # the handler is about to go on ...
        mock_clock.jump(2.5)  # ... when its time is over
        reply = await wire.reply()
        assert reply.status in (200, 504)
        mock_clock.jump(60)
        await trio.testing.wait_all_tasks_blocked()
        assert (await wire.get("/ok")).status == 200


async def test_pipelined_behind_a_504(site: Site, autojump_clock: trio.testing.MockClock) -> None:
    async with pair(site) as wire:
        await wire.send(get_bytes("/limit?1") + get_bytes("/limit?1") + OK)
        assert [(await wire.reply()).status for _ in range(3)] == [504, 504, 200]


# --- who went away ----------------------------------------------------------------------------------


async def _half_close(wire: Wire) -> None:
    stream = wire.stream
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    assert isinstance(stream, trio.SocketStream)
    await stream.send_eof()


async def _close(wire: Wire) -> None:
    await trio.aclose_forcefully(wire.stream)


async def _reset(wire: Wire) -> None:
    stream = wire.stream
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    assert isinstance(stream, trio.SocketStream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await trio.aclose_forcefully(wire.stream)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("leave", [_half_close, _close, _reset])
async def test_is_gone(
    site: Site,
    certs: Certs,
    tls: bool,
    leave: Callable[[Wire], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    context = server_context(certs) if tls else None
    client = certs.client() if tls else None
    async with open_port(site, context) as address:
        async with connect(address, client) as wire:
            await wire.get("/ok")
            await wire.send(get_bytes("/wait"))
            await until(lambda: len(site.requests) == 2)
            is_gone = site.requests[1].peer.is_gone
            assert not is_gone()
            await leave(wire)
            await until(is_gone, "is_gone")
            assert is_gone()  # asking does not take it away
        site.release.set()
        await until(lambda: not site.server._open, "the connection's end")
        async with connect(address, client) as fresh:
            assert (await fresh.get("/ok")).status == 200
    assert caplog.records == []
    assert "bug" not in [reason for _, reason in site.seen]


async def test_a_client_that_waits_or_pipelines_is_not_gone(site: Site) -> None:
    async with open_port(site) as address, connect(address) as wire:
        await wire.send(get_bytes("/wait") + OK)
        await until(lambda: len(site.requests) == 1)
        assert not site.requests[0].peer.is_gone()
        site.release.set()
        assert (await wire.reply()).body == b"waited"


async def test_who_half_closes_may_still_read_its_answer(site: Site) -> None:
    async with open_port(site) as address, connect(address) as wire:
        await wire.send(get_bytes("/wait"))
        await _half_close(wire)
        await until(lambda: len(site.requests) == 1)
        site.release.set()
        assert (await wire.reply()).body == b"waited"
        assert await wire.is_closed()


async def test_clients_that_reset_do_no_harm(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with open_port(site) as address:
        for data in (b"", b"GET", OK, get_bytes("/big"), OK + OK, b"\x00\xff" * 100):
            async with connect(address) as wire:
                if data:
                    await wire.send(data)
                await _reset(wire)
        await until(lambda: not site.server._open, "the connections' end")
        async with connect(address) as wire:
            assert (await wire.get("/ok")).status == 200
    assert caplog.records == []
    assert "bug" not in [reason for _, reason in site.seen]


async def test_garbage_instead_of_tls(
    site: Site, certs: Certs, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_port(site, server_context(certs)) as address:
        for data in (OK, b"\x00" * 500, b"\x16\x03\x01\x00\x05hello"):
            async with connect(address) as wire:
                await wire.send(data)
                try:
                    answer = await wire.rest()
                except trio.BrokenResourceError:
                    answer = b""
                assert not answer.startswith(b"HTTP")
        async with connect(address, certs.client()) as wire:
            assert (await wire.get("/ok")).status == 200
    assert site.seen == [(200, "ok")]
    assert caplog.records == []


async def test_keep_alive_and_errors_over_tls(site: Site, certs: Certs) -> None:
    async with (
        open_port(site, server_context(certs)) as address,
        connect(address, certs.client()) as wire,
    ):
        assert (await wire.get("/ok")).body == b'{"a":1}'
        assert (await wire.get("/error")).status == 404
        assert len((await wire.get("/big")).body) == BIG
        await wire.send(get_bytes("/ok", "Content-Length: 5") + b"hello")
        assert (await wire.reply()).status == 400
        assert await wire.is_closed()


async def test_an_untrusted_server_gets_no_request(site: Site, certs: Certs) -> None:
    """The client's side of the same: what the tests trust is really checked."""
    stranger = ssl.create_default_context()
    trustme.CA().configure_trust(stranger)
    async with (
        open_port(site, server_context(certs)) as address,
        connect(address, stranger) as wire,
    ):
        with pytest.raises(trio.BrokenResourceError):
            await wire.send(OK)
    assert site.requests == []


# --- how many, and the end --------------------------------------------------------------------------


def site_for(*, most: int = 4096, most_per_address: int = 4096) -> Site:
    site = Site()
    site.server = HttpServer(
        site.handle,
        observe=site.note,
        max_connections=most,
        max_per_address=most_per_address,
    )
    return site


def reasons(site: Site) -> list[str]:
    """Why connections, not requests, ended."""
    return [reason for status, reason in site.seen if status == 0]


async def test_room_is_made_by_whoever_has_idled_the_longest() -> None:
    site = site_for(most=3)
    async with (
        open_port(site) as address,
        connect(address) as one,
        connect(address) as two,
        connect(address) as three,
    ):
        for wire in (one, two, three, one):  # now two has idled the longest
            assert (await wire.get("/ok")).status == 200
            await trio.sleep(0.002)  # clocks are no finer
        async with connect(address) as four:
            assert (await four.get("/ok")).status == 200
            assert await two.is_closed()
            for wire in (one, three, four):
                assert (await wire.get("/ok")).status == 200
    assert reasons(site) == ["made room"]


@pytest.mark.parametrize("sent", [b"", b"GET /ok HTTP/1.1\r\nHost"])
async def test_who_says_nothing_or_little_makes_room(sent: bytes) -> None:
    site = site_for(most=10)
    async with open_port(site) as address, AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(connect(address)) for _ in range(10)]
        for wire in slow:
            if sent:
                await wire.send(sent)
        await until(lambda: len(site.server._open) == 10)
        for _ in range(10):
            async with connect(address) as good:
                assert (await good.get("/ok")).status == 200
                with trio.fail_after(LIMIT_S):
                    assert (await good.get("/ok")).status == 200


async def test_who_is_being_answered_is_never_cut_off() -> None:
    site = site_for(most=2)
    async with open_port(site) as address, connect(address) as one, connect(address) as two:
        for wire in (one, two):
            await wire.send(get_bytes("/wait"))
        await until(lambda: len(site.requests) == 2)
        for _ in range(3):
            async with connect(address) as late:
                try:
                    await late.send(OK)
                except trio.BrokenResourceError:
                    continue
                assert await late.is_closed()
        site.release.set()
        for wire in (one, two):
            assert (await wire.reply()).body == b"waited"
        async with connect(address) as three:  # there is room again
            assert (await three.get("/ok")).status == 200
    assert reasons(site) == ["too many connections"] * 3 + ["made room"]


async def test_one_address_cannot_take_all_the_room() -> None:
    site = site_for(most_per_address=2)
    async with (
        open_port(site) as address,
        connect(address) as one,
        connect(address) as two,
        connected(site.server) as unix,
    ):
        for wire in (one, two, unix):
            assert (await wire.get("/ok")).status == 200
        async with connect(address) as late:
            assert await late.is_closed()
        for wire in (one, two):  # they stay, unlike where the whole server is full
            assert (await wire.get("/ok")).status == 200
        async with connected(site.server) as other:  # unix sockets have no address
            assert (await other.get("/ok")).status == 200
        await _close(one)
        await until(lambda: len(site.server._open) == 2)
        async with connect(address) as again:
            assert (await again.get("/ok")).status == 200
    assert reasons(site) == ["too many connections of an address"]
    assert not site.server._per_address  # nothing is kept of those who went


@pytest.mark.parametrize("limit", ["max_handshakes", "max_handshakes_per_address"])
async def test_handshakes_that_stall_end_for_those_that_come(
    site: Site, certs: Certs, limit: str
) -> None:
    """The oldest goes, counted by itself: a good client is through in milliseconds."""
    results: list[str] = []
    limits: dict[str, Any] = {limit: 3}
    site.server = HttpServer(
        site.handle, observe=site.note, observe_handshake=results.append, **limits
    )
    async with open_port(site, server_context(certs)) as address, AsyncExitStack() as stack:
        stalling = [await stack.enter_async_context(connect(address)) for _ in range(8)]
        for wire in stalling[::2]:
            with contextlib.suppress(trio.BrokenResourceError):
                await wire.send(b"\x16\x03\x01\x02")
        await until(lambda: results.count("crowded_out") == 5)
        for _ in range(4):
            async with connect(address, certs.client()) as good:
                assert (await good.get("/ok")).status == 200
        assert results.count("ok") == 4
        assert not set(results) - {"ok", "crowded_out"}
        for wire in stalling[:5]:
            assert await wire.is_closed()
    await until(lambda: not site.server._open)
    assert not site.server._shaking
    assert not site.server._shaking_of


async def test_who_the_client_is(site: Site, certs: Certs) -> None:
    """What identities are made of: the verified certificate, or the uid behind a unix socket."""
    async with pair(site) as wire:
        await wire.get("/ok")
    context = server_context(certs)
    context.load_verify_locations(cafile=certs.ca_file)
    context.verify_mode = ssl.CERT_OPTIONAL
    async with open_port(site, context) as address:
        for with_cert in (True, False):
            async with connect(address, certs.client(with_cert=with_cert)) as wire:
                await wire.get("/ok")
    async with open_port(site) as address, connect(address) as wire:
        await wire.get("/ok")
    unix, known, unknown, plain = (request.peer for request in site.requests)
    assert (unix.uid, unix.certificate) == (os.getuid(), None)
    pem = ssl.PEM_cert_to_DER_cert(certs.client_cert.read_text())
    assert (known.uid, known.certificate) == (None, pem)
    assert (unknown.uid, unknown.certificate) == (None, None)
    assert (plain.uid, plain.certificate) == (None, None)


async def test_finish_closes_who_is_idle_and_answers_who_waits(site: Site) -> None:
    async with open_port(site) as address, connect(address) as idle, connect(address) as silent:
        await idle.get("/ok")
        async with connect(address) as busy, trio.open_nursery() as nursery:
            await busy.send(get_bytes("/wait"))
            await until(lambda: len(site.requests) == 2 and len(site.server._open) == 3)
            done = trio.Event()

            async def finish() -> None:
                await site.server.finish()
                done.set()

            nursery.start_soon(finish)
            assert await idle.is_closed()
            assert await silent.is_closed()
            assert not done.is_set()
            site.release.set()
            reply = await busy.reply()
            assert (reply.status, reply.body) == (200, b"waited")
            assert reply.closes
            assert await busy.is_closed()
            with trio.fail_after(LIMIT_S):
                await done.wait()


async def test_finish_while_an_answer_is_on_its_way(site: Site) -> None:
    """It was composed before the end was known, comes whole, and nothing follows it."""
    with trio.fail_after(LIMIT_S):
        async with pair(site) as wire, trio.open_nursery() as nursery:
            await wire.send(get_bytes("/big") + OK)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(site.server.finish)
            await trio.testing.wait_all_tasks_blocked()
            reply = await wire.reply()
            assert len(reply.body) == BIG
            assert await wire.is_closed()
            await wire.stream.aclose()
    assert [r.path for r in site.requests] == ["/big"]


async def test_finish_does_not_answer_what_was_pipelined(site: Site) -> None:
    async with pair(site) as wire, trio.open_nursery() as nursery:
        await wire.send(get_bytes("/wait") + OK)
        await site.entered.wait()
        nursery.start_soon(site.server.finish)
        await trio.testing.wait_all_tasks_blocked()
        site.release.set()
        assert (await wire.reply()).closes
        assert await wire.is_closed()
    assert [r.path for r in site.requests] == ["/wait"]


async def test_after_finish_nobody_is_served(site: Site) -> None:
    async with open_port(site) as address:
        with trio.fail_after(LIMIT_S):
            await site.server.finish()
        async with connect(address) as wire:
            await wire.send(OK)
            assert await wire.is_closed()
    assert site.requests == []


async def test_finish_lets_a_half_request_come_whole(site: Site) -> None:
    async with pair(site) as wire, trio.open_nursery() as nursery:
        await wire.send(OK[:20])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(site.server.finish)
        await trio.testing.wait_all_tasks_blocked()
        await wire.send(OK[20:])
        reply = await wire.reply()
        assert (reply.status, reply.closes) == (200, True)
        assert await wire.is_closed()
