"""What a tenant demands of a host, judged on what the TPM signed for this very request.

A policy reads a `VerifiedQuote` and raises `PolicyError`, or accepts it. It fails closed: an empty
policy refuses, and the one that accepts anything is called `UnsafeAcceptAny`.
"""

from __future__ import annotations

import hmac
import string
from collections.abc import Iterable, Mapping
from typing import Protocol

from provider_proxy.errors import PolicyError, UsageError
from provider_proxy.evidence.model import PCR_COUNT, HashAlg, VerifiedQuote, mask_of


class Policy(Protocol):
    """Judges a verified quote."""

    @property
    def needed_mask(self) -> int:
        """The PCRs that it reads; they must lie inside the requested mask."""
        ...

    def check(self, quote: VerifiedQuote) -> None:
        """Raises: PolicyError where the host is not as wanted."""
        ...


class UnsafeAcceptAny:
    """Accepts every state of a host: proves only that *some* state was signed for this nonce."""

    needed_mask = 0

    def check(self, quote: VerifiedQuote) -> None:
        """Accepts."""


class AllOf:
    """Every one of its policies must accept; an empty one refuses."""

    def __init__(self, policies: Iterable[Policy]) -> None:
        self._policies = tuple(policies)

    @property
    def needed_mask(self) -> int:
        mask = 0
        for policy in self._policies:
            mask |= policy.needed_mask
        return mask

    def check(self, quote: VerifiedQuote) -> None:
        """Raises: PolicyError from the first that refuses, or where there is no policy."""
        if not self._policies:
            raise PolicyError("the policy is empty, and an empty policy refuses every host")
        for policy in self._policies:
            policy.check(quote)


class PcrPolicy:
    """Each named PCR must have one of its allowed values.

    Args:
        allowed: PCR number to the digests that are good.
        bank: the bank that the digests are of.

    Raises:
        UsageError: no PCR, no value for a PCR, a PCR beyond 23, a digest of the wrong length.
    """

    def __init__(
        self, allowed: Mapping[int, Iterable[bytes]], *, bank: HashAlg = HashAlg.SHA256
    ) -> None:
        self._bank = bank
        self._allowed = {pcr: tuple(digests) for pcr, digests in allowed.items()}
        if not self._allowed:
            raise UsageError("a PCR policy must name at least one PCR")
        for pcr, digests in self._allowed.items():
            if not 0 <= pcr < PCR_COUNT:
                raise UsageError(f"PCR {pcr} is not in 0 to 23")
            if not digests or any(len(digest) != bank.digest_bytes for digest in digests):
                raise UsageError(
                    f"PCR {pcr} has no value, or one that is not a {bank.label} digest"
                )

    @property
    def needed_mask(self) -> int:
        return mask_of(self._allowed)

    def check(self, quote: VerifiedQuote) -> None:
        """Raises: PolicyError naming the first PCR that is not as allowed, and its value."""
        if quote.bank != self._bank:
            raise PolicyError(f"the quote is of bank {quote.bank.label}, not {self._bank.label}")
        for pcr, digests in sorted(self._allowed.items()):
            value = quote.pcrs.get(pcr)
            if value is None:
                raise PolicyError(f"PCR {pcr} is not in the quote")
            if not any(hmac.compare_digest(value, digest) for digest in digests):
                raise PolicyError(f"PCR {pcr} is {value.hex()}, which the policy does not allow")


def _of_bank(pcr: int, digests: list[bytes], bank: HashAlg) -> list[bytes]:
    for digest in digests:
        if all(len(digest) != alg.digest_bytes for alg in HashAlg):
            raise UsageError(
                f"the policy's PCR {pcr} has a value of {len(digest)} bytes: "
                "no bank's digest has this length"
            )
    found = [digest for digest in digests if len(digest) == bank.digest_bytes]
    if digests and not found:
        raise UsageError(
            f"the policy's PCR {pcr} has digests of other banks only, and needs one of {bank.label}"
        )
    return found


def parse_tpm_policy(values: Mapping[str, object], *, bank: HashAlg = HashAlg.SHA256) -> PcrPolicy:
    """Read Keylime's `tpm_policy`: `{"0": ["hex", …], "mask": "0x1"}`.

    Values of other banks may stand beside those of this one, as in Keylime's documents: they match no
    quote of this bank and are passed over. A PCR that has none of this bank is refused, and so is a
    value that has the length of no bank's digest.

    A `mask` must be the mask of the PCRs named, or it is refused: Keylime adds it by itself, and
    a mask that says more than the values would look stricter than it is.

    Raises:
        UsageError: not such an object.
    """
    allowed: dict[int, list[bytes]] = {}
    for key, entry in values.items():
        if key == "mask":
            continue
        if not key.isdecimal() or not key.isascii() or len(key) > 2:
            raise UsageError(f"the policy's key {key!r} is not a PCR number")
        listed = entry if isinstance(entry, list) else [entry]
        digests = [d for d in listed if isinstance(d, str) and set(d) <= set(string.hexdigits)]
        if len(digests) != len(listed):
            raise UsageError(f"the policy's PCR {key} is not a list of hex digests")
        try:
            parsed = [bytes.fromhex(d) for d in digests]
        except ValueError as exc:
            raise UsageError(f"the policy's PCR {key} has an odd number of hex digits") from exc
        if int(key) in allowed:
            raise UsageError(f"the policy names PCR {int(key)} twice")
        allowed[int(key)] = _of_bank(int(key), parsed, bank)
    policy = PcrPolicy(allowed, bank=bank)
    if "mask" in values:
        mask = values["mask"]
        try:
            number = int(mask, 0) if isinstance(mask, str) else None
        except ValueError:
            number = None
        if number != policy.needed_mask:
            raise UsageError(
                "the policy's mask is not the mask of the PCRs that it names: take the mask out"
            )
    return policy
