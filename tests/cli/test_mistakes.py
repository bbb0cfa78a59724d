"""What the programs say to mistakes that are made for real is what docs/mistakes.md has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from places import DOCS, ROOT

pytestmark = pytest.mark.real
LIMIT_S = 300.0


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_the_page_is_what_the_programs_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/mistakes_page.py")],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (DOCS / "mistakes.md").read_text(encoding="utf-8"), "make docs"
