"""`provider-proxy vms`: the VMs in a daemon's registry of vTPMs, asked from its admin listener."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from provider_proxy.cli.ask_admin import AdminClient
from provider_proxy.cli.keep_eks import keep
from provider_proxy.cli.trio_run import run_to_the_end
from provider_proxy.errors import ReplyError, UsageError
from provider_proxy.tenant.watch.ek_directory import EkDirectory

MAX_LIST_BYTES = 128 * 1024 * 1024  # vtpm.max_vms at its most, at 700 bytes each
COLUMNS = ("VM", "state", "EKs, SHA-256", "made")
FILE_WIDTH = 160  # for a reader that is not a terminal: no UUID is broken
SHOWN_HEX = 16
INTERVAL_S, MAX_INTERVAL_S = 2.0, 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "admin", metavar="ADMIN", help='admin.address of the daemon: "host:port" or "unix:/path"'
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument(
        "--ek-dir",
        type=Path,
        metavar="DIR",
        help="keep an empty file in DIR for each confirmed EK of a running VM, until SIGTERM",
    )
    parser.add_argument(
        "--interval-s",
        type=float,
        default=INTERVAL_S,
        metavar="SECONDS",
        help="with --ek-dir: how often the daemon is asked; default %(default)g",
    )


def run(args: argparse.Namespace) -> int:
    """Ask and show.

    Raises:
        HostError: nothing answers there.
        ReplyError: the answer is not a daemon's.
        UsageError: an option is out of bounds.
    """
    client = AdminClient(args.admin, called="ADMIN")
    if args.ek_dir is not None:
        if not 0 < args.interval_s <= MAX_INTERVAL_S:
            raise UsageError(f"--interval-s must be above 0 and at most {MAX_INTERVAL_S:g}")
        directory = EkDirectory(args.ek_dir)
        run_to_the_end(partial(keep, client, MAX_LIST_BYTES, directory, interval_s=args.interval_s))
        return 0
    results = client.get("/vms", MAX_LIST_BYTES)
    if args.json:
        print(json.dumps(results))
        return 0
    if not results.get("enabled"):
        print("vtpm.enabled is false: this daemon registers no vTPMs")
        return 0
    try:
        rows = [_row(vm) for vm in _vms(results)]
    except (KeyError, TypeError, ValueError) as exc:
        raise ReplyError(f"{args.admin} has a list of VMs that cannot be read") from exc
    if not rows:
        print("no VM with a vTPM is known")
        return 0
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*map(Text, row))  # names are foreign: no markup
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)
    return 0


def _vms(results: Mapping[str, object]) -> list[Mapping[str, object]]:
    vms = results["vms"]
    if not isinstance(vms, list):
        raise TypeError("vms is not a list")
    return vms


def _row(vm: Mapping[str, object]) -> tuple[str, ...]:
    eks, registered = vm["eks"], vm["registered_at"]
    if not isinstance(eks, list) or not isinstance(registered, int):
        raise TypeError("a VM in it has wrong values")
    state = str(vm["state"] if eks else "no EK known") if vm["running"] else "stopped"
    made = f"generation {vm['generation']}, issuer {vm['issuer']}"
    if registered:
        made += f"\n{datetime.fromtimestamp(registered, UTC):%Y-%m-%d %H:%M} UTC"
    return (
        f"{vm['name']}\n{vm['vm']}",
        state + ("\nmigrated" if vm["migrated"] else ""),
        "\n".join(f"{ek['alg']} {ek['spki_sha256'][:SHOWN_HEX]}…" for ek in eks),
        made,
    )
