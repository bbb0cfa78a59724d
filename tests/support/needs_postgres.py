"""Marks tests that need a PostgreSQL server."""

from __future__ import annotations

import pytest

from provider_proxy.testing.postgres import find_bin

needs_postgres = pytest.mark.skipif(find_bin() is None, reason="PostgreSQL is not installed")
