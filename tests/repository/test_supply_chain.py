"""Whatever is installed is pinned by hash, and two builds give the same bytes."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import PACKAGING, ROOT, SYSTEM

LOCKS = sorted(
    [*(PACKAGING / "locks").glob("*.txt"), *(SYSTEM / "keylime").glob("*requirements.txt")]
)
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+)(?: ; .*)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}(?: \\)?$")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LIMIT_S = 120
BUILD_TOOLS = PACKAGING / "locks/build.txt"
# What is installed was installed by the locks; in an environment of other making these tests say nothing.
by_make = pytest.mark.skipif(
    not (Path(sys.prefix) / ".dev").exists(), reason="this environment is not `make install`'s"
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    found = (PIN.match(line) for line in path.read_text().splitlines())
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_versions_and_hashes_and_no_addresses(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "# Written by `make lock`."
    for before, line in itertools.pairwise(lines):
        if PIN.match(before):
            assert HASH.match(line), line
    for line in lines[1:]:
        assert line.startswith("#") or PIN.match(line) or HASH.match(line), line
        assert "://" not in line


def test_locks_agree_with_each_other() -> None:
    dev = pins(PACKAGING / "locks/dev.txt")
    for name in ("tenant", "host", "build"):
        for package, version in pins(PACKAGING / f"locks/{name}.txt").items():
            assert dev.get(package, version) == version, (name, package)


def test_every_dependency_is_locked() -> None:
    """So that a person who adds one runs `make lock`."""
    extras: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    wanted = {"tenant": PROJECT["project"]["dependencies"], "host": extras["host"]}
    wanted["dev"] = [each for extra in extras.values() for each in extra]
    for name, requirements in wanted.items():
        locked = pins(PACKAGING / f"locks/{name}.txt")
        for requirement in requirements:
            package = normal(re.split(r"[\[<>=!~; ]", requirement)[0])
            assert package == "provider-proxy" or package in locked, (name, package)


def test_what_runs_at_every_start_of_python_is_not_locked() -> None:
    for path in LOCKS:
        assert "future-fstrings" not in pins(path)


@by_make
def test_what_runs_at_every_start_of_python_is_not_installed() -> None:
    names = {normal(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    assert "merklelib" in names
    assert "future-fstrings" not in names


@by_make
def test_merklelib_is_imported_without_its_encoding_and_leaves_none_behind() -> None:
    code = (
        "import codecs\n"
        "from provider_proxy.host.batching.merkle import build_tree\n"
        "assert build_tree([b'a', b'b', b'c']).size == 3\n"
        "try:\n    codecs.lookup('future_fstrings')\nexcept LookupError:\n    print('gone')\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert done.stdout == "gone\n"


def test_build_requirements_are_pinned() -> None:
    build = pins(BUILD_TOOLS)
    for requirement in PROJECT["build-system"]["requires"]:
        package, _, version = requirement.partition("==")
        assert build[package] == version


def wheel_of(source: Path, out: Path) -> bytes:
    """Our wheel as packaging/wheels.sh makes it."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1790000000"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    commands: tuple[list[str | Path], ...] = (
        [*pip, "--no-index", "--no-build-isolation", "-w", out, source],
        [sys.executable, PACKAGING / "tidy_wheels.py", out],
    )
    for command in commands:
        subprocess.run(command, env=environment, timeout=LIMIT_S, check=True)
    (path,) = out.glob("provider_proxy-*.whl")
    return path.read_bytes()


@by_make
@pytest.mark.real
def test_two_builds_have_the_same_bytes(tmp_path: Path) -> None:
    """In another folder, at another time, with other modes and another umask."""
    wheels = []
    for name, mask in (("one", 0o022), ("the other", 0o077)):
        source = tmp_path / name / "source"
        before = os.umask(mask)
        try:
            shutil.copytree(
                ROOT / "provider_proxy",
                source / "provider_proxy",
                ignore=shutil.ignore_patterns("__pycache__"),
                copy_function=shutil.copyfile if mask == 0o077 else shutil.copy2,
            )
            for file in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / file, source)
            wheels.append(wheel_of(source, tmp_path / name / "wheels"))
        finally:
            os.umask(before)
    assert wheels[0] == wheels[1]
