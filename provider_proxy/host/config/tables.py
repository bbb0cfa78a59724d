"""The tables of the configuration file: a table is a dataclass, a key is a field of it.

A field's metadata says how to read and check the value (`read`) and what it means (`doc`). No file is
read here; `config.load` does that. docs/reference.md lists the keys; a test compares the two.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provider_proxy.common import log as journal
from provider_proxy.common.settings.schema import setting, table_of
from provider_proxy.common.settings.values import (
    integer,
    number,
    number_of,
    one_of,
    read_addresses,
    read_flag,
    read_identities,
    read_networks,
    read_path,
    read_pcrs,
    read_uuid,
    read_uuids,
)
from provider_proxy.evidence.model import PCR_COUNT, mask_of
from provider_proxy.host.config.chip_tables import KeylimeAgent, QuoterTable, Tpm, Vtpm
from provider_proxy.host.config.registrars import RegistrarTable

DEFAULT_STATE_DIR = "/var/lib/provider-proxy"
DEFAULT_IMA_LOG = "/sys/kernel/security/ima/ascii_runtime_measurements"
DEFAULT_UEFI_LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"
DEFAULT_ISOLATED = (10, 11, 12, 13, 14, 15, 16, 23)  # they move, can be reset, or upset Keylime
ALL_BUT_IMA = tuple(pcr for pcr in range(PCR_COUNT) if pcr != 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """`[listen]`: the tenants' server."""

    address: tuple[str, ...] = setting(
        read_addresses,
        ("127.0.0.1:8890",),
        (
            'Addresses where tenants ask: `"host:port"`, `"[ipv6]:port"` or `"unix:/path"`. '
            "Not used where systemd hands sockets over. A unix socket is always plaintext, "
            "mode 0660."
        ),
    )
    tls_cert: Path | None = setting(
        read_path,
        None,
        "The server's certificate chain, PEM. Needed unless `insecure_plaintext` is set.",
    )
    tls_key: Path | None = setting(
        read_path,
        None,
        (
            "Its private key, PEM, not encrypted. Refused if others can read it: mode 0600, "
            "or 0640 where root owns it."
        ),
    )
    client_ca: Path | None = setting(
        read_path,
        None,
        (
            "CA of the tenants' certificates, PEM. With it, every client needs a certificate "
            "of this CA. Without it, every client that reaches the port may ask."
        ),
    )
    client_crl: Path | None = setting(
        read_path,
        None,
        (
            "CRL of `client_ca`, PEM or DER, signed by it; a certificate on it is refused. "
            "The daemon does not start if the file is missing or not the CA's. A CRL that "
            "has expired causes a warning and an alert. Read again at SIGHUP."
        ),
    )
    crl_strict: bool = setting(
        read_flag,
        False,
        (
            "With an expired CRL, refuse every tenant and do not start. Without this, an "
            "expired CRL causes a warning and an alert."
        ),
    )
    front: tuple[str, ...] = setting(
        read_addresses,
        (),
        (
            "Addresses where a TLS-terminating front (HAProxy, nginx) asks, which sends each "
            "tenant's certificate in `Client-Cert`. Needs `client_ca` and `front_peers`: "
            "docs/fronts.md."
        ),
    )
    front_peers: tuple[str, ...] = setting(
        read_identities,
        (),
        ("Who the front is: `uid:N` on a unix socket, any other identity by its own certificate."),
    )
    proxy_protocol_from: tuple[str, ...] = setting(
        read_networks,
        (),
        (
            "TCP proxies that must begin each connection with a PROXY protocol header, "
            "version 1 or 2, which names the client's address."
        ),
    )
    insecure_plaintext: bool = setting(
        read_flag,
        False,
        (
            "No TLS, for trials. Refused for any address but loopback and unix sockets, "
            "inherited ones included, and beside any TLS file."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """`[admin]`: the operator's listener, plaintext, never for tenants."""

    address: tuple[str, ...] = setting(
        read_addresses,
        (),
        (
            "Addresses of the operator's listener: status page, health, metrics, "
            "registrations (docs/monitoring.md). It has no TLS and no password, so it takes "
            "loopback and unix sockets only."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTable:
    """`[batch]`: the batching rule."""

    window_ms: float = setting(
        number(0, 60_000),
        50.0,
        (
            "How long a batch collects requests after its first one, in ms. Must be below "
            "`limits.default_timeout_ms`. With 0 it collects only while the chip is busy or "
            "rests. docs/sizing.md says what to set."
        ),
    )
    max_leaves: int = setting(
        integer(1, 65_536), 1024, "A batch with this many requests is sealed at once."
    )
    isolate_pcrs: int = setting(
        read_pcrs,
        mask_of(DEFAULT_ISOLATED),
        (
            "Requests share a batch only if they ask for the same of these PCRs: PCRs that "
            "move, that can be reset, or that make another tenant's Keylime check fail."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`[limits]`: the server's limits."""

    max_queue: int = setting(
        integer(1, 1_000_000), 8192, "Requests that may wait at once. One more gets 503."
    )
    max_connections: int = setting(
        integer(1, 100_000),
        4096,
        (
            "Tenants' connections open at once. One more closes the connection that has been "
            "idle, or slow to send its request, the longest. The limit of open files may "
            "lower this; the log says so."
        ),
    )
    max_connections_per_address: int = setting(
        integer(1, 100_000),
        512,
        "Tenants' connections open at once from one IP address. One more is closed.",
    )
    default_timeout_ms: int = setting(
        integer(1, 600_000),
        30_000,
        ("How long a request without `timeout_ms` may take. Must not be above `max_timeout_ms`."),
    )
    max_timeout_ms: int = setting(
        integer(1, 600_000),
        60_000,
        ("The longest `timeout_ms` of a request, and the time after which a quote is given up."),
    )
    busy_status: int = setting(
        number_of(503, 408, 500),
        503,
        (
            'HTTP status of every answer that means "ask again" (429, 503, 504). Keylime\'s '
            "verifier asks again after 408 and 500 only."
        ),
    )
    drain_ms: int = setting(
        integer(0, 600_000), 20_000, "How long a stop waits for open requests, in ms."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRules:
    """`[tenant_defaults]` and `[tenants.NAME]`: what a tenant may do."""

    identities: tuple[str, ...] = setting(
        read_identities,
        (),
        "Who this tenant is; only in `[tenants.NAME]` (docs/configuration.md#tenants).",
    )
    rate: float = setting(number(0.001, 1e6), 50.0, "Requests a second; more get 429.")
    burst: int = setting(integer(1, 1_000_000), 100, "Requests that may come at once.")
    max_inflight: int = setting(
        integer(1, 1_000_000), 64, "Requests of one tenant that may wait at once; more get 429."
    )
    pcr_allow: int = setting(
        read_pcrs,
        mask_of(ALL_BUT_IMA),
        (
            "PCRs that a tenant may ask for. PCR 10 brings the IMA list, which names other "
            "tenants' files."
        ),
    )
    vms: frozenset[uuid.UUID] = setting(
        read_uuids,
        frozenset(),
        "VMs whose link to the host this tenant may ask for; only in `[tenants.NAME]`.",
    )
    accept_unlisted: bool = setting(
        read_flag,
        True,
        (
            "Accept a certificate of `client_ca`, or a local user on a unix socket, that no "
            "`[tenants.NAME]` names, as a tenant of its own. Only in the defaults."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """`[logs]`: the host's event logs, sent along with PCR 10 and the boot PCRs."""

    ima: Path = setting(
        read_path,
        Path(DEFAULT_IMA_LOG),
        "The kernel's IMA list, ASCII. Sent to a client that asks for PCR 10.",
    )
    uefi: Path = setting(
        read_path,
        Path(DEFAULT_UEFI_LOG),
        ("The firmware's event log. Sent to a client that asks for a PCR of 0 to 9 or 11 to 15."),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogTable:
    """`[log]`: the daemon's own log, on stderr."""

    format: str = setting(
        one_of(*journal.FORMATS),
        journal.TEXT,
        (
            "Format of the daemon's log: key=value text, with the journal's priorities where "
            "stderr is the journal, or one JSON object a line."
        ),
    )
    level: str = setting(
        one_of(*journal.LEVELS),
        "info",
        "The least important level that is written. `--log-level` overrides it.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditTable:
    """`[audit]`: a record of each answered request."""

    enabled: bool = setting(
        read_flag, False, "Write a record of each answered request (docs/audit.md)."
    )
    path: Path | None = setting(
        read_path, None, "File of the records, mode 0600. Without it they go to the daemon's log."
    )
    max_mb: int = setting(integer(1, 100_000), 64, "Size at which the file is rotated, in MB.")
    keep: int = setting(integer(1, 99), 8, "Rotated files that are kept.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    state_dir: Path = setting(
        read_path,
        Path(DEFAULT_STATE_DIR),
        (
            "Directory of the AK's authValue (`ak.json`, mode 0600) and of the embedded "
            "TPM's state. Without its `ak.json` an AK cannot be used any more."
        ),
    )
    host_uuid: uuid.UUID | None = setting(
        read_uuid,
        None,
        (
            "The host's id in `GET /verifier/identity`. By default it is derived from the EK "
            "and stays the same for the life of the chip."
        ),
    )
    listen: Listen = table_of(Listen)
    admin: Admin = table_of(Admin)
    tpm: Tpm = table_of(Tpm)
    quoter: QuoterTable = table_of(QuoterTable)
    keylime_agent: KeylimeAgent = table_of(KeylimeAgent)
    batch: BatchTable = table_of(BatchTable)
    limits: Limits = table_of(Limits)
    tenant_defaults: TenantRules = table_of(TenantRules)
    tenants: Mapping[str, TenantRules] = field(default_factory=dict)
    registrars: Mapping[str, RegistrarTable] = field(default_factory=dict)
    logs: Logs = table_of(Logs)
    audit: AuditTable = table_of(AuditTable)
    vtpm: Vtpm = table_of(Vtpm)
    log: LogTable = table_of(LogTable)


TABLES: dict[str, type[Any]] = {
    "listen": Listen,
    "admin": Admin,
    "tpm": Tpm,
    "quoter": QuoterTable,
    "keylime_agent": KeylimeAgent,
    "batch": BatchTable,
    "limits": Limits,
    "tenant_defaults": TenantRules,
    "logs": Logs,
    "audit": AuditTable,
    "vtpm": Vtpm,
    "log": LogTable,
}

NAMED_TABLES: dict[str, type[Any]] = {"tenants": TenantRules, "registrars": RegistrarTable}
"""Tables of tables: `[tenants.NAME]`. The names are the operator's."""
