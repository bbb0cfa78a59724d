"""A tenant's own record of one question, as a file: what `fetch` writes and `verify` reads.

Offline, nonce, mask and time come from here and never from what the proxy sent. The file says how
long the answer took and what its SHA-256 was, so that an evidence file that was exchanged later
is not taken for as fresh as the first.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from hashlib import sha256

from provider_proxy.errors import EvidenceFormatError, ParameterError, UsageError
from provider_proxy.evidence import wire
from provider_proxy.evidence.model import (
    ClockState,
    QuoteRequest,
    parse_bank,
    parse_mask,
    parse_nonce,
)
from provider_proxy.evidence.strict_json import Fields, parse_json_object

FORMAT = "provider-proxy/request/1"
MAX_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One question and, once it was answered, when.

    Attributes:
        made_at_s: seconds since the epoch, by the tenant's wall clock.
        url: the proxy that was asked; for people.
        answered_after_s: by the tenant's monotonic clock; None before the answer.
        evidence_sha256: of the answer's body; empty before.
        pinned: the host was pinned, and `baseline` says what was known of it.
        baseline: the newest state of the pinned host accepted before the question; None where
            nothing was accepted yet.
    """

    request: QuoteRequest
    made_at_s: float
    url: str = ""
    answered_after_s: float | None = None
    evidence_sha256: bytes = b""
    pinned: bool = False
    baseline: ClockState | None = None

    def age_s(self, evidence: bytes, now_s: float) -> float:
        """How old the nonce was when this evidence was there.

        Args:
            now_s: seconds since the epoch; counts where no answer was recorded.

        Raises:
            UsageError: the file records another answer than this evidence.
        """
        if self.answered_after_s is None:
            return now_s - self.made_at_s
        if sha256(evidence).digest() != self.evidence_sha256:
            raise UsageError("the evidence is not the answer that the request file records")
        return self.answered_after_s


def encode_request(record: RequestRecord) -> bytes:
    """Write a record as JSON."""
    request = record.request
    values: dict[str, object] = {
        "format": FORMAT,
        "nonce": request.nonce.decode("ascii"),
        "mask": hex(request.mask),
        "bank": request.bank.label,
        "vm": str(request.vm) if request.vm else None,
        "ima_ml_entry": request.ima_ml_entry,
        "made_at": record.made_at_s,
        "url": record.url,
    }
    if record.pinned:
        state = record.baseline
        values["baseline"] = None if state is None else wire.clock_values(state)
    if record.answered_after_s is not None:
        values["answered_after_s"] = record.answered_after_s
        values["evidence_sha256"] = record.evidence_sha256.hex()
    return json.dumps(values, indent=2).encode("utf-8") + b"\n"


def parse_request(data: bytes) -> RequestRecord:
    """Read what `encode_request` writes.

    Raises:
        UsageError: not such a file.
    """
    if len(data) > MAX_BYTES:
        raise UsageError("the request file is too large")
    try:
        values = parse_json_object(data, "the request file")
        fields = Fields(values, "request")
        if fields.text("format", 64) != FORMAT:
            raise UsageError("not a request file of a format that this version reads")
        answered = "answered_after_s" in fields
        return RequestRecord(
            request=QuoteRequest(
                nonce=parse_nonce(fields.text("nonce", 64)),
                mask=parse_mask(fields.text("mask", 10)),
                bank=parse_bank(fields.text("bank", 16)),
                vm=uuid.UUID(fields.text("vm", 36)) if values.get("vm") is not None else None,
                ima_ml_entry=fields.integer("ima_ml_entry", 1 << 31),
            ),
            made_at_s=fields.number("made_at"),
            url=fields.text("url", 2048),
            answered_after_s=fields.number("answered_after_s") if answered else None,
            evidence_sha256=fields.hex("evidence_sha256", 32) if answered else b"",
            pinned="baseline" in fields,
            baseline=wire.parse_clock(fields.fields("baseline"))
            if values.get("baseline") is not None
            else None,
        )
    except (EvidenceFormatError, ParameterError, ValueError) as exc:
        raise UsageError(f"the request file is damaged: {exc}") from exc
