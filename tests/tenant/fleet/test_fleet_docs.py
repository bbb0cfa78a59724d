"""docs/fleet.md says what a member counts."""

from __future__ import annotations

from docs_helpers import code, read, rows
from prometheus_client import CollectorRegistry

from provider_proxy.tenant.fleet.metrics import FleetMetrics


def test_documented_metrics_are_the_code_s() -> None:
    registry = CollectorRegistry()
    FleetMetrics(registry)
    made = {
        metric.name + ("_total" if metric.type == "counter" else ""): metric.documentation
        for metric in registry.collect()
    }
    listed = rows("docs/fleet.md", "Metric", "Meaning")
    assert {code(row[0]): row[1] for row in listed} == made
    assert "provider_proxy_fleet_unsaved_seconds" in read("docs/fleet.md")
