"""Judges EKs by a tenant's store of CAs, which is read again when it changes; remembers good chains.

A verdict is remembered by the certificate's SHA-256 together with the key, for as long as every
certificate of its chain is valid and the store stays as it is. A CA that was removed is trusted for
`LOOK_AGAIN_S` at most.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import anyio
import anyio.to_thread

from provider_proxy.errors import UntrustedEkError
from provider_proxy.trust.ek_chain import EndorsementKey, Verdict, check_chain
from provider_proxy.trust.ek_files import LoadedStore, Skipped, load_store, state_of

log = logging.getLogger(__name__)

MAX_VERDICTS = 4096  # certificates that were found good and are remembered: 5 kB each
LOOK_AGAIN_S = 5.0
MAX_WARNINGS = 20  # skipped files that are reported one by one


def utc_now() -> datetime:
    """The time of day."""
    return datetime.now(UTC)


class EkStore:
    """An `EkJudge` over files of TPM makers' CAs.

    Args:
        paths: PEM bundles and directories; see `ek_files`.
        insecure_virtual: virtual TPMs are accepted, too: root on the machine that runs one has its keys.
        now: the time of day, for validity.
        clock: monotonic seconds, for looking at the files again.

    Raises:
        HostError: a directory cannot be read, or everybody can write it.
        UsageError: no CA in it, or too many.
    """

    def __init__(
        self,
        *paths: Path,
        insecure_virtual: bool = False,
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths: Sequence[Path] = paths
        self._insecure_virtual = insecure_virtual
        self._now = now
        self._clock = clock
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._looked_at_s = clock()
        self._loaded = self._load(())
        self._lock: anyio.Lock | None = None
        if insecure_virtual:
            log.warning("virtual TPMs are accepted as hardware TPMs (--insecure-virtual-ek)")

    @property
    def loaded(self) -> LoadedStore:
        """What the store held when it was last read."""
        return self._loaded

    def check(self, ek: EndorsementKey) -> Verdict:
        """Check an EK's certificate; quick where it was found good before.

        Raises:
            UntrustedEkError: it does not lead to a CA of the store, or is missing.
            HostError, UsageError: the store is no longer readable; every EK is refused.
        """
        if ek.cert is None:
            raise UntrustedEkError(
                "the registrar has no EK certificate of this host; if its chip has no certificate, vouch "
                "for the key yourself: pin add --ek-sha256"
            )
        self._look_again()
        now = self._now()
        known = self._verdicts.get(ek.digest)
        if known is not None and now <= known.until:
            return known
        self._verdicts.pop(ek.digest, None)
        verdict = check_chain(
            ek.cert,
            ek.key,
            self._loaded.anchors,
            now,
            helpers=ek.helpers,
            insecure_virtual=self._insecure_virtual,
        )
        self._verdicts[ek.digest] = verdict
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        return verdict

    async def freshen(self) -> None:
        """Check the files again when it is time to, off the event loop, so that `check` need not.

        Raises:
            HostError, UsageError: as `check`.
        """
        if not self._is_due():
            return
        if self._lock is None:
            self._lock = anyio.Lock()
        async with self._lock:
            if self._is_due():
                await anyio.to_thread.run_sync(self._look_again)

    def _is_due(self) -> bool:
        return self._clock() - self._looked_at_s >= LOOK_AGAIN_S

    def _look_again(self) -> None:
        if not self._is_due():
            return
        now_s = self._clock()
        if state_of(self._paths) != self._loaded.state:
            self._verdicts.clear()
            self._loaded = self._load(self._loaded.skipped)
            self._verdicts.clear()  # a check may have run beside this thread
        self._looked_at_s = now_s

    def _load(self, known: Sequence[Skipped]) -> LoadedStore:
        loaded = load_store(self._paths)
        new = [skipped for skipped in loaded.skipped if skipped not in known]
        for skipped in new[:MAX_WARNINGS]:
            log.warning("EK store: %s is not used: %s", skipped.source, skipped.why)
        if len(new) > MAX_WARNINGS:
            log.warning("EK store: %d more are not used; see ek-ca show", len(new) - MAX_WARNINGS)
        return loaded
