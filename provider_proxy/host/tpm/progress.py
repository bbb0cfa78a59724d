"""Which step runs on the chip now, and since when, so that no wait is silent or endless.

Each step on the chip is announced where its errors are translated (`chip.tss_errors`). The caller
watches from another thread: it logs the step that it waits for, and gives up on a step that takes longer
than the limit. A TPM cannot be interrupted, so a thread that hangs is left behind.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from provider_proxy.errors import HostError

T = TypeVar("T")

log = logging.getLogger(__name__)

SAY_AFTER_S = 5.0  # a command of a healthy chip takes a second; a new RSA key up to a minute
SAY_AGAIN_S = 15.0
POLL_S = 0.2


class Progress:
    """The running step, written by the working thread and read by the waiting one."""

    def __init__(self) -> None:
        self._step: tuple[str, float] = ("opening the TPM", time.monotonic())
        self._said_at = 0.0

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Set the running step inside the block; afterwards the outer step starts again from zero."""
        around = self._step[0]
        self._step = (doing, time.monotonic())
        try:
            yield
        finally:
            self._step = (around, time.monotonic())

    def check(self, limit_s: float) -> None:
        """Log the running step if it takes long.

        Raises:
            HostError: the step has taken longer than the limit.
        """
        doing, since = self._step
        now = time.monotonic()
        if now - since > limit_s:
            raise HostError(
                f"gave up waiting for the TPM after {limit_s:g} s (tpm.hang_limit_s): {doing}. Other "
                "programs may be using it. If a reset of the host does not help, the TPM is defective"
            )
        is_first = self._said_at < since
        if now > (since + SAY_AFTER_S if is_first else self._said_at + SAY_AGAIN_S):
            self._said_at = now
            log.warning("waiting for the TPM for %.0f s: %s", now - since, doing)


_current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("progress", default=None)


def current() -> Progress | None:
    """The progress to which steps are announced; None if none is watched."""
    return _current.get()


@contextlib.contextmanager
def announced(doing: str) -> Iterator[None]:
    """Announce a step on the chip to the current progress."""
    progress = _current.get()
    if progress is None:
        yield
        return
    with progress.during(doing):
        yield


@contextlib.contextmanager
def looked_on() -> Iterator[Progress]:
    """Inside the block, steps of this task or thread, and of those it starts, are announced to this."""
    progress = Progress()
    token = _current.set(progress)
    try:
        yield progress
    finally:
        _current.reset(token)


def run_within(work: Callable[[], T], limit_s: float) -> T:
    """Run blocking work on the chip, for a command without an event loop.

    Args:
        limit_s: for each of its steps.

    Raises:
        HostError: a step took longer; its thread is left behind.
        What `work` raises.
    """
    with looked_on() as progress:
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as exc:  # noqa: BLE001  # raised again in the waiting thread
                errors.append(exc)
            finally:
                done.set()

        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(run,), daemon=True).start()
        while not done.wait(POLL_S):
            progress.check(limit_s)
    if errors:
        raise errors[0]
    return results[0]
