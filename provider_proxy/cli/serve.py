"""`provider-proxy serve`: the daemon in the foreground, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
from functools import partial

from provider_proxy.cli.arguments import add_config_argument
from provider_proxy.cli.trio_run import run_to_the_end
from provider_proxy.common import log
from provider_proxy.host import daemon
from provider_proxy.host.config.load import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Serve.

    Raises:
        HostError, ConfigError: it cannot start; the message says why.
    """
    config = load_config(args.config)
    log.set_up(args.log_level or config.log.level, config.log.format)
    run_to_the_end(partial(daemon.run, config, read_config=partial(load_config, args.config)))
    return 0
