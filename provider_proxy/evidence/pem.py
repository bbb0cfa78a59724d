"""PEM of which one part is meant, and no more is there: a second one would be passed over in silence."""

from __future__ import annotations

_BEGIN = b"-----BEGIN "


def one_part(pem: bytes) -> bytes:
    """The same bytes. Does not check: that there is a part, and what it holds.

    Raises:
        ValueError: there are several parts, and nobody says which one is meant.
    """
    parts = pem.count(_BEGIN)
    if parts > 1:
        raise ValueError(
            f"it holds {parts} PEM parts where one is read: leave the one that is meant"
        )
    return pem
