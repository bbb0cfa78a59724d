"""Where things stand in this checkout, for tests in any folder."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = ROOT / "provider_proxy"
DOCS = ROOT / "docs"
VECTORS = TESTS / "vectors"
SYSTEM = TESTS / "system"
HOOKS = PACKAGE / "host/vtpm/hooks"
PACKAGING = ROOT / "packaging"
SYSTEMD = ROOT / "systemd"
