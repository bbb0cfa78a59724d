"""An update of the kernel, recorded on a guest that was really booted: no false alarm, and no hole."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from typing import Any

from helpers import run_here
from places import SYSTEM, TESTS

sys.path.insert(0, str(SYSTEM / "kvm"))

import kernel_update  # of `make test-kvm`, which makes the record

RECORD = TESTS / "vectors/kernel_update.tar.xz"


def run(folder: Path, *words: str) -> tuple[int, str]:
    done = run_here("--log-level", "warning", *words, cwd=folder)
    return done.returncode, done.stderr


def test_an_update_of_the_kernel_without_a_false_alarm(tmp_path: Path) -> None:
    """Each kernel's policies refuse the other; both together take both, each booted twice."""
    with tarfile.open(RECORD) as record:
        # Debian 12's Python 3.11.2 does not know filters; the record is this repository's own.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        record.extractall(tmp_path, **safe)
    kernel_update.judge(tmp_path, run)
