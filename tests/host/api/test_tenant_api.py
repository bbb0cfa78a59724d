"""The tenants' server and the operator's: routes, parameters, statuses. Through a real `HttpServer`."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
import trio
import trio.testing
from helpers import FakeQuoter, Wire, connected, get_bytes, until
from http_server_helpers import IDENTITY, NONCE, TENANT, VM, FakeSubmit, make_server

from provider_proxy.errors import (
    OverloadedError,
    ProviderProxyError,
    RequestError,
    SelfCheckError,
    TenantLimitError,
    UnknownTenantError,
)
from provider_proxy.evidence.model import HashAlg, QuoteRequest, Tenant, mask_of
from provider_proxy.evidence.wire import parse_evidence
from provider_proxy.host.api import tenant as server
from provider_proxy.host.api.admin import AdminApi
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.config.tables import DEFAULT_ISOLATED
from provider_proxy.host.http.messages import Peer
from provider_proxy.host.http.server import HttpServer
from provider_proxy.host.metrics import Metrics

ISOLATED = mask_of(DEFAULT_ISOLATED)

GOOD = f"/verifier/quote?nonce={NONCE}&mask=0x1"


@pytest.fixture
async def submit() -> FakeSubmit:
    return FakeSubmit()


async def test_a_good_request_reaches_submit_and_its_answer_the_tenant(submit: FakeSubmit) -> None:
    async with connected(make_server(submit)) as wire:
        reply = await wire.get(GOOD)
        assert reply.status == 200
        assert reply.envelope()["status"] == "Success"
        evidence = parse_evidence(reply.body)
        assert evidence.mask == 1
        assert submit.calls == [(QuoteRequest(nonce=b"nonce-0123456789", mask=1), TENANT, 30.0)]  # type: ignore[arg-type]
        assert submit.is_gone is not None
        assert not submit.is_gone()


async def test_all_parameters_arrive(submit: FakeSubmit) -> None:
    async with connected(make_server(submit)) as wire:
        target = f"{GOOD}&bank=sha1&ima_ml_entry=17&vm={VM}&timeout_ms=1500"
        assert (await wire.get(target)).status == 200
        ((request, _, timeout_s),) = submit.calls
        assert request.bank is HashAlg.SHA1
        assert request.ima_ml_entry == 17
        assert str(request.vm) == VM
        assert (request.timeout_ms, timeout_s) == (1500, 1.5)


BAD_PARAMETERS: list[tuple[str, str]] = [
    ("", "nonce"),
    ("mask=0x1", "nonce"),
    (f"nonce={NONCE}", "mask"),
    ("nonce=tooshort&mask=0x1", "nonce"),
    ("nonce=" + "x" * 65 + "&mask=0x1", "nonce"),
    ("nonce=" + "x" * 16 + "%00&mask=0x1", "nonce"),
    ("nonce=" + "x" * 16 + "+&mask=0x1", "nonce"),
    ("nonce=" + "x" * 16 + "%C3%A9&mask=0x1", "nonce"),
    (f"nonce={NONCE}&mask=1", "mask"),
    (f"nonce={NONCE}&mask=0x", "mask"),
    (f"nonce={NONCE}&mask=0x0", "mask"),
    (f"nonce={NONCE}&mask=0x1000000", "mask"),
    (f"nonce={NONCE}&mask=0xg", "mask"),
    (f"nonce={NONCE}&mask=-0x1", "mask"),
    (f"nonce={NONCE}&mask=", "mask"),
    (f"nonce={NONCE}&mask=0x1&bank=", "bank"),
    (f"nonce={NONCE}&mask=0x1&bank=md5", "bank"),
    (f"nonce={NONCE}&mask=0x1&bank=SHA256", "bank"),
    (f"nonce={NONCE}&mask=0x1&bank=sha384", "bank"),  # a good one that is not offered
    (f"nonce={NONCE}&mask=0x1&ima_ml_entry=-1", "ima_ml_entry"),
    (f"nonce={NONCE}&mask=0x1&ima_ml_entry=1.5", "ima_ml_entry"),
    (f"nonce={NONCE}&mask=0x1&ima_ml_entry=", "ima_ml_entry"),
    (f"nonce={NONCE}&mask=0x1&ima_ml_entry=99999999999", "ima_ml_entry"),
    (f"nonce={NONCE}&mask=0x1&ima_ml_entry=%D9%A1", "ima_ml_entry"),  # a digit, not ASCII
    (f"nonce={NONCE}&mask=0x1&vm=me", "vm"),
    (f"nonce={NONCE}&mask=0x1&vm={VM.upper()}", "vm"),
    (f"nonce={NONCE}&mask=0x1&vm=" + quote("{" + VM + "}"), "vm"),
    (f"nonce={NONCE}&mask=0x1&timeout_ms=0", "timeout_ms"),
    (f"nonce={NONCE}&mask=0x1&timeout_ms=60001", "timeout_ms"),
    (f"nonce={NONCE}&mask=0x1&timeout_ms=600001", "timeout_ms"),
    (f"nonce={NONCE}&mask=0x1&timeout_ms=1e3", "timeout_ms"),
    (f"nonce={NONCE}&mask=0x1&logs=all", "logs"),
    (f"nonce={NONCE}&mask=0x1&nonce={NONCE}", "nonce"),
    (f"nonce={NONCE}&mask=0x1&mask=0x1", "mask"),
    (f"nonce={NONCE}&mask=0x1&partial=1", "partial"),
    (f"nonce={NONCE}&mask=0x1&Bank=sha256", "Bank"),
    (f"nonce={NONCE}&mask=0x1&%1b%5b31m=1", "?[31m"),
    (f"nonce={NONCE}&mask=0x1&=1", "(empty name)"),
    (f"nonce={NONCE}&mask=0x1&", "query"),
    (f"nonce={NONCE}&mask", "query"),
    (f"nonce={NONCE}&mask=0x1&bank=%ff", "bank"),
    ("&".join(f"a{n}=1" for n in range(50)), "a0"),
    ("&".join(f"nonce={NONCE}" for n in range(20)), "nonce"),
    (f"nonce={NONCE}&mask=0x1&bank=" + "x" * 600, "query"),
]


@pytest.mark.parametrize(("query", "parameter"), BAD_PARAMETERS)
async def test_a_bad_parameter_is_400_with_its_name(
    submit: FakeSubmit, query: str, parameter: str
) -> None:
    async with connected(make_server(submit)) as wire:
        reply = await wire.get(f"/verifier/quote?{query}")
        assert reply.status == 400
        envelope = reply.envelope()
        assert envelope["results"] == {"parameter": parameter}
        assert str(envelope["status"]).startswith(f"{parameter}: ")
        assert not reply.closes
        assert (await wire.get("/version")).status == 200
    assert submit.calls == []


async def test_no_answer_holds_what_a_tenant_sent(submit: FakeSubmit) -> None:
    async with connected(make_server(submit)) as wire:
        for secret in ("s3cret-nonce-%21%21%21%21", "s3cret"):
            assert (
                b"s3cret" not in (await wire.get(f"/verifier/quote?nonce={secret}&mask=0x1")).body
            )


async def test_the_longest_timeout_is_served(submit: FakeSubmit) -> None:
    async with connected(make_server(submit)) as wire:
        assert (await wire.get(f"{GOOD}&timeout_ms=60000")).status == 200
        assert submit.calls[0][2] == 60.0


UNKNOWN = [
    "/",
    "/verifier",
    "/verifier/quote/",
    "//verifier/quote",
    "/verifier/Quote",
    "/v2.1/quotes/identity",
    "/healthz",
    "/readyz",
    "/metrics",
    "/verifier/../version",
    "*",
]


@pytest.mark.parametrize("path", UNKNOWN)
async def test_an_unknown_path_is_404(submit: FakeSubmit, path: str) -> None:
    async with connected(make_server(submit)) as wire:
        reply = await wire.get(path)
        assert reply.status == 404
        assert reply.envelope()["results"] == {}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "options", "get"])
@pytest.mark.parametrize("path", [GOOD, "/verifier/identity", "/version"])
async def test_another_method_is_405(submit: FakeSubmit, method: str, path: str) -> None:
    async with connected(make_server(submit)) as wire:
        await wire.send(get_bytes(path, method=method))
        reply = await wire.reply()
        assert reply.status == 405
        assert reply.header("Allow") == "GET, HEAD, OPTIONS"
        assert (await wire.get("/version")).status == 200
    assert submit.calls == []


@pytest.mark.parametrize("target", ["*", "/", "/version", GOOD, "/verifier/identity"])
async def test_options_say_that_somebody_is_there(submit: FakeSubmit, target: str) -> None:
    """A balancer's probe, in HTTP/1.0 or 1.1; nobody's identity is asked for it."""

    def nobody(_peer: Peer) -> Tenant:
        raise UnknownTenantError("you are no tenant")

    for version in ("1.0", "1.1"):
        async with connected(make_server(submit, identify=nobody)) as wire:
            await wire.send(get_bytes(target, method="OPTIONS", version=version))
            reply = await wire.reply()
            assert (reply.status, reply.body) == (200, b"")
            assert reply.header("Allow") == "GET, HEAD, OPTIONS"
    assert submit.calls == []


async def test_head_is_the_head_of_get(submit: FakeSubmit) -> None:
    async with connected(make_server(submit)) as wire:
        got = await wire.get("/version")
        await wire.send(get_bytes("/version", method="HEAD"))
        reply = await wire.reply(to_head=True)
        assert (reply.status, reply.body) == (200, b"")
        assert reply.header("Content-Length") == str(len(got.body))


async def test_head_takes_no_quote(submit: FakeSubmit) -> None:
    async with connected(make_server(submit)) as wire:
        await wire.send(get_bytes(GOOD, method="HEAD"))
        assert (await wire.reply(to_head=True)).status == 405
        assert (await wire.get("/version")).status == 200
    assert submit.calls == []


async def test_a_vm_without_claims_is_404() -> None:
    """Through the real batcher, of a host that makes no claims."""
    batcher = Batcher(FakeQuoter(), BatchSettings(isolate_mask=ISOLATED), Metrics())
    async with connected(make_server(batcher.submit)) as wire:
        reply = await wire.get(f"{GOOD}&vm={VM}")
        assert reply.status == 404
        assert reply.envelope()["results"] == {}


async def test_a_pcr_that_is_not_allowed_is_400() -> None:
    """Through the real batcher."""
    batcher = Batcher(FakeQuoter(), BatchSettings(isolate_mask=ISOLATED), Metrics())
    server = make_server(batcher.submit, identify=lambda peer: Tenant(name="t", pcr_allow=0x2))
    async with connected(server) as wire:
        reply = await wire.get(f"/verifier/quote?nonce={NONCE}&mask=0x3")
        assert reply.status == 400
        assert reply.results() == {"parameter": "mask"}


@pytest.mark.parametrize(
    ("query", "seconds"), [("", 30.0), ("&timeout_ms=1", 0.001), ("&timeout_ms=2500", 2.5)]
)
async def test_a_late_quote_is_504(
    submit: FakeSubmit, autojump_clock: trio.testing.MockClock, query: str, seconds: float
) -> None:
    submit.delay_s = 1000.0
    async with connected(make_server(submit)) as wire:
        begin = trio.current_time()
        await wire.send(get_bytes(GOOD + query))
        reply = await _unbounded_reply(wire)
        assert trio.current_time() - begin == pytest.approx(seconds)
        assert reply == 504
        submit.delay_s = 0.0
        assert (await wire.get(GOOD)).status == 200  # the connection is as good as before


async def _unbounded_reply(wire: Wire) -> int:
    """The status of a reply that takes its time by the mock clock; what else comes is dropped."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = bytes(await wire.stream.receive_some(4096))
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = [line for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
    assert len(body) == int(length.split()[1])
    return int(head.split()[1])


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (OverloadedError("full", retry_after_s=3.0), 503, "3"),
        (TenantLimitError("too many", retry_after_s=4.0), 429, "4"),
        (SelfCheckError("wrong"), 502, None),
    ],
)
async def test_errors_of_submit_become_their_statuses(
    submit: FakeSubmit, error: ProviderProxyError, status: int, retry_after: str | None
) -> None:
    submit.error = error
    async with connected(make_server(submit)) as wire:
        reply = await wire.get(GOOD)
        assert reply.status == status
        assert reply.header("Retry-After") == retry_after
        assert reply.envelope()["status"] == str(error)


async def test_who_may_not_come_in_gets_nothing(submit: FakeSubmit) -> None:
    def nobody(_peer: Peer) -> Tenant:
        raise RequestError("you are not enrolled")

    async with connected(make_server(submit, identify=nobody)) as wire:
        for path in (GOOD, "/verifier/identity", "/version"):
            reply = await wire.get(path)
            assert reply.status == 400
            assert reply.envelope()["results"] == {}
    assert submit.calls == []


# --- quotas -----------------------------------------------------------------------------------------


async def test_a_tenants_rate_is_its_own(
    submit: FakeSubmit, autojump_clock: trio.testing.MockClock
) -> None:
    """A burst, then so many a second; another tenant does not feel it, and other paths are free."""
    tenant = Tenant(name="fast", pcr_allow=0xFFFFFF, rate=2.0, burst=3)
    who = [tenant]
    server = make_server(submit, identify=lambda peer: who[0])
    async with connected(server) as wire:
        for _ in range(2):
            statuses = [(await wire.get(GOOD)).status for _ in range(4)]
            assert statuses == [200, 200, 200, 429]
            reply = await wire.get(GOOD)
            assert 1 <= int(reply.header("Retry-After") or 0) <= 2
            assert reply.envelope()["results"] == {}
            assert (await wire.get("/version")).status == 200
            who[0] = Tenant(name="other", pcr_allow=0xFFFFFF, rate=2.0, burst=100)
            assert (await wire.get(GOOD)).status == 200
            who[0] = tenant
            await trio.sleep(0.5)
            assert [(await wire.get(GOOD)).status for _ in range(2)] == [200, 429]
            await trio.sleep(60)  # no more than the burst is saved up


async def test_a_tenants_requests_in_flight_are_bounded(
    submit: FakeSubmit, autojump_clock: trio.testing.MockClock
) -> None:
    """Counted over all its connections; who timed out, failed or hung up is not in flight any more."""
    tenant = Tenant(name="t", pcr_allow=0xFFFFFF, max_inflight=2)
    server = make_server(submit, identify=lambda peer: tenant)
    submit.delay_s = 5.0
    async with connected(server) as one, connected(server) as two, connected(server) as three:
        for query, error in (("", None), ("&timeout_ms=1000", None), ("", OverloadedError("full"))):
            submit.error = error
            for wire in (one, two):
                await wire.send(get_bytes(GOOD + query))
            await trio.testing.wait_all_tasks_blocked()
            assert (await three.get(GOOD)).status == 429
            for wire in (one, two):
                await _unbounded_reply(wire)
        submit.error = None
        await three.send(get_bytes(GOOD))
        assert await _unbounded_reply(three) == 200


async def test_identify_may_be_replaced(submit: FakeSubmit) -> None:
    """A reload holds for the next request."""
    handler = server.TenantApi(
        submit,
        lambda peer: TENANT,
        identity=IDENTITY,
        version="1",
        banks=(HashAlg.SHA256,),
        default_timeout_ms=1000,
        max_timeout_ms=1000,
    )

    def nobody(_peer: Peer) -> Tenant:
        raise UnknownTenantError("you are no tenant any more")

    async with connected(HttpServer(handler, observe=lambda status, reason: None)) as wire:
        assert (await wire.get(GOOD)).status == 200
        handler.identify = nobody
        reply = await wire.get(GOOD)
        assert (reply.status, reply.reason) == (403, "Forbidden")
        assert reply.closes
        assert await wire.is_closed()


async def test_identify_sees_the_connection(submit: FakeSubmit) -> None:
    names: list[str] = []

    def identify(peer: Peer) -> Tenant:
        names.append(peer.name)
        return Tenant(name=peer.name, pcr_allow=1)

    server = make_server(submit, identify=identify)
    async with connected(server) as one, connected(server) as two:
        await one.get(GOOD)
        await two.get(GOOD)
    assert [tenant.name for _, tenant, _ in submit.calls] == names
    assert names[0] != names[1]


async def test_is_gone_is_the_connections(submit: FakeSubmit) -> None:
    submit.delay_s = 60.0
    async with connected(make_server(submit)) as wire:
        await wire.send(get_bytes(GOOD))
        await until(lambda: submit.is_gone is not None)
        assert submit.is_gone is not None
        assert not submit.is_gone()
        await wire.stream.aclose()
        await until(submit.is_gone, "is_gone")


async def test_the_identity_document(submit: FakeSubmit) -> None:
    async with connected(make_server(submit)) as wire:
        reply = await wire.get("/verifier/identity")
        assert reply.envelope()["status"] == "Success"
        assert reply.results() == {
            "ak_tpm": base64.b64encode(b"ak public").decode(),
            "ak_pem": "-----BEGIN",
            "ak_name": b"\x00\x0bname".hex(),
            "ek_tpm": base64.b64encode(b"ek public").decode(),
            "ek_cert": None,
            "ek_chain": [],
            "host_uuid": VM,
            "software": True,
            "registrations": [],
        }


def test_an_ek_certificate_is_base64() -> None:
    results = server.identity_results(
        ak_public=b"",
        ak_pem=b"",
        ak_name=b"",
        ek_public=b"",
        ek_cert=b"\xff\x00der",
        ek_chain=(b"\x01",),
        host_uuid=VM,
        software=False,
    )
    assert results["ek_cert"] == base64.b64encode(b"\xff\x00der").decode()
    assert results["ek_chain"] == ["AQ=="]
    assert results["software"] is False


async def test_the_version_document(submit: FakeSubmit) -> None:
    async with connected(make_server(submit)) as wire:
        results = (await wire.get("/version")).results()
    assert results == {
        "supported_version": "1.0",
        "supported_versions": ["1.0"],
        "evidence_formats": [1],
        "provider_proxy": "1.2.3",
    }


@pytest.mark.parametrize("path", ["/version", "/verifier/identity"])
async def test_documents_take_no_parameters(submit: FakeSubmit, path: str) -> None:
    async with connected(make_server(submit)) as wire:
        reply = await wire.get(f"{path}?nonce={NONCE}")
        assert reply.status == 400
        assert reply.results() == {"parameter": "query"}


# --- the operator's server ----------------------------------------------------------------------------


async def test_the_admin_door() -> None:
    metrics = Metrics()
    why: list[str | None] = [None]
    server = HttpServer(
        AdminApi(metrics, lambda: why[0], dict), observe=lambda status, reason: None
    )
    metrics.requests.labels(503, "OverloadedError").inc(3)
    async with connected(server) as wire:
        health = await wire.get("/healthz")
        assert (health.status, health.envelope()["status"]) == (200, "alive")
        ready = await wire.get("/readyz")
        assert (ready.status, ready.envelope()["status"]) == (200, "ready")
        why[0] = "draining"
        ready = await wire.get("/readyz")
        assert (ready.status, ready.envelope()["status"]) == (503, "draining")
        assert (await wire.get("/healthz")).status == 200
        text = await wire.get("/metrics")
        assert text.status == 200
        assert text.header("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
        lines = text.body.decode().splitlines()
        assert 'provider_proxy_requests_total{reason="OverloadedError",status="503"} 3.0' in lines
        assert "provider_proxy_selfcheck_failures_total 0.0" in lines
        for path in (GOOD, "/version", "/verifier/identity"):
            assert (await wire.get(path)).status == 404
        await wire.send(get_bytes("/metrics", method="POST"))
        assert (await wire.reply()).status == 405
