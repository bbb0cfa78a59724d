"""A fleet's alert rules and its dashboard: what they name exists, each rule fires when it should."""

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

from provider_proxy.tenant.fleet.metrics import FleetMetrics
from provider_proxy.tenant.watch.metrics import WatchMetrics

RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load(read("docs/fleet-alerts.yml"))["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads(read("docs/fleet-dashboard.json"))
TARGETS = [(p["title"], t["expr"]) for p in DASHBOARD["panels"] for t in p.get("targets", ())]
METRICS = WatchMetrics()
FleetMetrics(METRICS.registry)
SERIES = series(METRICS.registry)
PREFIX = "provider_proxy_fleet_"
JOB = {"job": "provider-proxy"}
FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "ProviderProxyFleetNobodyWatches": ({"up": "1x120"}, {"instance": ""}),
    "ProviderProxyFleetShardsFree": ({f"{PREFIX}free_shards": "0x110 3x10"}, JOB),
    "ProviderProxyFleetVerdictsTooOld": (
        {f'{PREFIX}hosts{{state="NOT_VERIFIED_SINCE"}}': "0x100 7x20"},
        {**JOB, "state": "NOT_VERIFIED_SINCE"},
    ),
    "ProviderProxyFleetDatabaseAway": ({f"{PREFIX}database_up": "1x110 0x10"}, JOB),
    "ProviderProxyFleetUnsaved": ({f"{PREFIX}unsaved_seconds": "0.2x110 60+60x10"}, JOB),
    "ProviderProxyFleetUnfenced": ({f"{PREFIX}unfenced_reports_total": "0x115 3x5"}, JOB),
    "ProviderProxyFleetReportsWait": ({f"{PREFIX}outbox_seconds": "0x90 60+60x30"}, JOB),
    "ProviderProxyFleetReportsLost": ({f"{PREFIX}lost_reports": "0x110 1x10"}, JOB),
    "ProviderProxyFleetRolledBack": ({f"{PREFIX}rolled_back_shards_total": "0x100 9x20"}, JOB),
}
# All of these at once, and nothing fires: a fleet that is well.
WELL = {
    f"{PREFIX}members": "2x120",
    f"{PREFIX}free_shards": "0x60 5x0 0x59",  # a takeover
    f'{PREFIX}hosts{{state="TRUSTED"}}': "1000x120",
    f'{PREFIX}hosts{{state="FAILED"}}': "3x120",  # the watcher's own reports tell of it
    f"{PREFIX}database_up": "1x119 0x0 1x0",
    f"{PREFIX}unsaved_seconds": "0.2x120",
    f"{PREFIX}unfenced_reports_total": "5x120",
    f"{PREFIX}outbox_seconds": "30x120",
    f"{PREFIX}lost_reports": "0x120",
    f"{PREFIX}rolled_back_shards_total": "0x120",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_names_metrics_that_exist_and_is_explained(rule: dict[str, Any]) -> None:
    check_names(rule["expr"], SERIES)
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["runbook"] == f"docs/fleet.md#{rule['alert'].lower()}"


def test_each_rule_has_a_section_and_no_more() -> None:
    listed = re.findall(r"^### (ProviderProxy\w+)$", read("docs/fleet.md"), re.MULTILINE)
    assert sorted(listed) == sorted(rule["alert"] for rule in RULES)


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", DOCS / "fleet-alerts.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


@needs_promtool
def test_each_alert_fires_and_none_without_cause(tmp_path: Path) -> None:
    assert set(FIRES) == {rule["alert"] for rule in RULES}
    check_alerts(tmp_path, DOCS / "fleet-alerts.yml", RULES, FIRES, WELL)


@pytest.mark.parametrize(("title", "expr"), TARGETS)
def test_a_panel_asks_for_metrics_that_exist(title: str, expr: str) -> None:
    check_names(expr, SERIES)


def test_the_dashboard_can_be_imported() -> None:
    assert DASHBOARD["title"] == "provider-proxy fleet"
    check_dashboard(DASHBOARD)


def test_every_metric_of_a_member_is_on_the_dashboard() -> None:
    shown = set(re.findall(rf"{PREFIX}\w+", json.dumps(TARGETS)))
    assert shown == {name for name in SERIES if name.startswith(PREFIX)}


@needs_promtool
def test_promtool_can_read_each_panel_s_question(tmp_path: Path) -> None:
    check_panels(tmp_path, TARGETS)
