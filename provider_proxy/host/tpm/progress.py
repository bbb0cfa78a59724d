"""What is being asked of the chip just now, and for how long: so that no wait is silent or endless.

Each step on the chip is announced where its errors are translated (`chip.tss_errors`). Whoever started
the work looks on from another thread: it says what is waited for, and gives up on a step that takes
longer than the limit. A TPM cannot be interrupted: the thread that hangs is left behind.
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

SAY_AFTER_S = 5.0  # a command of a chip that is well takes a second; a new RSA key up to a minute
SAY_AGAIN_S = 15.0
POLL_S = 0.2


class Progress:
    """The step that runs, written by the thread that works and read by the one that waits."""

    def __init__(self) -> None:
        self._step: tuple[str, float] = ("opening the TPM", time.monotonic())
        self._said_at = 0.0

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """While it lasts, this is what is being done; the step around it begins anew afterwards."""
        around = self._step[0]
        self._step = (doing, time.monotonic())
        try:
            yield
        finally:
            self._step = (around, time.monotonic())

    def check(self, limit_s: float) -> None:
        """Say what is waited for where that takes long.

        Raises:
            HostError: the step has taken longer than the limit.
        """
        doing, since = self._step
        now = time.monotonic()
        if now - since > limit_s:
            raise HostError(
                f"gave up after {limit_s:g} s (tpm.hang_limit_s) of waiting for the TPM: {doing}. Other "
                "programs may hold it; where a reset of the host does not help, it is out of order"
            )
        is_first = self._said_at < since
        if now > (since + SAY_AFTER_S if is_first else self._said_at + SAY_AGAIN_S):
            self._said_at = now
            log.warning("waiting for the TPM for %.0f s: %s", now - since, doing)


_current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("progress", default=None)


def current() -> Progress | None:
    """The progress that steps are announced to; None where nobody looks on."""
    return _current.get()


@contextlib.contextmanager
def announced(doing: str) -> Iterator[None]:
    """A step on the chip, for whoever looks on."""
    progress = _current.get()
    if progress is None:
        yield
        return
    with progress.during(doing):
        yield


@contextlib.contextmanager
def looked_on() -> Iterator[Progress]:
    """From here on, in this task or thread and in those it starts, steps are announced to this."""
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
            except BaseException as exc:  # noqa: BLE001  # raised again where it is waited for
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
