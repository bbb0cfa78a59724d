"""The part of the host's logs for each request of a batch; equal parts are encoded once.

Runs in worker threads: a part of an IMA list has megabytes, and encoding it on the event loop would delay
all tenants.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from provider_proxy.evidence.model import HostLogs, QuoteRequest
from provider_proxy.evidence.wire import LogsPart, encode_logs, escape_text
from provider_proxy.host.logs.ima_list import ImaList, entry_after

MAX_IMA_BYTES = 7 * 1024 * 1024  # as JSON, in one answer; some 40,000 lines
PIECE_BYTES = 64 * 1024  # 0.2 ms of work, after which other threads may run


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """The host's logs, as far as they exist.

    Attributes:
        ima: None without a list; `ima_missing` says why, None if a list is not expected.
        uefi: the same for the firmware's log.
    """

    ima: ImaList | None = None
    ima_missing: str | None = None
    uefi: bytes | None = None
    uefi_missing: str | None = None


def share_out(requests: Sequence[QuoteRequest], logs: Logs) -> tuple[LogsPart | None, ...]:
    """For each request the logs that its mask asks for, as JSON; None where it asks for none."""
    made: dict[tuple[int, bool], LogsPart | None] = {}
    return tuple(_shared(request, logs, made) for request in requests)


def _shared(
    request: QuoteRequest, logs: Logs, made: dict[tuple[int, bool], LogsPart | None]
) -> LogsPart | None:
    entry = request.ima_ml_entry if request.wants_ima else -1
    key = (entry, request.wants_boot_log)
    if key not in made:
        made[key] = _encoded(entry, logs, with_uefi=key[1])
    return made[key]


def _encoded(entry: int, logs: Logs, *, with_uefi: bool) -> LogsPart | None:
    own = HostLogs(
        ima_missing=logs.ima_missing if entry >= 0 else None,
        uefi=logs.uefi if with_uefi else None,
        uefi_missing=logs.uefi_missing if with_uefi else None,
    )
    if entry < 0 or logs.ima is None:
        return encode_logs(own)
    start, pieces = logs.ima.pieces(entry, PIECE_BYTES)
    return encode_logs(own, ima=(start, tuple(_escaped(pieces))))


def _escaped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Lines as a JSON text without its quotes, within the limit; bytes that are not UTF-8 as \\xNN."""
    room = MAX_IMA_BYTES
    for lines in pieces:
        piece = _escape(lines)
        if len(piece) > room:
            yield _fitting(lines, room)
            return
        yield piece
        room -= len(piece)
        time.sleep(0)  # releases the interpreter's lock for the event loop


def _escape(lines: bytes) -> bytes:
    return escape_text(lines.decode("utf-8", "backslashreplace"))


def _fitting(lines: bytes, room: int) -> bytes:
    """As many whole entries as fit."""
    at = size = 0
    while at < len(lines):
        end = entry_after(lines, at)
        size += len(_escape(lines[at:end]))
        if size > room:
            break
        at = end
    return _escape(lines[:at])
