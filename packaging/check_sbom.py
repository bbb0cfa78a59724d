"""Compares a list of components with the lock that they were installed from.

    python packaging/check_sbom.py SBOM LOCK

Every package that the lock names for this system is in it, in that version, and nothing else but this
program. Needs `packaging`, which build/tools has.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

PIN = re.compile(r"^[A-Za-z0-9][^\\\n]*==[^\\\n]*", re.MULTILINE)
PROGRAM = "provider-proxy"


def main() -> int:
    """Compare; an AssertionError says what differs."""
    sbom = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {(normal(each["name"]), each["version"]) for each in sbom["components"]}
    found = {each for each in found if each[0] != PROGRAM}
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["name"] == PROGRAM
    wanted = pins(Path(sys.argv[2]).read_text(encoding="utf-8"))
    assert found == wanted, sorted(found ^ wanted)
    return 0


def pins(lock: str) -> set[tuple[str, str]]:
    """A lock's packages and versions, those of other systems left out."""
    requirements = map(Requirement, PIN.findall(lock))
    return {
        (normal(each.name), str(each.specifier).removeprefix("=="))
        for each in requirements
        if each.marker is None or each.marker.evaluate()
    }


def normal(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
