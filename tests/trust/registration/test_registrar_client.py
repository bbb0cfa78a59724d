"""The client of a registrar over real sockets: hostile servers, and TLS files that cannot be used."""

from __future__ import annotations

import gc
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from helpers import LIMIT_S, make_certs

from provider_proxy.common.failures import SHOWN_CHARS, printable
from provider_proxy.errors import HostError, RegistrarError
from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.trust.registration import client
from provider_proxy.trust.registration.client import (
    RegistrarClient,
    http_client,
    tls_context,
)

pytestmark = pytest.mark.real

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def server(first: bytes, more: bytes = b"") -> AsyncIterator[str]:
    """Answers each connection with some bytes, then with the same ones again and again."""

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await stream.receive_some(4096)
            await stream.send_all(first)
            while more:
                await trio.sleep(0.001)
                await stream.send_all(more)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


BIG = HEAD + b"Content-Length: 1000000000\r\n\r\n"
CHUNK = b"8000\r\n" + b" " * 0x8000 + b"\r\n"


@pytest.mark.parametrize(
    ("first", "more", "message"),
    [
        (b"", b"", "no answer"),
        (b"\x16\x03\x01 this is no HTTP\r\n\r\n", b"", "no answer"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", "no answer"),  # headers without end
        (BIG, b" " * 65536, "larger than"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK, "larger than"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"", "no answer"),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n123456789", b"", "compressed"),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b" ", "no answer within"),  # a trickle
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", b"", "answered 302"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://xn--/\r\n\r\n", b"", "no answer"),
        (b"HTTP/1.1 302 Found\r\nLocation: mailto:x\r\n\r\n", b"", "no answer"),
    ],
)
async def test_a_hostile_registrar_costs_little_and_gives_nothing(
    monkeypatch: pytest.MonkeyPatch, first: bytes, more: bytes, message: str
) -> None:
    monkeypatch.setattr(client, "CALL_LIMIT_S", 0.5)
    async with server(first, more) as url, http_client(None) as http:
        with trio.fail_after(LIMIT_S), pytest.raises(RegistrarError, match=message):
            await RegistrarClient(http, url, "x").negotiate()
    gc.collect()  # nothing was left to the garbage collector: trio would warn


async def test_a_registrars_cookies_are_neither_kept_nor_sent_back() -> None:
    """One that is not ASCII would make httpx raise; many would grow for as long as the daemon runs."""
    good = b'{"results": {"supported_versions": ["2.6"]}}'
    head = HEAD + b"Set-Cookie: a=\xe9\r\nSet-Cookie: b=c\r\nContent-Length: %d\r\n\r\n" % len(good)
    async with server(head + good) as url, http_client(None) as http:
        with trio.fail_after(LIMIT_S):
            for _ in range(3):
                assert await RegistrarClient(http, url, "x").negotiate() == "2.6"
        assert not http.cookies


async def test_the_environments_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    body = b'{"results": {"supported_versions": ["2.6"]}}'
    answer = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with server(answer) as url, http_client(None) as http:
        assert await RegistrarClient(http, url, "x").negotiate() == "2.6"


def test_foreign_text_is_one_short_line() -> None:
    assert printable("a\x1b[31m\nb\u202e") == "a?[31m?b?"
    assert len(printable("x" * 10_000)) == SHOWN_CHARS


# --- TLS files ----------------------------------------------------------------------------------------


def test_tls_files_that_cannot_be_used(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    nowhere = tmp_path / "none"
    empty = tmp_path / "empty"
    empty.touch()
    open_key = tmp_path / "open.pem"
    open_key.write_bytes(certs.client_key.read_bytes())
    open_key.chmod(0o644)
    locked = tmp_path / "locked.pem"
    locked.touch(0o600)
    locked.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")
        )
    )
    cert, key = certs.client_cert, certs.client_key
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"ca": nowhere}, "registrars.r.ca: cannot read"),
        ({"ca": empty}, "registrars.r.ca: .* is empty"),
        ({"client_cert": cert, "client_key": nowhere}, "r.client_key: cannot read"),
        ({"client_cert": nowhere, "client_key": key}, "r.client_cert: cannot read"),
        ({"client_cert": cert, "client_key": open_key}, "must not be readable by others"),
        ({"client_cert": cert, "client_key": certs.key}, "is not the key of"),
        ({"client_cert": cert, "client_key": locked}, "is encrypted"),
        ({"client_cert": cert, "client_key": tmp_path}, "it is a directory"),
    )
    for changes, message in cases:
        table = RegistrarTable(url="https://r", **changes)
        with pytest.raises(HostError, match=message):
            tls_context("registrars.r", table)


def test_tls_is_checked_as_it_should_be(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    table = RegistrarTable(
        url="https://r",
        ca=certs.ca_file,
        client_cert=certs.client_cert,
        client_key=certs.client_key,
    )
    context = tls_context("registrars.r", table)
    assert context is not None
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert tls_context("r", RegistrarTable(url="http://r", insecure_plaintext=True)) is None
