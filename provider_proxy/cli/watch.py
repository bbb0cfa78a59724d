"""`provider-proxy watch`: verify the hosts under your VMs continuously.

Reports go to stdout as JSON lines, the log to stderr. With `--once` every host is asked once, and the
exit code gives the result: 0 all are trusted, 1 one was refused, 3 one could not be judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from functools import partial
from pathlib import Path

import trio

from provider_proxy.common import descriptors, log, memory
from provider_proxy.common.version import program_version
from provider_proxy.errors import HostError, UsageError
from provider_proxy.tenant.fleet.driver import import_with_libpq
from provider_proxy.tenant.watch.config import load_watch_config
from provider_proxy.tenant.watch.host import HostWatch
from provider_proxy.tenant.watch.tables import WatchConfig
from provider_proxy.tenant.watch.watcher import Watcher, verdicts

OTHER_FILES = 100  # state, policies, webhook, commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="the file with the hosts and their policies",
    )
    parser.add_argument(
        "--once", action="store_true", help="ask every host once; the exit code says the result"
    )
    parser.add_argument(
        "--json", action="store_true", help="with --once: one JSON object as the last line"
    )


def run(args: argparse.Namespace) -> int:
    """Watch.

    Raises:
        ConfigError, UsageError: the file, or a policy that it names, is wrong.
        HostError: a file is missing, or the state cannot be kept.
    """
    config = load_watch_config(args.config)
    if config.state is not None:
        return _as_member(config, once=args.once)
    allow_connections(len(config.hosts))
    if args.once:
        return _once(Watcher(config), args.json)
    watcher = Watcher(config, write=_write)
    memory.tune_gc()
    with log.in_background():
        trio.run(partial(watcher.run, partial(load_watch_config, args.config)))
    return 0


def _as_member(config: WatchConfig, *, once: bool) -> int:
    """Watch as a member of a fleet.

    Raises:
        UsageError: the address is wrong, or `--once` was asked for.
        HostError: the database cannot be reached, or has no tables.
    """
    if once:
        raise UsageError("--once cannot be used with state: a fleet's members ask its hosts")
    # Needs psycopg, which a watcher without a database does not.
    member_module = import_with_libpq("provider_proxy.tenant.fleet.member")
    assert config.state is not None
    descriptors.raise_limit()  # a connection a host, and shards come
    member = member_module.FleetMember(
        config,
        config.state,
        name=config.member or f"{platform.node()}-{os.getpid()}",
        version=program_version(),
        write=_write,
    )
    memory.tune_gc()
    with log.in_background():
        trio.run(member.run)
    return 0


def allow_connections(hosts: int) -> None:
    """A connection a host: use all the open files that the process may have.

    Raises:
        HostError: they are too few.
    """
    limit, needed = descriptors.raise_limit(), hosts + OTHER_FILES
    if needed > limit:
        raise HostError(f"{hosts} hosts need {needed} open files, and the limit is {limit}")


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _once(watcher: Watcher, as_json: bool) -> int:
    hosts = trio.run(watcher.once)
    trusted, refused, failed = verdicts(hosts)
    if as_json:
        summary = {name: _summary(host) for name, host in hosts.items()}
        figures = {"trusted": trusted, "refused": refused, "failed": failed, "hosts": summary}
        print(json.dumps(figures))
    else:
        width = max(map(len, hosts))
        for name, host in hosts.items():
            state = host.verdict.value if host.verdict else "not asked"
            why = f"  {type(host.error).__name__}: {host.error}" if host.error else ""
            print(f"{name:{width}}  {state}{why}")
    return 1 if refused else 3 if failed else 0


def _summary(host: HostWatch) -> dict[str, object]:
    return {
        "state": host.verdict.value if host.verdict else None,
        "error": type(host.error).__name__ if host.error else None,
        "reason": str(host.error) if host.error else None,
    }
