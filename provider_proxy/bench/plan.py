"""`bench plan`: what `plan` predicts beside what the daemon does, on slowed-down chips.

A calibration comes first: the daemon's CPU a request and a batch on this machine. The points that follow
are predicted from that and from the chip's profile, as `plan --chip` has it, each by itself, and then
measured; no figure of a point goes into its prediction. Tenants draw the moment of each poll anew, as
in the model.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from provider_proxy.bench import load
from provider_proxy.bench.process import Target, config_text
from provider_proxy.host.batching.simulation import Costs, Prediction, Scenario, predict, quantile
from provider_proxy.testing.disturb import CHIPS

ALLOWED = 0.15  # how far a figure may be from its prediction
REQUESTS = 300  # of a round, so that its p99 is not its slowest
SHORTEST_S, LONGEST_S = 8.0, 45.0
ROUNDS = 3  # where one is short; the median's machine was not busy with something else
CALIBRATION_S = 10.0
PLAINTEXT_KB = 25.0  # of a connection; the bench speaks no TLS
REQUEST_SHARE = 0.4  # of a request's CPU, what is spent before it waits

SHOWN = {"p50_ms": ".0f", "p99_ms": ".0f", "duty": ".2f", "cpu": ".1%"}
"""The figures that people look at first, and how they read them."""

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
    """What the daemon did at a point."""

    p50_ms: float
    p99_ms: float
    duty: float
    leaves: float
    answered_per_s: float
    cpu: float
    memory_mb: float
    quotes: int
    requests: int


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns the calibration, and predicted, measured and their ratio a point."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        directory = Path(name)
        costs = calibrate(directory, seed, say)
        return points(directory, costs, seed, say)


def points(directory: Path, costs: Costs, seed: int, say: Say) -> dict[str, object]:
    """Predict and measure each of `POINTS`."""
    figures: dict[str, object] = {
        "cpu_us_per_request": round((costs.request_s + costs.answer_s) * 1e6, 1),
        "cpu_us_per_batch": round(costs.batch_s * 1e6, 1),
    }
    within = 0
    for number, at in enumerate(POINTS):
        say(f"{at.name} ({number + 1} of {len(POINTS)})")
        predicted = predict(at.scenario, costs)
        rounds = measure(directory, f"p{number}", at, at.seconds, seed + number, at.rounds)
        measured = median_of(rounds)
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


def calibrate(directory: Path, seed: int, say: Say) -> Costs:
    """The daemon's CPU on this machine, out of many requests a batch and of few."""
    say("calibration: CPU a request and a batch")
    many = point("many", "infineon-p256", 300, 2)
    few = point("few", "stm-p256", 4, 0.25, max_duty=1)
    (a,) = measure(directory, "many", many, CALIBRATION_S, seed)
    (b,) = measure(directory, "few", few, CALIBRATION_S, seed)
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


def measure(
    directory: Path, name: str, at: Point, seconds: float, seed: int, rounds: int = 1
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
    with Target(directory, name, config, "--chip", at.chip) as target:
        return [_round(target, scenario, seconds, seed + 10_000 * n) for n in range(rounds)]


def _round(target: Target, scenario: Scenario, seconds: float, seed: int) -> Measured:
    cpu_s: list[float] = []
    got = asyncio.run(
        load.polling(
            target.host,
            target.port,
            tenants=scenario.tenants,
            interval_s=scenario.interval_s,
            seconds=seconds + scenario.interval_s,
            seed=seed,
            keys=scenario.keys,
            redraw=True,
            on_connected=lambda: cpu_s.append(target.cpu_s()),
        )
    )
    cpu_s.append(target.cpu_s())
    load.verify_all(got, load.trusted_host(target.host, target.port))
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
        quotes=len(quotes),
        requests=len(counted),
    )


def median_of(rounds: Sequence[Measured]) -> Measured:
    """Each figure's median; requests and quotes are those of all rounds."""
    figures = {
        name: statistics.median(getattr(one, name) for one in rounds)
        for name in ("p50_ms", "p99_ms", "duty", "leaves", "answered_per_s", "cpu", "memory_mb")
    }
    return Measured(
        **figures,
        quotes=sum(one.quotes for one in rounds),
        requests=sum(one.requests for one in rounds),
    )
