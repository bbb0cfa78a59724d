"""Reports: the signed webhook and its retries, commands, lines, queues; and the metrics' file."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from docs_helpers import code, rows

from provider_proxy.common.files import write_public
from provider_proxy.errors import HostError
from provider_proxy.tenant.watch import reports
from provider_proxy.tenant.watch.metrics import WatchMetrics
from provider_proxy.tenant.watch.reports import (
    DELIVERY_LIMIT_S,
    CommandSink,
    LineSink,
    Reporter,
    Sink,
    WebhookSink,
    sign,
    webhook_secret,
)
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.tables import Command, Webhook

SECRET = b"0123456789abcdef0123"
URL = "https://alerts.example/hosts"
Handler = Callable[[httpx.Request], httpx.Response]


def webhook(handler: Handler, **settings: Any) -> tuple[WebhookSink, httpx.AsyncClient]:
    http = httpx.AsyncClient(transport=httpx.MockTransport(handler))
    made = Webhook(url=URL, secret_file=Path("x"), **settings)
    return WebhookSink(made, http, SECRET, now=lambda: 1234.9, rng=random.Random(1)), http


def test_the_signature_is_the_documented_one() -> None:
    mac = hmac.new(SECRET, b'1234.{"a":1}', hashlib.sha256).hexdigest()
    assert sign(SECRET, "1234", b'{"a":1}') == f"v1={mac}"


async def test_a_report_is_posted_signed() -> None:
    seen: list[httpx.Request] = []

    def receive(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(204)

    sink, http = webhook(receive)
    async with http:
        assert await sink.deliver(b'{"id":"1"}')
    (request,) = seen
    assert (request.method, str(request.url)) == ("POST", URL)
    assert request.content == b'{"id":"1"}'
    assert request.headers["X-Provider-Proxy-Timestamp"] == "1234"
    assert request.headers["X-Provider-Proxy-Signature"] == sign(SECRET, "1234", request.content)
    assert SECRET.decode() not in str(request.headers)


async def test_a_receiver_that_fails_is_tried_again(autojump_clock: trio.abc.Clock) -> None:
    answers = iter([500, 302, None, 200])
    times: list[float] = []

    def receive(request: httpx.Request) -> httpx.Response:
        times.append(trio.current_time())
        status = next(answers)
        if status is None:
            raise httpx.ConnectError("no route")
        return httpx.Response(status, headers={"Location": "https://elsewhere.example/"})

    sink, http = webhook(receive)
    async with http:
        assert await sink.deliver(b"{}")
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]  # noqa: RUF007
    assert len(gaps) == 3
    assert all(2**n / 2 <= gap <= 2**n for n, gap in enumerate(gaps))


async def test_it_is_given_up_in_the_end(autojump_clock: trio.abc.Clock) -> None:
    sink, http = webhook(lambda request: httpx.Response(500), max_tries=3)
    async with http:
        assert not await sink.deliver(b"{}")


async def test_all_tries_of_a_report_have_one_deadline(
    autojump_clock: trio.abc.Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Each try may take two minutes, and there may be a hundred."""
    sink, http = webhook(lambda request: httpx.Response(500), max_tries=100)
    async with http:
        assert not await sink.deliver(b"{}")
    assert trio.current_time() == pytest.approx(DELIVERY_LIMIT_S)
    assert "not delivered within 3600 s" in caplog.text


async def test_a_receiver_that_hangs_is_left(autojump_clock: trio.abc.Clock) -> None:
    class Hanging(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await trio.sleep_forever()
            raise AssertionError

    settings = Webhook(url=URL, secret_file=Path("x"), timeout_s=2, max_tries=1)
    async with httpx.AsyncClient(transport=Hanging()) as http:
        sink = WebhookSink(settings, http, SECRET)
        before = trio.current_time()
        assert not await sink.deliver(b"{}")
    assert trio.current_time() - before == pytest.approx(2)


@pytest.mark.parametrize(
    ("data", "mode", "why"),
    [
        (SECRET, 0o644, "must not be readable by others"),
        (b"short", 0o600, "the secret must have at least 16 bytes"),
    ],
)
def test_a_bad_secret_is_refused(tmp_path: Path, data: bytes, mode: int, why: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(data)
    path.chmod(mode)
    with pytest.raises(HostError, match=why) as caught:
        webhook_secret(Webhook(url=URL, secret_file=path))
    assert data.decode() not in str(caught.value)


# --- commands -----------------------------------------------------------------------------------------


@pytest.mark.real
async def test_a_command_gets_the_report_on_stdin_and_no_shell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import os,sys,json; json.dump([sys.argv[1:], sys.stdin.read(), sorted(os.environ)],"
        f" open({str(out)!r}, 'w'))"
    )
    sink = CommandSink(Command(argv=(sys.executable, "-c", script, "$HOME; x")))
    assert await sink.deliver(b'{"id":"1"}')
    words, given, environment = json.loads(out.read_text())
    assert words == ["$HOME; x"]
    assert given == '{"id":"1"}\n'
    assert set(environment) <= {"PATH", "LC_CTYPE"}  # Python sets the second one itself


@pytest.mark.real
async def test_commands_that_fail_hang_or_are_missing(tmp_path: Path) -> None:
    assert not await CommandSink(Command(argv=("/bin/false",))).deliver(b"{}")
    assert not await CommandSink(Command(argv=(str(tmp_path / "none"),))).deliver(b"{}")
    with trio.fail_after(10):
        hanging = Command(argv=("/bin/sleep", "1000"), timeout_s=0.2)
        assert not await CommandSink(hanging).deliver(b"{}")


# --- the reporter -------------------------------------------------------------------------------------


class Slow:
    """Takes a second for each."""

    name = "slow"
    at_once = 1
    together = 1

    def __init__(self) -> None:
        self.got: list[bytes] = []

    async def deliver(self, body: bytes) -> bool:
        await trio.sleep(1)
        self.got.append(body)
        return True


class Quick(Slow):
    name = "quick"

    async def deliver(self, body: bytes) -> bool:
        await trio.lowlevel.checkpoint()
        self.got.append(body)
        return False


def outcomes(metrics: WatchMetrics, sink: str) -> dict[str, int]:
    return {
        sample.labels["outcome"]: int(sample.value)
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "provider_proxy_watch_reports_total" and sample.labels["sink"] == sink
    }


async def test_a_slow_sink_holds_up_no_other_and_loses_what_does_not_fit(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "MAX_QUEUED", 3)
    slow, quick, metrics = Slow(), Quick(), WatchMetrics()
    sinks: list[Sink] = [slow, quick]
    reporter = Reporter(sinks, metrics)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reporter.run)
        for number in range(8):
            reporter.tell({"n": number})
            await trio.sleep(0.01)
        assert len(quick.got) == 8
        reporter.close()
    assert slow.got == [b'{"n":%d}' % n for n in range(4)]  # one in hand, three in the queue
    assert outcomes(metrics, "slow") == {"delivered": 4, "dropped": 4}
    assert outcomes(metrics, "quick") == {"failed": 8}


async def test_stdout_that_is_gone_ends_the_watcher() -> None:
    def write(line: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(HostError):
        await LineSink(write).deliver(b"{}")


async def test_lines_are_lines_many_at_a_time() -> None:
    got: list[bytes] = []
    metrics = WatchMetrics()
    reporter = Reporter([LineSink(got.append)], metrics)
    for number in range(2500):
        reporter.tell({"n": number})
    reporter.close()
    await reporter.run()
    assert b"".join(got) == b"".join(b'{"n":%d}\n' % n for n in range(2500))
    assert len(got) == 3
    assert outcomes(metrics, "stdout") == {"delivered": 2500}


# --- metrics ------------------------------------------------------------------------------------------


def test_documented_metrics_are_the_code_s() -> None:
    kinds = {metric.name: metric for metric in WatchMetrics().registry.collect()}
    listed = rows("docs/watch.md", "Name", "Kind", "Meaning")
    assert {"provider_proxy_watch_" + code(row[0]): (row[1], row[2]) for row in listed} == {
        name: (metric.type, metric.documentation) for name, metric in kinds.items()
    }


def test_hosts_by_state_and_hosts_that_go() -> None:
    metrics = WatchMetrics()
    metrics.count_states([State.TRUSTED, State.TRUSTED, State.FAILED])
    metrics.host_trusted.labels("a").set(1)
    metrics.forget_host("a")
    metrics.forget_host("b")
    text = metrics.text().decode()
    assert 'provider_proxy_watch_hosts{state="TRUSTED"} 2.0' in text
    assert 'provider_proxy_watch_hosts{state="INVALID_QUOTE"} 0.0' in text
    assert 'host="a"' not in text


def test_the_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "watch.prom"
    write_public(path, b"a 1\n")
    before = path.stat().st_ino
    write_public(path, b"a 2\n")
    assert path.read_bytes() == b"a 2\n"
    assert path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) & 0o044
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(HostError):
        write_public(tmp_path / "none" / "x", b"")
