"""The dates of everything that a configuration of the daemon names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from provider_proxy.common.crl import load_crls
from provider_proxy.common.dates import Dated
from provider_proxy.common.tls import TlsFiles, dates_of, load_certificates
from provider_proxy.host.config.tables import KEYLIME_AGENT, Config
from provider_proxy.host.http.listeners import listen_files
from provider_proxy.host.quoters.agent_binding import agent_files, registrar_files
from provider_proxy.trust.registration.client import tls_files

CRL = "listen.client_crl"
UNKNOWN = "revocation is unknown: who was revoked since then still comes in"
CLOSED = "listen.crl_strict lets nobody in"


def read_dates(config: Config) -> tuple[Dated, ...]:
    """Read the dates of all certificates, CAs and revocation lists. Reads files.

    Raises:
        HostError: a file cannot be read; the message names its key.
    """
    return tuple(_dates(config))


def files_of(config: Config) -> Iterator[TlsFiles]:
    """The TLS files that the daemon's clients use."""
    for name, table in config.registrars.items():
        if not table.insecure_plaintext:
            yield tls_files(f"registrars.{name}", table)
    if config.quoter.kind == KEYLIME_AGENT:
        yield registrar_files(config.keylime_agent)
        yield agent_files(config.keylime_agent)


def _dates(config: Config) -> Iterator[Dated]:
    listen = config.listen
    only_tls = not any(address.startswith("unix:") for address in listen.address)
    if listen.tls_cert is not None:
        for dated in dates_of(listen_files(listen)):
            yield dataclasses.replace(dated, vital=only_tls, means="no tenant can connect")
    if listen.client_crl is not None and listen.client_ca is not None:
        authorities = load_certificates("listen.client_ca", listen.client_ca)
        crls = load_crls(CRL, listen.client_crl, authorities)
        first = min(crls, key=lambda crl: crl.next_update)
        yield Dated(
            name=CRL,
            path=listen.client_crl,
            not_before=max(crl.this_update for crl in crls),
            not_after=first.next_update,
            vital=listen.crl_strict and only_tls,
            means=CLOSED if listen.crl_strict else UNKNOWN,
        )
    for files in files_of(config):
        yield from dates_of(files)
