"""The state of a quoter's chip as one value: whether it works now, and the cost of a quote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipState:
    """A quoter's chip at one moment.

    Attributes:
        trouble: why the chip cannot quote now; None while it can.
        expected_s: the learnt time of a quote, in seconds.
        pause_s: the rest after a quote, which keeps the duty, in seconds.
        duty: share of the last 10 s in which the chip worked for the proxy.
        max_duty: the cap of the duty.
        in_flight_s: how long the running command has taken so far, in seconds; 0 without one.
    """

    expected_s: float
    pause_s: float
    duty: float = 0.0
    max_duty: float = 1.0
    trouble: str | None = None
    in_flight_s: float = 0.0

    @property
    def turn_s(self) -> float:
        """From the start of one quote to the start of the next, in seconds."""
        return self.expected_s + self.pause_s


ReadState = Callable[[], ChipState]
"""Gives the chip's state as it is now."""
