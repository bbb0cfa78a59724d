"""What answers to our HTTP clients may not do: be endless, compressed, in crumbs; lead elsewhere."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator, Callable
from functools import partial

import httpx
import pytest
import trio

from provider_proxy.common.http import (
    LEAST_PIECE_BYTES,
    MAX_FEW_PIECES,
    http_client,
    in_crumbs,
    no_answer,
    read_body,
)
from provider_proxy.errors import ReplyError

LIMIT = 64 * 1024
URL = "http://registrar.test/"


class Pieces(httpx.AsyncByteStream):
    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size
        self.given = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.given < self._count:
            self.given += 1
            await trio.lowlevel.checkpoint()
            yield b"x" * self._size


async def fetch(http: httpx.AsyncClient, url: str = URL) -> bytes:
    with no_answer("the registrar"):
        async with http.stream("GET", url) as response:
            return await read_body(response, LIMIT, "the registrar")


def client_of(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return http_client(None, read_limit_s=5.0, transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(
    ("count", "size", "problem"),
    [
        (10**6, 1, "in too many pieces"),
        (MAX_FEW_PIECES + 200, LEAST_PIECE_BYTES // 8, "in too many pieces"),
        (10**6, 10_000, f"larger than {LIMIT} bytes"),
    ],
)
async def test_an_answer_without_end_is_left(count: int, size: int, problem: str) -> None:
    pieces = Pieces(count, size)
    async with client_of(lambda _: httpx.Response(200, stream=pieces)) as http:
        with pytest.raises(ReplyError, match=problem):
            await fetch(http)
    assert pieces.given < 2 * MAX_FEW_PIECES


@pytest.mark.parametrize(
    ("count", "size"), [(MAX_FEW_PIECES, 1), (250, LEAST_PIECE_BYTES), (1, LIMIT)]
)
async def test_an_answer_may_come_in_some_pieces(count: int, size: int) -> None:
    async with client_of(lambda _: httpx.Response(200, stream=Pieces(count, size))) as http:
        assert len(await fetch(http)) == count * size


def test_crumbs_are_a_matter_of_the_average() -> None:
    assert not in_crumbs(MAX_FEW_PIECES, 0)
    assert in_crumbs(MAX_FEW_PIECES + 1, 0)
    assert not in_crumbs(48_000, 12 << 20)  # 256 bytes each
    assert in_crumbs(100_000, 12 << 20)


async def test_a_compressed_answer_is_refused_before_it_is_unpacked() -> None:
    bomb = gzip.compress(bytes(50 << 20))
    headers = {"Content-Encoding": "gzip"}
    async with client_of(lambda _: httpx.Response(200, content=bomb, headers=headers)) as http:
        with pytest.raises(ReplyError, match="compressed"):
            await fetch(http)


async def test_nothing_leads_elsewhere_and_nothing_is_kept() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        headers = {"Location": "http://metadata.test/secret", "Set-Cookie": "a=" + "b" * 4000}
        return httpx.Response(302, headers=headers)

    async with client_of(answer) as http:
        await fetch(http)
        await fetch(http)
    assert [str(request.url) for request in asked] == [URL, URL]
    assert all("cookie" not in request.headers for request in asked)


# --- over a socket ------------------------------------------------------------------------------------


async def pour(first: bytes, again: bytes, stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)
    try:
        await stream.send_all(first)
        while True:
            await stream.send_all(again)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


OK = b"HTTP/1.1 200 X\r\n"
POURED = {
    "interim answers": (b"", b"HTTP/1.1 102 X\r\n\r\n" * 1000, "gave no answer"),
    "a head": (OK, b"X-A: b\r\n" * 1000, "gave no answer"),
    "a header": (OK + b"X-A: ", b"b" * 10_000, "gave no answer"),
    "a status line": (b"HTTP/1.1 200 ", b"X" * 10_000, "gave no answer"),
    "crumbs": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 1000, "too many pieces"),
    "a chunk's size": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 10_000, "gave no answer"),
    "a body": (OK + b"\r\n", b"x" * 10_000, f"larger than {LIMIT}"),
}


@pytest.mark.parametrize("name", POURED)
async def test_whatever_is_poured_out_ends(name: str) -> None:
    first, again, problem = POURED[name]
    async with trio.open_nursery() as nursery:
        handler = partial(pour, first, again)
        (listener,) = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        async with http_client(None, read_limit_s=30.0) as http:
            with trio.fail_after(30), pytest.raises(ReplyError, match=problem):
                await fetch(http, f"http://127.0.0.1:{port}/")
        nursery.cancel_scope.cancel()
