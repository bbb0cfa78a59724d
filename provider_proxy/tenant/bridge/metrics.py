"""The bridge's metrics, for Prometheus; an object that is passed in."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from provider_proxy.common.dates import Dated, show_dates

PREFIX = "provider_proxy_bridge_"
RESULTS = ("good", "refused", "no answer", "fault")
POLL_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIGN_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


class BridgeMetrics:
    """Counters and gauges; names begin with `provider_proxy_bridge_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.polls = Counter(
            PREFIX + "polls",
            "Polls of Keylime, by result: good, refused, no answer, fault.",
            ["result"],
            registry=self.registry,
        )
        for result in RESULTS:
            self.polls.labels(result)  # from 0 on, so that the first one is an increase
        self.host_good = Gauge(
            PREFIX + "host_good",
            "1 if a host's last poll was good.",
            ["host"],
            registry=self.registry,
        )
        self.host_verified = Gauge(
            PREFIX + "host_verified_timestamp_seconds",
            "When a host's evidence was last verified, seconds since the epoch.",
            ["host"],
            registry=self.registry,
        )
        self.registrations = Gauge(
            PREFIX + "registrations",
            "Agents, by the state of their registration.",
            ["state"],
            registry=self.registry,
        )
        self.listening = Gauge(
            PREFIX + "listening", "Agents whose port is open.", registry=self.registry
        )
        self.poll_seconds = Histogram(
            PREFIX + "poll_seconds",
            "Time from a poll to its good answer, including the host's part.",
            buckets=POLL_BUCKETS,
            registry=self.registry,
        )
        self.sign_seconds = Histogram(
            PREFIX + "sign_seconds",
            "Time to make and sign the quote for Keylime.",
            buckets=SIGN_BUCKETS,
            registry=self.registry,
        )
        self.not_after = Gauge(
            PREFIX + "not_after_seconds",
            "When a certificate or a CA expires, in seconds since the epoch.",
            ["what"],
            registry=self.registry,
        )
        self.save_failures = Counter(
            PREFIX + "save_failures",
            "Failed saves of the state. Must stay 0.",
            registry=self.registry,
        )

    def show_dates(self, dates: Iterable[Dated]) -> None:
        """Set when each expires; earlier values are removed."""
        show_dates(self.not_after, dates)

    def forget_host(self, name: str) -> None:
        """A host is no longer in the file."""
        for gauge in (self.host_good, self.host_verified):
            if (name,) in gauge._metrics:
                gauge.remove(name)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
