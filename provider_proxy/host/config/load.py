"""The configuration: TOML in, frozen values out; every error names its key and place.

`common.settings` reads and merges the files, `environment` the variables; here values are checked.
Unknown tables and keys are refused: a misspelt limit must not pass for its default. Secrets are named
by path only; a file that others can read is refused. `config.tables` defines the keys.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from provider_proxy.common.addresses import check_local
from provider_proxy.common.settings.document import Layout, Loaded, read_document
from provider_proxy.common.settings.document import load as load_settings
from provider_proxy.common.settings.schema import check_related, named_tables, read_over, read_table
from provider_proxy.common.settings.values import fail
from provider_proxy.errors import ConfigError, UsageError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.host.config.chip_tables import KEYLIME_AGENT
from provider_proxy.host.config.environment import apply_environment
from provider_proxy.host.config.registrars import check_registrars
from provider_proxy.host.config.tables import NAMED_TABLES, TABLES, Config, TenantRules

EMBEDDED = "embedded"
LAYOUT = Layout(max_bytes=1 << 20, changes="conf.d", adds={"tenants.d": "tenants"}, max_adds=10_000)
NAME_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)  # no ':', see tenants.py


DEFAULTS = {"tenants": "tenant_defaults"}


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Loaded[Config]:
    """Read a configuration file, `conf.d` and `tenants.d` beside it, and `PROVIDER_PROXY_*`.

    Raises:
        HostError: a file is missing, unreadable, or writable by others.
        ConfigError: not TOML, or a value is wrong; the message names the file and line, or the
            variable.
    """
    document = apply_environment(read_document(path, LAYOUT), environ)
    return load_settings(document, parse_config, DEFAULTS)


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
        tenants=_read_tenants(named_tables(data, "tenants", NAME_RE), config.tenant_defaults),
        registrars={
            name: read_table(NAMED_TABLES["registrars"], table, f"registrars.{name}.", TABLES)
            for name, table in named_tables(data, "registrars", NAME_RE).items()
        },
    )
    _check_whole(config)
    return config


def _read_tenants(
    tenants: Mapping[str, Mapping[str, object]], defaults: TenantRules
) -> Mapping[str, TenantRules]:
    """Tenants' tables; missing keys come from the defaults."""
    found: dict[str, TenantRules] = {}
    owner: dict[str, str] = {}
    for name, table in tenants.items():
        key = f"tenants.{name}"
        if "accept_unlisted" in table:
            raise ConfigError(f"{key}.accept_unlisted belongs in tenant_defaults")
        rules = read_over(defaults, table, key + ".")
        if not rules.identities:
            raise ConfigError(f"{key}.identities must name at least one identity")
        for identity in rules.identities:
            if identity in owner:
                raise ConfigError(f"{key}.identities: {identity} is already in {owner[identity]}")
            owner[identity] = name
        found[name] = rules
    return found


def _check_whole(config: Config) -> None:
    """Check keys against each other."""
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
    if listen.front and (listen.client_ca is None or not listen.front_peers):
        raise ConfigError("listen.front needs listen.client_ca and listen.front_peers")
    check_related("listen", listen, needs=(("front_peers", "front"), ("client_crl", "client_ca")))
    if config.tenant_defaults.identities or config.tenant_defaults.vms:
        key = "tenant_defaults." + ("identities" if config.tenant_defaults.identities else "vms")
        raise ConfigError(f"{key} belongs in [tenants.NAME], not in [tenant_defaults]")
    _check_local("admin.address", config.admin.address)
    if config.limits.default_timeout_ms > config.limits.max_timeout_ms:
        raise ConfigError("limits.default_timeout_ms must be <= limits.max_timeout_ms")
    if config.batch.window_ms >= config.limits.default_timeout_ms:
        raise ConfigError("batch.window_ms must be < limits.default_timeout_ms")
    if config.vtpm.enabled and config.quoter.kind != "tpm":
        # A Keylime agent signs any nonce for its clients, so they could forge a root and with it a claim.
        raise ConfigError('vtpm.enabled needs quoter.kind = "tpm"')
    if HashAlg.SHA1 in config.tpm.banks and not config.tpm.insecure_sha1_bank:
        raise ConfigError(
            "tpm.banks: sha1 values can be forged, so they prove nothing; if the chip has no other "
            "bank and you accept that risk, set tpm.insecure_sha1_bank = true"
        )
    for key in ("ek_cert_file", "ek_chain_file"):
        if getattr(config.tpm, key) is not None and config.quoter.kind != "tpm":
            raise ConfigError(f'tpm.{key} needs quoter.kind = "tpm"')
    if config.tpm.ek_handle == config.tpm.ak_handle:
        raise ConfigError("tpm.ak_handle must differ from tpm.ek_handle")
    check_registrars(config.registrars, config.tenants, quoter=config.quoter.kind)
    others = (config.tpm.ek_handle, config.tpm.ak_handle)
    if config.vtpm.issuer == "tpm" and config.vtpm.ca_handle in others:
        raise ConfigError("vtpm.ca_handle must differ from tpm.ek_handle and tpm.ak_handle")
    if config.quoter.kind == KEYLIME_AGENT:
        _check_agent(config)


def _check_agent(config: Config) -> None:
    """Check the settings that a Keylime agent as the quoter needs or does not support."""
    agent = config.keylime_agent
    for key in ("url", "agent_id", "registrar_url"):
        if not getattr(agent, key):
            raise fail(f"keylime_agent.{key}", f'set where quoter.kind is "{KEYLIME_AGENT}"')
    together = (("client_cert", "client_key"), ("registrar_cert", "registrar_key"))
    check_related("keylime_agent", agent, together=together)
    if agent.url is not None and agent.url.startswith("https") and agent.client_cert is None:
        raise fail("keylime_agent.client_cert", "set for an agent with mTLS")
    if bool(agent.ek_ca) == agent.insecure_no_ek:
        raise fail("keylime_agent.ek_ca", "set, or insecure_no_ek, and not both")
    check_related("keylime_agent", agent, needs=(("insecure_virtual_ek", "ek_ca"),))
    if len(config.tpm.banks) != 1:
        raise fail("tpm.banks", "one bank, the AK's, where a Keylime agent quotes")


def _check_local(key: str, addresses: tuple[str, ...]) -> None:
    try:
        check_local(addresses)
    except UsageError as exc:
        raise ConfigError(f"{key} {exc}") from exc
