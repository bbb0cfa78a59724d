"""The modules of the package, and what importing one brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import provider_proxy

ROOT = Path(provider_proxy.__file__).parent


def dotted(path: Path) -> str:
    """ "evidence.wire"; "host.tpm" for its __init__.py; "" for the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(ROOT.rglob("*.py"))}
NAMED = [name for name in MODULES if name]
PROBE = """
import importlib, json, sys
before = set(sys.modules)
importlib.import_module(sys.argv[1])
after = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(after - set(sys.stdlib_module_names))))
"""

# What `cryptography` itself is made of.
CRYPTOGRAPHY = {"cryptography", "_cffi_backend", "cffi", "_openssl"}


def brought_by(module: str) -> set[str]:
    """Top-level packages, not the standard library's, that a fresh interpreter loads for a module."""
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, module], capture_output=True, text=True, check=True
    )
    names: list[str] = json.loads(probe.stdout)
    return set(names)
