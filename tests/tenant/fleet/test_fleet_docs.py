"""docs/fleet.md says what a member counts."""

from __future__ import annotations

from docs_helpers import code, read, rows
from prometheus_client import CollectorRegistry

from provider_proxy.tenant.fleet import outbox, sizing
from provider_proxy.tenant.fleet.metrics import FleetMetrics
from provider_proxy.tenant.fleet.sizing import fleet_size

SIZES = (
    *("Verdicts a second", "Members", "Connections", "Database, cores", "WAL, MB/s"),
    "Database, GB",
)


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


def test_the_table_of_sizes_is_the_arithmetic_s() -> None:
    listed = [
        row
        for row in rows("docs/fleet.md", "Hosts", "Interval, s", *SIZES)
        if set(row[0]) <= set("0123456789,")
    ]
    assert len(listed) >= 5
    for row in listed:
        size = fleet_size(int(row[0].replace(",", "")), float(row[1]))
        assert row[2:] == [
            f"{size.verdicts_s:,.0f}",
            *map(str, (size.members, size.connections, size.database_cores)),
            f"{size.wal_mb_s:.1f}",
            f"{size.database_gb:.1f}",
        ]


def test_the_figures_in_words_are_the_arithmetic_s() -> None:
    text = " ".join(read("docs/fleet.md").split())
    for said in (
        f"{sizing.CHECKS_PER_CORE_S:g} a second on a core",
        f"{sizing.MEMBER_WRITE_S * 1e6:g} µs for its rows",
        f"{sizing.DATABASE_CORE_S * 1e6:g} µs of a core and {sizing.WAL_BYTES / 1000:g} kB of WAL",
        f"{sizing.HOST_BYTES / 1000:g} kB in the tables",
        f"{sizing.REPORT_BYTES} bytes and stays for {sizing.KEEP_DAYS} days",
        f"{sizing.BUSY:.0%} of a core".replace("%", " %"),
    ):
        assert said in text
    assert sizing.KEEP_DAYS == outbox.KEEP_DAYS
