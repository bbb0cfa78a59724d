"""`bench plan`: what `plan` predicts beside what the daemon does, on slowed-down chips.

A calibration comes first: the daemon's CPU a request and a batch on this machine. Then each point is
measured, and predicted from the calibration and from the time that its chip took for a quote, as
`plan --measure` has it: a sleep stands for the chip, and a busy machine wakes it late. No other figure
of a point goes into its prediction. `machine_ms` is how late a timer beside the load came.
Tenants draw the moment of each poll again each time, as in the model.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from provider_proxy.bench import load
from provider_proxy.bench.overload import Contexts, make_certificates, tls_config, with_tls
from provider_proxy.bench.process import Target, config_text
from provider_proxy.evidence.model import TrustedHost
from provider_proxy.host.batching.simulation import Costs, Prediction, Scenario, predict, quantile
from provider_proxy.testing.disturb import CHIPS

ALLOWED = 0.15  # how far a figure may be from its prediction
REQUESTS = 300  # of a round, so that its p99 is not its slowest
SHORTEST_S, LONGEST_S = 8.0, 45.0
ROUNDS = 3  # where one is short; the median leaves out rounds in which the machine was busy
CALIBRATION_S = 10.0
PLAINTEXT_KB = 25.0  # of a connection; the bench speaks no TLS
MEMORY_TENANTS = 500
MEMORY_S = 5.0
LATE_EVERY_S = 0.02
REQUEST_SHARE = 0.4  # of a request's CPU, what is spent before it waits

FIGURES = (
    *("p50_ms", "p99_ms", "duty", "leaves", "answered_per_s", "cpu", "memory_mb"),
    *("quote_ms", "machine_ms"),
)
SHOWN = {"p50_ms": ".0f", "p99_ms": ".0f", "duty": ".2f", "cpu": ".1%"}
"""The figures that are shown first, and their format."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A scenario on a chip of this name."""

    name: str
    chip: str
    scenario: Scenario

    @property
    def seconds(self) -> float:
        """How long a round is."""
        enough = REQUESTS * self.scenario.interval_s / self.scenario.tenants
        return min(LONGEST_S, max(SHORTEST_S, enough))

    @property
    def rounds(self) -> int:
        """How often it is measured."""
        return ROUNDS if self.seconds < LONGEST_S / ROUNDS else 1


def point(name: str, chip: str, tenants: int, interval_s: float, **rule: object) -> Point:
    """A point; the chip's times are what its profile says."""
    times = CHIPS[chip]
    scenario = Scenario(
        tenants=tenants,
        interval_s=interval_s,
        quote_s=times.quote_s,
        read_s=times.read_s,
        extend_s=times.extend_s,
    )
    return Point(name=name, chip=chip, scenario=replace(scenario, **rule))  # type: ignore[arg-type]


POINTS = (
    point("lone tenant", "infineon-rsa", 1, 0.6),
    point("a few", "infineon-rsa", 5, 1),
    point("defaults", "infineon-rsa", 100, 2),
    point("batch while busy", "infineon-rsa", 100, 2, window_s=0.0, max_duty=1),
    point("long window", "intel-p256", 40, 2, window_s=0.5),
    point("fast chip", "stm-p256", 200, 2, window_s=0.1),
    point("slow chip", "nuvoton-rsa", 60, 4),
    point("four kinds of requests", "infineon-p256", 40, 1, keys=4),
    point("small batches", "infineon-p256", 40, 1.5, max_leaves=4, max_duty=1),
    point("one by one", "infineon-p256", 4, 0.6, window_s=0.0, max_leaves=1, max_duty=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the daemon did at a point.

    Attributes:
        quote_ms: the chip's time for a quote, on average, as the daemon had it.
        machine_ms: by how much a timer of the load generator came late, 99th percentile.
    """

    p50_ms: float
    p99_ms: float
    duty: float
    leaves: float
    answered_per_s: float
    cpu: float
    memory_mb: float
    quote_ms: float
    machine_ms: float
    quotes: int
    requests: int


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns the calibration, and predicted, measured and their ratio a point."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        directory = Path(name)
        costs = calibrate(directory, seed, say)
        figures = points(directory, costs, seed, say)
        return {**figures, "costs": shown_costs(tls_costs(directory, seed, say))}


def points(directory: Path, costs: Costs, seed: int, say: Say) -> dict[str, object]:
    """Predict and measure each of `POINTS`."""
    figures: dict[str, object] = {
        "cpu_us_per_request": round((costs.request_s + costs.answer_s) * 1e6, 1),
        "cpu_us_per_batch": round(costs.batch_s * 1e6, 1),
    }
    within = 0
    for number, at in enumerate(POINTS):
        say(f"{at.name} ({number + 1} of {len(POINTS)})")
        rounds = measure(directory, f"p{number}", at, at.seconds, seed + number, at.rounds)
        measured = median_of(rounds)
        predicted = predict(replace(at.scenario, quote_s=measured.quote_ms / 1000), costs)
        row = compare(at, predicted, measured)
        within += bool(row["within_15_percent"])
        figures[at.name] = row
    return {"points": len(POINTS), "points_within_15_percent": within, **figures}


def compare(at: Point, predicted: Prediction, measured: Measured) -> dict[str, object]:
    """A point's row: each figure predicted, measured, and measured / predicted."""
    row: dict[str, object] = {
        "chip": at.chip,
        "tenants": at.scenario.tenants,
        "interval_s": at.scenario.interval_s,
        "window_ms": at.scenario.window_s * 1000,
        "max_duty": at.scenario.max_duty,
        "requests": measured.requests,
        "quote_ms": round(measured.quote_ms, 2),
        "quote_ms_of_the_profile": round(at.scenario.quote_s * 1000, 2),
        "machine_ms_p99": round(measured.machine_ms, 2),
    }
    within = True
    for name in ("p50_ms", "p99_ms", "duty", "leaves", "cpu", "memory_mb"):
        expected, got = getattr(predicted, name), getattr(measured, name)
        row[f"{name}_predicted"] = round(expected, 3)
        row[f"{name}_measured"] = round(got, 3)
        row[f"{name}_ratio"] = round(got / expected, 3)
        if name in ("p50_ms", "p99_ms", "duty"):
            within = within and abs(got / expected - 1) <= ALLOWED
    return {**row, "within_15_percent": within}


def calibrate(directory: Path, seed: int, say: Say, contexts: Contexts | None = None) -> Costs:
    """The daemon's CPU on this machine, out of many requests a batch and of few.

    Args:
        contexts: of tenants that speak mutual TLS, whose files are in the directory; None for plaintext.
    """
    say("calibration: CPU a request and a batch" + (", mutual TLS" if contexts else ""))
    many = point("many", "infineon-p256", 300, 2)
    few = point("few", "stm-p256", 4, 0.25, max_duty=1)
    (a,) = measure(directory, "many", many, CALIBRATION_S, seed, contexts=contexts)
    (b,) = measure(directory, "few", few, CALIBRATION_S, seed, contexts=contexts)
    # cpu = request * requests/s + batch * batches/s, twice
    a_batches, b_batches = a.answered_per_s / a.leaves, b.answered_per_s / b.leaves
    determinant = a.answered_per_s * b_batches - b.answered_per_s * a_batches
    request_s = (a.cpu * b_batches - b.cpu * a_batches) / determinant
    batch_s = (a.answered_per_s * b.cpu - b.answered_per_s * a.cpu) / determinant
    return replace(
        Costs(),
        request_s=request_s * REQUEST_SHARE,
        answer_s=request_s * (1 - REQUEST_SHARE),
        batch_s=max(0.0, batch_s),
        tenant_kb=PLAINTEXT_KB,
    )


def tls_costs(directory: Path, seed: int, say: Say) -> Costs:
    """What a plan assumes without measurements: tenants use mutual TLS."""
    directory /= "tls"
    directory.mkdir()
    contexts = make_certificates(directory, 1)
    costs = calibrate(directory, seed, say, contexts)
    say("memory of connections")
    with Target(directory, "memory", tls_config(directory, "memory", max_duty=1)) as target:
        base_mb = target.rss_mb()
        got = asyncio.run(
            load.polling(
                target.host,
                target.port,
                tenants=MEMORY_TENANTS,
                interval_s=MEMORY_S,
                seconds=MEMORY_S,
                seed=seed,
                contexts=contexts,
            )
        )
        tenants_kb = (target.peak_rss_mb() - base_mb) * 1000
        load.verify_all(got, _host_of(target, contexts))
    return replace(costs, base_mb=base_mb, tenant_kb=tenants_kb / MEMORY_TENANTS)


def shown_costs(costs: Costs) -> dict[str, float]:
    """For packaging/sizing.py."""
    return {
        "request_us": round(costs.request_s * 1e6, 1),
        "answer_us": round(costs.answer_s * 1e6, 1),
        "batch_us": round(costs.batch_s * 1e6, 1),
        "base_mb": round(costs.base_mb, 1),
        "tenant_kb": round(costs.tenant_kb, 1),
    }


def measure(
    directory: Path,
    name: str,
    at: Point,
    seconds: float,
    seed: int,
    rounds: int = 1,
    *,
    contexts: Contexts | None = None,
) -> list[Measured]:
    """Run a daemon and its tenants, so often; the first poll of each does not count.

    Raises:
        VerificationError: an answer did not verify.
    """
    scenario = at.scenario
    config = config_text(
        directory / name,
        window_ms=scenario.window_s * 1000,
        max_leaves=scenario.max_leaves,
        max_duty=scenario.max_duty,
        ak_algorithm="rsa" if at.chip.endswith("-rsa") else "ecc",
    )
    if contexts:
        config = with_tls(config, directory)
    with Target(directory, name, config, "--chip", at.chip) as target:
        return [
            _round(target, scenario, seconds, seed + 10_000 * n, contexts) for n in range(rounds)
        ]


def _round(
    target: Target, scenario: Scenario, seconds: float, seed: int, contexts: Contexts | None
) -> Measured:
    cpu_s: list[float] = []
    late_ms: list[float] = []

    async def ask() -> load.Load:
        watching = asyncio.create_task(_note_lateness(late_ms))
        got = await load.polling(
            target.host,
            target.port,
            tenants=scenario.tenants,
            interval_s=scenario.interval_s,
            seconds=seconds + scenario.interval_s,
            seed=seed,
            keys=scenario.keys,
            redraw=True,
            contexts=contexts,
            on_connected=lambda: cpu_s.append(target.cpu_s()),
        )
        watching.cancel()
        return got

    got = asyncio.run(ask())
    cpu_s.append(target.cpu_s())
    load.verify_all(got, _host_of(target, contexts))
    begin = min(reply.sent_s for reply in got.replies) + scenario.interval_s
    counted = [reply for reply in got.replies if reply.sent_s >= begin and reply.status == 200]
    latencies = sorted(reply.latency_ms for reply in counted)
    quotes: dict[str, float] = {}
    for reply in counted:
        results = json.loads(reply.body)["results"]
        quotes[results["quote"]] = results["timing"]["quote_ms"]
    return Measured(
        p50_ms=quantile(latencies, 0.5),
        p99_ms=quantile(latencies, 0.99),
        duty=sum(quotes.values()) / 1000 / seconds,
        leaves=len(counted) / len(quotes),
        answered_per_s=len(counted) / seconds,
        cpu=(cpu_s[1] - cpu_s[0]) / (seconds + scenario.interval_s),
        memory_mb=target.peak_rss_mb(),
        quote_ms=statistics.fmean(quotes.values()),
        machine_ms=quantile(sorted(late_ms), 0.99),
        quotes=len(quotes),
        requests=len(counted),
    )


def _host_of(target: Target, contexts: Contexts | None) -> TrustedHost:
    if contexts:
        return asyncio.run(load.tls_trusted_host(target.host, target.port, contexts[0]))
    return load.trusted_host(target.host, target.port)


async def _note_lateness(late_ms: list[float]) -> None:
    """Write how late a timer comes, until cancelled."""
    while True:
        due = time.monotonic() + LATE_EVERY_S
        await asyncio.sleep(LATE_EVERY_S)
        late_ms.append((time.monotonic() - due) * 1000)


def median_of(rounds: Sequence[Measured]) -> Measured:
    """Each figure's median; requests and quotes are those of all rounds."""
    figures = {name: statistics.median(getattr(one, name) for one in rounds) for name in FIGURES}
    return Measured(
        **figures,
        quotes=sum(one.quotes for one in rounds),
        requests=sum(one.requests for one in rounds),
    )
