"""Statuses for tests of what shows them, made by the real `StatusBoard` over batches that never were."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import trio
from helpers import LIMIT_S, server_on_port

from provider_proxy.errors import ProviderProxyError, QuoteError
from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, QuoteRequest, Tenant
from provider_proxy.host.api.admin import AdminApi
from provider_proxy.host.batching.batch import Batch, SealedBy, Waiter
from provider_proxy.host.batching.batcher import Queue
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.config.tables import BatchTable, Config, Listen
from provider_proxy.host.http.server import HttpServer
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.status.board import StatusBoard
from provider_proxy.host.status.recent import Recent
from provider_proxy.host.tpm.state import ChipState

NONCE = "nonce-that-must-not-be-shown"
TENANT = Tenant(name="acme", pcr_allow=0xFFFFFF)
HOST = {"uuid": "0ddba11c-0ffe-4bad-8bad-00000c0ffee0", "ak_name": "000b" + "5c" * 32}
HANDSHAKE_FAILURES = (
    "timeout",
    "crowded_out",
    "client_gone",
    "no_certificate",
    "bad_certificate",
    "protocol",
)
HOSTILE = "<img src=x onerror=alert(1)> \x1b[31mred\x1b[0m\n<6>batch=1"
CHIP = ChipState(expected_s=0.188, pause_s=0.188, duty=0.31)
TROUBLED = dataclasses.replace(CHIP, trouble="the TPM is out of order", in_flight_s=6.0)


def make_batch(
    number: int,
    *,
    leaves: int = 3,
    opened: float = 0.0,
    wait_s: float = 0.05,
    quote_s: float = 0.188,
    by: SealedBy = SealedBy.WINDOW,
    error: ProviderProxyError | None = None,
    mask: int = 0xFF,
) -> Batch:
    """A batch that is over."""
    request = QuoteRequest(nonce=Nonce(NONCE.encode()), mask=PcrMask(mask))
    waiters = [
        Waiter(request, TENANT, (HashAlg.SHA256, 0, 0), opened, opened + 30, None)
        for _ in range(leaves)
    ]
    size = 1 << max(1, (leaves - 1).bit_length())
    batch = Batch(number, HashAlg.SHA256, waiters, opened, opened + wait_s, by)
    batch.quote_s, batch.size = quote_s, size
    if error is not None:
        batch.refuse(error)
    return batch


def make_board(
    recent: Recent,
    *,
    chip: ChipState = CHIP,
    queue: Queue | None = None,
    metrics: Metrics | None = None,
    draining: bool = False,
    software: bool = False,
    max_duty: float = 0.5,
) -> StatusBoard:
    config = Config(
        listen=Listen(insecure_plaintext=True), batch=BatchTable(), tpm=Tpm(max_duty=max_duty)
    )
    return StatusBoard(
        config,
        lambda: chip,
        lambda: queue or Queue(waiting=0, lines=0, oldest_s=0.0),
        recent,
        metrics or Metrics(),
        draining=lambda: draining,
        host={**HOST, "software": software},
        program="0.1.0",
    )


class Past:
    """Batches one after the other, remembered by a `Recent`; the last one ends now.

    Args:
        seconds: how long all of it took.
    """

    def __init__(self, seconds: float) -> None:
        self._now = 0.0
        self._begin = time.time() - seconds
        self.recent = Recent(clock=lambda: self._begin + self._now, monotonic=lambda: self._now)

    def add(self, batch: Batch) -> None:
        self._now = batch.sealed + batch.quote_s
        self.recent.batch_done(batch)


def make_past(count: int, *, seed: int = 1, load: float = 40.0, rest_s: float = 0.188) -> Recent:
    """So many batches of a loaded chip.

    Args:
        load: requests a second, more or less.
    """
    dice = random.Random(seed)
    lengths = []
    now = 0.0
    for _ in range(count):
        wait = 0.05 + rest_s * dice.uniform(0.85, 1.15) * (dice.random() < 0.9)
        quote = 0.188 * dice.uniform(0.97, 1.05)
        lengths.append((now, wait, quote))
        now += wait + quote
    past = Past(now)
    for number, (opened, wait, quote) in enumerate(lengths, 1):
        leaves = max(1, round(load * (wait + quote) * dice.uniform(0.6, 1.5)))
        by = SealedBy.CHIP if wait > 0.06 else SealedBy.WINDOW
        error = QuoteError("the TPM gave no quote") if number == count - 17 else None
        if error is not None:
            error.__cause__ = QuoteError(
                "TPM2_Quote: TPM_RC_RETRY (0x922), tried until the deadline"
            )
        past.add(
            make_batch(
                4000 + number,
                leaves=leaves,
                opened=opened,
                wait_s=wait,
                quote_s=quote,
                by=by,
                error=error,
                mask=0x8FF if number % 5 else 0xFF,
            )
        )
    return past.recent


def count_crowd(recent: Recent) -> None:
    """Some tenants, one of them with a name that means harm."""
    for name, answered, refused in (
        ("acme", 1840, {}),
        ("globex", 912, {"TenantLimitError": 318, "ParameterError": 2}),
        ("spiffe://example.org/verifier/initech", 204, {"OverloadedError": 4}),
        ("uid:1000", 17, {}),
        (HOSTILE, 1, {"ParameterError": 1}),
    ):
        for reason, count in {"ok": answered, **refused}.items():
            for _ in range(count):
                recent.count(name, reason)


class Site:
    """An admin server in a thread of its own; what it says is put into `status`.

    Attributes:
        url: of the page.
    """

    def __init__(self) -> None:
        self.status: Callable[[], Mapping[str, object]] = dict
        self.url = ""
        self._started = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))
        self._thread.start()
        assert self._started.wait(LIMIT_S)

    async def _serve(self) -> None:
        server = HttpServer(
            AdminApi(Metrics(), lambda: None, lambda: self.status()),
            observe=lambda status, reason: None,
        )
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with server_on_port(server) as address:
                self.url = f"http://{address}/"
                self._started.set()
                await trio.sleep_forever()

    def close(self) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(LIMIT_S)
        self._token = None


def busy(**more: Any) -> dict[str, Any]:
    recent = make_past(60)
    count_crowd(recent)
    queue = Queue(waiting=14, lines=2, oldest_s=0.131)
    return make_board(recent, queue=queue, **more).results()


def address_of(site: Site) -> str:
    return site.url.removeprefix("http://").rstrip("/")
