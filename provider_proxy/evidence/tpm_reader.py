"""A reader of big-endian TPM structures that cannot run past their end.

Untrusted bytes go in; every short read, and every byte left over, is an `EvidenceFormatError`.
"""

from __future__ import annotations

from provider_proxy.errors import EvidenceFormatError


class Reader:
    """Reads one structure from front to back; `what` names it in errors."""

    __slots__ = ("_data", "_pos", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._pos = 0
        self._what = what

    @property
    def left(self) -> int:
        return len(self._data) - self._pos

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises: EvidenceFormatError where fewer are left."""
        if count > self.left:
            raise EvidenceFormatError(f"{self._what} ends early")
        part = self._data[self._pos : self._pos + count]
        self._pos += count
        return part

    def uint(self, count: int) -> int:
        """The next `count` bytes as a big-endian unsigned number."""
        return int.from_bytes(self.take(count), "big")

    def sized(self, limit: int) -> bytes:
        """A TPM2B: u16 size, then that many bytes; at most `limit`."""
        size = self.uint(2)
        if size > limit:
            raise EvidenceFormatError(
                f"{self._what} has a part of {size} bytes; at most {limit} are allowed"
            )
        return self.take(size)

    def end(self) -> None:
        """Raises: EvidenceFormatError where bytes are left."""
        if self.left:
            raise EvidenceFormatError(f"{self._what} has {self.left} bytes too many")
