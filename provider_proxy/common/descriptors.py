"""The limit of open files: it is raised to the hard limit, and bounds the number of connections."""

from __future__ import annotations

import os
import resource
from pathlib import Path

UNLIMITED = 1 << 20  # the kernel's own limit, fs.nr_open, where it was not raised
OPEN = Path("/proc/self/fd")


def raise_limit() -> int:
    """Raise the limit of open files as far as allowed; returns the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return UNLIMITED if hard == resource.RLIM_INFINITY else hard


def room(reserve: int) -> int:
    """How many more files can be opened, when some are left for others; 0 at the least.

    Args:
        reserve: of those that are not open yet, how many others will need.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = UNLIMITED if soft == resource.RLIM_INFINITY else soft
    return max(0, limit - len(os.listdir(OPEN)) - reserve)
