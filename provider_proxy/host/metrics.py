"""The daemon's metrics: one object, made by the daemon and passed to the parts that count.

Uses prometheus-client. Each object has a registry of its own, so that two daemons in one
test process do not share numbers. One counter per reason, so that "refused" can be explained.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from provider_proxy.common.dates import Dated, show_dates
from provider_proxy.common.log import dropped_lines

LEAVES_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


class Metrics:
    """Counters, gauges and histograms; names begin with `provider_proxy_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._responses: dict[tuple[int, str], Counter] = {}
        prefix = "provider_proxy_"
        self.requests = Counter(
            prefix + "requests",
            "Requests answered, by HTTP status and reason.",
            ["status", "reason"],
            registry=self.registry,
        )
        self.batches = Counter(
            prefix + "batches", "Batches, by outcome.", ["outcome"], registry=self.registry
        )
        self.leaves = Histogram(
            prefix + "batch_leaves",
            "Requests of tenants in a batch.",
            buckets=LEAVES_BUCKETS,
            registry=self.registry,
        )
        self.quote_seconds = Histogram(
            prefix + "quote_seconds",
            "Time of a quote on the chip, PCR reads included.",
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.wait_seconds = Histogram(
            prefix + "wait_seconds",
            "Time from a batch's first nonce until it was sealed.",
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.sealed = Counter(
            prefix + "batches_sealed",
            "Batches, by what sealed them: window, chip, full or drain.",
            ["by"],
            registry=self.registry,
        )
        self.queue = Gauge(
            prefix + "queue", "Requests waiting for a batch.", registry=self.registry
        )
        self.abandoned = Counter(
            prefix + "abandoned",
            "Requests dropped before the seal because their client went away.",
            registry=self.registry,
        )
        self.tpm_quotes = Counter(
            prefix + "tpm_quotes", "Quotes that the TPM gave.", registry=self.registry
        )
        self.quote_commands = Counter(
            prefix + "quote_commands",
            "TPM commands sent for quotes, by command. Divide by tpm_quotes for commands per quote.",
            ["command"],
            registry=self.registry,
        )
        for command in ("TPM2_Quote", "TPM2_PCR_Read"):
            self.quote_commands.labels(command)
        self.tpm_errors = Counter(
            prefix + "tpm_errors",
            "TPM commands that failed, by response code and by the step taken then.",
            ["code", "step"],
            registry=self.registry,
        )
        self.tpm_retries = Counter(
            prefix + "tpm_retries",
            "TPM commands that were tried again, by step: again, clean or slow.",
            ["step"],
            registry=self.registry,
        )
        self.tpm_circuit_open = Gauge(
            prefix + "tpm_circuit_open",
            "1 while the TPM is out of order and tenants are refused at once.",
            registry=self.registry,
        )
        self.duty = Gauge(
            prefix + "duty",
            "Share of the last 10 s in which the chip worked for the proxy, 0 to 1.",
            registry=self.registry,
        )
        self.max_duty = Gauge(
            prefix + "max_duty",
            "Limit of the duty, from tpm.max_duty and tpm.ima_wait_ms.",
            registry=self.registry,
        )
        self.learnt_quote_seconds = Gauge(
            prefix + "learnt_quote_seconds",
            "Learnt time of a quote; estimates, Retry-After and the hang limit use it.",
            registry=self.registry,
        )
        self.tls_handshakes = Counter(
            prefix + "tls_handshakes",
            "TLS handshakes at the tenants' server, by result (ok, failed, silent) and reason.",
            ["result", "reason"],
            registry=self.registry,
        )
        self.connections = Gauge(
            prefix + "connections", "Open connections of tenants.", registry=self.registry
        )
        self.log_dropped = Gauge(
            prefix + "log_lines_dropped",
            "Log lines dropped since the start because their reader was too slow.",
            registry=self.registry,
        )
        self.log_dropped.set_function(dropped_lines)
        self.build_info = Gauge(
            prefix + "build_info",
            "Always 1; the labels name the versions of the program and of Python.",
            ["version", "python"],
            registry=self.registry,
        )
        self.registrations = Gauge(
            prefix + "registrations",
            "1 for the current state of each registration, 0 for its other states.",
            ["registrar", "state"],
            registry=self.registry,
        )
        self.selfcheck_failures = Counter(
            prefix + "selfcheck_failures",
            "Batches that failed the proxy's self-check (the tenants' own checks). Must stay 0.",
            registry=self.registry,
        )

        self.audit_lost = Counter(
            prefix + "audit_lost_batches",
            "Batches whose records are missing from the audit log, or incomplete. Must stay 0.",
            registry=self.registry,
        )
        self.not_after = Gauge(
            prefix + "not_after_seconds",
            "When a certificate, a CA or a CRL expires, in seconds since the epoch.",
            ["what"],
            registry=self.registry,
        )
        self.vtpm_vms = Gauge(
            prefix + "vtpm_vms",
            "VMs in the registry of vTPMs: running with confirmed or claimed EKs, or stopped.",
            ["state"],
            registry=self.registry,
        )
        self.vtpm_messages = Counter(
            prefix + "vtpm_messages",
            "Messages from the hooks, by operation and outcome.",
            ["op", "outcome"],
            registry=self.registry,
        )
        self.vtpm_confirmations = Counter(
            prefix + "vtpm_confirmations",
            "Reads of vTPMs' states (read-back), by outcome.",
            ["outcome"],
            registry=self.registry,
        )

    def count_request(self, status: int, reason: str) -> None:
        """Count a response. Counters are cached: looking up a labelled one costs more than counting."""
        counter = self._responses.get((status, reason))
        if counter is None:
            counter = self._responses[status, reason] = self.requests.labels(status, reason)
        counter.inc()

    def count_quote_command(self, command: str) -> None:
        """Count a TPM command sent for a quote; from any thread."""
        self.quote_commands.labels(command).inc()

    def count_handshake(self, reason: str) -> None:
        """Count a TLS handshake.

        Args:
            reason: "ok", "silent" for a client that never sent a byte, or why it failed.
        """
        result = reason if reason in ("ok", "silent") else "failed"
        self.tls_handshakes.labels(result, reason).inc()

    def tpm_error_counts(self) -> dict[str, int]:
        """How often each TPM response code occurred, by its name."""
        found: dict[str, int] = {}
        for family in self.tpm_errors.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    code = sample.labels["code"]
                    found[code] = found.get(code, 0) + int(sample.value)
        return found

    def selfcheck_failure_count(self) -> int:
        """How many batches failed the self-check."""
        name = "provider_proxy_selfcheck_failures_total"
        return int(self.registry.get_sample_value(name) or 0)

    def audit_lost_count(self) -> int:
        """How many batches are missing from the configured audit log."""
        return int(self.registry.get_sample_value("provider_proxy_audit_lost_batches_total") or 0)

    def set_registration(self, registrar: str, state: str, states: Iterable[str]) -> None:
        """Set the current state of a registration among all its states."""
        for each in states:
            self.registrations.labels(registrar, each).set(each == state)

    def show_dates(self, dates: Iterable[Dated]) -> None:
        """Set when each expires; earlier entries are removed."""
        show_dates(self.not_after, dates)

    def forget_registration(self, registrar: str, states: Iterable[str]) -> None:
        """Remove a registrar that is no longer configured."""
        for each in states:
            self.registrations.remove(registrar, each)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
