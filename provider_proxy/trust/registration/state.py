"""The status of a registration: states, the report of a round, and what others are told.

Values only. A tenant is told less of its own registrations than the provider sees: no error texts,
which may name files and addresses of the host.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """How a round ended."""

    PENDING = "pending"  # no round has ended yet
    REGISTERED = "registered"  # read back: active, and with this TPM's keys
    UNCONFIRMED = "unconfirmed"  # activated, but the registrar does not let us read
    CONFLICT = "conflict"  # the record has another TPM's keys
    UNREAD = "unread"  # not registered: a record that may be another's could not be read first
    REFUSED = "refused"  # the registrar does not accept these keys
    WRONG_CHALLENGE = (
        "wrong_challenge"  # the challenge was not for these keys, or its answer was refused
    )
    AWAY = "away"  # no answer, or an unusable one
    NO_TPM = "no_tpm"  # the chip gave no answer


GOOD = frozenset((State.REGISTERED, State.UNCONFIRMED))
PATIENT = frozenset(
    (State.CONFLICT, State.UNREAD, State.REFUSED)
)  # a person must act: asking again soon does not help


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a round, and its result."""

    name: str
    good: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A round, step by step."""

    state: State
    steps: tuple[Step, ...]

    @property
    def error(self) -> str | None:
        """What failed; None where nothing did."""
        if self.state in GOOD:
            return None
        return next((step.text for step in reversed(self.steps) if not step.good), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is known of a registration. Times are seconds since the epoch.

    Attributes:
        since: when this state began.
        last_success: when a round last ended well; None before the first.
        last_error, last_error_at: of the last round that failed.
    """

    state: State = State.PENDING
    since: float = 0.0
    last_success: float | None = None
    last_error: str | None = None
    last_error_at: float | None = None


def for_tenant(registrar: str, agent_id: str, status: Status) -> dict[str, object]:
    """An entry of `registrations` in `GET /verifier/identity`."""
    return {
        "registrar": registrar,
        "agent_id": agent_id,
        "state": status.state.value,
        "last_success": _seconds(status.last_success),
    }


def for_provider(
    registrar: str, agent_id: str, status: Status, *, url: str, tenant: str | None
) -> dict[str, object]:
    """An entry of `GET /registrations` on the admin listener."""
    return {
        "registrar": registrar,
        "tenant": tenant,
        "url": url,
        "agent_id": agent_id,
        "state": status.state.value,
        "since": _seconds(status.since),
        "last_success": _seconds(status.last_success),
        "last_error": status.last_error,
        "last_error_at": _seconds(status.last_error_at),
    }


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
