"""How commands reach a running daemon: its admin listener, on loopback or a unix socket.

The answer is bounded and read as untrusted: any program can listen at that address.
"""

from __future__ import annotations

import argparse
import http.client
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provider_proxy.cli.arguments import DEFAULT_CONFIG
from provider_proxy.common.addresses import (
    MUST_ADDRESS,
    check_local,
    parse_address,
    split_address,
)
from provider_proxy.errors import HostError, ReplyError, UsageError
from provider_proxy.evidence.strict_json import parse_own_json
from provider_proxy.host.config.load import load_config

TIMEOUT_S = 5.0  # the daemon answers in milliseconds, unless it is overloaded
MAX_STATUS_BYTES = 4 * 1024 * 1024  # 240 batches and 100 tenants with long names make some 200 kB
VERSION = 1

Values = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say where the daemon is."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--admin",
        metavar="ADDRESS",
        help="the daemon's admin listener: 127.0.0.1:8895 or unix:/path",
    )
    where.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help=f"the daemon's configuration, which names that listener (default: {DEFAULT_CONFIG})",
    )


def open_client(args: argparse.Namespace) -> AdminClient:
    """A client by the arguments of `add_arguments`.

    Raises:
        UsageError: the address is not valid, or not of this machine.
        HostError: the configuration cannot be read.
    """
    return AdminClient(args.admin or configured(args.config), called="--admin")


class AdminClient:
    """Asks one daemon, again and again.

    Args:
        address: as `admin.address` has it.
        called: what messages call the address.

    Raises:
        UsageError: the address is not valid, or not of this machine.
    """

    def __init__(self, address: str, *, called: str = "admin.address") -> None:
        try:
            self.address = parse_address(address)
        except UsageError as exc:
            raise UsageError(f"{called} must be {MUST_ADDRESS}: {exc}") from exc
        try:
            check_local((self.address,))
        except UsageError as exc:
            raise UsageError(f"{called} {exc}") from exc

    def status(self) -> dict[str, Any]:
        """The results of `GET /status`.

        Raises:
            HostError, ReplyError: as `get`; or a version that this program does not read.
        """
        return check_status(self.get("/status", MAX_STATUS_BYTES))

    def get(self, path: str, limit: int) -> dict[str, Any]:
        """The results of a path.

        Args:
            limit: of the answer, in bytes.

        Raises:
            HostError: nothing answers there, or this user may not ask.
            ReplyError: the program that answers is not the daemon.
        """
        connection = _connection(self.address)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            status, body = reply.status, reply.read(limit + 1)
        except (OSError, http.client.HTTPException) as exc:
            raise HostError(f"no daemon answers at {self.address}: {exc}") from exc
        finally:
            connection.close()
        if status != 200:
            raise ReplyError(f"{self.address} answered {status}: is it an admin listener?")
        if len(body) > limit:
            raise ReplyError(f"{self.address} sent more than {limit} bytes for {path}")
        return parse_results(body)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def _connection(address: str) -> http.client.HTTPConnection:
    if address.startswith("unix:"):
        return _UnixConnection(address.removeprefix("unix:"))
    host, port = split_address(address)
    return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)


def configured(path: Path) -> str:
    """The admin listener that a configuration names.

    Raises:
        UsageError: it names none, or leaves the port to the system.
        HostError: it cannot be read.
    """
    addresses = load_config(path).admin.address
    if not addresses:
        raise UsageError(f"{path} does not set admin.address: set it, and restart the daemon")
    if not addresses[0].startswith("unix:") and split_address(addresses[0])[1] == 0:
        raise UsageError("admin.address has port 0: give the real address with --admin")
    return addresses[0]


def parse_results(body: bytes) -> dict[str, Any]:
    """The results of an envelope, untrusted bytes. Raises: ReplyError."""
    try:
        results = parse_own_json(body, "the daemon's answer").get("results")
    except UsageError as exc:
        raise ReplyError(str(exc)) from exc
    if not isinstance(results, dict):
        raise ReplyError("the daemon's answer has no results")
    return results


def check_status(results: dict[str, Any]) -> dict[str, Any]:
    """Raises: ReplyError where it is not a status of the version that this program reads."""
    version = results.get("version")
    if version != VERSION:
        raise ReplyError(
            f"the status has version {version!r}, and this program reads version {VERSION}"
        )
    return results
