"""Which PCR values are known, and which PCRs must be read before the next quote.

A value is known when it was part of a set that hashed to a quote's pcrDigest. It may be used again
where the set that it is part of hashes to the next quote's digest: the digest decides, not the age of
a value. A PCR that moved within the last quotes is read before the quote, because a reading after it
may come too late and cost a second quote. Pure: knows no TPM. One thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from provider_proxy.evidence.model import HashAlg, PcrValues, pcrs_of

READ_AT_ONCE = 8  # what TPM2_PCR_Read returns at most: TPML_DIGEST holds 8, Part 2, section 10.9.6
STILL_QUOTES = 4  # a PCR that kept its value in so many quotes is at rest. IMA comes in bursts.


@dataclass(slots=True)
class _Pcr:
    value: bytes
    still: int = STILL_QUOTES  # quotes since it moved; at rest until it is seen to move


@dataclass(slots=True)
class KnownPcrs:
    """The known values of one TPM, by bank and PCR."""

    _banks: dict[HashAlg, dict[int, _Pcr]] = field(default_factory=dict)

    def values(self, bank: HashAlg, mask: int) -> dict[int, bytes]:
        """The known values of a mask; PCRs that are not known are left out."""
        known = self._banks.get(bank, {})
        return {pcr: known[pcr].value for pcr in pcrs_of(mask) if pcr in known}

    def to_read(self, bank: HashAlg, mask: int) -> int:
        """The part of a mask to read before the quote; 0 where all its PCRs are known and at rest.

        The room that is left in the last command is filled with the PCRs that moved last. That costs
        no command, and they need no reading after the quote if one of them has moved.
        """
        known = self._banks.get(bank, {})
        must = [pcr for pcr in pcrs_of(mask) if pcr not in known or known[pcr].still < STILL_QUOTES]
        if not must:
            return 0
        may = sorted(set(pcrs_of(mask)).difference(must), key=lambda pcr: (known[pcr].still, pcr))
        room = -len(must) % READ_AT_ONCE
        return sum(1 << pcr for pcr in (*must, *may[:room]))

    def learn(self, quoted: PcrValues) -> None:
        """Keep values that hashed to a quote's pcrDigest, and see which of them moved."""
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
        """Know nothing any more."""
        self._banks.clear()
