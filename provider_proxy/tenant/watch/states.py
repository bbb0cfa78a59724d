"""The states of a watched host, as a table: which event leads from which state to which.

The names GET_PROVIDER_QUOTE and GET_PROVIDER_QUOTE_RETRY follow Keylime's GET_QUOTE and GET_QUOTE_RETRY.
This module does not ask, wait or read a clock: `host` does, and passes the events. A pair of state and
event that is not in the table is a bug.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass

from provider_proxy.common.backoff import backoff_s

RETRY_AFTER_SPREAD = 0.25  # hosts that were refused together must not come back together


class State(enum.StrEnum):
    """The state of a host."""

    START = "START"
    GET_PROVIDER_QUOTE = "GET_PROVIDER_QUOTE"
    GET_PROVIDER_QUOTE_RETRY = "GET_PROVIDER_QUOTE_RETRY"
    TRUSTED = "TRUSTED"
    INVALID_QUOTE = "INVALID_QUOTE"
    FAILED = "FAILED"


class Event(enum.Enum):
    """What happened to a host.

    DUE: it is time to ask it. GOOD: evidence verified, and its policy accepts. REFUSED: a
    `VerificationError`. UNANSWERED: no evidence came. BROKEN: this program cannot judge.
    """

    DUE = enum.auto()
    GOOD = enum.auto()
    REFUSED = enum.auto()
    UNANSWERED = enum.auto()
    BROKEN = enum.auto()


"""The states that a round ends with; they are what is reported."""

_ASKING: Mapping[Event, State] = {
    Event.GOOD: State.TRUSTED,
    Event.REFUSED: State.INVALID_QUOTE,
    Event.UNANSWERED: State.GET_PROVIDER_QUOTE_RETRY,  # FAILED if no retry is left
    Event.BROKEN: State.FAILED,
}
_RESTING: Mapping[Event, State] = {Event.DUE: State.GET_PROVIDER_QUOTE}

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.START: _RESTING,
    State.GET_PROVIDER_QUOTE: _ASKING,
    State.GET_PROVIDER_QUOTE_RETRY: _ASKING,
    State.TRUSTED: _RESTING,
    State.INVALID_QUOTE: _RESTING,
    State.FAILED: _RESTING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A host's state, and how many retries of the present round were begun."""

    state: State = State.START
    retries: int = 0


def advance(progress: Progress, event: Event, *, max_retries: int) -> Progress:
    """The state of a host after an event.

    Raises:
        KeyError: an event that cannot happen in this state.
    """
    state = TRANSITIONS[progress.state][event]
    if state is not State.GET_PROVIDER_QUOTE_RETRY:
        return Progress(state=state)
    if progress.retries >= max_retries:
        return Progress(state=State.FAILED)
    return Progress(state=state, retries=progress.retries + 1)


def retry_wait_s(
    retry: int,
    *,
    base_s: float,
    longest_s: float,
    retry_after_s: float | None,
    rng: random.Random,
) -> float:
    """How long to wait before a retry.

    The common backoff, or the proxy's Retry-After if it is longer, up to `longest_s`: a proxy may slow
    the watcher down, and not stop it.

    Args:
        retry: 1 for the first.
        retry_after_s: of the answer; None where it gave none.
    """
    wait_s = backoff_s(retry, first_s=base_s, longest_s=longest_s, rng=rng)
    if retry_after_s is not None:
        asked_s = min(retry_after_s, longest_s)
        wait_s = max(wait_s, asked_s * (1 + RETRY_AFTER_SPREAD * rng.random()))
    return wait_s
