"""What other people's programs read does not change by the way: see tests/support/interfaces.py."""

from __future__ import annotations

import difflib

import interfaces
from places import ROOT

RECORD = ROOT / "tests" / "repository" / "interfaces.txt"


def test_what_programs_read_is_what_was_recorded() -> None:
    recorded = RECORD.read_text(encoding="utf-8").splitlines()
    now = list(interfaces.lines())
    assert len(now) > 1000
    diff = list(difflib.unified_diff(recorded, now, "recorded", "now", lineterm="", n=0))
    assert not diff, "see tests/support/interfaces.py:\n" + "\n".join(diff)
