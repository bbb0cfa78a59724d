"""Reads the status of a proxy's HTTP answer, which is untrusted; for all HTTP clients."""

from __future__ import annotations

from provider_proxy.errors import EvidenceFormatError, ReplyError
from provider_proxy.evidence.model import QuoteRequest
from provider_proxy.evidence.strict_json import parse_json_object
from provider_proxy.evidence.wire import MAX_EVIDENCE_BYTES, MAX_EVIDENCE_WITH_LOGS_BYTES

MAX_RETRY_AFTER_S = 3600.0
MAX_STATUS_CHARS = 200
TOO_MANY = 429  # over a limit of ours, that of bytes of logs for example


def body_limit(request: QuoteRequest) -> int:
    """How many bytes a good answer to this request may have."""
    with_logs = request.wants_ima or request.wants_boot_log
    return MAX_EVIDENCE_WITH_LOGS_BYTES if with_logs else MAX_EVIDENCE_BYTES


def refused(status: int, body: bytes, retry_after: str) -> ReplyError:
    """The error of an answer that is not 200.

    Args:
        body: of bounded size; Keylime's envelope where it comes from a proxy.
        retry_after: the header's value; empty without one.
    """
    return ReplyError(
        f"the proxy answered {status}: {status_text(body)}",
        status=status,
        retry_after_s=_seconds(retry_after),
    )


def status_text(body: bytes) -> str:
    """The envelope's status, made safe to show: one short printable line."""
    try:
        text = parse_json_object(body, "the answer").get("status", "no reason given")
    except EvidenceFormatError:
        return "no reason given"
    return "".join(c if c.isprintable() else "?" for c in str(text)[:MAX_STATUS_CHARS])


def _seconds(value: str) -> float | None:
    if not value.isascii() or not value.isdecimal() or len(value) > 9:
        return None
    return min(float(value), MAX_RETRY_AFTER_S)
