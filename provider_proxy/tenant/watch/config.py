"""The watcher's file: TOML in, frozen values out; every error names its key.

Unknown keys are refused. `[defaults]` holds what hosts have in common, `[hosts.NAME]` what is a host's
own; `hosts.d/*.toml` beside the file adds hosts. `provider_ip`, `provider_port` and
`need_provider_quote` have the names that Keylime's tenant would have for them. Policies are files, read
by `tenant.policies`; secrets are paths. `tables` says which keys there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from provider_proxy.common.addresses import is_loopback
from provider_proxy.common.settings.document import Layout, Loaded, load, read_document
from provider_proxy.common.settings.schema import check_related, named_tables, read_over, read_table
from provider_proxy.common.settings.values import fail
from provider_proxy.errors import ConfigError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.tenant.watch.tables import (
    OWN_KEYS,
    TABLES,
    BridgeTable,
    HostRules,
    RegistrarTable,
    WatchConfig,
    Webhook,
)

MAX_FLEET_HOSTS = 1_000_000
MAX_HOSTS = 20_000  # a process on one core can watch fewer at any useful interval
LAYOUT = Layout(
    max_bytes=8 * 1024 * 1024,  # 20,000 hosts of ten keys
    adds={"hosts.d": "hosts"},
    max_adds=MAX_HOSTS,
)
HOST_TOGETHER = (
    *(("tls_cert", "tls_key"), ("vm", "vm_ek")),
    ("first_use_pcrs", "insecure_trust_on_first_use"),
)
HOST_NEEDS = (
    *(("runtime_policy", "ima"), ("runtime_policy_key", "runtime_policy")),
    *(("boot_policy", "uefi"), ("vm_least", "vm"), ("registrar", "uuid")),
)


def load_watch_config(path: Path, *, for_bridge: bool = False) -> WatchConfig:
    """The settings alone; see `load_watch`."""
    return load_watch(path, for_bridge=for_bridge).config


def load_watch(path: Path, *, for_bridge: bool = False) -> Loaded[WatchConfig]:
    """Read a file, and the hosts in `hosts.d/*.toml` beside it.

    Args:
        for_bridge: `bridge` will use it: `[bridge]` must be complete, and a host needs no policy
            here, because Keylime has one.

    Raises:
        HostError: a file or the directory cannot be read, or others could write it.
        ConfigError: not TOML, or a value is wrong; the message names the file and line.
    """
    parse = partial(parse_watch_config, folder=path.parent, for_bridge=for_bridge)
    return load(read_document(path, LAYOUT), parse, {"hosts": "defaults"})


def parse_watch_config(
    data: Mapping[str, object], *, folder: Path = Path(), for_bridge: bool = False
) -> WatchConfig:
    """Check a parsed TOML document.

    Args:
        folder: where relative paths begin.
        for_bridge: see `load_watch_config`.

    Raises:
        ConfigError: the message names the key.
    """
    rest = {key: value for key, value in data.items() if key not in ("hosts", "registrars")}
    config = read_table(WatchConfig, rest, "", TABLES, folder=folder)
    registrars = _read_registrars(named_tables(data, "registrars"), folder)
    for name in OWN_KEYS:
        if getattr(config.defaults, name) != getattr(HostRules(), name):
            raise ConfigError(f"defaults.{name} belongs in [hosts.NAME]")
    hosts = named_tables(data, "hosts")
    if not hosts and config.state is None:
        raise fail("hosts", "tables, [hosts.NAME], one at least")
    most = MAX_HOSTS if config.state is None else MAX_FLEET_HOSTS
    if len(hosts) > most:
        raise ConfigError(f"hosts must be at most {most}")
    if config.admin is not None and config.state is None:
        raise ConfigError(
            "admin needs state, because it shows a fleet; without a fleet use metrics.textfile"
        )
    found = {}
    for name, table in hosts.items():
        key = f"hosts.{name}"
        found[name] = read_over(config.defaults, table, key + ".", folder=folder)
        _check_host(key, found[name], needs_policy=not for_bridge)
        if found[name].registrar is not None and found[name].registrar not in registrars:
            raise ConfigError(f"{key}.registrar must name a [registrars.NAME]")
    _check_webhook(config.webhook)
    if for_bridge:
        _check_bridge(config.bridge, found, registrars)
    return dataclasses.replace(config, hosts=found, registrars=registrars)


def _read_registrars(
    tables: Mapping[str, Mapping[str, object]], folder: Path
) -> Mapping[str, RegistrarTable]:
    found = {}
    for name, table in tables.items():
        key = f"registrars.{name}"
        made = found[name] = read_table(RegistrarTable, table, key + ".", TABLES, folder=folder)
        if made.url is None:
            raise ConfigError(f"{key}.url is missing; set it to the registrar's https URL")
        if bool(made.ek_ca) == made.insecure_no_ek:
            raise ConfigError(
                f"{key} needs ek_ca, the CAs that vouch for EKs, or insecure_no_ek = true"
            )
        needs = (("insecure_virtual_ek", "ek_ca"),)
        check_related(key, made, together=(("cert", "key"),), needs=needs)
    return found


def _check_host(key: str, rules: HostRules, *, needs_policy: bool) -> None:
    """Checks that need more than one key of a host."""
    if not rules.provider_ip:
        raise ConfigError(f"{key}.provider_ip is missing")
    if rules.insecure_plaintext and not is_loopback(rules.provider_ip):
        raise ConfigError(f"{key}.insecure_plaintext is for proxies on loopback only")
    check_related(key, rules, together=HOST_TOGETHER, needs=HOST_NEEDS)
    if rules.insecure_plaintext and (rules.tls_cert or rules.tls_ca):
        raise ConfigError(f"{key}.insecure_plaintext must not be set together with TLS files")
    if rules.uefi and not rules.uefi_pcrs:
        raise ConfigError(f"{key}.uefi_pcrs must name at least one PCR")
    judged = rules.tpm_policy or rules.first_use_pcrs or rules.ima or rules.uefi
    if needs_policy and not judged and not rules.insecure_any_state:
        raise ConfigError(
            f"{key} has no policy: set tpm_policy, ima or uefi (or insecure_trust_on_first_use, "
            "or insecure_any_state)"
        )
    if judged and rules.insecure_any_state:
        raise ConfigError(f"{key}.insecure_any_state must not be set together with a policy")
    if rules.timeout_s > rules.max_age_s:
        raise ConfigError(f"{key}.timeout_s must be <= max_age_s")


def _check_bridge(
    bridge: BridgeTable,
    hosts: Mapping[str, HostRules],
    registrars: Mapping[str, RegistrarTable],
) -> None:
    """Checks for what `bridge` needs beyond `watch`."""
    if bridge.registrar not in registrars:
        raise ConfigError("bridge.registrar must name a [registrars.NAME]")
    asked = {name: rules for name, rules in hosts.items() if rules.need_provider_quote}
    pulled = any(rules.mode == "pull" for rules in asked.values())
    if bridge.client_ca is None and (pulled or not asked):
        raise ConfigError(
            "bridge.client_ca is missing; set it to the CA of your verifier's client certificates"
        )
    if bridge.first_port > bridge.last_port:
        raise ConfigError("bridge.first_port must be <= bridge.last_port")
    check_related("bridge", bridge, together=(("verifier_cert", "verifier_key"),))
    if bridge.verifier_url is not None and not bridge.verifier_url.startswith("https://"):
        raise ConfigError("bridge.verifier_url must be an https URL")
    for name, rules in asked.items():
        if rules.mode == "push" and bridge.verifier_url is None:
            raise ConfigError(f"hosts.{name}.mode = push needs bridge.verifier_url")
        if rules.bank is not HashAlg.SHA256:
            raise ConfigError(
                f'hosts.{name}.bank must be "sha256": the bridge shows Keylime that bank'
            )


def _check_webhook(webhook: Webhook) -> None:
    if webhook.url is None:
        return
    if webhook.secret_file is None:
        raise ConfigError("webhook.secret_file is missing; reports are signed with it")
