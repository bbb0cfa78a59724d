"""A bridge's alert rules and its dashboard: what they name exists, each rule fires when it should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_helpers import read
from monitoring import (
    check_alerts,
    check_dashboard,
    check_names,
    check_panels,
    needs_promtool,
    promtool,
    series,
)
from places import DOCS

from provider_proxy.tenant.bridge.metrics import BridgeMetrics

RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load(read("docs/bridge-alerts.yml"))["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads(read("docs/bridge-dashboard.json"))
TARGETS = [(p["title"], t["expr"]) for p in DASHBOARD["panels"] for t in p.get("targets", ())]
SERIES = series(BridgeMetrics().registry)
PREFIX = "provider_proxy_bridge_"
JOB = {"job": "provider-proxy"}
FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "ProviderProxyBridgeDown": ({"up": "1x120"}, {"instance": ""}),
    "ProviderProxyBridgeHostRefused": (
        {f'{PREFIX}polls_total{{result="refused"}}': "0x110 1x10"},
        {},
    ),
    "ProviderProxyBridgeHostSilent": (
        {
            f'{PREFIX}host_verified_timestamp_seconds{{host="h"}}': "6000x120",
            f'{PREFIX}host_good{{host="h"}}': "0x120",
        },
        {**JOB, "host": "h"},
    ),
    "ProviderProxyBridgeFault": ({f'{PREFIX}polls_total{{result="fault"}}': "0+1x120"}, {}),
    "ProviderProxyBridgeNotRegistered": (
        {f'{PREFIX}registrations{{state="conflict"}}': "1x120"},
        {},
    ),
    "ProviderProxyBridgeStateNotSaved": ({f"{PREFIX}save_failures_total": "0x100 1x20"}, JOB),
}
# All of these at once, and nothing fires: a bridge that is well.
WELL = {
    f"{PREFIX}listening": "1x120",
    f'{PREFIX}polls_total{{result="good"}}': "0+30x120",
    f'{PREFIX}polls_total{{result="no answer"}}': "0+1x120",
    f'{PREFIX}polls_total{{result="refused"}}': "1x120",
    f'{PREFIX}polls_total{{result="fault"}}': "1x120",
    # The host was asked long ago, and well: a verifier that has stopped does not make a host silent.
    f'{PREFIX}host_verified_timestamp_seconds{{host="h"}}': "6000x120",
    f'{PREFIX}host_good{{host="h"}}': "1x120",
    f'{PREFIX}registrations{{state="registered"}}': "5x120",
    f'{PREFIX}registrations{{state="conflict"}}': "0x120",
    f"{PREFIX}save_failures_total": "0x120",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_names_metrics_that_exist_and_is_explained(rule: dict[str, Any]) -> None:
    check_names(rule["expr"], SERIES)
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["runbook"] == f"docs/bridge.md#{rule['alert'].lower()}"


def test_each_rule_has_a_section_and_no_more() -> None:
    listed = re.findall(r"^### (ProviderProxy\w+)$", read("docs/bridge.md"), re.MULTILINE)
    assert sorted(listed) == sorted(rule["alert"] for rule in RULES)


def test_a_first_refusal_is_an_increase() -> None:
    """Prometheus sees no increase in a series that begins at 1."""
    text = BridgeMetrics().text().decode()
    for result in ("good", "refused", "no answer", "fault"):
        assert f'{PREFIX}polls_total{{result="{result}"}} 0.0' in text


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", DOCS / "bridge-alerts.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


@needs_promtool
def test_each_alert_fires_and_none_without_cause(tmp_path: Path) -> None:
    assert set(FIRES) == {rule["alert"] for rule in RULES}
    check_alerts(tmp_path, DOCS / "bridge-alerts.yml", RULES, FIRES, WELL)


@pytest.mark.parametrize(("title", "expr"), TARGETS)
def test_a_panel_asks_for_metrics_that_exist(title: str, expr: str) -> None:
    check_names(expr, SERIES)


def test_the_dashboard_can_be_imported() -> None:
    assert DASHBOARD["title"] == "provider-proxy bridge"
    check_dashboard(DASHBOARD)


@needs_promtool
def test_promtool_can_read_each_panel_s_question(tmp_path: Path) -> None:
    check_panels(tmp_path, TARGETS)
