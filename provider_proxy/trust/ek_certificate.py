"""Certificates of TPMs and their makers, read as they are, with the bytes kept that were signed.

Chips in the field carry certificates that are no strict DER: a SET that is not in order, a default that
is written out, NULL where a parameter must be absent, a string of the wrong type, a length in more octets
than needed, bytes of padding behind, a TCG header before. What `cryptography` refuses is read from a
canonical *copy* in which these are put right and nothing else is; a signature is always checked over the
*original* bytes. For endorsement keys and their makers' CAs alone, never for TLS.
Sources: X.690, sections 8 and 11; RFC 5280, section 4.1; TCG PC Client Specific Implementation
Specification for Conventional BIOS 1.21, section 7.3.2 (TCG_PCCLIENT_STORED_CERT).
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from provider_proxy.errors import EvidenceFormatError, UntrustedEkError
from provider_proxy.evidence import der
from provider_proxy.evidence.names import ComparableName, comparable

MAX_CERTIFICATE_BYTES = 16 * 1024  # real ones are 1 to 2 kB
MAX_DEPTH = 16  # elements inside each other; certificates have 12
TCG_STORED_CERT, TCG_FULL_CERT = b"\x10\x01\x00", b"\x10\x02"
TCG_HEADER_BYTES = 7  # stored-certificate tag, type, size (2), full-certificate tag (2)
EMPTY_BYTES = b"\x00\xff"  # what an NV index holds that nobody wrote a certificate to

BOOLEAN, BIT_STRING, NULL = 0x01, 0x03, 0x05
PRINTABLE_STRING, T61_STRING, IA5_STRING = 0x13, 0x14, 0x16
CONSTRUCTED, HIGH_TAG, LONG_LENGTH = 0x20, 0x1F, 0x80
VERSION_TAG, EXTENSIONS_TAG = 0xA0, 0xA3
VERSION_1 = bytes.fromhex("a003020100")  # the default: not to be written out
PRINTABLE_RE = re.compile(rb"[A-Za-z0-9 '()+,\-./:=?]*")
RSA_PREFIX = der.encode_oid("1.2.840.113549.1.1.1")[2:-1]
RSA_WITH_NULL = (1, 5, 11, 12, 13, 14)  # rsaEncryption and the PKCS #1 v1.5 signatures: RFC 4055
RSAES_OAEP = "1.2.840.113549.1.1.7"
ECDSA_PREFIX = der.encode_oid("1.2.840.10045.4.3.2")[2:-1]  # ecdsa-with-SHA2: RFC 5758, 3.2
BASIC_CONSTRAINTS, SUBJECT_ALT_NAME = der.encode_oid("2.5.29.19"), der.encode_oid("2.5.29.17")
KEY_USAGE = der.encode_oid("2.5.29.15")
# Extensions whose contents the walk reads, and that are put right, too. Others stay as they are.
READ_EXTENSIONS = (
    BASIC_CONSTRAINTS,
    SUBJECT_ALT_NAME,
    KEY_USAGE,
    *(der.encode_oid(f"2.5.29.{number}") for number in (32, 37)),  # policies, extended key usage
)
# tpmSpecification of the family 1.2, in the subject directory attributes (TCG EK Credential Profile).
TPM_12_RE = re.compile(rb"\x06\x05\x67\x81\x05\x02\x10\x31.\x30.\x0c\x031\.2", re.DOTALL)

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)
GOOD_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_filters = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmCertificate:
    """A certificate whose every part could be read. Nothing of it is trusted.

    Attributes:
        der: the certificate alone, as it came: no header, no padding.
        tbs: the bytes that its issuer signed.
        parsed: of `der`, or of a canonical copy of it (`is_repaired`).
        subject, issuer: names as they are compared.
    """

    der: bytes
    tbs: bytes
    parsed: x509.Certificate
    is_repaired: bool
    subject: ComparableName
    issuer: ComparableName

    @property
    def name(self) -> str:
        """The subject for people, at most 200 characters."""
        return self.parsed.subject.rfc4514_string()[:200]

    @property
    def issuer_name(self) -> str:
        """The issuer for people, at most 200 characters."""
        return self.parsed.issuer.rfc4514_string()[:200]


def cut_certificate(data: bytes) -> bytes:
    """A certificate without the TCG's header before it and the padding behind it.

    Args:
        data: as an NV index, a registrar or a file has it; untrusted.

    Raises:
        EvidenceFormatError: no certificate begins there, or it ends early.
    """
    if data[:3] == TCG_STORED_CERT and data[5:TCG_HEADER_BYTES] == TCG_FULL_CERT:
        # The size counts the full-certificate tag, too.
        size = int.from_bytes(data[3:5], "big") - len(TCG_FULL_CERT)
        data = data[TCG_HEADER_BYTES : TCG_HEADER_BYTES + max(size, 0)]
    if not data.strip(EMPTY_BYTES[:1]) or not data.strip(EMPTY_BYTES[1:]):
        raise EvidenceFormatError("there are no bytes but 0x00 or 0xff: nothing was written")
    if data[0] != der.SEQUENCE:
        raise EvidenceFormatError(f"it begins with {data[:4].hex()}, which is no certificate")
    _, _, end = _take(data, 0)
    return data[:end]


def parse_certificate(data: bytes, *, limit: int = MAX_CERTIFICATE_BYTES) -> TpmCertificate:
    """Read a certificate of a TPM or of a TPM maker's CA, tolerantly.

    Args:
        data: DER or what comes near it, untrusted; `cut_certificate` is part of this.
        limit: the most bytes that the certificate may have.

    Raises:
        EvidenceFormatError: it cannot be read; the message says why.
    """
    original = cut_certificate(data)
    if len(original) > limit:
        raise EvidenceFormatError(f"it is longer than {limit} bytes")
    parts = _parts(original, 0, len(original), "the certificate")
    if [original[start] for start, _, _ in parts] != [der.SEQUENCE, der.SEQUENCE, BIT_STRING]:
        raise EvidenceFormatError("it has not the three parts of a certificate")
    tbs, algorithm, signature = (original[start:end] for start, _, end in parts)
    _check_unsigned(original, tbs, algorithm, original[parts[2][1] : parts[2][2]])
    try:
        parsed, is_repaired = _load(original, tbs), False
    except UNREADABLE:
        copy = der.encode(
            der.SEQUENCE, _canonical_tbs(tbs), _canonical_algorithm(algorithm), _plain(signature)
        )
        try:
            parsed, is_repaired = _load(copy), True
        except UNREADABLE as exc:
            raise EvidenceFormatError(_reason(exc, original)) from exc
    return TpmCertificate(
        der=original,
        tbs=tbs,
        parsed=parsed,
        is_repaired=is_repaired,
        subject=comparable(parsed.subject),
        issuer=comparable(parsed.issuer),
    )


def check_signature(child: TpmCertificate, issuer: TpmCertificate) -> None:
    """Check that the key of one certificate signed the bytes of another.

    Does not check: names, validity, or what the issuer may do.

    Raises:
        UntrustedEkError: it did not, or the signature is of an algorithm that is not accepted.
    """
    digest = child.parsed.signature_hash_algorithm
    if not isinstance(digest, GOOD_HASHES):
        algorithm = digest.name.upper() if digest is not None else "an unknown hash"
        raise UntrustedEkError(f"it is signed over {algorithm}, which is not accepted")
    key = issuer.parsed.public_key()
    try:
        scheme = child.parsed.signature_algorithm_parameters
        if isinstance(key, rsa.RSAPublicKey) and isinstance(scheme, padding.PKCS1v15 | padding.PSS):
            key.verify(child.parsed.signature, child.tbs, scheme, digest)
        elif isinstance(key, ec.EllipticCurvePublicKey) and isinstance(scheme, ec.ECDSA):
            key.verify(child.parsed.signature, child.tbs, scheme)
        else:
            raise InvalidSignature
    except (InvalidSignature, *UNREADABLE) as exc:
        raise UntrustedEkError("the signature is not that of the CA that it names") from exc


# --- reading ----------------------------------------------------------------------------------------


def _load(data: bytes, tbs: bytes = b"") -> x509.Certificate:
    """Parse, and look at every part: `cryptography` parses a part when it is first looked at."""
    if tbs and not _is_positive(_fields(tbs)[0]):
        raise ValueError("the serial number is 0 or below")  # a warning now, an error in time
    # A country of seven letters is worth no line on stderr. The lock: these filters are the process'.
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        parsed = x509.load_der_x509_certificate(data)
        _ = (parsed.subject, parsed.issuer, parsed.public_key(), list(parsed.extensions))
        _ = (parsed.version, parsed.serial_number, parsed.signature_hash_algorithm)
        _ = (parsed.not_valid_before_utc, parsed.not_valid_after_utc)
    return parsed


def _reason(exc: Exception, original: bytes) -> str:
    """Why a certificate cannot be read, for people."""
    if TPM_12_RE.search(original):
        return f"it is a TPM 1.2 certificate; a TPM 2.0 is needed ({_short(exc)})"
    if RSAES_OAEP in str(exc):
        return f"its key is of the kind RSAES-OAEP ({RSAES_OAEP}), as TPM 1.2 certificates have it"
    return _short(exc)


def _short(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__


def _check_unsigned(original: bytes, tbs: bytes, algorithm: bytes, signature: bytes) -> None:
    """What the signature does not cover must agree with what it covers (RFC 5280, 4.1.1.2).

    Raises:
        EvidenceFormatError: it does not.
    """
    if _plain(_fields(tbs)[1]) != _plain(algorithm):
        raise EvidenceFormatError("it names one signature algorithm inside and another outside")
    if signature[:1] != b"\0":
        raise EvidenceFormatError("its signature is no whole number of bytes")


def _take(data: bytes, at: int) -> tuple[int, int, int]:
    """Start, start of the contents, and end of the element at `at`; lengths may be longer than needed.

    Raises:
        EvidenceFormatError: it is none, or does not end within the data.
    """
    if len(data) < at + 2 or data[at] & HIGH_TAG == HIGH_TAG:
        raise EvidenceFormatError(f"no element at byte {at}")
    size, start = data[at + 1], at + 2
    if size >= LONG_LENGTH:
        count = size & ~LONG_LENGTH
        if not 1 <= count <= 4:
            raise EvidenceFormatError(f"a length of unknown form at byte {at}")
        start, size = start + count, int.from_bytes(data[start : start + count], "big")
    if start + size > len(data):
        raise EvidenceFormatError(f"the element at byte {at} ends behind the last byte")
    return at, start, start + size


def _parts(data: bytes, at: int, end: int, what: str) -> list[tuple[int, int, int]]:
    """The elements inside the one at `at`. Raises: EvidenceFormatError."""
    _, position, last = _take(data, at)
    if last != end:
        raise EvidenceFormatError(f"{what} has bytes behind its end")
    found = []
    while position < last:
        found.append(_take(data[:last], position))
        position = found[-1][2]
    return found


def _inner(data: bytes) -> Iterator[bytes]:
    """The elements of one constructed element, each with its tag and length."""
    for start, _, end in _parts(data, 0, len(data), "an element"):
        yield data[start:end]


def _fields(tbs: bytes) -> list[bytes]:
    """Of what was signed, from the serial number on. Raises: EvidenceFormatError."""
    fields = list(_inner(tbs))
    if fields and fields[0][0] == VERSION_TAG:
        del fields[0]
    if len(fields) < 6 or fields[0][0] != der.INTEGER:
        raise EvidenceFormatError("what was signed has not the fields of a certificate")
    return fields


def _is_positive(serial: bytes) -> bool:
    _, start, end = _take(serial, 0)
    content = serial[start:end]
    return bool(content.strip(b"\0")) and content[0] < 0x80


# --- the canonical copy -----------------------------------------------------------------------------


def _plain(data: bytes, depth: int = 0) -> bytes:
    """One element with its lengths in DER, its SETs in order and its BOOLEANs 0 or 255."""
    _, start, end = _take(data, 0)
    tag, content = data[0], data[start:end]
    if depth > MAX_DEPTH:
        raise EvidenceFormatError("its elements are nested too deeply")
    if tag == BOOLEAN and len(content) == 1:
        return der.encode(tag, b"\xff" if content != b"\0" else b"\0")
    if not tag & CONSTRUCTED:
        return der.encode(tag, content)
    parts = [_plain(part, depth + 1) for part in _inner(data)]
    return der.encode(tag, *(sorted(parts) if tag == der.SET else parts))


def _each(data: bytes, repair: Callable[[bytes], bytes]) -> bytes:
    """A SEQUENCE or SET with each of its elements put right."""
    parts = [repair(part) for part in _inner(data)]
    return der.encode(data[0], *(sorted(parts) if data[0] == der.SET else parts))


def _canonical_tbs(tbs: bytes) -> bytes:
    version = [_plain(part) for part in _inner(tbs) if part[0] == VERSION_TAG]
    out = [part for part in version if part != VERSION_1]
    serial, algorithm, issuer, validity, subject, key, *rest = _fields(tbs)
    key_algorithm, key_bits = (*_inner(key), b"", b"")[:2]
    out += [_canonical_serial(serial), _canonical_algorithm(algorithm), _canonical_name(issuer)]
    out += [_plain(validity), _canonical_name(subject)]
    out.append(der.encode(der.SEQUENCE, _canonical_algorithm(key_algorithm), _plain(key_bits)))
    for field in rest:
        if field[0] == EXTENSIONS_TAG:
            out.append(_each(field, lambda listed: _each(listed, _canonical_extension)))
        else:
            out.append(_plain(field))
    return der.encode(der.SEQUENCE, *out)


def _canonical_serial(data: bytes) -> bytes:
    """A number above 0: read as one without a sign, and 1 for 0. Nothing here looks at it."""
    _, start, end = _take(data, 0)
    if _is_positive(data):
        return _plain(data)
    return der.encode(
        der.INTEGER, b"\0" + data[start:end] if data[start:end].strip(b"\0") else b"\1"
    )


def _canonical_algorithm(data: bytes) -> bytes:
    """An AlgorithmIdentifier: NULL where RSA needs it, and nothing where ECDSA has nothing."""
    parts = [_plain(part) for part in _inner(data)]
    if not parts:
        raise EvidenceFormatError("an algorithm is missing")
    oid, null = parts[0][2:], der.encode(NULL)
    if oid[:-1] == RSA_PREFIX and oid[-1] in RSA_WITH_NULL and len(parts) == 1:
        parts.append(null)
    if oid[:-1] == ECDSA_PREFIX and parts[1:] == [null]:
        parts.pop()
    return der.encode(der.SEQUENCE, *parts)


def _canonical_name(data: bytes) -> bytes:
    return _each(data, lambda rdn: _each(rdn, lambda part: _each(part, _canonical_string)))


def _canonical_string(data: bytes) -> bytes:
    """A string in a type that may hold it: UTF8String for what its own type may not."""
    _, start, end = _take(data, 0)
    tag, content = data[0], data[start:end]
    is_wrong = (
        tag == T61_STRING
        or (tag == PRINTABLE_STRING and not PRINTABLE_RE.fullmatch(content))
        or (tag == IA5_STRING and not content.isascii())
    )
    if is_wrong:  # as OpenSSL reads them: a byte is a character
        return der.encode(der.UTF8_STRING, content.decode("latin-1").encode("utf-8"))
    return _plain(data)


def _canonical_extension(data: bytes) -> bytes:
    parts = [_plain(part) for part in _inner(data)]
    if len(parts) == 3 and parts[1] == der.encode(BOOLEAN, b"\0"):
        del parts[1]  # critical DEFAULT FALSE
    if parts and parts[0] in READ_EXTENSIONS and parts[-1][0] == der.OCTET_STRING:
        _, start, end = _take(parts[-1], 0)
        parts[-1] = der.encode(der.OCTET_STRING, _canonical_value(parts[0], parts[-1][start:end]))
    return der.encode(der.SEQUENCE, *parts)


def _canonical_value(oid: bytes, value: bytes) -> bytes:
    if oid == BASIC_CONSTRAINTS:
        parts = [_plain(part) for part in _inner(value)]
        is_ca = parts[:1] == [der.encode(BOOLEAN, b"\xff")]
        return der.encode(der.SEQUENCE, *parts if is_ca else ())  # a length of path is a CA's alone
    if oid == KEY_USAGE:
        _, start, end = _take(value, 0)
        bits = bytearray(value[start:end])
        if len(bits) > 1 and bits[0] < 8:
            bits[-1] &= 0xFF << bits[0]  # the bits that do not count are 0
        return der.encode(value[0], bytes(bits))
    if oid == SUBJECT_ALT_NAME:
        return _each(value, _canonical_general_name)
    return _plain(value)


def _canonical_general_name(data: bytes) -> bytes:
    """A directoryName's strings are put right; other names stay as they are."""
    directory_name = 0xA4
    return _each(data, _canonical_name) if data[0] == directory_name else _plain(data)
