"""What Keylime's verifier has seen of a host's IMA list and boots, as its questions show.

Keylime asks for the list from the entry that it has counted to, and uses `boottime` to notice a reboot.
It accepts an answer without any check if the answer begins beyond 0 and names another boot than Keylime's
last one. So a part of a list is sent only where every state that the verifier can be in is of the same
boot; otherwise the whole list is sent, which it always accepts. An answer may get lost, so each state
since the last certain one is possible. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_STATES = 16  # answers in a row that may all have got lost; after that, nothing is known


@dataclass(slots=True)
class KeylimeView:
    """The states that one verifier can be in: (entry that it asks for next, boot that it has seen)."""

    _states: set[tuple[int, int]] = field(default_factory=set)

    def asked(self, entry: int) -> int | None:
        """The verifier asks for the list from an entry on.

        Returns:
            The boot that it has certainly seen last, where a part of the list is enough; None where it
            must get the whole list.
        """
        self._states = {state for state in self._states if state[0] == entry}
        boots = {boot for _, boot in self._states}
        return boots.pop() if entry and len(boots) == 1 else None

    def answered(self, next_entry: int, boot: int) -> None:
        """Note an answer that is sent; the verifier may or may not get it.

        Args:
            next_entry: what it will ask for if it gets it.
            boot: that the answer names.
        """
        if len(self._states) >= MAX_STATES:
            self._states.clear()
        self._states.add((next_entry, boot))
