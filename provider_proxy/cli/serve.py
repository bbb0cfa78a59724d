"""`provider-proxy serve`: the daemon in the foreground, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
from pathlib import Path

import trio

from provider_proxy import daemon
from provider_proxy.config import load_config
from provider_proxy.errors import HostError, ProviderProxyError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="the configuration, TOML"
    )


def run(args: argparse.Namespace) -> int:
    """Serve.

    Raises:
        HostError, ConfigError: it cannot start; the message says why.
    """
    config = load_config(args.config)
    try:
        trio.run(daemon.run, config)
    except* ProviderProxyError as group:
        # Several at once happen only while stopping; the first tells why.
        raise _first(group) from group
    return 0


def _first(group: BaseExceptionGroup[ProviderProxyError]) -> ProviderProxyError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, ProviderProxyError) else HostError(str(error))
