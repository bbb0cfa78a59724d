"""`provider-proxy fleet`: hosts that several processes watch together, on PostgreSQL.

migrate   creates or upgrades the tables
import    changes the database's hosts to those of a watcher's file; shows first what would change
status    members, shards, hosts by state, the outbox
hosts     hosts, one a line
reports   what was reported, and what waits
silence   holds the reports of some hosts back for a while
silences  the silences in force
unsilence ends one
drain     has a member give its shards back
size      what so many hosts need
restored  raises epochs above those from before a backup was restored
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from provider_proxy.errors import UsageError
from provider_proxy.tenant.fleet.driver import import_with_libpq
from provider_proxy.tenant.fleet.lease import DEFAULT_SHARDS
from provider_proxy.tenant.fleet.sizing import fleet_size

MAX_HOSTS = 10_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their options."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")

    def add(name: str, text: str) -> Any:
        part = parts.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        part.add_argument(
            "--config",
            type=Path,
            required=True,
            metavar="FILE",
            help="the watcher's file; its `state` names the database",
        )
        return part

    made = add("migrate", "create or upgrade the tables of a fleet")
    made.add_argument(
        "--shards",
        type=int,
        default=DEFAULT_SHARDS,
        help="parts that a new fleet is divided into (default: %(default)s); 1 for active and standby",
    )
    made.add_argument(
        "--grant", metavar="ROLE", help="grant this role the rights for the daily work"
    )
    made = add("import", "change the database's hosts to those of the file")
    made.add_argument(
        "--apply",
        action="store_true",
        help="change the database; without it, only show what would change",
    )
    made.add_argument("--remove", action="store_true", help="remove hosts that are not in the file")
    made = add("status", "show members, shards, hosts by state, and the outbox")
    made.add_argument("--json", action="store_true", help="one JSON object as the last line")
    made = add("hosts", "list hosts as they may be shown now")
    made.add_argument(
        "--like", default="%", metavar="PATTERN", help="names; %% stands for any characters"
    )
    made.add_argument("--state", metavar="STATE", help="only hosts that are shown in this state")
    made.add_argument("--json", action="store_true", help="one JSON object as the last line")
    made = add("reports", "show reports, the newest last")
    made.add_argument(
        "--like", default="%", metavar="PATTERN", help="hosts; %% stands for any characters"
    )
    made.add_argument(
        "--waiting", action="store_true", help="only reports that are not delivered yet"
    )
    made = add("silence", "hold back the reports of some hosts for a while")
    made.add_argument(
        "--like", required=True, metavar="PATTERN", help="hosts; %% stands for any characters"
    )
    made.add_argument(
        "--minutes", type=float, required=True, help="minutes until it ends by itself"
    )
    made.add_argument("--why", required=True, help="the reason, which others see")
    made = add("drain", "have a member give its shards back and take none")
    made.add_argument("member", metavar="MEMBER", help="its name or id")
    add("silences", "list the silences in force")
    made = add("unsilence", "end a silence; the reports that it held back are delivered")
    made.add_argument("id", metavar="ID", help="as `fleet silences` lists it")
    made = parts.add_parser(
        "size",
        help="compute what a fleet needs",
        description="Compute what a fleet needs: members, connections, database. It connects to nothing.",
    )
    made.add_argument("--hosts", type=int, required=True, help="how many")
    made.add_argument(
        "--interval-s",
        type=float,
        default=10.0,
        help="how often each is asked (default: %(default)g)",
    )
    made.add_argument("--json", action="store_true", help="one JSON object as the last line")
    add("restored", "after a backup was restored: raise epochs, and stop showing old verdicts")


def run(args: argparse.Namespace) -> int:
    """Do the part.

    Raises:
        UsageError: the file names no database, or an option is wrong.
        HostError: the database cannot be reached, or has no tables.
    """
    if args.part == "size":
        return _size(args)
    # A parser can be made, and pages written from it, where psycopg or libpq is not installed.
    parts = import_with_libpq("provider_proxy.cli.fleet_parts")
    code: int = parts.PARTS[args.part](args)
    return code


def _size(args: argparse.Namespace) -> int:
    """Raises: UsageError."""
    if not 1 <= args.hosts <= MAX_HOSTS or not 0.1 <= args.interval_s <= 86_400:
        raise UsageError(f"--hosts is 1 to {MAX_HOSTS}, --interval-s 0.1 to 86400")
    size = fleet_size(args.hosts, args.interval_s)
    if args.json:
        print(json.dumps(dataclasses.asdict(size)))
        return 0
    print(f"{size.verdicts_s:,.0f} verdicts a second")
    print(f"members      {size.members}, a core each; one of them may fail")
    print(f"connections  {size.connections}")
    print(f"database     {size.database_cores} cores, {size.database_gb:.1f} GB")
    print(f"its WAL      {size.wal_mb_s:.1f} MB/s")
    return 0
