"""What a vector is before it is written, and the small edits that make a bad one of a good one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from evidence_factory import SealedBatch, envelope, pcr_blob, quote_text

from provider_proxy.evidence.model import ClockState, PcrValues, QuoteRequest

NOTES = {
    "Batch": "A batch of the size that the comment tells.",
    "Bank": "Which PCR bank was requested, signed or claimed.",
    "Claims": "The claims of a VM's link: present exactly if asked, bound into the leaf.",
    "Clock": "The TPM's clock against the newest state accepted before the nonce was sent.",
    "Encoding": "A second way of writing what has one way only.",
    "Extensible": "A reader ignores keys of `results` that it does not know.",
    "Field": "One field of the reply left out, of another type, out of bounds, or changed.",
    "Format": "Not a JSON envelope, or not of format 1.",
    "Freshness": "The answer's age by the tenant's own clock, in `ageS`; the limit is 60 s.",
    "Hex": "A reader takes hex in either case; zeros before a mask are no other mask.",
    "Inclusion": "Leaf index, tree size, path and salt.",
    "Json": "JSON that readers could understand in two ways, or that exhausts a naive one.",
    "Key": "The trusted AK: another key, a key without an AK's attributes, another encoding.",
    "Label": "An unsigned label that contradicts what was signed.",
    "Malleable": "ECDSA has two signatures for one message; neither identifies a quote.",
    "PcrBlob": "The blob of PCR values beside the signed structure.",
    "Resigned": "Signed by the trusted AK itself: only the checks behind the signature can refuse.",
    "Request": "A good answer to another question than the tenant's own.",
    "Selection": "PCR selection: signed, claimed, requested.",
    "Signature": "TPMT_SIGNATURE.",
    "Superset": "The quote covers more PCRs than were requested; they stay unseen.",
    "Unsigned": "Signed bytes changed after signing.",
    "UnsignedField": "A field that nobody signs and no verdict rests on.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One vector.

    Attributes:
        error: the class that must be raised; empty for a valid one.
        age_s: seconds from the nonce to its answer.
    """

    comment: str
    flags: tuple[str, ...]
    ak: bytes
    request: QuoteRequest
    body: bytes
    error: str = ""
    baseline: ClockState | None = None
    age_s: float = 0.5


MISSING = object()


class Base:
    """A good answer, and ways to spoil it."""

    def __init__(self, batch: SealedBatch, number: int) -> None:
        self.batch = batch
        self.number = number
        self.request = batch.requests[number]
        self.quote = batch.quote
        self.results = batch.results(number)
        self.body = batch.body(number)

    def case(self, comment: str, flags: str, error: str = "", **other: Any) -> Case:
        fields: dict[str, Any] = {
            "ak": self.batch.tpm.ak_public,
            "request": self.request,
            "body": self.body,
        }
        return Case(comment=comment, flags=tuple(flags.split()), error=error, **(fields | other))

    def edited(self, key: str, value: object) -> bytes:
        """The body with one key (dots lead inwards) set or left out."""
        results = copy.deepcopy(self.results)
        *outer, last = key.split(".")
        target = results
        for name in outer:
            target = target[name]
        if value is MISSING:
            del target[last]
        else:
            target[last] = value
        return envelope(results)

    def capitals(self, key: str) -> object:
        """The value of one key, its hex digits in capitals."""
        value: Any = self.results
        for name in key.split("."):
            value = value[name]
        return value.upper() if isinstance(value, str) else [node.upper() for node in value]

    def replaced(self, old: bytes, new: bytes) -> bytes:
        """The body with one text, which must be there once, replaced."""
        assert self.body.count(old) == 1, old
        return self.body.replace(old, new)

    def requoted(
        self,
        *,
        attest: bytes | None = None,
        signature: bytes | None = None,
        blob: bytes | None = None,
        **results: Any,
    ) -> bytes:
        """The body with parts of the quote, and top-level results, exchanged as they come."""
        text = quote_text(
            self.quote.attest if attest is None else attest,
            self.quote.signature if signature is None else signature,
            pcr_blob(self.quote.pcrs) if blob is None else blob,
        )
        return envelope(self.results | {"quote": text} | results)

    def resigned(self, attest: bytes, *, pcrs: PcrValues | None = None, **results: Any) -> bytes:
        """The body with another TPMS_ATTEST, signed by the trusted AK."""
        blob = None if pcrs is None else pcr_blob(pcrs)
        if pcrs is not None:
            results = {"bank": pcrs.bank.label, "mask": f"{pcrs.mask:#x}"} | results
        return self.requoted(
            attest=attest, signature=self.batch.tpm.sign(attest), blob=blob, **results
        )


def flip(data: bytes, at: int, bit: int = 1) -> bytes:
    """One byte of some bytes changed by a bit pattern."""
    at %= len(data)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def flip_hex(text: str) -> str:
    """The last hex digit changed."""
    return text[:-1] + f"{int(text[-1], 16) ^ 1:x}"
