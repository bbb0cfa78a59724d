"""A TPM of software, for tests, vectors and benchmarks: real structures, real signatures, no chip.

It writes TPMS_ATTEST, TPMT_SIGNATURE and TPM2B_PUBLIC byte for byte as a TPM does, so that what
verifies here verifies there; the contract tests compare it with swtpm. Its key must not be trusted: it
lies in this process's memory. The daemon has no option that leads here.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from provider_proxy.evidence import tpm_keys
from provider_proxy.evidence.model import (
    AttestationKey,
    ClockState,
    HashAlg,
    PcrValues,
    Quote,
    pcrs_of,
)
from provider_proxy.evidence.tpm_writer import encode_attest, encode_public, encode_rsassa, tpm2b


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
        self.clock_safe = True  # False after a crash, for a while
        self.clock = clock or ClockState(reset_count=1, restart_count=0, clock_ms=1000)
        self.ak_public = encode_public(self._key.public_key())
        self.ak: AttestationKey = tpm_keys.parse_ak(self.ak_public)

    def extend(self, pcr: int, event: bytes) -> None:
        """Change a PCR's content, so that later quotes show another value."""
        self._pcrs[pcr] = self._pcrs.get(pcr, b"") + event

    def reset(self, pcrs: Mapping[int, bytes]) -> None:
        """The host reboots, and measures this."""
        self._pcrs = dict(pcrs)
        clock = self.clock
        self.clock = dataclasses.replace(clock, reset_count=clock.reset_count + 1)

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
            safe=int(self.clock_safe),
        )
        return Quote(attest=attest, signature=self.sign(attest), pcrs=values)

    def sign(self, data: bytes) -> bytes:
        """A TPMT_SIGNATURE over any bytes: what a restricted key in a TPM would refuse."""
        if isinstance(self._key, rsa.RSAPrivateKey):
            value = self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())
            return encode_rsassa(value)
        r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
        return (
            struct.pack(">HH", tpm_keys.TPM_ALG_ECDSA, HashAlg.SHA256)
            + tpm2b(r.to_bytes(32, "big"))
            + tpm2b(s.to_bytes(32, "big"))
        )
