"""What the bridge tells Keylime about a host: a quote over the verifier's nonce, under the bridge's AK.

Pure except for the signature. PCR values, clock and firmware version come from a verified host; PCR 16 is
the agent's own, as with Keylime's agents: it holds the key for payloads and with it the agent's id, so
that no agent of a bridge is taken for another of the same bridge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol
from uuid import UUID

from provider_proxy.errors import ClockError
from provider_proxy.evidence.model import (
    PCR_COUNT,
    ClockState,
    HashAlg,
    Nonce,
    PcrValues,
    Quote,
)
from provider_proxy.evidence.tpm_keys import BRIDGE_LABEL, TPM_ALG_NULL
from provider_proxy.evidence.tpm_writer import encode_attest, encode_certify, encode_rsassa
from provider_proxy.evidence.wire import encode_quote

DATA_PCR = 16
CLOCK_BITS = 41  # 69 years of milliseconds; 23 bits are left, for 8 million resets
MAX_BOOTTIME = (1 << 31) - 1  # Keylime keeps it in a signed 32-bit column
RANDOM_BYTES = 32
MAX_PART_BYTES = 255  # its length is one byte


class Signer(Protocol):
    """`BridgeKeys`."""

    @property
    def ak_name(self) -> bytes: ...

    def sign(self, data: bytes) -> bytes:
        """RSASSA with SHA-256."""
        ...


def agent_id_of(ek_public: bytes, name: str) -> str:
    """The id of a host's agent: made from this bridge's EK and the host's name, so it is unique.

    Args:
        ek_public: the bridge's.
        name: of the host in the file.
    """
    text = BRIDGE_LABEL + b"\0agent\0" + hashlib.sha256(ek_public).digest() + name.encode("ascii")
    return str(UUID(bytes=hashlib.sha256(text).digest()[:16], version=5))


def host_nonce(random: bytes, nonce: bytes, agent_id: str) -> Nonce:
    """The nonce for the host: its parts prove that it was made after the verifier's.

    Args:
        random: 32 random bytes, fresh for each question.
        nonce: the verifier's.
    """
    text = BRIDGE_LABEL + b"\0" + random
    for part in (nonce, agent_id.encode("ascii")):
        text += bytes([len(part)]) + part
    return Nonce(hashlib.sha256(text).hexdigest().encode("ascii"))


def data_pcr(text: str) -> bytes:
    """What an agent's PCR 16 holds: the key for payloads, as the text that it shows."""
    return hashlib.sha256(bytes(32) + hashlib.sha256(text.encode("ascii")).digest()).digest()


def shown_clock(clock: ClockState) -> ClockState:
    """The host's clock as Keylime can follow it.

    Keylime permanently refuses a clock that is not above the last one (a chip's falls at a reset), a
    restart_count that falls (a reset zeroes it), and safe = 0 (after a crash). `Verifier` has judged all
    that with the real values. This clock rises exactly when the host's does, over restarts of both sides.

    Raises:
        ClockError: the values are beyond what a chip reaches.
    """
    if clock.reset_count >> (64 - CLOCK_BITS) or clock.clock_ms >> CLOCK_BITS:
        raise ClockError(
            f"reset count {clock.reset_count} and clock {clock.clock_ms} ms are too large to be "
            "shown to Keylime"
        )
    return ClockState(
        reset_count=clock.reset_count,
        restart_count=0,
        clock_ms=(clock.reset_count << CLOCK_BITS) + clock.clock_ms,
    )


def shown_boottime(clock: ClockState) -> int:
    """What Keylime compares to notice a reboot: never 0, different after each reset."""
    return clock.reset_count % MAX_BOOTTIME + 1


def make_quote(
    signer: Signer, *, nonce: bytes, pcrs: Mapping[int, bytes], clock: ClockState, firmware: int
) -> str:
    """Keylime's quote string.

    Args:
        nonce: the verifier's, as it came.
        pcrs: values of the SHA-256 bank, PCR 16 included.
        clock: as `shown_clock` gives it.
    """
    values = PcrValues(bank=HashAlg.SHA256, values=tuple(sorted(pcrs.items())))
    attest = encode_attest(
        qualifying=nonce,
        clock=clock,
        bank=HashAlg.SHA256,
        mask=values.mask,
        pcr_digest=hashlib.sha256(values.concatenated()).digest(),
        signer=signer.ak_name,
        firmware_version=firmware,
    )
    signature = encode_rsassa(signer.sign(attest))
    return encode_quote(Quote(attest=attest, signature=signature, pcrs=values))


def make_unsigned(mask: int) -> str:
    """An unsigned quote string: it names PCRs, all zero, and its signature is TPM_ALG_NULL.

    Keylime reads it, and refuses its signature's algorithm before it uses anything else of it.
    """
    values = PcrValues(
        bank=HashAlg.SHA256,
        values=tuple((pcr, bytes(32)) for pcr in range(PCR_COUNT) if mask >> pcr & 1),
    )
    attest = encode_attest(
        qualifying=b"refused",
        clock=ClockState(reset_count=0, restart_count=0, clock_ms=0),
        bank=HashAlg.SHA256,
        mask=values.mask,
        pcr_digest=hashlib.sha256(values.concatenated()).digest(),
    )
    null = TPM_ALG_NULL.to_bytes(2, "big") + HashAlg.SHA256.to_bytes(2, "big")
    return encode_quote(Quote(attest=attest, signature=null, pcrs=values))


def make_possession(signer: Signer, challenge: bytes) -> tuple[bytes, bytes]:
    """Proves to a verifier in push mode that the agent has the AK: TPMS_ATTEST and TPMT_SIGNATURE."""
    attest = encode_certify(qualifying=challenge, name=signer.ak_name, signer=signer.ak_name)
    return attest, encode_rsassa(signer.sign(attest))
