"""Words that make a page or a message hard to read do not come back: see the style in CONTRIBUTING.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

# Each with what to write instead.
PHRASES = {
    r"\bis none\b": "say what it is not, or what is missing: 'is not a valid UUID'",
    r"(?<![Tt]here )\bis no(?= [a-z])(?! longer| more)": "'is not a …'",
    r"\b[Ww]hoever\b": "name who: 'any user who …', 'a client that …'",
    r"\b[Aa]new\b": "'again'",
    r"\bto be had\b": "'available'",
    r"\bwho waits\b": "'a waiting request', 'waiting clients'",
    r"\bhas no say\b": "'is not trusted'",
    r"\buntold\b": "say what was not reported",
    r"\b[Ll]adder\b": "'response codes'",
    r"\b[Ww]aiting room\b": "'request queue'",
    r"\b[Kk]eeper\b": "'vTPM service'",
    r"\b(the|a|one|tenants'|admin) doors?\b": "'server', 'listener', 'API'",
    r"\bhog\b": "'exhaust'",
}
FOLDERS = ("provider_proxy", "docs", "systemd", "packaging")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile")
SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".html",
    ".json",
    ".txt",
    ".yml",
    ".service",
    ".socket",
    ".timer",
    ".sh",
    "",
}


def texts() -> list[Path]:
    found = [ROOT / name for name in PAGES]
    for folder in FOLDERS:
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in SUFFIXES]
    return [path for path in found if "__pycache__" not in path.parts]


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_does_not_come_back(phrase: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(phrase, line)
    ]
    assert not found, f"write {PHRASES[phrase]}:\n" + "\n".join(found)
