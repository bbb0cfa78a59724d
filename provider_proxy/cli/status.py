"""`provider-proxy status`: what a running daemon does, once."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from provider_proxy.cli import ask_admin, status_view


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    ask_admin.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Ask once, and show it; 3 where the daemon takes no requests now.

    Raises:
        UsageError: the address is not valid, or not of this machine.
        HostError, ReplyError: no daemon answers there.
    """
    status = ask_admin.open_client(args).status()
    if args.json:
        print(json.dumps(status))
    else:
        show_once(status)
    return exit_code(status)


def show_once(status: ask_admin.Values) -> None:
    """Print a status to stdout, whatever that is.

    Raises:
        ReplyError: the status lacks required keys.
    """
    console = Console(highlight=False)
    console.print(status_view.render(status, batches=10, tenants=10, width=console.width))


def exit_code(status: ask_admin.Values) -> int:
    """0 while the daemon takes requests, 3 while it does not."""
    return 0 if status.get("state") == "ready" else 3
