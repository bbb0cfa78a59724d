"""The agents' server on real sockets: TLS, requests of all kinds, clients that are slow or many."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import make_certs

from provider_proxy.common.streams import SocketStream
from provider_proxy.errors import HostError
from provider_proxy.tenant.bridge.keys import BridgeKeys, make_keys, parse_keys
from provider_proxy.tenant.watch import http_server
from provider_proxy.tenant.watch.http_server import Answer, Asked, TenantHttpServer, listen

GET = b"GET /x?a=b HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.fixture(scope="module")
def keys() -> BridgeKeys:
    return parse_keys(make_keys("127.0.0.1"), Path("keys.pem"))


class Served:
    """A server on loopback; `asked` is what came."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answer: Callable[[Asked], Awaitable[Answer]] = self.plain
        self.port = 0

    async def plain(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        await trio.lowlevel.checkpoint()
        return Answer(status=200, body=b'{"a":1}')

    async def serve(self, nursery: trio.Nursery, context: ssl.SSLContext | None = None) -> None:
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]

        async def answer(asked: Asked) -> Answer:
            return await self.answer(asked)

        nursery.start_soon(TenantHttpServer(answer, context).serve, listener)

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)


async def received(stream: trio.SocketStream | SocketStream) -> bytes:
    data = b""
    with trio.fail_after(20):
        while part := await stream.receive_some(65536):
            data += bytes(part)
    return data


@pytest.fixture
async def served(nursery: trio.Nursery) -> Served:
    made = Served()
    await made.serve(nursery)
    return made


async def test_requests_one_after_the_other(served: Served) -> None:
    async with await served.connect() as stream:
        for _ in range(2):
            await stream.send_all(GET)
            assert b'{"a":1}' in bytes(await stream.receive_some(4096))
    assert [asked.target for asked in served.asked] == ["/x?a=b"] * 2


async def test_a_body_is_read(served: Served) -> None:
    async with await served.connect() as stream:
        await stream.send_all(
            b"POST /y HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
        )
        assert (await received(stream)).startswith(b"HTTP/1.1 200")
    assert (served.asked[0].method, served.asked[0].body) == ("POST", b"abc")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"no http at all\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", b"431"),
        (
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3000000\r\n\r\n" + b"z" * 3_000_000,
            b"413",
        ),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
    ],
)
async def test_what_is_no_request_is_refused(served: Served, sent: bytes, status: bytes) -> None:
    async with await served.connect() as stream:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(sent)  # it may be refused before its end

            nursery.start_soon(send)
            try:
                said = await received(stream)
            except trio.BrokenResourceError:
                said = b""
        # With much unread, the system may reset the connection before our last words are read.
        assert said.startswith(b"HTTP/1.1 " + status) or (len(sent) > 10_000 and said == b"")
    assert served.asked == []


async def test_a_bug_ends_one_connection(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(asked: Asked) -> Answer:
        raise ValueError("a bug")

    served.answer = broken
    async with await served.connect() as stream:
        await stream.send_all(GET)
        assert await received(stream) == b""
    assert "unexpected error" in caplog.text
    served.answer = served.plain
    async with await served.connect() as stream:
        await stream.send_all(GET)
        assert b"200" in bytes(await stream.receive_some(4096))


@pytest.mark.parametrize("sent", [b"", b"GET /x HT", GET])
async def test_a_verifier_that_goes_away_in_the_middle(
    served: Served, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    """Before its request, in it, and before the answer, which is longer than the kernel takes."""
    came, gone = trio.Event(), trio.Event()

    async def large(asked: Asked) -> Answer:
        came.set()
        await gone.wait()
        return Answer(status=200, body=bytes(8 * 1024 * 1024))

    served.answer = large
    stream = await served.connect()
    if sent:
        await stream.send_all(sent)
    if sent == GET:
        await came.wait()
    await stream.aclose()
    gone.set()
    served.answer = served.plain
    async with await served.connect() as stream:
        await stream.send_all(GET)
        assert b"200" in bytes(await stream.receive_some(4096))
    assert "unexpected" not in caplog.text


async def test_those_who_send_nothing_give_way(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_OPEN", 3)
    idle = [await served.connect() for _ in range(3)]
    await idle[0].send_all(b"GET ")
    await trio.testing.wait_all_tasks_blocked(0.05)
    async with await served.connect() as stream:
        await stream.send_all(GET)
        assert b"200" in bytes(await stream.receive_some(4096))
    assert await received(idle[0]) == b""  # the oldest
    for each in idle:
        await each.aclose()


async def test_those_who_wait_for_an_answer_do_not(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_OPEN", 2)
    go = trio.Event()

    async def slow(asked: Asked) -> Answer:
        await go.wait()
        return await served.plain(asked)

    served.answer = slow
    busy = [await served.connect() for _ in range(2)]
    for each in busy:
        await each.send_all(GET)
    await trio.testing.wait_all_tasks_blocked(0.05)
    async with await served.connect() as stream:
        with trio.fail_after(20):
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some(10) == b""
    go.set()
    for each in busy:
        assert b"200" in bytes(await each.receive_some(4096))
        await each.aclose()


async def test_a_client_needs_a_certificate_of_the_tenant_s_ca(
    nursery: trio.Nursery, keys: BridgeKeys, tmp_path: Path
) -> None:
    certs = make_certs(tmp_path)
    served = Served()
    await served.serve(nursery, keys.server_context(Path(certs.ca_file)))

    def context(*, own: bool) -> ssl.SSLContext:
        made = ssl.create_default_context(cadata=keys.tls_cert)
        made.check_hostname = False  # as Keylime, which pins the certificate
        if own:
            made.load_cert_chain(certs.client_cert, certs.client_key)
        return made

    async def ask(made: ssl.SSLContext) -> bytes:
        sock = socket.create_connection(("127.0.0.1", served.port))
        stream = SocketStream(sock, made, server_name="x")
        try:
            await stream.do_handshake()
            await stream.send_all(GET)
            return bytes(await stream.receive_some(4096))
        except trio.BrokenResourceError:
            return b""
        finally:
            await trio.aclose_forcefully(stream)

    assert b"200" in await ask(context(own=True))
    assert await ask(context(own=False)) == b""
    assert len(served.asked) == 1


def test_a_ca_that_cannot_be_read_is_named(keys: BridgeKeys, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="client_ca"):
        keys.server_context(tmp_path / "none.pem")
