"""The configuration: TOML in, frozen values out, and every complaint names its key and place.

`config_files` reads and merges the files, `config_env` the environment; here values are checked.
Unknown tables and keys are refused: a misspelt limit must not pass for its default. Secrets are named
by path only; a file that others can read is refused. `config_tables` says which keys there are.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from provider_proxy.common.addresses import check_local
from provider_proxy.common.settings.schema import read_table
from provider_proxy.common.settings.values import fail
from provider_proxy.errors import ConfigError, UsageError
from provider_proxy.host.config.environment import apply_environment
from provider_proxy.host.config.files import DEFAULT, Document, Origin, read_document
from provider_proxy.host.config.registrars import check_registrars
from provider_proxy.host.config.tables import (
    KEYLIME_AGENT,
    NAMED_TABLES,
    TABLES,
    Config,
    TenantRules,
)

EMBEDDED = "embedded"
NAME_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)  # no ':', see tenants.py


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration, and where each of its values came from."""

    config: Config
    document: Document

    def origin(self, key: str) -> Origin:
        """Where the value of a key, "batch.window_ms" or "tenants.acme.rate", came from."""
        found = self.document.values.get(key)
        if found is None and key.startswith("tenants."):  # what a tenant does not say
            found = self.document.values.get(f"tenant_defaults.{key.rpartition('.')[2]}")
        return found or DEFAULT


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Loaded:
    """Read a configuration file, `conf.d` and `tenants.d` beside it, and `PROVIDER_PROXY_*`.

    Raises:
        HostError: a file is missing, cannot be read, or could be written by anybody.
        ConfigError: not TOML, or a value is wrong; the message names the file and line, or the
            variable.
    """
    document = apply_environment(read_document(path), environ)
    try:
        return Loaded(config=parse_config(document.data), document=document)
    except ConfigError as exc:
        place = document.origin(exc.key) or Origin(file=path)
        raise ConfigError(f"{place}: {exc}", key=exc.key) from exc


def load_config(path: Path, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration alone; see `load`."""
    return load(path, environ).config


def parse_config(data: Mapping[str, object]) -> Config:
    """Check a parsed TOML document.

    Raises:
        ConfigError: the message names the key.
    """
    rest = {key: value for key, value in data.items() if key not in NAMED_TABLES}
    config = read_table(Config, rest, "", TABLES)
    config = dataclasses.replace(
        config,
        tenants=_read_tenants(_named(data, "tenants"), config.tenant_defaults),
        registrars={
            name: read_table(NAMED_TABLES["registrars"], table, f"registrars.{name}.", TABLES)
            for name, table in _named(data, "registrars").items()
        },
    )
    _check_whole(config)
    return config


def _named(data: Mapping[str, object], key: str) -> dict[str, dict[str, object]]:
    """The tables of a table of tables, by their names."""
    tables = data.get(key, {})
    if not isinstance(tables, dict):
        raise fail(key, f"tables, [{key}.NAME]")
    for name, table in tables.items():
        if not NAME_RE.fullmatch(name):
            raise fail(f"{key}.{name}", "a name of letters, digits, '.', '_' and '-'")
        if not isinstance(table, dict):
            raise fail(f"{key}.{name}", "a table")
    return tables


def _read_tenants(
    tenants: Mapping[str, dict[str, object]], defaults: TenantRules
) -> Mapping[str, TenantRules]:
    """Tenants' tables; what one does not say, the defaults say."""
    found: dict[str, TenantRules] = {}
    owner: dict[str, str] = {}
    for name, table in tenants.items():
        key = f"tenants.{name}"
        if "accept_unlisted" in table:
            raise ConfigError(f"{key}.accept_unlisted belongs in tenant_defaults")
        own = read_table(TenantRules, table, key + ".", TABLES)
        rules = dataclasses.replace(
            defaults, **{setting: getattr(own, setting) for setting in table}
        )
        if not rules.identities:
            raise ConfigError(f"{key}.identities must name at least one identity")
        for identity in rules.identities:
            if identity in owner:
                raise ConfigError(
                    f"{key}.identities: {identity} belongs to {owner[identity]} already"
                )
            owner[identity] = name
        found[name] = rules
    return found


def _check_whole(config: Config) -> None:
    """What one key alone cannot tell."""
    listen = config.listen
    if not listen.address:
        raise ConfigError("listen.address must name at least one address")
    if listen.insecure_plaintext:
        _check_local("listen.insecure_plaintext", listen.address)
        if listen.tls_cert or listen.tls_key or listen.client_ca:
            raise ConfigError("listen.insecure_plaintext must not stand beside TLS files")
    elif listen.tls_cert is None or listen.tls_key is None:
        raise ConfigError(
            "listen.tls_cert and listen.tls_key must be set (or, to try things out on loopback, "
            "listen.insecure_plaintext)"
        )
    if listen.client_crl is not None and listen.client_ca is None:
        raise ConfigError("listen.client_crl needs listen.client_ca")
    if config.tenant_defaults.identities or config.tenant_defaults.vms:
        key = "tenant_defaults." + ("identities" if config.tenant_defaults.identities else "vms")
        raise ConfigError(f"{key} belongs in [tenants.NAME], not in [tenant_defaults]")
    _check_local("admin.address", config.admin.address)
    if config.limits.default_timeout_ms > config.limits.max_timeout_ms:
        raise ConfigError("limits.default_timeout_ms must be <= limits.max_timeout_ms")
    if config.batch.window_ms >= config.limits.default_timeout_ms:
        raise ConfigError("batch.window_ms must be < limits.default_timeout_ms")
    if config.vtpm.enabled and config.quoter.kind != "tpm":
        # Whoever asks a Keylime agent gets a nonce of his own choice signed: a root, and a claim.
        raise ConfigError('vtpm.enabled needs quoter.kind = "tpm"')
    if config.tpm.ek_handle == config.tpm.ak_handle:
        raise ConfigError("tpm.ak_handle must differ from tpm.ek_handle")
    check_registrars(config.registrars, config.tenants, quoter=config.quoter.kind)
    others = (config.tpm.ek_handle, config.tpm.ak_handle)
    if config.vtpm.issuer == "tpm" and config.vtpm.ca_handle in others:
        raise ConfigError("vtpm.ca_handle must differ from tpm.ek_handle and tpm.ak_handle")
    if config.quoter.kind == KEYLIME_AGENT:
        _check_agent(config)


def _check_agent(config: Config) -> None:
    """What a Keylime agent as the quoter needs, and what it cannot do."""
    agent = config.keylime_agent
    for key in ("url", "agent_id", "registrar_url"):
        if not getattr(agent, key):
            raise fail(f"keylime_agent.{key}", f'set where quoter.kind is "{KEYLIME_AGENT}"')
    for cert, key in (("client_cert", "client_key"), ("registrar_cert", "registrar_key")):
        if (getattr(agent, cert) is None) != (getattr(agent, key) is None):
            raise fail(f"keylime_agent.{key}", f"set exactly where {cert} is")
    if agent.url is not None and agent.url.startswith("https") and agent.client_cert is None:
        raise fail("keylime_agent.client_cert", "set for an agent with mTLS")
    if bool(agent.ek_ca) == agent.insecure_no_ek:
        raise fail("keylime_agent.ek_ca", "set, or insecure_no_ek, and not both")
    if agent.insecure_virtual_ek and not agent.ek_ca:
        raise fail("keylime_agent.insecure_virtual_ek", "used with ek_ca")
    if len(config.tpm.banks) != 1:
        raise fail("tpm.banks", "one bank, the AK's, where a Keylime agent quotes")


def _check_local(key: str, addresses: tuple[str, ...]) -> None:
    try:
        check_local(addresses)
    except UsageError as exc:
        raise ConfigError(f"{key} {exc}") from exc
