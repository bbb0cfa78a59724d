"""One host as an agent of the tenant's Keylime: each poll is one fresh question to the host's proxy.

A poll's nonce is in the host's nonce, so no answer is older than the poll. A poll is not held longer than
the host usually takes, because it uses a worker of the verifier that other hosts need. For a host that
was silent last time the wait is short; its question stays open, so that its return is noticed.

Invariants: values are sent only where `HostQuestions.attest` returned for this very poll; a refusal has
no quote; at most one question to a host is open.
"""

from __future__ import annotations

import base64
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from provider_proxy.errors import (
    ClockError,
    HostError,
    ProviderProxyError,
    ReplyError,
    VerificationError,
)
from provider_proxy.evidence.model import Nonce
from provider_proxy.tenant.bridge import quoting
from provider_proxy.tenant.bridge.keys import BridgeKeys
from provider_proxy.tenant.bridge.metrics import BridgeMetrics
from provider_proxy.tenant.bridge.view import KeylimeView
from provider_proxy.tenant.watch.questions import HostQuestions, Judged, Setting, Wanted

log = logging.getLogger(__name__)

IMA_PCR = 10
# What Keylime asks for if it has a measured-boot policy, and only then. It also parses a firmware log
# that it did not ask for, and fails the agent if the verifier lacks the library for that.
MEASURED_BOOT_PCRS = 0xFBFF
AWAY_HOLD_S = 0.25  # for a host that was silent: long enough if it is back
MIN_HOLD_S = 1.0  # a busy chip sometimes takes that long
USUAL_FACTOR = 4.0  # times what a host usually takes, then the wait ends
USUAL_DECAY = 0.9  # a slow answer is forgotten after some tens of polls
MAX_EQUAL = 4  # quotes with the same clock: requests of one window share a quote


@dataclass(frozen=True, slots=True, kw_only=True)
class Poll:
    """What Keylime's verifier, or its tenant, asks.

    Attributes:
        nonce: 1 to 64 letters and digits in pull mode, 16 random bytes in push mode.
        mask: the PCRs, without PCR 16, which is the agent's own.
        ima_ml_entry: the IMA list from here on.
        data_pcr: whether PCR 16 is in the quote: in pull mode always.
    """

    nonce: bytes
    mask: int
    ima_ml_entry: int
    data_pcr: bool = True

    @property
    def wants_list(self) -> bool:
        """Whether the answer has the IMA list."""
        return bool(self.mask >> IMA_PCR & 1)

    @property
    def wants_uefi(self) -> bool:
        """Whether it has the firmware's log."""
        return self.mask & MEASURED_BOOT_PCRS == MEASURED_BOOT_PCRS


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """The answer to a poll; Keylime's names.

    Attributes:
        boot: the TPM's reset count; `boottime` is made from it.
    """

    quote: str
    boot: int
    boottime: int
    ima: str | None
    ima_entry: int
    uefi: bytes | None

    def values(self) -> dict[str, object]:
        """The results of an answer."""
        found: dict[str, object] = {"quote": self.quote, "boottime": self.boottime}
        if self.ima is not None:
            found["ima_measurement_list"] = self.ima
            found["ima_measurement_list_entry"] = self.ima_entry
        if self.uefi is not None:
            found["mb_measurement_list"] = base64.b64encode(self.uefi).decode("ascii")
        return found


@dataclass(slots=True, kw_only=True)
class Standing:
    """The result of the last poll, for people.

    Attributes:
        at: seconds since the epoch; None before the first.
        result: "good", "refused", "no answer" or "fault".
        reason: why it is not good.
    """

    polls: int = 0
    at: float | None = None
    result: str | None = None
    reason: str | None = None
    good_at: float | None = None


@dataclass(slots=True)
class _Question:
    """An open question; it may outlive its poll."""

    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_left: bool = False  # its poll has been answered without it
    shown: Shown | None = None
    error: ProviderProxyError | None = None


class Agent:
    """A host's agent.

    Args:
        name: of the host in the file.
        questions: asks its proxy.
        hold_s: the longest that a poll is held.
        refuse_unsafe: a clock that the chip marks as unsafe is refused.
        now: seconds since the epoch.

    Attributes:
        agent_id: at registrar and verifier.
        pubkey: what the agent shows as its key for payloads; PCR 16 holds it.
        standing: the result of the last poll.
    """

    def __init__(
        self,
        name: str,
        questions: HostQuestions,
        keys: BridgeKeys,
        metrics: BridgeMetrics,
        *,
        hold_s: float,
        refuse_unsafe: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.questions = questions
        self.keys = keys
        self.hold_s = hold_s
        self.refuse_unsafe = refuse_unsafe
        self.agent_id = quoting.agent_id_of(keys.ek_public, name)
        # The text before the key makes PCR 16 differ for each agent; readers of PEM skip it.
        self.pubkey = f"provider-proxy bridge, agent {self.agent_id}\n{keys.nk_pem}"
        self.standing = Standing()
        self._metrics = metrics
        self._now = now
        self._data_pcr = quoting.data_pcr(self.pubkey)
        self._view = KeylimeView()
        self._question: _Question | None = None
        self._nursery: trio.Nursery | None = None
        self._is_away = False
        self._usual_s: float | None = None
        self._last_clock = -1

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the open question going, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                await self.questions.aclose()

    async def take(self, setting: Setting) -> None:
        """Ask and judge with other settings from now on; an open question is abandoned."""
        if (question := self._question) is not None and not question.done.is_set():
            question.scope.cancel()
            await question.done.wait()
        await self.questions.take(setting)

    async def attest(self, poll: Poll, wait_s: float | None = None) -> Shown:
        """Ask the host, and show what it proved.

        Args:
            wait_s: how long to wait for the host, in seconds; None for what a polling verifier accepts.

        Raises:
            VerificationError: the host's answer was refused.
            ReplyError: no answer yet.
            UsageError, HostError: the bridge itself is at fault.
        """
        began = trio.current_time()
        try:
            shown = await self._answer_of(poll, self._wait_s() if wait_s is None else wait_s)
        except ProviderProxyError as exc:
            self._note(_result_of(exc), str(exc))
            raise
        self._note("good", None)
        self._metrics.poll_seconds.observe(trio.current_time() - began)
        return shown

    def _wait_s(self) -> float:
        if self._is_away:
            return min(AWAY_HOLD_S, self.hold_s)
        if self._usual_s is None:
            return self.hold_s
        return min(self.hold_s, max(MIN_HOLD_S, USUAL_FACTOR * self._usual_s))

    async def _answer_of(self, poll: Poll, wait_s: float) -> Shown:
        question: _Question | None = None
        with trio.move_on_after(wait_s):
            while (open_one := self._question) is not None and not open_one.done.is_set():
                if open_one.is_left:
                    open_one.scope.cancel()
                await open_one.done.wait()
            question = self._question = _Question()
            if self._nursery is None:
                raise HostError("the bridge is stopping")
            self._nursery.start_soon(self._run, question, poll)
            await question.done.wait()
        if question is None or not question.done.is_set():
            self._is_away = True
            if question is not None:
                question.is_left = True
            raise ReplyError(f"the host gave no answer within {wait_s:.2g} s")
        if question.error is not None:
            raise question.error
        assert question.shown is not None
        return question.shown

    async def _run(self, question: _Question, poll: Poll) -> None:
        question.error = ReplyError("a later poll has replaced this one")
        began = trio.current_time()
        try:
            with question.scope:
                try:
                    question.shown = await self._ask(poll)
                    question.error = None
                except ProviderProxyError as exc:
                    question.error = exc
                except Exception:
                    # A bug that one host's answer triggers must not end the service of all others.
                    log.exception("%s: an unexpected error", self.name)
                    question.error = HostError("an unexpected error; see the bridge's log")
                if question.error is None or isinstance(question.error, VerificationError):
                    took_s = trio.current_time() - began
                    self._usual_s = max(took_s, USUAL_DECAY * (self._usual_s or 0.0))
                    self._is_away = False
                else:
                    self._is_away = True
        finally:
            question.done.set()

    async def _ask(self, poll: Poll) -> Shown:
        boot = self._view.asked(poll.ima_ml_entry) if poll.wants_list else None
        judged = await self._judged(poll, 0 if boot is None else poll.ima_ml_entry)
        if boot is not None and boot != judged.quote.clock.reset_count:
            judged = await self._judged(poll, 0)
        began = time.perf_counter()
        shown = self._show(poll, judged)
        if shown.ima is not None:
            lines = shown.ima.count("\n")
            self._view.answered(shown.ima_entry + lines, judged.quote.clock.reset_count)
        self._metrics.sign_seconds.observe(time.perf_counter() - began)
        return shown

    async def _judged(self, poll: Poll, entry: int) -> Judged:
        """An answer with a clock above all that Keylime was shown."""
        wanted = Wanted(
            mask=poll.mask,
            logs=poll.wants_list or poll.wants_uefi,
            ima_ml_entry=entry if poll.wants_list else None,
            make_nonce=lambda: self._make_nonce(poll.nonce),
        )
        for _ in range(MAX_EQUAL):
            judged = await self.questions.attest(wanted)
            quote = judged.quote
            if not quote.clock_safe and self.refuse_unsafe:
                raise ClockError(
                    "the TPM marks its clock as unsafe: the host lost power, and bridge.after_crash "
                    'is "refuse"'
                )
            clock = quoting.shown_clock(quote.clock).clock_ms
            if clock < self._last_clock:
                raise ClockError("the TPM's clock went back without a reset of the TPM")
            if clock > self._last_clock:
                self._last_clock = clock
                return judged
        raise ReplyError("the host's quotes repeatedly show the same clock")

    def _make_nonce(self, nonce: bytes) -> Nonce:
        random = secrets.token_bytes(quoting.RANDOM_BYTES)
        made = quoting.host_nonce(random, nonce, self.agent_id)
        # These parts prove later that the host's quote was made after the verifier's nonce.
        log.info(
            "%s: host nonce %s made of random %s and verifier's nonce %s for agent %s",
            self.name,
            made.decode("ascii"),
            random.hex(),
            nonce.decode("ascii") if nonce.isalnum() else f"0x{nonce.hex()}",
            self.agent_id,
        )
        return made

    def _show(self, poll: Poll, judged: Judged) -> Shown:
        quote, logs = judged.quote, judged.logs
        pcrs = {pcr: value for pcr, value in quote.pcrs.items() if poll.mask >> pcr & 1}
        if poll.data_pcr:
            pcrs[quoting.DATA_PCR] = self._data_pcr
        return Shown(
            quote=quoting.make_quote(
                self.keys,
                nonce=poll.nonce,
                pcrs=pcrs,
                clock=quoting.shown_clock(quote.clock),
                firmware=quote.firmware_version,
            ),
            boot=quote.clock.reset_count,
            boottime=quoting.shown_boottime(quote.clock),
            ima=logs.ima if poll.wants_list else None,
            ima_entry=logs.ima_entry,
            uefi=logs.uefi if poll.wants_uefi else None,
        )

    def _note(self, result: str, reason: str | None) -> None:
        """Count, and log what has changed."""
        standing, before = self.standing, self.standing.result
        standing.polls += 1
        standing.at, standing.result, standing.reason = self._now(), result, reason
        if result == "good":
            standing.good_at = standing.at
            self._metrics.host_verified.labels(self.name).set(standing.at)
        self._metrics.polls.labels(result).inc()
        self._metrics.host_good.labels(self.name).set(result == "good")
        if result == before:
            return
        if result == "good":
            log.info("%s: good", self.name)
        elif result == "refused":
            log.error("%s: refused: %s", self.name, reason)
        else:
            log.warning("%s: %s: %s", self.name, result, reason)


def _result_of(error: ProviderProxyError) -> str:
    if isinstance(error, VerificationError):
        return "refused"
    return "no answer" if isinstance(error, ReplyError) else "fault"
