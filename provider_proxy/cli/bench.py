"""`provider-proxy bench`: figures of this machine, each a ratio inside one run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from provider_proxy.bench import (
    bindings,
    bridge,
    contention,
    faults,
    hostile,
    ima,
    logs,
    overload,
    plan,
    quotes,
    scale,
    sweeps,
    watch,
)
from provider_proxy.errors import UsageError
from provider_proxy.tenant.fleet.driver import import_with_libpq
from provider_proxy.testing.disturb import CHIPS


def run_fleet(seed: int, say: Callable[[str], None]) -> dict[str, object]:
    """`bench.fleet`, which needs psycopg. Raises: HostError."""
    module = import_with_libpq("provider_proxy.bench.fleet")
    figures: dict[str, object] = module.run(seed, say)
    return figures


SUITES = {
    "quotes": quotes.run,
    "faults": faults.run,
    "contention": contention.run,
    "overload": overload.run,
    "bindings": bindings.run,
    "bridge": bridge.run,
    "plan": plan.run,
    "ima": ima.run,
    "scale": scale.run,
    "logs": logs.run,
    "hostile": hostile.run,
    "watch": watch.run,
    "fleet": run_fleet,
}
DEFAULT_SEED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("suite", choices=list(SUITES), help="what to measure")
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="quotes: measure only the CPU time per request, against a bare h11 server",
    )
    parser.add_argument(
        "--chip",
        choices=sorted(CHIPS),
        help="quotes: use a vendor's median chip instead of 100 ms per quote",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="plan: measure more, and write plots as PNG and SVG to DIR (needs the extra plot)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="seed of the load generator (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        HostError: swtpm is missing.
        VerificationError: an answer did not verify.
    """
    if args.baseline and args.suite != "quotes":
        raise UsageError("--baseline is an option of quotes only")
    if args.chip and args.suite != "quotes":
        raise UsageError("--chip is an option of quotes only")
    if args.plot and args.suite != "plan":
        raise UsageError("--plot is an option of plan only")
    if args.plot:
        from provider_proxy.bench import plots
    measure = quotes.run_baseline if args.baseline else SUITES[args.suite]
    if args.chip:
        measure = partial(quotes.run, chip=args.chip)
    console = Console(stderr=True)
    with console.status("starting") as status:

        def say(text: str) -> None:
            status.update(f"measuring: {text}")

        if args.plot:
            figures, found = sweeps.run_with_points(args.seed, say)
            for path in plots.draw(found, args.plot):
                console.print(f"written: {path}", highlight=False)
        else:
            figures = measure(args.seed, say)
    if args.json:
        print(json.dumps(figures))
        return 0
    if args.suite == "plan":
        _print_points(figures)
        return 0
    table = Table(title=f"provider-proxy bench {args.suite}", show_header=False)
    for name, value in figures.items():
        if isinstance(value, dict):
            table.add_section()
            for inner, figure in value.items():
                table.add_row(f"{name} {inner}", str(figure))
        else:
            table.add_row(name, str(value))
    Console().print(table)
    return 0


def _print_points(figures: dict[str, object]) -> None:
    """A row a point: what was measured, and how far that is from what was predicted."""
    table = Table(
        title="provider-proxy bench plan",
        caption="measured, and the difference from the prediction; ms, CPU of one core",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for head in ("point", "p50", "p99", "duty", "CPU", "ok"):
        table.add_column(head, justify="left" if head == "point" else "right", no_wrap=True)
    for name, row in figures.items():
        if isinstance(row, dict) and "chip" in row:
            shown = [
                f"{row[f'{figure}_measured']:{form}} {row[f'{figure}_ratio'] - 1:+4.0%}"
                for figure, form in plan.SHOWN.items()
            ]
            table.add_row(name, *shown, "yes" if row["within_15_percent"] else "no")
    Console().print(table)
    print(f"{figures['points_within_15_percent']} of {figures['points']} points within 15 %")
