"""The metrics of a fleet's member, besides the watcher's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class FleetMetrics:
    """Counters and gauges; names begin with `provider_proxy_fleet_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "provider_proxy_fleet_"
        self.shards = Gauge(prefix + "shards", "Shards that this member holds.", registry=registry)
        self.members = Gauge(
            prefix + "members",
            "Members that serve, as the database last reported.",
            registry=registry,
        )
        self.free_shards = Gauge(
            prefix + "free_shards",
            "Shards that no member holds: their hosts are not verified.",
            registry=registry,
        )
        self.hosts = Gauge(
            prefix + "hosts",
            "Hosts of the whole fleet, by state; updated every minute.",
            ["state"],
            registry=registry,
        )
        self.outbox_reports = Gauge(
            prefix + "outbox_reports",
            "Reports of this member's shards that are not delivered yet.",
            registry=registry,
        )
        self.outbox_seconds = Gauge(
            prefix + "outbox_seconds",
            "Age of the oldest report that is not delivered yet, in seconds.",
            registry=registry,
        )
        self.unfenced_reports = Counter(
            prefix + "unfenced_reports",
            "Reports that were sent without the database.",
            registry=registry,
        )
        self.database_up = Gauge(
            prefix + "database_up", "1 if the database answers.", registry=registry
        )
        self.unsaved_seconds = Gauge(
            prefix + "unsaved_seconds",
            "Age of the oldest result that is not in the database yet.",
            registry=registry,
        )
        self.takeovers = Counter(
            prefix + "shards_taken", "Shards that this member has taken.", registry=registry
        )
        self.refused_writes = Counter(
            prefix + "refused_writes",
            "Batches that were not written because the shard's lease was lost.",
            registry=registry,
        )
        self.rolled_back = Counter(
            prefix + "rolled_back_shards",
            "Shards whose epoch in the database was older than this member's. Must stay 0.",
            registry=registry,
        )
        self.lost_reports = Gauge(
            prefix + "lost_reports",
            "Reports lost because too many waited for the database. Must stay 0.",
            registry=registry,
        )
