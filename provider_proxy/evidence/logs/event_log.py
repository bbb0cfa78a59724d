"""The firmware's event log, replayed to the boot PCRs that the TPM signed.

The log is unsigned; only its replay gives it meaning, and only its digests are proven by that, not the
event data beside them. Both forms are read: SHA-1 alone (TCG_PCR_EVENT), and crypto-agile
(TCG_PCR_EVENT2 behind a "Spec ID Event03" header). No length in it is trusted: each is bounded by
what is left of the log. Whatever bytes come in, only `LogError` comes out.
Source: TCG PC Client Platform Firmware Profile 1.06, section 10. An ADR says why no
library is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from provider_proxy.errors import LogError
from provider_proxy.evidence.model import PCR_COUNT, HashAlg, mask_of

MAX_LOG_BYTES = 4 * 1024 * 1024  # samples have 50 kB; the proxy sends 1 MiB at most
MAX_EVENTS = 50_000  # samples have 100
MAX_ALGORITHMS = 8  # the TPM's banks; chips have four at most
EV_NO_ACTION = 3
SPEC_ID_03 = b"Spec ID Event03\0"
STARTUP_LOCALITY = b"StartupLocality\0"
LOCALITIES = frozenset((0, 3, 4))  # PCR 0 begins with it: Firmware Profile, section 10.4.5.3

_HEAD = struct.Struct("<II20sI")  # TCG_PCR_EVENT: pcrIndex, eventType, SHA-1, eventSize
_EVENT2 = struct.Struct("<III")  # pcrIndex, eventType, count of digests
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_ALGORITHM = struct.Struct("<HH")  # TPM_ALG_ID, digest size
_SPEC = struct.Struct("<16sIBBBBI")  # signature, platformClass, version (3), uintnSize, algorithms


@dataclass(frozen=True, slots=True, kw_only=True)
class BootEvent:
    """One event: what was extended into which PCR. `digests` holds the banks that we know."""

    pcr: int
    kind: int
    digests: Mapping[HashAlg, bytes]
    data: bytes


def parse_event_log(data: bytes) -> tuple[BootEvent, ...]:
    """Read a log whole.

    Raises:
        LogError: not such a log, or over a limit.
    """
    if len(data) > MAX_LOG_BYTES:
        raise LogError("the firmware's event log is too large")
    pcr, kind, digest, size = _unpack(_HEAD, data, 0)
    first = _take(data, _HEAD.size, size)
    at = _HEAD.size + size
    widths = _spec_widths(first) if kind == EV_NO_ACTION and first.startswith(SPEC_ID_03) else None
    events = []
    if widths is None:
        events.append(_event(pcr, kind, {HashAlg.SHA1: digest}, first))
    while at < len(data):
        if len(events) >= MAX_EVENTS:
            raise LogError("the firmware's event log has too many events")
        event, at = _next_sha1(data, at) if widths is None else _next_agile(data, at, widths)
        events.append(event)
    return tuple(events)


def _unpack(form: struct.Struct, data: bytes, at: int) -> tuple[Any, ...]:
    try:
        return form.unpack_from(data, at)
    except struct.error:
        raise LogError("the firmware's event log ends early") from None


def _take(data: bytes, at: int, size: int) -> bytes:
    if size > len(data) - at:
        raise LogError("the firmware's event log ends early")
    return data[at : at + size]


def _event(pcr: int, kind: int, digests: Mapping[HashAlg, bytes], data: bytes) -> BootEvent:
    if pcr >= PCR_COUNT and kind != EV_NO_ACTION:
        raise LogError("the firmware's event log names a PCR that does not exist")
    return BootEvent(pcr=pcr, kind=kind, digests=MappingProxyType(dict(digests)), data=data)


def _spec_widths(spec: bytes) -> dict[int, int]:
    """TPM_ALG_ID to digest size, as the header says (TCG_EfiSpecIDEvent)."""
    *_, count = _unpack(_SPEC, spec, 0)
    if not 1 <= count <= MAX_ALGORITHMS:
        raise LogError("the firmware's event log has too many hash algorithms, or none")
    widths: dict[int, int] = {}
    for place in range(count):
        alg, width = _unpack(_ALGORITHM, spec, _SPEC.size + _ALGORITHM.size * place)
        known = _known(alg)
        if alg in widths or (known is not None and known.digest_bytes != width):
            raise LogError("the firmware's event log describes its hash algorithms incorrectly")
        widths[alg] = width
    return widths


def _known(alg: int) -> HashAlg | None:
    try:
        return HashAlg(alg)
    except ValueError:
        return None  # SM3 and SHA-3 banks are skipped by their width


def _next_sha1(data: bytes, at: int) -> tuple[BootEvent, int]:
    pcr, kind, digest, size = _unpack(_HEAD, data, at)
    at += _HEAD.size
    return _event(pcr, kind, {HashAlg.SHA1: digest}, _take(data, at, size)), at + size


def _next_agile(data: bytes, at: int, widths: Mapping[int, int]) -> tuple[BootEvent, int]:
    pcr, kind, count = _unpack(_EVENT2, data, at)
    at += _EVENT2.size
    if count > len(widths):
        raise LogError("an event of the firmware's log has more digests than there are algorithms")
    digests: dict[HashAlg, bytes] = {}
    seen = set()
    for _ in range(count):
        (alg,) = _unpack(_U16, data, at)
        if alg not in widths or alg in seen:
            raise LogError(
                "an event of the firmware's log repeats a digest or has one of an undeclared algorithm"
            )
        seen.add(alg)
        digest = _take(data, at + 2, widths[alg])
        at += 2 + widths[alg]
        known = _known(alg)
        if known is not None:
            digests[known] = digest
    (size,) = _unpack(_U32, data, at)
    at += 4
    return _event(pcr, kind, digests, _take(data, at, size)), at + size


def replay(events: Iterable[BootEvent], bank: HashAlg) -> dict[int, bytes]:
    """The PCR values of a bank that a log leads to; PCRs without an event are left out.

    Raises:
        LogError: an event has no digest of this bank, or the startup locality is wrong or misplaced.
    """
    values: dict[int, bytes] = {}
    for event in events:
        if event.kind == EV_NO_ACTION:
            if event.pcr == 0 and event.data.startswith(STARTUP_LOCALITY):
                values[0] = _initial_pcr0(event.data, bank, 0 in values)
            continue
        digest = event.digests.get(bank)
        if digest is None:
            raise LogError(f"the firmware's event log has no digests of bank {bank.label}")
        values[event.pcr] = bank.digest(values.get(event.pcr, bytes(bank.digest_bytes)) + digest)
    return values


def _initial_pcr0(data: bytes, bank: HashAlg, begun: bool) -> bytes:
    locality = data[len(STARTUP_LOCALITY) :]
    if begun or len(locality) != 1 or locality[0] not in LOCALITIES:
        raise LogError("the firmware's event log has a wrong or misplaced startup locality")
    return bytes(bank.digest_bytes - 1) + locality


def extended_mask(events: Iterable[BootEvent]) -> int:
    """The PCRs that a log extends at least once."""
    return mask_of({event.pcr for event in events if event.kind != EV_NO_ACTION})
