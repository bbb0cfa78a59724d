"""A TPM of software, for tests, vectors and benchmarks: real structures, real signatures, no chip.

It writes TPMS_ATTEST, TPMT_SIGNATURE and TPM2B_PUBLIC byte for byte as a TPM does, so that whatever
verifies here verifies there; the contract tests hold it against swtpm. Nobody may trust its key: it
lies in this process's memory. The daemon has no option that leads here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from provider_proxy.evidence import tpm_keys
from provider_proxy.evidence.attestation import TPM_GENERATED, TPM_ST_ATTEST_QUOTE
from provider_proxy.evidence.model import (
    AttestationKey,
    ClockState,
    HashAlg,
    PcrValues,
    Quote,
    pcrs_of,
)

AK_ATTRIBUTES = sum(tpm_keys.AK_MUST_HAVE.values()) | 1 << 6  # userWithAuth

EK_ATTRIBUTES = 0x000300B2  # fixedTPM, fixedParent, origin, adminWithPolicy, restricted, decrypt
EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")


def _tpm2b(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def encode_public(
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, attributes: int = AK_ATTRIBUTES
) -> bytes:
    """The TPM2B_PUBLIC of a P-256 ECDSA or an RSASSA signing key with these attributes."""
    null = tpm_keys.TPM_ALG_NULL
    if isinstance(key, ec.EllipticCurvePublicKey):
        point = key.public_numbers()
        kind, scheme = tpm_keys.TPM_ALG_ECC, tpm_keys.TPM_ALG_ECDSA
        unique = _tpm2b(point.x.to_bytes(32, "big")) + _tpm2b(point.y.to_bytes(32, "big"))
        detail = struct.pack(">HH", 3, null)
    else:
        kind, scheme = tpm_keys.TPM_ALG_RSA, tpm_keys.TPM_ALG_RSASSA
        unique = _tpm2b(key.public_numbers().n.to_bytes(key.key_size // 8, "big"))
        detail = struct.pack(">HI", key.key_size, 0)
    area = struct.pack(">HHI", kind, HashAlg.SHA256, attributes) + _tpm2b(b"")
    area += struct.pack(">HHH", null, scheme, HashAlg.SHA256) + detail + unique
    return _tpm2b(area)


def encode_ek(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    """The TPM2B_PUBLIC of an RSA-2048 or P-256 EK (TCG EK Credential Profile, templates L-1 and L-2)."""
    null = tpm_keys.TPM_ALG_NULL
    symmetric = struct.pack(">HHH", 0x0006, 128, 0x0043)  # AES-128 in CFB mode
    if isinstance(key, ec.EllipticCurvePublicKey):
        point = key.public_numbers()
        kind, detail = tpm_keys.TPM_ALG_ECC, struct.pack(">HHH", null, 3, null)
        unique = _tpm2b(point.x.to_bytes(32, "big")) + _tpm2b(point.y.to_bytes(32, "big"))
    else:
        kind, detail = tpm_keys.TPM_ALG_RSA, struct.pack(">HHI", null, key.key_size, 0)
        unique = _tpm2b(key.public_numbers().n.to_bytes(key.key_size // 8, "big"))
    area = struct.pack(">HHI", kind, HashAlg.SHA256, EK_ATTRIBUTES) + _tpm2b(EK_POLICY)
    return _tpm2b(area + symmetric + detail + unique)


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
) -> bytes:
    """A TPMS_ATTEST of type quote."""
    signer = HashAlg.SHA256.to_bytes(2, "big") + bytes(32)
    return b"".join(
        (
            struct.pack(">IH", magic, kind),
            _tpm2b(signer),
            _tpm2b(qualifying),
            struct.pack(">QIIB", clock.clock_ms, clock.reset_count, clock.restart_count, safe),
            struct.pack(">Q", 0x20191023_00163636),
            struct.pack(">IHB", 1, bank, 3) + mask.to_bytes(3, "little"),
            _tpm2b(pcr_digest),
        )
    )


class SoftTpm:
    """One AK, one set of PCRs, a clock that moves a millisecond a quote.

    Args:
        key: the AK's private key; a new P-256 key where None.
        pcrs: PCR number to content (hashed into each bank); the others are zero.
    """

    def __init__(
        self,
        *,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
        pcrs: Mapping[int, bytes] | None = None,
        clock: ClockState | None = None,
    ) -> None:
        self._key = key or ec.generate_private_key(ec.SECP256R1())
        self._pcrs = dict(pcrs or {})
        self.clock = clock or ClockState(reset_count=1, restart_count=0, clock_ms=1000)
        self.ak_public = encode_public(self._key.public_key())
        self.ak: AttestationKey = tpm_keys.parse_ak(self.ak_public)

    def extend(self, pcr: int, event: bytes) -> None:
        """Change a PCR's content, so that later quotes show another value."""
        self._pcrs[pcr] = self._pcrs.get(pcr, b"") + event

    def read(self, bank: HashAlg, mask: int) -> PcrValues:
        """The values of some PCRs."""
        return PcrValues(
            bank=bank,
            values=tuple(
                (n, bank.digest(self._pcrs[n]) if n in self._pcrs else bytes(bank.digest_bytes))
                for n in pcrs_of(mask)
            ),
        )

    def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        """What TPM2_Quote and TPM2_PCR_Read give."""
        clock = self.clock
        self.clock = ClockState(
            reset_count=clock.reset_count,
            restart_count=clock.restart_count,
            clock_ms=clock.clock_ms + 1,
        )
        values = self.read(bank, mask)
        attest = encode_attest(
            qualifying=qualifying,
            clock=clock,
            bank=bank,
            mask=mask,
            pcr_digest=HashAlg.SHA256.digest(values.concatenated()),
        )
        return Quote(attest=attest, signature=self.sign(attest), pcrs=values)

    def sign(self, data: bytes) -> bytes:
        """A TPMT_SIGNATURE over any bytes: what a restricted key in a TPM would refuse."""
        if isinstance(self._key, rsa.RSAPrivateKey):
            value = self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())
            return struct.pack(">HH", tpm_keys.TPM_ALG_RSASSA, HashAlg.SHA256) + _tpm2b(value)
        r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
        return (
            struct.pack(">HH", tpm_keys.TPM_ALG_ECDSA, HashAlg.SHA256)
            + _tpm2b(r.to_bytes(32, "big"))
            + _tpm2b(s.to_bytes(32, "big"))
        )
