"""The host's IMA list and firmware log, read after a quote and shared by its batch.

IMA appends to its list before it extends PCR 10, so a list read after the quote holds at least the
entries that the quote covers; the tenant replays the prefix that matches. Unsigned, and of no
meaning without that replay. What a tenant gets is bounded; it asks for the rest by entry.
"""

from __future__ import annotations

import logging
from json.encoder import encode_basestring_ascii
from pathlib import Path

import trio

from provider_proxy.evidence.model import HostLogs, QuoteRequest

log = logging.getLogger(__name__)

MAX_IMA_BYTES = 7 * 1024 * 1024  # as JSON, in one answer; some 70,000 lines
MAX_LIST_BYTES = 128 * 1024 * 1024  # of the kernel's whole list
MAX_UEFI_BYTES = 1024 * 1024  # samples have 50 kB


class HostLogFiles:
    """Reads the two logs where they are there.

    Args:
        ima, uefi: paths; a file that is missing is not sent, and said once.
    """

    def __init__(self, ima: Path, uefi: Path) -> None:
        self._ima = ima
        self._uefi = uefi
        self._missing: set[Path] = set()

    async def read(self, requests: tuple[QuoteRequest, ...]) -> tuple[HostLogs | None, ...]:
        """For each request the logs that its mask asks for; None where it asks for none."""
        wants_ima = any(request.wants_ima for request in requests)
        wants_uefi = any(request.wants_boot_log for request in requests)
        lines: list[str] | None = None
        uefi: bytes | None = None
        if wants_ima and (data := await self._read_file(self._ima, MAX_LIST_BYTES)) is not None:
            lines = lines_of(data.decode("utf-8", "backslashreplace"))
        if wants_uefi:
            uefi = await self._read_file(self._uefi, MAX_UEFI_BYTES)
        return share_out(requests, lines, uefi)

    async def _read_file(self, path: Path, limit: int) -> bytes | None:
        try:
            async with await trio.open_file(path, "rb") as file:
                data: bytes = await file.read(limit)
        except OSError as exc:
            if path not in self._missing:
                self._missing.add(path)
                log.warning("cannot read %s, answers go without it: %s", path, exc.strerror)
            return None
        self._missing.discard(path)
        return data


def lines_of(text: str) -> list[str]:
    """The whole lines of an IMA list, each with its line feed."""
    # By line feeds alone: str.splitlines would cut at what a file's name may hold.
    lines = [line + "\n" for line in text.split("\n")]
    lines.pop()  # behind the last line feed is nothing, or what a limit cut
    return lines


def share_out(
    requests: tuple[QuoteRequest, ...], lines: list[str] | None, uefi: bytes | None
) -> tuple[HostLogs | None, ...]:
    """For each request the logs that its mask asks for; None where it asks for none.

    Args:
        lines: of the whole IMA list; None where the host has none.
        uefi: the firmware's log; None where the host has none.
    """
    if lines is None and uefi is None:
        return (None,) * len(requests)
    parts: dict[int, tuple[str, int]] = {}
    return tuple(_logs_of(request, lines, uefi, parts) for request in requests)


def _logs_of(
    request: QuoteRequest,
    lines: list[str] | None,
    uefi: bytes | None,
    parts: dict[int, tuple[str, int]],
) -> HostLogs | None:
    wants_uefi = uefi is not None and request.wants_boot_log
    own_uefi = uefi if wants_uefi else None
    if lines is None or not request.wants_ima:
        return HostLogs(uefi=own_uefi) if wants_uefi else None
    if request.ima_ml_entry not in parts:
        parts[request.ima_ml_entry] = _from_entry(lines, request.ima_ml_entry)
    ima, entry = parts[request.ima_ml_entry]
    return HostLogs(ima=ima, ima_entry=entry, uefi=own_uefi)


def _from_entry(lines: list[str], entry: int) -> tuple[str, int]:
    """The list from an entry on, whole lines within the limit; all of it for an entry beyond its
    end, as Keylime's agent does (the host has rebooted since the tenant counted)."""
    start = entry if entry <= len(lines) else 0
    size = 0
    for end in range(start, len(lines)):
        size += len(encode_basestring_ascii(lines[end])) - len('""')
        if size > MAX_IMA_BYTES:
            return "".join(lines[start:end]), start
    return "".join(lines[start:]), start
