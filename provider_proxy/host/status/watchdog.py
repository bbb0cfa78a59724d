"""Ends the process where a TPM command hangs, and tells systemd's watchdog that loop and chip live.

A thread that waits in a TPM driver cannot be ended; the process can, and systemd starts it again. A chip
that answers errors, or is not asked at all, is no reason: only a command in flight counts. systemd
hears nothing while one hangs, nor while trio's loop does not come round to this task.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable

import trio

from provider_proxy.common import systemd
from provider_proxy.common.log import write_last_lines
from provider_proxy.host.tpm.state import ReadState

log = logging.getLogger(__name__)

CHECK_S = 1.0
EXIT_ENVIRONMENT = 3


def _end_process() -> None:
    """At once: an orderly end would wait for the thread that hangs. But the log says why."""
    write_last_lines()
    os._exit(EXIT_ENVIRONMENT)


async def run(
    chip: ReadState, hang_limit_s: float, *, end_process: Callable[[], None] = _end_process
) -> None:
    """Watch until cancelled.

    Args:
        hang_limit_s: a command that runs for longer hangs.
        end_process: what then happens.
    """
    wanted_s = systemd.watchdog_s()
    interval = min(CHECK_S, wanted_s / 2)
    while True:
        if chip().in_flight_s > hang_limit_s:
            log.critical("a TPM command has been in flight for over %g s; ending", hang_limit_s)
            end_process()
        elif wanted_s < math.inf:
            systemd.notify("WATCHDOG=1", limit_s=0)
        await trio.sleep(interval)
