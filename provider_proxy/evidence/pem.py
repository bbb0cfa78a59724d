"""PEM that must have one part only: a second one would be ignored silently."""

from __future__ import annotations

_BEGIN = b"-----BEGIN "


def one_part(pem: bytes) -> bytes:
    """The same bytes. Does not check: that there is a part, and what it holds.

    Raises:
        ValueError: there are several parts, and it is not known which one is meant.
    """
    parts = pem.count(_BEGIN)
    if parts > 1:
        raise ValueError(
            f"it holds {parts} PEM parts, and only one is read: keep the one that is meant"
        )
    return pem
