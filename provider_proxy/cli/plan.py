"""`provider-proxy plan`: predict latency and duty of a chip with many tenants, and the window to set.

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
from rich import box
from rich.console import Console
from rich.table import Table

from provider_proxy.cli.arguments import add_config_argument
from provider_proxy.errors import HostError
from provider_proxy.host.batching.simulation import (
    EXTENDS_PER_S,
    RESERVE,
    Choice,
    Costs,
    Scenario,
    choose,
)
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.config.load import load_config
from provider_proxy.host.config.tables import BatchTable, Config
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.tpm import ima
from provider_proxy.host.tpm.pace import capped_duty
from provider_proxy.host.tpm.times import ChipTimes
from provider_proxy.testing.disturb import CHIPS

DEFAULT_INTERVAL_S = 2.0  # Keylime's verifier's quote_interval
DEFAULT_DEADLINE_MS = 1000.0
MEASURED_QUOTES = 10
HEADS = ("window", "p50", "p99", "batch", "duty", "CPU", "MB", "IMA", "execs", "")


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
        help="seconds between two polls of a verifier (default: %(default)g)",
    )
    chip = parser.add_mutually_exclusive_group(required=True)
    chip.add_argument(
        "--chip",
        choices=sorted(CHIPS),
        help="a vendor's median chip; this, --quote-ms or --measure",
    )
    chip.add_argument("--quote-ms", type=_positive, metavar="MS", help="time of a quote in ms")
    chip.add_argument(
        "--measure",
        action="store_true",
        help="measure ten quotes with the TPM of --config; makes its keys if they are missing",
    )
    parser.add_argument(
        "--readings",
        type=_not_negative,
        default=0.0,
        metavar="N",
        help="PCR_Read commands per quote: 1 where requested PCRs change (default: %(default)g)",
    )
    parser.add_argument(
        "--extends-per-s",
        type=_not_negative,
        default=EXTENDS_PER_S,
        metavar="N",
        help="new or changed files a second that the host's IMA measures (default: %(default)g)",
    )
    parser.add_argument(
        "--ima",
        action="store_true",
        help="limit the duty by tpm.ima_wait_ms, as the daemon does with an active IMA policy",
    )
    parser.add_argument(
        "--deadline-ms",
        type=_positive,
        default=DEFAULT_DEADLINE_MS,
        metavar="MS",
        help="deadline of an answer, which 99 of 100 must keep, in ms (default: %(default)g)",
    )
    parser.add_argument(
        "--keys",
        type=_count,
        default=1,
        metavar="N",
        help="kinds of requests that share no batch (default: %(default)d)",
    )
    parser.add_argument(
        "--max-duty", type=_positive, metavar="SHARE", help="as tpm.max_duty (default: %(default)s)"
    )
    parser.add_argument(
        "--max-leaves", type=_count, metavar="N", help="as batch.max_leaves (default: %(default)s)"
    )
    add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be a number, 0 or above")
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
        times = trio.run(measure, config)
    else:
        times = CHIPS[args.chip] if args.chip else ChipTimes(quote_s=args.quote_ms / 1000)
    max_duty = args.max_duty
    if max_duty is None:
        active = args.ima or (args.measure and ima.is_measuring() is not False)
        bound_s = tpm.ima_wait_ms / 1000 if active and tpm.ima_wait_ms else None
        whole_s = times.quote_s + args.readings * times.read_s
        max_duty = capped_duty(tpm.max_duty, whole_s, bound_s)
    scenario = Scenario(
        tenants=args.tenants,
        interval_s=args.interval_s,
        quote_s=times.quote_s,
        readings=args.readings,
        read_s=times.read_s,
        extends_per_s=args.extends_per_s,
        extend_s=times.extend_s,
        max_duty=max_duty,
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


async def measure(config: Config) -> ChipTimes:
    """Median times of a host's TPM.

    Raises:
        HostError: no TPM, no keys.
    """
    from provider_proxy.host.quoters.local_tpm import open_quoter
    from provider_proxy.host.tpm.measure import measure_small_commands

    times = []
    async with open_quoter(
        dataclasses.replace(config.tpm, max_duty=1.0), config.state_dir, Metrics()
    ) as quoter:
        try:
            with trio.fail_after(config.tpm.hang_limit_s):
                for _ in range(MEASURED_QUOTES):
                    begin = time.monotonic()
                    nonce = secrets.token_hex(16).encode("ascii")
                    await quoter.quote(nonce, config.tpm.banks[0], 1)
                    times.append(time.monotonic() - begin)
                small_ms = await quoter.on_chip(
                    lambda opened: measure_small_commands(opened.context)
                )
        except trio.TooSlowError as exc:
            limit_s = config.tpm.hang_limit_s
            raise HostError(
                f"the TPM was not measured within {limit_s:g} s (tpm.hang_limit_s): it hangs, or other "
                "programs hold it"
            ) from exc
    small = {f"{name.removeprefix('pcr_')}_s": ms / 1000 for name, ms in small_ms.items()}
    return ChipTimes(quote_s=statistics.median(times), **small)


def _as_json(
    scenario: Scenario, deadline_ms: float, best: Choice | None, choices: list[Choice]
) -> dict[str, object]:
    windows = []
    for choice in choices:
        figures = dataclasses.asdict(choice.prediction)
        ima_wait = figures.pop("ima")
        figures |= {f"ima_{name}": value for name, value in ima_wait.items()}
        rounded = {
            name: round(value, 3) if value < math.inf else None for name, value in figures.items()
        }
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
        f"a quote takes {scenario.chip_s * 1000:.0f} ms",
        caption="predicted; times in ms, batch: requests a quote, CPU of one core\n"
        f"IMA: mean/p99 wait of a new program, {scenario.extends_per_s:g} a second; "
        "execs/s of one shell\n"
        f"duty at most {scenario.max_duty:g}, deadline {deadline_ms:g} ms, "
        f"{RESERVE - 1:.0%} of it in reserve",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=not head)
    for choice in choices:
        p = choice.prediction
        table.add_row(
            f"{choice.window_ms:g}",
            f"{p.p50_ms:.0f}",
            f"{p.p99_ms:.0f}",
            f"{p.leaves:.1f}",
            f"{p.duty:.2f}",
            f"{p.cpu:.1%}",
            f"{p.memory_mb:.0f}",
            f"{p.ima.mean_ms:.0f}/{p.ima.p99_ms:.0f}",
            f"{p.ima.execs_per_s:.0f}",
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
