"""Canonical copies of certificates that are not strict DER: only deviations are corrected.

Bytes in, bytes out. A copy is for reading only; `ek_certificate` keeps the bytes that were signed.
Sources: X.690, sections 8 and 11; RFC 5280, section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from provider_proxy.errors import EvidenceFormatError
from provider_proxy.evidence import der

MAX_DEPTH = 16  # elements inside each other; certificates have 12
BOOLEAN, BIT_STRING, NULL = 0x01, 0x03, 0x05
PRINTABLE_STRING, T61_STRING, IA5_STRING = 0x13, 0x14, 0x16
CONSTRUCTED, HIGH_TAG, LONG_LENGTH = 0x20, 0x1F, 0x80
VERSION_TAG, EXTENSIONS_TAG = 0xA0, 0xA3
VERSION_1 = bytes.fromhex("a003020100")  # the default: not to be written out
PRINTABLE_RE = re.compile(rb"[A-Za-z0-9 '()+,\-./:=?]*")
RSA_PREFIX = der.encode_oid("1.2.840.113549.1.1.1")[2:-1]
RSA_WITH_NULL = (1, 5, 11, 12, 13, 14)  # rsaEncryption and the PKCS #1 v1.5 signatures: RFC 4055
ECDSA_PREFIX = der.encode_oid("1.2.840.10045.4.3.2")[2:-1]  # ecdsa-with-SHA2: RFC 5758, 3.2
BASIC_CONSTRAINTS, SUBJECT_ALT_NAME = der.encode_oid("2.5.29.19"), der.encode_oid("2.5.29.17")
KEY_USAGE = der.encode_oid("2.5.29.15")
# Extensions whose contents the walk reads, so they are corrected, too. Others stay as they are.
READ_EXTENSIONS = (
    BASIC_CONSTRAINTS,
    SUBJECT_ALT_NAME,
    KEY_USAGE,
    *(der.encode_oid(f"2.5.29.{number}") for number in (32, 37)),  # policies, extended key usage
)
# The mark of a host's vTPM CA, and where an issuer's certificate is: read, and kept as they are.
KEPT_EXTENSIONS = (der.encode_oid("2.23.133.20.1"), der.encode_oid("1.3.6.1.5.5.7.1.1"))


def copies(tbs: bytes, algorithm: bytes, signature: bytes) -> Iterator[bytes]:
    """Canonical copies of a certificate, to be tried in this order.

    The second lacks the extensions that are not read here and not critical: the reader may have refused
    one of them. A repeated extension is never left out.

    Raises:
        EvidenceFormatError: it does not have the structure of a certificate.
    """
    canonical = _canonical_tbs(tbs)
    ending = (_canonical_algorithm(algorithm), plain(signature))
    yield der.encode(der.SEQUENCE, canonical, *ending)
    yield der.encode(der.SEQUENCE, _without_unread(canonical), *ending)


def _without_unread(tbs: bytes) -> bytes:
    out = []
    for field in inner(tbs):
        if field[0] != EXTENSIONS_TAG:
            out.append(field)
            continue
        (listed,) = (*inner(field), b"")[:1]
        extensions = [(list(inner(each)), each) for each in inner(listed)]
        oids = [parts[0] for parts, _ in extensions if parts]
        twice = next((oid for oid in oids if oids.count(oid) > 1), None)
        if twice is not None:
            raise EvidenceFormatError(f"Duplicate extension {twice.hex()}")
        kept = [
            each
            for parts, each in extensions
            if len(parts) != 2 or parts[0] in READ_EXTENSIONS or parts[0] in KEPT_EXTENSIONS
        ]
        if kept:
            out.append(der.encode(EXTENSIONS_TAG, der.encode(der.SEQUENCE, *kept)))
    return der.encode(der.SEQUENCE, *out)


# --- elements ---------------------------------------------------------------------------------------


def take(data: bytes, at: int) -> tuple[int, int, int]:
    """Start, start of the contents, and end of the element at `at`; lengths may be longer than needed.

    Raises:
        EvidenceFormatError: it is not an element, or does not end within the data.
    """
    if len(data) < at + 2 or data[at] & HIGH_TAG == HIGH_TAG:
        raise EvidenceFormatError(f"there is no element at byte {at}")
    size, start = data[at + 1], at + 2
    if size >= LONG_LENGTH:
        count = size & ~LONG_LENGTH
        if not 1 <= count <= 4:
            raise EvidenceFormatError(f"the length at byte {at} has an unknown form")
        start, size = start + count, int.from_bytes(data[start : start + count], "big")
    if start + size > len(data):
        raise EvidenceFormatError(f"the element at byte {at} ends after the last byte")
    return at, start, start + size


def parts(data: bytes, at: int, end: int, what: str) -> list[tuple[int, int, int]]:
    """The elements inside the one at `at`. Raises: EvidenceFormatError."""
    _, position, last = take(data, at)
    if last != end:
        raise EvidenceFormatError(f"{what} has extra bytes after its end")
    found = []
    while position < last:
        found.append(take(data[:last], position))
        position = found[-1][2]
    return found


def inner(data: bytes) -> Iterator[bytes]:
    """The elements of one constructed element, each with its tag and length."""
    for start, _, end in parts(data, 0, len(data), "an element"):
        yield data[start:end]


def fields(tbs: bytes) -> list[bytes]:
    """Of what was signed, from the serial number on. Raises: EvidenceFormatError."""
    fields = list(inner(tbs))
    if fields and fields[0][0] == VERSION_TAG:
        del fields[0]
    if len(fields) < 6 or fields[0][0] != der.INTEGER:
        raise EvidenceFormatError("the signed part does not have the fields of a certificate")
    return fields


def is_positive(serial: bytes) -> bool:
    """True where a serial number, an INTEGER, is above 0."""
    _, start, end = take(serial, 0)
    content = serial[start:end]
    return bool(content.strip(b"\0")) and content[0] < 0x80


def plain(data: bytes, depth: int = 0) -> bytes:
    """One element with its lengths in DER, its SETs in order and its BOOLEANs 0 or 255."""
    _, start, end = take(data, 0)
    tag, content = data[0], data[start:end]
    if depth > MAX_DEPTH:
        raise EvidenceFormatError("its elements are nested too deeply")
    if tag == BOOLEAN and len(content) == 1:
        return der.encode(tag, b"\xff" if content != b"\0" else b"\0")
    if not tag & CONSTRUCTED:
        return der.encode(tag, content)
    parts = [plain(part, depth + 1) for part in inner(data)]
    return der.encode(tag, *(sorted(parts) if tag == der.SET else parts))


# --- the canonical copy -----------------------------------------------------------------------------


def _each(data: bytes, repair: Callable[[bytes], bytes]) -> bytes:
    """A SEQUENCE or SET with each of its elements corrected."""
    parts = [repair(part) for part in inner(data)]
    return der.encode(data[0], *(sorted(parts) if data[0] == der.SET else parts))


def _canonical_tbs(tbs: bytes) -> bytes:
    version = [plain(part) for part in inner(tbs) if part[0] == VERSION_TAG]
    out = [part for part in version if part != VERSION_1]
    serial, algorithm, issuer, validity, subject, key, *rest = fields(tbs)
    key_algorithm, key_bits = (*inner(key), b"", b"")[:2]
    out += [_canonical_serial(serial), _canonical_algorithm(algorithm), _canonical_name(issuer)]
    out += [plain(validity), _canonical_name(subject)]
    out.append(der.encode(der.SEQUENCE, _canonical_algorithm(key_algorithm), plain(key_bits)))
    for field in rest:
        if field[0] == EXTENSIONS_TAG:
            out.append(_each(field, lambda listed: _each(listed, _canonical_extension)))
        else:
            out.append(plain(field))
    return der.encode(der.SEQUENCE, *out)


def _canonical_serial(data: bytes) -> bytes:
    """A number above 0: read as unsigned, and 1 for 0. Nothing here uses it."""
    _, start, end = take(data, 0)
    if is_positive(data):
        return plain(data)
    return der.encode(
        der.INTEGER, b"\0" + data[start:end] if data[start:end].strip(b"\0") else b"\1"
    )


def _canonical_algorithm(data: bytes) -> bytes:
    """An AlgorithmIdentifier: NULL where RSA needs it, and no parameter for ECDSA."""
    listed = [plain(part) for part in inner(data)]
    if not listed:
        raise EvidenceFormatError("an algorithm identifier is empty")
    oid, null = listed[0][2:], der.encode(NULL)
    if oid[:-1] == RSA_PREFIX and oid[-1] in RSA_WITH_NULL and len(listed) == 1:
        listed.append(null)
    if oid[:-1] == ECDSA_PREFIX and listed[1:] == [null]:
        listed.pop()
    return der.encode(der.SEQUENCE, *listed)


def _canonical_name(data: bytes) -> bytes:
    return _each(data, lambda rdn: _each(rdn, lambda part: _each(part, _canonical_string)))


def _canonical_string(data: bytes) -> bytes:
    """A string in a type that may hold it: UTF8String where its own type may not."""
    _, start, end = take(data, 0)
    tag, content = data[0], data[start:end]
    is_wrong = (
        tag == T61_STRING
        or (tag == PRINTABLE_STRING and not PRINTABLE_RE.fullmatch(content))
        or (tag == IA5_STRING and not content.isascii())
    )
    if is_wrong:  # as OpenSSL reads them: a byte is a character
        return der.encode(der.UTF8_STRING, content.decode("latin-1").encode("utf-8"))
    return plain(data)


def _canonical_extension(data: bytes) -> bytes:
    parts = [plain(part) for part in inner(data)]
    if len(parts) == 3 and parts[1] == der.encode(BOOLEAN, b"\0"):
        del parts[1]  # critical DEFAULT FALSE
    if parts and parts[0] in READ_EXTENSIONS and parts[-1][0] == der.OCTET_STRING:
        _, start, end = take(parts[-1], 0)
        parts[-1] = der.encode(der.OCTET_STRING, _canonical_value(parts[0], parts[-1][start:end]))
    return der.encode(der.SEQUENCE, *parts)


def _canonical_value(oid: bytes, value: bytes) -> bytes:
    if oid == BASIC_CONSTRAINTS:
        parts = [plain(part) for part in inner(value)]
        is_ca = parts[:1] == [der.encode(BOOLEAN, b"\xff")]
        return der.encode(der.SEQUENCE, *parts if is_ca else ())  # only a CA has a path length
    if oid == KEY_USAGE:
        _, start, end = take(value, 0)
        bits = bytearray(value[start:end])
        if len(bits) > 1 and bits[0] < 8:
            bits[-1] &= 0xFF << bits[0]  # the bits that do not count are 0
        return der.encode(value[0], bytes(bits))
    if oid == SUBJECT_ALT_NAME:
        return _each(value, _canonical_general_name)
    return plain(value)


def _canonical_general_name(data: bytes) -> bytes:
    """A directoryName's strings are corrected; other names stay as they are."""
    directory_name = 0xA4
    return _each(data, _canonical_name) if data[0] == directory_name else plain(data)
