"""A batcher over a threadless fake quoter, and tenants that ask it."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
from helpers import FakeQuoter

from provider_proxy.errors import (
    ProviderProxyError,
)
from provider_proxy.evidence.model import (
    HashAlg,
    Nonce,
    PcrMask,
    QuoteRequest,
    Tenant,
    mask_of,
)
from provider_proxy.host.batching.batch import Answer
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.config.tables import DEFAULT_ISOLATED
from provider_proxy.host.metrics import Metrics

ISOLATED = mask_of(DEFAULT_ISOLATED)
ALL = 0xFFFFFF
WINDOW_S = 0.05
QUOTE_S = 0.2
_numbers = iter(range(1, 1 << 40))


async def inline(function: Callable[..., Any], *args: Any) -> Any:
    """Instead of a worker thread, which the mock clock does not see."""
    await trio.lowlevel.checkpoint()
    return function(*args)


def make_request(mask: int = 1, bank: HashAlg = HashAlg.SHA256, **more: Any) -> QuoteRequest:
    nonce = Nonce(b"nonce-%016d" % next(_numbers))
    return QuoteRequest(nonce=nonce, mask=PcrMask(mask), bank=bank, **more)


def tenant(name: str = "t", pcr_allow: int = ALL) -> Tenant:
    return Tenant(name=name, pcr_allow=pcr_allow)


@asynccontextmanager
async def running(
    quoter: FakeQuoter, *, metrics: Metrics | None = None, **settings: Any
) -> AsyncIterator[Batcher]:
    extra = {key: settings.pop(key) for key in ("claims", "logs", "observe") if key in settings}
    batcher = Batcher(
        quoter,
        BatchSettings(**{"isolate_mask": ISOLATED, "window_s": WINDOW_S, **settings}),
        metrics or Metrics(),
        in_worker=inline,
        **extra,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batcher.run)
        await trio.testing.wait_all_tasks_blocked()
        yield batcher
        nursery.cancel_scope.cancel()


class Asker:
    """Submits requests in the background and notes what came, and when."""

    def __init__(self, batcher: Batcher, nursery: trio.Nursery) -> None:
        self._batcher = batcher
        self._nursery = nursery
        self.answers: dict[QuoteRequest, Answer] = {}
        self.errors: dict[QuoteRequest, ProviderProxyError] = {}
        self.times: dict[QuoteRequest, float] = {}

    async def _submit(self, request: QuoteRequest, who: Tenant, **more: Any) -> None:
        try:
            self.answers[request] = await self._batcher.submit(
                request, who, **{"timeout_s": 60.0, **more}
            )
        except ProviderProxyError as exc:
            self.errors[request] = exc
        self.times[request] = trio.current_time()

    async def ask(
        self, request: QuoteRequest | None = None, who: Tenant | None = None, **more: Any
    ) -> QuoteRequest:
        request = request or make_request()
        self._nursery.start_soon(
            functools.partial(self._submit, request, who or tenant(f"t{next(_numbers)}"), **more)
        )
        await trio.testing.wait_all_tasks_blocked()
        return request
