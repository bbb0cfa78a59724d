"""A directory with an empty file for each EK that is now linked to a trusted host.

The names are those of spire-tpm-plugin (`vtpm_link.spire_name`), which reads it as its `hash_path`. A
file exists while a host's last verdict is TRUSTED and that VM's link is proven, and at most for one
interval and an answer's time after the proof. All files are removed when the watcher ends; at its start
it removes those that a killed watcher left.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from provider_proxy.common.files import demand_ours
from provider_proxy.errors import HostError
from provider_proxy.tenant.watch.tables import HostRules

log = logging.getLogger(__name__)

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755
RETRY_S = 1.0
LATE_S = 3.0  # a file that exists this long after its time shows a fault
_NAME_RE = re.compile(r"[0-9a-f]{64}")


def lives_s(rules: HostRules) -> float:
    """How long a proof counts: by then the next one has come, if there is one."""
    return rules.interval_s * (1 + rules.jitter) + rules.timeout_s


class EkDirectory:
    """The directory, for as long as the watcher runs.

    Args:
        path: created if it is missing; best in memory, in a directory that is removed with the service.
        now: `trio.current_time`.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = trio.current_time) -> None:
        self._path = path
        self._now = now
        self._until: dict[str, Mapping[str, float]] = {}  # of each EK, by host
        self._changed = trio.Event()

    def open(self) -> None:
        """Create it, and remove what an earlier watcher left.

        Raises:
            HostError: it cannot be made or emptied, or others can change it.
        """
        try:
            self._path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            demand_ours(self._path)
            for path in self._path.iterdir():
                if _NAME_RE.fullmatch(path.name):
                    path.unlink()
        except OSError as exc:
            raise HostError(f"ek_dir: cannot use {self._path}: {exc.strerror}") from exc

    def proven(self, host: str, ek: str, life_s: float) -> None:
        """Note that a host has just proven the link of this EK, and of no other."""
        for other in self._until.keys() - {ek}:
            if host in self._until[other]:
                self.refuted(host)
                break
        self._until[ek] = {**self._until.get(ek, {}), host: self._now() + life_s}
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            os.close(os.open(self._path / ek, flags, FILE_MODE))
        except OSError as exc:
            log.error("ek_dir: cannot write %s: %s", self._path / ek, exc.strerror)
        self._changed.set()
        self._changed = trio.Event()

    def refuted(self, host: str) -> None:
        """Note that a host does not prove any link now."""
        for ek, until in list(self._until.items()):
            if host in until:
                self._keep(ek, {name: end for name, end in until.items() if name != host})

    def is_true(self) -> bool:
        """False where a file exists that no host proves any more: it could not be removed in time."""
        now = self._now()
        ends = (max(until.values(), default=-math.inf) for until in self._until.values())
        return all(end + LATE_S > now for end in ends)

    def _keep(self, ek: str, until: Mapping[str, float]) -> None:
        self._until[ek] = until
        if until:
            return
        try:
            (self._path / ek).unlink(missing_ok=True)
        except OSError as exc:
            log.error("ek_dir: cannot remove %s: %s", self._path / ek, exc.strerror)
            return  # and try again at the next check
        del self._until[ek]

    def remove_old(self) -> float:
        """Remove what was not proven again in time; returns when the next one is due."""
        now = self._now()
        for ek, until in list(self._until.items()):
            self._keep(ek, {host: end for host, end in until.items() if end > now})
        ends = [end for until in self._until.values() for end in until.values()]
        return min(ends, default=float("inf"))

    async def run(self) -> None:
        """Remove files in time, until cancelled."""
        while True:
            due = self.remove_old()
            if not all(self._until.values()):  # one could not be removed
                due = self._now() + RETRY_S
            with trio.move_on_at(max(due, self._now() + 0.05)):
                await self._changed.wait()

    def close(self) -> None:
        """Remove every file."""
        for ek in list(self._until):
            self._keep(ek, {})
