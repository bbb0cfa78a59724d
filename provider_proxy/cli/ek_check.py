"""`provider-proxy ek-check`: Keylime's `ek_check_script`, and what it prints is in the tenant's log.

It has no arguments there, so all comes from Keylime's environment variables, which are hostile, and
from the tenant's own file at its usual place; other users must not be able to change it or what it names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from provider_proxy.cli import http
from provider_proxy.cli.verify import link_line, link_values, load_policy
from provider_proxy.common.files import demand_ours
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.policy import Policy, UnsafeAcceptAny
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.ek_check import GoodAgent, ProvenHost, check_agent, read_environment
from provider_proxy.tenant.hosts_file import HostEntry, LinkMap, load_link_map
from provider_proxy.trust.pins import PinStore

DEFAULT_FILE = Path("/etc/provider-proxy/tenant.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_FILE,
        metavar="FILE",
        help="your own file of agents, VMs and hosts, TOML (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Judge the agent that the environment names.

    Raises:
        VerificationError: refused.
        ReplyError: a host that is needed gave no answer in time.
        UsageError, HostError: the file or what it names is wrong, missing, or others can change it.
    """
    agent_id, ek = read_environment(os.environ)
    demand_ours(args.config)
    known = load_link_map(args.config)
    _demand_ours(known, agent_id)
    good = asyncio.run(
        check_agent(known, agent_id, ek, policy_of=_policy_of, open_proxy=_open_proxy)
    )
    _show(good, as_json=args.json)
    return 0


def _demand_ours(known: LinkMap, agent_id: str) -> None:
    """The files that decide must be the tenant's own, as its file is."""
    pins = PinStore(known.pins)
    demand_ours(known.pins)
    for host in known.agent(agent_id).hosts:
        pin = pins.path_of(host.pinned) if pins.has(host.pinned) else None
        policies = (host.tpm_policy, host.logs.runtime_policy, host.logs.boot_policy)
        for path in (pin, *policies, host.logs.runtime_policy_key, host.ca, host.cert, host.key):
            if path is not None:
                demand_ours(path)


def _policy_of(host: HostEntry) -> Policy:
    if host.tpm_policy is None and not host.insecure_any_state:
        return UnsafeAcceptAny()  # its logs are judged
    return load_policy(host.tpm_policy, any_state=host.insecure_any_state, bank=HashAlg.SHA256)


@asynccontextmanager
async def _open_proxy(host: HostEntry) -> AsyncIterator[ProxyClient]:
    names = (f"hosts.{host.name}.ca", f"hosts.{host.name}.cert", f"hosts.{host.name}.key")
    async with http.open_client(
        host.ca, host.cert, host.key, names=names, tls_name=host.tls_name
    ) as client:
        yield ProxyClient(client, host.url)


def _show(good: GoodAgent, *, as_json: bool) -> None:
    entry = good.entry
    (first, *_) = good.hosts
    link = None if good.link is None else link_values(good.link, first.quote)
    if as_json:
        values: dict[str, object] = {
            "good": True,
            "agent": entry.agent,
            "vm": str(entry.vm),
            "hosts": [proven.host.name for proven in good.hosts],
            "linked": link is not None,
        }
        print(json.dumps(values if link is None else {**values, "link": link}))
        return
    for proven in good.hosts:
        print(_state_line(proven))
    if link is not None:
        print(link_line(link, first.host.name))
        return
    names = ", ".join(proven.host.name for proven in good.hosts)
    print(
        f"NOT linked: nothing proves that the VM {entry.vm} runs on {names}: "
        f'{"it is" if len(good.hosts) == 1 else "they are"} marked claims = "never"; '
        "only the state was checked"
    )


def _state_line(proven: ProvenHost) -> str:
    host = proven.host
    if host.insecure_any_state:
        return f"{host.name}: answered with a fresh quote; its state was not checked"
    pcrs = ", ".join(map(str, proven.quote.pcrs))
    files = (host.tpm_policy, host.logs.runtime_policy, host.logs.boot_policy)
    names = " and ".join(path.name for path in files if path is not None)
    allowed = f", as {names} allows" if names else ", its logs lead to them"
    return f"{host.name}: good: fresh quote of PCRs {pcrs}{allowed}"
