"""`provider-proxy bridge`: present hosts as agents to your own, unmodified Keylime.

`run` is the service. `status` shows the state of each host, `reactivate` makes the verifier ask a host
again after it has stopped, and `make-keys` makes keys for a systemd credential.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import trio

from provider_proxy.cli.http import open_client
from provider_proxy.cli.watch import allow_connections
from provider_proxy.common import memory
from provider_proxy.common.files import is_there, write_private
from provider_proxy.common.log import in_background
from provider_proxy.errors import HostError, UsageError
from provider_proxy.tenant.bridge.bridge import Bridge, keys_of
from provider_proxy.tenant.bridge.keys import make_keys
from provider_proxy.tenant.bridge.quoting import agent_id_of
from provider_proxy.tenant.verifier_api import VerifierApi
from provider_proxy.tenant.watch.config import load_watch_config
from provider_proxy.tenant.watch.tables import WatchConfig

log = logging.getLogger(__name__)

STATUS_LIMIT_S = 10.0
FILES_A_HOST = 4  # its port, the connection to its proxy, and polls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    serve = actions.add_parser(
        "run", help="run the bridge: answer as the hosts' agents, until SIGTERM"
    )
    show = actions.add_parser(
        "status", help="show the state of each host; exit code 1 if one is refused"
    )
    show.add_argument("--json", action="store_true", help="one JSON object as the last line")
    again = actions.add_parser(
        "reactivate", help="make your verifier ask hosts again after it has stopped asking"
    )
    again.add_argument("hosts", nargs="+", metavar="HOST", help="name of a host in the file")
    for action, act in ((serve, _run), (show, _status), (again, _reactivate)):
        action.add_argument(
            "--config",
            type=Path,
            required=True,
            metavar="FILE",
            help="the file with the hosts and [bridge]",
        )
        action.set_defaults(act=act)
    keys = actions.add_parser("make-keys", help="make the bridge's keys, for a systemd credential")
    keys.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file for the keys; it must not exist yet",
    )
    keys.add_argument(
        "--ip",
        required=True,
        metavar="IP",
        help="the address at which your verifier reaches the agents",
    )
    keys.set_defaults(act=_make_keys)


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        ConfigError, UsageError: the file, or a policy that it names, is wrong.
        HostError: a file is missing, or the state or a port cannot be used.
        ReplyError: bridge or verifier gave no answer.
    """
    code: int = args.act(args)
    return code


def _load(path: Path) -> WatchConfig:
    return load_watch_config(path, for_bridge=True)


def _run(args: argparse.Namespace) -> int:
    config = _load(args.config)
    allow_connections(FILES_A_HOST * len(config.hosts))
    bridge = Bridge(config)
    memory.tune_gc()
    with in_background():
        trio.run(partial(bridge.run, partial(_load, args.config)))
    return 0


def _status(args: argparse.Namespace) -> int:
    admin = _load(args.config).bridge.admin
    try:
        with httpx.Client(trust_env=False, timeout=STATUS_LIMIT_S) as http:
            answer = http.get(f"http://{admin}/status").raise_for_status().json()
    except (httpx.HTTPError, ValueError) as exc:
        raise HostError(f"no bridge answers at {admin}: {exc}") from exc
    hosts = answer["hosts"]
    if args.json:
        print(json.dumps(answer))
    else:
        width = max(map(len, hosts), default=0)
        for name, host in hosts.items():
            print(f"{name:{width}}  {_line(host)}")
    return int(
        any(host["last"] == "refused" or host["verdict"] == "fail" for host in hosts.values())
    )


def _line(host: Mapping[str, object]) -> str:
    at = host["last_at"]
    when = f" at {datetime.fromtimestamp(at, UTC):%H:%M:%S}Z" if isinstance(at, float) else ""
    place = "push" if host["mode"] == "push" else f":{host['port']}"
    if not host["listening"]:
        place += " not listening"
    words = [f"{host['agent_id']}", place, f"{host['registered']}"]
    words.append(f"{host['last'] or 'not asked yet'}{when}")
    if host["reason"]:
        words.append(f"{host['reason']}")
    if host["verdict"]:
        words.append(f"verdict {host['verdict']}")
    if host["push_error"]:
        words.append(f"not posted: {host['push_error']}")
    if host["registrar_error"] and host["registered"] not in ("registered", "unconfirmed"):
        words.append(f"registrar: {host['registrar_error']}")
    return "  ".join(words)


def _reactivate(args: argparse.Namespace) -> int:
    config = _load(args.config)
    bridge = config.bridge
    unknown = [name for name in args.hosts if name not in config.hosts]
    if unknown:
        raise UsageError(f"{unknown[0]} is not in {args.config}")
    pushed = [name for name in args.hosts if config.hosts[name].mode == "push"]
    if pushed:
        raise UsageError(
            f"{pushed[0]} is in push mode, where Keylime has no reactivation: delete the agent at the "
            "verifier and add it again"
        )
    if bridge.verifier_url is None:
        raise UsageError("bridge.verifier_url is not set: set it to the URL of your verifier")
    keys = keys_of(config)
    ids = {name: agent_id_of(keys.ek_public, name) for name in args.hosts}
    asyncio.run(_ask_verifier(config, ids))
    return 0


async def _ask_verifier(config: WatchConfig, ids: Mapping[str, str]) -> None:
    bridge = config.bridge
    tls = (bridge.verifier_ca, bridge.verifier_cert, bridge.verifier_key)
    names = ("bridge.verifier_ca", "bridge.verifier_cert", "bridge.verifier_key")
    assert bridge.verifier_url is not None
    async with open_client(*tls, names=names, tls_name=bridge.verifier_tls_name) as http:
        verifier = VerifierApi(http, bridge.verifier_url)
        for name, agent_id in ids.items():
            await verifier.reactivate(agent_id)
            log.warning("%s: agent %s was reactivated at %s", name, agent_id, bridge.verifier_url)
            print(f"{name}: reactivated, agent {agent_id}")


def _make_keys(args: argparse.Namespace) -> int:
    if is_there(args.out):
        raise UsageError(f"{args.out} exists already; keys are not replaced")
    try:
        data = make_keys(args.ip)
    except ValueError as exc:
        raise UsageError(f"--ip: {exc}") from exc
    write_private(args.out, data)
    print(f"written: {args.out}")
    return 0
