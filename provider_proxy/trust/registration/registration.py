"""Keeps the host's EK and AK registered in one tenant's Keylime registrar.

A round reads the record back, and registers where it is gone or says something else:

    version ── read ── same? ──────────────────────────────────────────── registered
                └─ gone, or another contact ── register ── TPM ── activate ── read again

Never overwrites and never deletes what is another's: a record with another TPM's keys is a `conflict`,
which is looked at again and reported until a person has settled it. Never sends an answer that the TPM
did not give: a wrong one would delete the record. A round ends in a `State`, whatever happens; only
cancellation leaves it half done, and the next one sets that right.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import httpx
import trio

from provider_proxy.common.addresses import split_address
from provider_proxy.common.backoff import backoff_s
from provider_proxy.common.files import FileLock
from provider_proxy.errors import (
    EvidenceFormatError,
    HostError,
    QuoteError,
    RegistrarError,
    TpmError,
)
from provider_proxy.trust.ek_certificate import parse_certificate
from provider_proxy.trust.registration.client import Record, RegistrarClient, RegistrarRules
from provider_proxy.trust.registration.credential import MAX_KEY_BYTES, auth_tag, parse_challenge
from provider_proxy.trust.registration.state import GOOD, PATIENT, Report, State, Status, Step

log = logging.getLogger(__name__)

FIRST_RETRY_S = 2.0  # as Keylime's own programs
TPM_LIMIT_S = 120.0  # for our turn at a busy chip; a registrar's challenge does not run out
LOCK_LIMIT_S = 60.0  # for another process' round
LOCK_POLL_S = 0.1
FORMAT_ONE = 0x080  # TPM_RC of a bad parameter, not of a chip in trouble (TPM 2.0 Part 2, 6.6.2)
UNREAD = (
    "give a client certificate to read it first, or set register_unread if the id is yours alone"
)
AUTH_CODES = (0x08E, 0x0A2)  # TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH: ours, not the registrar's fault


class Keys(Protocol):
    """The host's keys, as they are registered."""

    @property
    def ak_public(self) -> bytes: ...
    @property
    def ek_public(self) -> bytes: ...
    @property
    def ek_cert(self) -> bytes | None: ...


class TpmIdentity(Protocol):
    """The TPM that is registered: `EsysQuoter`."""

    @property
    def identity(self) -> Keys: ...

    async def activate_credential(self, credential: bytes, secret: bytes) -> bytes:
        """The secret that was wrapped for these keys. Raises: QuoteError."""
        ...


class _EndOfRound(Exception):
    """Leaves a round, in this state; never leaves this module."""

    def __init__(self, state: State) -> None:
        self.state = state


OpenHttp = Callable[[], AbstractAsyncContextManager[httpx.AsyncClient]]


class Registration:
    """The host in one registrar.

    Args:
        name: of the registrar, for people.
        open_http: makes its pooled client.
        turn: entered around each round; bounds how many go on at the same time.
        tls_cert: PEM of the certificate that answers at the table's `contact`; None for a contact that
            is no agent.
        lock: keeps two processes of this host from answering each other's challenges.
        now: seconds since the epoch.

    Attributes:
        status: what is known so far.
        observe: told the state after each round.
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
        """Rounds, for ever: at the interval while all is well, sooner while it is not."""
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
        """Until the next round; spread, so that hosts that failed together do not return together."""
        longest: float = self.table.interval_s
        if failed and state not in PATIENT:
            return backoff_s(failed, first_s=FIRST_RETRY_S, longest_s=longest)
        return longest * random.uniform(0.9, 1.0)  # noqa: S311

    async def once(self) -> Report:
        """One round with a client of its own."""
        async with self._open_http() as http:
            return await self.round(http)

    async def round(self, http: httpx.AsyncClient) -> Report:
        """Look, and register where that is needed. Raises nothing: what failed is in the report."""
        steps: list[Step] = []
        try:
            async with self._alone(steps):
                state = await self._round(
                    RegistrarClient(http, self.table.url, self.agent_id), steps
                )
        except _EndOfRound as end:
            state = end.state
        except Exception:
            # A tenant's registrar must not end the service of all others by what nobody thought of.
            log.exception("registrar %s: an unexpected error", self.name)
            state = State.AWAY
            steps.append(
                Step(name="unexpected", good=False, text="an unexpected error; see the log")
            )
        report = Report(state=state, steps=tuple(steps))
        self._note(report)
        return report

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
        """Say what has changed."""
        if report.state is before.state and report.error in (None, before.last_error):
            return
        if report.state in GOOD:
            log.info("registrar %s: %s as %s", self.name, report.state.value, self.agent_id)
            return
        level = logging.ERROR if report.state in PATIENT else logging.WARNING
        log.log(level, "registrar %s: %s: %s", self.name, report.state.value, report.error)

    async def _round(self, client: RegistrarClient, steps: list[Step]) -> State:
        with _step(steps, "version"):
            version = await client.negotiate()
            steps.append(_good("version", f"the registrar speaks API {version}"))
        record, readable = await self._read(
            client, steps, "read", self.table.client_cert is not None
        )
        if record is not None:
            difference = self._difference(record, steps, "read")
            if difference is None:
                steps.append(_good("read", "the record is active and has this TPM's keys"))
                return State.REGISTERED
            steps.append(_good("read", f"{difference}: registering again"))
        elif readable:
            steps.append(_good("read", "there is no active record"))
        elif client.overwrites and not self.table.register_unread:
            text = f"API {version} lets a second host replace the record {self.agent_id}: {UNREAD}"
            raise _bad(steps, "read", State.UNREAD, text)
        await self._register(client, steps)
        if not readable:
            return State.UNCONFIRMED
        record, _ = await self._read(client, steps, "confirm", True)
        if record is None:
            raise _bad(
                steps, "confirm", State.AWAY, "the record was gone right after its activation"
            )
        difference = self._difference(record, steps, "confirm")
        if difference is not None:
            raise _bad(steps, "confirm", State.AWAY, f"{difference}, right after its activation")
        steps.append(_good("confirm", "the record is active and has this TPM's keys"))
        return State.REGISTERED

    async def _read(
        self, client: RegistrarClient, steps: list[Step], name: str, readable: bool
    ) -> tuple[Record | None, bool]:
        """The record, and whether the registrar lets us read at all."""
        if not readable:
            steps.append(_good(name, "no client_cert is configured: the record cannot be read"))
            return None, False
        with _step(steps, name):
            try:
                return await client.read(), True
            except RegistrarError as exc:
                if exc.status not in (400, 401, 403):
                    raise
                text = f"the registrar does not take our client_cert for reading ({exc})"
                steps.append(Step(name=name, good=False, text=text))
        return None, False

    def _difference(self, record: Record, steps: list[Step], name: str) -> str | None:
        """In what a record differs that we may change.

        Raises:
            _EndOfRound: in its keys, so that it is not ours to change.
        """
        keys = self._tpm.identity
        for what, theirs, ours in (
            ("EK", record.ek_public, keys.ek_public),
            ("AK", record.ak_public, keys.ak_public),
        ):
            if theirs != ours:
                raise _bad(
                    steps,
                    name,
                    State.CONFLICT,
                    f"the record {self.agent_id} has another TPM's {what}; it was left as it is",
                )
        if not _same_cert(record.ek_cert, keys.ek_cert):
            return "the record has another EK certificate"
        if self._contact is not None and record.contact != self._contact:
            return "the record has another contact"
        if self._tls_cert is not None and record.tls_cert != self._tls_cert:
            return "the record has another TLS certificate"
        return None

    async def _register(self, client: RegistrarClient, steps: list[Step]) -> None:
        keys = self._tpm.identity
        ours = Record(
            ek_public=keys.ek_public,
            ak_public=keys.ak_public,
            ek_cert=keys.ek_cert,
            contact=self._contact,
            tls_cert=self._tls_cert,
        )
        taken = f"the id {self.agent_id} is another TPM's there; its record was left as it is"
        refused = "the registrar refuses the EK or the AK"
        with _step(
            steps, "register", {403: (State.CONFLICT, taken), 400: (State.REFUSED, refused)}
        ):
            blob = await client.register(ours)
            steps.append(_good("register", "the registrar took EK and AK, and sent a challenge"))
        key = await self._solve(blob, steps)
        wrong = "the registrar refuses the answer to its challenge, and has deleted the record"
        gone = "the record was gone before its activation"
        with _step(
            steps,
            "activate",
            {400: (State.WRONG_CHALLENGE, wrong), 404: (State.AWAY, gone)},
        ):
            await client.activate(auth_tag(key, self.agent_id))
            steps.append(_good("activate", "the registrar accepted the answer"))

    async def _solve(self, blob: bytes, steps: list[Step]) -> bytes:
        """The key in a challenge. Raises: _EndOfRound."""
        state = State.WRONG_CHALLENGE
        try:
            credential, secret = parse_challenge(blob)
            with trio.fail_after(TPM_LIMIT_S):
                key = await self._tpm.activate_credential(credential, secret)
            if not 0 < len(key) <= MAX_KEY_BYTES:
                raise EvidenceFormatError(f"the challenge holds a key of {len(key)} bytes")
        except EvidenceFormatError as exc:
            raise _bad(steps, "tpm", state, str(exc)) from exc
        except trio.TooSlowError as exc:
            text = f"the TPM did not answer within {TPM_LIMIT_S:g} s"
            raise _bad(steps, "tpm", State.NO_TPM, text) from exc
        except (QuoteError, HostError) as exc:
            if _is_refusal(exc):
                text = "the TPM refuses the challenge: it is not for this EK and AK"
                raise _bad(steps, "tpm", state, text) from exc
            raise _bad(steps, "tpm", State.NO_TPM, str(exc)) from exc
        steps.append(_good("tpm", "the TPM solved it: EK and AK are both in it"))
        return key

    @contextlib.asynccontextmanager
    async def _alone(self, steps: list[Step]) -> AsyncIterator[None]:
        """Hold the lock. It is a courtesy: what two rounds do to each other, the next one sets right.

        Raises:
            _EndOfRound: another process does not let it go.
        """
        lock = FileLock(self._lock) if self._lock is not None else None
        try:
            with trio.fail_after(LOCK_LIMIT_S):
                while lock is not None and not lock.take():  # noqa: ASYNC110  # of another process
                    await trio.sleep(LOCK_POLL_S)
        except trio.TooSlowError as exc:
            raise _bad(steps, "lock", State.AWAY, "another process is registering") from exc
        except HostError as exc:
            steps.append(Step(name="lock", good=False, text=f"{exc}; going on without"))
        try:
            yield
        finally:
            if lock is not None:
                lock.release()


def _is_refusal(error: QuoteError | HostError) -> bool:
    """True where the TPM found fault with the credential, False where it is in trouble itself."""
    cause = error if isinstance(error, TpmError) else error.__cause__
    return (
        isinstance(cause, TpmError) and bool(cause.code & FORMAT_ONE) and not _is_auth(cause.code)
    )


def _is_auth(code: int) -> bool:
    return code & 0xFFFF in AUTH_CODES


def _same_cert(theirs: bytes | None, ours: bytes | None) -> bool:
    """True where both are the same certificate.

    One that is not proper DER, as some makers' are, registrars up to Keylime 7.12 store in an encoding
    of their own. It is the same then where it is for the same key; one that nobody can read cannot be
    compared, and is not sent again and again.
    """
    if theirs == ours:
        return True
    if theirs is None or ours is None:
        return False
    try:
        own = parse_certificate(ours)
    except EvidenceFormatError:
        return True
    if not own.is_repaired:
        return False
    try:
        return parse_certificate(theirs).parsed.public_key() == own.parsed.public_key()
    except EvidenceFormatError:
        return False


def _good(name: str, text: str) -> Step:
    return Step(name=name, good=True, text=text)


def _bad(steps: list[Step], name: str, state: State, text: str) -> _EndOfRound:
    steps.append(Step(name=name, good=False, text=text))
    return _EndOfRound(state)


@contextlib.contextmanager
def _step(
    steps: list[Step], name: str, meanings: dict[int, tuple[State, str]] | None = None
) -> Iterator[None]:
    """A call: its failure ends the round, in the state that its HTTP status means."""
    try:
        yield
    except RegistrarError as exc:
        if meanings is not None and exc.status in meanings:
            state, text = meanings[exc.status]
            raise _bad(steps, name, state, f"{text} ({exc})") from exc
        raise _bad(steps, name, State.AWAY, str(exc)) from exc
