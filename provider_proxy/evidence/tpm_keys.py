"""From an untrusted TPM2B_PUBLIC to an attestation key whose attributes were checked.

A registrar stores any key that it is sent. Only these attributes, inside the name that credential
activation bound, show that the private part never left a TPM and signs nothing but TPM structures.
Source: TPM 2.0 Library Part 2, sections 8.3 (TPMA_OBJECT) and 12.2 (TPMT_PUBLIC).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from provider_proxy.errors import EvidenceFormatError, UntrustedAkError
from provider_proxy.evidence.model import AkName, AttestationKey, HashAlg
from provider_proxy.evidence.pem import one_part
from provider_proxy.evidence.tpm_reader import Reader

TPM_ALG_RSA = 0x0001
TPM_ALG_NULL = 0x0010
TPM_ALG_RSASSA = 0x0014
TPM_ALG_ECDSA = 0x0018
TPM_ALG_ECDAA = 0x001A
TPM_ALG_ECC = 0x0023

FIXED_TPM = 1 << 1
FIXED_PARENT = 1 << 4
SENSITIVE_DATA_ORIGIN = 1 << 5
USER_WITH_AUTH = 1 << 6
RESTRICTED = 1 << 16
DECRYPT = 1 << 17
SIGN = 1 << 18
AK_MUST_HAVE = {
    "fixedTPM": FIXED_TPM,
    "fixedParent": FIXED_PARENT,
    "sensitiveDataOrigin": SENSITIVE_DATA_ORIGIN,
    "restricted": RESTRICTED,
    "sign": SIGN,
}

BRIDGE_LABEL = b"provider-proxy/bridge/1"
BRIDGE_POLICY = hashlib.sha256(BRIDGE_LABEL).digest()
"""The authPolicy of the key that `bridge` answers a tenant's verifier with. It is a key of software, so
its name says what it is, wherever the key goes: no pin and no record of it passes for a host's."""

MAX_PUBLIC_BYTES = 1024  # RSA-4096 with a policy is 600
MAX_KEY_PART_BYTES = 512  # an RSA-4096 modulus
MIN_RSA_BITS = 2048
DEFAULT_RSA_EXPONENT = 65537  # a TPM writes 0 for it
SIGNING_HASHES = (HashAlg.SHA256, HashAlg.SHA384, HashAlg.SHA512)
CURVES: dict[int, ec.EllipticCurve] = {3: ec.SECP256R1(), 4: ec.SECP384R1(), 5: ec.SECP521R1()}
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
SIGN_ALGS = {TPM_ALG_RSASSA: "rsassa", TPM_ALG_ECDSA: "ecdsa"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmPublic:
    """A parsed TPM2B_PUBLIC of an RSA or EC key (AK or EK).

    Attributes:
        attributes: TPMA_OBJECT bits.
        auth_policy: a digest; empty where the key has none.
        has_symmetric: True for a storage key (an EK), which wraps others.
        scheme: TPM_ALG_ID of the signing scheme; TPM_ALG_NULL where the key has none.
        scheme_hash: TPM_ALG_ID of the scheme's hash; 0 where it has none.
    """

    name: AkName
    attributes: int
    auth_policy: bytes
    has_symmetric: bool
    scheme: int
    scheme_hash: int
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def parse_public(data: bytes) -> TpmPublic:
    """Read a TPM2B_PUBLIC (size included) of an RSA or EC key.

    Does not check: attributes; `parse_ak` does for an AK.

    Raises:
        EvidenceFormatError: not such a structure, an unknown algorithm, a point off its curve.
    """
    if len(data) > MAX_PUBLIC_BYTES:
        raise EvidenceFormatError("TPM2B_PUBLIC is too long")
    outer = Reader(data, "TPM2B_PUBLIC")
    area = outer.sized(MAX_PUBLIC_BYTES)
    outer.end()
    read = Reader(area, "TPMT_PUBLIC")
    kind = read.uint(2)
    try:
        name_alg = HashAlg(read.uint(2))
    except ValueError:
        raise EvidenceFormatError("TPMT_PUBLIC has an unknown name algorithm") from None
    attributes = read.uint(4)
    auth_policy = read.sized(64)
    has_symmetric = read.uint(2) != TPM_ALG_NULL
    if has_symmetric:
        read.take(4)  # keyBits, mode
    scheme = read.uint(2)
    scheme_hash = 0 if scheme == TPM_ALG_NULL else read.uint(2)
    if scheme == TPM_ALG_ECDAA:
        read.take(2)  # count
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
    if kind == TPM_ALG_RSA:
        key = _read_rsa(read)
    elif kind == TPM_ALG_ECC:
        key = _read_ecc(read)
    else:
        raise EvidenceFormatError(f"TPMT_PUBLIC is of type {kind:#06x}, neither RSA nor ECC")
    read.end()
    return TpmPublic(
        name=AkName(name_alg.to_bytes(2, "big") + name_alg.digest(area)),
        attributes=attributes,
        auth_policy=auth_policy,
        has_symmetric=has_symmetric,
        scheme=scheme,
        scheme_hash=scheme_hash,
        public_key=key,
    )


def _read_rsa(read: Reader) -> rsa.RSAPublicKey:
    bits = read.uint(2)
    exponent = read.uint(4) or DEFAULT_RSA_EXPONENT
    modulus = read.sized(MAX_KEY_PART_BYTES)
    if bits % 8 or len(modulus) * 8 != bits:
        raise EvidenceFormatError("the RSA modulus does not have keyBits bits")
    try:
        return rsa.RSAPublicNumbers(exponent, int.from_bytes(modulus, "big")).public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise EvidenceFormatError("the RSA key is not usable") from exc


def _read_ecc(read: Reader) -> ec.EllipticCurvePublicKey:
    curve = CURVES.get(read.uint(2))
    if curve is None:
        raise EvidenceFormatError("the key's elliptic curve is unknown")
    if read.uint(2) != TPM_ALG_NULL:  # kdf
        read.take(2)
    x = int.from_bytes(read.sized(MAX_KEY_PART_BYTES), "big")
    y = int.from_bytes(read.sized(MAX_KEY_PART_BYTES), "big")
    try:
        key = ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise EvidenceFormatError("the key is not a point of its curve") from exc
    numbers = key.public_numbers()
    if (numbers.x, numbers.y) != (x, y):  # the library reduces them: two names for one key
        raise EvidenceFormatError("a coordinate of the key is not reduced")
    return key


def parse_ak(data: bytes) -> AttestationKey:
    """Read a TPM2B_PUBLIC and accept it only as an attestation key.

    Does not check: that a real TPM has it; credential activation and pins do.

    Raises:
        EvidenceFormatError: see `parse_public`.
        UntrustedAkError: attributes, scheme, hash or size are not those of an AK, or it is a bridge's.
    """
    public = parse_public(data)
    if hmac.compare_digest(public.auth_policy, BRIDGE_POLICY):
        raise UntrustedAkError(
            "the key is that of a provider-proxy bridge, which answers for hosts and is not a host: give "
            "the host's own AK, or the id under which the host itself is registered"
        )
    missing = [name for name, bit in AK_MUST_HAVE.items() if not public.attributes & bit]
    if missing:
        raise UntrustedAkError("the key is not an attestation key: not " + ", ".join(missing))
    if public.attributes & DECRYPT:
        raise UntrustedAkError("the key is not an attestation key: it may decrypt")
    is_ecc = isinstance(public.public_key, ec.EllipticCurvePublicKey)
    if public.has_symmetric or public.scheme != (TPM_ALG_ECDSA if is_ecc else TPM_ALG_RSASSA):
        raise UntrustedAkError(
            "the AK's scheme is neither ECDSA with an EC key nor RSASSA with an RSA key"
        )
    if public.scheme_hash not in SIGNING_HASHES:
        raise UntrustedAkError("the hash of the AK's scheme is not SHA-256, SHA-384 or SHA-512")
    if public.name[:2] == HashAlg.SHA1.to_bytes(2, "big"):
        raise UntrustedAkError("the AK's name is a SHA-1 digest")
    if public.public_key.key_size < (256 if is_ecc else MIN_RSA_BITS):
        raise UntrustedAkError("the AK is too short")
    return AttestationKey(
        public_key=public.public_key,
        name=public.name,
        sign_alg=SIGN_ALGS[public.scheme],
        signature_hash=HashAlg(public.scheme_hash),
    )


def insecure_ak_from_pem(pem: bytes) -> AttestationKey:
    """Take a bare public key for an AK. Unsafe: any software key passes.

    A PEM carries no attributes, so nothing says that a TPM made what this key signed.

    Raises:
        UntrustedAkError: not a PEM of an RSA key of 2048 bits or a P-256/P-384/P-521 key.
    """
    try:
        key = load_pem_public_key(one_part(pem))
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise UntrustedAkError(f"not a PEM public key: {exc}") from exc
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in {
        curve.name for curve in CURVES.values()
    }:
        sign_alg = "ecdsa"
    elif isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        sign_alg = "rsassa"
    else:
        raise UntrustedAkError(
            "the PEM's key is neither RSA of 2048 bits or more nor EC on P-256, P-384 or P-521"
        )
    return AttestationKey(
        public_key=key, name=AkName(b""), sign_alg=sign_alg, signature_hash=HashAlg.SHA256
    )
