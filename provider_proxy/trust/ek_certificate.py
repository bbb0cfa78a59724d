"""Certificates of TPMs and their makers, read as they are, with the bytes kept that were signed.

Chips in the field carry certificates that are not strict DER: a SET out of order, a default that is
written out, NULL where a parameter must be absent, a string of the wrong type, a length in more octets
than needed, padding after the end, a TCG header before the start. What `cryptography` refuses is read
from a canonical *copy* in which only these are corrected; a signature is always checked over the
*original* bytes. For endorsement keys and their makers' CAs alone, never for TLS.
Sources: X.690, sections 8 and 11; RFC 5280, section 4.1; TCG PC Client Specific Implementation
Specification for Conventional BIOS 1.21, section 7.3.2 (TCG_PCCLIENT_STORED_CERT).
"""

from __future__ import annotations

import re
import threading
import warnings
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from provider_proxy.errors import EvidenceFormatError, UntrustedEkError
from provider_proxy.evidence import der
from provider_proxy.evidence.names import ComparableName, comparable
from provider_proxy.trust import ek_repair

MAX_CERTIFICATE_BYTES = 16 * 1024  # real ones are 1 to 2 kB
TCG_STORED_CERT, TCG_FULL_CERT = b"\x10\x01\x00", b"\x10\x02"
TCG_HEADER_BYTES = 7  # stored-certificate tag, type, size (2), full-certificate tag (2)
EMPTY_BYTES = b"\x00\xff"  # what an NV index holds before a certificate is written to it

RSAES_OAEP = "1.2.840.113549.1.1.7"
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
    """A certificate of which every part could be read. Nothing in it is trusted.

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
        EvidenceFormatError: the bytes do not begin with a certificate, or it ends early.
    """
    if data[:3] == TCG_STORED_CERT and data[5:TCG_HEADER_BYTES] == TCG_FULL_CERT:
        # The size counts the full-certificate tag, too.
        size = int.from_bytes(data[3:5], "big") - len(TCG_FULL_CERT)
        data = data[TCG_HEADER_BYTES : TCG_HEADER_BYTES + max(size, 0)]
    if not data.strip(EMPTY_BYTES[:1]) or not data.strip(EMPTY_BYTES[1:]):
        raise EvidenceFormatError(
            "it holds only the bytes 0x00 or 0xff: no certificate was written"
        )
    if data[0] != der.SEQUENCE:
        raise EvidenceFormatError(
            f"it begins with {data[:4].hex()}, which is not the start of a certificate"
        )
    _, _, end = ek_repair.take(data, 0)
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
    parts = ek_repair.parts(original, 0, len(original), "the certificate")
    if [original[start] for start, _, _ in parts] != [
        der.SEQUENCE,
        der.SEQUENCE,
        ek_repair.BIT_STRING,
    ]:
        raise EvidenceFormatError("it does not have the three parts of a certificate")
    tbs, algorithm, signature = (original[start:end] for start, _, end in parts)
    _check_unsigned(original, tbs, algorithm, original[parts[2][1] : parts[2][2]])
    try:
        parsed, is_repaired = _load(original, tbs), False
    except UNREADABLE:
        parsed, is_repaired = _load_copy(original, tbs, algorithm, signature), True
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
        UntrustedEkError: it did not, or the signature's algorithm is not accepted.
    """
    digest = child.parsed.signature_hash_algorithm
    if not isinstance(digest, GOOD_HASHES):
        algorithm = digest.name.upper() if digest is not None else "an unknown hash"
        raise UntrustedEkError(f"it is signed with {algorithm}, which is not accepted")
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
        raise UntrustedEkError("the signature was not made by the CA that it names") from exc


# --- reading ----------------------------------------------------------------------------------------


def _load(data: bytes, tbs: bytes = b"") -> x509.Certificate:
    """Parse, and look at every part: `cryptography` parses a part when it is first looked at."""
    if tbs and not ek_repair.is_positive(ek_repair.fields(tbs)[0]):
        raise ValueError("the serial number is 0 or below")  # a warning now, an error in time
    # A malformed country code must not write to stderr. The lock: these filters are the process'.
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        parsed = x509.load_der_x509_certificate(data)
        _ = (parsed.subject, parsed.issuer, parsed.public_key(), list(parsed.extensions))
        _ = (parsed.version, parsed.serial_number, parsed.signature_hash_algorithm)
        _ = (parsed.not_valid_before_utc, parsed.not_valid_after_utc)
    return parsed


def _load_copy(original: bytes, tbs: bytes, algorithm: bytes, signature: bytes) -> x509.Certificate:
    """Parse the first copy that can be read. Raises: EvidenceFormatError, with the first's reason."""
    first: Exception | None = None
    for copy in ek_repair.copies(tbs, algorithm, signature):
        try:
            return _load(copy)
        except UNREADABLE as exc:
            first = first or exc
    assert first is not None
    raise EvidenceFormatError(_reason(first, original)) from first


def _reason(exc: Exception, original: bytes) -> str:
    """Why a certificate cannot be read, for people."""
    if TPM_12_RE.search(original):
        return f"it is a TPM 1.2 certificate; a TPM 2.0 is needed ({_short(exc)})"
    if RSAES_OAEP in str(exc):
        return f"its key is for RSAES-OAEP ({RSAES_OAEP}), as in TPM 1.2 certificates"
    return _short(exc)


def _short(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__


def _check_unsigned(original: bytes, tbs: bytes, algorithm: bytes, signature: bytes) -> None:
    """What the signature does not cover must agree with what it covers (RFC 5280, 4.1.1.2).

    Raises:
        EvidenceFormatError: it does not.
    """
    if ek_repair.plain(ek_repair.fields(tbs)[1]) != ek_repair.plain(algorithm):
        raise EvidenceFormatError(
            "the signed part and the outer part name different signature algorithms"
        )
    if signature[:1] != b"\0":
        raise EvidenceFormatError("its signature is not a whole number of bytes")
