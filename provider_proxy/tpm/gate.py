"""The one gate to the chip: one command at a time, in a thread, and never more than its duty.

A TPM is shared with the kernel's IMA, which blocks exec() and open() on the host while it waits. So
after a command of `t` seconds the gate rests `t * (1/max_duty - 1)`: over any stretch of time all
our commands together take at most `max_duty` of the chip, plus one command.

A caller that is cancelled returns at once; the command goes on in its thread, and the gate stays
shut until it is done (a TPM cannot be interrupted).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")

EWMA_WEIGHT = 0.2  # a chip's time varies by percents (TPMScan: p99/p50 = 1.02), so few samples do
DUTY_SPAN_S = 10.0  # over which the duty holds
HANG_FACTOR = 20  # a command of so many times the learnt time hangs; a chip's p99/p50 is 1.02
HANG_LEAST_S = 5.0  # but no sooner: an RSA key that is made by others takes seconds
LARGEST_SURPRISE = 3  # one hang must not make all estimates worthless; a slower chip is soon learnt
FIRST_GUESS_S = 0.25  # the median RSA signature of 139 chips, until our own is measured


class Gate:
    """Serialises the chip's commands.

    Args:
        max_duty: share of time that our commands may take, above 0 and at most 1.

    Attributes:
        expected_s: learnt time of a learning command (a quote), in seconds.
        in_flight_since: `time.monotonic()` when the running command began; None while idle.
    """

    def __init__(self, max_duty: float) -> None:
        self._rest_factor = 1 / max_duty - 1
        self._longest_rest = DUTY_SPAN_S * (1 - max_duty)
        self._limiter = trio.CapacityLimiter(1)
        self._turn = trio.Lock()
        self._rest_until = 0.0
        self._learnt = False
        self.expected_s = FIRST_GUESS_S
        self.in_flight_since: float | None = None

    @property
    def pause_s(self) -> float:
        """The rest that follows a command of the learnt time."""
        return self.expected_s * self._rest_factor

    @property
    def hang_s(self) -> float:
        """A command that runs for longer hangs, in seconds."""
        return max(HANG_LEAST_S, HANG_FACTOR * self.expected_s)

    def _rest_after(self, seconds: float) -> float:
        """The rest that a command's time asks for.

        After one that hung the chip is not left alone for as long again: only as long as the duty,
        plus that command, still needs within its span.
        """
        if seconds > self.hang_s:
            return max(self.pause_s, self._longest_rest - seconds)
        return min(seconds * self._rest_factor, self._longest_rest)

    async def ready(self) -> None:
        """Return when the chip is free and its duty allows a command."""
        while True:
            rest = self._rest_until - time.monotonic()
            if self._limiter.available_tokens < 1:
                async with self._limiter:  # wait our turn
                    pass
            elif rest > 0:
                await trio.sleep(rest)
            else:
                await trio.lowlevel.checkpoint()
                return

    async def run(self, command: Callable[[], T], *, learn: bool = False) -> T:
        """Run a blocking command on the chip when it is free and rested.

        Args:
            learn: the command is a quote; its time is learnt.

        Raises:
            What `command` raises; `trio.Cancelled` at once, while the command may still run.
        """

        def timed() -> T:
            begin = time.monotonic()
            self.in_flight_since = begin
            try:
                result = command()
                if learn:
                    self._learn(time.monotonic() - begin)
                return result
            finally:
                now = time.monotonic()
                self._rest_until = now + self._rest_after(now - begin)
                self.in_flight_since = None

        async with self._turn:  # who waits for the rest keeps the others from slipping in after it
            await self.ready()
            return await trio.to_thread.run_sync(
                timed, limiter=self._limiter, abandon_on_cancel=True
            )

    def _learn(self, seconds: float) -> None:
        if not self._learnt:
            self.expected_s = seconds
        seconds = min(seconds, LARGEST_SURPRISE * self.expected_s)
        self.expected_s += EWMA_WEIGHT * (seconds - self.expected_s)
        self._learnt = True

    async def close(self) -> None:
        """Take the gate for good, after the command in flight: then the context may be closed."""
        await self._limiter.acquire_on_behalf_of(self)
