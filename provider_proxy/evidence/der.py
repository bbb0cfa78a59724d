"""A little DER, both ways, for the two X.509 extensions of the TCG that `cryptography` has no types for.

Definite lengths in their shortest form, low tag numbers, no indefinite forms: what is read is
exactly what would be written. Untrusted bytes go in; anything else is an `EvidenceFormatError`.
Source: X.690, sections 8.1 and 10.1.
"""

from __future__ import annotations

from provider_proxy.errors import EvidenceFormatError

INTEGER = 0x02
OCTET_STRING = 0x04
OID = 0x06
UTF8_STRING = 0x0C
SEQUENCE = 0x30
SET = 0x31
_LONG = 0x80  # first octet of a length that does not fit seven bits
_MOST_LENGTH_OCTETS = 2  # 65,535 bytes: far above any extension that we read


def encode(tag: int, *parts: bytes) -> bytes:
    """One element of these contents."""
    content = b"".join(parts)
    size = len(content)
    if size < _LONG:
        return bytes((tag, size)) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, _LONG | len(octets))) + octets + content


def encode_integer(value: int) -> bytes:
    """A number of 0 or more."""
    return encode(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def encode_oid(dotted: str) -> bytes:
    """An object identifier, "2.23.133.2.16" for example."""
    first, second, *rest = map(int, dotted.split("."))
    content = bytearray()
    for arc in (40 * first + second, *rest):
        octets = [arc & 0x7F]
        while arc := arc >> 7:
            octets.append(0x80 | arc & 0x7F)
        content += bytes(reversed(octets))
    return encode(OID, bytes(content))


def parse(data: bytes, tag: int, what: str) -> bytes:
    """The contents of the only element in the bytes.

    Raises:
        EvidenceFormatError: another tag, or extra bytes after it.
    """
    content, rest = _take(data, tag, what)
    if rest:
        raise EvidenceFormatError(f"{what} has extra bytes after its end")
    return content


def parse_sequence(data: bytes, tags: tuple[int, ...], what: str) -> tuple[bytes, ...]:
    """The contents of a SEQUENCE's elements, which must be of exactly these tags.

    Raises:
        EvidenceFormatError: any other structure.
    """
    rest = parse(data, SEQUENCE, what)
    found = []
    for tag in tags:
        content, rest = _take(rest, tag, what)
        found.append(content)
    if rest:
        raise EvidenceFormatError(f"{what} has too many elements")
    return tuple(found)


def _take(data: bytes, tag: int, what: str) -> tuple[bytes, bytes]:
    if len(data) < 2 or data[0] != tag:
        raise EvidenceFormatError(f"{what} lacks an element of tag {tag:#04x}")
    size, start = data[1], 2
    if size >= _LONG:
        count = size & ~_LONG
        if not 1 <= count <= _MOST_LENGTH_OCTETS or len(data) < 2 + count:
            raise EvidenceFormatError(f"{what} has a length that is not valid DER")
        size, start = int.from_bytes(data[2 : 2 + count], "big"), 2 + count
        if size < _LONG or size.bit_length() <= 8 * (count - 1):
            raise EvidenceFormatError(f"{what} has a length in more octets than needed")
    if len(data) < start + size:
        raise EvidenceFormatError(f"{what} ends early")
    return data[start : start + size], data[start + size :]
