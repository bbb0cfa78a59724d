"""Where things stand in this checkout, for tests in any folder."""

from __future__ import annotations

import os
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


def find_corpus() -> Path | None:
    """Material that others made: `$PROVIDER_PROXY_CORPUS`, or `shared/corpus` beside the checkout.

    None where it is missing; it does not belong to the checkout.
    """
    named = os.environ.get("PROVIDER_PROXY_CORPUS")
    candidates = [Path(named)] if named else [up / "shared/corpus" for up in ROOT.parents]
    return next((path for path in candidates if path.is_dir()), None)


NO_CORPUS = "no corpus: PROVIDER_PROXY_CORPUS names none, and none lies beside the checkout"
