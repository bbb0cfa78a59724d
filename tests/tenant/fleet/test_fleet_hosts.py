"""Hosts between file and database: every rule survives, and addresses hold no password."""

from __future__ import annotations

import dataclasses
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from provider_proxy.errors import ConfigError, HostError, UsageError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.tenant.fleet.database import is_database, read_address
from provider_proxy.tenant.fleet.hosts import (
    FILE_KEYS,
    PolicyCache,
    digest_of,
    read_fleet,
    rules_as_json,
    rules_from_json,
)
from provider_proxy.tenant.fleet.rows import shard_of
from provider_proxy.tenant.watch.config import parse_watch_config
from provider_proxy.tenant.watch.tables import HostRules
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.pins import PinStore


def other(field: dataclasses.Field[Any]) -> Any:
    """A value of a field that is not its default."""
    value = field.default
    special: dict[str, Any] = {
        "provider_ip": "192.0.2.1",
        "bank": HashAlg.SHA384,
        "mode": "push",
        "on_invalid": "stop",
        "vm_least": "confirmed",
        "vm": uuid.UUID(int=5),
        "uuid": "a-host",
        "first_use_pcrs": 0x81,
        "uefi_pcrs": 0x3,
    }
    if field.name in special:
        return special[field.name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2
    if value is None:
        return Path("/x") if "Path" in str(field.type) else "name"
    kinds: Any = type(value)
    return next(kind for kind in kinds if kind is not value)  # an enum's other member


def test_every_rule_survives_the_database() -> None:
    values = {
        field.name: other(field)
        for field in dataclasses.fields(HostRules)
        if field.name not in (*FILE_KEYS, "registrar")
    }
    rules = HostRules(**values)
    stored = json.loads(json.dumps(rules_as_json(rules)))
    assert set(stored) == set(values)
    assert rules_from_json("h", stored, {}) == rules
    assert rules_as_json(HostRules()) == {}


def test_every_path_of_a_policy_is_a_file_key() -> None:
    paths = {f.name for f in dataclasses.fields(HostRules) if "Path" in str(f.type)}
    assert paths - set(FILE_KEYS) == {"tls_ca", "tls_cert", "tls_key"}


def test_a_row_with_a_wrong_value_names_host_and_key() -> None:
    with pytest.raises(ConfigError, match=r"hosts\.h7\.interval_s"):
        rules_from_json("h7", {"interval_s": -1}, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "policy.json").write_text('{"0": ["00"]}')
    return tmp_path


def config_of(folder: Path, **host: object) -> Any:
    table = {"provider_ip": "192.0.2.1", "tpm_policy": str(folder / "policy.json"), **host}
    return parse_watch_config({"pins": str(folder / "pins"), "hosts": {"a": table, "b": table}})


def test_policies_go_by_content(folder: Path) -> None:
    pins = PinStore(folder / "pins")
    for name in ("a", "b"):
        pins.pin(name, SoftTpm().ak_public)
    fleet = read_fleet(config_of(folder))
    digest = digest_of(b'{"0": ["00"]}')
    assert [dict(host.files) for host in fleet.hosts] == [{"tpm_policy": digest}] * 2
    assert fleet.policies == {digest: b'{"0": ["00"]}'}
    cache = PolicyCache(folder / "cache")
    assert not cache.has(digest)
    cache.put(digest, fleet.policies[digest])
    assert PolicyCache(folder / "cache").has(digest)
    cache.path_of(digest).write_text("changed")
    assert not PolicyCache(folder / "cache").has(digest)
    with pytest.raises(HostError, match="import the host again"):
        cache.put(digest, b"other")
    with pytest.raises(HostError, match="import the host again"):
        cache.put(digest, None)


def test_a_host_without_a_pin_is_not_imported(folder: Path) -> None:
    with pytest.raises(UsageError, match="a is not pinned"):
        read_fleet(config_of(folder))


def test_members_ask_no_registrar(folder: Path) -> None:
    """An import does, and pins: the key itself is not a member's."""
    rules = dataclasses.replace(config_of(folder).hosts["a"], registrar="acme")
    assert "registrar" not in rules_as_json(rules)


@pytest.mark.parametrize(
    "text", ["postgresql:///fleet?service=x", "postgres://h/db", "postgresql://u@[::1]:5432/db"]
)
def test_addresses(text: str) -> None:
    assert is_database(text)
    assert "tcp_user_timeout" in read_address(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("postgresql://u:secret@h/db", "passfile"),
        ("postgresql:///db?password=secret", "passfile"),
        ("postgresql://h/db?nonsense=1", "not a PostgreSQL address"),
    ],
)
def test_wrong_addresses(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_address(text)
    assert "secret" not in str(caught.value)


def test_other_settings_are_no_databases() -> None:
    assert not is_database("/var/lib/x")


def test_shards_stay_where_they_are() -> None:
    """A release that put hosts into other shards would lose their states."""
    assert [shard_of(name, 64) for name in ("a", "h1", "rack7-node12")] == [10, 3, 31]
    assert {shard_of(f"h{n}", 8) for n in range(100)} == set(range(8))
