"""The bridge's admin listener, on loopback: health, readiness, metrics, and the status of each host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from provider_proxy.common.addresses import is_loopback
from provider_proxy.common.dates import Calendar
from provider_proxy.evidence.wire import encode_envelope
from provider_proxy.tenant.bridge.agents import HostAgent
from provider_proxy.tenant.bridge.keys import BridgeKeys
from provider_proxy.tenant.bridge.metrics import BridgeMetrics
from provider_proxy.tenant.watch.http_server import Answer, Asked
from provider_proxy.trust.registration.state import GOOD

METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
TEXT = b"text/plain; charset=utf-8"


class Shown(Protocol):
    """What is shown: `Bridge`."""

    @property
    def agents(self) -> Mapping[str, HostAgent]: ...
    @property
    def metrics(self) -> BridgeMetrics: ...
    @property
    def keys(self) -> BridgeKeys: ...
    @property
    def calendar(self) -> Calendar: ...


class Admin:
    """Answers of the listener."""

    def __init__(self, bridge: Shown) -> None:
        self._bridge = bridge

    async def answer(self, asked: Asked) -> Answer:
        """One answer. A request under another host name (DNS rebinding) is refused (ADR 0009)."""
        if not is_loopback(_host(asked.host)):
            return Answer(
                status=421, body=encode_envelope(421, "use a loopback address in the URL", {})
            )
        if asked.method != "GET":
            return Answer(status=405, body=encode_envelope(405, "only GET is allowed here", {}))
        match asked.target:
            case "/healthz":
                return Answer(status=200, body=b"ok\n", content_type=TEXT)
            case "/readyz":
                why = why_not_ready(self._bridge)
                text = (why or "ready") + "\n"
                return Answer(
                    status=503 if why else 200, body=text.encode("utf-8"), content_type=TEXT
                )
            case "/metrics":
                body = self._bridge.metrics.text()
                return Answer(status=200, body=body, content_type=METRICS_TYPE)
            case "/status":
                return Answer(status=200, body=json.dumps(status(self._bridge)).encode("ascii"))
        return Answer(status=404, body=encode_envelope(404, "no such path", {}))


def _host(header: str) -> str:
    name, _, port = header.rpartition(":")
    return (name if port.isdecimal() and name else header).strip("[]")


def not_ready(agents: Mapping[str, HostAgent]) -> list[str]:
    """Hosts whose agent does not listen or is not registered."""
    return [
        name
        for name, each in agents.items()
        if each.registration.status.state not in GOOD or not each.is_listening
    ]


def why_not_ready(bridge: Shown) -> str | None:
    """Why verifiers cannot poll every host; None while they can."""
    waiting = not_ready(bridge.agents)
    return bridge.calendar.not_ready() or (
        f"waiting for {', '.join(waiting[:20])}" if waiting else None
    )


def status(bridge: Shown) -> dict[str, object]:
    """All of it, as `bridge status --json` prints it."""
    hosts = {}
    for name, each in bridge.agents.items():
        standing, registration = each.agent.standing, each.registration.status
        posted = None if each.pusher is None else each.pusher.posted
        hosts[name] = {
            "agent_id": each.agent.agent_id,
            "mode": "pull" if posted is None else "push",
            "port": each.port,
            "listening": each.is_listening,
            "registered": registration.state.value,
            "registrar_error": registration.last_error,
            "polls": standing.polls,
            "last": standing.result,
            "reason": standing.reason,
            "last_at": standing.at,
            "good_at": standing.good_at,
            "verdict": None if posted is None else posted.verdict,
            "push_error": None if posted is None else posted.error,
        }
    return {
        "ready": why_not_ready(bridge) is None,
        "why": why_not_ready(bridge),
        "dates": bridge.calendar.values(),
        "hosts": hosts,
    }
