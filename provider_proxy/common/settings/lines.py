"""Which line of a TOML text says what: `tomllib` gives the values alone.

TOML ends a statement at a line's end, unless a string or an array is open there; and such a piece is no
TOML. So a statement is the shortest run of lines that `tomllib` takes, and its keys are those that
`tomllib` finds in it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

MAX_STATEMENT_TRIES = 100  # lines that might end a value of many lines; then its line stays unknown
ENDS = ("]", "}", '"""', "'''")  # one of them is in the last line of a value of many lines


def broken_line(text: str) -> int:
    """The line of a bad TOML text at which the statement begins that does not end; 0 if none is found."""
    broken: list[int] = []
    for _ in statements(text, broken):
        pass
    return broken[0] if broken else 0


def statements(text: str, broken: list[int] | None = None) -> Iterator[tuple[int, bool, list[str]]]:
    """Headers and values of a TOML text: line, whether a header, the full key's parts.

    Args:
        broken: gets the line from which on no statement is found, where that happens.
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
                    if broken is not None:
                        broken.append(start + 1)
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
