"""Remembers the clock states that a member has seen, in case the database shows an older one later.

A database may be older than before: a restored backup, or a standby that lacked something. And what a
member found just before it lost a shard was never written. A member that has watched a host before does
not accept an older state of the same AK as the newest.
"""

from __future__ import annotations

import dataclasses

from provider_proxy.evidence.model import AkName, ClockState
from provider_proxy.tenant.watch.store import HostRecord, HostRecords


class SeenRecords(HostRecords):
    """Records whose clocks are kept after `forget`: 300 bytes for each host that was watched here."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, tuple[AkName, ClockState]] = {}

    def begin(self, name: str, record: HostRecord | None) -> bool:
        """Begin with the database's state of a host, or with the seen one where that is newer.

        Returns:
            Whether the database's state was older than the seen one, which is then written again.
        """
        self.put(name, record)
        seen = self._seen.get(name)
        if seen is None or (record is not None and seen[0] != record.ak_name):
            return False
        if record is None:  # it was removed and came back: the same chip's clock continues
            record = HostRecord(ak_name=seen[0], newest=None, first_use={})
        if record.newest is not None and record.newest >= seen[1]:
            return False
        self.put(name, dataclasses.replace(record, newest=seen[1]))
        self.history(name, record.ak_name, None)
        self.touch(name)
        return True

    def forget(self, name: str) -> None:
        """Another member has the host now; its clock is kept."""
        known = self.newest(name)
        if known is not None:
            self._seen[name] = known
        super().forget(name)

    def newest(self, name: str) -> tuple[AkName, ClockState] | None:
        """The newest state that was accepted or read of a host, with its AK."""
        history = self._histories.get(name)
        if history is not None and (state := history[1].newest()) is not None:
            return history[0], state
        record = self._records.get(name)
        if record is None or record.newest is None:
            return None
        return record.ak_name, record.newest
