"""The tables of the configuration file: a table is a dataclass, a key is a field of it.

A field's metadata says how to read and check the value (`read`) and what it means (`doc`). Nothing
is read here; `config` does that. docs/configuration.md lists the keys; a test holds it against these.
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
    fail,
    integer,
    number,
    number_of,
    one_of,
    read_addresses,
    read_agent_id,
    read_banks,
    read_contact,
    read_duty,
    read_flag,
    read_handle,
    read_host,
    read_identities,
    read_networks,
    read_path,
    read_paths,
    read_pcrs,
    read_safe_url,
    read_text,
    read_url,
    read_uuid,
    read_uuids,
)
from provider_proxy.evidence.model import PCR_COUNT, HashAlg, mask_of

DEFAULT_STATE_DIR = "/var/lib/provider-proxy"
DEFAULT_IMA_LOG = "/sys/kernel/security/ima/ascii_runtime_measurements"
DEFAULT_UEFI_LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"
KEYLIME_AGENT = "keylime-agent"
DEFAULT_ISOLATED = (10, 11, 12, 13, 14, 15, 16, 23)  # they move, can be reset, or upset Keylime
ALL_BUT_IMA = tuple(pcr for pcr in range(PCR_COUNT) if pcr != 10)


def read_tcti(key: str, value: object) -> str:
    """A tpm2-tss string, which begins with the name of a way to the TPM."""
    text = read_text(key, value)
    if text.startswith("/"):
        raise fail(key, f'a tpm2-tss string: write "device:{text}"')
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """`[listen]`: the tenants' door."""

    address: tuple[str, ...] = setting(
        read_addresses, ("127.0.0.1:8890",), 'Where tenants ask; a list, or "unix:/path", is fine.'
    )
    tls_cert: Path | None = setting(read_path, None, "The door's certificate chain, PEM.")
    tls_key: Path | None = setting(read_path, None, "Its private key, PEM; not readable by others.")
    client_ca: Path | None = setting(
        read_path, None, "CA of the tenants' certificates; with it, none comes in without one."
    )
    client_crl: Path | None = setting(
        read_path, None, "CRL of client_ca; who is on it stays outside. Read again at SIGHUP."
    )
    crl_strict: bool = setting(
        read_flag,
        False,
        "A CRL that has run out lets nobody in, and stops the start; else it warns, and alerts.",
    )
    front: tuple[str, ...] = setting(
        read_addresses, (), "Where a front asks, which ends the tenants' TLS: see docs/fronts.md."
    )
    front_peers: tuple[str, ...] = setting(
        read_identities,
        (),
        'Who the front is: "uid:33" on a unix socket, "dns:…" by its certificate.',
    )
    proxy_protocol_from: tuple[str, ...] = setting(
        read_networks, (), "TCP proxies that say by the PROXY protocol whose connection it is."
    )
    insecure_plaintext: bool = setting(
        read_flag, False, "No TLS. On loopback and unix sockets only; for trying things out."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """`[admin]`: the operator's listener, plaintext, never for tenants."""

    address: tuple[str, ...] = setting(
        read_addresses, (), "Where status, health and metrics are; loopback or unix only."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tpm:
    """`[tpm]`: the chip."""

    tcti: str = setting(
        read_tcti, "device:/dev/tpmrm0", 'A tpm2-tss string, or "embedded" for a swtpm of our own.'
    )
    ek_handle: int = setting(read_handle, 0x81010001, "Persistent handle of the endorsement key.")
    ak_handle: int = setting(read_handle, 0x81000100, "Persistent handle of the attestation key.")
    ak_algorithm: str = setting(
        one_of("ecc", "rsa"), "ecc", "Kind of the AK when it is made: P-256 or RSA-2048."
    )
    banks: tuple[HashAlg, ...] = setting(
        read_banks, (HashAlg.SHA256,), "PCR banks that are offered."
    )
    max_duty: float = setting(
        read_duty, 0.5, "Share of the chip's time that all our commands together may take."
    )
    ima_wait_ms: float = setting(
        number(0, 10_000),
        30.0,
        "Where IMA measures files: how long it may wait for us on average; 0 for no bound.",
    )
    hang_limit_s: float = setting(
        number(1, 3600), 120.0, "A command in flight for longer ends the process, in seconds."
    )
    owner_auth_file: Path | None = setting(read_path, None, "File with the owner authorisation.")
    endorsement_auth_file: Path | None = setting(
        read_path, None, "File with the endorsement authorisation."
    )
    ek_cert_file: Path | None = setting(
        read_path, None, "The EK's certificate, PEM or DER, where the chip does not carry it."
    )
    ek_chain_file: Path | None = setting(
        read_path, None, "CAs between the EK's certificate and its maker's, for the tenants."
    )
    insecure_sha1_bank: bool = setting(
        read_flag, False, "The bank sha1 may be offered: its values can be forged."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoterTable:
    """`[quoter]`: who quotes."""

    kind: str = setting(
        one_of("tpm", KEYLIME_AGENT), "tpm", "What signs the quotes: the host's TPM, or an agent."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeylimeAgent:
    """`[keylime_agent]`: the agent that owns the chip, where `quoter.kind` says so."""

    url: str | None = setting(
        read_safe_url,
        None,
        "Where it listens, https, or http on loopback for one without mTLS.",
    )
    agent_id: str | None = setting(read_agent_id, None, "Its id at the registrar.")
    client_cert: Path | None = setting(
        read_path, None, "Certificate for the agent, of a CA in its trusted_client_ca, PEM."
    )
    client_key: Path | None = setting(
        read_path, None, "Its private key, PEM; not readable by others."
    )
    registrar_url: str | None = setting(
        read_safe_url, None, "The provider's own registrar, where the agent is registered, https."
    )
    registrar_ca: Path | None = setting(read_path, None, "CA of the registrar's certificate.")
    registrar_tls_name: str | None = setting(
        read_host, None, "What the registrar's certificate is for; the URL's host by default."
    )
    registrar_cert: Path | None = setting(read_path, None, "Certificate for the registrar, PEM.")
    registrar_key: Path | None = setting(
        read_path, None, "Its private key, PEM; not readable by others."
    )
    ek_ca: tuple[Path, ...] = setting(
        read_paths, (), "TPM makers' CAs that the EK must lead to: directories or PEM bundles."
    )
    insecure_no_ek: bool = setting(
        read_flag, False, "Take any EK: a TPM of software passes for the chip."
    )
    insecure_virtual_ek: bool = setting(
        read_flag, False, "Virtual TPMs whose CAs are in ek_ca pass for the chip, too."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTable:
    """`[batch]`: the batching rule."""

    window_ms: float = setting(
        number(0, 60_000), 50.0, "How long a batch collects after its first request."
    )
    max_leaves: int = setting(
        integer(1, 65_536), 1024, "A batch is sealed when it holds so many requests."
    )
    isolate_pcrs: int = setting(
        read_pcrs,
        mask_of(DEFAULT_ISOLATED),
        "PCRs that share a batch only among those who ask for the same of them.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`[limits]`: what the door bears."""

    max_queue: int = setting(integer(1, 1_000_000), 8192, "Requests that may wait at once.")
    max_connections: int = setting(integer(1, 100_000), 4096, "Connections open at once.")
    max_connections_per_address: int = setting(
        integer(1, 100_000), 512, "Connections open at once from one IP address."
    )
    default_timeout_ms: int = setting(
        integer(1, 600_000), 30_000, "How long a request waits that names no timeout_ms."
    )
    max_timeout_ms: int = setting(integer(1, 600_000), 60_000, "The longest timeout_ms served.")
    busy_status: int = setting(
        number_of(503, 408, 500),
        503,
        'HTTP status of "ask again"; 408 or 500 for verifiers with Keylime\'s retry rule.',
    )
    drain_ms: int = setting(
        integer(0, 600_000), 20_000, "How long a stop waits for those who wait."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRules:
    """`[tenant_defaults]` and `[tenants.NAME]`: what a tenant may do."""

    identities: tuple[str, ...] = setting(
        read_identities,
        (),
        "Who this is; only in [tenants.NAME]. See docs/tenants.md for the forms.",
    )
    rate: float = setting(number(0.001, 1e6), 50.0, "Requests a second.")
    burst: int = setting(integer(1, 1_000_000), 100, "Requests that may come at once.")
    max_inflight: int = setting(integer(1, 1_000_000), 64, "Requests that may wait at once.")
    pcr_allow: int = setting(
        read_pcrs, mask_of(ALL_BUT_IMA), "PCRs that may be asked for; 10 brings the IMA log along."
    )
    vms: frozenset[uuid.UUID] = setting(
        read_uuids,
        frozenset(),
        "VMs whose link to the host may be asked for; only in [tenants.NAME].",
    )
    accept_unlisted: bool = setting(
        read_flag,
        True,
        "Certificates of client_ca with no table of their own; only in the defaults.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrarTable:
    """`[registrars.NAME]`: a tenant's registrar, in which the host is registered."""

    url: str = setting(read_url, None, "Where it answers; must be set.")
    ca: Path | None = setting(
        read_path, None, "CA of its certificate, PEM; by default those that the system trusts."
    )
    client_cert: Path | None = setting(
        read_path, None, "Own certificate, PEM; a registrar lets nobody read without one."
    )
    client_key: Path | None = setting(
        read_path, None, "Its private key, PEM, not encrypted; not readable by others."
    )
    tls_name: str | None = setting(
        read_host, None, "What its certificate is for; the URL's host by default."
    )
    insecure_plaintext: bool = setting(
        read_flag, False, "The URL is http://: nothing can be read back, nor who answers be known."
    )
    tenant: str | None = setting(
        read_text, None, "Whose it is; this tenant sees the registration in /verifier/identity."
    )
    contact: str | None = setting(
        read_contact, None, "IP address and port that the record names, for the tenant's verifier."
    )
    agent_id: str | None = setting(
        read_agent_id, None, "The host's id there; by default from the host's id, NAME and URL."
    )
    interval_s: float = setting(
        number(10, 86_400), 300.0, "How often the record is looked at, in seconds."
    )
    register_unread: bool = setting(
        read_flag,
        False,
        "Register though the record cannot be read and Keylime up to 7.13 lets it be replaced.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """`[logs]`: the host's event logs, sent along with PCR 10 and the boot PCRs."""

    ima: Path = setting(read_path, Path(DEFAULT_IMA_LOG), "The kernel's IMA list, ASCII.")
    uefi: Path = setting(read_path, Path(DEFAULT_UEFI_LOG), "The firmware's event log.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogTable:
    """`[log]`: the daemon's own log, on stderr."""

    format: str = setting(
        one_of(*journal.FORMATS), journal.TEXT, "key=value text, or a JSON object a line."
    )
    level: str = setting(one_of(*journal.LEVELS), "info", "The least important that is written.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditTable:
    """`[audit]`: a record of each answered request."""

    enabled: bool = setting(read_flag, False, "Whether records are written.")
    path: Path | None = setting(
        read_path, None, "File of the records; the log where there is none."
    )
    max_mb: int = setting(integer(1, 100_000), 64, "Size at which the file is rotated, in MB.")
    keep: int = setting(integer(1, 99), 8, "Rotated files that are kept.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vtpm:
    """`[vtpm]`: the link between VMs' vTPMs and the host's TPM."""

    enabled: bool = setting(read_flag, False, "Whether vTPMs are registered and claims are made.")
    socket: Path = setting(
        read_path, Path("/run/provider-proxy/vtpm.sock"), "Where provider-proxy-ekhook comes in."
    )
    helper: Path = setting(
        read_path, Path("/run/provider-proxy-vtpm.sock"), "Where provider-proxy-vtpm listens."
    )
    issuer: str = setting(
        one_of("delegate", "tpm"),
        "delegate",
        "Who certifies vTPMs: swtpm_localca, or a CA in the host's TPM.",
    )
    swtpm_user: str = setting(
        read_text, "tss", "The user that swtpm runs as, `swtpm_user` of libvirt."
    )
    state_root: Path = setting(
        read_path, Path("/var/lib/libvirt/swtpm"), "libvirt's folder of vTPMs, one for each VM."
    )
    max_vms: int = setting(integer(1, 100_000), 4096, "VMs that the registry holds at most.")
    ca_handle: int = setting(
        read_handle, 0x81000101, "Persistent handle of the key of the CA in the host's TPM."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    state_dir: Path = setting(
        read_path, Path(DEFAULT_STATE_DIR), "Where the AK's authValue and the embedded TPM live."
    )
    host_uuid: uuid.UUID | None = setting(
        read_uuid, None, "The host's id for tenants; by default derived from its EK."
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
