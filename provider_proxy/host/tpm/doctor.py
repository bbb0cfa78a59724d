"""Looks at a TPM and says what follows for the proxy: its make, limits, handles, and how fast it quotes.

Reads only, but for two transient keys in the NULL hierarchy, which are measured and flushed; nothing
persistent changes and no authorisation is needed. An RSA key takes a hardware TPM many seconds to make.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import (
    ESYS_TR,
    TPM2_CAP,
)
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE

from provider_proxy.errors import TpmError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.host.tpm.chip import Chip, flush, tss_errors
from provider_proxy.host.tpm.keys import AK_ATTRIBUTES, AK_TEMPLATES, EK_CERT_INDEX
from provider_proxy.host.tpm.response_codes import LAYER_SHIFT, SOFTWARE_LAYERS

QUOTES_MEASURED = 5  # one chip's times hardly vary (TPMScan: p99/p50 = 1.02)
ALL_PROPERTIES = 256
FIXED_PROPERTIES = 0x100
VARIABLE_PROPERTIES = 0x200
PT = {
    "family": 0x100,
    "revision": 0x102,
    "manufacturer": 0x105,
    "vendor_1": 0x106,
    "firmware_1": 0x10B,
    "firmware_2": 0x10C,
    "sessions_max": 0x111,
    "context_gap_max": 0x114,
    "response_max_bytes": 0x11F,
    "digest_max_bytes": 0x120,
    "lockout_counter": 0x20E,
    "lockout_limit": 0x20F,
    "sessions_loaded": 0x203,
    "sessions_loaded_free": 0x204,
    "sessions_active": 0x205,
    "sessions_active_free": 0x206,
    "transient_free": 0x207,
    "persistent": 0x208,
    "persistent_free": 0x209,
}
"""Property tags: TPM 2.0 Library Part 2, section 6.13."""
SHOWN_OTHERWISE = ("family", "revision", "manufacturer", "vendor_1", "firmware_1", "firmware_2")
FIRST_PERSISTENT = 0x81000000
FIRST_NV = 0x01000000
SLOW_MS = 150.0  # slower than this, the other kind of AK is worth a look
RC_COMMAND_CODE = 0x143
FORMAT_ONE = range(0x80, 0xC0)  # codes about a parameter: Part 2, section 6.6.2
SMALL_GAP = 255  # 10 of 11 AMD fTPMs, 6 of 33 Nuvotons (TPMScan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        quote_ms: key kind ("ecc", "rsa") to the median time of a quote; absent where the chip
            has no such keys.
        pcr_banks: active banks.
        consequences: what follows for a configuration, in sentences.
    """

    manufacturer: str
    vendor: str
    firmware: str
    revision: float
    limits: dict[str, int]
    pcr_banks: tuple[str, ...]
    algorithms: tuple[str, ...]
    persistent: tuple[int, ...]
    ek_certificates: tuple[str, ...]
    quote_ms: dict[str, float]
    consequences: tuple[str, ...]


def examine(context: ESAPI) -> Report:
    """Examine an open TPM.

    Raises:
        TpmError: it does not answer.
    """
    with tss_errors("TPM2_GetCapability"):
        values = _properties(context)
        algorithms = _algorithms(context)
        persistent = _handles(context, FIRST_PERSISTENT)
        nv = _handles(context, FIRST_NV)
        banks = _banks(context)
    limits = {name: values[tag] for name, tag in PT.items() if tag in values}
    quote_ms = {}
    unsupported = set()
    for kind in AK_TEMPLATES:
        try:
            quote_ms[kind] = _measure(context, kind)
        except _UnsupportedError:
            unsupported.add(kind)
        except _NotNowError:
            continue
    manufacturer = _text(values.get(PT["manufacturer"], 0))
    return Report(
        manufacturer=manufacturer,
        vendor="".join(_text(values.get(PT["vendor_1"] + n, 0)) for n in range(4)).strip(),
        firmware=_firmware(values),
        revision=values.get(PT["revision"], 0) / 100,
        limits=limits,
        pcr_banks=banks,
        algorithms=algorithms,
        persistent=persistent,
        ek_certificates=tuple(kind for kind, index in EK_CERT_INDEX.items() if index in nv),
        quote_ms=quote_ms,
        consequences=tuple(_consequences(manufacturer, limits, banks, quote_ms, unsupported)),
    )


class _UnsupportedError(Exception):
    """The chip has no such keys."""


class _NotNowError(Exception):
    """The chip makes no key now: it is full, busy or locked."""


def _text(value: int) -> str:
    return value.to_bytes(4, "big").decode("ascii", "replace").strip("\0 ")


def _firmware(values: dict[int, int]) -> str:
    first, second = values.get(PT["firmware_1"], 0), values.get(PT["firmware_2"], 0)
    return f"{first >> 16}.{first & 0xFFFF}.{second >> 16}.{second & 0xFFFF}"


def _properties(context: ESAPI) -> dict[int, int]:
    found: dict[int, int] = {}
    for group in (FIXED_PROPERTIES, VARIABLE_PROPERTIES):
        start, more = group, True
        while more:
            more, data = context.get_capability(TPM2_CAP.TPM_PROPERTIES, start, ALL_PROPERTIES)
            part = {int(p.property): int(p.value) for p in data.data.tpmProperties}
            found |= part
            start = max(part, default=group) + 1
            more = bool(more) and bool(part) and start < group + ALL_PROPERTIES
    return found


def _algorithms(context: ESAPI) -> tuple[str, ...]:
    _, data = context.get_capability(TPM2_CAP.ALGS, 0, ALL_PROPERTIES)
    numbers = {int(entry.alg) for entry in data.data.algorithms}
    names = {0x0001: "rsa", 0x0023: "ecc", 0x0014: "rsassa", 0x0018: "ecdsa"}
    names |= {int(alg): alg.label for alg in HashAlg}
    return tuple(name for number, name in sorted(names.items()) if number in numbers)


def _handles(context: ESAPI, first: int) -> tuple[int, ...]:
    found: list[int] = []
    more = True
    while more:
        start = found[-1] + 1 if found else first
        more, data = context.get_capability(TPM2_CAP.HANDLES, start, ALL_PROPERTIES)
        part = [int(h) for h in data.data.handles if int(h) >> 24 == first >> 24]
        found += part
        more = bool(more) and bool(part)
    return tuple(found)


def _banks(context: ESAPI) -> tuple[str, ...]:
    _, data = context.get_capability(TPM2_CAP.PCRS, 0, ALL_PROPERTIES)
    names = {int(alg): alg.label for alg in HashAlg}
    return tuple(
        names.get(int(bank.hash), f"{int(bank.hash):#06x}")
        for bank in data.data.assignedPCR
        if any(bytes(bank.pcrSelect))
    )


def _measure(context: ESAPI, kind: str) -> float:
    """Median milliseconds of a quote with a transient key of this kind.

    Raises:
        _UnsupportedError: the chip makes no such key.
        _NotNowError: it makes none now.
        TpmError: it makes one, and does not quote with it.
    """
    template = TPM2B_PUBLIC.parse(AK_TEMPLATES[kind], objectAttributes=AK_ATTRIBUTES)
    try:
        key = context.create_primary(TPM2B_SENSITIVE_CREATE(), template, ESYS_TR.NULL)[0]
    except TSS2_Exception as exc:
        code = int(exc.error)
        if code >> LAYER_SHIFT in SOFTWARE_LAYERS:
            raise TpmError(f"TPM2_CreatePrimary: {exc}", code=code) from exc
        if code == RC_COMMAND_CODE or code in FORMAT_ONE:  # it says what it does not have
            raise _UnsupportedError from exc
        raise _NotNowError from exc
    times = []
    with tss_errors("TPM2_Quote"):
        try:
            chip = Chip(context, ek=ESYS_TR.NONE, ak=key)
            for _ in range(QUOTES_MEASURED):
                begin = time.monotonic()
                chip.quote(secrets.token_bytes(16), HashAlg.SHA256, 1, HashAlg.SHA256)
                times.append((time.monotonic() - begin) * 1000)
        finally:
            flush(context, key)
    return statistics.median(times)


def _consequences(
    manufacturer: str,
    limits: dict[str, int],
    banks: tuple[str, ...],
    quote_ms: dict[str, float],
    unsupported: Collection[str] = (),
) -> Iterator[str]:
    """What follows; the facts and their sources are in docs/tpm.md."""
    if manufacturer == "IBM":
        yield "This is a software TPM (swtpm): root on this machine can read its keys."
    if "sha256" not in banks:
        yield "No SHA-256 bank is active: the default tpm.banks cannot be served."
    if "ecc" in quote_ms and "rsa" in quote_ms:
        ratio = quote_ms["rsa"] / quote_ms["ecc"]
        if ratio > 1 and quote_ms["rsa"] > SLOW_MS:
            yield f'ak_algorithm = "ecc" quotes {ratio:.1f} times as fast as "rsa" here.'
    elif "ecc" in unsupported:
        yield 'The chip makes no P-256 key: set ak_algorithm = "rsa".'
    slowest = max(quote_ms.values(), default=0.0)
    if slowest:
        rate = 1000 / slowest
        yield f"One by one it quotes {rate:.1f} times a second at the most."
    if limits.get("context_gap_max", SMALL_GAP + 1) <= SMALL_GAP:
        yield "A small context gap: a session that is held while others work becomes unusable."
    if not limits.get("sessions_loaded_free", 1):
        yield "Every session is taken: quotes work, registrations wait."
    if not limits.get("transient_free", 1):
        yield "Every object slot is taken: on a TPM without a resource manager quotes wait."
    if limits.get("lockout_counter", 0) >= limits.get("lockout_limit", 1):
        yield "The TPM is in lockout; keys that are subject to it cannot be used."
    if limits.get("digest_max_bytes", 64) == HashAlg.SHA256.digest_bytes:
        yield "qualifyingData holds 34 bytes: enough for the 32 characters of the evidence."
