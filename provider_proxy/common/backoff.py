"""How long to wait before another try: doubling, bounded, and spread by chance.

The one rule of every retry of this package, so that hosts which failed together do not return together.
"""

from __future__ import annotations

import random

MAX_DOUBLINGS = 16  # bounds the power: past every longest wait that is used here
_chance = random.Random()  # noqa: S311  # spreads waits, keeps no secret


def backoff_s(
    tries: int, *, first_s: float, longest_s: float, rng: random.Random = _chance
) -> float:
    """`first_s`, doubled with each try, times a random share between a half and the whole.

    Args:
        tries: how many have failed, from 1.
        longest_s: no wait is longer, in seconds.
    """
    longest: float = min(longest_s, first_s * 2.0 ** min(tries - 1, MAX_DOUBLINGS))
    return longest * rng.uniform(0.5, 1.0)
