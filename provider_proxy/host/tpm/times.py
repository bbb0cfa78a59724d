"""How long a chip takes for the commands that matter here. Pure: opens no TPM."""

from __future__ import annotations

from dataclasses import dataclass

SMALL_COMMAND_S = 0.0047  # the median of 135 chips for a TPM2_Hash (TPMScan)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipTimes:
    """A chip's times, in seconds.

    Attributes:
        quote_s: TPM2_Quote.
        read_s: TPM2_PCR_Read, of up to 8 PCRs.
        extend_s: TPM2_PCR_Extend, which the kernel's IMA waits for.
        other_s: any other small command.
    """

    quote_s: float
    read_s: float = SMALL_COMMAND_S
    extend_s: float = SMALL_COMMAND_S
    other_s: float = SMALL_COMMAND_S
