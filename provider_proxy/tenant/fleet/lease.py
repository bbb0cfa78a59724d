"""What a member of a fleet may do by its own clock: the part of the lease rules without the database.

The database's clock decides between members: a lease ends there, and another member may take the shard
from then on. A member must stop *before* that. So it counts from the moment before it asked, on a clock
that also counts while the machine sleeps (CLOCK_BOOTTIME), and subtracts a margin for clock drift.

Every write carries the lease's epoch, and the database refuses one whose lease is gone (`leases`). Other
receivers cannot refuse: a process may be stopped between its check of the clock and the send. So reports
carry host, epoch and sequence, and receivers drop lower ones.

Pure: no clock of its own, no database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DEFAULT_SHARDS = 64  # more shards than any fleet needs members; moving one moves 1.6 % of the hosts


MAX_LEASE_S = 60.0  # a later end means that the database's clock went back since


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """How long a lease lasts, in seconds.

    Attributes:
        lease_s: from the grant to its end, on the database's clock.
        renew_s: from one renewal to the next. A lease outlives one renewal that fails.
        margin_s: how much earlier than the database a member treats its lease as ended.

    Raises:
        ValueError: a member could not renew in time.
    """

    lease_s: float = 5.0
    renew_s: float = 1.0
    margin_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.renew_s <= (self.lease_s - self.margin_s) / 2:
            raise ValueError("a lease minus its margin must be long enough for two renewals")
        if self.lease_s > MAX_LEASE_S:
            raise ValueError(f"a lease must last at most {MAX_LEASE_S:g} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A shard's lease, as its holder knows it.

    Attributes:
        epoch: rises each time that the shard is taken; never goes back.
        until_s: the holder's own deadline, CLOCK_BOOTTIME seconds.
    """

    epoch: int
    until_s: float


class Holdings:
    """The leases of one member."""

    def __init__(self, times: LeaseTimes) -> None:
        self._times = times
        self._held: dict[int, Held] = {}

    def granted(self, asked_s: float, epochs: Mapping[int, int]) -> None:
        """The database's answer to a renewal: this member holds these shards, and no others.

        Args:
            asked_s: CLOCK_BOOTTIME from *before* the question was sent.
            epochs: the epoch of each shard that is held.
        """
        until_s = asked_s + self._times.lease_s - self._times.margin_s
        self._held = {shard: Held(epoch=epoch, until_s=until_s) for shard, epoch in epochs.items()}

    def drop(self, shards: Iterable[int]) -> None:
        """Forget shards: the database refused a write, or they were given back."""
        for shard in shards:
            self._held.pop(shard, None)

    def epoch(self, shard: int, now_s: float) -> int | None:
        """The epoch under which a shard may be served now; None where it may not be."""
        held = self._held.get(shard)
        return held.epoch if held is not None and now_s < held.until_s else None

    def epochs(self, now_s: float) -> dict[int, int]:
        """The shards that may be served now, with their epochs."""
        return {shard: held.epoch for shard, held in self._held.items() if now_s < held.until_s}

    @property
    def next_end_s(self) -> float | None:
        """When the first lease ends by the member's own clock; None without a lease."""
        return min((held.until_s for held in self._held.values()), default=None)
