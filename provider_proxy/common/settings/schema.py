"""What a table of a configuration file is: a dataclass whose fields say how to read their values.

`config_tables` and `watch_tables` declare tables with `setting` and `table_of`; `read_table` reads one.
An unknown key is refused: a misspelt limit must not pass for its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from provider_proxy.common.settings.values import Reader, fail
from provider_proxy.errors import ConfigError

C = TypeVar("C")


def setting(read: Reader, default: Any, doc: str) -> Any:
    """A field of a table.

    Args:
        read: checks a TOML value and gives what the program uses.
        doc: one sentence for the example file and `--help`.
    """
    return dataclasses.field(default=default, metadata={"read": read, "doc": doc})


def table_of(kind: type[C]) -> C:
    """A field that is a table itself; as it is where nothing is said."""
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
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in data.items():
        key = prefix + name
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{key} is not a key; known are {known}", key=key)
        if "read" in fields[name].metadata:
            read = fields[name].metadata["read"](key, value)
            values[name] = _from(folder, read) if folder else read
        elif isinstance(value, dict):
            values[name] = read_table(tables[name], value, key + ".", tables, folder=folder)
        else:
            raise fail(key, "a table")
    return kind(**values)


def _from(folder: Path, read: object) -> object:
    """A path, or a tuple of paths, that begins in a folder; anything else as it is."""
    if isinstance(read, tuple):
        return tuple(_from(folder, each) for each in read)
    return folder / read if isinstance(read, Path) else read
