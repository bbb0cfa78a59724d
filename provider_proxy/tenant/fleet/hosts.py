"""Converts hosts between the watcher's file, the database and a member: JSON rules, policies by digest.

Policies and pins are in the database, so that every member judges a host the same way. A member's own
settings stay in its file: TLS keys and certificates, webhook, command, metrics. Paths to TLS files in a
host's rules name files on each member.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from provider_proxy.common.files import read_trusted, write_private
from provider_proxy.common.settings.schema import read_table
from provider_proxy.common.settings.values import read_pcrs
from provider_proxy.errors import HostError, UsageError
from provider_proxy.evidence.model import HashAlg, pcrs_of
from provider_proxy.tenant.policies import MAX_RUNTIME_POLICY_BYTES
from provider_proxy.tenant.watch.questions import Trust
from provider_proxy.tenant.watch.tables import TABLES, HostRules, WatchConfig
from provider_proxy.trust.ek_judges import AskHost
from provider_proxy.trust.pins import MAX_PIN_BYTES, PinStore, parse_pin

FILE_KEYS = ("tpm_policy", "runtime_policy", "runtime_policy_key", "boot_policy", "vm_ek")
"""The keys of a host's rules that name files whose contents go into the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedHost:
    """A host as the watcher's file and the pins describe it, ready for the database."""

    name: str
    rules: Mapping[str, object]
    files: Mapping[str, str]
    pin: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedFleet:
    """All hosts of a file.

    Attributes:
        policies: contents by digest.
    """

    hosts: tuple[ImportedHost, ...]
    policies: Mapping[str, bytes]


def digest_of(data: bytes) -> str:
    """A policy file's name in the database: hex SHA-256 of its content."""
    return hashlib.sha256(data).hexdigest()


def rules_as_json(rules: HostRules) -> dict[str, object]:
    """The keys that differ from their defaults, as in TOML.

    `FILE_KEYS` are left out, and `registrar`: members read AKs from pins (see `registrars`).
    """
    found: dict[str, object] = {}
    for field in dataclasses.fields(HostRules):
        value = getattr(rules, field.name)
        if field.name in (*FILE_KEYS, "registrar") or value == field.default:
            continue
        if field.metadata["read"] is read_pcrs:
            value = list(pcrs_of(value))
        elif isinstance(value, HashAlg):
            value = value.label
        elif isinstance(value, enum.Enum):
            value = value.value
        elif isinstance(value, Path | UUID):
            value = str(value)
        found[field.name] = value
    return found


def rules_from_json(
    name: str, values: Mapping[str, object], files: Mapping[str, Path]
) -> HostRules:
    """The rules of a row.

    Args:
        files: where the contents of the policy files are on this machine, by key.

    Raises:
        ConfigError: a value is wrong; the message names host and key.
    """
    rules = read_table(HostRules, values, f"hosts.{name}.", TABLES)
    return dataclasses.replace(rules, **files)  # type: ignore[arg-type]


def read_fleet(config: WatchConfig) -> ImportedFleet:
    """The hosts of a watcher's file, with the contents of their policies and pins.

    Raises:
        UsageError: a host is not pinned.
        HostError: a file is missing or cannot be read.
    """
    pins = PinStore(config.pins)
    hosts: list[ImportedHost] = []
    policies: dict[str, bytes] = {}
    read: dict[Path, str] = {}
    for name, rules in sorted(config.hosts.items()):
        files = {}
        for key in FILE_KEYS:
            path = getattr(rules, key)
            if path is not None:
                if path not in read:
                    data = read_trusted(path, MAX_RUNTIME_POLICY_BYTES)
                    read[path] = digest_of(data)
                    policies[read[path]] = data
                files[key] = read[path]
        pin = b""
        if rules.need_provider_quote:
            label = rules.pin or name
            pins.load(label)  # raises with what is wrong with it
            pin = read_trusted(pins.path_of(label), MAX_PIN_BYTES)
        hosts.append(ImportedHost(name=name, rules=rules_as_json(rules), files=files, pin=pin))
    return ImportedFleet(hosts=tuple(hosts), policies=policies)


class PolicyCache:
    """Policy contents as files of this member, named by their digests.

    Args:
        folder: this member's own; created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[str] = set()

    def path_of(self, digest: str) -> Path:
        """The path of a content, whether it exists or not."""
        return self._folder / digest

    def has(self, digest: str) -> bool:
        """Whether this process wrote it, or it is there and unchanged."""
        if digest in self._known:
            return True
        try:
            data = read_trusted(self.path_of(digest), MAX_RUNTIME_POLICY_BYTES)
        except HostError:
            return False
        if digest_of(data) == digest:
            self._known.add(digest)
        return digest in self._known

    def put(self, digest: str, data: bytes | None) -> None:
        """Keep a content from the database.

        Raises:
            HostError: it is not the content of that digest, or cannot be written.
        """
        if data is None or digest_of(data) != digest:
            raise HostError(
                f"the database does not have the policy {digest}; import the host again"
            )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self.path_of(digest), data)
        self._known.add(digest)


class RowAks:
    """An `AkSource` of the pins in the rows."""

    def __init__(self) -> None:
        self._known: dict[str, Trust] = {}

    def put(self, name: str, pin: bytes) -> None:
        """Use a row's pin.

        Raises:
            HostError: it is damaged.
        """
        self._known[name] = parse_trust(name, pin)

    def forget(self, name: str) -> None:
        """Forget a host that is no longer this member's."""
        self._known.pop(name, None)

    async def trusted(self, name: str, rules: HostRules, ask_host: AskHost | None = None) -> Trust:
        """Raises: UsageError where the row has no pin."""
        found = self._known.get(name)
        if found is None:
            raise UsageError(f"{name} is not pinned")
        return found


def parse_trust(name: str, pin: bytes) -> Trust:
    """The host that a pin's file trusts. Raises: HostError where it is damaged."""
    host, newest = parse_pin(pin, name)
    return Trust(host=host, newest=newest)
