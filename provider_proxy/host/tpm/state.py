"""What a quoter tells of its chip, as one value: how it does now, and what a quote costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipState:
    """A quoter's chip at one moment.

    Attributes:
        trouble: why the chip gives no quote now; None while it does.
        expected_s: the learnt time of a quote, in seconds.
        pause_s: the rest after a quote, which keeps the duty, in seconds.
        duty: share of the last 10 s in which the chip worked for us.
        max_duty: the cap of the duty.
        in_flight_s: for how long the present command has been running, in seconds; 0 while none is.
    """

    expected_s: float
    pause_s: float
    duty: float = 0.0
    max_duty: float = 1.0
    trouble: str | None = None
    in_flight_s: float = 0.0

    @property
    def turn_s(self) -> float:
        """From the begin of one quote to the begin of the next, in seconds."""
        return self.expected_s + self.pause_s


ReadState = Callable[[], ChipState]
"""Gives the chip's state as it is now."""
