"""This program's version, as it was installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def program_version() -> str:
    """The version; "unknown" where it runs from sources that were never installed."""
    try:
        return version("provider-proxy")
    except PackageNotFoundError:
        return "unknown"
