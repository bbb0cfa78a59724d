"""The gate to the chip: one command at a time, in a thread, within the duty (the allowed share of time).

The kernel's IMA uses the same TPM and blocks exec() and open() on the host while it waits. So after a
command of `t` seconds the gate rests (sends no command) for `t * (1/max_duty - 1)`: over any period all
our commands together take at most `max_duty` of the chip's time, plus one command.

A low-priority command (activating a credential) gives way: after one, the next waits until a quote has
been served or none was wanted. So a batch waits for at most one of them, however many registrars there
are; and they are not starved, because one may run between two quotes.

A caller that is cancelled returns at once; the command continues in its thread, and the gate stays closed
until it has ended, because a TPM cannot be interrupted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import trio

from provider_proxy.host.tpm.pace import Pace

T = TypeVar("T")

GIVE_WAY_S = 0.1  # from a free chip to a sealed batch's quote: a tree of 1,024 leaves takes 30 ms


class Gate:
    """Serialises the chip's commands.

    Args:
        max_duty: share of time that our commands may take, > 0 and <= 1.
        ima_wait_s: limit of IMA's mean wait for our commands; None for no limit.

    Attributes:
        pace: the time of a quote, and the rest after it.
        in_flight_since: `time.monotonic()` when the running command began; None while idle.
    """

    def __init__(self, max_duty: float, ima_wait_s: float | None = None) -> None:
        self.pace = Pace(max_duty, ima_wait_s)
        self._limiter = trio.CapacityLimiter(1)
        self._turn = trio.Lock()
        self._low_turn = trio.Lock()
        self._low_was_last = False
        self._another_ran = trio.Event()
        self._rest_until = 0.0
        self.in_flight_since: float | None = None

    @property
    def duty(self) -> float:
        """Share of the last 10 s in which commands ran, the running one included."""
        return self.pace.duty(time.monotonic(), self.in_flight_since)

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

    async def run(
        self, command: Callable[[], T], *, learn: bool = False, gives_way: bool = False
    ) -> T:
        """Run a blocking command on the chip when it is free and rested.

        Args:
            learn: the command is a quote; its time is learnt.
            gives_way: it has low priority, see above.

        Raises:
            What `command` raises; `trio.Cancelled` at once, while the command may still run.
        """

        def timed() -> T:
            begin = time.monotonic()
            self.in_flight_since = begin
            try:
                result = command()
                if learn:
                    self.pace.learn(time.monotonic() - begin)
                return result
            finally:
                now = time.monotonic()
                self._rest_until = now + self.pace.rest_after(now - begin)
                self.pace.worked(begin, now)
                self.in_flight_since = None

        async with contextlib.AsyncExitStack() as stack:
            if gives_way:
                await stack.enter_async_context(self._low_turn)
                await self._give_way()
            # Waiting for the end of the rest while holding the gate keeps other commands out.
            await stack.enter_async_context(self._turn)
            await self.ready()
            self._low_was_last = gives_way
            if gives_way:
                self._another_ran = trio.Event()
            else:
                self._another_ran.set()
            return await trio.to_thread.run_sync(
                timed, limiter=self._limiter, abandon_on_cancel=True
            )

    async def _give_way(self) -> None:
        """After a low-priority command, return when another has run or none is waiting."""
        while self._low_was_last:
            await self.ready()
            with trio.move_on_after(GIVE_WAY_S):
                await self._another_ran.wait()
            if self._is_idle:
                return

    @property
    def _is_idle(self) -> bool:
        return (
            self._limiter.available_tokens > 0
            and not self._turn.locked()
            and time.monotonic() >= self._rest_until
        )

    async def close(self) -> None:
        """Close the gate for ever after the running command; then the context may be closed."""
        await self._limiter.acquire_on_behalf_of(self)
