"""Every text of the package that a person may see: messages, log lines, help, answers, pages.

    python tests/support/messages.py [WORD …]        (`make messages`)

One line each: file, line, text; `{}` stands for a value. With words, only the lines that hold one of
them. Texts are string literals with a blank in them that are no docstrings; SQL is left out.
"""

from __future__ import annotations

import ast
import html.parser
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from places import PACKAGE

STRING_RE = re.compile(  # of JavaScript
    r'"(?:[^"\\\n]|\\.)*"' r"|'(?:[^'\\\n]|\\.)*'" r"|`[^`]*`"
)
SQL_RE = re.compile(r"^\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|WITH|DROP|GRANT|SET|LOCK)\b")


def main() -> int:
    """Print them."""
    words = [word.lower() for word in sys.argv[1:]]
    for path, line, text in messages():
        if not words or any(word in text.lower() for word in words):
            print(f"{path.relative_to(PACKAGE.parent)}:{line}: {text}")
    return 0


def messages() -> Iterator[tuple[Path, int, str]]:
    """File, line and text of each."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in of_module(path.read_text(encoding="utf-8")):
            yield path, line, text
    for path in sorted(PACKAGE.rglob("*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        for line, text in page.found:
            yield path, line, text
    described = json.loads((PACKAGE / "openapi.json").read_text(encoding="utf-8"))
    for text in _described(described):
        yield PACKAGE / "openapi.json", 1, text


def of_module(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each in a module."""
    tree = ast.parse(source)
    silent: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(id(node.value))  # a docstring
        if isinstance(node, ast.JoinedStr):
            silent.update(id(part) for part in node.values)
    for node in ast.walk(tree):
        if id(node) in silent or not isinstance(node, ast.expr):
            continue
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
            text = "".join(str(part) for part in parts)
        if re.search(r"[A-Za-z]{2,}.* [A-Za-z]|[A-Za-z] .*[A-Za-z]{2,}", text) and not SQL_RE.match(
            text
        ):
            yield node.lineno, " ".join(text.split())


def _described(node: object) -> Iterator[str]:
    """The texts of an OpenAPI description."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("description", "summary", "title") and isinstance(value, str):
                yield " ".join(value.split())
            else:
                yield from _described(value)
    elif isinstance(node, list):
        for item in node:
            yield from _described(item)


class _Page(html.parser.HTMLParser):
    """The texts of a page: what stands between tags, and the strings of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag

    def handle_data(self, data: str) -> None:
        line = self.getpos()[0]
        if self._inside == "script":
            for match in STRING_RE.finditer(data):
                if " " in match[0][1:-1].strip():
                    self.found.append((line + data.count("\n", 0, match.start()), match[0][1:-1]))
        elif self._inside != "style" and " " in data.strip():
            self.found.append((line, " ".join(data.split())))


if __name__ == "__main__":
    sys.exit(main())
