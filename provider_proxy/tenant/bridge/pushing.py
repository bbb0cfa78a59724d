"""One host in push mode: asks it, and posts what it proved to the verifier, at the verifier's interval.

The agent is the same as in pull mode: one question for each challenge, judged the same way. This module
has what the other protocol needs. The verifier must know the host's boot and the length of its IMA list
before it gives its challenge; if the host has been reset since, another attestation is begun.
A refusal is posted, too, so that the verifier's verdict is "fail" and not a timeout: a quote without a
signature, and the reason as the attestation's `evidence_version`.

Invariants: values are sent only where `Agent.attest` returned for this very challenge; nothing is posted
while the verifier is known to have a runtime policy that it does not apply.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import trio

from provider_proxy.common.backoff import backoff_s
from provider_proxy.errors import (
    EvidenceFormatError,
    HostError,
    ProviderProxyError,
    ReplyError,
    UsageError,
    VerificationError,
)
from provider_proxy.tenant.bridge.agent import IMA_PCR, Agent, Poll, Shown
from provider_proxy.tenant.bridge.api import refused_because
from provider_proxy.tenant.bridge.push_api import (
    IMA,
    QUOTE,
    UEFI,
    NotEnrolledError,
    Offer,
    PushVerifier,
    Request,
)
from provider_proxy.tenant.bridge.quoting import DATA_PCR, MAX_BOOTTIME, make_unsigned

log = logging.getLogger(__name__)

CHALLENGE_BYTES = 16  # of a question that only finds out the host's boot
MIN_PAUSE_S = 0.1  # a verifier whose interval is 0
NOT_ENROLLED_PAUSE_S = 5.0  # Keylime accepts 15 sessions a minute from an agent
MAX_RESETS = 3  # of a host within one round
ASK_POLICY_AGAIN_S = 300.0  # it may be large
REFUSED_LINE = "refused\n"

Evidence = tuple[tuple[str, Mapping[str, object]], ...]
"""By kind, in the wanted order; Keylime's names."""

ReadPolicy = Callable[[str], Awaitable[Mapping[str, object] | None]]
"""The runtime policy that the verifier has for an agent; None without one."""


@dataclass(slots=True, kw_only=True)
class Posted:
    """The result of posting, for people.

    Attributes:
        verdict: the verifier's: "pass", "fail" (until the agent is added again) or "timeout".
        error: why the last posting failed; None where it did not.
    """

    posts: int = 0
    verdict: str | None = None
    error: str | None = None


class Pusher:
    """One host's agent at a verifier in push mode.

    Args:
        verifier: the agent's access.
        read_policy: asks the verifier as an administrator; None where there is no certificate for it.
    """

    def __init__(
        self, agent: Agent, verifier: PushVerifier, *, read_policy: ReadPolicy | None = None
    ) -> None:
        self.posted = Posted()
        self._agent = agent
        self._verifier = verifier
        self._read_policy = read_policy
        self._boot: int | None = None  # of the host's TPM, from the last answer
        self._boottime = 0
        self._entries = 1  # of its IMA list; every list has one
        self._told: str | None = None  # the reason that the verifier has
        self._open: Request | None = None  # an attestation without evidence yet
        self._policy_ok_until = -1.0

    async def run(self) -> None:
        """Attest, for ever. Raises nothing but cancellation."""
        failed = 0
        rules = self._agent.questions.setting.rules
        while True:
            pause_s, error = 0.0, None
            try:
                pause_s = await self._round()
                failed = 0
            except ProviderProxyError as exc:
                failed, error = failed + 1, exc
            except Exception:
                # A bug that one host triggers must not end the service of all others.
                log.exception("%s: an unexpected error", self._agent.name)
                failed, error = failed + 1, HostError("an unexpected error; see the bridge's log")
            if error is not None:
                rules = self._agent.questions.setting.rules
                pause_s = backoff_s(
                    failed, first_s=rules.retry_interval_s, longest_s=rules.max_retry_s
                )
                if isinstance(error, ReplyError) and error.retry_after_s is not None:
                    pause_s = error.retry_after_s
                if isinstance(error, NotEnrolledError):
                    pause_s = max(pause_s, NOT_ENROLLED_PAUSE_S)
            self._note(error)
            await trio.sleep(max(pause_s, MIN_PAUSE_S))

    def _note(self, error: ProviderProxyError | None) -> None:
        text = None if error is None else str(error)
        if text is not None and text != self.posted.error:
            log.warning("%s: nothing was posted: %s", self._agent.name, text)
        self.posted.error = text

    async def _round(self) -> float:
        """One attestation; seconds until the next."""
        await self._read_verdict()
        for _ in range(MAX_RESETS):
            try:
                if self._boot is None:
                    await self._ask(secrets.token_bytes(CHALLENGE_BYTES), 0)
                request = self._open = await self._offer()
                await self._check_policy(request)
                shown = await self._answer(request)
            except VerificationError as exc:
                return await self._refuse(exc)
            if shown is not None:
                self._told = None
                return await self._submit(_evidence(request, shown))
        raise ReplyError("the host was reset repeatedly during one attestation")

    async def _submit(self, evidence: Evidence) -> float:
        self._open = None
        pause_s = await self._verifier.submit(evidence)
        self.posted.posts += 1
        return pause_s

    async def _read_verdict(self) -> None:
        if not self.posted.posts:
            return
        try:
            verdict = await self._verifier.verdict()
        except ReplyError as exc:
            log.debug("%s: the verifier's verdict is not known: %s", self._agent.name, exc)
            return
        if verdict is None or verdict == self.posted.verdict:
            return
        self.posted.verdict = verdict
        level = logging.INFO if verdict == "pass" else logging.ERROR
        log.log(level, "%s: the verifier's verdict is %s", self._agent.name, verdict)

    async def _offer(self) -> Request:
        """Begin an attestation. If the list is longer than known here, it is asked for first."""
        try:
            return await self._verifier.offer(Offer(boottime=self._boottime, entries=self._entries))
        except ReplyError as exc:
            # After a restart the verifier knows more of the list than this agent.
            if exc.status not in (400, 422):
                raise
        await self._ask(secrets.token_bytes(CHALLENGE_BYTES), 1 << IMA_PCR)
        return await self._verifier.offer(Offer(boottime=self._boottime, entries=self._entries))

    async def _ask(self, nonce: bytes, mask: int, entry: int = 0) -> Shown:
        poll = Poll(
            nonce=nonce,
            mask=mask & ~(1 << DATA_PCR),
            ima_ml_entry=entry,
            data_pcr=not mask or bool(mask >> DATA_PCR & 1),
        )
        wait_s = self._agent.questions.setting.rules.timeout_s
        shown = await self._agent.attest(poll, wait_s)
        if shown.boot != self._boot:
            self._entries = 1
        self._boot, self._boottime = shown.boot, shown.boottime
        if shown.ima is not None:
            self._entries = max(1, shown.ima_entry + shown.ima.count("\n"))
        return shown

    async def _answer(self, request: Request) -> Shown | None:
        """What goes into this attestation; None where it is of another boot."""
        boot = self._boot
        shown = await self._ask(request.challenge, request.mask, request.ima_offset or 0)
        return shown if shown.boot == boot else None

    async def _check_policy(self, request: Request) -> None:
        """Check that push mode does not silently ignore a runtime policy (`meta.generator` 0 or 1)."""
        now = trio.current_time()
        if IMA in request.kinds or self._read_policy is None or now < self._policy_ok_until:
            return
        policy = await self._read_policy(self._agent.agent_id)
        if policy is not None and _says_something(policy):
            raise UsageError(
                "the verifier has a runtime policy for this agent and does not ask for the IMA list: in "
                "push mode it ignores a policy whose meta.generator is 0 or 1; make it with "
                "keylime-policy, and add the agent again"
            )
        self._policy_ok_until = now + ASK_POLICY_AGAIN_S

    async def _refuse(self, error: VerificationError) -> float:
        """Make the verifier's verdict "fail". A new reason needs an attestation that shows it."""
        reason, request = refused_because(error), self._open
        if request is None or reason != self._told:
            offer = Offer(boottime=MAX_BOOTTIME, entries=1, note=reason)  # no boot: the list from 0
            request, entries = await self._verifier.offer(offer), 1
        else:
            entries = self._entries
        self._told = reason
        return await self._submit(_no_evidence(request, entries))


def _says_something(policy: Mapping[str, object]) -> bool:
    names = ("digests", "excludes", "keyrings", "ima-buf", "verification-keys")
    return any(policy.get(name) for name in names)


def _evidence(request: Request, shown: Shown) -> Evidence:
    given: dict[str, Mapping[str, object]] = {QUOTE: _quote(shown.quote)}
    if request.ima_offset is not None:
        lines = (shown.ima or "").split("\n")
        given[IMA] = {"entries": "\n".join(lines[request.ima_offset - shown.ima_entry :])}
    if UEFI in request.kinds:
        given[UEFI] = {"entries": shown.values().get("mb_measurement_list", "")}
    return tuple((kind, given[kind]) for kind in request.kinds)


def _no_evidence(request: Request, entries: int) -> Evidence:
    """Evidence that fails an attestation: nothing signed, and as many lines as were offered."""
    given: dict[str, Mapping[str, object]] = {
        QUOTE: _quote(make_unsigned(request.mask)),
        IMA: {"entries": REFUSED_LINE * (entries - (request.ima_offset or 0))},
        UEFI: {"entries": ""},
    }
    return tuple((kind, given[kind]) for kind in request.kinds)


def _quote(text: str) -> Mapping[str, object]:
    """Keylime's quote string, in the parts of push mode."""
    parts = text.removeprefix("r").split(":")
    if len(parts) != 3:
        raise EvidenceFormatError("a quote has three parts")
    message, signature, pcrs = parts
    return {"message": message, "signature": signature, "subject_data": pcrs}
