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
import stat
import tomllib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from provider_proxy.errors import ConfigError, HostError
from provider_proxy.model import PCR_COUNT, HashAlg, mask_of
from provider_proxy.waiting_room import DEFAULT_ISOLATED

C = TypeVar("C")
Reader = Callable[[str, Any], Any]

EMBEDDED = "embedded"
MAX_CONFIG_BYTES = 1 << 20
MAX_SECRET_BYTES = 4096
PERSISTENT_HANDLES = range(0x81000000, 0x82000000)
DEFAULT_STATE_DIR = "/var/lib/provider-proxy"
DEFAULT_IMA_LOG = "/sys/kernel/security/ima/ascii_runtime_measurements"
DEFAULT_UEFI_LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"
ALL_BUT_IMA = tuple(pcr for pcr in range(PCR_COUNT) if pcr != 10)


def _fail(key: str, must: str) -> ConfigError:
    return ConfigError(f"{key} must be {must}")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _fail(key, "text")
    return value


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _fail(key, "true or false")
    return value


def _path(key: str, value: object) -> Path:
    text = _text(key, value)
    if not text or "\0" in text:
        raise _fail(key, "a path")
    return Path(text)


def _uuid(key: str, value: object) -> uuid.UUID:
    try:
        return uuid.UUID(_text(key, value))
    except ValueError:
        raise _fail(key, "a UUID") from None


def _number(least: float, most: float) -> Reader:
    def read(key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _fail(key, "a number")
        if not least <= value <= most:
            raise _fail(key, f">= {least:g}" if value < least else f"<= {most:g}")
        return float(value)

    return read


def _integer(least: int, most: int) -> Reader:
    number = _number(least, most)

    def read(key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _fail(key, "a whole number")
        return int(number(key, value))

    return read


def _one_of(*choices: str) -> Reader:
    def read(key: str, value: object) -> str:
        if value not in choices:
            raise _fail(key, "one of " + ", ".join(f'"{choice}"' for choice in choices))
        return _text(key, value)

    return read


def _duty(key: str, value: object) -> float:
    number: float = _number(0, 1)(key, value)
    if number <= 0:
        raise _fail(key, "> 0")
    return number


def _handle(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in PERSISTENT_HANDLES:
        raise _fail(key, "a persistent handle, 0x81000000 to 0x81ffffff")
    return value


def _pcrs(key: str, value: object) -> int:
    if not isinstance(value, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < PCR_COUNT for n in value
    ):
        raise _fail(key, f"a list of PCR numbers, 0 to {PCR_COUNT - 1}")
    return mask_of(value)


def _banks(key: str, value: object) -> tuple[HashAlg, ...]:
    if not isinstance(value, list) or not value:
        raise _fail(key, "a list of banks")
    read = _one_of(*(alg.label for alg in HashAlg))
    return tuple(HashAlg.from_label(read(key, name)) for name in value)


def _addresses(key: str, value: object) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    for item in listed:
        text = _text(key, item)
        host, _, port = text.rpartition(":")
        if text.startswith("unix:/"):
            continue
        if not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
            raise _fail(key, '"host:port", "[ipv6]:port" or "unix:/path"')
    return tuple(listed)


def _key(read: Reader, default: Any, doc: str) -> Any:
    return field(default=default, metadata={"read": read, "doc": doc})


def _table(kind: type[C]) -> C:
    made: C = field(default_factory=kind)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """`[listen]`: the tenants' door."""

    address: tuple[str, ...] = _key(
        _addresses, ("127.0.0.1:8890",), 'Where tenants ask; a list, or "unix:/path", is fine.'
    )
    tls_cert: Path | None = _key(_path, None, "The door's certificate chain, PEM.")
    tls_key: Path | None = _key(_path, None, "Its private key, PEM; not readable by others.")
    client_ca: Path | None = _key(
        _path, None, "CA of the tenants' certificates; with it, none comes in without one."
    )
    insecure_plaintext: bool = _key(
        _flag, False, "No TLS. On loopback and unix sockets only; for trying things out."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """`[admin]`: the operator's listener, plaintext, never for tenants."""

    address: tuple[str, ...] = _key(
        _addresses, (), "Where /healthz, /readyz and /metrics answer; loopback or unix only."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tpm:
    """`[tpm]`: the chip."""

    tcti: str = _key(
        _text, "device:/dev/tpmrm0", 'A tpm2-tss string, or "embedded" for a swtpm of our own.'
    )
    ek_handle: int = _key(_handle, 0x81010001, "Persistent handle of the endorsement key.")
    ak_handle: int = _key(_handle, 0x81000100, "Persistent handle of the attestation key.")
    ak_algorithm: str = _key(
        _one_of("ecc", "rsa"), "ecc", "Kind of the AK when it is made: P-256 or RSA-2048."
    )
    banks: tuple[HashAlg, ...] = _key(_banks, (HashAlg.SHA256,), "PCR banks that are offered.")
    max_duty: float = _key(
        _duty, 0.5, "Share of the chip's time that all our commands together may take."
    )
    hang_limit_s: float = _key(
        _number(1, 3600), 120.0, "A command in flight for longer ends the process, in seconds."
    )
    owner_auth_file: Path | None = _key(_path, None, "File with the owner authorisation.")
    endorsement_auth_file: Path | None = _key(
        _path, None, "File with the endorsement authorisation."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoterTable:
    """`[quoter]`: who quotes."""

    kind: str = _key(_one_of("tpm"), "tpm", "What signs the quotes.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTable:
    """`[batch]`: the batching rule."""

    window_ms: float = _key(
        _number(0, 60_000), 50.0, "How long a batch collects after its first request."
    )
    max_leaves: int = _key(
        _integer(1, 65_536), 1024, "A batch is sealed when it holds so many requests."
    )
    isolate_pcrs: int = _key(
        _pcrs,
        mask_of(DEFAULT_ISOLATED),
        "PCRs that share a batch only among those who ask for the same of them.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`[limits]`: what the door bears."""

    max_queue: int = _key(_integer(1, 1_000_000), 8192, "Requests that may wait at once.")
    max_connections: int = _key(_integer(1, 100_000), 4096, "Connections open at once.")
    default_timeout_ms: int = _key(
        _integer(1, 600_000), 30_000, "How long a request waits that names no timeout_ms."
    )
    max_timeout_ms: int = _key(_integer(1, 600_000), 60_000, "The longest timeout_ms served.")
    drain_ms: int = _key(_integer(0, 600_000), 20_000, "How long a stop waits for those who wait.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantDefaults:
    """`[tenant_defaults]`: what holds for a tenant with no table of its own."""

    pcr_allow: int = _key(
        _pcrs, mask_of(ALL_BUT_IMA), "PCRs that may be asked for; 10 brings the IMA log along."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """`[logs]`: the host's event logs, sent along with PCR 10 and the boot PCRs."""

    ima: Path = _key(_path, Path(DEFAULT_IMA_LOG), "The kernel's IMA list, ASCII.")
    uefi: Path = _key(_path, Path(DEFAULT_UEFI_LOG), "The firmware's event log.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    state_dir: Path = _key(
        _path, Path(DEFAULT_STATE_DIR), "Where the AK's authValue and the embedded TPM live."
    )
    host_uuid: uuid.UUID | None = _key(
        _uuid, None, "The host's id for tenants; by default derived from its EK."
    )
    listen: Listen = _table(Listen)
    admin: Admin = _table(Admin)
    tpm: Tpm = _table(Tpm)
    quoter: QuoterTable = _table(QuoterTable)
    batch: BatchTable = _table(BatchTable)
    limits: Limits = _table(Limits)
    tenant_defaults: TenantDefaults = _table(TenantDefaults)
    logs: Logs = _table(Logs)


TABLES: dict[str, type[Any]] = {
    "listen": Listen,
    "admin": Admin,
    "tpm": Tpm,
    "quoter": QuoterTable,
    "batch": BatchTable,
    "limits": Limits,
    "tenant_defaults": TenantDefaults,
    "logs": Logs,
}


def load_config(path: Path) -> Config:
    """Read a configuration file.

    Raises:
        HostError: the file is missing or cannot be read.
        ConfigError: not TOML, or a value is wrong; the message names the file or the key.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return parse_config(data)


def parse_config(data: Mapping[str, object]) -> Config:
    """Check a parsed TOML document.

    Raises:
        ConfigError: the message names the key.
    """
    config = _read_table(Config, data, "")
    _check_whole(config)
    return config


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
            raise _fail(key, "a table")
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
