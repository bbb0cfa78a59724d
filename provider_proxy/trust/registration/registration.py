"""Keeps the host's EK and AK registered in one tenant's Keylime registrar.

Runs rounds (`round.py`) at an interval, and sooner after a failure; a round's result is kept as the
status and reported. A `conflict` is checked again and reported until a person has settled it. A round
always ends in a `State` within `ROUND_LIMIT_S`; after a cancellation the next round
corrects what was left unfinished.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx
import trio

from provider_proxy.common.addresses import split_address
from provider_proxy.common.backoff import backoff_s
from provider_proxy.common.files import FileLock
from provider_proxy.errors import HostError
from provider_proxy.trust.registration.client import RegistrarClient, RegistrarRules
from provider_proxy.trust.registration.round import EndOfRound, Round, TpmIdentity, bad
from provider_proxy.trust.registration.state import GOOD, PATIENT, Report, State, Status, Step

log = logging.getLogger(__name__)

FIRST_RETRY_S = 2.0  # as Keylime's own programs
ROUND_LIMIT_S = 240.0  # lock, calls and chip together; a round takes seconds
LOCK_LIMIT_S = 60.0  # for another process' round
LOCK_POLL_S = 0.1


OpenHttp = Callable[[], AbstractAsyncContextManager[httpx.AsyncClient]]


class Registration:
    """The host in one registrar.

    Args:
        name: of the registrar, for people.
        open_http: makes its pooled client.
        turn: entered around each round; bounds how many run at the same time.
        tls_cert: PEM of the certificate that answers at the table's `contact`; None for a contact that
            is not an agent.
        lock: keeps two processes of this host from answering each other's challenges.
        now: seconds since the epoch.

    Attributes:
        status: what is known so far.
        observe: called with the state after each round.
    """

    def __init__(
        self,
        name: str,
        table: RegistrarRules,
        agent_id: str,
        tpm: TpmIdentity,
        *,
        open_http: OpenHttp,
        turn: Callable[[], AbstractAsyncContextManager[object]] = contextlib.nullcontext,
        tls_cert: str | None = None,
        lock: Path | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.table = table
        self.agent_id = agent_id
        self._tpm = tpm
        self._open_http = open_http
        self._turn = turn
        self._tls_cert = tls_cert
        self._lock = lock
        self._contact = split_address(table.contact) if table.contact is not None else None
        self._now = now
        self.status = Status(since=now())
        self.observe: Callable[[State], None] = lambda state: None

    async def run(self) -> None:
        """Run rounds for ever: at the interval after a success, sooner after a failure."""
        failed = 0
        async with self._open_http() as http:
            while True:
                before = self.status
                async with self._turn():
                    report = await self.round(http)
                self._log(before, report)
                failed = 0 if report.state in GOOD else failed + 1
                await trio.sleep(self._pause_s(report.state, failed))

    def _pause_s(self, state: State, failed: int) -> float:
        """Seconds until the next round, spread so that hosts that failed together retry apart."""
        longest: float = self.table.interval_s
        if failed and state not in PATIENT:
            return backoff_s(failed, first_s=FIRST_RETRY_S, longest_s=longest)
        return longest * random.uniform(0.9, 1.0)  # noqa: S311

    async def once(self) -> Report:
        """One round with a client of its own."""
        async with self._open_http() as http:
            return await self.round(http)

    async def round(self, http: httpx.AsyncClient) -> Report:
        """Check, and register where needed. Raises nothing: failures are in the report."""
        steps: list[Step] = []
        state = State.AWAY
        try:
            with trio.fail_after(ROUND_LIMIT_S):
                async with self._alone(steps):
                    state = await self._make(http, steps).run()
        except trio.TooSlowError:
            text = f"the round did not end within {ROUND_LIMIT_S:g} s"
            steps.append(Step(name="limit", good=False, text=text))
        except EndOfRound as end:
            state = end.state
        except Exception:
            # An unforeseen error of one tenant's registrar must not end the service of all others.
            log.exception("registrar %s: an unexpected error", self.name)
            steps.append(
                Step(name="unexpected", good=False, text="an unexpected error; see the log")
            )
        report = Report(state=state, steps=tuple(steps))
        self._note(report)
        return report

    def _make(self, http: httpx.AsyncClient, steps: list[Step]) -> Round:
        return Round(
            RegistrarClient(http, self.table.url, self.agent_id),
            self._tpm,
            self.agent_id,
            contact=self._contact,
            tls_cert=self._tls_cert,
            may_read=self.table.client_cert is not None,
            register_unread=self.table.register_unread,
            steps=steps,
        )

    def _note(self, report: Report) -> None:
        before, now = self.status, self._now()
        good = report.state in GOOD
        self.status = Status(
            state=report.state,
            since=now if report.state is not before.state else before.since,
            last_success=now if good else before.last_success,
            last_error=before.last_error if good else report.error,
            last_error_at=before.last_error_at if good else now,
        )
        self.observe(report.state)

    def _log(self, before: Status, report: Report) -> None:
        """Log what has changed."""
        if report.state is before.state and report.error in (None, before.last_error):
            return
        if report.state in GOOD:
            log.info("registrar %s: %s as %s", self.name, report.state.value, self.agent_id)
            return
        level = logging.ERROR if report.state in PATIENT else logging.WARNING
        log.log(level, "registrar %s: %s: %s", self.name, report.state.value, report.error)

    @contextlib.asynccontextmanager
    async def _alone(self, steps: list[Step]) -> AsyncIterator[None]:
        """Hold the lock. It only saves work: the next round corrects what two parallel rounds did.

        Raises:
            EndOfRound: another process does not release it.
        """
        lock = FileLock(self._lock) if self._lock is not None else None
        try:
            with trio.fail_after(LOCK_LIMIT_S):
                while lock is not None and not lock.take():  # noqa: ASYNC110  # of another process
                    await trio.sleep(LOCK_POLL_S)
        except trio.TooSlowError as exc:
            raise bad(
                steps, "lock", State.AWAY, "another process is registering and holds the lock"
            ) from exc
        except HostError as exc:
            steps.append(Step(name="lock", good=False, text=f"{exc}; continuing without the lock"))
        try:
            yield
        finally:
            if lock is not None:
                lock.release()
