"""The configuration's files: which there are, how they merge, and which line says what.

The main file comes first, then `conf.d/*.toml` beside it in the order of their names: tables merge key
by key, a later file wins, an array replaces the earlier one. `tenants.d/*.toml` adds tenants and
replaces nothing. Values are not looked at here; `config` does that. Files that everybody can write,
and drop-ins of strangers, are refused: whoever writes them would choose the TPM and the tenants.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provider_proxy.errors import ConfigError, HostError

MAX_CONFIG_BYTES = 1 << 20
SETTINGS = "conf.d"  # beside the configuration file
MAX_SETTINGS = 100  # more than anybody keeps apart; each is read at every reload
DROP_INS = "tenants.d"
MAX_DROP_INS = 10_000
AT_RE = re.compile(r" \(at [^()]*\)$")
AT_LINE_RE = re.compile(r"\(at line ([0-9]+), column [0-9]+\)$")
MAX_STATEMENT_TRIES = 100  # lines that might end a value of many lines; then its line stays unknown
ENDS = ("]", "}", '"""', "'''")  # one of them is in the last line of a value of many lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value came from: a line of a file, a variable of the environment, or the default.

    Attributes:
        line: from 1; None where it is not known.
    """

    file: Path | None = None
    line: int | None = None
    variable: str | None = None

    def __str__(self) -> str:
        if self.file is None:
            return self.variable or "default"
        return str(self.file) if self.line is None else f"{self.file}:{self.line}"


DEFAULT = Origin()


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What all files say together.

    Attributes:
        data: the merged tables, as `tomllib` gives them.
        values: of each key, "batch.window_ms", the place that won.
        tables: of each table, "batch", the first place that names it.
        files: those that were read, in that order.
    """

    data: Mapping[str, Any]
    values: Mapping[str, Origin]
    tables: Mapping[str, Origin]
    files: tuple[Path, ...]

    def origin(self, key: str) -> Origin | None:
        """The place of a key or a table; that of the table around it where it has none."""
        while key:
            found = self.values.get(key) or self.tables.get(key)
            if found is not None:
                return found
            key = key.rpartition(".")[0]
        return None


@dataclass(slots=True)
class _Merged:
    """The document while it grows."""

    data: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Origin] = field(default_factory=dict)
    tables: dict[str, Origin] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def read_document(path: Path) -> Document:
    """Read a configuration file and what lies beside it.

    Raises:
        HostError: a file is missing, cannot be read, or could be written by anybody.
        ConfigError: no TOML, too large or too many; the message names the file.
    """
    merged = _Merged()
    owner = _merge_file(merged, path, None)
    for extra in _beside(path, SETTINGS, MAX_SETTINGS, owner):
        _merge_file(merged, extra, owner)
    for extra in _beside(path, DROP_INS, MAX_DROP_INS, owner):
        _add_tenants(merged, extra, owner)
    return Document(
        data=merged.data, values=merged.values, tables=merged.tables, files=tuple(merged.files)
    )


def _beside(path: Path, name: str, most: int, owner: int) -> list[Path]:
    """The drop-ins of a folder, sorted; hidden ones are an editor's and not meant."""
    folder = path.parent / name
    try:
        _check_writers(folder, folder.stat(), owner)
        # Not glob(), which takes a folder that it may not read for an empty one.
        found = sorted(
            file
            for file in folder.iterdir()
            if file.name.endswith(".toml") and not file.name.startswith(".")
        )
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise HostError(f"cannot read {folder}: {exc.strerror}") from exc
    if len(found) > most:
        raise ConfigError(f"{folder}: more than {most} files")
    return found


def _check_writers(path: Path, status: os.stat_result, owner: int | None) -> None:
    if status.st_mode & stat.S_IWOTH:
        raise HostError(f"{path}: everybody can write it; see chmod o-w")
    if owner is not None and status.st_uid not in {0, os.geteuid(), owner}:
        raise HostError(f"{path} belongs to user {status.st_uid}, who has no say here")


def _read_text(path: Path, owner: int | None) -> tuple[str, int]:
    """A file's text with line ends as TOML counts them, and who owns it."""
    try:
        # Not blocking: a FIFO that nobody writes to must not hold the start up.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise HostError(f"cannot read {path}: not a plain file")
            _check_writers(path, status, owner)
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}") from exc
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return data.decode("utf-8").replace("\r\n", "\n"), status.st_uid
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8") from exc


def _parse(path: Path, owner: int | None) -> tuple[_Merged, int]:
    text, uid = _read_text(path, owner)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        at = AT_LINE_RE.search(str(exc))  # or "at end of document"
        line = at[1] if at else text.count("\n") + 1
        raise ConfigError(f"{path}:{line}: {AT_RE.sub('', str(exc))}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{path}: arrays nested too deep") from exc
    one = _Merged(data=data)
    for line, header, keys in _statements(text):
        if header:
            for size in range(1, len(keys) + 1):
                one.tables.setdefault(".".join(keys[:size]), Origin(file=path, line=line))
        else:
            one.values[".".join(keys)] = Origin(file=path, line=line)
    for key, is_table in _keys(data, ""):  # where the line is not known, the file is
        place = one.tables.get(key) or Origin(file=path)  # [[key]] has a header, too
        (one.tables if is_table else one.values).setdefault(key, place)
    return one, uid


def _keys(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, bool]]:
    """Each key of a parsed document, and whether it is a table."""
    for name, value in data.items():
        yield prefix + name, isinstance(value, dict)
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _statements(text: str) -> Iterator[tuple[int, bool, list[str]]]:
    """Headers and values of a good TOML text: line, whether a header, the full key's parts.

    TOML ends a statement at a line's end, unless a string or an array is open there; and such a piece
    is no TOML. So a statement is the shortest run of lines that `tomllib` takes, and its keys are those
    that `tomllib` finds in it.
    """
    lines = text.split("\n")
    table: list[str] = []
    at = 0
    while at < len(lines):
        start, tries, chunk, parsed = at, 0, [lines[at]], None
        first = lines[at].strip()
        at += 1
        if not first or first.startswith("#"):
            continue
        while parsed is None:
            if len(chunk) == 1 or any(end in chunk[-1] for end in ENDS):
                tries += 1
                parsed = _try("\n".join(chunk))
            if parsed is None:
                if at == len(lines) or tries > MAX_STATEMENT_TRIES:
                    return  # of what follows no line is known
                chunk.append(lines[at])
                at += 1
        if first.startswith("["):
            table = _path_of(parsed)
            yield start + 1, True, table
        else:
            for keys in _leaves(parsed):
                yield start + 1, False, [*table, *keys]


def _try(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _path_of(header: dict[str, Any]) -> list[str]:
    """["a", "b"] of what `[a.b]` or `[[a.b]]` parses to."""
    keys: list[str] = []
    inner: Any = header
    while isinstance(inner, dict) and inner:
        (name,) = inner
        keys.append(name)
        inner = inner[name]
    return keys


def _leaves(statement: Mapping[str, Any]) -> Iterator[list[str]]:
    """The keys that a statement sets; an inline table sets several."""
    for name, value in statement.items():
        if isinstance(value, dict) and value:
            yield from ([name, *rest] for rest in _leaves(value))
        else:
            yield [name]


def _merge_file(merged: _Merged, path: Path, owner: int | None) -> int:
    one, uid = _parse(path, owner)
    _merge(merged, one, merged.data, one.data, "")
    for key, origin in one.tables.items():
        merged.tables.setdefault(key, origin)
    merged.files.append(path)
    return uid


def _merge(
    merged: _Merged, one: _Merged, old: dict[str, Any], new: dict[str, Any], prefix: str
) -> None:
    for name, value in new.items():
        key = prefix + name
        was_table, is_table = isinstance(old.get(name), dict), isinstance(value, dict)
        if name in old and was_table != is_table:
            here = (one.tables if is_table else one.values)[key]
            there = (merged.tables if was_table else merged.values)[key]
            raise ConfigError(
                f"{here}: {key} is {'no table' if is_table else 'a table'} in {there}"
            )
        if is_table:
            _merge(merged, one, old.setdefault(name, {}), value, key + ".")
        else:
            old[name] = value
            merged.values[key] = one.values[key]


def _add_tenants(merged: _Merged, path: Path, owner: int) -> None:
    """The tables of a file of `tenants.d`, each the first of its name."""
    one, _ = _parse(path, owner)
    more = one.data.get("tenants")
    tenants = merged.data.setdefault("tenants", {})
    if set(one.data) != {"tenants"} or not isinstance(more, dict) or not isinstance(tenants, dict):
        raise ConfigError(f"{path}: holds [tenants.NAME] tables and nothing else")
    for name in sorted(set(tenants) & set(more)):
        key = f"tenants.{name}"
        here = one.tables.get(key) or one.values[key]
        raise ConfigError(f"{here}: {key} is there already", key=key)
    tenants.update(more)
    merged.values.update(one.values)
    for key, origin in one.tables.items():
        merged.tables.setdefault(key, origin)
    merged.files.append(path)


def overlay(document: Document, key: str, value: object, origin: Origin) -> Document:
    """The document with one key, "batch.window_ms" or "state_dir", set anew."""
    table, _, name = key.rpartition(".")
    inner = document.data.get(table, {}) if table else document.data
    if not isinstance(inner, Mapping):
        return document  # `config` refuses the file's value as it is
    changed = {**inner, name: value}
    data = {**document.data, table: changed} if table else changed
    return dataclasses.replace(document, data=data, values={**document.values, key: origin})
