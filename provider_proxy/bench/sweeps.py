"""The figures behind the plots: latency against tenants, and what the window changes, predicted and
measured.

Three rules: one quote per request, a fixed tick (only predicted, since no daemon has it), and ours;
all on one chip with one duty. Several daemons are measured at once: their chips sleep, and so do they.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from provider_proxy.bench.plan import (
    Measured,
    Point,
    Say,
    calibrate,
    measure,
    point,
    points,
)
from provider_proxy.host.batching.simulation import Costs, Prediction, Scenario, predict

CHIP = "infineon-rsa"
INTERVAL_S = 2.0
TICK_S = 1.0
SECONDS = 20.0
FEW_SECONDS = 40.0  # where fewer than `FEW_PER_S` ask a second
FEW_PER_S = 6
AT_ONCE = 3
TENANTS = (1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100, 200, 300, 500, 1000)
MEASURED_TENANTS = (1, 3, 10, 30, 100, 300)
MEASURED_ONE_BY_ONE = (1, 2, 4, 10)
WINDOWS_MS = (0, 5, 10, 20, 50, 75, 100, 150, 200, 300, 500, 700, 1000)
MEASURED_WINDOWS_MS = (0, 50, 200, 500, 1000)
FEW, MANY = 5, 100
EAGER_S = 0.1  # a pause shorter than a batch; without one, all tenants ask in step
EAGER = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One population under one rule: what was predicted, and what was measured, by x."""

    predicted: dict[float, Prediction]
    measured: dict[float, Measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweeps:
    """Everything that is drawn."""

    quote_ms: float
    max_duty: float
    window_ms: float
    by_tenants: dict[str, Curve]
    by_window: dict[str, Curve]


def run_with_points(seed: int, say: Say) -> tuple[dict[str, object], Sweeps]:
    """`bench plan` and the sweeps, out of one calibration."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        directory = Path(name)
        costs = calibrate(directory, seed, say)
        figures = points(directory, costs, seed, say)
        return figures, run(directory, costs, seed, say)


def run(directory: Path, costs: Costs, seed: int, say: Say) -> Sweeps:
    """Predict, and measure."""
    base = point("", CHIP, 1, INTERVAL_S).scenario
    rules: dict[str, tuple[Scenario, Iterable[int]]] = {
        "one by one": (replace(base, max_leaves=1, window_s=0.0), MEASURED_ONE_BY_ONE),
        "tick": (replace(base, tick_s=TICK_S), ()),
        "rule": (base, MEASURED_TENANTS),
    }
    crowds: dict[str, tuple[Scenario, Iterable[float]]] = {
        "few": (replace(base, tenants=FEW), MEASURED_WINDOWS_MS),
        "many": (replace(base, tenants=MANY), MEASURED_WINDOWS_MS),
        "eager": (
            replace(base, tenants=EAGER, interval_s=EAGER_S, max_duty=1.0),
            MEASURED_WINDOWS_MS,
        ),
    }
    wanted = {
        (name, float(n)): replace(scenario, tenants=n)
        for name, (scenario, measured) in rules.items()
        for n in measured
    } | {
        (name, float(ms)): replace(scenario, window_s=ms / 1000)
        for name, (scenario, measured) in crowds.items()
        for ms in measured
    }
    done = _measure(directory, wanted, seed, say)
    say("predictions")
    return Sweeps(
        quote_ms=base.quote_s * 1000,
        max_duty=base.max_duty,
        window_ms=base.window_s * 1000,
        by_tenants={
            name: _curve(
                done, name, {float(n): replace(scenario, tenants=n) for n in TENANTS}, costs
            )
            for name, (scenario, _) in rules.items()
        },
        by_window={
            name: _curve(
                done,
                name,
                {float(w): replace(scenario, window_s=w / 1000) for w in WINDOWS_MS},
                costs,
            )
            for name, (scenario, _) in crowds.items()
        },
    )


def _curve(
    done: dict[tuple[str, float], Measured], name: str, at: dict[float, Scenario], costs: Costs
) -> Curve:
    return Curve(
        predicted={x: predict(scenario, costs) for x, scenario in at.items()},
        measured={x: got for (curve, x), got in done.items() if curve == name},
    )


def _measure(
    directory: Path, wanted: dict[tuple[str, float], Scenario], seed: int, say: Say
) -> dict[tuple[str, float], Measured]:
    def one(number: int, key: tuple[str, float], scenario: Scenario) -> Measured:
        say(f"sweep: {key[0]}, {key[1]:g} ({number + 1} of {len(wanted)})")
        at = Point(name=f"sweep{number}", chip=CHIP, scenario=scenario)
        few = scenario.tenants / scenario.interval_s < FEW_PER_S
        seconds = FEW_SECONDS if few else SECONDS
        return measure(directory, at.name, at, seconds, seed + number)[0]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {
            key: pool.submit(one, number, key, scenario)
            for number, (key, scenario) in enumerate(wanted.items())
        }
        return {key: future.result() for key, future in futures.items()}
