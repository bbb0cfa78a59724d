"""Tells systemd that a watcher is ready and healthy: sd_notify(3). Without systemd it does nothing.

A watcher that hangs, or whose directory of EKs has files that are no longer proven, is not healthy:
systemd's watchdog then ends it, and removes the runtime directory with everything in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from provider_proxy.common import systemd

BEAT_S = 1.0


async def beat(is_well: Callable[[], bool] = lambda: True) -> None:
    """Send READY=1, then WATCHDOG=1 at systemd's interval, until cancelled."""
    systemd.notify("READY=1")
    wanted_s = systemd.watchdog_s()
    try:
        while wanted_s < math.inf:
            if is_well():
                systemd.notify("WATCHDOG=1", limit_s=0)
            await trio.sleep(min(BEAT_S, wanted_s / 2))
        await trio.sleep_forever()
    finally:
        systemd.notify("STOPPING=1", limit_s=0)
