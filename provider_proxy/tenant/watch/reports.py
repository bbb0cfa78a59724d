"""Reports changes: JSON lines on stdout, a signed webhook, a command.

Each receiver has its own queue and task, so that a slow receiver delays neither the watching nor the
others. Queues are bounded; reports that do not fit or that a receiver did not accept are counted and
logged. Reports contain no nonces and no secrets; text from a proxy in them is short and printable.

A webhook's signature is `v1=` and the hex of HMAC-SHA256 over timestamp, ".", and body, under the
shared secret. A receiver should refuse an old timestamp, and accept an `id` once.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import random
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import httpx
import trio

from provider_proxy.common.failures import why
from provider_proxy.common.files import read_secret
from provider_proxy.common.http import NO_ANSWER, http_client
from provider_proxy.common.tls import TlsFiles, client_context
from provider_proxy.errors import HostError
from provider_proxy.tenant.watch.metrics import WatchMetrics
from provider_proxy.tenant.watch.states import State, retry_wait_s
from provider_proxy.tenant.watch.tables import Command, WatchConfig, Webhook

log = logging.getLogger(__name__)

MAX_QUEUED = 10_000  # about 5 MB; a whole fleet failing at once fits
MIN_SECRET_BYTES = 16
MAX_BACKOFF_S = 300.0
DELIVERY_LIMIT_S = 3600.0  # of one report, including tries and waits
MAX_POSTS_AT_ONCE = 8
DRAIN_LIMIT_S = 5.0  # at the end, for what is still queued
TIMESTAMP_HEADER = "X-Provider-Proxy-Timestamp"
SIGNATURE_HEADER = "X-Provider-Proxy-Signature"
COMMAND_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

Report = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a round.

    Attributes:
        error: the class of the error; None where the host is trusted.
    """

    state: State
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The end of a host's round.

    Attributes:
        reason: the error, in words.
        good_for_s: how long the verdict may be shown, in seconds, if no other follows.
        report: set if the verdict differs from the one before.
    """

    host: str
    verdict: Verdict
    reason: str | None
    good_for_s: float
    report: Report | None


class Sink(Protocol):
    """A receiver of reports.

    Attributes:
        at_once: how many deliveries may run at the same time.
        together: how many reports one delivery may have, a line each.
    """

    name: str
    at_once: int
    together: int

    async def deliver(self, body: bytes) -> bool:
        """True if the report was delivered; False if it was dropped. Raises: HostError."""
        ...


class Reporter:
    """Gives reports to every sink.

    Args:
        sinks: the receivers; may be empty.
    """

    def __init__(self, sinks: Sequence[Sink], metrics: WatchMetrics) -> None:
        self._metrics = metrics
        self._ways: list[
            tuple[Sink, trio.MemorySendChannel[bytes], trio.MemoryReceiveChannel[bytes]]
        ] = [(sink, *trio.open_memory_channel[bytes](MAX_QUEUED)) for sink in sinks]

    def tell(self, report: Report) -> None:
        """Queue a report; never waits."""
        self.tell_body(json.dumps(report, separators=(",", ":")).encode("ascii"))

    def tell_body(self, body: bytes) -> None:
        """Queue a report that is written already; never waits."""
        for sink, send, _ in self._ways:
            try:
                send.send_nowait(body)
            except trio.WouldBlock:
                self._metrics.reports.labels(sink.name, "dropped").inc()
                log.error(
                    "a report was dropped: %d are already waiting for %s", MAX_QUEUED, sink.name
                )

    def settled(self, settled: Settled) -> None:
        """Queue a round's report, if it has one."""
        if settled.report is not None:
            self.tell(settled.report)

    async def run(self) -> None:
        """Deliver, until `close` was called and every queue is empty.

        Raises:
            HostError: a sink can never work again.
        """
        async with trio.open_nursery() as nursery:
            for sink, _, receive in self._ways:
                for _ in range(sink.at_once):
                    nursery.start_soon(self._work, sink, receive.clone())
                receive.close()

    def close(self) -> None:
        """Accept no more reports."""
        for _, send, _ in self._ways:
            send.close()

    async def _work(self, sink: Sink, receive: trio.MemoryReceiveChannel[bytes]) -> None:
        async with receive:
            async for body in receive:
                bodies = [body]
                with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                    while len(bodies) < sink.together:
                        bodies.append(receive.receive_nowait())
                good = await sink.deliver(b"\n".join(bodies))
                outcome = "delivered" if good else "failed"
                self._metrics.reports.labels(sink.name, outcome).inc(len(bodies))


class LineSink:
    """JSON lines on a file descriptor's stream. A reader that stalls delays only this sink.

    Args:
        write: writes and flushes; runs in a thread.
    """

    name = "stdout"
    at_once = 1  # lines keep their order
    together = 1000  # one thread call for each line would be slow for a whole fleet

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    async def deliver(self, body: bytes) -> bool:
        """Raises: HostError if stdout was closed."""
        try:
            await trio.to_thread.run_sync(self._write, body + b"\n", abandon_on_cancel=True)
        except (OSError, ValueError) as exc:
            raise HostError("cannot write to stdout: it was closed") from exc
        return True


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """The value of the signature header."""
    mac = hmac.new(secret, timestamp.encode("ascii") + b"." + body, hashlib.sha256)
    return "v1=" + mac.hexdigest()


class WebhookSink:
    """Posts reports, signed, with retries.

    Args:
        http: the caller's client; the caller closes it.
        secret: at least `MIN_SECRET_BYTES`.
        now: seconds since the epoch.
    """

    name = "webhook"
    at_once = MAX_POSTS_AT_ONCE
    together = 1

    def __init__(
        self,
        settings: Webhook,
        http: httpx.AsyncClient,
        secret: bytes,
        *,
        now: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        assert settings.url is not None
        self._url = settings.url
        self._settings = settings
        self._http = http
        self._secret = secret
        self._now = now
        self._rng = rng or random.Random()  # noqa: S311  # spreads retries; no secret

    async def deliver(self, body: bytes) -> bool:
        """Post until the receiver answers 2xx, or the tries or the time are used up.

        Never raises because of a receiver.
        """
        with trio.move_on_after(DELIVERY_LIMIT_S):
            return await self._deliver(body)
        log.error("webhook: a report was dropped: not delivered within %g s", DELIVERY_LIMIT_S)
        return False

    async def _deliver(self, body: bytes) -> bool:
        problem = ""
        for attempt in range(1, self._settings.max_tries + 1):
            problem = await self._post(body)
            if not problem:
                return True
            if attempt < self._settings.max_tries:
                await trio.sleep(
                    retry_wait_s(
                        attempt,
                        base_s=self._settings.retry_interval_s,
                        longest_s=MAX_BACKOFF_S,
                        retry_after_s=None,
                        rng=self._rng,
                    )
                )
        log.error("webhook: a report was dropped: %s", problem)
        return False

    async def _post(self, body: bytes) -> str:
        """Why it was not delivered; empty if it was."""
        timestamp = str(int(self._now()))
        headers = {
            "Content-Type": "application/json",
            TIMESTAMP_HEADER: timestamp,
            SIGNATURE_HEADER: sign(self._secret, timestamp, body),
        }
        try:
            with trio.fail_after(self._settings.timeout_s):
                # The answer's body is not read: it is not needed, and has no bound.
                async with self._http.stream(
                    "POST", self._url, content=body, headers=headers
                ) as response:
                    return "" if response.is_success else f"it answered {response.status_code}"
        except trio.TooSlowError:
            return f"no answer within {self._settings.timeout_s:g} s"
        except NO_ANSWER as exc:
            return f"it gave no answer: {why(exc)}"


def webhook_secret(settings: Webhook) -> bytes:
    """Read the secret. Raises: HostError where it is missing, too short, or open to others."""
    secret = read_secret("webhook.secret_file", settings.secret_file)
    if len(secret) < MIN_SECRET_BYTES:
        raise HostError(
            f"webhook.secret_file: the secret must have at least {MIN_SECRET_BYTES} bytes"
        )
    return secret


def webhook_client(settings: Webhook) -> httpx.AsyncClient:
    """A client for the webhook. Raises: HostError where its CA is not a PEM file."""
    files = TlsFiles(ca=settings.ca, names=("webhook.ca", "", ""))
    return http_client(
        client_context(files), read_limit_s=settings.timeout_s, tls_name=settings.tls_name
    )


class CommandSink:
    """Starts a program for each report, without a shell, the report on its stdin.

    Args:
        run: `trio.run_process`, or a test's substitute.
    """

    name = "command"
    together = 1

    def __init__(
        self,
        settings: Command,
        *,
        run: Callable[..., Awaitable[subprocess.CompletedProcess[bytes]]] = trio.run_process,
    ) -> None:
        self._settings = settings
        self._run = run
        self.at_once = settings.max_running

    async def deliver(self, body: bytes) -> bool:
        """Run it, for at most `timeout_s`. Never raises because of the program."""
        with trio.move_on_after(self._settings.timeout_s) as scope:
            try:
                done = await self._run(
                    self._settings.argv,
                    stdin=body + b"\n",
                    stdout=subprocess.DEVNULL,
                    check=False,
                    env=COMMAND_ENV,
                )
            except OSError as exc:
                log.error("command: cannot start %s: %s", self._settings.argv[0], exc.strerror)
                return False
            if done.returncode != 0:
                log.error("command: %s ended with %d", self._settings.argv[0], done.returncode)
            return done.returncode == 0
        if scope.cancelled_caught:
            log.error(
                "command: %s took more than %g s", self._settings.argv[0], self._settings.timeout_s
            )
        return False


async def open_sinks(
    stack: AsyncExitStack,
    config: WatchConfig,
    write: Callable[[bytes], object] | None,
    *,
    rng: random.Random,
) -> Sequence[Sink]:
    """The receivers that a configuration names.

    Args:
        stack: closes them.
        write: for JSON lines; None for no output.

    Raises:
        HostError: the webhook's secret or CA is wrong.
    """
    sinks: list[Sink] = []
    if write is not None:
        sinks.append(LineSink(write))
    if config.webhook.url is not None:
        secret = webhook_secret(config.webhook)
        client = await stack.enter_async_context(webhook_client(config.webhook))
        sinks.append(WebhookSink(config.webhook, client, secret, rng=rng))
    if config.command.argv:
        sinks.append(CommandSink(config.command))
    return sinks
