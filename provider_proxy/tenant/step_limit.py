"""Bounds each step of judging a log: an exclude may never end on a name that a host has chosen.

Python's regular expressions backtrack: `(a+)+$` takes twice as long for each further letter. Only a
signal interrupts a match; the engine checks for signals from time to time. So each step runs under a
timer of this process' CPU time, if possible: in the main thread of a program that does not use
SIGVTALRM. The watcher and the commands are such programs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

from provider_proxy.errors import LogError

STEP_LIMIT_S = 2.0  # of CPU time; a step of a hundred lines takes 1 ms

T = TypeVar("T")


def bounded(steps: Iterator[T], limit_s: float = STEP_LIMIT_S) -> Iterator[T]:
    """The same steps, each within its limit.

    Raises:
        LogError: raised inside the step that takes longer, so that it can clean up.
    """
    while True:
        try:
            yield _next(steps, limit_s)
        except StopIteration:
            return


def _next(steps: Iterator[T], limit_s: float) -> T:
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL
    ):
        return next(steps)
    signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        return next(steps)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise LogError(
        "the runtime policy's excludes take too long on a name in the IMA list: rewrite those that "
        "repeat a repetition, as (a+)+ does"
    )
