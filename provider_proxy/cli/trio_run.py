"""Runs the tasks of `serve` and `vtpm-helper`, and reports in one error why they ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from provider_proxy.common import log
from provider_proxy.errors import ProviderProxyError, first_of


def run_to_the_end(main: Callable[[], Awaitable[None]]) -> None:
    """Run a nursery of tasks.

    Raises:
        ProviderProxyError: the first of ours that ended it; several at once happen only while stopping.
    """
    try:
        with log.in_background():
            trio.run(main)
    except BaseExceptionGroup as group:
        ours, others = group.split(ProviderProxyError)
        if others is not None or ours is None:
            raise
        raise first_of(ours) from group
