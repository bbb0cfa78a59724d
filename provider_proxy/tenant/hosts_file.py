"""A tenant's own file: which VM an agent id stands for, on which hosts it may run, how to ask them.

`provider-proxy ek-check` reads it, because Keylime gives it only environment variables. Only this file
decides: an agent that it does not name is refused, and so is an unknown key. Relative paths start at the
file's own directory. It sends no requests and trusts no environment variable.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from provider_proxy.common.addresses import parse_agent_id
from provider_proxy.common.failures import printable
from provider_proxy.common.findings import Finding, attempt, of_dates, warned
from provider_proxy.common.settings.document import Layout, Loaded, load, read_document
from provider_proxy.common.settings.schema import (
    check_related,
    hidden,
    named_tables,
    read_table,
    setting,
)
from provider_proxy.common.settings.values import (
    fail,
    number,
    one_of,
    read_choice,
    read_flag,
    read_host,
    read_label,
    read_path,
    read_pcrs,
    read_safe_url,
    read_uuid,
)
from provider_proxy.common.tls import TlsFiles, client_context, dates_of
from provider_proxy.errors import ConfigError, UsageError, WrongVmError
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.logs.judge import DEFAULT_UEFI_PCRS
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.vtpm_link import ISSUERS, STATES
from provider_proxy.tenant.policies import LogRules, PolicyFiles
from provider_proxy.trust.pins import PinStore

LAYOUT = Layout(max_bytes=4 * 1024 * 1024)  # 10,000 agents of 200 bytes, and room
DEFAULT_LIMIT_S = 60.0  # keylime_tenant waits for it, and sets no limit itself
ANY_RE = re.compile(r".*", re.DOTALL)
PROVES_LINKS, NEVER = "link", "never"
HOST_NEEDS = (
    ("runtime_policy_key", "runtime_policy"),
    *(("uefi_pcrs", "uefi"), ("boot_policy", "uefi")),
)


def _read_hosts(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise fail(key, "a list of names of hosts")
    names = tuple(read_label(key, name) for name in value)
    if len(set(names)) != len(names):
        raise fail(key, "a list of names without repetition")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEntry:
    """`[hosts.NAME]`: how to ask one host, and what to accept of it."""

    name: str = hidden("")
    url: str = setting(read_safe_url, "", "URL of its proxy; https, or http on loopback.")
    pinned: str = setting(read_label, "", "Its label in the directory of pins; NAME by default.")
    ca: Path | None = setting(read_path, None, "CA of the proxy's certificate, PEM.")
    cert: Path | None = setting(read_path, None, "Client certificate, PEM.")
    key: Path | None = setting(read_path, None, "Its private key, PEM; not readable by others.")
    tls_name: str | None = setting(
        read_host, None, "Name in the proxy's certificate; the URL's host by default."
    )
    tpm_policy: Path | None = setting(
        read_path, None, "PCR values in Keylime's tpm_policy JSON; a file."
    )
    insecure_any_state: bool = setting(read_flag, False, "No policy at all.")
    ima: bool = setting(read_flag, False, "Whether the IMA list is replayed.")
    runtime_policy: Path | None = setting(read_path, None, "Keylime's runtime policy; a file.")
    runtime_policy_key: Path | None = setting(
        read_path, None, "Key that must have signed runtime_policy (DSSE), PEM; a file."
    )
    ima_violations: Violations = setting(
        read_choice(Violations),
        Violations.REFUSE,
        "What to do with files that were written to while they were measured.",
    )
    uefi: bool = setting(read_flag, False, "Whether the firmware's event log is replayed.")
    uefi_pcrs: int | None = setting(read_pcrs, None, "PCRs that the event log must lead to.")
    boot_policy: Path | None = setting(read_path, None, "Digests that may be extended; a file.")
    claims: str = setting(
        one_of(PROVES_LINKS, NEVER),
        PROVES_LINKS,
        '"never" if the quoter is a Keylime agent: it signs any nonce, so any client that can ask it '
        "can have claims signed. Such a host is judged by its state only.",
    )

    @property
    def logs(self) -> LogRules:
        """What is demanded of its logs."""
        mask = DEFAULT_UEFI_PCRS if self.uefi_pcrs is None else self.uefi_pcrs
        return LogRules(
            ima=self.ima,
            runtime_policy=self.runtime_policy,
            runtime_policy_key=self.runtime_policy_key,
            violations=self.ima_violations,
            uefi_mask=mask if self.uefi else 0,
            boot_policy=self.boot_policy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTable:
    """`[agents.ID]`: the VM behind one Keylime agent."""

    vm: uuid.UUID | None = setting(read_uuid, None, "The VM; the agent's id by default.")
    hosts: tuple[str, ...] = setting(_read_hosts, (), "The hosts on which it may run.")
    least: str = setting(one_of(*STATES), STATES[0], "The least that the host must know of the EK.")
    ek_issuer: str | None = setting(
        one_of(*ISSUERS), None, "Which issuer must have certified the EK; any by default."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEntry:
    """The VM behind one Keylime agent.

    Attributes:
        hosts: where it may run: all of them prove links, or none does.
        least, ek_issuer: what else `VtpmLink` demands.
    """

    agent: str
    vm: uuid.UUID
    hosts: tuple[HostEntry, ...]
    least: str
    ek_issuer: str | None

    @property
    def is_linked(self) -> bool:
        """Whether its hosts prove which of them the VM runs on."""
        return self.hosts[0].claims == PROVES_LINKS


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMap:
    """The file, read and checked."""

    pins: Path = setting(read_path, Path(), "Needed. Directory that `provider-proxy pin` keeps.")
    limit_s: float = setting(
        number(0.1, 600),
        DEFAULT_LIMIT_S,
        "How long judging an agent may take, retries included, in seconds.",
    )
    hosts: Mapping[str, HostEntry] = dataclasses.field(default_factory=dict)
    agents: Mapping[str, AgentTable] = dataclasses.field(default_factory=dict)

    def agent(self, agent_id: str) -> AgentEntry:
        """The VM of an agent id, which is untrusted.

        Raises:
            WrongVmError: no VM was ordered under this id.
        """
        table = self.agents.get(agent_id)
        if table is None:
            raise WrongVmError(f"no VM was ordered for the agent {printable(agent_id[:64])!r}")
        assert table.vm is not None  # the reader has checked it
        return AgentEntry(
            agent=agent_id,
            vm=table.vm,
            hosts=tuple(self.hosts[host] for host in table.hosts),
            least=table.least,
            ek_issuer=table.ek_issuer,
        )


def load_link_map(path: Path) -> LinkMap:
    """The settings alone; see `load_hosts_file`."""
    return load_hosts_file(path).config


def load_hosts_file(path: Path) -> Loaded[LinkMap]:
    """Read the file.

    Raises:
        HostError: it cannot be read, or everybody can write it.
        ConfigError: it says something impossible; the message names file, line and key.
    """
    parse = partial(parse_link_map, base=path.absolute().parent)
    return load(read_document(path, LAYOUT), parse, {})


def parse_link_map(values: Mapping[str, object], base: Path) -> LinkMap:
    """The same from a parsed document.

    Args:
        base: where relative paths start.

    Raises:
        ConfigError: it says something impossible; the message names the key.
    """
    rest = {key: value for key, value in values.items() if key not in ("hosts", "agents")}
    known = read_table(LinkMap, rest, "", {}, folder=base)
    if "pins" not in values:
        raise ConfigError("pins is missing: the directory that `provider-proxy pin` keeps")
    for key in ("hosts", "agents"):
        if key not in values:
            raise fail(key, f"tables, [{key}.NAME]")
    hosts = {
        name: _host(name, table, base) for name, table in named_tables(values, "hosts").items()
    }
    agents: dict[str, AgentTable] = {}
    for name, table in named_tables(values, "agents", ANY_RE).items():
        key = f"agents.{name}"
        try:
            parse_agent_id(name)
        except UsageError as exc:
            raise ConfigError(f"{key}: {exc}", key=key) from exc
        agents[name] = _agent(key, name, table, hosts)
    read = dataclasses.replace(known, hosts=hosts, agents=agents)
    for name in agents:
        _check_claims(read.agent(name), f"agents.{name}")
    return read


def _host(name: str, values: Mapping[str, object], base: Path) -> HostEntry:
    key = f"hosts.{name}"
    host = read_table(HostEntry, values, f"{key}.", {}, folder=base)
    if not host.url:
        raise ConfigError(f"{key}.url must be set to the URL of its proxy")
    check_related(key, host, together=(("cert", "key"),), needs=HOST_NEEDS)
    judged = host.tpm_policy is not None or host.logs != LogRules()
    if host.insecure_any_state == judged:
        raise ConfigError(
            f"{key} must have either a policy (tpm_policy, ima, runtime_policy, uefi or boot_policy) or "
            "insecure_any_state = true"
        )
    return dataclasses.replace(host, name=name, pinned=host.pinned or name)


def _agent(
    key: str, name: str, values: Mapping[str, object], hosts: Mapping[str, HostEntry]
) -> AgentTable:
    table = read_table(AgentTable, values, f"{key}.", {})
    try:
        vm = table.vm or uuid.UUID(name)
    except ValueError:
        raise ConfigError(
            f"{key}.vm must be set to a UUID, because the agent's id is not a UUID"
        ) from None
    for host in table.hosts:
        if host not in hosts:
            raise ConfigError(f"{key}.hosts names {host!r}, and there is no table [hosts.{host}]")
    if not table.hosts:
        raise ConfigError(f"{key}.hosts must name at least one host")
    return dataclasses.replace(table, vm=vm)


def _check_claims(entry: AgentEntry, at: str) -> None:
    if len({host.claims for host in entry.hosts}) > 1:
        raise ConfigError(
            f'{at}.hosts mixes hosts that prove the link and hosts marked claims = "never": '
            "a good host of the second kind would make the link meaningless"
        )
    if not entry.is_linked and (entry.least != STATES[0] or entry.ek_issuer is not None):
        raise ConfigError(
            f"{at}: least and ek_issuer apply only to hosts that prove the link, and its hosts have "
            'claims = "never"'
        )


def tls_files(host: HostEntry) -> TlsFiles:
    """The TLS files of a host, by the names of their keys."""
    key = f"hosts.{host.name}"
    names = (f"{key}.ca", f"{key}.cert", f"{key}.key")
    return TlsFiles(ca=host.ca, cert=host.cert, key=host.key, names=names)


def find(known: LinkMap) -> Iterator[Finding]:
    """All problems of the files that it names. Opens files."""
    policies, pins = PolicyFiles(), PinStore(known.pins)
    for host in known.hosts.values():
        files = tls_files(host)
        yield from attempt(partial(client_context, files))
        yield from of_dates(partial(dates_of, files))
        found = [*warned(partial(pins.load, host.pinned))]
        if host.tpm_policy is not None:
            found += attempt(partial(policies.tpm, host.tpm_policy, HashAlg.SHA256))
        found += attempt(partial(policies.logs, host.logs, HashAlg.SHA256))
        for finding in found:
            yield Finding(level=finding.level, text=f"hosts.{host.name}: {finding.text}")
