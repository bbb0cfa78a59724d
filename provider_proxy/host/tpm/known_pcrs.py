"""Which PCR values are known, and which PCRs must be read before the next quote.

A value is known if it was part of a set that hashed to a quote's pcrDigest. It may be used again if the
set that contains it hashes to the next quote's digest: the digest decides, not the age of a value. A PCR
that changed within the last quotes is read before the quote, because reading it afterwards may be too
late and need a second quote. Pure: uses no TPM. One thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from provider_proxy.evidence.model import HashAlg, PcrValues, pcrs_of

READ_AT_ONCE = 8  # the most that TPM2_PCR_Read returns: TPML_DIGEST holds 8, Part 2, section 10.9.6
STILL_QUOTES = 4  # a PCR with the same value in this many quotes is stable. IMA comes in bursts.


@dataclass(slots=True)
class _Pcr:
    value: bytes
    still: int = STILL_QUOTES  # quotes since it changed; stable until it is seen to change


@dataclass(slots=True)
class KnownPcrs:
    """The known values of one TPM, by bank and PCR."""

    _banks: dict[HashAlg, dict[int, _Pcr]] = field(default_factory=dict)

    def values(self, bank: HashAlg, mask: int) -> dict[int, bytes]:
        """The known values of a mask, without the PCRs that are not known."""
        known = self._banks.get(bank, {})
        return {pcr: known[pcr].value for pcr in pcrs_of(mask) if pcr in known}

    def to_read(self, bank: HashAlg, mask: int) -> int:
        """The part of a mask to read before the quote; 0 if all its PCRs are known and stable.

        The free places of the last command are filled with the PCRs that changed last. That takes no
        extra command, and they need not be read after the quote if one of them has changed.
        """
        known = self._banks.get(bank, {})
        must = [pcr for pcr in pcrs_of(mask) if pcr not in known or known[pcr].still < STILL_QUOTES]
        if not must:
            return 0
        may = sorted(set(pcrs_of(mask)).difference(must), key=lambda pcr: (known[pcr].still, pcr))
        room = -len(must) % READ_AT_ONCE
        return sum(1 << pcr for pcr in (*must, *may[:room]))

    def learn(self, quoted: PcrValues) -> None:
        """Keep values that hashed to a quote's pcrDigest, and note which of them changed."""
        known = self._banks.setdefault(quoted.bank, {})
        for pcr, value in quoted.values:
            seen = known.get(pcr)
            if seen is None:
                known[pcr] = _Pcr(value)
            elif seen.value == value:
                seen.still += 1
            else:
                known[pcr] = _Pcr(value, still=0)

    def forget(self) -> None:
        """Forget all values."""
        self._banks.clear()
