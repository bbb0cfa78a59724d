"""`bench ima`: how long a host's IMA waits for the chip because of quotes, predicted and measured.

A daemon quotes for tenants that poll, on a slowed-down swtpm. A process of its own extends PCR 10 of
the same TPM, as the kernel does when programs start: first at moments that are drawn beforehand,
whatever it waits, then as one shell that starts a program after the other. The prediction knows how long
the chip took for a quote and for an extend, the tenants, the duty and how many programs start; it knows
none of the moments and none of the waits.

The waits are the chip's: from the moment when an extend was due, or reached the chip, until the chip had
done it. What a busy machine adds to that, by waking processes late, is reported apart, as `machine_ms`.
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
from provider_proxy.bench.slow_chip import SlowChip
from provider_proxy.errors import HostError
from provider_proxy.host.batching.ima_wait import EXEC_S, ImaWait
from provider_proxy.host.batching.simulation import Prediction, Scenario, predict, quantile
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.tpm.embedded import EmbeddedTpm
from provider_proxy.host.tpm.pace import capped_duty
from provider_proxy.testing.broker import Command
from provider_proxy.testing.disturb import CC_PCR_EXTEND, CC_QUOTE, CHIPS

EXTENDS_PER_S = 25.0  # enough that chance does not decide: some 15 a quote of the slowest chip
OPEN_S, LONGEST_OPEN_S = 25.0, 60.0
TURNS = 12  # of the chip, at the least: chance decides less where more quotes are seen
SHELL_S = 10.0
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


def open_s(at: Point) -> float:
    """How long extends come at drawn moments, in each round."""
    return min(LONGEST_OPEN_S, max(OPEN_S, TURNS * at.scenario.turn_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Extends:
    """What the extender says, in monotonic seconds: see there."""

    due: Sequence[float]
    done: Sequence[float]
    shell: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round at a point.

    Attributes:
        waits_ms: of each extend that was due at a drawn moment, as the chip had it.
        machine_ms: by how much later its caller went on.
        shell_s: of each extend of the shell, with what a program's start takes.
        quotes_s, extends_s: for how long each had the chip.
        duty: share of the chip's time that quotes took. others: commands of other kinds.
    """

    waits_ms: list[float]
    machine_ms: list[float]
    shell_s: list[float]
    quotes_s: list[float]
    extends_s: list[float]
    duty: float
    others: int


def read_round(extends: Extends, commands: Sequence[Command]) -> Round:
    """Put what the extender saw and what the chip did side by side.

    Args:
        commands: of the time between the first tenant's question and the last one's, in the chip's order.

    Raises:
        HostError: another program has extended, or commands are missing.
    """
    done = [each for each in commands if each.code == CC_PCR_EXTEND]
    count = len(extends.due)
    if len(done) != count + len(extends.shell) or not count:
        raise HostError("the chip executed other extends than the benchmark sent")
    waits, machine, free = [], [], 0.0
    for due, seen, each in zip(extends.due, extends.done, done, strict=False):
        free = max(free, due) + each.end_s - each.asked_s
        waits.append((free - due) * 1000)
        machine.append((seen - free) * 1000)
    quotes = [each for each in commands if each.code == CC_QUOTE]
    inside = [each for each in quotes if done[0].asked_s <= each.begin_s <= done[-1].end_s]
    return Round(
        waits_ms=waits,
        machine_ms=machine,
        shell_s=[EXEC_S + each.end_s - each.asked_s for each in done[count:]],
        quotes_s=[each.end_s - each.begin_s for each in quotes],
        extends_s=[each.end_s - each.begin_s for each in done],
        duty=sum(each.end_s - each.begin_s for each in inside) / (done[-1].end_s - done[0].asked_s),
        others=len(commands) - len(done) - len(quotes),
    )


def wait_of(one: Round) -> ImaWait:
    """What IMA waited in a round."""
    return ImaWait(
        mean_ms=statistics.fmean(one.waits_ms),
        p99_ms=quantile(sorted(one.waits_ms), 0.99),
        execs_per_s=len(one.shell_s) / sum(one.shell_s),
    )


def predict_round(scenario: Scenario, one: Round) -> Prediction:
    """What a plan says of the chip as it was in a round."""
    return predict(
        replace(
            scenario,
            quote_s=statistics.fmean(one.quotes_s),
            extend_s=statistics.fmean(one.extends_s),
            extends_per_s=EXTENDS_PER_S,
        )
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
            rows[at.name] = measure_point(Path(name) / f"p{number}", at, seed + number)
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


def measure_point(directory: Path, at: Point, seed: int) -> dict[str, object]:
    """Measure and predict one point; its row.

    Raises:
        HostError, VerificationError: the daemon or the chip failed, or an answer did not verify.
    """
    directory.mkdir()
    scenario = at.scenario
    embedded = EmbeddedTpm(directory / "tpm")
    embedded.start()
    try:
        with SlowChip(embedded.tcti, at.chip) as chip:
            config = config_text(
                directory / "state",
                tcti=chip.tcti,
                window_ms=scenario.window_s * 1000,
                max_duty=scenario.max_duty,
                ak_algorithm="rsa" if at.chip.endswith("-rsa") else "ecc",
            )
            with Target(directory, "daemon", config) as target:
                rounds = [
                    asyncio.run(_beside_quotes(target, chip, at, seed + 1000 * turn))
                    for turn in range(ROUNDS)
                ]
    finally:
        embedded.stop()
    predicted = [predict_round(scenario, each) for each in rounds]
    quote_s, extend_s = (
        statistics.fmean(seconds for each in rounds for seconds in getattr(each, name))
        for name in ("quotes_s", "extends_s")
    )
    machine = [each for one in rounds for each in one.machine_ms]
    quotes = sum(len(each.quotes_s) for each in rounds)
    times = CHIPS[at.chip]
    return {
        **compare(
            at,
            median_of([each.ima for each in predicted]),
            median_of([wait_of(each) for each in rounds]),
            sum(len(each.waits_ms) for each in rounds),
        ),
        "quotes": quotes,
        "quote_ms": round(quote_s * 1000, 2),
        "quote_ms_of_the_profile": round(times.quote_s * 1000, 2),
        "extend_ms": round(extend_s * 1000, 2),
        "extend_ms_of_the_profile": round(times.extend_s * 1000, 2),
        "other_commands_per_quote": round(sum(each.others for each in rounds) / quotes, 2),
        "duty": round(statistics.median(each.duty for each in rounds), 3),
        "duty_predicted": round(statistics.median(each.duty for each in predicted), 3),
        "machine_ms_mean": round(statistics.fmean(machine), 2),
        "machine_ms_p99": round(quantile(sorted(machine), 0.99), 2),
    }


async def _extend(tcti: str, seconds: float, seed: int) -> Extends:
    """Run the extender."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "provider_proxy.bench.extender", tcti),
        *map(str, (EXTENDS_PER_S, seconds, SHELL_S, seed)),
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise HostError("the process that extends PCRs ended: see its error above")
    return Extends(**json.loads(output))


async def _beside_quotes(target: Target, chip: SlowChip, at: Point, seed: int) -> Round:
    scenario = at.scenario
    lead_s = max(LEAD_S, scenario.interval_s)

    async def extend() -> Extends:
        await asyncio.sleep(lead_s)
        return await _extend(chip.tcti, open_s(at), seed)

    await asyncio.to_thread(chip.take)  # what came before
    extending = asyncio.create_task(extend())
    got = await load.polling(
        target.host,
        target.port,
        tenants=scenario.tenants,
        interval_s=scenario.interval_s,
        seconds=lead_s + open_s(at) + SHELL_S + LEAD_S,
        seed=seed,
        redraw=True,
    )
    extends = await extending
    commands = await asyncio.to_thread(chip.take)
    host = await asyncio.to_thread(load.trusted_host, target.host, target.port)
    load.verify_all(got, host)
    return read_round(extends, commands)
