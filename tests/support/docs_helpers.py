"""What tests read of this project's documents: pages, tables, fenced blocks, and the code's own names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

DOCS = ROOT / "docs"
ADRS = sorted((DOCS / "adr").glob("*.md"))
OWN = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")


def read(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(name: str | Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(read(name)) if kind == language]


def tables(name: str | Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Each table of a document: its head, and its rows."""
    block: list[list[str]] = []
    for line in [*FENCE.sub("", read(name)).splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif block:
            assert all(set(cell) <= set("-:") for cell in block[1])
            assert len({len(row) for row in block}) == 1, f"{name}: a table of unequal rows"
            yield block[0], block[2:]
            block = []


def rows(name: str | Path, *head: str) -> list[list[str]]:
    """The rows of all tables whose head begins so."""
    found = [row for cells, body in tables(name) if cells[: len(head)] == [*head] for row in body]
    assert found, f"{name} has no table {head}"
    return found


def code(cell: str) -> str:
    """The text of a cell that is one piece of code."""
    match = CODE.fullmatch(cell)
    assert match, f"{cell!r} is not in backticks"
    return match[1]


def codes(found: list[list[str]], column: int = 0) -> list[str]:
    values = [code(row[column]) for row in found]
    assert len(values) == len(set(values)), "a row is there twice"
    return values


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {s for direct in kind.__subclasses__() for s in (direct, *subclasses(direct))}
