"""Nothing of a connection, a request or a batch outlives it: with the garbage collector off, what clients
did leaves no cycle behind. The daemon runs in this process; clients are blocking sockets in a thread."""

from __future__ import annotations

import collections
import contextlib
import gc
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import LIMIT_S, Certs, FakeQuoter, daemon_with, make_certs, until

from provider_proxy.errors import QuoteError
from provider_proxy.host.config.load import load_config

TIMES = 8


class Client:
    """Does one thing `TIMES` times, each over a connection of its own."""

    def __init__(self, certs: Certs, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._where = (host, int(port))
        self._stranger = certs.client()
        self._tenant = certs.client(with_cert=True)

    def connect(self) -> socket.socket:
        return socket.create_connection(self._where, timeout=LIMIT_S)

    def says(self, data: bytes) -> None:
        with self.connect() as sock:
            sock.sendall(data)

    def shakes_hands(self) -> None:
        with contextlib.suppress(OSError), self.connect() as sock:
            with self._stranger.wrap_socket(sock, server_hostname="localhost") as tls:
                tls.recv(1)  # TLS 1.3 tells of the missing certificate after the handshake

    def asks(self, target: str, *headers: str, status: int = 200) -> None:
        request = "\r\n".join((f"GET {target} HTTP/1.1", "Host: localhost", *headers, "", ""))
        with (
            self.connect() as sock,
            self._tenant.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            tls.sendall(request.encode())
            assert tls.recv(4096).startswith(b"HTTP/1.1 %d" % status)

    def leaves(self) -> None:
        with (
            self.connect() as sock,
            self._tenant.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            tls.sendall(f"GET {quote()} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


def quote(mask: str = "0x401", more: str = "") -> str:
    return f"/verifier/quote?nonce={secrets.token_hex(16)}&mask={mask}{more}"


CLOSE = "Connection: close"
WAYS: dict[str, Callable[[Client], None]] = {
    "a probe": lambda client: client.says(b""),
    "half a hello": lambda client: client.says(b"\x16\x03\x01\x02\x00\x01"),
    "no TLS": lambda client: client.says(b"GET / HTTP/1.1\r\n\r\n"),
    "no certificate": lambda client: client.shakes_hands(),
    "version": lambda client: client.asks("/version", CLOSE),
    "kept and dropped": lambda client: client.asks("/version"),
    "no such path": lambda client: client.asks("/nope", CLOSE, status=404),
    "a bad parameter": lambda client: client.asks(quote("0x0"), CLOSE, status=400),
    "a body": lambda client: client.asks("/version", "Content-Length: 5", status=400),
    "identity": lambda client: client.asks("/verifier/identity", CLOSE),
    "a quote": lambda client: client.asks(quote(), CLOSE),
    "in vain": lambda client: client.asks(quote(more="&timeout_ms=1"), CLOSE, status=503),
    "gone before the seal": lambda client: client.leaves(),
}


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def cycles() -> dict[str, int]:
    """What only the collector can free, by kind."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return dict(collections.Counter(type(each).__qualname__ for each in gc.garbage))


@pytest.mark.real
async def test_nothing_outlives_its_connection(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    logs = {name: tmp_path / name for name in ("ima", "uefi")}
    for path in logs.values():
        path.write_bytes(b"")
    config = tmp_path / "config.toml"
    config.write_text(
        f'state_dir = "{tmp_path}"\n[listen]\naddress = "127.0.0.1:0"\n{certs.toml()}'
        f'[tpm]\ntcti = "embedded"\n[logs]\nima = "{logs["ima"]}"\nuefi = "{logs["uefi"]}"\n'
        "[tenant_defaults]\naccept_unlisted = true\nrate = 1000.0\nburst = 1000\n"
        "pcr_allow = [0, 1, 10]\n"
    )
    quoter = FakeQuoter()
    left: dict[str, dict[str, int]] = {}

    async def check(name: str, way: Callable[[Client], None], client: Client) -> None:
        def times() -> None:
            for _ in range(TIMES):
                way(client)

        await trio.to_thread.run_sync(times)  # imports and caches
        await until_quiet()
        with no_collector():
            await trio.to_thread.run_sync(times)
            await until_quiet()
            left[name] = cycles()

    async with daemon_with(quoter, load_config(config, environ={})) as started:
        client = Client(certs, started.addresses[0])

        async def until_quiet() -> None:
            """Nothing is left to do but to wait for clients and clocks."""
            await until(lambda: tasks() <= quiet, "the end of all connections")
            await trio.testing.wait_all_tasks_blocked(0.01)

        quiet = tasks()
        for name, way in WAYS.items():
            await check(name, way, client)
        quoter.error = QuoteError("no chip")
        refused = quote()
        await check("no quote", lambda client: client.asks(refused, CLOSE, status=503), client)
    assert {name: kinds for name, kinds in left.items() if kinds} == {}


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living
