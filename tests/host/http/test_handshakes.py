"""Room for handshakes: the oldest makes room, at once, and once."""

from __future__ import annotations

import contextlib

import pytest

from provider_proxy.host.http.handshakes import HandshakeLimits


class Shaking:
    def __init__(self) -> None:
        self.crowded_out = 0

    def crowd_out(self) -> None:
        self.crowded_out += 1


@pytest.mark.parametrize("limits", [(3, 100), (100, 3)])
def test_many_that_come_at_once_crowd_out_one_each(limits: tuple[int, int]) -> None:
    """Before the task of any of those that have to go has run."""
    room, made = HandshakeLimits(*limits), [Shaking() for _ in range(10)]
    with contextlib.ExitStack() as stack:
        for each in made:
            stack.enter_context(room.shaking(each, "192.0.2.1"))
        assert [each.crowded_out for each in made] == [1] * 7 + [0] * 3
    with contextlib.ExitStack() as stack:  # all of it was given back
        more = [Shaking() for _ in range(3)]
        for each in more:
            stack.enter_context(room.shaking(each, "192.0.2.1"))
    assert not any(each.crowded_out for each in more)


def test_an_address_crowds_out_its_own() -> None:
    room, other, made = HandshakeLimits(100, 2), Shaking(), [Shaking() for _ in range(4)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(room.shaking(other, "192.0.2.2"))
        for each in made:
            stack.enter_context(room.shaking(each, "192.0.2.1"))
        assert other.crowded_out == 0
        assert [each.crowded_out for each in made] == [1, 1, 0, 0]
