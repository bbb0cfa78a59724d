"""docs/mistakes.md has each mistake; tests/cli/test_mistakes.py makes them and compares what is said."""

from __future__ import annotations

import re

from mistakes import GROUPS
from places import DOCS


def test_the_page_has_each_mistake_and_no_traceback() -> None:
    page = (DOCS / "mistakes.md").read_text(encoding="utf-8")
    named = [row.split(" | ")[0].removeprefix("| ") for row in page.splitlines() if "| " in row]
    for group, mistakes in GROUPS.items():
        assert f"## {group}\n" in page
        assert {mistake.name for mistake in mistakes} <= set(named)
    assert sum(map(len, GROUPS.values())) >= 40
    assert "Traceback" not in page
    assert not re.search(r"exit code (?!0|2|3)\d", page)
