"""The watcher's metrics, for Prometheus: an object that is passed in, written as a text file.

It uses prometheus-client with its own registry. The file is replaced as a whole, so that
node_exporter's textfile collector never reads half of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from provider_proxy.common.dates import Dated, show_dates
from provider_proxy.common.files import write_public
from provider_proxy.errors import HostError
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.tables import MetricsTable

log = logging.getLogger(__name__)

LATENESS_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class WatchMetrics:
    """Counters and gauges; names begin with `provider_proxy_watch_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "provider_proxy_watch_"
        self.checks = Counter(
            prefix + "checks",
            "Questions to proxies, by result: ok, or the error's class.",
            ["result"],
            registry=self.registry,
        )
        self.hosts = Gauge(
            prefix + "hosts", "Watched hosts, by state.", ["state"], registry=self.registry
        )
        self.host_trusted = Gauge(
            prefix + "host_trusted",
            "1 if a host's last verdict is TRUSTED.",
            ["host"],
            registry=self.registry,
        )
        self.host_verified = Gauge(
            prefix + "host_verified_timestamp_seconds",
            "When a host's evidence was last verified, seconds since the epoch.",
            ["host"],
            registry=self.registry,
        )
        self.lateness = Histogram(
            prefix + "lateness_seconds",
            "Delay from when a host was due until it was asked, in seconds.",
            buckets=LATENESS_BUCKETS,
            registry=self.registry,
        )
        self.reports = Counter(
            prefix + "reports",
            "Reports, by receiver and result.",
            ["sink", "outcome"],
            registry=self.registry,
        )
        self.not_after = Gauge(
            prefix + "not_after_seconds",
            "When a certificate or a CA expires, in seconds since the epoch.",
            ["what"],
            registry=self.registry,
        )
        self.save_failures = Counter(
            prefix + "save_failures",
            "Failed saves of the state. Must stay 0.",
            registry=self.registry,
        )

    def count_states(self, states: Iterable[State]) -> None:
        """Set the gauge of hosts by state."""
        found = dict.fromkeys(State, 0)
        for state in states:
            found[state] += 1
        for state, count in found.items():
            self.hosts.labels(state.value).set(count)

    def show_dates(self, dates: Iterable[Dated]) -> None:
        """Set when each expires; earlier values are removed."""
        show_dates(self.not_after, dates)

    def forget_host(self, name: str) -> None:
        """A host is no longer watched."""
        for gauge in (self.host_trusted, self.host_verified):
            if (name,) in gauge._metrics:
                gauge.remove(name)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def write_now(metrics: WatchMetrics, table: MetricsTable, states: Iterable[State]) -> None:
    """Write the text file, if one is configured; an error is logged."""
    if table.textfile is None:
        return
    metrics.count_states(states)
    try:
        write_public(table.textfile, metrics.text())
    except HostError as exc:
        log.error("metrics: %s", exc)


async def write_often(
    metrics: WatchMetrics, table: MetricsTable, states: Callable[[], Iterable[State]]
) -> None:
    """Write the text file at its interval, for ever; return if none is configured."""
    while table.textfile is not None:
        write_now(metrics, table, states())
        await trio.sleep(table.interval_s)
