"""A tenant's own file: which VM an agent id stands for, on which hosts it may run, how to ask those.

`provider-proxy ek-check` reads it where Keylime gives it nothing but environment variables. The file is
the tenant's word and decides alone: an agent that it does not name is refused, so is a key that it does
not know. Relative paths start at the file's own directory. Asks nobody, trusts no environment.
"""

from __future__ import annotations

import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from provider_proxy.common.addresses import is_safe_url, parse_agent_id
from provider_proxy.common.files import read_trusted
from provider_proxy.common.settings.values import read_pcrs
from provider_proxy.errors import ConfigError, UsageError, WrongVmError
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.logs.judge import DEFAULT_UEFI_PCRS
from provider_proxy.evidence.vtpm_link import ISSUERS
from provider_proxy.tenant.policies import LogRules
from provider_proxy.trust.pins import LABEL_RE

MAX_BYTES = 4 * 1024 * 1024  # 10,000 agents of 200 bytes, and room
MAX_TEXT_CHARS = 2048
DEFAULT_LIMIT_S = (
    60.0  # whoever adds an agent waits for us; Keylime's tenant sets no limit of its own
)
MIN_LIMIT_S, MAX_LIMIT_S = 0.1, 600.0
_LOG_KEYS = (
    *("ima", "runtime_policy", "runtime_policy_key", "ima_violations"),
    *("uefi", "uefi_pcrs", "boot_policy"),
)
_HOST_KEYS = frozenset(
    ("url", "ca", "cert", "key", "pinned", "tpm_policy", "insecure_any_state", "claims", *_LOG_KEYS)
)
_AGENT_KEYS = frozenset(("vm", "hosts", "confirmed", "ek_issuer"))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEntry:
    """How to ask one host, and what to accept of it.

    Attributes:
        pinned: its label in the directory of pins.
        ca, cert, key: TLS files for its proxy; None where not needed.
        tpm_policy: file of the host's allowed PCR values; None where its logs are judged, or with
            `insecure_any_state`.
        logs: what its logs must be.
        claims: "never" where the quoter is a Keylime agent: that signs nonces as they come, so that
            whoever asks it can have claims of his own making signed. Such a host is judged by its state
            alone.
    """

    name: str
    url: str
    pinned: str
    ca: Path | None
    cert: Path | None
    key: Path | None
    tpm_policy: Path | None
    insecure_any_state: bool
    logs: LogRules
    claims: Literal["link", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEntry:
    """The VM behind one Keylime agent.

    Attributes:
        hosts: where it may run: all of them prove links, or none does.
        confirmed, ek_issuer: what `VtpmLink` demands besides.
    """

    agent: str
    vm: uuid.UUID
    hosts: tuple[HostEntry, ...]
    confirmed: bool
    ek_issuer: str | None

    @property
    def is_linked(self) -> bool:
        """Whether its hosts prove which of them the VM runs on."""
        return self.hosts[0].claims == "link"


class LinkMap:
    """The file, read and checked.

    Attributes:
        pins: the directory of pins.
        limit_s: how long judging an agent may take, retries included, in seconds.
    """

    def __init__(self, pins: Path, limit_s: float, agents: Mapping[str, AgentEntry]) -> None:
        self.pins = pins
        self.limit_s = limit_s
        self._agents = dict(agents)

    def agent(self, agent_id: str) -> AgentEntry:
        """The VM of an agent id, which may come from anywhere.

        Raises:
            WrongVmError: no VM was ordered under this id.
        """
        entry = self._agents.get(agent_id)
        if entry is None:
            shown = "".join(c if c.isprintable() else "?" for c in agent_id[:64])
            raise WrongVmError(f"no VM was ordered for the agent {shown!r}")
        return entry


def load_link_map(path: Path) -> LinkMap:
    """Read the file.

    Raises:
        HostError: it cannot be read, or everybody can write it.
        UsageError: it says something impossible; the message names the key.
    """
    try:
        values = tomllib.loads(read_trusted(path, MAX_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{path} is not TOML: {exc}") from exc
    return parse_link_map(values, path.absolute().parent)


def parse_link_map(values: Mapping[str, object], base: Path) -> LinkMap:
    """The same from a parsed document.

    Args:
        base: where relative paths start.

    Raises:
        UsageError: it says something impossible; the message names the key.
    """
    _known(values, frozenset(("pins", "limit_s", "hosts", "agents")), "")
    pins = _path(values, "pins", "pins", base)
    if pins is None:
        raise UsageError("pins is missing: the directory that `provider-proxy pin` keeps")
    hosts = {
        name: _host(name, _table(entry, f"hosts.{name}"), base)
        for name, entry in _table(values.get("hosts"), "hosts").items()
    }
    agents = {
        name: _agent(name, _table(entry, f"agents.{name}"), hosts)
        for name, entry in _table(values.get("agents"), "agents").items()
    }
    return LinkMap(pins, _limit_s(values), agents)


def _limit_s(values: Mapping[str, object]) -> float:
    value = values.get("limit_s", DEFAULT_LIMIT_S)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not MIN_LIMIT_S <= value <= MAX_LIMIT_S
    ):
        raise UsageError(f"limit_s must be a number from {MIN_LIMIT_S:g} to {MAX_LIMIT_S:g}")
    return float(value)


def _host(name: str, values: Mapping[str, object], base: Path) -> HostEntry:
    at = f"hosts.{name}"
    _known(values, _HOST_KEYS, f"{at}.")
    url = _text(values, "url", at)
    if url is None or not is_safe_url(url):
        raise UsageError(f"{at}.url must begin with https:// (or http:// on loopback)")
    cert, key = (_path(values, part, f"{at}.{part}", base) for part in ("cert", "key"))
    if (cert is None) != (key is None):
        raise UsageError(f"{at}.cert and {at}.key belong together")
    pinned = _text(values, "pinned", at) or name
    if not LABEL_RE.fullmatch(pinned):
        raise UsageError(f"{at}.pinned must be a label of a pin")
    claims = values.get("claims", "link")
    if claims not in ("link", "never"):
        raise UsageError(f'{at}.claims must be "link" or "never"')
    any_state = _flag(values, "insecure_any_state", at)
    policy = _path(values, "tpm_policy", f"{at}.tpm_policy", base)
    logs = _log_rules(values, at, base)
    judged = policy is not None or logs != LogRules()
    if any_state == judged:
        raise UsageError(
            f"{at} must have a policy (tpm_policy, ima, runtime_policy, uefi or boot_policy), or "
            "insecure_any_state = true, and not both"
        )
    return HostEntry(
        name=name,
        url=url,
        pinned=pinned,
        ca=_path(values, "ca", f"{at}.ca", base),
        cert=cert,
        key=key,
        tpm_policy=policy,
        insecure_any_state=any_state,
        logs=logs,
        claims="never" if claims == "never" else "link",
    )


def _log_rules(values: Mapping[str, object], at: str, base: Path) -> LogRules:
    """The keys of a host that are about its logs; they mean what they mean to `watch`."""
    runtime, key, boot = (
        _path(values, name, f"{at}.{name}", base)
        for name in ("runtime_policy", "runtime_policy_key", "boot_policy")
    )
    if key is not None and runtime is None:
        raise UsageError(f"{at}.runtime_policy_key needs runtime_policy")
    choices = [choice.value for choice in Violations]
    violations = values.get("ima_violations", Violations.REFUSE.value)
    if violations not in choices:
        raise UsageError(f"{at}.ima_violations must be one of {', '.join(choices)}")
    pcrs = values.get("uefi_pcrs")
    try:
        uefi_mask = DEFAULT_UEFI_PCRS if pcrs is None else read_pcrs(f"{at}.uefi_pcrs", pcrs)
    except ConfigError as exc:
        raise UsageError(str(exc)) from exc
    uefi = _flag(values, "uefi", at)
    if (pcrs is not None or boot is not None) and not uefi:
        raise UsageError(f"{at}.uefi_pcrs and boot_policy need uefi = true")
    return LogRules(
        ima=_flag(values, "ima", at),
        runtime_policy=runtime,
        runtime_policy_key=key,
        violations=Violations(violations),
        uefi_mask=uefi_mask if uefi else 0,
        boot_policy=boot,
    )


def _agent(name: str, values: Mapping[str, object], hosts: Mapping[str, HostEntry]) -> AgentEntry:
    at = f"agents.{name}"
    parse_agent_id(name)
    _known(values, _AGENT_KEYS, f"{at}.")
    vm = _text(values, "vm", at) or name
    try:
        parsed = uuid.UUID(vm)
    except ValueError:
        raise UsageError(f"{at}.vm must be a UUID; it is needed where the id is none") from None
    named = values.get("hosts")
    if not isinstance(named, list) or not named or len(named) != len(set(map(str, named))):
        raise UsageError(f"{at}.hosts must be a list of names, none twice")
    for host in named:
        if not isinstance(host, str) or host not in hosts:
            raise UsageError(f"{at}.hosts names {host!r}, which is no [hosts.NAME]")
    issuer = _text(values, "ek_issuer", at)
    if issuer is not None and issuer not in ISSUERS:
        raise UsageError(f"{at}.ek_issuer must be one of {', '.join(ISSUERS)}")
    entry = AgentEntry(
        agent=name,
        vm=parsed,
        hosts=tuple(hosts[host] for host in named),
        confirmed=_flag(values, "confirmed", at),
        ek_issuer=issuer,
    )
    _check_claims(entry, at)
    return entry


def _check_claims(entry: AgentEntry, at: str) -> None:
    if len({host.claims for host in entry.hosts}) > 1:
        raise UsageError(
            f'{at}.hosts mixes hosts that prove the link and hosts marked claims = "never": '
            "what one of those accepts makes the others' link worth nothing"
        )
    if not entry.is_linked and (entry.confirmed or entry.ek_issuer is not None):
        raise UsageError(
            f'{at}: confirmed and ek_issuer are about the link, and its hosts are claims = "never"'
        )


def _known(values: Mapping[str, object], keys: frozenset[str], at: str) -> None:
    for key in values:
        if key not in keys:
            raise UsageError(f"{at}{key} is not a key of this file")


def _table(value: object, at: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise UsageError(f"{at} must be a table")
    return value


def _text(values: Mapping[str, object], key: str, at: str) -> str | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT_CHARS:
        raise UsageError(f"{at}.{key} must be text of at most {MAX_TEXT_CHARS} characters")
    return value


def _path(values: Mapping[str, object], key: str, at: str, base: Path) -> Path | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"{at} must be a path")
    return base / value


def _flag(values: Mapping[str, object], key: str, at: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"{at}.{key} must be true or false")
    return value
