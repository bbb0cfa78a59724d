"""`provider-proxy plan`: what a chip and a crowd of tenants come to, and the window to set.

Opens no TPM unless `--measure` asks for it. The figures are of a simulation
(`provider_proxy.host.batching.simulation`), which `bench plan` holds against the daemon.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import secrets
import statistics
import time

import trio
from rich.console import Console
from rich.table import Table

from provider_proxy.cli.arguments import add_config_argument
from provider_proxy.host.batching.simulation import RESERVE, Choice, Costs, Scenario, choose
from provider_proxy.host.config.load import load_config
from provider_proxy.host.config.tables import BatchTable, Config, Tpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.testing.disturb import CHIP_QUOTE_MS

DEFAULT_INTERVAL_S = 2.0  # Keylime's verifier's quote_interval
DEFAULT_DEADLINE_MS = 1000.0
MEASURED_QUOTES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--tenants", type=_count, required=True, metavar="N", help="verifiers that poll this host"
    )
    parser.add_argument(
        "--interval-s",
        type=_positive,
        default=DEFAULT_INTERVAL_S,
        metavar="S",
        help="each polls once in so many seconds (default: %(default)g)",
    )
    chip = parser.add_mutually_exclusive_group(required=True)
    chip.add_argument("--chip", choices=sorted(CHIP_QUOTE_MS), help="a vendor's median chip")
    chip.add_argument("--quote-ms", type=_positive, metavar="MS", help="what a quote takes")
    chip.add_argument(
        "--measure",
        action="store_true",
        help="take ten quotes with the TPM of --config; makes its keys if they are not there",
    )
    parser.add_argument(
        "--deadline-ms",
        type=_positive,
        default=DEFAULT_DEADLINE_MS,
        metavar="MS",
        help="99 of 100 answers must come within it (default: %(default)g)",
    )
    parser.add_argument(
        "--keys",
        type=_count,
        default=1,
        metavar="N",
        help="kinds of requests that share no batch (default: %(default)d)",
    )
    parser.add_argument("--max-duty", type=_positive, metavar="SHARE", help="as tpm.max_duty")
    parser.add_argument("--max-leaves", type=_count, metavar="N", help="as batch.max_leaves")
    add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be a whole number above 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Predict and print.

    Raises:
        UsageError: the numbers make no scenario.
        HostError, ConfigError: with `--measure`, no TPM or no good configuration.
    """
    tpm, batch = Tpm(), BatchTable()
    if args.measure:
        config = load_config(args.config)
        tpm, batch = config.tpm, config.batch
        quote_s = trio.run(measure_quote_s, config)
    else:
        quote_s = (CHIP_QUOTE_MS[args.chip] if args.chip else args.quote_ms) / 1000
    scenario = Scenario(
        tenants=args.tenants,
        interval_s=args.interval_s,
        quote_s=quote_s,
        max_duty=args.max_duty if args.max_duty is not None else tpm.max_duty,
        max_leaves=args.max_leaves if args.max_leaves is not None else batch.max_leaves,
        keys=args.keys,
    )
    costs = Costs()
    with Console(stderr=True).status("simulating"):
        best, choices = choose(scenario, args.deadline_ms / 1000, costs)
    if args.json:
        print(json.dumps(_as_json(scenario, args.deadline_ms, best, choices)))
    else:
        _print(scenario, args.deadline_ms, best, choices)
    return 0


async def measure_quote_s(config: Config) -> float:
    """Median time of a quote on a host's TPM, in seconds.

    Raises:
        HostError: no TPM, no keys.
    """
    from provider_proxy.host.quoters.local_tpm import open_quoter

    times = []
    async with open_quoter(
        dataclasses.replace(config.tpm, max_duty=1.0), config.state_dir, Metrics()
    ) as quoter:
        for _ in range(MEASURED_QUOTES):
            begin = time.monotonic()
            await quoter.quote(secrets.token_hex(16).encode("ascii"), config.tpm.banks[0], 1)
            times.append(time.monotonic() - begin)
    return statistics.median(times)


def _as_json(
    scenario: Scenario, deadline_ms: float, best: Choice | None, choices: list[Choice]
) -> dict[str, object]:
    windows = []
    for choice in choices:
        figures = dataclasses.asdict(choice.prediction)
        rounded = {name: round(value, 3) for name, value in figures.items()}
        windows.append({"window_ms": choice.window_ms, "fits": choice.fits, **rounded})
    given = dataclasses.asdict(scenario)
    del given["window_s"], given["tick_s"]
    return {
        **given,
        "deadline_ms": deadline_ms,
        "window_ms": best.window_ms if best is not None else None,
        "windows": windows,
    }


def _print(
    scenario: Scenario, deadline_ms: float, best: Choice | None, choices: list[Choice]
) -> None:
    table = Table(
        title=f"{scenario.tenants} tenants, each every {scenario.interval_s:g} s; "
        f"a quote takes {scenario.quote_s * 1000:.0f} ms",
        caption="predicted; times in ms, batch: requests a quote, CPU of one core\n"
        f"duty at most {scenario.max_duty:g}, deadline {deadline_ms:g} ms, "
        f"{RESERVE - 1:.0%} of it in reserve",
    )
    for head in ("window", "p50", "p99", "quotes/s", "batch", "duty", "CPU", "MB", ""):
        table.add_column(head, justify="right")
    for choice in choices:
        p = choice.prediction
        table.add_row(
            f"{choice.window_ms:g}",
            f"{p.p50_ms:.0f}",
            f"{p.p99_ms:.0f}",
            f"{p.quotes_per_s:.2f}",
            f"{p.leaves:.1f}",
            f"{p.duty:.2f}",
            f"{p.cpu:.1%}",
            f"{p.memory_mb:.0f}",
            "◀ set" if choice is best else "" if choice.fits else "too slow",
            style="bold" if choice is best else None,
        )
    Console().print(table)
    if best is None:
        print(
            f"No window answers 99 of 100 within {deadline_ms:g} ms. A faster chip, a higher "
            "tpm.max_duty, fewer kinds of requests or a longer interval would."
        )
    else:
        print(f"Set batch.window_ms = {best.window_ms:g}")
