"""Why a connection failed: real failures, every client, both event loops, one wording."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import trio
from helpers import Certs, make_certs

from provider_proxy.common.failures import SHOWN_CHARS, causes, is_certificate_refused, why
from provider_proxy.common.http import http_client
from provider_proxy.common.tls import TlsFiles, client_context
from provider_proxy.errors import RegistrarError, ReplyError
from provider_proxy.host.quoters.agent_http import AgentClient, AgentError
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.verifier_api import VerifierApi
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.http import Endpoint, ProxyConnection
from provider_proxy.tenant.watch.reports import WebhookSink
from provider_proxy.tenant.watch.tables import Webhook
from provider_proxy.trust.registrar import AgentRecords
from provider_proxy.trust.registration import client as registration

pytestmark = [
    pytest.mark.real,
    # httpx leaves the generator of a request's body to the collector where the connection breaks.
    pytest.mark.filterwarnings("ignore:.*ByteStream.*:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*ByteStream.*:ResourceWarning"),
]

NAMES = ("--ca", "--cert", "--key")
LIMIT_S = 30


@contextlib.contextmanager
def listening(context: ssl.SSLContext | None, answer: bytes = b"") -> Iterator[int]:
    """A server in a thread: shakes hands if it speaks TLS, reads once, answers and hangs up."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = server.accept()
            except OSError:
                return
            plain.settimeout(LIMIT_S)
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                sock: socket.socket = stack.enter_context(plain)
                if context is not None:
                    sock = stack.enter_context(context.wrap_socket(plain, server_side=True))
                sock.recv(65536)
                sock.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(LIMIT_S)


def served_by(certs: Certs, *, demand: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs.cert, certs.key)
    if demand:
        context.load_verify_locations(certs.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


Ask = Callable[[str, httpx.AsyncClient], Coroutine[Any, Any, object]]


async def ask_proxy(url: str, http: httpx.AsyncClient) -> object:
    return await ProxyClient(http, url).identity()


async def ask_registrar(url: str, http: httpx.AsyncClient) -> object:
    return await AgentRecords(http, url).fetch("a")


async def ask_verifier(url: str, http: httpx.AsyncClient) -> object:
    return await VerifierApi(http, url).call("POST", "/", b"{}", limit=1000)


async def register(url: str, http: httpx.AsyncClient) -> object:
    return await registration.RegistrarClient(http, url, "a").negotiate()


async def ask_agent(url: str, http: httpx.AsyncClient) -> object:
    agent = AgentClient(url, None)
    await agent.close()
    agent._http = http
    return await agent.quote("n", 1, 0)


async def post(url: str, http: httpx.AsyncClient) -> object:
    problem = await WebhookSink(Webhook(url=url), http, b"s" * 16)._post(b"{}")
    raise ReplyError(problem)


CLIENTS: dict[str, tuple[Ask, bool]] = {  # and whether it needs trio
    "proxy": (ask_proxy, False),
    "registrar": (ask_registrar, False),
    "verifier": (ask_verifier, False),
    "registration": (register, True),
    "agent": (ask_agent, True),
    "webhook": (post, True),
}


def run(loop: str, main: Callable[[], Coroutine[Any, Any, object]]) -> str:
    """What a client says. Anything but an error of ours fails the test."""

    async def bounded() -> str:
        with anyio.fail_after(LIMIT_S):
            try:
                await main()
            except (ReplyError, RegistrarError, AgentError) as exc:
                return str(exc)
        raise AssertionError("it was answered")

    return trio.run(bounded) if loop == "trio" else asyncio.run(bounded())


def says(loop: str, ask: Ask, url: str, files: TlsFiles, name: str | None = None) -> str:
    async def main() -> object:
        context = client_context(files)
        async with http_client(context, read_limit_s=LIMIT_S, tls_name=name) as http:
            return await ask(url, http)

    return run(loop, main)


def watcher_says(port: int, files: TlsFiles, *, tls: bool, name: str) -> str:
    async def main() -> object:
        context = client_context(files) if tls else None
        endpoint = Endpoint(host="127.0.0.1", port=port, context=context, server_name=name)
        connection = ProxyConnection(endpoint.connect, "x")
        try:
            return await connection.get("/", 1000, Budget().room("x"))
        finally:
            await connection.aclose()

    return run("trio", main)


def everybody(
    port: int, files: TlsFiles, *, tls: bool = True, name: str | None = None
) -> list[str]:
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    said = [
        says(loop, ask, url, files, name)
        for ask, needs_trio in CLIENTS.values()
        for loop in (("trio",) if needs_trio else ("trio", "asyncio"))
    ]
    return [*said, watcher_says(port, files, tls=tls, name=name or "127.0.0.1")]


@pytest.fixture
def certs(tmp_path: Path) -> Certs:
    return make_certs(tmp_path)


@pytest.fixture
def trusting(certs: Certs) -> TlsFiles:
    return TlsFiles(ca=certs.ca_file, names=NAMES)


def test_a_wrong_ca(certs: Certs, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_certs(tmp_path / "other")
    with listening(served_by(certs)) as port:
        for said in everybody(port, TlsFiles(ca=other.ca_file, names=NAMES)):
            assert "its certificate is not valid" in said
            assert "is the CA file the right one?" in said


def test_a_wrong_name_and_the_way_out(certs: Certs, trusting: TlsFiles) -> None:
    with listening(served_by(certs)) as port:
        for said in everybody(port, trusting, name="elsewhere.example"):
            assert "its certificate is not valid: Hostname mismatch" in said
            assert "or set that name (--tls-name, tls_name)" in said
        for said in everybody(port, trusting, name="localhost"):  # reached under another name
            assert "its certificate" not in said


def test_a_certificate_is_wanted(certs: Certs, trusting: TlsFiles) -> None:
    """A race: the alert comes after the handshake, or the connection is closed before it is read."""
    with listening(served_by(certs, demand=True)) as port:
        for said in everybody(port, trusting):
            assert "client certificate" in said


def test_a_certificate_of_another_ca_is_shown(certs: Certs, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_certs(tmp_path / "other")
    files = TlsFiles(ca=certs.ca_file, cert=other.client_cert, key=other.client_key, names=NAMES)
    with listening(served_by(certs, demand=True)) as port:
        for said in everybody(port, files):
            assert "it refuses your certificate: it does not trust the CA" in said or (
                "is yours valid and from a CA that it trusts?" in said
            )


def test_plain_http_where_tls_was_asked(trusting: TlsFiles) -> None:
    with listening(None, b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        for said in everybody(port, trusting):
            assert "it does not speak TLS: must the URL begin with http://?" in said


def test_tls_where_plain_http_was_asked(certs: Certs, trusting: TlsFiles) -> None:
    with listening(served_by(certs)) as port:
        for said in everybody(port, trusting, tls=False):
            assert "write https://" in said or "closed the connection" in said


def test_nobody_listens(trusting: TlsFiles) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for said in everybody(port, trusting):
        assert "connection refused: nothing listens there" in said


def test_a_name_that_nobody_knows(trusting: TlsFiles) -> None:
    for loop in ("trio", "asyncio"):
        said = says(loop, ask_proxy, "https://nowhere.invalid", trusting)
        assert "its name cannot be resolved" in said


def test_a_name_that_the_resolver_cannot_take() -> None:
    said = says("asyncio", ask_proxy, "https://xn--a:1", TlsFiles(names=NAMES))
    assert said.startswith("the proxy gave no answer: ")


def test_it_takes_too_long() -> None:
    def never(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("", request=request)

    async def main() -> object:
        async with httpx.AsyncClient(transport=httpx.MockTransport(never)) as http:
            return await ask_proxy("https://x", http)

    assert run("asyncio", main) == "the proxy gave no answer: it timed out"


def test_an_expired_certificate_is_named(tmp_path: Path) -> None:
    error = ssl.SSLCertVerificationError("x")
    error.verify_code, error.verify_message = 10, "certificate has expired"
    assert why(error) == "its certificate is not valid: it has expired"
    error.verify_code = 9
    assert "is the clock of this machine right?" in why(error)


def test_the_reason_is_found_however_deep() -> None:
    inner = ConnectionRefusedError(111, "Connection refused")
    group = ExceptionGroup("x", [inner])
    outer = OSError("all attempts to connect failed")
    outer.__cause__ = group
    top = httpx.ConnectError("")
    top.__context__ = outer
    assert list(causes(top)) == [top, outer, group, inner]
    assert why(top) == "connection refused: nothing listens there"
    assert not is_certificate_refused(top)


def test_a_ring_of_causes_ends() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert why(one) == "one"


def test_foreign_text_is_one_short_line() -> None:
    said = why(httpx.RemoteProtocolError("illegal\x1b[2J\r\n" + "x" * 1000))
    assert said.isprintable()
    assert len(said) == SHOWN_CHARS
