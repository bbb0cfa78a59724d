"""Predicts how long the kernel's IMA waits for a chip that also quotes.

IMA measures a new or changed file before it runs: it extends a PCR, stops the program until the TPM
has done so, and sends one extend at a time. A TPM cannot be interrupted, so an extend that comes during
a quote waits until it ends: on average duty x quote / 2, at worst a whole quote, whatever the
duty. Pure.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

EXEC_S = 0.001  # fork and exec of a small program by a shell, without IMA
EXTENDS = 20_000  # 200 of them are beyond the 99th percentile
SHELL_EXECS = 5_000
WITHOUT_END_MS = 60_000.0  # a queue of extends this long grows without end


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaWait:
    """How long IMA waits.

    Attributes:
        mean_ms, p99_ms: from a program's start until its file is measured, where programs start at any
            moment; infinite where more of them start than the chip has time for.
        execs_per_s: programs a second of one shell that waits for each before it starts the next.
    """

    mean_ms: float
    p99_ms: float
    execs_per_s: float


NO_IMA = ImaWait(mean_ms=0.0, p99_ms=0.0, execs_per_s=1 / EXEC_S)
"""A host that measures nothing."""


def predict_ima(
    begins: Sequence[float],
    quote_s: float,
    rest_s: float,
    *,
    extend_s: float,
    extends_per_s: float,
    dice: random.Random,
) -> ImaWait:
    """Simulate extends beside quotes.

    Args:
        begins: the start of each quote, in seconds, ascending; repeated as often as needed.
        quote_s: the chip's time for all commands of a quote.
        rest_s: the least rest between two quotes.
        extend_s: the chip's time for an extend.
        extends_per_s: average number a second; they come at random.
    """
    waits: list[float] = []
    came, free = 0.0, 0.0
    chip = _Chip(begins, quote_s, rest_s)
    for _ in range(EXTENDS if extends_per_s > 0 else 0):
        came += dice.expovariate(extends_per_s)
        free = chip.extend(max(came, free), extend_s)
        waits.append((free - came) * 1000)
        if waits[-1] > WITHOUT_END_MS:
            waits = [math.inf]
            break
    shell = _Chip(begins, quote_s, rest_s)
    end = 0.0
    for _ in range(SHELL_EXECS):
        end = shell.extend(end + EXEC_S, extend_s)
    waits.sort()
    return ImaWait(
        mean_ms=statistics.fmean(waits) if waits else 0.0,
        p99_ms=waits[int(len(waits) * 0.99)] if waits else 0.0,
        execs_per_s=SHELL_EXECS / end,
    )


class _Chip:
    """A chip that quotes by plan and serves extends in between, in the order of arrival."""

    def __init__(self, begins: Sequence[float], quote_s: float, rest_s: float) -> None:
        self._quote_s = quote_s
        self._rest_s = rest_s
        self._begins = _repeated(begins)
        self._next = next(self._begins, None)
        self._free = 0.0
        self._rested = 0.0

    def extend(self, asked: float, seconds: float) -> float:
        """Serve an extend requested at this time (never decreasing); returns when it is done."""
        while self._next is not None and (begin := max(self._next, self._rested)) <= asked:
            self._free = max(self._free, begin) + self._quote_s
            self._rested = self._free + self._rest_s
            self._next = next(self._begins, None)
        self._free = max(self._free, asked) + seconds
        return self._free


def _repeated(begins: Sequence[float]) -> Iterator[float]:
    """The same quotes again and again."""
    if not begins:
        return
    span = begins[-1] - begins[0]
    span += span / max(1, len(begins) - 1) or 1.0
    for turn in itertools.count():
        for begin in begins:
            yield begin - begins[0] + turn * span
