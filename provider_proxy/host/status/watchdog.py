"""Ends the process when a TPM command hangs, and tells systemd's watchdog that event loop and chip work.

A thread that waits in a TPM driver cannot be ended, but the process can, and systemd starts it again.
Only a command in flight counts, not a chip that answers with errors or is not used. systemd gets no
message while a command hangs, or while trio's loop does not run this task.
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
    """End at once: an orderly end would wait for the thread that hangs. The log says why."""
    write_last_lines()
    os._exit(EXIT_ENVIRONMENT)


async def run(
    chip: ReadState, hang_limit_s: float, *, end_process: Callable[[], None] = _end_process
) -> None:
    """Watch until cancelled.

    Args:
        hang_limit_s: a command that runs longer is taken to hang.
        end_process: called then.
    """
    wanted_s = systemd.watchdog_s()
    interval = min(CHECK_S, wanted_s / 2)
    while True:
        if chip().in_flight_s > hang_limit_s:
            log.critical(
                "a TPM command has not returned for over %g s; ending the process", hang_limit_s
            )
            end_process()
        elif wanted_s < math.inf:
            systemd.notify("WATCHDOG=1", limit_s=0)
        await trio.sleep(interval)
