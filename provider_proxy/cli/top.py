"""`provider-proxy top`: what a running daemon does, live in the terminal, until q.

Without a terminal it prints once and ends, as `status` does; `--json` writes a line each refresh, for
programs, until the reader goes. It waits for a daemon that restarts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live

from provider_proxy.cli import ask_admin, status, status_view
from provider_proxy.errors import HostError, ReplyError, UsageError

LEAST_INTERVAL_S, MOST_INTERVAL_S = 0.1, 3600.0
ROWS_OF_HEAD = 13  # lines of a screen that are neither batches nor tenants


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    ask_admin.add_arguments(parser)
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds between two refreshes (default: 1)",
    )
    parser.add_argument(
        "--json", action="store_true", help="no screen: one line with a JSON object at each refresh"
    )


def run(args: argparse.Namespace) -> int:
    """Look until q.

    Raises:
        UsageError: the address is not valid, or not of this machine; a bad interval.
        HostError, ReplyError: no daemon answers there at the first look.
    """
    if not LEAST_INTERVAL_S <= args.interval <= MOST_INTERVAL_S:
        raise UsageError(f"--interval must be in {LEAST_INTERVAL_S:g}..{MOST_INTERVAL_S:g}")
    client = ask_admin.open_client(args)
    first = client.status()
    if args.json:
        return _stream(client, first, args.interval)
    if not sys.stdout.isatty():
        status.show_once(first)
        return status.exit_code(first)
    return _screen(client, first, args.interval)


def _stream(client: ask_admin.AdminClient, first: ask_admin.Values, interval: float) -> int:
    seen = first
    while True:
        print(json.dumps(seen), flush=True)
        time.sleep(interval)
        seen = client.status()


def _screen(client: ask_admin.AdminClient, first: ask_admin.Values, interval: float) -> int:
    console = Console(highlight=False)
    seen, problem = first, ""
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            room = max(6, console.height - ROWS_OF_HEAD)
            tenants = max(2, room // 3)
            picture = status_view.render(
                seen,
                batches=room - tenants,
                tenants=tenants,
                width=console.width,
                problem=problem,
                footer="q quits",
            )
            live.update(picture, refresh=True)
            if pressed(interval) in ("q", "Q", "\x04"):
                return 0
            try:
                seen, problem = client.status(), ""
            except (HostError, ReplyError) as exc:
                problem = str(exc)
    return 0


@contextlib.contextmanager
def _keys() -> Iterator[status_view.Pressed]:
    """Keys one by one, not echoed; the terminal is as before in the end."""
    if not sys.stdin.isatty():

        def sleep(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield sleep
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([fd], [], [], seconds)
        return os.read(fd, 1).decode("ascii", "replace") if ready else ""

    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
