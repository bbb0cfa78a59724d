"""Saves a `StateStore` at an interval, and at the end; for `watch` and `bridge`."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from provider_proxy.errors import HostError
from provider_proxy.tenant.watch.store import StateStore

log = logging.getLogger(__name__)


async def save(store: StateStore, count_failure: Callable[[], object]) -> None:
    """Save what has changed. Raises: HostError where it cannot be written; it stays unsaved."""
    if not store.is_dirty:
        return
    data = store.snapshot()
    try:
        await trio.to_thread.run_sync(store.write, data)
    except HostError:
        store.is_dirty = True
        count_failure()
        raise


async def save_often(
    store: StateStore, interval_s: float, count_failure: Callable[[], object]
) -> None:
    """Save at an interval, for ever."""
    while True:
        await trio.sleep(interval_s)
        try:
            await save(store, count_failure)
        except HostError as exc:
            log.error("cannot save the state: %s", exc)
