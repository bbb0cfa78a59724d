"""What a table of a configuration file is: a dataclass whose fields say how to read their values.

`config_tables` and `watch_tables` declare tables with `setting` and `table_of`; `read_table` reads one.
An unknown key is refused: a misspelt limit must not pass for its default.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from provider_proxy.common.settings.values import LABEL_RE, Reader, fail
from provider_proxy.errors import ConfigError

C = TypeVar("C")


def setting(read: Reader, default: Any, doc: str) -> Any:
    """A field of a table.

    Args:
        read: checks a TOML value and gives what the program uses.
        doc: one sentence for the example file and `--help`.
    """
    return dataclasses.field(default=default, metadata={"read": read, "doc": doc})


def hidden(default: Any) -> Any:
    """A field that no file can set."""
    return dataclasses.field(default=default, metadata={"hidden": True})


def table_of(kind: type[C]) -> C:
    """A field that is a table itself; it has its defaults where the file has no such table."""
    made: C = dataclasses.field(default_factory=kind)
    return made


def read_table(
    kind: type[C],
    data: Mapping[str, object],
    prefix: str,
    tables: Mapping[str, type[Any]],
    *,
    folder: Path | None = None,
) -> C:
    """Read a table.

    Args:
        prefix: of its keys in messages: "batch." or "".
        tables: the tables that may stand in it, by their names.
        folder: where relative paths begin; None to leave them as they are.

    Raises:
        ConfigError: an unknown key, or a wrong value; the message names the key.
    """
    fields = {f.name: f for f in dataclasses.fields(kind) if not f.metadata.get("hidden")}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in data.items():
        key = prefix + name
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{key} is not a key; the known keys are {known}", key=key)
        if "read" in fields[name].metadata:
            read = fields[name].metadata["read"](key, value)
            values[name] = _from(folder, read) if folder else read
        elif isinstance(value, dict):
            values[name] = read_table(tables[name], value, key + ".", tables, folder=folder)
        else:
            raise fail(key, "a table")
    return kind(**values)


def read_over(
    defaults: C,
    data: Mapping[str, object],
    prefix: str,
    *,
    folder: Path | None = None,
) -> C:
    """Read a table whose missing keys come from other settings.

    Raises:
        ConfigError: as `read_table`.
    """
    own = read_table(type(defaults), data, prefix, {}, folder=folder)
    changed = {name: getattr(own, name) for name in data}
    return dataclasses.replace(defaults, **changed)  # type: ignore[type-var]


def check_related(
    key: str,
    table: object,
    *,
    together: Sequence[tuple[str, str]] = (),
    needs: Sequence[tuple[str, str]] = (),
) -> None:
    """Check the keys of a table that need each other.

    Args:
        key: of the table, "hosts.a".
        together: pairs of which both are set, or none.
        needs: pairs of which the first is set only where the second is.

    Raises:
        ConfigError: the message names both.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(table)}  # type: ignore[arg-type]
    said = {name for name in defaults if getattr(table, name) != defaults[name]}
    for one, other in together:
        if (one in said) != (other in said):
            raise ConfigError(f"{key}.{one} and {other} belong together: set both or neither")
    for one, other in needs:
        if one in said and other not in said:
            raise ConfigError(f"{key}.{one} needs {other}")


def named_tables(
    data: Mapping[str, object], key: str, names: re.Pattern[str] = LABEL_RE
) -> Mapping[str, Mapping[str, object]]:
    """The tables of a table of tables, `[hosts.NAME]`, by their names.

    Raises:
        ConfigError: something else stands there, or a name is not as it must be.
    """
    tables = data.get(key, {})
    if not isinstance(tables, dict):
        raise fail(key, f"tables, [{key}.NAME]")
    for name, table in tables.items():
        if not names.fullmatch(name):
            raise fail(f"{key}.{name}", "a name of letters, digits, '.', '_' and '-'")
        if not isinstance(table, dict):
            raise fail(f"{key}.{name}", "a table")
    return tables


def _from(folder: Path, read: object) -> object:
    """A path, or a tuple of paths, that begins in a folder; anything else as it is."""
    if isinstance(read, tuple):
        return tuple(_from(folder, each) for each in read)
    return folder / read if isinstance(read, Path) else read
