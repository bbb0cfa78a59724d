"""The parameters of `GET /verifier/quote`, read and written: strict, in one place for both sides.

A missing, repeated, unknown or ill-formed parameter is a `ParameterError` with its name; nothing is
guessed, because the tenant hashes what it *meant* into its leaf, and the proof would not match.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import unquote_plus, urlencode

from provider_proxy.errors import ParameterError
from provider_proxy.evidence.model import HashAlg, QuoteRequest, parse_bank, parse_mask, parse_nonce

T = TypeVar("T")

NO_LOGS = "none"
MAX_QUERY_CHARS = 512  # all parameters at their longest are 220
MAX_IMA_ENTRY = 1 << 31
MIN_TIMEOUT_MS = 1
MAX_TIMEOUT_MS = 600_000  # the configuration's own limit is lower; this bounds the number


def parse_quote_query(query: str) -> QuoteRequest:
    """Read a query string.

    Does not check: what the tenant may see, or whether the bank is offered; the server does.

    Raises:
        ParameterError: names the parameter ("query" where the string itself is ill-formed).
    """
    if len(query) > MAX_QUERY_CHARS:
        raise ParameterError("query", f"is longer than {MAX_QUERY_CHARS} characters")
    values: dict[str, object] = {}
    for pair in query.split("&", len(_PARSERS) + 1) if query else ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise ParameterError("query", "is not name=value pairs joined by &")
        if "%" in pair or "+" in pair:
            name, text = unquote_plus(name), unquote_plus(text)
        parser = _PARSERS.get(name)
        if parser is None:
            raise ParameterError(_printable(name), "is unknown")
        if name in values:
            raise ParameterError(name, "is given more than once")
        values[name] = parser(text)
    for name in ("nonce", "mask"):
        if name not in values:
            raise ParameterError(name, "is missing")
    return QuoteRequest(**values)  # type: ignore[arg-type]  # each parser gives its field's type


def encode_quote_query(request: QuoteRequest) -> str:
    """Write what `parse_quote_query` reads."""
    pairs = {"nonce": request.nonce.decode("ascii"), "mask": hex(request.mask)}
    if request.bank is not HashAlg.SHA256:
        pairs["bank"] = request.bank.label
    if request.ima_ml_entry:
        pairs["ima_ml_entry"] = str(request.ima_ml_entry)
    if request.vm is not None:
        pairs["vm"] = str(request.vm)
    if request.timeout_ms is not None:
        pairs["timeout_ms"] = str(request.timeout_ms)
    if not request.logs:
        pairs["logs"] = NO_LOGS
    return urlencode(pairs)


def _printable(name: str) -> str:
    """A name from outside, made safe to show: short, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in name[:40]) or "(empty name)"


def _number(name: str, least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or len(text) > 10:
            raise ParameterError(name, "must be a decimal number")
        if not least <= int(text) <= most:
            raise ParameterError(name, f"must be in {least}..{most}")
        return int(text)

    return parse


def _parse_vm(text: str) -> uuid.UUID:
    try:
        value = uuid.UUID(text)
    except ValueError:
        raise ParameterError("vm", "must be a UUID") from None
    if str(value) != text:  # uuid.UUID takes braces, urn: and capitals too
        raise ParameterError("vm", "must be a UUID in lower case with hyphens")
    return value


def _parse_logs(text: str) -> bool:
    if text != NO_LOGS:
        raise ParameterError("logs", f"must be {NO_LOGS} if it is given")
    return False


_PARSERS: dict[str, Callable[[str], object]] = {
    "nonce": parse_nonce,
    "mask": parse_mask,
    "bank": parse_bank,
    "ima_ml_entry": _number("ima_ml_entry", 0, MAX_IMA_ENTRY),
    "vm": _parse_vm,
    "timeout_ms": _number("timeout_ms", MIN_TIMEOUT_MS, MAX_TIMEOUT_MS),
    "logs": _parse_logs,
}
