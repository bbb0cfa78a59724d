"""The stream under the server: trio's own tests of a stream, over plain sockets and over TLS, and what
only TLS has. Real sockets; the client is `trio.SSLStream` or the ssl module's."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from helpers import LIMIT_S, Certs, make_certs

from provider_proxy.common.streams import SocketStream

SMALL_BUFFER = 8 * 1024
CLOG = bytes(256 * 1024)  # more than the buffers of both ends hold


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    return make_certs(tmp_path_factory.mktemp("certs"))


def server_context(certs: Certs, *, demand: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs.cert, certs.key)
    if demand:
        context.load_verify_locations(certs.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection whose buffers are small, so that it clogs soon."""
    pair = socket.socketpair()
    for sock in pair:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SMALL_BUFFER)
    return pair


def plain_client(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def plain_pair() -> tuple[SocketStream, trio.abc.Stream]:
    ours, theirs = sockets()
    return SocketStream(ours), plain_client(theirs)


@asynccontextmanager
async def handshake(
    certs: Certs, client: ssl.SSLContext | None = None, server: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[SocketStream, trio.SSLStream[trio.SocketStream]]]:
    """A server's stream of ours and a client of trio's, after the handshake."""
    ours, theirs = await tls_pair(certs, client, server)
    try:
        yield ours, theirs
    finally:
        for stream in (ours, theirs):
            await trio.aclose_forcefully(stream)


async def tls_pair(
    certs: Certs, client: ssl.SSLContext | None = None, server: ssl.SSLContext | None = None
) -> tuple[SocketStream, trio.SSLStream[trio.SocketStream]]:
    ours, theirs = sockets()
    stream = SocketStream(ours, server or server_context(certs))
    client = client or certs.client()
    client.options &= (
        ~ssl.OP_IGNORE_UNEXPECTED_EOF
    )  # some builds of Python set it: a cut stays unseen
    other = trio.SSLStream(
        plain_client(theirs),
        client,
        server_hostname="localhost",
        https_compatible=True,
    )
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.do_handshake)
            nursery.start_soon(other.do_handshake)
    return stream, other


def version(number: ssl.TLSVersion, context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = number
    return context


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


async def read_to_the_end(stream: trio.abc.ReceiveStream) -> None:
    while await stream.receive_some():
        pass


async def clogged(stream: trio.abc.SendStream) -> None:
    """Send until the other end's buffers are full; a whole record is on its way where it is TLS."""
    with trio.move_on_after(0.2):
        await stream.send_all(CLOG)
        raise AssertionError("the buffers are larger than the test believes")


# --- trio's own tests -------------------------------------------------------------------------------


async def test_a_plain_stream_is_a_trio_stream() -> None:
    async def clogged_pair() -> tuple[SocketStream, trio.abc.Stream]:
        ours, theirs = await plain_pair()
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.socket.send(CLOG)
        with trio.move_on_after(0.1):
            await theirs.send_all(CLOG)
        return ours, theirs

    with trio.fail_after(10 * LIMIT_S):
        await trio.testing.check_two_way_stream(plain_pair, clogged_pair)


@pytest.mark.parametrize("number", VERSIONS)
async def test_a_tls_stream_is_a_trio_stream(certs: Certs, number: ssl.TLSVersion) -> None:
    async def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        return await tls_pair(certs, version(number, certs.client()))

    with trio.fail_after(10 * LIMIT_S):
        await trio.testing.check_two_way_stream(pair, None)


async def test_both_ends_of_tls_are_trio_streams(certs: Certs) -> None:
    async def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        ours, theirs = sockets()
        server = SocketStream(ours, server_context(certs))
        client = SocketStream(theirs, certs.client(), server_name="localhost")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.do_handshake)
            nursery.start_soon(client.do_handshake)
        return server, client

    with trio.fail_after(10 * LIMIT_S):
        await trio.testing.check_two_way_stream(pair, None)


@pytest.mark.parametrize("name", ["other.example", "127.0.0.2", ""])
async def test_a_client_checks_the_server_s_name(certs: Certs, name: str) -> None:
    ours, theirs = sockets()
    server = SocketStream(ours, server_context(certs))
    client = SocketStream(theirs, certs.client(), server_name=name)

    async def shake_hands() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await server.do_handshake()

    async with server, client, trio.open_nursery() as nursery:
        nursery.start_soon(shake_hands)
        with trio.fail_after(LIMIT_S), pytest.raises(trio.BrokenResourceError) as caught:
            await client.do_handshake()
        nursery.cancel_scope.cancel()
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError | ValueError)


# --- the handshake ----------------------------------------------------------------------------------


async def test_nothing_is_read_or_sent_in_the_clear(certs: Certs) -> None:
    """A stream that is to be TLS and has had no handshake, or one that failed, is of no use."""
    ours, theirs = sockets()
    stream = SocketStream(ours, server_context(certs))
    theirs.send(b"GET / HTTP/1.1\r\n\r\n")

    async def refuses() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"secret")

    await refuses()
    with pytest.raises(trio.BrokenResourceError) as caught:
        await stream.do_handshake()
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    await refuses()
    with pytest.raises(trio.BrokenResourceError):
        await stream.do_handshake()  # and it stays so
    await stream.aclose()
    with theirs, contextlib.suppress(ConnectionResetError):
        assert b"secret" not in theirs.recv(4096)  # an alert of TLS's at the most


async def test_a_client_that_is_gone_before_tls_begins(certs: Certs) -> None:
    """`wrap_socket` fails on a connection that was reset, or gives a socket without TLS."""
    async with trio.open_nursery():
        with socket.create_server(("127.0.0.1", 0)) as listening:
            client = socket.create_connection(listening.getsockname())
            accepted, _ = listening.accept()
        client.send(b"\x16\x03\x01")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream = SocketStream(accepted, server_context(certs))
        with trio.fail_after(LIMIT_S):
            await trio.lowlevel.wait_readable(accepted)
            client.close()
            with pytest.raises(trio.BrokenResourceError):
                await stream.do_handshake()
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                await stream.receive_some()
        await stream.aclose()
        assert accepted.fileno() == -1


@pytest.mark.parametrize("failure", [OSError(107, "not connected"), ValueError("bad fd")])
async def test_a_wrap_that_fails_raises(
    certs: Certs, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = sockets()
    number = ours.fileno()

    def fail(self: ssl.SSLContext, sock: socket.socket, **more: object) -> None:
        sock.close()  # as the ssl module does
        raise failure

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", fail)
    stream = SocketStream(ours, server_context(certs))
    theirs.send(b"\x16")
    with pytest.raises(trio.BrokenResourceError) as caught:
        await stream.do_handshake()
    assert caught.value.__cause__ is failure
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()
    await stream.aclose()
    theirs.close()
    assert number >= 0


@pytest.mark.parametrize("way", ["silence", "end", "reset"])
async def test_who_sends_no_byte_costs_no_tls(
    certs: Certs, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(*_args: object, **_more: object) -> None:
        raise AssertionError("OpenSSL was asked")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    ours, theirs = sockets()
    stream = SocketStream(ours, server_context(certs))
    if way == "reset":
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if way != "silence":
        theirs.close()
    with trio.move_on_after(0.1 if way == "silence" else LIMIT_S) as scope:
        with pytest.raises(trio.BrokenResourceError):
            await stream.do_handshake()
    assert scope.cancelled_caught == (way == "silence")
    assert not stream.heard
    await stream.aclose()
    theirs.close()


async def test_a_handshake_that_was_cancelled_may_go_on(certs: Certs) -> None:
    ours, theirs = sockets()
    stream = SocketStream(ours, server_context(certs))
    with trio.move_on_after(0) as scope:
        await stream.do_handshake()
    assert scope.cancelled_caught
    other = trio.SSLStream(plain_client(theirs), certs.client(), server_hostname="localhost")
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.do_handshake)
            nursery.start_soon(other.send_all, b"x")
        assert await stream.receive_some() == b"x"
        await stream.do_handshake()  # once is enough
    await trio.aclose_forcefully(stream)
    await trio.aclose_forcefully(other)


@pytest.mark.parametrize("number", VERSIONS)
async def test_a_session_is_resumed_with_its_certificate(
    certs: Certs, number: ssl.TLSVersion
) -> None:
    """Who a tenant is must survive a resumption, which shows no certificate."""
    server = server_context(certs, demand=True)
    client = version(number, certs.client(with_cert=True))
    pem = ssl.PEM_cert_to_DER_cert(certs.client_cert.read_text())
    sessions: list[ssl.SSLSession | None] = [None]
    reused: list[bool | None] = []

    def connect(theirs: socket.socket) -> None:
        theirs.settimeout(LIMIT_S)
        with client.wrap_socket(theirs, server_hostname="localhost", session=sessions[-1]) as sock:
            assert sock.recv(2) == b"ok"  # TLS 1.3 sends tickets after the handshake
            sessions.append(sock.session)
            reused.append(sock.session_reused)

    for _ in range(2):
        ours, theirs = sockets()
        async with SocketStream(ours, server) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, connect, theirs)
            with trio.fail_after(LIMIT_S):
                await stream.do_handshake()
                assert stream.certificate() == pem
                await stream.send_all(b"ok")
    assert reused == [False, True]


# --- the end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", VERSIONS)
async def test_close_notify_is_sent(certs: Certs, number: ssl.TLSVersion) -> None:
    """A client that insists on it, as those whose framing is the end of the connection must."""
    for close in ("aclose", "end_sending"):
        ours, theirs = await tls_pair(certs, version(number, certs.client()))
        theirs._https_compatible = False
        with trio.fail_after(LIMIT_S):
            await ours.send_all(b"last words")
            await getattr(ours, close)()
            assert await theirs.receive_some() == b"last words"
            assert await theirs.receive_some() == b""  # a cut would raise
        for stream in (ours, theirs):
            await trio.aclose_forcefully(stream)


async def test_closing_does_not_wait_for_the_other_side(certs: Certs) -> None:
    async with handshake(certs) as (ours, _):
        with trio.fail_after(LIMIT_S):
            await ours.aclose()


async def test_closing_forcefully_sends_nothing(certs: Certs) -> None:
    async with handshake(certs) as (ours, theirs):
        theirs._https_compatible = False
        await trio.aclose_forcefully(ours)
        with trio.fail_after(LIMIT_S), pytest.raises(trio.BrokenResourceError):
            await theirs.receive_some()


@pytest.mark.parametrize("polite", [True, False])
async def test_the_end_of_a_client_reads_as_an_end(certs: Certs, polite: bool) -> None:
    """With close_notify or cut: HTTP says what is whole (RFC 9112, section 9.8)."""
    async with handshake(certs) as (ours, theirs):
        await theirs.send_all(b"words")
        if polite:
            await theirs.aclose()
        else:
            await theirs.transport_stream.send_eof()
        with trio.fail_after(LIMIT_S):
            assert await ours.receive_some() == b"words"
            assert await ours.receive_some() == b""


async def test_bytes_that_are_no_tls_break_it(certs: Certs) -> None:
    async with handshake(certs) as (ours, theirs):
        await theirs.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
        with trio.fail_after(LIMIT_S), pytest.raises(trio.BrokenResourceError) as caught:
            await ours.receive_some()
        assert isinstance(caught.value.__cause__, ssl.SSLError)


async def test_what_comes_behind_the_end_is_read_away(certs: Certs) -> None:
    async with handshake(certs) as (ours, theirs):
        with trio.fail_after(LIMIT_S):
            await ours.end_sending()
            with pytest.raises(trio.ClosedResourceError):
                await ours.send_all(b"more")
            await theirs.send_all(b"x" * 1000)
            assert await ours.discard_some()
            await theirs.transport_stream.send_eof()
            while await ours.discard_some():
                pass


# --- half a record ----------------------------------------------------------------------------------


async def test_a_send_that_was_cancelled_is_the_last(certs: Certs) -> None:
    """Half a record was sent: more would be read as its second half."""
    async with handshake(certs) as (ours, theirs):
        theirs._https_compatible = False
        await clogged(ours)
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"more")
        with trio.fail_after(LIMIT_S):
            await ours.aclose()
            with pytest.raises(trio.BrokenResourceError):  # no close_notify either: it was cut
                await read_to_the_end(theirs)


async def test_a_plain_send_that_was_cancelled_is_the_last() -> None:
    ours, theirs = await plain_pair()
    async with ours, theirs:
        await clogged(ours)
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"more")


async def test_a_send_that_was_cancelled_before_it_began_did_no_harm(certs: Certs) -> None:
    async with handshake(certs) as (ours, theirs):
        with trio.move_on_after(0) as scope:
            await ours.send_all(b"never")
        assert scope.cancelled_caught
        with trio.fail_after(LIMIT_S):
            await ours.send_all(b"more")
            assert await theirs.receive_some() == b"more"


@pytest.mark.parametrize("tls", [False, True])
async def test_what_the_system_takes_at_once_and_the_rest(certs: Certs, tls: bool) -> None:
    stream, other = await tls_pair(certs) if tls else await plain_pair()
    data = bytes(range(256)) * (len(CLOG) // 256)
    async with stream, other:
        assert stream.send_now(b"hello") == 5
        with trio.fail_after(LIMIT_S):
            assert await other.receive_some() == b"hello"
            sent = stream.send_now(data)
            assert sent < len(data)
            received = bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data[sent:])
                while len(received) < len(data):
                    received += await other.receive_some()
        assert received == data
        assert stream.send_now(b"more") == 4


async def test_a_message_that_was_cut_ends_without_close_notify(certs: Certs) -> None:
    """What comes behind the first part is lost: the client must not take it for the whole."""
    stream, strict = await tls_pair(certs)
    strict._https_compatible = False  # a client that demands close_notify
    async with stream, strict:
        stream.send_now(CLOG)
        await stream.aclose()
        with trio.fail_after(LIMIT_S), pytest.raises(trio.BrokenResourceError):
            await read_to_the_end(strict)


async def test_nothing_is_sent_at_once_where_nothing_may_be(certs: Certs) -> None:
    ours, theirs = sockets()
    async with SocketStream(ours, server_context(certs)) as no_handshake, plain_client(theirs):
        with pytest.raises(trio.BrokenResourceError):
            no_handshake.send_now(b"x")
    stream, other = await plain_pair()
    async with other, trio.open_nursery() as nursery:
        nursery.start_soon(clogged, stream)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            stream.send_now(b"x")
        await trio.sleep(0.3)
        with pytest.raises(trio.BrokenResourceError):  # half of something was sent
            stream.send_now(b"x")
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            stream.send_now(b"x")


async def test_a_receive_that_was_cancelled_lost_nothing(certs: Certs) -> None:
    async with handshake(certs) as (ours, theirs):
        record = trio.testing.MemorySendStream()
        raw, theirs.transport_stream.send_all = theirs.transport_stream.send_all, record.send_all  # type: ignore[method-assign]
        await theirs.send_all(b"whole")
        data = record.get_data_nowait()
        await raw(data[:7])
        with trio.move_on_after(0.05):
            await ours.receive_some()
        await raw(data[7:])
        with trio.fail_after(LIMIT_S):
            assert await ours.receive_some() == b"whole"


async def test_one_sends_while_another_receives(certs: Certs) -> None:
    """The sender waits for room, the receiver for bytes: neither may wait for the other."""
    async with handshake(certs) as (ours, theirs):
        got = bytearray()

        async def receive() -> None:
            assert await ours.receive_some() == b"meanwhile"
            while len(got) < len(CLOG):
                got.extend(await theirs.receive_some())

        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.send_all, CLOG)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(receive)
                await theirs.send_all(b"meanwhile")
        assert bytes(got) == CLOG


async def test_two_may_wait_for_room(certs: Certs) -> None:
    """OpenSSL may want to write while it reads: when a client asks for new keys, for one."""
    async with handshake(certs) as (ours, theirs):
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.send_all, CLOG)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(ours._until_writable)
                await trio.testing.wait_all_tasks_blocked()
                got = 0
                while got < len(CLOG):
                    got += len(await theirs.receive_some())


# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
async def test_a_stream_is_no_cycle(certs: Certs, tls: bool) -> None:
    """Reference counts alone free it, whichever way it ends."""

    async def live(way: str) -> None:
        ours, theirs = sockets()
        stream = SocketStream(ours, server_context(certs) if tls else None)
        if way == "good":
            await trio.aclose_forcefully(stream)
            stream, other = await tls_pair(certs) if tls else (stream, None)
            if other is not None:
                await stream.send_all(b"x")
                await stream.aclose()
                await trio.aclose_forcefully(other)
                other._handshook = None  # type: ignore[assignment]  # trio's own cycle
        elif way == "garbage":
            theirs.send(b"GET /")
            if tls:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.do_handshake()
        elif way == "cancelled":
            with trio.move_on_after(0):
                await stream.do_handshake()
        await stream.aclose()
        theirs.close()

    def alive() -> int:
        return sum(isinstance(each, SocketStream | ssl.SSLSocket) for each in gc.get_objects())

    for way in ("good", "garbage", "cancelled"):
        await live(way)  # imports and caches
    gc.collect()
    before = alive()
    gc.disable()
    try:
        for way in ("good", "garbage", "cancelled"):
            await live(way)
            assert alive() == before, way
    finally:
        gc.enable()
