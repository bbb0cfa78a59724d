"""One round at a registrar: reads the record, and registers where it is missing or differs.

    version ── read ── same? ──────────────────────────────────────────── registered
                └─ gone, or another contact ── register ── TPM ── activate ── read again

Never overwrites and never deletes another's record: a record with another TPM's keys is a `conflict`.
Never sends an answer that the TPM did not give: a wrong one would delete the record. `Registration`
decides when a round takes place, how long it may take, and what follows from its state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import trio

from provider_proxy.errors import (
    EvidenceFormatError,
    HostError,
    QuoteError,
    RegistrarError,
    TpmError,
)
from provider_proxy.trust.ek_certificate import parse_certificate
from provider_proxy.trust.registration.client import Record, RegistrarClient
from provider_proxy.trust.registration.credential import MAX_KEY_BYTES, auth_tag, parse_challenge
from provider_proxy.trust.registration.state import State, Step

TPM_LIMIT_S = 120.0  # to wait for a busy chip; a registrar's challenge does not expire
FORMAT_ONE = 0x080  # TPM_RC of a bad parameter, not of a failing chip (TPM 2.0 Part 2, 6.6.2)
UNREAD = (
    "set client_cert to read the record first, or set register_unread if only this host uses the id"
)
AUTH_CODES = (
    0x08E,
    0x0A2,
)  # TPM_RC_AUTH_FAIL, TPM_RC_BAD_AUTH: this host's fault, not the registrar's


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


class EndOfRound(Exception):
    """Ends a round in this state; `Registration` catches it."""

    def __init__(self, state: State) -> None:
        self.state = state


class Round:
    """A round.

    Args:
        agent_id: the host's id there.
        contact: IP address and port for the record; None to leave it as it is.
        tls_cert: PEM of the certificate that answers there; None for a contact that is not an agent.
        may_read: there is a client certificate; without one no registrar lets a client read.
        register_unread: register even where another TPM's record could be replaced unnoticed.
        steps: each step and its result is added here.
    """

    def __init__(
        self,
        client: RegistrarClient,
        tpm: TpmIdentity,
        agent_id: str,
        *,
        contact: tuple[str, int] | None,
        tls_cert: str | None,
        may_read: bool,
        register_unread: bool,
        steps: list[Step],
    ) -> None:
        self._client = client
        self._tpm = tpm
        self._agent_id = agent_id
        self._contact = contact
        self._tls_cert = tls_cert
        self._may_read = may_read
        self._register_unread = register_unread
        self._steps = steps

    async def run(self) -> State:
        """Check, and register where needed.

        Raises:
            EndOfRound: the round failed.
        """
        client, steps = self._client, self._steps
        with _step(steps, "version"):
            version = await client.negotiate()
            steps.append(_good("version", f"the registrar supports API {version}"))
        record, readable = await self._read("read", self._may_read)
        if record is not None:
            difference = self._difference(record, "read")
            if difference is None:
                steps.append(_good("read", "the record is active and has this TPM's keys"))
                return State.REGISTERED
            steps.append(_good("read", f"{difference}: registering again"))
        elif readable:
            steps.append(_good("read", "there is no active record"))
        elif client.overwrites and not self._register_unread:
            text = f"with API {version} a second host can replace the record {self._agent_id}: {UNREAD}"
            raise bad(steps, "read", State.UNREAD, text)
        await self._register()
        if not readable:
            return State.UNCONFIRMED
        record, _ = await self._read("confirm", True)
        if record is None:
            raise bad(
                steps, "confirm", State.AWAY, "the record was gone right after its activation"
            )
        difference = self._difference(record, "confirm")
        if difference is not None:
            raise bad(steps, "confirm", State.AWAY, f"{difference}, right after its activation")
        steps.append(_good("confirm", "the record is active and has this TPM's keys"))
        return State.REGISTERED

    async def _read(self, name: str, readable: bool) -> tuple[Record | None, bool]:
        """The record, and whether the registrar lets us read at all."""
        steps = self._steps
        if not readable:
            steps.append(_good(name, "no client_cert is configured: the record cannot be read"))
            return None, False
        with _step(steps, name):
            try:
                return await self._client.read(), True
            except RegistrarError as exc:
                if exc.status not in (400, 401, 403):
                    raise
                text = f"the registrar does not let our client_cert read the record ({exc})"
                steps.append(Step(name=name, good=False, text=text))
        return None, False

    def _difference(self, record: Record, name: str) -> str | None:
        """How a record differs in parts that this host may change.

        Raises:
            EndOfRound: it has other keys, so this host must not change it.
        """
        keys = self._tpm.identity
        for what, theirs, ours in (
            ("EK", record.ek_public, keys.ek_public),
            ("AK", record.ak_public, keys.ak_public),
        ):
            if theirs != ours:
                raise bad(
                    self._steps,
                    name,
                    State.CONFLICT,
                    f"the record {self._agent_id} has another TPM's {what}; it was not changed",
                )
        if not same_certificate(record.ek_cert, keys.ek_cert):
            return "the record has another EK certificate"
        if self._contact is not None and record.contact != self._contact:
            return "the record has another contact"
        if self._tls_cert is not None and record.tls_cert != self._tls_cert:
            return "the record has another TLS certificate"
        return None

    async def _register(self) -> None:
        client, steps = self._client, self._steps
        keys = self._tpm.identity
        ours = Record(
            ek_public=keys.ek_public,
            ak_public=keys.ak_public,
            ek_cert=keys.ek_cert,
            contact=self._contact,
            tls_cert=self._tls_cert,
        )
        taken = f"the id {self._agent_id} already has another TPM's record; it was not changed"
        refused = "the registrar refused the EK or the AK"
        with _step(
            steps, "register", {403: (State.CONFLICT, taken), 400: (State.REFUSED, refused)}
        ):
            blob = await client.register(ours)
            steps.append(
                _good("register", "the registrar accepted EK and AK, and sent a challenge")
            )
        key = await self._solve(blob)
        wrong = "the registrar refused the answer to its challenge and deleted the record"
        gone = "the record was gone before its activation"
        with _step(
            steps,
            "activate",
            {400: (State.WRONG_CHALLENGE, wrong), 404: (State.AWAY, gone)},
        ):
            await client.activate(auth_tag(key, self._agent_id))
            steps.append(_good("activate", "the registrar accepted the answer"))

    async def _solve(self, blob: bytes) -> bytes:
        """The key in a challenge. Raises: EndOfRound."""
        steps = self._steps
        state = State.WRONG_CHALLENGE
        try:
            credential, secret = parse_challenge(blob)
            with trio.fail_after(TPM_LIMIT_S):
                key = await self._tpm.activate_credential(credential, secret)
            if not 0 < len(key) <= MAX_KEY_BYTES:
                raise EvidenceFormatError(f"the challenge holds a key of {len(key)} bytes")
        except EvidenceFormatError as exc:
            raise bad(steps, "tpm", state, str(exc)) from exc
        except trio.TooSlowError as exc:
            text = f"the TPM did not answer within {TPM_LIMIT_S:g} s"
            raise bad(steps, "tpm", State.NO_TPM, text) from exc
        except (QuoteError, HostError) as exc:
            if _is_refusal(exc):
                text = "the TPM refused the challenge: it is not for this EK and AK"
                raise bad(steps, "tpm", state, text) from exc
            raise bad(steps, "tpm", State.NO_TPM, str(exc)) from exc
        steps.append(_good("tpm", "the TPM solved the challenge: it holds both EK and AK"))
        return key


def _is_refusal(error: QuoteError | HostError) -> bool:
    """True where the TPM refused the credential, False where the TPM itself fails."""
    cause = error if isinstance(error, TpmError) else error.__cause__
    return (
        isinstance(cause, TpmError) and bool(cause.code & FORMAT_ONE) and not _is_auth(cause.code)
    )


def _is_auth(code: int) -> bool:
    return code & 0xFFFF in AUTH_CODES


def same_certificate(theirs: bytes | None, ours: bytes | None) -> bool:
    """True where both are the same certificate.

    Registrars up to Keylime 7.12 re-encode a certificate that is not proper DER, as some makers' are.
    Such certificates are the same if they are for one key. One that cannot be read cannot be compared,
    and is not sent again and again.
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


def bad(steps: list[Step], name: str, state: State, text: str) -> EndOfRound:
    """Note a failed step; the exception that ends a round in this state."""
    steps.append(Step(name=name, good=False, text=text))
    return EndOfRound(state)


@contextlib.contextmanager
def _step(
    steps: list[Step], name: str, meanings: dict[int, tuple[State, str]] | None = None
) -> Iterator[None]:
    """A call: its failure ends the round in the state for its HTTP status."""
    try:
        yield
    except RegistrarError as exc:
        if meanings is not None and exc.status in meanings:
            state, text = meanings[exc.status]
            raise bad(steps, name, state, f"{text} ({exc})") from exc
        raise bad(steps, name, State.AWAY, str(exc)) from exc
