"""The configuration file: TOML in, frozen values out, and every complaint names its key.

A table is a dataclass, a key is a field of it, and the field's metadata says how to read and check
the value. Unknown tables and keys are refused: a misspelt limit must not pass for its default.
Secrets are named by path only; a file that others can read is refused.
docs/configuration.md lists the keys; a test holds it against these classes.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import stat
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from provider_proxy.config_values import (
    Reader,
    fail,
    integer,
    number,
    one_of,
    read_addresses,
    read_banks,
    read_duty,
    read_flag,
    read_handle,
    read_identities,
    read_path,
    read_pcrs,
    read_text,
    read_uuid,
    read_uuids,
)
from provider_proxy.errors import ConfigError, HostError
from provider_proxy.model import PCR_COUNT, HashAlg, mask_of
from provider_proxy.waiting_room import DEFAULT_ISOLATED

C = TypeVar("C")

EMBEDDED = "embedded"
MAX_CONFIG_BYTES = 1 << 20
MAX_SECRET_BYTES = 4096
TENANT_NAME_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)  # no ':', see tenants.py
DROP_INS = "tenants.d"  # beside the configuration file
MAX_DROP_INS = 10_000
DEFAULT_STATE_DIR = "/var/lib/provider-proxy"
DEFAULT_IMA_LOG = "/sys/kernel/security/ima/ascii_runtime_measurements"
DEFAULT_UEFI_LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"
ALL_BUT_IMA = tuple(pcr for pcr in range(PCR_COUNT) if pcr != 10)


def _key(read: Reader, default: Any, doc: str) -> Any:
    return field(default=default, metadata={"read": read, "doc": doc})


def _table(kind: type[C]) -> C:
    made: C = field(default_factory=kind)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """`[listen]`: the tenants' door."""

    address: tuple[str, ...] = _key(
        read_addresses, ("127.0.0.1:8890",), 'Where tenants ask; a list, or "unix:/path", is fine.'
    )
    tls_cert: Path | None = _key(read_path, None, "The door's certificate chain, PEM.")
    tls_key: Path | None = _key(read_path, None, "Its private key, PEM; not readable by others.")
    client_ca: Path | None = _key(
        read_path, None, "CA of the tenants' certificates; with it, none comes in without one."
    )
    client_crl: Path | None = _key(
        read_path, None, "CRL of client_ca; who is on it stays outside. Read again at SIGHUP."
    )
    insecure_plaintext: bool = _key(
        read_flag, False, "No TLS. On loopback and unix sockets only; for trying things out."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """`[admin]`: the operator's listener, plaintext, never for tenants."""

    address: tuple[str, ...] = _key(
        read_addresses, (), "Where /healthz, /readyz and /metrics answer; loopback or unix only."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tpm:
    """`[tpm]`: the chip."""

    tcti: str = _key(
        read_text, "device:/dev/tpmrm0", 'A tpm2-tss string, or "embedded" for a swtpm of our own.'
    )
    ek_handle: int = _key(read_handle, 0x81010001, "Persistent handle of the endorsement key.")
    ak_handle: int = _key(read_handle, 0x81000100, "Persistent handle of the attestation key.")
    ak_algorithm: str = _key(
        one_of("ecc", "rsa"), "ecc", "Kind of the AK when it is made: P-256 or RSA-2048."
    )
    banks: tuple[HashAlg, ...] = _key(read_banks, (HashAlg.SHA256,), "PCR banks that are offered.")
    max_duty: float = _key(
        read_duty, 0.5, "Share of the chip's time that all our commands together may take."
    )
    hang_limit_s: float = _key(
        number(1, 3600), 120.0, "A command in flight for longer ends the process, in seconds."
    )
    owner_auth_file: Path | None = _key(read_path, None, "File with the owner authorisation.")
    endorsement_auth_file: Path | None = _key(
        read_path, None, "File with the endorsement authorisation."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoterTable:
    """`[quoter]`: who quotes."""

    kind: str = _key(one_of("tpm"), "tpm", "What signs the quotes.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTable:
    """`[batch]`: the batching rule."""

    window_ms: float = _key(
        number(0, 60_000), 50.0, "How long a batch collects after its first request."
    )
    max_leaves: int = _key(
        integer(1, 65_536), 1024, "A batch is sealed when it holds so many requests."
    )
    isolate_pcrs: int = _key(
        read_pcrs,
        mask_of(DEFAULT_ISOLATED),
        "PCRs that share a batch only among those who ask for the same of them.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`[limits]`: what the door bears."""

    max_queue: int = _key(integer(1, 1_000_000), 8192, "Requests that may wait at once.")
    max_connections: int = _key(integer(1, 100_000), 4096, "Connections open at once.")
    max_connections_per_address: int = _key(
        integer(1, 100_000), 512, "Connections open at once from one IP address."
    )
    default_timeout_ms: int = _key(
        integer(1, 600_000), 30_000, "How long a request waits that names no timeout_ms."
    )
    max_timeout_ms: int = _key(integer(1, 600_000), 60_000, "The longest timeout_ms served.")
    drain_ms: int = _key(integer(0, 600_000), 20_000, "How long a stop waits for those who wait.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRules:
    """`[tenant_defaults]` and `[tenants.NAME]`: what a tenant may do."""

    identities: tuple[str, ...] = _key(
        read_identities,
        (),
        "Who this is; only in [tenants.NAME]. See docs/tenants.md for the forms.",
    )
    rate: float = _key(number(0.001, 1e6), 50.0, "Requests a second.")
    burst: int = _key(integer(1, 1_000_000), 100, "Requests that may come at once.")
    max_inflight: int = _key(integer(1, 1_000_000), 64, "Requests that may wait at once.")
    pcr_allow: int = _key(
        read_pcrs, mask_of(ALL_BUT_IMA), "PCRs that may be asked for; 10 brings the IMA log along."
    )
    vms: frozenset[uuid.UUID] = _key(
        read_uuids,
        frozenset(),
        "VMs whose link to the host may be asked for; only in [tenants.NAME].",
    )
    accept_unlisted: bool = _key(
        read_flag,
        True,
        "Certificates of client_ca with no table of their own; only in the defaults.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """`[logs]`: the host's event logs, sent along with PCR 10 and the boot PCRs."""

    ima: Path = _key(read_path, Path(DEFAULT_IMA_LOG), "The kernel's IMA list, ASCII.")
    uefi: Path = _key(read_path, Path(DEFAULT_UEFI_LOG), "The firmware's event log.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditTable:
    """`[audit]`: a record of each answered request."""

    enabled: bool = _key(read_flag, False, "Whether records are written.")
    path: Path | None = _key(read_path, None, "File of the records; the log where there is none.")
    max_mb: int = _key(integer(1, 100_000), 64, "Size at which the file is rotated, in MB.")
    keep: int = _key(integer(1, 99), 8, "Rotated files that are kept.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    state_dir: Path = _key(
        read_path, Path(DEFAULT_STATE_DIR), "Where the AK's authValue and the embedded TPM live."
    )
    host_uuid: uuid.UUID | None = _key(
        read_uuid, None, "The host's id for tenants; by default derived from its EK."
    )
    listen: Listen = _table(Listen)
    admin: Admin = _table(Admin)
    tpm: Tpm = _table(Tpm)
    quoter: QuoterTable = _table(QuoterTable)
    batch: BatchTable = _table(BatchTable)
    limits: Limits = _table(Limits)
    tenant_defaults: TenantRules = _table(TenantRules)
    tenants: Mapping[str, TenantRules] = field(default_factory=dict)
    logs: Logs = _table(Logs)
    audit: AuditTable = _table(AuditTable)


TABLES: dict[str, type[Any]] = {
    "listen": Listen,
    "admin": Admin,
    "tpm": Tpm,
    "quoter": QuoterTable,
    "batch": BatchTable,
    "limits": Limits,
    "tenant_defaults": TenantRules,
    "logs": Logs,
    "audit": AuditTable,
}


def load_config(path: Path) -> Config:
    """Read a configuration file, and the tenants in `tenants.d/*.toml` beside it.

    Raises:
        HostError: a file is missing or cannot be read.
        ConfigError: not TOML, or a value is wrong; the message names the file or the key.
    """
    data = _read_toml(path)
    tenants = data.get("tenants", {})
    drop_ins = sorted((path.parent / DROP_INS).glob("*.toml"))[: MAX_DROP_INS + 1]
    if len(drop_ins) > MAX_DROP_INS:
        raise ConfigError(f"more than {MAX_DROP_INS} files in {DROP_INS}")
    for extra in drop_ins:
        part = _read_toml(extra)
        more = part.get("tenants")
        if set(part) != {"tenants"} or not isinstance(more, dict) or not isinstance(tenants, dict):
            raise ConfigError(f"{extra}: holds [tenants.NAME] tables and nothing else")
        twice = sorted(set(tenants) & set(more))
        if twice:
            raise ConfigError(f"{extra}: tenants.{twice[0]} is there already")
        tenants = tenants | more
    if tenants:
        data["tenants"] = tenants
    return parse_config(data)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def parse_config(data: Mapping[str, object]) -> Config:
    """Check a parsed TOML document.

    Raises:
        ConfigError: the message names the key.
    """
    rest = {key: value for key, value in data.items() if key != "tenants"}
    config = _read_table(Config, rest, "")
    tenants = data.get("tenants", {})
    if not isinstance(tenants, dict):
        raise fail("tenants", "tables, [tenants.NAME]")
    config = dataclasses.replace(config, tenants=_read_tenants(tenants, config.tenant_defaults))
    _check_whole(config)
    return config


def _read_tenants(
    tenants: Mapping[str, object], defaults: TenantRules
) -> Mapping[str, TenantRules]:
    """Tenants' tables; what one does not say, the defaults say."""
    found: dict[str, TenantRules] = {}
    owner: dict[str, str] = {}
    for name, table in tenants.items():
        key = f"tenants.{name}"
        if not TENANT_NAME_RE.fullmatch(name):
            raise ConfigError(f"{key} must be a name of letters, digits, '.', '_' and '-'")
        if not isinstance(table, dict):
            raise fail(key, "a table")
        if "accept_unlisted" in table:
            raise ConfigError(f"{key}.accept_unlisted belongs in tenant_defaults")
        own = _read_table(TenantRules, table, key + ".")
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


def _read_table(kind: type[C], data: Mapping[str, object], prefix: str) -> C:
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in data.items():
        key = prefix + name
        if name not in fields:
            raise ConfigError(f"{key} is not a key; known are {', '.join(sorted(fields))}")
        if "read" in fields[name].metadata:
            values[name] = fields[name].metadata["read"](key, value)
        elif isinstance(value, dict):
            values[name] = _read_table(TABLES[name], value, key + ".")
        else:
            raise fail(key, "a table")
    return kind(**values)


def _check_whole(config: Config) -> None:
    """What one key alone cannot tell."""
    listen = config.listen
    if not listen.address:
        raise ConfigError("listen.address must name at least one address")
    if listen.insecure_plaintext:
        check_local("listen.insecure_plaintext", listen.address)
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
        raise ConfigError("identities and vms belong in tenants.NAME, not in tenant_defaults")
    check_local("admin.address", config.admin.address)
    if config.limits.default_timeout_ms > config.limits.max_timeout_ms:
        raise ConfigError("limits.default_timeout_ms must be <= limits.max_timeout_ms")
    if config.batch.window_ms >= config.limits.default_timeout_ms:
        raise ConfigError("batch.window_ms must be < limits.default_timeout_ms")
    if config.tpm.ek_handle == config.tpm.ak_handle:
        raise ConfigError("tpm.ak_handle must differ from tpm.ek_handle")


def check_local(key: str, addresses: tuple[str, ...]) -> None:
    """Raises: ConfigError where an address is neither on loopback nor a unix socket."""
    for address in addresses:
        if not address.startswith("unix:") and not is_loopback(split_address(address)[0]):
            raise ConfigError(f"{key} is for loopback and unix sockets only, not {address}")


def is_loopback(host: str) -> bool:
    """True for addresses of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # another name may resolve to anything


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[ipv6]:port"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def read_secret(key: str, path: Path | None) -> bytes:
    """Read a secret by its path, without a final newline; empty where there is no path.

    Raises:
        HostError: it cannot be read, others can read it, or it is no plain file.
    """
    if path is None:
        return b""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
                raise HostError(f"{key}: {path} must be a plain file that only its owner can read")
            return file.read(MAX_SECRET_BYTES).removesuffix(b"\n")
    except OSError as exc:
        raise HostError(f"{key}: cannot read {path}: {exc.strerror}") from exc
