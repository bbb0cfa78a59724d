"""The bridge's own part of a poll: verify, judge, sign and encode an answer that is in memory."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import trio

from provider_proxy.bench.soft_host import SoftHost
from provider_proxy.evidence.model import TrustedHost
from provider_proxy.tenant.bridge import api
from provider_proxy.tenant.bridge.agent import Agent
from provider_proxy.tenant.bridge.keys import make_keys, parse_keys
from provider_proxy.tenant.bridge.metrics import BridgeMetrics
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.http import Endpoint
from provider_proxy.tenant.watch.http_server import Asked
from provider_proxy.tenant.watch.questions import HostQuestions, Setting, Trust
from provider_proxy.tenant.watch.store import StateStore
from provider_proxy.tenant.watch.tables import HostRules

POLLS = 400
TARGET = "/v2.6/quotes/integrity?nonce=abcdefghij0123456789&mask=0xff&partial=1&ima_ml_entry=0"


class _Host:
    """A host's proxy in memory; counts the time that it takes."""

    def __init__(self) -> None:
        self.soft = SoftHost()
        self.spent_s = 0.0

    async def trusted(self, name: str, rules: HostRules, ask_host: object = None) -> Trust:
        return Trust(host=TrustedHost(ak=self.soft.tpm.ak, label=name))

    async def get(self, target: str, limit: int, room: object) -> bytes:
        began = time.perf_counter()
        body = self.soft.answer(target)
        self.spent_s += time.perf_counter() - began
        await trio.lowlevel.checkpoint()
        return body

    async def aclose(self) -> None:
        """Nothing is open."""


def measure() -> Mapping[str, object]:
    """`own_ms_p50` and its spread."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        took_ms = trio.run(_polls, Path(name))
    took_ms.sort()
    return {
        "own_ms_p50": round(statistics.median(took_ms), 3),
        "own_ms_p10_p90": [
            round(took_ms[len(took_ms) // 10], 3),
            round(took_ms[-len(took_ms) // 10], 3),
        ],
    }


async def _polls(directory: Path) -> list[float]:
    host = _Host()
    endpoint = Endpoint(host="192.0.2.1", port=1, context=None, server_name="x")
    setting = Setting(
        rules=HostRules(provider_ip="192.0.2.1"), files=PolicyFiles(), aks=host, endpoint=endpoint
    )
    questions = HostQuestions(
        "h", setting, StateStore(directory), budget=Budget(), judged_elsewhere=True
    )
    questions._connection = host  # type: ignore[assignment]
    keys = parse_keys(make_keys("127.0.0.1"), directory)
    agent = Agent("h", questions, keys, BridgeMetrics(), hold_s=10.0)
    took_ms = []
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        asked = partial(Asked, method="GET", target=TARGET, host="x", body=b"")
        for _ in range(POLLS):
            host.spent_s = 0.0
            began = time.perf_counter()
            made = await api.answer(agent, asked())
            took_ms.append((time.perf_counter() - began - host.spent_s) * 1000)
            assert "quote" in json.loads(made.body)["results"], made.body
        nursery.cancel_scope.cancel()
    return took_ms
