"""The number of skipped tests is bounded; a program that only some tests need may be missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
from places import ROOT

TESTS = ROOT / "tests"
SKIPPING = """
import pytest

@pytest.mark.parametrize("reason", {reasons})
def test_skips(reason):
    pytest.skip(reason)
"""


@pytest.mark.parametrize(
    ("reasons", "code", "words"),
    [
        (["no corpus"], 0, "skipped tests: 1 of at most 1: within the bound"),
        (["no corpus"] * 2, 1, "skipped tests: 2 of at most 1: too many"),
        (["swtpm is not installed", "a"], 1, "skipped tests: 2 of at most 1: too many"),
        (
            ["no corpus", "zsh is not installed", *["chromium is not installed"] * 2],
            0,
            "because these are not installed: chromium (2), zsh (1)",
        ),
    ],
)
def test_too_many_skipped_tests_fail_the_run(
    tmp_path: Path, reasons: list[str], code: int, words: str
) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPING.format(reasons=reasons))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest"]
    done = subprocess.run(
        [*command, "--max-skipped", "1", "test_it.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, words in done.stdout) == (code, True), done.stdout + done.stderr


def test_reasons_name_the_optional_programs_as_the_bound_does() -> None:
    """A reason in other words would count."""
    said = {
        name
        for path in TESTS.rglob("*.py")
        if path.name != Path(__file__).name
        for name in re.findall(r'"(\w+) is not installed"', path.read_text(encoding="utf-8"))
    }
    assert said - set(conftest.OPTIONAL) == {"swtpm", "openssl"}
