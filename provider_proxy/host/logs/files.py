"""The host's IMA list and firmware log, read after a quote and shared by its batch.

IMA appends to its list before it extends PCR 10, so a list read after the quote holds at least the
entries that the quote covers; the tenant replays the prefix that matches. The logs are not signed and
mean nothing without that replay. An answer holds a bounded part; the tenant asks for more by entry. A
missing log is reported as absent, unreadable, or too long.

Reading and writing happen in worker threads. One reading serves all requests that wait for one.
"""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from provider_proxy.evidence.model import QuoteRequest
from provider_proxy.evidence.wire import LogsPart
from provider_proxy.host.logs.follow import ABSENT, TOO_LONG, UNREADABLE, FollowedList
from provider_proxy.host.logs.parts import Logs, share_out

log = logging.getLogger(__name__)

MAX_UEFI_BYTES = 1024 * 1024  # typical ones have 50 kB


class HostLogFiles:
    """Reads the two logs if they exist; a `batcher.LogSource`.

    Args:
        ima, uefi: paths; a missing file is not sent, and is logged once.
        directory: for the copy of the IMA list.
    """

    def __init__(self, ima: Path, uefi: Path, *, directory: Path | None = None) -> None:
        self._list = FollowedList(ima, directory)
        self._uefi = uefi
        self._uefi_missing: str | None = None
        self._turn = trio.Lock()
        self._begun = self._done = 0  # readings of the list

    async def read(self, requests: tuple[QuoteRequest, ...]) -> tuple[LogsPart | None, ...]:
        """For each request the logs that its mask asks for, as JSON; None where it asks for none."""
        ima = any(request.wants_ima for request in requests)
        uefi = any(request.wants_boot_log for request in requests)
        if not ima and not uefi:
            await trio.lowlevel.checkpoint()
            return (None,) * len(requests)
        if not ima:
            return await trio.to_thread.run_sync(self._without_ima, requests, uefi)
        needed = self._begun + 1  # a reading that starts now or later
        async with self._turn:
            if self._done < needed:
                self._begun += 1
                begun = self._begun
                await trio.to_thread.run_sync(self._list.read_on)
                self._done = begun
            return await trio.to_thread.run_sync(self._with_ima, requests, uefi)

    def _without_ima(
        self, requests: tuple[QuoteRequest, ...], uefi: bool
    ) -> tuple[LogsPart | None, ...]:
        data = self._read_uefi() if uefi else None
        return share_out(requests, Logs(uefi=data, uefi_missing=self._uefi_missing))

    def _with_ima(
        self, requests: tuple[QuoteRequest, ...], uefi: bool
    ) -> tuple[LogsPart | None, ...]:
        data = self._read_uefi() if uefi else None
        logs = Logs(
            ima=self._list.list,
            ima_missing=self._list.missing,
            uefi=data,
            uefi_missing=self._uefi_missing,
        )
        return share_out(requests, logs)

    def _read_uefi(self) -> bytes | None:
        try:
            with self._uefi.open("rb") as file:
                data = file.read(MAX_UEFI_BYTES + 1)
        except FileNotFoundError as exc:
            self._no_uefi(ABSENT, exc.strerror)
            return None
        except OSError as exc:
            self._no_uefi(UNREADABLE, exc.strerror)
            return None
        if len(data) > MAX_UEFI_BYTES:
            self._no_uefi(TOO_LONG, f"it has more than {MAX_UEFI_BYTES} bytes")
            return None
        self._uefi_missing = None
        return data

    def _no_uefi(self, missing: str, why: str | None) -> None:
        if self._uefi_missing != missing:
            log.warning("cannot read %s; answers do not contain it: %s", self._uefi, why)
        self._uefi_missing = missing

    def close(self) -> None:
        """Close the list and remove its copy."""
        self._list.close()
