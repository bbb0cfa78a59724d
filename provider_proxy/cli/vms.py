"""`provider-proxy vms`: the VMs in a daemon's registry of vTPMs, asked from its admin listener."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from provider_proxy.errors import HostError, ReplyError, UsageError
from provider_proxy.host.config.load import split_address

LIMIT_S = 10.0
MAX_LIST_BYTES = 128 * 1024 * 1024  # vtpm.max_vms at its most, at 700 bytes each
COLUMNS = ("VM", "state", "EKs, SHA-256", "made")
FILE_WIDTH = 160  # where nobody looks at lines: no UUID is broken
SHOWN_HEX = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "admin", metavar="ADMIN", help='admin.address of the daemon: "host:port" or "unix:/path"'
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Ask and show.

    Raises:
        HostError: nobody answers there.
        ReplyError: the answer is not a daemon's.
    """
    results = _ask(args.admin)
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
        raise TypeError("vms is no list")
    return vms


def _row(vm: Mapping[str, object]) -> tuple[str, ...]:
    eks, registered = vm["eks"], vm["registered_at"]
    if not isinstance(eks, list) or not isinstance(registered, int):
        raise TypeError("a VM is not as it must be")
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


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=LIMIT_S)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(LIMIT_S)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        self.sock = sock


def _connection(address: str) -> http.client.HTTPConnection:
    if address.startswith("unix:/"):
        return _UnixConnection(address.removeprefix("unix:"))
    if not address.rpartition(":")[2].isdecimal():
        raise UsageError('ADMIN must be "host:port" or "unix:/path", as in admin.address')
    host, port = split_address(address)
    return http.client.HTTPConnection(host, port, timeout=LIMIT_S)


def _ask(address: str) -> dict[str, object]:
    connection = _connection(address)
    try:
        connection.request("GET", "/vms")
        reply = connection.getresponse()
        status, body = reply.status, reply.read(MAX_LIST_BYTES + 1)
    except (OSError, http.client.HTTPException) as exc:
        raise HostError(f"no daemon answers at {address}: {exc}") from exc
    finally:
        connection.close()
    if status != 200 or len(body) > MAX_LIST_BYTES:
        raise ReplyError(f"{address} has no list of VMs", status=status)
    try:
        results = json.loads(body)["results"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ReplyError(f"{address} did not answer as a daemon does") from exc
    if not isinstance(results, dict):
        raise ReplyError(f"{address} did not answer as a daemon does")
    return results
