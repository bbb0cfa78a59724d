"""Every date that a program depends on: certificates, CAs, revocation lists. One place knows them all.

Each is a `Dated`, read together with its file: so it is the date of what is in use, not of a newer file
on disk. A `Calendar` warns in the log, once a day for each, from `WARN_DAYS` before the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

WARN_DAYS = 14  # certificates of 90 days are renewed after 60; a CRL lasts 30 or less
LOOK_EVERY_S = 3600.0
WARN_EVERY = timedelta(days=1)
GOOD, SOON, EXPIRED, NOT_YET = "good", "soon", "expired", "not yet valid"

Now = Callable[[], datetime]


def utc_now() -> datetime:
    """Now, with its time zone."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dated:
    """When something in a file begins to be valid, and when that ends.

    Attributes:
        name: of the setting or the option, "listen.tls_cert".
        path: of the file.
        vital: the program can serve nobody without it.
        means: what happens when it expires, for people; empty where that is plain.
    """

    name: str
    path: Path
    not_before: datetime
    not_after: datetime
    vital: bool = False
    means: str = ""

    def state(self, now: datetime) -> str:
        """`GOOD`, `SOON`, `EXPIRED` or `NOT_YET`."""
        if now > self.not_after:
            return EXPIRED
        if now < self.not_before:
            return NOT_YET
        # Not now + WARN_DAYS > not_after, which datetime's end does not take.
        return SOON if self.not_after - now < timedelta(days=WARN_DAYS) else GOOD

    def problem(self, now: datetime) -> str | None:
        """Why it is not valid now; None where it is."""
        state = self.state(now)
        if state == EXPIRED:
            meaning = f": {self.means}" if self.means else ""
            return f"{self.name}: {self.path} expired on {_day(self.not_after)}{meaning}"
        if state == NOT_YET:
            return (
                f"{self.name}: {self.path} is not valid before {_day(self.not_before)}: is the clock "
                "of this machine right?"
            )
        return None

    def warning(self, now: datetime) -> str | None:
        """What needs a person: a problem, or an end that is near; None where all is well."""
        if self.state(now) != SOON:
            return self.problem(now)
        days = (self.not_after - now).days
        left = "today" if days == 0 else f"in {days} days" if days > 1 else "tomorrow"
        meaning = f"; then {self.means}" if self.means else ""
        return f"{self.name}: {self.path} expires {left}, on {_day(self.not_after)}{meaning}"


def _day(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"


class Labelled(Protocol):
    """A gauge of prometheus-client with one label, which a program that only reads dates may lack."""

    def clear(self) -> None: ...

    def labels(self, name: str, /) -> Settable: ...


class Settable(Protocol):
    """One of its values."""

    def set(self, value: float, /) -> None: ...


def show_dates(gauge: Labelled, dates: Iterable[Dated]) -> None:
    """Set a gauge to the end of each, in seconds since the epoch; earlier values are removed."""
    gauge.clear()
    for dated in dates:
        gauge.labels(dated.name).set(dated.not_after.timestamp())


class Calendar:
    """The dates of a running program.

    Args:
        dates: read together with their files.
        show: gets each name and its end, in seconds since the epoch, whenever they change; for metrics.
    """

    def __init__(
        self,
        dates: Iterable[Dated] = (),
        *,
        show: Callable[[Sequence[Dated]], object] = lambda dates: None,
        now: Now = utc_now,
    ) -> None:
        self._show = show
        self._now = now
        self._warned: dict[tuple[str, datetime], datetime] = {}
        self.dates: tuple[Dated, ...] = ()
        self.replace(dates)

    def replace(self, dates: Iterable[Dated]) -> None:
        """Files were read again."""
        self.dates = tuple(dates)
        self._show(self.dates)

    def not_ready(self) -> str | None:
        """Why nobody can be served; None where that is not so."""
        now = self._now()
        problems = (dated.problem(now) for dated in self.dates if dated.vital)
        return next((problem for problem in problems if problem is not None), None)

    def values(self) -> list[dict[str, object]]:
        """As a status has them, the next to end first."""
        now = self._now()
        return [
            {
                "what": dated.name,
                "path": str(dated.path),
                "not_after": int(dated.not_after.timestamp()),
                "state": dated.state(now),
                "warning": dated.warning(now),
            }
            for dated in sorted(self.dates, key=lambda dated: (dated.not_after, dated.name))
        ]

    def warn(self) -> None:
        """Log what has ended or ends soon, each once a day."""
        now = self._now()
        for dated in self.dates:
            warning = dated.warning(now)
            key = (dated.name, dated.not_after)
            last = self._warned.get(key)
            if warning is None or (last is not None and now - last < WARN_EVERY):
                continue
            self._warned[key] = now
            log.log(logging.WARNING if dated.state(now) == SOON else logging.ERROR, "%s", warning)

    async def run(self) -> None:
        """Warn, for ever. Needs trio, which a program that only reads dates may lack."""
        import trio

        while True:
            self.warn()
            await trio.sleep(LOOK_EVERY_S)
