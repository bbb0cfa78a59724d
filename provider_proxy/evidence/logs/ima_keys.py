"""The keys that sign files for IMA, and the signatures that its list carries.

A signature is the kernel's `security.ima` attribute: a header, the id of a key, and RSA or ECDSA over the
file's digest. An id is four bytes of a hash, so that it finds a key and proves nothing: the signature
must verify under one of the keys that have it.
This module knows no policy: `runtime_policy` says which keys are trusted and which buffers add one.
Source: the kernel's security/integrity/digsig_asymmetric.c and integrity.h; Keylime's file_signatures.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

from provider_proxy.errors import LogError

IMA_SIGNATURE, PORTABLE_SIGNATURE = 3, 5  # EVM_IMA_XATTR_DIGSIG, EVM_XATTR_PORTABLE_DIGSIG
SIGNATURE_VERSION = 2
MAX_KEYS = 1000  # of one host or policy; distributions have two or three
MAX_KEY_BYTES = 16 * 1024  # a certificate has one or two thousand
MAX_RSA_BITS = 8192  # what a signature by a hostile key may cost us

_HEADER = struct.Struct(">BBBIH")  # type, version, hash, key id, size of the signature
_HASHES: dict[int, hashes.HashAlgorithm] = {
    2: hashes.SHA1(),  # noqa: S303  # the file's digest is the kernel's choice, and Keylime takes it
    4: hashes.SHA256(),
    5: hashes.SHA384(),
    6: hashes.SHA512(),
    7: hashes.SHA224(),
}
"""By the kernel's numbers (uapi/linux/hash_info.h)."""

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKey:
    """A key that may have signed files.

    Attributes:
        id: what signatures name it by.
        spki: its SubjectPublicKeyInfo, DER.
    """

    id: int
    spki: bytes
    key: PublicKey = field(compare=False, repr=False)


KeySet = frozenset[FileKey]
NO_KEYS: KeySet = frozenset()


def file_key(key: object, key_id: int | None = None) -> FileKey:
    """A key with its id.

    Args:
        key_id: as a certificate or a policy says; the usual one where it is missing or 0.

    Raises:
        LogError: neither RSA nor EC, or too large.
    """
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size > MAX_RSA_BITS:
            raise LogError("an RSA key of more than 8,192 bits is not accepted for file signatures")
        hashed = key.public_bytes(Encoding.DER, PublicFormat.PKCS1)
    elif isinstance(key, ec.EllipticCurvePublicKey):
        hashed = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    else:
        raise LogError("a key that is neither RSA nor EC is not accepted for file signatures")
    if not key_id:
        key_id = int.from_bytes(hashlib.sha1(hashed, usedforsecurity=False).digest()[-4:], "big")
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return FileKey(id=key_id, spki=spki, key=key)


def key_of_spki(spki: bytes, key_id: int | None = None) -> FileKey:
    """Read a public key, DER.

    Raises:
        LogError: not a key, or not of a kind that is accepted for file signatures.
    """
    try:
        return file_key(load_der_public_key(spki), key_id)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise LogError("not a public key in DER") from exc


def key_in_buffer(buffer: bytes) -> FileKey | None:
    """The key in a buffer that was measured: a certificate or a public key, DER or PEM.

    Returns:
        None where the buffer holds no key.

    Raises:
        LogError: a key, but neither RSA nor EC.
    """
    if len(buffer) > MAX_KEY_BYTES:
        return None
    # Each form has one beginning; trying every reader on every buffer costs more.
    if buffer.startswith(b"\x30"):
        readers = (x509.load_der_x509_certificate, load_der_public_key)
    elif b"-----BEGIN" in buffer:
        readers = (x509.load_pem_x509_certificate, load_pem_public_key)
    else:
        return None
    for read in readers:
        found = _read(read, buffer)
        if found is not None:
            return file_key(*found)
    return None


def _read(read: Callable[[bytes], object], buffer: bytes) -> tuple[object, int | None] | None:
    """A key, and the id that its certificate gives it; None where the reader finds no key."""
    try:
        found = read(buffer)
        if isinstance(found, x509.Certificate):
            return found.public_key(), _certificate_id(found)
    except Exception:  # noqa: BLE001  # whatever a parser raises: these bytes are not its
        return None
    return found, None


def _certificate_id(certificate: x509.Certificate) -> int | None:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return None
    digest = found.value.digest
    return int.from_bytes(digest[-4:], "big") if len(digest) >= 4 else None


def is_signed(signature: bytes, digest: bytes, algorithm: str, keys: KeySet) -> bool:
    """Whether one of some keys has signed a file's digest.

    Args:
        signature: the attribute, untrusted.
        algorithm: of the digest, as the list says; the signature must be for the same.
    """
    if len(signature) < _HEADER.size:
        return False
    kind, version, hash_number, key_id, size = _HEADER.unpack_from(signature)
    if kind not in (IMA_SIGNATURE, PORTABLE_SIGNATURE) or version != SIGNATURE_VERSION:
        return False
    hashed = _HASHES.get(hash_number)
    if hashed is None or hashed.name != algorithm or hashed.digest_size != len(digest):
        return False
    value = signature[_HEADER.size :]
    if len(value) != size:
        return False
    return any(_verifies(known.key, value, digest, hashed) for known in keys if known.id == key_id)


def _verifies(key: PublicKey, value: bytes, digest: bytes, hashed: hashes.HashAlgorithm) -> bool:
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(value, digest, padding.PKCS1v15(), Prehashed(hashed))
        else:
            key.verify(value, digest, ec.ECDSA(Prehashed(hashed)))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True
