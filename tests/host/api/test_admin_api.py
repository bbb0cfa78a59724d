"""The operator's server: who may ask, what the page may do, and that status is as documented."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib import resources
from typing import Any

import pytest
import trio
from docs_helpers import codes, rows
from helpers import (
    Asker,
    Wire,
    connect,
    connected,
    get,
    make_certs,
    plain_toml,
    quote_over,
    run_command,
    server_on_port,
    serving,
    trusted_ak,
    until,
)
from status_helpers import CHIP, HANDSHAKE_FAILURES, HOSTILE, make_batch, make_board
from tpm_helpers import sample

from provider_proxy.common.pages import check_host, page_headers
from provider_proxy.errors import QuoteError, WrongHostError
from provider_proxy.host.api.admin import AdminApi
from provider_proxy.host.config.tables import Listen
from provider_proxy.host.http.listeners import open_listeners, tls_context
from provider_proxy.host.http.peers import SILENT
from provider_proxy.host.http.server import HttpServer
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.status.recent import Recent

API = "docs/http-api.md"
PAGE = resources.files("provider_proxy").joinpath("status.html").read_bytes()


def a_recent() -> Recent:
    return Recent(clock=lambda: 1e9, monotonic=lambda: 1000.0)


def full_status() -> dict[str, Any]:
    recent = a_recent()
    recent.batch_done(make_batch(1))
    recent.batch_done(make_batch(2, error=QuoteError("the TPM gave no quote")))
    recent.count("acme", "ok")
    recent.count(HOSTILE, "ParameterError")
    metrics = Metrics()
    metrics.tpm_errors.labels("RETRY", "again").inc(2)
    return make_board(recent, chip=CHIP, metrics=metrics).results()


def make_server(metrics: Metrics | None = None) -> HttpServer:
    handler = AdminApi(metrics or Metrics(), lambda: None, full_status)
    return HttpServer(handler, observe=lambda status, reason: None)


@asynccontextmanager
async def over_tcp() -> AsyncIterator[Wire]:
    """A client of the server on loopback, where a browser could be."""
    async with server_on_port(make_server()) as address, connect(address) as wire:
        yield wire


# --- status ---------------------------------------------------------------------------------------


def test_documented_keys_are_the_status_s() -> None:
    status = full_status()
    names = [
        name
        for row in rows(API, "Status key", "Meaning")
        for name in re.findall(r"`(\w+)`", row[0])
    ]
    assert sorted(names) == sorted(status)
    chip = [
        n for row in rows(API, "Key of `chip`", "Meaning") for n in re.findall(r"`(\w+)`", row[0])
    ]
    assert chip == list(status["chip"])
    batch = [
        n for row in rows(API, "Key of a batch", "Meaning") for n in re.findall(r"`(\w+)`", row[0])
    ]
    assert sorted(batch) == sorted(status["batches"][0])
    (text,) = (row[1] for row in rows(API, "Status key", "Meaning") if row[0] == "`queue`")
    assert re.findall(r"`(\w+)`", text) == list(status["queue"])
    assert [status["batches"][n]["outcome"] for n in (0, 1)] == ["ok", "QuoteError"]
    assert status["chip"]["errors"] == {"RETRY": 2}
    assert status["tenants"]["listed"][0]["name"] == HOSTILE


def test_what_seals_is_documented() -> None:
    seals = codes(rows("docs/monitoring.md", "`sealed_by`", "Meaning"))
    assert seals == ["window", "chip", "full", "drain"]


def test_handshake_reasons_are_documented() -> None:
    (text,) = (row[2] for row in rows(API, "Metric", "Kind", "Meaning") if "tls_hand" in row[0])
    words = re.findall(r"`(\w+)`", text)
    assert words == ["result", "ok", "failed", SILENT, "reason", "ok", SILENT, *HANDSHAKE_FAILURES]


async def test_status_is_json_in_the_envelope() -> None:
    async with connected(make_server()) as wire:
        reply = await wire.get("/status")
        assert reply.results()["version"] == 1
        assert reply.header("Content-Type") == "application/json"
        assert reply.header("Cache-Control") == "no-store"
        assert reply.header("X-Content-Type-Options") == "nosniff"
        assert (await wire.get("/status?x=1")).status == 400


# --- the page -------------------------------------------------------------------------------------


async def test_the_page_may_run_its_own_script_and_no_other() -> None:
    async with connected(make_server()) as wire:
        reply = await wire.get("/")
    assert (reply.status, reply.body) == (200, PAGE)
    assert reply.header("Content-Type") == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in (reply.header("Content-Security-Policy") or "").split("; ")
    )
    script = re.findall(rb"<script>(.*?)</script>", PAGE, re.DOTALL)
    assert len(script) == 1
    assert policy["script-src"] == f"'sha256-{b64encode(sha256(script[0]).digest()).decode()}'"
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in (reply.header("Content-Security-Policy") or "")
    assert reply.header("X-Content-Type-Options") == "nosniff"
    assert reply.header("Referrer-Policy") == "no-referrer"


def test_a_page_that_was_changed_gets_other_hashes() -> None:
    assert page_headers(PAGE) != page_headers(PAGE.replace(b'"use strict"', b'"use  strict"', 1))


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = PAGE.decode()
    addresses = set(re.findall(r"https?://[^\s\"')]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.search(
        r"<script src|<link rel=.stylesheet|@import|url\(|innerHTML|eval\(|style=\"", text
    )
    assert len(PAGE) < 64 * 1024


# --- who may ask ----------------------------------------------------------------------------------

GOOD_HOSTS = (
    *("localhost", "localhost:8895", "127.0.0.1", "127.0.0.1:8895", "127.8.9.1:1"),
    *("[::1]", "[::1]:8895", ""),
)
BAD_HOSTS = (
    *("evil.example", "evil.example:8895", "localhost.evil.example", "127.0.0.1.evil.example"),
    *("10.0.0.1:8895", "0.0.0.0", "[::]", "8895", ":8895", "localhost:", "localhost:x", "127.1"),
    *("user@localhost", "localhost@evil.example", "::1:1:8895", "\ufffd", "2130706433"),
)


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_names_of_this_machine(host: str) -> None:
    check_host(host)


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_foreign_names(host: str) -> None:
    with pytest.raises(WrongHostError):
        check_host(host)


@pytest.mark.parametrize("path", ["/", "/status", "/metrics", "/healthz", "/readyz", "/x"])
async def test_a_rebound_name_reads_nothing(path: str) -> None:
    async with over_tcp() as wire:
        request = f"GET {path} HTTP/1.1\r\nHost: evil.example:8895\r\n\r\n"
        await wire.send(request.encode())
        reply = await wire.reply()
        assert (reply.status, reply.results(), reply.closes) == (421, {}, True)
    async with over_tcp() as wire:
        assert (await wire.get(path)).status == (404 if path == "/x" else 200)


async def test_a_unix_socket_takes_any_name() -> None:
    async with connected(make_server()) as wire:
        await wire.send(b"GET /status HTTP/1.1\r\nHost: provider-proxy\r\n\r\n")
        assert (await wire.reply()).status == 200


# --- the real daemon ------------------------------------------------------------------------------

TABLES = '[admin]\naddress = ["127.0.0.1:0", "unix:{}"]\n[batch]\nwindow_ms = 1\n'


def value_of(text: str, name: str) -> float:
    """The sum of a metric's samples, in Prometheus' text."""
    found = re.findall(rf"^provider_proxy_{name}(?:{{[^}}]*}})? ([\d.e+-]+)$", text, re.MULTILINE)
    return sum(map(float, found))


@pytest.mark.real
async def test_a_daemon_s_status_and_metrics(tmp_path: Any) -> None:
    path = tmp_path / "admin"
    toml = plain_toml(tmp_path / "s", tables=TABLES.format(path))
    async with serving(tmp_path, toml) as serve:
        tenant = Asker(await trusted_ak(serve.address))
        async with connect(serve.address) as wire:
            for _ in range(5):
                await quote_over(wire, tenant)
            assert (await wire.get("/verifier/quote?mask=0x1")).status == 400
            status: dict[str, Any] = (await get(serve.admin, "/status")).results()
            text = (await get(serve.admin, "/metrics")).body.decode()
            for words in (("--admin", f"unix:{path}"), ("--config", tmp_path / "d0.toml")):
                shown = await trio.to_thread.run_sync(run_command, "status", *words)
                if "--admin" in words:
                    assert (shown.returncode, shown.stderr) == (0, "")
                    assert " READY " in shown.stdout
                else:
                    assert "has port 0" in shown.stderr
    assert status["state"] == "ready"
    assert status["host"]["ak_name"] == tenant.host.ak.name.hex()
    assert status["host"]["software"] is True
    assert [batch["number"] for batch in status["batches"]] == [1, 2, 3, 4, 5]
    assert all(b["outcome"] == "ok" and 0 < b["quote_ms"] < 20_000 for b in status["batches"])
    assert status["tenants"]["refused"] == 1
    assert {"ParameterError": 1} in [one["refused"] for one in status["tenants"]["listed"]]
    assert 0 < status["chip"]["learnt_quote_ms"] < 20_000
    assert 0 < status["chip"]["duty"] <= 1
    assert value_of(text, "batches_sealed_total") == 5
    assert 0 < value_of(text, "duty") <= 1
    assert value_of(text, "max_duty") == status["chip"]["max_duty"] == 0.5
    assert value_of(text, "learnt_quote_seconds") > 0
    assert value_of(text, "connections") == 1
    assert value_of(text, "build_info") == 1
    assert re.search(r'build_info\{python="3\.[\d.]+",version="[^"]+"\} 1\.0', text)
    json.dumps(status)


@pytest.mark.real
async def test_tls_handshakes_are_counted_by_reason(tmp_path: Any) -> None:
    certs = make_certs(tmp_path)
    (tmp_path / "other").mkdir()
    other = make_certs(tmp_path / "other")
    metrics = Metrics()
    listen = Listen(tls_cert=certs.cert, tls_key=certs.key, client_ca=certs.ca_file)
    (listener,) = open_listeners("listen.address", ("127.0.0.1:0",), tls_context(listen))
    server = HttpServer(
        AdminApi(metrics, lambda: None, dict),
        observe=lambda status, reason: None,
        observe_handshake=metrics.count_handshake,
    )
    address = f"127.0.0.1:{listener.socket.getsockname()[1]}"

    def counted(result: str, reason: str) -> float:
        return sample(metrics, "tls_handshakes_total", {"result": result, "reason": reason})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, server.serve)
        assert (await get(address, "/healthz", certs.client(with_cert=True))).status == 200
        stranger = other.client(with_cert=True)
        stranger.load_verify_locations(certs.ca_file)
        for context in (certs.client(), stranger):
            async with connect(address, context) as wire:
                with pytest.raises((trio.BrokenResourceError, AssertionError)):
                    await wire.get("/healthz")
        async with connect(address) as wire:
            await wire.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await wire.rest()
        await until(lambda: server.connections == 0)
        async with connect(address):
            await until(lambda: server.connections == 1)  # one that nobody has seen is not counted
            await until(lambda: counted("silent", "silent") == 0)
        await until(lambda: counted("silent", "silent") == 1)
        async with connect(address) as wire:
            await wire.send(b"\x16\x03\x01")
            await until(lambda: server.connections == 1)
        await until(lambda: counted("failed", "client_gone") == 1)
        nursery.cancel_scope.cancel()
    assert counted("ok", "ok") == 1
    for reason in ("no_certificate", "bad_certificate", "protocol", "client_gone"):
        assert counted("failed", reason) == 1, reason
