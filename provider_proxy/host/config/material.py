"""Files that a daemon's configuration names: certificates, keys, revocation lists, and their dates.

Needs `cryptography` only, so that `check-config` can check all of it before the daemon's packages are
installed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

from provider_proxy.common.crl import Crl, key_of, load_crls
from provider_proxy.common.dates import Dated, utc_now
from provider_proxy.common.tls import TlsFiles, client_files, dates_of, load_certificates
from provider_proxy.errors import HostError
from provider_proxy.host.config.chip_tables import KEYLIME_AGENT, KeylimeAgent
from provider_proxy.host.config.tables import Config, Listen

log = logging.getLogger(__name__)

CRL = "listen.client_crl"
UNKNOWN = "revocation is unknown: certificates revoked since then are still accepted"
CLOSED = "listen.crl_strict refuses every client"


def read_dates(config: Config) -> tuple[Dated, ...]:
    """Read the dates of all certificates, CAs and revocation lists. Reads files.

    Raises:
        HostError: a file cannot be read; the message names its key.
    """
    return tuple(_dates(config))


def listen_files(listen: Listen) -> TlsFiles:
    """The files of the tenants' server."""
    return TlsFiles(
        ca=listen.client_ca,
        cert=listen.tls_cert,
        key=listen.tls_key,
        names=("listen.client_ca", "listen.tls_cert", "listen.tls_key"),
    )


def agent_registrar_files(settings: KeylimeAgent) -> TlsFiles:
    """The TLS files for the provider's registrar."""
    key = "keylime_agent.registrar"
    return TlsFiles(
        ca=settings.registrar_ca,
        cert=settings.registrar_cert,
        key=settings.registrar_key,
        names=(f"{key}_ca", f"{key}_cert", f"{key}_key"),
    )


def agent_files(settings: KeylimeAgent) -> TlsFiles:
    """The TLS files for the agent, whose own certificate is in the registrar."""
    return TlsFiles(
        cert=settings.client_cert,
        key=settings.client_key,
        names=("", "keylime_agent.client_cert", "keylime_agent.client_key"),
    )


def listen_crls(listen: Listen) -> tuple[Crl, ...]:
    """The revocation lists of the tenants' CAs; empty if none is configured.

    Raises:
        HostError: the CRL is missing or not the CA's, or has expired and `listen.crl_strict` is set.
    """
    if listen.client_crl is None or listen.client_ca is None:
        return ()
    authorities = load_certificates("listen.client_ca", listen.client_ca)
    crls = load_crls(CRL, listen.client_crl, authorities)
    known = {crl.issuer for crl in crls}
    for name in (ca.subject.rfc4514_string() for ca in authorities if key_of(ca) not in known):
        log.warning(
            "%s has no CRL of %s: certificates that it has revoked are still accepted", CRL, name
        )
    if listen.crl_strict and any(crl.next_update < utc_now() for crl in crls):
        raise HostError(
            f"{CRL}: {listen.client_crl} has expired, and listen.crl_strict is set: get the CA's newest "
            "list (provider-proxy pki crl makes one)"
        )
    return crls


def files_of(config: Config) -> Iterator[TlsFiles]:
    """The TLS files that the daemon's clients use."""
    for name, table in config.registrars.items():
        if not table.insecure_plaintext:
            yield client_files(f"registrars.{name}", table)
    if config.quoter.kind == KEYLIME_AGENT:
        yield agent_registrar_files(config.keylime_agent)
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
