"""Files of settings: which files there are, how they merge, and which line sets what.

The main file comes first, then the folders of a `Layout` beside it, by the names of their files. A folder
may change what came before: tables merge key by key, a later file wins, an array replaces the
earlier one. Or it adds tables of one kind, and replaces nothing. Values are not looked at here.

World-writable files and drop-ins of other users are refused, because their writer would decide the
settings. A folder or file that cannot be read is an error, not an empty one. Files that an editor left
behind are not read. The lines of keys are found only on demand: for 20,000 hosts that takes a while.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from provider_proxy.common.files import files_in, is_there
from provider_proxy.common.settings.lines import broken_line, statements
from provider_proxy.errors import ConfigError, HostError

AT_RE = re.compile(r" \(at [^()]*\)$")
AT_LINE_RE = re.compile(r"\(at line ([0-9]+), column [0-9]+\)$")
C = TypeVar("C")

UNCLOSED = ("Illegal character '\\n'", "Unterminated string", 'Expected "\'"')  # tomllib's words
BOM = "\ufeff"
SUFFIX = ".toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What may lie beside a file of settings.

    Attributes:
        max_bytes: of each file.
        changes: a folder whose files change what the main file says; None for none.
        max_changes: files in it.
        adds: folders whose files add tables: "tenants.d" to what they hold, "tenants".
        max_adds: files in each.
    """

    max_bytes: int
    changes: str | None = None
    max_changes: int = 100  # more than a person can manage; each is read at every reload
    adds: Mapping[str, str] = field(default_factory=dict)
    max_adds: int = 20_000


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
class _Source:
    """A file that was read.

    Attributes:
        adds: the one table of tables that it may hold; None where it may hold anything.
    """

    path: Path
    text: str
    data: Mapping[str, Any]
    adds: str | None


@dataclass(slots=True)
class _Merged:
    """The document while it grows; `values` and `tables` are filled where lines are asked for."""

    data: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Origin] = field(default_factory=dict)
    tables: dict[str, Origin] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Document:
    """What all files say together.

    Attributes:
        data: the merged tables, as `tomllib` gives them.
        changed: keys that something else than a file has set, and what.
    """

    data: Mapping[str, Any]
    sources: tuple[_Source, ...]
    changed: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that were read, in that order."""
        return tuple(source.path for source in self.sources)

    @cached_property
    def _located(self) -> _Merged:
        return _merge_all(self.sources, lines=True)

    @cached_property
    def values(self) -> Mapping[str, Origin]:
        """Of each key, "batch.window_ms", the place that won."""
        return {**self._located.values, **self.changed}

    @property
    def tables(self) -> Mapping[str, Origin]:
        """Of each table, "batch", the first place that names it."""
        return self._located.tables

    def origin(self, key: str) -> Origin | None:
        """The place of a key or a table; that of the table around it where it has none."""
        while key:
            found = self.values.get(key) or self.tables.get(key)
            if found is not None:
                return found
            key = key.rpartition(".")[0]
        return None

    def located(self, error: ConfigError) -> ConfigError:
        """The error of a value, with the file and the line, or the variable, that it came from."""
        place = self.origin(error.key) or Origin(file=self.files[0])
        return ConfigError(f"{place}: {error}", key=error.key)

    def overlaid(self, key: str, value: object, origin: Origin) -> Document:
        """The document with one key, "batch.window_ms" or "state_dir", set by something else."""
        table, _, name = key.rpartition(".")
        inner = self.data.get(table, {}) if table else self.data
        if not isinstance(inner, Mapping):
            return self  # the check of values refuses the file's value itself
        changed = {**inner, name: value}
        data = {**self.data, table: changed} if table else changed
        return dataclasses.replace(self, data=data, changed={**self.changed, key: origin})


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[C]):
    """Settings, and where each of them came from.

    Attributes:
        defaults: the table that says what one of a kind does not: "tenants" to "tenant_defaults".
    """

    config: C
    document: Document
    defaults: Mapping[str, str]

    def origin(self, key: str) -> Origin:
        """Where the value of a key, "batch.window_ms" or "tenants.acme.rate", came from."""
        values = self.document.values
        defaults = self.defaults.get(key.partition(".")[0])
        found = values.get(key)
        if found is None and defaults is not None:
            found = values.get(f"{defaults}.{key.rpartition('.')[2]}")
        return found or DEFAULT


def load(
    document: Document, parse: Callable[[Mapping[str, Any]], C], defaults: Mapping[str, str]
) -> Loaded[C]:
    """Check what files say.

    Raises:
        ConfigError: a value is wrong; the message names the file and line, or the variable.
    """
    try:
        return Loaded(config=parse(document.data), document=document, defaults=defaults)
    except ConfigError as exc:
        raise document.located(exc) from exc


def read_document(path: Path, layout: Layout) -> Document:
    """Read a file of settings and what lies beside it.

    Raises:
        HostError: a file is missing, cannot be read, or is world-writable.
        ConfigError: not TOML, too large or too many; the message names the file.
    """
    main, owner = _read(path, layout, None, None)
    sources = [main]
    if layout.changes is not None:
        for extra in _beside(path, layout.changes, layout.max_changes, owner):
            sources.append(_read(extra, layout, owner, None)[0])
    for folder, adds in layout.adds.items():
        for extra in _beside(path, folder, layout.max_adds, owner):
            sources.append(_read(extra, layout, owner, adds)[0])
    try:
        merged = _merge_all(sources, lines=False)
    except ConfigError:
        _merge_all(sources, lines=True)  # says the same with the lines
        raise
    return Document(data=merged.data, sources=tuple(sources))


def _beside(path: Path, name: str, most: int, owner: int) -> list[Path]:
    """The drop-ins of a folder, sorted; hidden ones are an editor's and not meant."""
    folder = path.parent / name
    if not is_there(folder):
        return []
    _check_writers(folder, folder.stat(), owner)
    found = [file for file in files_in(folder, SUFFIX) if not file.name.startswith(".")]
    if len(found) > most:
        raise ConfigError(f"{folder}: more than {most} files")
    return found


def _check_writers(path: Path, status: os.stat_result, owner: int | None) -> None:
    if status.st_mode & stat.S_IWOTH:
        raise HostError(f"{path}: everybody can write it: chmod o-w {path}")
    if owner is not None and status.st_uid not in {0, os.geteuid(), owner}:
        raise HostError(
            f"{path} is owned by uid {status.st_uid}: it must be owned by root or by the owner of "
            "the file beside it (chown)"
        )


def _read(path: Path, layout: Layout, owner: int | None, adds: str | None) -> tuple[_Source, int]:
    """A file, parsed, with line ends as TOML counts them; and who owns it."""
    try:
        # Not blocking: a FIFO that nobody writes to must not hold the start up.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise HostError(f"cannot read {path}: not a plain file")
            _check_writers(path, status, owner)
            data = file.read(layout.max_bytes + 1)
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}") from exc
    if len(data) > layout.max_bytes:
        raise ConfigError(f"{path}: larger than {layout.max_bytes} bytes")
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8") from exc
    return _Source(path=path, text=text, data=_parse(path, text), adds=adds), status.st_uid


def _parse(path: Path, text: str) -> dict[str, Any]:
    if text.startswith(BOM):
        raise ConfigError(f"{path}:1: begins with a byte order mark: save it as UTF-8 without one")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        at = AT_LINE_RE.search(str(exc))  # or "at end of document"
        line = int(at[1]) if at else text.count("\n") + 1
        words = AT_RE.sub("", str(exc))
        if words.startswith(UNCLOSED):
            words = "a quote is opened and not closed on its line"
            line = line if at and "Illegal" in str(exc) else broken_line(text) or line
        raise ConfigError(f"{path}:{line}: {words}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{path}: arrays nested too deep") from exc


def _locate(source: _Source) -> _Merged:
    """Where each key and table of a file stands."""
    one = _Merged()
    for line, header, keys in statements(source.text):
        if header:
            for size in range(1, len(keys) + 1):
                one.tables.setdefault(".".join(keys[:size]), Origin(file=source.path, line=line))
        else:
            one.values[".".join(keys)] = Origin(file=source.path, line=line)
    for key, is_table in _keys(source.data, ""):  # where the line is not known, the file is
        place = one.tables.get(key) or Origin(file=source.path)  # [[key]] has a header, too
        (one.tables if is_table else one.values).setdefault(key, place)
    return one


def _keys(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, bool]]:
    """Each key of a parsed document, and whether it is a table."""
    for name, value in data.items():
        yield prefix + name, isinstance(value, dict)
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _merge_all(sources: Sequence[_Source], *, lines: bool) -> _Merged:
    merged = _Merged()
    for source in sources:
        one = _locate(source) if lines else _Merged()
        if source.adds is None:
            _merge(merged, one, merged.data, source.data, "")
        else:
            _add(merged, one, source, source.adds)
        for key, origin in one.tables.items():
            merged.tables.setdefault(key, origin)
    return merged


def _merge(
    merged: _Merged, one: _Merged, old: dict[str, Any], new: Mapping[str, Any], prefix: str
) -> None:
    for name, value in new.items():
        key = prefix + name
        was_table, is_table = isinstance(old.get(name), dict), isinstance(value, dict)
        if name in old and was_table != is_table:
            here = (one.tables if is_table else one.values).get(key)
            there = (merged.tables if was_table else merged.values).get(key)
            raise ConfigError(
                f"{here}: {key} is {'not a table' if is_table else 'a table'} in {there}"
            )
        if is_table:
            _merge(merged, one, old.setdefault(name, {}), value, key + ".")
        else:
            old[name] = value
            if key in one.values:
                merged.values[key] = one.values[key]


def _add(merged: _Merged, one: _Merged, source: _Source, what: str) -> None:
    """The tables of a file that adds, each the first of its name."""
    more = source.data.get(what)
    known = merged.data.setdefault(what, {})
    if set(source.data) != {what} or not isinstance(more, dict) or not isinstance(known, dict):
        raise ConfigError(f"{source.path}: may hold only [{what}.NAME] tables")
    for name in sorted(set(known) & set(more)):
        key = f"{what}.{name}"
        here = one.tables.get(key) or one.values.get(key) or source.path
        raise ConfigError(f"{here}: {key} is defined in another file already", key=key)
    known.update(more)
    merged.values.update(one.values)
