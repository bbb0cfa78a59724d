"""docs/provider-proxy.example.toml has each key once, commented out, with its default."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
from typing import Any

from places import DOCS

from provider_proxy.common.settings.values import as_toml
from provider_proxy.host.config.environment import known_keys
from provider_proxy.host.config.load import parse_config
from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.host.config.tables import Config

EXAMPLE = DOCS / "provider-proxy.example.toml"
TEXT = EXAMPLE.read_text(encoding="utf-8")
# "#key = value" is a setting; "# text" explains. Headers stand open, so that a setting whose # was
# taken away is in its own table; those of named tables are examples.
OPEN = re.sub(r"^#(?=\S)", "", TEXT, flags=re.MULTILINE)
DATA: dict[str, Any] = tomllib.loads(OPEN)
ONLY_NAMED = {"tenant_defaults.identities", "tenant_defaults.vms"}
KEYS = {key: field for key, field in known_keys() if key not in ONLY_NAMED}


def lookup(key: str) -> Any:
    table, _, name = key.rpartition(".")
    return (DATA.get(table, {}) if table else DATA).get(name)


def test_every_key_is_in_the_example() -> None:
    missing = []
    for key, field in KEYS.items():
        if lookup(key) is None:
            table, _, name = key.rpartition(".")
            value = (
                "EXAMPLE"
                if field.default is None
                else as_toml(field.metadata["read"], field.default)
            )
            extra = " No default." if field.default is None else ""
            missing.append(f"below [{table}]:\n# {field.metadata['doc']}{extra}\n#{name} = {value}")
    assert not missing, f"add to {EXAMPLE.name}:\n\n" + "\n\n".join(missing)


def test_what_is_commented_out_holds_already() -> None:
    for key, field in KEYS.items():
        value = field.metadata["read"](key, lookup(key))
        assert field.default is None or value == field.default, key


def test_opened_up_it_is_a_configuration() -> None:
    """With the examples of what has no default; so no key is there that the daemon does not know."""
    config = parse_config(DATA)
    assert list(config.tenants) == list(config.registrars) == ["acme"]
    assert DATA["registrars"]["acme"].keys() == {
        field.name for field in dataclasses.fields(RegistrarTable)
    }
    assert config.batch == Config().batch


def test_as_it_is_it_sets_nothing() -> None:
    assert not any(tomllib.loads(TEXT).values())


def test_every_setting_is_explained() -> None:
    lines = TEXT.splitlines()
    table = ""
    for before, line in itertools.pairwise(lines):
        if header := re.match(r"\[(\S+)\]", line):
            table = header[1] + "."
        if setting := re.match(r"#([a-z_]+) = ", line):
            assert before.startswith("# "), f"nothing explains {setting[1]}"
            field = KEYS.get(table + setting[1])
            assert ("No default." in before) == (field is not None and field.default is None), line
    assert all(len(line) <= 106 for line in lines)
