"""One reader of revocation lists: which certificates a CA has revoked, and until when the list is valid.

A list that is missing, cannot be read, or is not of a trusted CA is an error; it is never read as an
empty list. An expired list is read: what is on it stays revoked, and later revocations are unknown. The
caller decides what follows from that.
Source: RFC 5280, section 5. Does not read: delta lists, and lists of one kind of certificates alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.common.files import read_file
from provider_proxy.errors import HostError, UsageError

MAX_CRL_BYTES = 16 * 1024 * 1024  # some 400,000 serials
FOR_EVER = datetime.max.replace(tzinfo=UTC)
_PEM_RE = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)
_UNDERSTOOD = (x509.CRLNumber.oid, x509.AuthorityKeyIdentifier.oid)


IssuerKey = bytes
"""SHA-256 of a CA's SubjectPublicKeyInfo."""
Issued = tuple[IssuerKey, int]
"""What names a certificate: the key that signed it, and its serial number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crl:
    """One CA's list.

    Attributes:
        issuer: the CA, by the key that signed the list: a name can be spelled in several ways, and
            several CAs can use it.
        this_update: the start of its validity.
        next_update: the end of its validity; `FOR_EVER` where the list has none.
    """

    issuer: IssuerKey
    serials: frozenset[int]
    this_update: datetime
    next_update: datetime

    def holds(self, issued: Issued) -> bool:
        """True where this certificate is revoked."""
        issuer, serial = issued
        return issuer == self.issuer and serial in self.serials


def key_of(ca: x509.Certificate) -> IssuerKey:
    """The key that a CA signs with."""
    spki = ca.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def load_crls(name: str, path: Path, authorities: Sequence[x509.Certificate]) -> tuple[Crl, ...]:
    """All lists of a file, as `read_crls` reads them, by the key that signed them. Raises: HostError."""
    return tuple(
        Crl(
            issuer=key_of(signer),
            serials=frozenset(entry.serial_number for entry in crl),
            this_update=crl.last_update_utc,
            next_update=crl.next_update_utc or FOR_EVER,
        )
        for crl, signer in read_crls(name, path, authorities)
    )


def read_crls(
    name: str, path: Path, authorities: Sequence[x509.Certificate]
) -> tuple[tuple[x509.CertificateRevocationList, x509.Certificate], ...]:
    """All lists of a file, PEM or DER, one at least, each with the CA that signed it.

    Args:
        name: of the setting, for messages.
        authorities: CAs, one of which must have signed each list.

    Raises:
        HostError: it cannot be read, or a list in it is of another CA or of a kind that is not supported.
    """
    try:
        data = read_file(path, MAX_CRL_BYTES)
    except (HostError, UsageError) as exc:
        raise HostError(f"{name}: {exc}") from exc
    blocks = _PEM_RE.findall(data)
    if blocks and data.count(b"-----BEGIN ") > len(blocks):
        raise HostError(f"{name}: {path} holds text that belongs to no CRL: remove it")
    if not blocks and (not data.strip() or b"-----BEGIN" in data):
        what = "is empty" if not data.strip() else "holds no X509 CRL"
        raise HostError(f"{name}: {path} {what}")
    try:
        lists = (
            [x509.load_pem_x509_crl(block) for block in blocks]
            if blocks
            else [x509.load_der_x509_crl(data)]
        )
        return tuple((each, _signer(name, path, each, authorities)) for each in lists)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise HostError(f"{name}: {path} is not a CRL: {exc}") from exc


def _signer(
    name: str,
    path: Path,
    crl: x509.CertificateRevocationList,
    authorities: Sequence[x509.Certificate],
) -> x509.Certificate:
    """The CA that signed it, after a check of its kind."""
    signer = next((ca for ca in authorities if _is_signed_by(crl, ca)), None)
    if signer is None:
        raise HostError(
            f"{name}: {path} has a CRL of {crl.issuer.rfc4514_string()!r} that none of the trusted CAs "
            "signed: is it another CA's list?"
        )
    for extension in crl.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise HostError(
                f"{name}: {path} is a CRL of a kind that is not supported: {extension.oid}"
            )
    return signer


def _is_signed_by(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    try:
        return crl.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    except (InvalidSignature, TypeError, ValueError, UnsupportedAlgorithm):
        return False
