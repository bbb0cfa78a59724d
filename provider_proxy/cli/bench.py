"""`provider-proxy bench`: figures of this machine, each a ratio inside one run."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from provider_proxy.bench import quotes

DEFAULT_SEED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("suite", choices=["quotes"], help="what to measure")
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="quotes: only the CPU a request, against the same server answering a constant",
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the load generator")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        HostError: swtpm is missing.
        VerificationError: an answer did not verify.
    """
    measure = quotes.run_baseline if args.baseline else quotes.run
    console = Console(stderr=True)
    with console.status("starting") as status:
        figures = measure(args.seed, lambda text: status.update(f"measuring: {text}"))
    if args.json:
        print(json.dumps(figures))
        return 0
    table = Table(title="provider-proxy bench quotes", show_header=False)
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console().print(table)
    return 0
