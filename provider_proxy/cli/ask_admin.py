"""How `status` and `top` reach a running daemon: its admin listener, on loopback or a unix socket.

What comes back is bounded and read as untrusted: whoever holds that port may say anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from provider_proxy.cli.arguments import DEFAULT_CONFIG
from provider_proxy.common.settings.values import read_addresses
from provider_proxy.errors import HostError, ReplyError, UsageError
from provider_proxy.host.config.load import check_local, load_config, split_address

TIMEOUT_S = 5.0  # the daemon answers in milliseconds, or is too busy to be asked
MAX_STATUS_BYTES = 4 * 1024 * 1024  # 240 batches and 100 tenants with long names make some 200 kB
VERSION = 1

Values = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say where the daemon is."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--admin", metavar="ADDRESS", help="its admin listener: 127.0.0.1:8895 or unix:/path"
    )
    where.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help=f"its configuration, which names the listener (default: {DEFAULT_CONFIG})",
    )


class AdminClient:
    """Asks one daemon, again and again.

    Raises:
        UsageError: the address is none, or not of this machine.
        HostError: the configuration cannot be read.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.address = args.admin or _configured(args.config)
        read_addresses("--admin", self.address)
        check_local("--admin", (self.address,))
        is_unix = self.address.startswith("unix:")
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(uds=self.address[5:] if is_unix else None),
            base_url="http://localhost" if is_unix else f"http://{self.address}",
            timeout=TIMEOUT_S,
            trust_env=False,
        )

    def status(self) -> dict[str, Any]:
        """The results of `GET /status`.

        Raises:
            HostError: nobody answers there, or we may not ask.
            ReplyError: what answers is no daemon that this version understands.
        """
        try:
            with self._client.stream("GET", "/status") as response:
                body = b""
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_STATUS_BYTES:
                        raise ReplyError(f"{self.address} sent more than a status has")
                code = response.status_code
        except httpx.HTTPError as exc:
            raise HostError(f"no answer from the admin listener at {self.address}: {exc}") from exc
        if code != 200:
            raise ReplyError(f"{self.address} answered {code}: is it an admin listener?")
        return parse_status(body)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _configured(path: Path) -> str:
    addresses = load_config(path).admin.address
    if not addresses:
        raise UsageError(f"{path} has no admin.address: there is nowhere to ask")
    if not addresses[0].startswith("unix:") and split_address(addresses[0])[1] == 0:
        raise UsageError("admin.address has port 0: name the real one with --admin")
    return addresses[0]


def parse_status(body: bytes) -> dict[str, Any]:
    """Read the envelope of `GET /status`, untrusted bytes.

    Raises:
        ReplyError: not a status of the version that this program reads.
    """
    try:
        results = json.loads(body)["results"]
        version = results["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ReplyError("the reply is no status") from exc
    if version != VERSION:
        raise ReplyError(f"the status has version {version!r}, and this program reads {VERSION}")
    checked: dict[str, Any] = results
    return checked
