"""The line that `systemctl status` shows: the last batch, and how many requests wait.

A task looks once a second and sends the line only if it has changed, so that systemd reads at most one
datagram a second, however many batches there are. It decides nothing: see `watchdog` for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from provider_proxy.common import systemd
from provider_proxy.host.status.recent import OK, PastBatch
from provider_proxy.host.tpm.state import ReadState

TELL_EVERY_S = 1.0
MAX_TROUBLE_CHARS = 200  # of the TPM's error; the status is one line
OPENING = "opening the TPM and its keys"


class Past(Protocol):
    """The finished batches."""

    @property
    def last(self) -> PastBatch | None:
        """The newest batch; None before the first."""
        ...


def status_line(last: PastBatch | None, waiting: int, trouble: str | None) -> str:
    """One line: the chip's trouble, or else the last batch; and how many requests wait."""
    if trouble is not None:
        what = "no quotes: " + " ".join(trouble.split())[:MAX_TROUBLE_CHARS]
    elif last is None:
        what = "no batch yet"
    else:
        leaves = "1 leaf" if last.leaves == 1 else f"{last.leaves} leaves"
        done = f"in {last.quote_ms:.0f} ms" if last.outcome == OK else f"refused, {last.outcome}"
        what = f"batch {last.number}: {leaves} {done}"
    return f"{what}; {waiting} waiting"


async def run(past: Past, chip: ReadState, waiting: Callable[[], int]) -> None:
    """Send the line until cancelled.

    Args:
        waiting: how many requests wait for a batch.
    """
    told = ""
    while True:
        line = status_line(past.last, waiting(), chip().trouble)
        if line != told:
            systemd.notify_status(line)
            told = line
        await trio.sleep(TELL_EVERY_S)
