"""`ProxyClient`: under asyncio and trio, over a mock transport and against the daemon's real server."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.lowlevel
import httpx
import pytest
import trio
from helpers import FAKE_EK, HOST_UUID, LIMIT_S, FakeQuoter, daemon_with, make_certs, make_evidence

from provider_proxy.errors import (
    EvidenceFormatError,
    PolicyError,
    QuoteError,
    ReplyError,
    SignatureError,
    UsageError,
)
from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, QuoteRequest, TrustedHost
from provider_proxy.evidence.policy import PcrPolicy, UnsafeAcceptAny
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import MemoryHistory, Verifier
from provider_proxy.evidence.wire import MAX_EVIDENCE_BYTES
from provider_proxy.host.config.tables import BatchTable, Config, Listen, Logs
from provider_proxy.tenant import client as client_module
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.identity import ClaimedIdentity, ClaimedRegistration
from provider_proxy.testing.soft_tpm import SoftTpm

T = TypeVar("T")
Answer = Callable[[httpx.Request], httpx.Response]
URL = "https://proxy.test:8890"
NO_LOG_MASK = 1 << 16  # brings neither the IMA log nor the firmware's
REQUEST = QuoteRequest(nonce=Nonce(b"nonce-0123456789"), mask=PcrMask(NO_LOG_MASK))


def under_asyncio(work: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(LIMIT_S):
            return await work()

    return asyncio.run(bounded())


def under_trio(work: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        with trio.fail_after(LIMIT_S):
            return await work()

    return trio.run(bounded)


Run = Callable[[Callable[[], Awaitable[T]]], T]


@pytest.fixture(params=[under_asyncio, under_trio], ids=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Run[object]:
    runner: Run[object] = request.param
    return runner


def client_of(answer: Answer) -> tuple[httpx.AsyncClient, ProxyClient]:
    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return http, ProxyClient(http, URL)


def fetch(run: Run[object], answer: Answer, request: QuoteRequest = REQUEST) -> object:
    async def work() -> object:
        http, proxy = client_of(answer)
        async with http:
            return await proxy.fetch(request)

    return run(work)


def refusal(run: Run[object], answer: Answer, request: QuoteRequest = REQUEST) -> ReplyError:
    with pytest.raises(ReplyError) as caught:
        fetch(run, answer, request)
    return caught.value


# --- what is asked ----------------------------------------------------------------------------------


def test_the_request_is_the_one_that_was_meant(run: Run[object]) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, content=b"body")

    request = QuoteRequest(
        nonce=Nonce(b"a.b_c~d-0123456789"),
        mask=PcrMask(0xFF),
        bank=HashAlg.SHA384,
        vm=HOST_UUID,
        ima_ml_entry=17,
        timeout_ms=1500,
    )
    assert fetch(run, answer, request) == b"body"
    (sent,) = asked
    assert sent.method == "GET"
    assert sent.url.host == "proxy.test"
    assert sent.url.path == "/verifier/quote"
    assert parse_quote_query(sent.url.query.decode()) == request


@pytest.mark.parametrize("base", [URL, URL + "/", URL + "//"])
def test_the_base_url_may_end_with_a_slash(base: str) -> None:
    async def work() -> str:
        paths: list[str] = []

        def answer(request: httpx.Request) -> httpx.Response:
            paths.append(request.url.path)
            return httpx.Response(200, content=b"{}")

        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            await ProxyClient(http, base).fetch(REQUEST)
        return paths[0]

    assert under_trio(work) == "/verifier/quote"


def test_the_client_stays_the_callers(run: Run[object]) -> None:
    async def work() -> bool:
        http, proxy = client_of(lambda request: httpx.Response(200, content=b"x"))
        await proxy.fetch(REQUEST)
        await proxy.fetch(REQUEST)
        was_closed = http.is_closed
        await http.aclose()
        return was_closed

    assert run(work) is False


# --- what comes back --------------------------------------------------------------------------------


class Endless(httpx.AsyncByteStream):
    """A body far beyond every limit; counts what was taken of it."""

    def __init__(self) -> None:
        self.taken = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(1000):
            await anyio.lowlevel.checkpoint()  # as whatever reads from a network does
            self.taken += 8192
            yield b" " * 8192

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("status", [200, 503])
def test_an_endless_answer_is_cut_off(run: Run[object], status: int) -> None:
    body = Endless()
    error = refusal(run, lambda request: httpx.Response(status, stream=body))
    assert f"larger than {MAX_EVIDENCE_BYTES} bytes" in str(error)
    assert body.taken <= MAX_EVIDENCE_BYTES + 8192
    assert body.closed


def test_a_trickle_ends(run: Run[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the last one never."""
    monkeypatch.setattr(client_module, "ANSWER_LIMIT_S", 0.2)

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            await anyio.sleep(0.01)
            yield b" "

    error = refusal(run, lambda request: httpx.Response(200, content=trickle()))
    assert "no complete answer within 0.2 s" in str(error)


def test_the_limit_is_exact(run: Run[object]) -> None:
    good = b"x" * MAX_EVIDENCE_BYTES
    assert fetch(run, lambda request: httpx.Response(200, content=good)) == good
    refusal(run, lambda request: httpx.Response(200, content=good + b"x"))


@pytest.mark.parametrize(
    ("pcr", "has_logs"), [(0, True), (10, True), (15, True), (16, False), (23, False)]
)
def test_logs_may_be_larger(pcr: int, has_logs: bool) -> None:
    body = b"x" * (MAX_EVIDENCE_BYTES + 1)
    request = replace(REQUEST, mask=PcrMask(1 << pcr))
    if has_logs:
        assert fetch(under_trio, lambda r: httpx.Response(200, content=body), request) == body
    else:
        refusal(under_trio, lambda r: httpx.Response(200, content=body), request)


def test_a_compressed_bomb_is_not_opened(run: Run[object]) -> None:
    bomb = gzip.compress(bytes(200 * MAX_EVIDENCE_BYTES))
    headers = {"Content-Encoding": "gzip"}
    error = refusal(run, lambda request: httpx.Response(200, headers=headers, content=bomb))
    assert "compressed" in str(error)


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (400, b'{"code":400,"status":"mask: is wrong","results":{}}', "mask: is wrong"),
        (503, b'{"status":"full"}', "full"),
        (502, b"<html>", "no reason given"),
        (500, b"", "no reason given"),
        (500, b"\xff\xfe", "no reason given"),
        (500, b"[]", "no reason given"),
        (500, b"7", "no reason given"),
        (500, b'"status"', "no reason given"),
        (500, b"{}", "no reason given"),
        (500, b"[" * 30_000, "no reason given"),
        (500, b'{"status":' + b"9" * 5000 + b"}", "no reason given"),
        (500, b'{"status":"a\\u001b[31m\\nb"}', "a?[31m?b"),
        (500, b'{"status":"' + b"x" * 1000 + b'"}', "x" * 200),
        (500, b'{"status":null}', "None"),
        (204, b"", "no reason given"),
        (302, b"", "no reason given"),
    ],
)
def test_http_errors(run: Run[object], status: int, body: bytes, text: str) -> None:
    error = refusal(run, lambda request: httpx.Response(status, content=body))
    assert str(error) == f"the proxy answered {status}: {text}"
    assert error.status == status
    assert error.retry_after_s is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("007", 7.0),
        ("3600", 3600.0),
        ("3601", 3600.0),
        ("999999999", 3600.0),
        ("9999999999", None),
        ("1.5", None),
        ("-1", None),
        ("", None),
        ("soon", None),
        ("1e3", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_retry_after(run: Run[object], value: str, seconds: float | None) -> None:
    headers = {"Retry-After": value}
    error = refusal(run, lambda request: httpx.Response(503, headers=headers, content=b"{}"))
    assert error.retry_after_s == seconds


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout(""),
        httpx.ReadTimeout("slow"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("nonsense"),
        httpx.TooManyRedirects("round and round"),
        httpx.DecodingError("bad gzip"),
        httpx.InvalidURL("no"),
        UnicodeError("a Location, or a cookie"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_no_answer(run: Run[object], failure: Exception) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise failure

    error = refusal(run, answer)
    assert str(error).startswith("the proxy gave no answer: ")
    assert (str(failure) or "it timed out") in str(error)
    assert error.status is None
    assert error.__cause__ is failure


@pytest.mark.parametrize("base", ["", "proxy:8890", "ftp://proxy", "https://", "https://pro xy"])
def test_a_url_that_is_none(base: str) -> None:
    async def work() -> None:
        async with httpx.AsyncClient() as http:
            await ProxyClient(http, base).fetch(REQUEST)

    with pytest.raises(ReplyError, match="no answer"):
        under_trio(work)


def test_nobody_there(run: Run[object]) -> None:
    async def work() -> None:
        async with httpx.AsyncClient() as http:
            await ProxyClient(http, "http://127.0.0.1:1").fetch(REQUEST)

    with pytest.raises(ReplyError, match="no answer"):
        run(work)


# --- identity ---------------------------------------------------------------------------------------

GOOD_IDENTITY: dict[str, object] = {
    "ak_tpm": base64.b64encode(b"ak").decode(),
    "ak_pem": "-----BEGIN",
    "ak_name": "000b",
    "ek_tpm": base64.b64encode(b"ek").decode(),
    "ek_cert": None,
    "host_uuid": str(HOST_UUID),
    "software": True,
    "registrations": [],
}


REGISTRATION = {
    "registrar": "acme",
    "agent_id": "host-a.example",
    "state": "wrong_challenge",
    "last_success": None,
}


def identity(results: object) -> ClaimedIdentity:
    body = json.dumps({"code": 200, "status": "Success", "results": results}).encode()

    async def work() -> ClaimedIdentity:
        http, proxy = client_of(lambda request: httpx.Response(200, content=body))
        async with http:
            return await proxy.identity()

    return under_trio(work)


def test_identity() -> None:
    assert identity(GOOD_IDENTITY) == ClaimedIdentity(
        ak_public=b"ak", ek_public=b"ek", ek_cert=None, host_uuid=str(HOST_UUID), software=True
    )
    cert = GOOD_IDENTITY | {"ek_cert": base64.b64encode(b"der").decode(), "software": False}
    assert identity(cert).ek_cert == b"der"
    assert not identity(cert).software
    registered = identity(GOOD_IDENTITY | {"registrations": [REGISTRATION] * 100}).registrations
    assert registered[-1] == ClaimedRegistration(
        registrar="acme", agent_id="host-a.example", state="wrong_challenge"
    )
    assert len(registered) == 100


@pytest.mark.parametrize(
    "change",
    [
        {"ak_tpm": None},
        {"ak_tpm": "!"},
        {"ak_tpm": base64.b64encode(bytes(2000)).decode()},
        {"ek_tpm": 7},
        {"ek_cert": 7},
        {"ek_cert": base64.b64encode(bytes(20_000)).decode()},
        {"host_uuid": None},
        {"host_uuid": "x" * 37},
        {"host_uuid": "\x1b]0;gone\x07"},  # it is shown on terminals
        {"host_uuid": "\u202e"},
        {"software": None},
        {"software": "yes"},
        {"software": 1},
        {"registrations": None},
        {"registrations": [7]},
        {"registrations": [{}]},
        {"registrations": [{**REGISTRATION, "agent_id": "a\nb"}]},
        {"registrations": [{**REGISTRATION, "agent_id": "a" * 81}]},
        {"registrations": [{**REGISTRATION, "state": None}]},
        {"registrations": [REGISTRATION] * 101},
    ],
)
def test_an_identity_that_is_none(change: dict[str, object]) -> None:
    with pytest.raises(EvidenceFormatError):
        identity(GOOD_IDENTITY | change)


@pytest.mark.parametrize("results", [None, [], "x", {}])
def test_results_that_are_none(results: object) -> None:
    with pytest.raises(EvidenceFormatError):
        identity(results)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"results":{},"results":{}}'])
def test_a_body_that_is_no_identity(body: bytes) -> None:
    async def work() -> None:
        http, proxy = client_of(lambda request: httpx.Response(200, content=body))
        async with http:
            await proxy.identity()

    with pytest.raises(EvidenceFormatError):
        under_trio(work)


# --- attest -----------------------------------------------------------------------------------------


class Proxy:
    """A proxy of one tenant, behind a mock transport."""

    def __init__(self) -> None:
        self.tpm = SoftTpm(pcrs={16: b"good"})
        self.host = TrustedHost(ak=self.tpm.ak)
        self.history = MemoryHistory()
        self.asked: list[QuoteRequest] = []
        self.change: Callable[[bytes], bytes] = lambda body: body

    def answer(self, request: httpx.Request) -> httpx.Response:
        asked = parse_quote_query(request.url.query.decode())
        self.asked.append(asked)
        return httpx.Response(200, content=self.change(make_evidence(self.tpm, asked)))

    async def attest(self, verifier: Verifier, **more: object) -> object:
        http, proxy = client_of(self.answer)
        async with http:
            return await proxy.attest(
                verifier,
                self.host,
                self.history,
                mask=NO_LOG_MASK,
                **more,  # type: ignore[arg-type]
            )


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


VALUE = HashAlg.SHA256.digest(b"good")
GOOD_POLICY = PcrPolicy({16: [VALUE]})


def test_attest(run: Run[object], proxy: Proxy) -> None:
    quote = run(lambda: proxy.attest(Verifier(GOOD_POLICY)))
    assert quote.pcrs == {16: VALUE}  # type: ignore[attr-defined]
    assert proxy.history.newest() is not None


def test_attest_asks_with_fresh_nonces_and_what_it_was_told(run: Run[object], proxy: Proxy) -> None:
    verifier = Verifier(UnsafeAcceptAny())
    for _ in range(3):
        run(lambda: proxy.attest(verifier, bank=HashAlg.SHA1, timeout_ms=1234))
    assert len({request.nonce for request in proxy.asked}) == 3
    assert {(request.bank, request.timeout_ms) for request in proxy.asked} == {(HashAlg.SHA1, 1234)}


def test_attest_refuses_as_the_verifier_does(run: Run[object], proxy: Proxy) -> None:
    with pytest.raises(PolicyError):
        run(lambda: proxy.attest(Verifier(PcrPolicy({16: [bytes(32)]}))))
    with pytest.raises(UsageError):
        run(lambda: proxy.attest(Verifier(PcrPolicy({0: [bytes(32)]}))))
    proxy.host = TrustedHost(ak=SoftTpm().ak)
    with pytest.raises(SignatureError):
        run(lambda: proxy.attest(Verifier(GOOD_POLICY)))
    assert proxy.history.newest() is None


def test_an_answer_to_another_nonce_is_refused(run: Run[object], proxy: Proxy) -> None:
    bodies: list[bytes] = []

    def replay(body: bytes) -> bytes:
        bodies.append(body)
        return bodies[0]

    proxy.change = replay
    run(lambda: proxy.attest(Verifier(GOOD_POLICY)))
    with pytest.raises(Exception, match="quote was not taken over a root"):
        run(lambda: proxy.attest(Verifier(GOOD_POLICY)))


def test_a_nonce_that_was_refused_or_unanswered_is_closed(run: Run[object], proxy: Proxy) -> None:
    """Else a proxy that was refused could answer once more, later."""
    proxy.change = lambda body: b"{}"
    with pytest.raises(EvidenceFormatError):
        run(lambda: proxy.attest(Verifier(GOOD_POLICY)))
    (asked,) = proxy.asked
    assert not proxy.history.is_open(asked.nonce)


def test_a_late_answer_is_refused(run: Run[object], proxy: Proxy) -> None:
    times = iter([100.0, 161.0])
    with pytest.raises(Exception, match=r"61\.0 s after its nonce was made"):
        run(lambda: proxy.attest(Verifier(GOOD_POLICY, max_age_s=60), now=lambda: next(times)))


# --- against the daemon's real server -----------------------------------------------------------------


NOWHERE = Path("/nonexistent")


def config(listen: Listen | None = None) -> Config:
    return Config(
        state_dir=NOWHERE,
        listen=listen or Listen(address=("127.0.0.1:0",), insecure_plaintext=True),
        batch=BatchTable(window_ms=5.0),
        logs=Logs(ima=NOWHERE, uefi=NOWHERE),
    )


async def beside(run: Run[T], work: Callable[[], Awaitable[T]]) -> T:
    """Run a client in a thread and an event loop of its own, beside the daemon in this one."""
    with trio.fail_after(LIMIT_S):
        return await trio.to_thread.run_sync(run, work)


@pytest.fixture(params=[under_asyncio, under_trio], ids=["asyncio", "trio"])
def live(request: pytest.FixtureRequest) -> Run[None]:
    runner: Run[None] = request.param
    return runner


async def test_against_a_real_door(live: Run[None]) -> None:
    quoter = FakeQuoter(SoftTpm(pcrs={16: b"good"}), delay_s=0.01)
    async with daemon_with(quoter, config()) as started:

        async def work() -> None:
            async with httpx.AsyncClient(trust_env=False) as http:
                proxy = ProxyClient(http, f"http://{started.addresses[0]}")
                identity = await proxy.identity()
                assert identity.ak_public == quoter.tpm.ak_public
                assert identity.ek_public == FAKE_EK
                assert identity.host_uuid == str(HOST_UUID)
                host, history = TrustedHost(ak=parse_ak(identity.ak_public)), MemoryHistory()
                for mask in (NO_LOG_MASK, 0xFFFFFF & ~(1 << 10)):
                    quote = await proxy.attest(Verifier(GOOD_POLICY), host, history, mask=mask)
                    assert quote.pcrs[16] == VALUE

        await beside(live, work)
    assert len(quoter.quotes) == 2


async def test_over_tls_with_a_certificate(live: Run[None], tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    quoter = FakeQuoter(SoftTpm(pcrs={16: b"good"}))
    listen = Listen(
        address=("127.0.0.1:0",), tls_cert=certs.cert, tls_key=certs.key, client_ca=certs.ca_file
    )
    async with daemon_with(quoter, config(listen)) as started:
        url = f"https://{started.addresses[0]}"
        host = TrustedHost(ak=quoter.ak)

        async def enrolled() -> None:
            client = certs.client(with_cert=True)
            async with httpx.AsyncClient(verify=client, trust_env=False) as http:
                await ProxyClient(http, url).attest(
                    Verifier(GOOD_POLICY), host, MemoryHistory(), mask=NO_LOG_MASK
                )

        async def stranger() -> None:
            async with httpx.AsyncClient(verify=certs.client(), trust_env=False) as http:
                with pytest.raises(ReplyError, match="no answer"):
                    await ProxyClient(http, url).fetch(REQUEST)

        await beside(live, enrolled)
        await beside(live, stranger)


async def test_many_at_once_share_quotes() -> None:
    quoter = FakeQuoter(SoftTpm(pcrs={16: b"good"}), delay_s=0.05)
    verifier, host = Verifier(GOOD_POLICY), TrustedHost(ak=quoter.ak)
    async with (
        daemon_with(quoter, config()) as started,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        proxy = ProxyClient(http, f"http://{started.addresses[0]}")

        async def tenant() -> None:
            quote = await proxy.attest(verifier, host, MemoryHistory(), mask=NO_LOG_MASK)
            assert quote.pcrs == {16: VALUE}

        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(tenant)
    assert len(quoter.quotes) < 20


async def test_the_doors_refusals_reach_the_caller() -> None:
    quoter = FakeQuoter()
    async with (
        daemon_with(quoter, config()) as started,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        proxy = ProxyClient(http, f"http://{started.addresses[0]}")
        quoter.error = QuoteError("the TPM gave no quote", retry_after_s=7.0)
        with trio.fail_after(LIMIT_S), pytest.raises(ReplyError) as caught:
            await proxy.fetch(REQUEST)
        assert caught.value.status == 503
        assert caught.value.retry_after_s == 7.0
        quoter.error = None
        with trio.fail_after(LIMIT_S), pytest.raises(ReplyError, match=r"400: mask: ") as caught:
            await proxy.fetch(replace(REQUEST, mask=PcrMask(1 << 10)))
        assert caught.value.status == 400
        quoter.delay_s = 60.0
        with trio.fail_after(LIMIT_S), pytest.raises(ReplyError) as caught:
            await proxy.fetch(replace(REQUEST, timeout_ms=30))
        assert caught.value.status in (503, 504)
