"""What the daemon listens on: TCP, IPv6, unix sockets, TLS, and everything that is refused."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from helpers import LIMIT_S, Certs, connect, free_port, get_bytes, listening_socket, make_certs

from provider_proxy.errors import ConfigError, HostError
from provider_proxy.host.config.tables import Listen
from provider_proxy.host.http.listeners import (
    Listener,
    adopt_listeners,
    close_all,
    describe,
    open_listeners,
    remove_unix_sockets,
    tls_context,
)
from provider_proxy.host.http.messages import Request, Response
from provider_proxy.host.http.server import HttpServer

KEY = "listen.address"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    return make_certs(tmp_path_factory.mktemp("certs"))


def listen_with(certs: Certs, *, client_ca: bool = False) -> Listen:
    return Listen(
        tls_cert=certs.cert, tls_key=certs.key, client_ca=certs.ca_file if client_ca else None
    )


@asynccontextmanager
async def served(listeners: list[Listener]) -> AsyncIterator[list[str]]:
    """Serve a small site on some listeners; gives their addresses."""

    async def handle(request: Request) -> Response:
        return Response(body=(request.path.encode(),))

    server = HttpServer(handle, observe=lambda status, reason: None)

    names = describe(listeners)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(listener.serve, server.serve)
        yield names
        nursery.cancel_scope.cancel()
    close_all(listeners)
    remove_unix_sockets(names)


async def is_served(address: str, context: ssl.SSLContext | None = None) -> bool:
    async with connect(address, context) as wire:
        return (await wire.get("/x")).body == b"/x"


# --- TCP and unix -----------------------------------------------------------------------------------


async def test_each_kind_of_address(tmp_path: Path) -> None:
    unix = f"unix:{tmp_path / 'door'}"
    async with served(open_listeners(KEY, ["127.0.0.1:0", "[::1]:0", unix], None)) as names:
        assert names[0].startswith("127.0.0.1:")
        assert names[1].startswith("[::1]:")
        assert names[2] == unix
        assert not any(name.endswith(":0") for name in names)
        for name in names:
            assert await is_served(name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("inherited", [False, True])
async def test_what_is_accepted_waits_for_no_acknowledgement(inherited: bool) -> None:
    """A client without TCP_NODELAY delays its acknowledgements, and our small writes must not wait."""
    if inherited:
        (listener,) = adopt_listeners([socket.create_server(("127.0.0.1", 0))], None)
    else:
        (listener,) = open_listeners(KEY, ["127.0.0.1:0"], None)
    async with listener:
        with socket.create_connection(listener.socket.getsockname()) as client:
            stream = await listener.accept()
            async with stream:
                assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                assert stream.peer() == client.getsockname()


async def test_localhost_is_all_that_it_stands_for() -> None:
    families = {found[0] for found in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    async with served(open_listeners(KEY, ["localhost:0"], None)) as names:
        assert len(names) == len(families)
        for name in names:
            assert await is_served(name)


async def test_ipv6_leaves_ipv4_to_others() -> None:
    """[::] and 0.0.0.0 on one port: neither takes the other's place."""
    port = free_port()  # one that the kernel chose for [::] may be in use on 0.0.0.0
    async with served(open_listeners(KEY, [f"[::]:{port}"], None)):
        async with served(open_listeners(KEY, [f"0.0.0.0:{port}"], None)):
            assert await is_served(f"127.0.0.1:{port}")
            assert await is_served(f"[::1]:{port}")


async def test_a_taken_port_is_named() -> None:
    with listening_socket() as (_, port), pytest.raises(HostError) as caught:
        open_listeners(KEY, ["127.0.0.1:0", f"127.0.0.1:{port}"], None)
    assert str(caught.value).startswith(f"{KEY}: cannot listen on 127.0.0.1:{port}: ")
    assert "in use" in str(caught.value)


@pytest.mark.parametrize("address", ["192.0.2.1:0", "[2001:db8::1]:0", "no-such-host.invalid:0"])
def test_an_address_that_is_not_ours(address: str) -> None:
    with pytest.raises(HostError, match=r"cannot listen on"):
        open_listeners(KEY, [address], None)


async def test_what_fails_halfway_leaves_nothing_behind(tmp_path: Path) -> None:
    unix = f"unix:{tmp_path / 'door'}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    with listening_socket() as (_, port), pytest.raises(HostError):
        open_listeners(KEY, [free, unix, f"127.0.0.1:{port}"], None)
    assert os.listdir(tmp_path) == []
    close_all(open_listeners(KEY, [free], None))  # not held any more


async def test_a_port_can_be_taken_again_at_once() -> None:
    """After a restart connections of the old process linger in TIME_WAIT."""
    async with (
        served(open_listeners(KEY, ["127.0.0.1:0"], None)) as (name,),
        connect(name) as wire,
    ):
        await wire.send(b"GET /x HTTP/1.0\r\n\r\n")  # the server closes first
        await wire.reply()
        assert await wire.is_closed()
    async with served(open_listeners(KEY, [name], None)):
        assert await is_served(name)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
async def test_the_mode_of_a_unix_socket(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "server"
    before = os.umask(umask)
    try:
        listeners = open_listeners(KEY, [f"unix:{path}"], None)
    finally:
        os.umask(before)
    async with served(listeners):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660


async def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
        stale.listen()
    async with served(open_listeners(KEY, [f"unix:{path}"], None)) as (name,):
        assert await is_served(name)


async def test_a_live_unix_socket_is_refused(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'door'}"
    async with served(open_listeners(KEY, [address], None)) as (name,):
        with pytest.raises(HostError) as caught:
            open_listeners(KEY, [address], None)
        assert str(caught.value).startswith(f"{KEY}: cannot listen on {address}: ")
        assert await is_served(name)  # and goes on


def test_a_file_in_place_of_a_unix_socket_is_left(tmp_path: Path) -> None:
    path = tmp_path / "server"
    path.write_bytes(b"precious")
    with pytest.raises(HostError, match=r"cannot listen on unix:"):
        open_listeners(KEY, [f"unix:{path}"], None)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["none/server", "x" * 120])
def test_a_path_that_cannot_be_bound(tmp_path: Path, name: str) -> None:
    with pytest.raises(HostError, match=r"cannot listen on unix:"):
        open_listeners(KEY, [f"unix:{tmp_path / name}"], None)


async def test_closing_and_removing_twice_is_fine(tmp_path: Path) -> None:
    listeners = open_listeners(KEY, [f"unix:{tmp_path / 'door'}", "127.0.0.1:0"], None)
    names = describe(listeners)
    for _ in range(2):
        close_all(listeners)
        remove_unix_sockets(names)
    assert os.listdir(tmp_path) == []


# --- inherited --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_plaintext_is_local_on_inherited_sockets_too(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as sock,
        pytest.raises(ConfigError, match=r"listen\.insecure_plaintext .*loopback"),
    ):
        adopt_listeners([sock], None)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_inherited_loopback_sockets(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family)
    async with served(adopt_listeners([sock], None)) as (name,):
        assert await is_served(name)


async def test_an_inherited_socket_for_everybody_has_tls(certs: Certs) -> None:
    sock = socket.create_server(("0.0.0.0", 0))
    context = tls_context(listen_with(certs))
    async with served(adopt_listeners([sock], context)) as (name,):
        assert name.startswith("0.0.0.0:")
        assert await is_served(f"127.0.0.1:{name.rpartition(':')[2]}", certs.client())


async def test_unix_sockets_are_plain_even_beside_tls(tmp_path: Path, certs: Certs) -> None:
    context = tls_context(listen_with(certs))
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "theirs"))
    sock.listen()
    async with served(adopt_listeners([sock], context)) as (name,):
        assert await is_served(name)
    async with served(open_listeners(KEY, [f"unix:{tmp_path / 'ours'}"], context)) as (name,):
        assert await is_served(name)


def test_what_does_not_listen_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ConfigError, match="Accept=no"):
        adopt_listeners([theirs], None)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram,
        pytest.raises(ConfigError, match="SOCK_DGRAM, which the daemon cannot use"),
    ):
        adopt_listeners([datagram], None)


# --- TLS --------------------------------------------------------------------------------------------


def test_no_files_no_context() -> None:
    assert tls_context(Listen(insecure_plaintext=True)) is None


async def test_tls_without_client_certificates(certs: Certs) -> None:
    context = tls_context(listen_with(certs))
    async with served(open_listeners(KEY, ["127.0.0.1:0", "[::1]:0"], context)) as names:
        for name in names:
            assert await is_served(name, certs.client())
            assert await is_served(name, certs.client(with_cert=True))


async def test_a_client_certificate_is_demanded(certs: Certs) -> None:
    context = tls_context(listen_with(certs, client_ca=True))
    async with served(open_listeners(KEY, ["127.0.0.1:0"], context)) as (name,):
        assert await is_served(name, certs.client(with_cert=True))
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            client = certs.client()
            client.minimum_version = client.maximum_version = version
            await refused(name, client)
            client.load_cert_chain(certs.client_cert, certs.client_key)
            assert await is_served(name, client)


async def test_a_certificate_of_another_ca_is_refused(certs: Certs, tmp_path: Path) -> None:
    stranger = make_certs(tmp_path)
    context = tls_context(listen_with(certs, client_ca=True))
    async with served(open_listeners(KEY, ["127.0.0.1:0"], context)) as (name,):
        client = certs.client()
        client.load_cert_chain(stranger.client_cert, stranger.client_key)
        await refused(name, client)


async def refused(address: str, client: ssl.SSLContext) -> None:
    """Not one byte of a response comes back."""
    async with connect(address, client) as wire:
        try:
            await wire.send(get_bytes("/x"))
            answer = await wire.rest()
        except trio.BrokenResourceError:
            answer = b""
        assert answer == b""


async def test_system_cas_vouch_for_no_tenant(certs: Certs) -> None:
    """Only `client_ca` does; the context trusts nothing by default."""
    context = tls_context(listen_with(certs, client_ca=True))
    assert context is not None
    assert [c["subject"] for c in context.get_ca_certs()] == [
        c["subject"] for c in certs.client().get_ca_certs()
    ]
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_old_tls_is_refused(certs: Certs) -> None:
    context = tls_context(listen_with(certs))
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_connection_gets_one_ticket(certs: Certs) -> None:
    """None would end resumption; each costs a tenth of a connection."""
    context = tls_context(listen_with(certs))
    assert context is not None
    assert context.num_tickets == 1


async def test_http_1_1_is_negotiated(certs: Certs) -> None:
    """A client that also speaks HTTP/2 learns that we do not."""
    context = tls_context(listen_with(certs))
    client = certs.client()
    client.set_alpn_protocols(["h2", "http/1.1"])
    async with (
        served(open_listeners(KEY, ["127.0.0.1:0"], context)) as (name,),
        connect(name, client) as wire,
    ):
        assert (await wire.get("/x")).status == 200
        assert isinstance(wire.stream, trio.SSLStream)
        assert wire.stream.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o644, 0o664])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    certs = make_certs(tmp_path)
    certs.key.chmod(mode)
    with pytest.raises(HostError) as caught:
        tls_context(listen_with(certs))
    words = f"listen.tls_key: {certs.key} must not be readable by others: chmod 06"
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_key_for_its_owner_is_fine(tmp_path: Path, mode: int) -> None:
    certs = make_certs(tmp_path)
    certs.key.chmod(mode)
    assert tls_context(listen_with(certs)) is not None


@pytest.mark.parametrize("which", ["cert", "key", "ca_file"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "directory"])
def test_files_that_are_none(tmp_path: Path, which: str, damage: str) -> None:
    certs = make_certs(tmp_path)
    path: Path = getattr(certs, which)
    path.unlink()
    if damage == "garbage":
        path.write_text("this is no PEM")
        path.chmod(0o600)
    elif damage == "directory":
        path.mkdir(mode=0o700)
    with pytest.raises(HostError) as caught:
        tls_context(listen_with(certs, client_ca=True))
    names = {"cert": "listen.tls_cert", "key": "listen.tls_key", "ca_file": "listen.client_ca"}
    assert names[which] in str(caught.value)


def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(str(certs.key))
    with pytest.raises(HostError, match="is not the key of the certificate"):
        tls_context(listen_with(certs))


def test_an_encrypted_key_asks_nobody(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    key = load_pem_private_key(certs.key.read_bytes(), None)
    certs.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    )
    caught: list[Exception] = []

    def load() -> None:
        try:
            tls_context(listen_with(certs))
        except Exception as exc:  # noqa: BLE001  # judged below
            caught.append(exc)

    thread = threading.Thread(target=load, daemon=True)  # a prompt would wait for ever
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert isinstance(caught[0], HostError)
    assert "encrypted" in str(caught[0])
