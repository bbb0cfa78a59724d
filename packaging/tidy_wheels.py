"""Makes a directory of wheels the same in each build, and merklelib's usable without future-fstrings.

    python packaging/tidy_wheels.py DIRECTORY

A wheel that was built here gets the time of the sources (SOURCE_DATE_EPOCH), an order and modes that
depend on nothing. merklelib's sources name the encoding "future_fstrings", which is UTF-8 whose f-strings
Python 2 can read; the package that brings it runs code at every start of Python. So its wheel is written
again with "utf-8" in the first lines of its files, and without that requirement.
"""

from __future__ import annotations

import base64
import os
import re
import sys
import time
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

BUILT_HERE = ("merklelib", "provider_proxy", "tpm2_pytss")  # the others are as the index has them
CODING = re.compile(rb"\A(#!.*\n)?#.*coding: *future_fstrings.*\n")
REQUIREMENT = re.compile(rb"^Requires-Dist: future[-_.]fstrings.*\n", re.MULTILINE)


def main() -> int:
    """Tidy all wheels of the directory."""
    for path in sorted(Path(sys.argv[1]).glob("*.whl")):
        if path.name.startswith(BUILT_HERE):
            with zipfile.ZipFile(path) as wheel:
                files = {info.filename: wheel.read(info) for info in wheel.infolist()}
            if path.name.startswith("merklelib"):
                files = without_future_fstrings(files)
            write(path, files)
    return 0


def without_future_fstrings(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """merklelib's files in plain UTF-8."""
    changed = {}
    for name, data in files.items():
        if name.endswith(".py"):
            changed[name] = CODING.sub(rb"\1# coding: utf-8\n", data)
        elif name.endswith(".dist-info/METADATA"):
            changed[name] = REQUIREMENT.sub(b"", data)
        else:
            changed[name] = data
    assert changed != files, "merklelib has changed: look again whether it needs this"
    assert not any(b"future_fstrings" in data for data in changed.values())
    return changed


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a wheel whose bytes follow from its files alone; its RECORD is made again."""
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    rest = sorted(name for name in files if name != record and not name.endswith("/"))
    lines = [f"{name},sha256={digest(files[name])},{len(files[name])}\n" for name in rest]
    stamp = time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))[:6]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as wheel:
        for name in [*rest, record]:
            info = zipfile.ZipInfo(name, stamp)
            info.compress_type = zipfile.ZIP_DEFLATED
            program = ".data/scripts/" in name
            info.external_attr = (0o100755 if program else 0o100644) << 16
            data = "".join([*lines, f"{record},,\n"]).encode() if name == record else files[name]
            wheel.writestr(info, data)


def digest(data: bytes) -> str:
    """As RECORD has it."""
    return base64.urlsafe_b64encode(sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main())
