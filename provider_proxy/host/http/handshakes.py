"""Bounds the TLS handshakes in progress, in total and for each address."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Protocol


class Shaking(Protocol):
    """A connection whose handshake is in progress."""

    def crowd_out(self) -> None:
        """End at once, to make room for another."""


class HandshakeLimits:
    """The handshakes in progress, in the order in which they began.

    Args:
        max_handshakes: at a time, over all addresses.
        max_handshakes_per_address: at a time, of one address.
    """

    def __init__(self, max_handshakes: int, max_handshakes_per_address: int) -> None:
        self._max_handshakes = max_handshakes
        self._max_handshakes_per_address = max_handshakes_per_address
        self._shaking: dict[Shaking, str] = {}
        self._shaking_of: Counter[str] = Counter()

    @contextlib.contextmanager
    def shaking(self, connection: Shaking, address: str) -> Iterator[None]:
        """Around a TLS handshake: where too many are in progress, the oldest is cut off. A good client
        needs milliseconds; one that stalls soon becomes the oldest."""
        if len(self._shaking) >= self._max_handshakes:
            self._crowd_out(next(iter(self._shaking)))
        elif address and self._shaking_of[address] >= self._max_handshakes_per_address:
            self._crowd_out(next(c for c, of in self._shaking.items() if of == address))
        self._shaking[connection] = address
        self._shaking_of[address] += 1
        try:
            yield
        finally:
            self._is_done_shaking(connection)

    def _crowd_out(self, connection: Shaking) -> None:
        connection.crowd_out()
        self._is_done_shaking(connection)  # now: many may come before its task runs

    def _is_done_shaking(self, connection: Shaking) -> None:
        address = self._shaking.pop(connection, None)
        if address is not None:
            self._shaking_of[address] -= 1
            if not self._shaking_of[address]:
                del self._shaking_of[address]
