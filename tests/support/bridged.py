"""A bridge's agent over a fake proxy, asked as Keylime asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio
from watch_helpers import Rig

from provider_proxy.tenant.bridge import api
from provider_proxy.tenant.bridge.agent import Agent
from provider_proxy.tenant.bridge.keys import BridgeKeys, make_keys, parse_keys
from provider_proxy.tenant.bridge.metrics import BridgeMetrics
from provider_proxy.tenant.watch.http_server import Asked
from provider_proxy.tenant.watch.questions import HostQuestions

NONCE = "abcdefghij0123456789"


class Bridged:
    """An agent that is asked as Keylime asks."""

    def __init__(self, rig: Rig, keys: BridgeKeys, **options: Any) -> None:
        setting = rig.setting(**{"insecure_any_state": False, **options.pop("rules", {})})
        questions = HostQuestions("h", setting, rig.store, budget=rig.budget, judged_elsewhere=True)
        self.rig = rig
        self.metrics = BridgeMetrics()
        self.agent = Agent(
            "h", questions, keys, self.metrics, **{"hold_s": 3.0, "now": lambda: 1e9, **options}
        )

    async def get(self, target: str, method: str = "GET") -> tuple[int, str, dict[str, Any]]:
        asked = Asked(method=method, target=target, host="x", body=b"")
        made = await api.answer(self.agent, asked)
        values = json.loads(made.body)
        assert values["code"] == made.status
        return made.status, values["status"], values["results"]

    async def poll(self, mask: int = 1, entry: int = 0, nonce: str = NONCE) -> dict[str, Any]:
        target = (
            f"/v2.6/quotes/integrity?nonce={nonce}&mask={mask:#x}&partial=1&ima_ml_entry={entry}"
        )
        status, said, results = await self.get(target)
        assert status == 200, said
        return results


def bridge_keys() -> BridgeKeys:
    """A bridge's keys; making them takes seconds."""
    return parse_keys(make_keys("127.0.0.1"), Path("keys.pem"))


async def bridged_in(
    nursery: trio.Nursery, directory: Path, keys: BridgeKeys, **options: Any
) -> Bridged:
    """An agent that runs, over a `Rig` of its own where `options` give none."""
    rig = options.pop("rig", None)
    if rig is None:
        rig = Rig(directory)
        rig.proxy.serve_in(nursery)
    made = Bridged(rig, keys, **options)
    await nursery.start(made.agent.run)
    return made
