"""Which digests the firmware may have extended into the boot PCRs: a boot policy and its file.

A policy names PCRs and the digests that are good in each, in any order and number. An event's data is
not judged: only its digest is proven.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs.event_log import EV_NO_ACTION, BootEvent
from provider_proxy.evidence.model import PCR_COUNT, HashAlg, mask_of
from provider_proxy.evidence.strict_json import parse_own_json


@dataclass(frozen=True, slots=True, kw_only=True)
class BootPolicy:
    """Which digests may have been extended into the boot PCRs, in any order.

    Attributes:
        allowed: PCR number to digests, of which at least one must have been extended; PCRs that are
            not named are replayed only.
    """

    allowed: Mapping[int, frozenset[bytes]]

    @property
    def mask(self) -> int:
        """The PCRs that it names."""
        return mask_of(self.allowed)

    @property
    def empty_mask(self) -> int:
        """The PCRs that must not have been extended at all: their lists are empty."""
        return mask_of(pcr for pcr, digests in self.allowed.items() if not digests)

    def check(self, events: Iterable[BootEvent], bank: HashAlg) -> None:
        """Raises: LogError with the first thing that `problems` finds."""
        for _, problem in self.problems(events, bank):
            raise LogError(problem)

    def problems(
        self, events: Iterable[BootEvent], bank: HashAlg
    ) -> Iterator[tuple[int | None, str]]:
        """Each problem: the event's place in the log, and what is not allowed.

        A PCR without any event comes last, and without a place: firmware that measures nothing leads to
        zeros, and says nothing of what ran.
        """
        unmeasured = {pcr for pcr, digests in self.allowed.items() if digests}
        for place, event in enumerate(events):
            if event.kind == EV_NO_ACTION or event.pcr not in self.allowed:
                continue
            unmeasured.discard(event.pcr)
            digest = event.digests.get(bank)
            if digest is None:
                yield place, f"the firmware's event log has no digests of bank {bank.label}"
            elif digest not in self.allowed[event.pcr]:
                yield (
                    place,
                    f"PCR {event.pcr} was extended with {digest.hex()} (event type "
                    f"{event.kind:#010x}), which the boot policy does not allow",
                )
        for pcr in sorted(unmeasured):
            yield None, f"PCR {pcr} was never extended, and the boot policy names it"


def parse_boot_policy(data: bytes, *, bank: HashAlg) -> BootPolicy:
    """Read `{"4": ["hex", …]}`: digests of the bank that may be extended into a PCR.

    Raises:
        UsageError: not such an object.
    """
    values = parse_own_json(data, "the boot policy")
    names = {str(pcr): pcr for pcr in range(PCR_COUNT)}
    if not values or not set(values) <= set(names):
        raise UsageError("the boot policy is not an object of PCR numbers")
    allowed = {}
    for name, digests in values.items():
        if not isinstance(digests, list) or not all(isinstance(text, str) for text in digests):
            raise UsageError(f"the boot policy's PCR {name} is not a list of hex digests")
        try:
            allowed[names[name]] = frozenset(bytes.fromhex(text) for text in digests)
        except ValueError as exc:
            raise UsageError(f"the boot policy's PCR {name} is not a list of hex digests") from exc
        if any(len(digest) != bank.digest_bytes for digest in allowed[names[name]]):
            raise UsageError(
                f"the boot policy's PCR {name} has an entry that is not a {bank.label} digest"
            )
    return BootPolicy(allowed=allowed)
