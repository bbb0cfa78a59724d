"""`bench ima`: what a host's IMA waits for the chip beside the daemon's quotes, predicted and measured.

A daemon quotes for tenants that poll, on a slowed-down swtpm. A process of its own extends PCR 10 of
the same TPM, as the kernel does when programs start: first at moments that are drawn beforehand,
whatever it waits, then as one shell that starts a program after the other. The prediction knows the
chip's profile, the tenants, the duty and how many programs start, and none of the moments. What this
machine adds to each command (processes that hand it on) is measured before, on the TPM alone.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from provider_proxy.bench import load
from provider_proxy.bench.plan import ALLOWED, Point, point
from provider_proxy.bench.process import Target, config_text
from provider_proxy.errors import HostError
from provider_proxy.host.batching.ima_wait import EXEC_S, ImaWait
from provider_proxy.host.batching.simulation import predict, quantile
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.tpm.embedded import EmbeddedTpm
from provider_proxy.host.tpm.pace import capped_duty
from provider_proxy.testing.broker import Broker
from provider_proxy.testing.disturb import CHIPS, slow_down

EXTENDS_PER_S = 12.0
OPEN_S = 25.0
SHELL_S = 5.0
ALONE_S = 2.0
ROUNDS = 3  # the median's machine was not busy with something else
LEAD_S = 3.0  # until every tenant has asked once
DEFAULTS = "defaults"

Say = Callable[[str], None]


def _bounded(name: str, chip: str, tenants: int, interval_s: float) -> Point:
    """A point whose duty is what `tpm.ima_wait_ms` leaves."""
    bound_s = Tpm().ima_wait_ms / 1000
    duty = capped_duty(Tpm().max_duty, CHIPS[chip].quote_s, bound_s)
    return point(name, chip, tenants, interval_s, max_duty=duty)


POINTS = (
    point(DEFAULTS, "infineon-p256", 100, 2),
    point("fast chip", "stm-p256", 200, 2),
    point("slow chip", "nuvoton-rsa", 60, 4),
    _bounded("slow chip, bounded", "nuvoton-rsa", 60, 4),
    point("a few tenants", "intel-rsa", 3, 2, window_s=0.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    waits_ms: list[float]
    execs_per_s: float

    @property
    def wait(self) -> ImaWait:
        return ImaWait(
            mean_ms=statistics.fmean(self.waits_ms),
            p99_ms=quantile(sorted(self.waits_ms), 0.99),
            execs_per_s=self.execs_per_s,
        )


def median_of(rounds: Sequence[ImaWait]) -> ImaWait:
    """Each figure's median."""
    return ImaWait(
        mean_ms=statistics.median(one.mean_ms for one in rounds),
        p99_ms=statistics.median(one.p99_ms for one in rounds),
        execs_per_s=statistics.median(one.execs_per_s for one in rounds),
    )


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns IMA's wait at the defaults, and a row for each point."""
    rows: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        for number, at in enumerate(POINTS):
            say(f"{at.name} ({number + 1} of {len(POINTS)})")
            rows[at.name] = _row(Path(name) / f"p{number}", at, seed + number)
    defaults = rows[DEFAULTS]
    return {
        **{name: defaults[name] for name in defaults if name.startswith("ima_")},
        "points": len(rows),
        "points_within_15_percent": sum(bool(row["within_15_percent"]) for row in rows.values()),
        **rows,
    }


def compare(at: Point, predicted: ImaWait, measured: ImaWait, extends: int) -> dict[str, object]:
    """A point's row: each figure measured, predicted, and measured / predicted."""
    row: dict[str, object] = {
        "chip": at.chip,
        "tenants": at.scenario.tenants,
        "max_duty": round(at.scenario.max_duty, 3),
        "extends": extends,
    }
    within = True
    for name, figure in (
        ("ima_wait_mean_ms", "mean_ms"),
        ("ima_wait_p99_ms", "p99_ms"),
        ("ima_execs_per_s", "execs_per_s"),
    ):
        expected, got = getattr(predicted, figure), getattr(measured, figure)
        row[name] = round(got, 2)
        row[f"{name}_predicted"] = round(expected, 2)
        row[f"{name}_ratio"] = round(got / expected, 3)
        within = within and abs(got / expected - 1) <= ALLOWED
    return {**row, "within_15_percent": within}


def _row(directory: Path, at: Point, seed: int) -> dict[str, object]:
    directory.mkdir()
    scenario, times = at.scenario, CHIPS[at.chip]
    embedded = EmbeddedTpm(directory / "tpm")
    embedded.start()
    try:
        with Broker(embedded.tcti, slow_down(CHIPS[at.chip])) as broker:
            alone = asyncio.run(_extend(broker.tcti, 0.0, ALONE_S, seed))
            added_s = 1 / alone.execs_per_s - EXEC_S - times.extend_s
            predicted = predict(
                replace(
                    scenario,
                    quote_s=times.quote_s + added_s,
                    extend_s=times.extend_s + added_s,
                    extends_per_s=EXTENDS_PER_S,
                )
            )
            config = config_text(
                directory / "state",
                tcti=broker.tcti,
                window_ms=scenario.window_s * 1000,
                max_duty=scenario.max_duty,
                ak_algorithm="rsa" if at.chip.endswith("-rsa") else "ecc",
            )
            with Target(directory, "daemon", config) as target:
                measured = [
                    asyncio.run(_beside_quotes(target, broker.tcti, at, seed + 1000 * turn))
                    for turn in range(ROUNDS)
                ]
    finally:
        embedded.stop()
    extends = sum(len(one.waits_ms) for one in measured)
    row = compare(at, predicted.ima, median_of([one.wait for one in measured]), extends)
    return {**row, "added_ms_per_command": round(added_s * 1000, 2)}


async def _extend(tcti: str, open_s: float, shell_s: float, seed: int) -> _Measured:
    """Run the extender."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "provider_proxy.bench.extender", tcti),
        *map(str, (EXTENDS_PER_S, open_s, shell_s, seed)),
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise HostError("the process that extends PCRs ended; see above")
    values = json.loads(output)
    return _Measured(waits_ms=values["waits_ms"], execs_per_s=values["execs_per_s"])


async def _beside_quotes(target: Target, tcti: str, at: Point, seed: int) -> _Measured:
    scenario = at.scenario
    lead_s = max(LEAD_S, scenario.interval_s)

    async def extend() -> _Measured:
        await asyncio.sleep(lead_s)
        return await _extend(tcti, OPEN_S, SHELL_S, seed)

    extending = asyncio.create_task(extend())
    got = await load.polling(
        target.host,
        target.port,
        tenants=scenario.tenants,
        interval_s=scenario.interval_s,
        seconds=lead_s + OPEN_S + SHELL_S + LEAD_S,
        seed=seed,
        redraw=True,
    )
    measured = await extending
    host = await asyncio.to_thread(load.trusted_host, target.host, target.port)
    load.verify_all(got, host)
    return measured
