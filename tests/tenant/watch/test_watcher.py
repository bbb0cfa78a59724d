"""The states of a watched host: the whole table, and what any run of events can and cannot do."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider_proxy.tenant.watch.states import (
    TRANSITIONS,
    Event,
    Progress,
    State,
    advance,
    retry_wait_s,
)

RESTING = (State.START, State.TRUSTED, State.INVALID_QUOTE, State.FAILED)
ASKING = (State.GET_PROVIDER_QUOTE, State.GET_PROVIDER_QUOTE_RETRY)


def test_the_names_are_the_plan_s() -> None:
    assert [state.value for state in State] == [
        "START",
        "GET_PROVIDER_QUOTE",
        "GET_PROVIDER_QUOTE_RETRY",
        "TRUSTED",
        "INVALID_QUOTE",
        "FAILED",
    ]


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_every_pair_of_state_and_event(state: State, event: Event) -> None:
    expected: State | None = None
    if state in RESTING and event is Event.DUE:
        expected = State.GET_PROVIDER_QUOTE
    elif state in ASKING and event is not Event.DUE:
        expected = {
            Event.GOOD: State.TRUSTED,
            Event.REFUSED: State.INVALID_QUOTE,
            Event.UNANSWERED: State.GET_PROVIDER_QUOTE_RETRY,
            Event.BROKEN: State.FAILED,
        }[event]
    if expected is None:
        with pytest.raises(KeyError):
            advance(Progress(state=state), event, max_retries=5)
    else:
        assert advance(Progress(state=state), event, max_retries=5).state is expected


def test_retries_end_in_failed() -> None:
    progress = advance(Progress(), Event.DUE, max_retries=2)
    seen = []
    for _ in range(3):
        progress = advance(progress, Event.UNANSWERED, max_retries=2)
        seen.append((progress.state, progress.retries))
    assert seen == [
        (State.GET_PROVIDER_QUOTE_RETRY, 1),
        (State.GET_PROVIDER_QUOTE_RETRY, 2),
        (State.FAILED, 0),
    ]


def test_without_retries_the_first_silence_fails() -> None:
    asking = advance(Progress(), Event.DUE, max_retries=0)
    assert advance(asking, Event.UNANSWERED, max_retries=0) == Progress(state=State.FAILED)


@given(st.lists(st.sampled_from(list(Event)), max_size=60), st.integers(0, 4))
def test_any_run_of_events(events: list[Event], max_retries: int) -> None:
    """TRUSTED comes from GOOD alone; a verdict comes after at most so many silences."""
    progress, silences = Progress(), 0
    for event in events:
        if event not in TRANSITIONS[progress.state]:
            continue
        progress = advance(progress, event, max_retries=max_retries)
        silences = silences + 1 if event is Event.UNANSWERED else 0
        assert (progress.state is State.TRUSTED) == (event is Event.GOOD)
        assert (progress.state is State.INVALID_QUOTE) == (event is Event.REFUSED)
        assert progress.retries <= max_retries
        if progress.state in (State.TRUSTED, State.INVALID_QUOTE, State.FAILED):
            assert progress.retries == 0
        assert silences <= max_retries + 1


@given(
    st.integers(1, 200),
    st.floats(0.1, 3600),
    st.floats(0.1, 3600),
    st.none() | st.floats(0, 1e6),
    st.integers(),
)
def test_backoff_is_bounded(
    retry: int, base_s: float, longest_s: float, retry_after_s: float | None, seed: int
) -> None:
    wait_s = retry_wait_s(
        retry,
        base_s=base_s,
        longest_s=longest_s,
        retry_after_s=retry_after_s,
        rng=random.Random(seed),
    )
    assert min(base_s, longest_s) / 2 <= wait_s <= longest_s * 1.25
    if retry_after_s is not None:
        assert wait_s >= min(retry_after_s, longest_s)


def test_backoff_doubles_and_spreads() -> None:
    def waits(retry: int) -> list[float]:
        return [
            retry_wait_s(
                retry, base_s=2, longest_s=1000, retry_after_s=None, rng=random.Random(seed)
            )
            for seed in range(50)
        ]

    for retry in range(1, 6):
        drawn = waits(retry)
        assert 2**retry / 2 <= min(drawn) < max(drawn) <= 2**retry
        assert max(drawn) - min(drawn) > 2**retry / 4
