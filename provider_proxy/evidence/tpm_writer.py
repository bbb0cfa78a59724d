"""Writes a TPM's structures, byte for byte as a TPM does: public areas, a quote's attest, signatures.

The readers of this folder read what it writes. A TPM of software (`testing.soft_tpm`) and the tenant's
bridge use it. Does not check whether a key is trusted. Source: TPM 2.0 Library Part 2.
"""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from provider_proxy.evidence import tpm_keys
from provider_proxy.evidence.attestation import TPM_GENERATED, TPM_ST_ATTEST_QUOTE
from provider_proxy.evidence.model import ClockState, HashAlg

TPM_ST_ATTEST_CERTIFY = 0x8017
SOFT_FIRMWARE = 0x20191023_00163636
AK_ATTRIBUTES = sum(tpm_keys.AK_MUST_HAVE.values()) | 1 << 6  # userWithAuth

EK_ATTRIBUTES = 0x000300B2  # fixedTPM, fixedParent, origin, adminWithPolicy, restricted, decrypt
EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")


def tpm2b(data: bytes) -> bytes:
    """Sized bytes: u16 length, then the bytes."""
    return len(data).to_bytes(2, "big") + data


def encode_public(
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    attributes: int = AK_ATTRIBUTES,
    auth_policy: bytes = b"",
) -> bytes:
    """The TPM2B_PUBLIC of a P-256 ECDSA or an RSASSA signing key with these attributes."""
    null = tpm_keys.TPM_ALG_NULL
    if isinstance(key, ec.EllipticCurvePublicKey):
        point = key.public_numbers()
        kind, scheme = tpm_keys.TPM_ALG_ECC, tpm_keys.TPM_ALG_ECDSA
        unique = tpm2b(point.x.to_bytes(32, "big")) + tpm2b(point.y.to_bytes(32, "big"))
        detail = struct.pack(">HH", 3, null)
    else:
        kind, scheme = tpm_keys.TPM_ALG_RSA, tpm_keys.TPM_ALG_RSASSA
        unique = tpm2b(key.public_numbers().n.to_bytes(key.key_size // 8, "big"))
        detail = struct.pack(">HI", key.key_size, 0)
    area = struct.pack(">HHI", kind, HashAlg.SHA256, attributes) + tpm2b(auth_policy)
    area += struct.pack(">HHH", null, scheme, HashAlg.SHA256) + detail + unique
    return tpm2b(area)


def encode_ek(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    """The TPM2B_PUBLIC of an RSA-2048 or P-256 EK (TCG EK Credential Profile, templates L-1 and L-2)."""
    null = tpm_keys.TPM_ALG_NULL
    symmetric = struct.pack(">HHH", 0x0006, 128, 0x0043)  # AES-128 in CFB mode
    if isinstance(key, ec.EllipticCurvePublicKey):
        point = key.public_numbers()
        kind, detail = tpm_keys.TPM_ALG_ECC, struct.pack(">HHH", null, 3, null)
        unique = tpm2b(point.x.to_bytes(32, "big")) + tpm2b(point.y.to_bytes(32, "big"))
    else:
        kind, detail = tpm_keys.TPM_ALG_RSA, struct.pack(">HHI", null, key.key_size, 0)
        unique = tpm2b(key.public_numbers().n.to_bytes(key.key_size // 8, "big"))
    area = struct.pack(">HHI", kind, HashAlg.SHA256, EK_ATTRIBUTES) + tpm2b(EK_POLICY)
    return tpm2b(area + symmetric + detail + unique)


def encode_attest(
    *,
    qualifying: bytes,
    clock: ClockState,
    bank: int,
    mask: int,
    pcr_digest: bytes,
    magic: int = TPM_GENERATED,
    kind: int = TPM_ST_ATTEST_QUOTE,
    safe: int = 1,
    signer: bytes = HashAlg.SHA256.to_bytes(2, "big") + bytes(32),
    firmware_version: int = SOFT_FIRMWARE,
) -> bytes:
    """A TPMS_ATTEST of type quote.

    Args:
        signer: the signing key's qualified name.
    """
    return b"".join(
        (
            struct.pack(">IH", magic, kind),
            tpm2b(signer),
            tpm2b(qualifying),
            struct.pack(">QIIB", clock.clock_ms, clock.reset_count, clock.restart_count, safe),
            struct.pack(">Q", firmware_version),
            struct.pack(">IHB", 1, bank, 3) + mask.to_bytes(3, "little"),
            tpm2b(pcr_digest),
        )
    )


def encode_certify(*, qualifying: bytes, name: bytes, signer: bytes) -> bytes:
    """A TPMS_ATTEST of type certify: its signer has the object of this name.

    Args:
        signer: the signing key's qualified name.
    """
    return b"".join(
        (
            struct.pack(">IH", TPM_GENERATED, TPM_ST_ATTEST_CERTIFY),
            tpm2b(signer),
            tpm2b(qualifying),
            struct.pack(">QIIB", 0, 0, 0, 1),
            struct.pack(">Q", SOFT_FIRMWARE),
            tpm2b(name),
            tpm2b(name),
        )
    )


def encode_rsassa(signature: bytes) -> bytes:
    """The TPMT_SIGNATURE of an RSASSA signature with SHA-256."""
    return struct.pack(">HH", tpm_keys.TPM_ALG_RSASSA, HashAlg.SHA256) + tpm2b(signature)
