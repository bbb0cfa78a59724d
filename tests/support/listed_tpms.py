"""Software TPMs whose quotes come with an IMA list or a boot log."""

from __future__ import annotations

from collections.abc import Sequence

from event_log_helpers import expected
from ima_helpers import HOST, Line, extended, pcr10, text
from watch_helpers import FakeProxy

from provider_proxy.evidence.model import (
    HashAlg,
    PcrValues,
    QuoteRequest,
)
from provider_proxy.testing.soft_tpm import SoftTpm


class ImaTpm(SoftTpm):
    """PCR 10 and the boot PCRs have the values that these lists lead to."""

    lines = len(HOST)

    def read(self, bank: HashAlg, mask: int) -> PcrValues:
        real = dict(super().read(bank, mask).values)
        if 10 in real:
            real[10] = pcr10(HOST[: self.lines], bank)
        return PcrValues(bank=bank, values=tuple(sorted(real.items())))


def ima_proxy(part: int = 10_000) -> FakeProxy:
    """Answers with so many lines of the list at most, from where it was asked."""
    proxy = FakeProxy(ImaTpm())

    def answer(request: QuoteRequest) -> bytes:
        start = request.ima_ml_entry if request.ima_ml_entry <= len(HOST) else 0
        proxy.logs = {
            "ima_measurement_list": text(HOST[start : start + part]),
            "ima_measurement_list_entry": start,
        }
        return proxy.good(request)

    proxy.answer = answer
    return proxy


class ListedTpm(SoftTpm):
    """PCR 10 as a list leads to it; the boot PCRs as the log of test_event_log does."""

    def __init__(self, lines: Sequence[Line]) -> None:
        super().__init__()
        self.lines = lines

    def read(self, bank: HashAlg, mask: int) -> PcrValues:
        values = dict(super().read(bank, mask).values) | {10: extended(self.lines, bank.label)}
        values |= expected(bank, 3)
        return PcrValues(
            bank=bank, values=tuple((n, v) for n, v in sorted(values.items()) if mask >> n & 1)
        )
