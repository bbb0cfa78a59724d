"""Checks before the watcher starts; and the expiry dates of the certificates that its file names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from functools import partial

from provider_proxy.common.dates import Dated
from provider_proxy.common.findings import ERROR, Finding, attempt, of_dates, warned
from provider_proxy.common.tls import TlsFiles, client_context, dates_of
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.watch.policy import HostPolicy
from provider_proxy.tenant.watch.registrars import registrar_files
from provider_proxy.tenant.watch.reports import webhook_secret
from provider_proxy.tenant.watch.tables import HostRules, WatchConfig
from provider_proxy.trust.ek_store import EkStore
from provider_proxy.trust.pins import PinStore

BRIDGE_CLIENT_CA = "bridge.client_ca"


def host_files(name: str, rules: HostRules) -> TlsFiles:
    """The TLS files of a host, by the names of their keys."""
    key = f"hosts.{name}"
    return TlsFiles(
        ca=rules.tls_ca,
        cert=rules.tls_cert,
        key=rules.tls_key,
        names=(f"{key}.tls_ca", f"{key}.tls_cert", f"{key}.tls_key"),
    )


def files_of(config: WatchConfig) -> Iterator[TlsFiles]:
    """All TLS files that a configuration names, each set once, by the first key that names it."""
    seen = set()
    for name, rules in config.hosts.items():
        which = (rules.tls_ca, rules.tls_cert, rules.tls_key)
        if which not in seen and rules.need_provider_quote and not rules.insecure_plaintext:
            seen.add(which)
            yield host_files(name, rules)
    for name, table in config.registrars.items():
        yield registrar_files(name, table)
    if config.webhook.url is not None:
        yield TlsFiles(ca=config.webhook.ca, names=("webhook.ca", "", ""))
    bridge = config.bridge
    yield TlsFiles(
        ca=bridge.verifier_ca,
        cert=bridge.verifier_cert,
        key=bridge.verifier_key,
        names=("bridge.verifier_ca", "bridge.verifier_cert", "bridge.verifier_key"),
    )
    if bridge.client_ca is not None:
        yield TlsFiles(ca=bridge.client_ca, names=(BRIDGE_CLIENT_CA, "", ""))


def read_dates(config: WatchConfig) -> tuple[Dated, ...]:
    """The dates of all certificates and CAs. Reads files. Raises: HostError."""
    return tuple(_meant(dated) for files in files_of(config) for dated in dates_of(files))


def _meant(dated: Dated) -> Dated:
    """With what its expiry means, where that is not obvious."""
    if dated.name == BRIDGE_CLIENT_CA:
        return dataclasses.replace(dated, vital=True, means="no verifier can poll an agent")
    if dated.name.endswith(".tls_cert"):
        return dataclasses.replace(dated, means="the proxy refuses our connections")
    return dated


def find(config: WatchConfig, *, for_bridge: bool) -> Iterator[Finding]:
    """All problems of the files that a configuration names. Opens files."""
    for files in files_of(config):
        yield from attempt(partial(client_context, files))
    yield from of_dates(partial(read_dates, config))
    for name, table in config.registrars.items():
        for finding in attempt(partial(EkStore, *table.ek_ca)) if table.ek_ca else ():
            yield Finding(level=finding.level, text=f"registrars.{name}.ek_ca: {finding.text}")
    policies, pins = PolicyFiles(), PinStore(config.pins)
    for name, rules in config.hosts.items():
        if not rules.need_provider_quote:
            continue
        found = list(attempt(partial(HostPolicy, rules, policies, judged_elsewhere=for_bridge)))
        if rules.registrar is None:  # the watcher starts all the same, and this host fails
            found += warned(partial(pins.load, rules.pin or name))
        for finding in found:
            yield Finding(level=finding.level, text=f"hosts.{name}: {finding.text}")
    if config.webhook.url is not None:
        yield from attempt(partial(webhook_secret, config.webhook))
    program = config.command.argv[0] if config.command.argv else None
    if program is not None and not os.access(program, os.X_OK):
        yield Finding(level=ERROR, text=f"command.argv: {program} is missing, or cannot be started")
    textfile = config.metrics.textfile
    if textfile is not None and not os.access(textfile.parent, os.W_OK | os.X_OK):
        yield Finding(
            level=ERROR, text=f"metrics.textfile: {textfile.parent} is missing, or not writable"
        )
