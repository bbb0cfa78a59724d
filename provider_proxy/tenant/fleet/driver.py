"""Checks that PostgreSQL's driver is available: psycopg is an extra, and libpq is not part of Python."""

from __future__ import annotations

import importlib
from types import ModuleType

from provider_proxy.errors import HostError


def import_with_libpq(name: str) -> ModuleType:
    """Import a module that needs psycopg.

    Raises:
        ModuleNotFoundError: psycopg is not installed.
        HostError: PostgreSQL's own library is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise
    except ImportError as exc:
        raise HostError(
            "PostgreSQL's client library cannot be loaded; install it (libpq5 on Debian)"
        ) from exc
