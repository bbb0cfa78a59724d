"""The dates of what a bridge's file names: in its metrics, its status, its readiness, its log."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from provider_proxy.common.dates import Calendar, Dated
from provider_proxy.host import pki
from provider_proxy.tenant.bridge.admin import Admin
from provider_proxy.tenant.bridge.agents import HostAgent
from provider_proxy.tenant.bridge.keys import BridgeKeys, make_keys, parse_keys
from provider_proxy.tenant.bridge.metrics import BridgeMetrics
from provider_proxy.tenant.watch.config import parse_watch_config
from provider_proxy.tenant.watch.http_server import Asked
from provider_proxy.tenant.watch.preflight import read_dates

NOW = datetime.now(UTC)


class NoHosts:
    """A bridge without hosts, and with dates."""

    def __init__(self, dates: tuple[Dated, ...]) -> None:
        self.agents: Mapping[str, HostAgent] = {}
        self.metrics = BridgeMetrics()
        self.calendar = Calendar(dates, show=self.metrics.show_dates)
        self.keys: BridgeKeys = parse_keys(make_keys("127.0.0.1"), Path("keys.pem"))


def dates_of_a_bridge(folder: Path, made: datetime) -> tuple[Dated, ...]:
    """As its file gives them, where the verifier's CA was made then."""
    ca = folder / "ca.crt"
    ca.write_bytes(pki.pem(pki.new_authority(made).certificate))
    values = {
        "bridge": {"registrar": "mine", "client_ca": str(ca)},
        "registrars": {"mine": {"url": "http://127.0.0.1:8890", "insecure_no_ek": True}},
        "hosts": {"h": {"provider_ip": "192.0.2.1", "insecure_plaintext": False}},
    }
    return read_dates(parse_watch_config(values, for_bridge=True))


async def ask(bridge: NoHosts, path: str) -> tuple[int, str]:
    asked = Asked(method="GET", target=path, host="127.0.0.1", body=b"")
    answer = await Admin(bridge).answer(asked)
    return answer.status, answer.body.decode()


@pytest.mark.parametrize(("left", "state"), [(100, "good"), (3, "soon"), (-1, "expired")])
async def test_the_verifier_s_ca(
    tmp_path: Path, left: int, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    dates = dates_of_a_bridge(tmp_path, NOW - timedelta(days=pki.CA_DAYS - left))
    bridge = NoHosts(dates)
    status, text = await ask(bridge, "/readyz")
    assert status == (503 if state == "expired" else 200)
    _, body = await ask(bridge, "/status")
    values = json.loads(body)
    assert [each["state"] for each in values["dates"]] == [state]
    assert values["ready"] is (state != "expired")
    _, metrics = await ask(bridge, "/metrics")
    shown = re.search(r'not_after_seconds\{what="bridge.client_ca"\} (\S+)', metrics)
    assert shown is not None
    assert float(shown[1]) == dates[0].not_after.timestamp()
    with caplog.at_level(logging.WARNING):
        bridge.calendar.warn()
    logged = caplog.text
    if state == "good":
        assert logged == ""
    else:
        assert "bridge.client_ca: " in logged
        assert "no verifier can poll an agent" in logged
    if state == "expired":
        assert text.startswith("bridge.client_ca: ")
        assert values["why"] == text.strip()
