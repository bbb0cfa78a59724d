"""One watched host: asks at its interval, goes through the states of `watch`, reports changes.

A round begins when the host is due and ends with a verdict: TRUSTED, INVALID_QUOTE or FAILED. Each
attempt has its own nonce. A refusal is reported at once; an attempt without evidence is first retried
with growing waits. Nothing that a proxy sends can end the task.

Invariant: TRUSTED is reported only if `HostQuestions.attest` returned in this very round.
"""

from __future__ import annotations

import logging
import math
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import trio

from provider_proxy.common import memory
from provider_proxy.common.addresses import authority
from provider_proxy.errors import HostError, ProviderProxyError, ReplyError, VerificationError
from provider_proxy.evidence.model import ClockState
from provider_proxy.evidence.wire import clock_values
from provider_proxy.tenant.replies import TOO_MANY
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.metrics import WatchMetrics
from provider_proxy.tenant.watch.questions import HostQuestions, Setting
from provider_proxy.tenant.watch.reports import Report, Settled, Verdict
from provider_proxy.tenant.watch.states import Event, Progress, State, advance, retry_wait_s
from provider_proxy.tenant.watch.store import HostRecords
from provider_proxy.tenant.watch.tables import HostRules

log = logging.getLogger(__name__)

MAX_REASON_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all hosts of a watcher share.

    Attributes:
        budget: large answers wait for memory in it.
        settled: called at each round's end, with the report if the verdict has changed.
        tell: called with reports that are not verdicts.
        now: seconds since the epoch, for reports.
    """

    store: HostRecords
    metrics: WatchMetrics
    tell: Callable[[Report], None]
    settled: Callable[[Settled], None]
    budget: Budget
    rng: random.Random
    now: Callable[[], float] = time.time


class HostWatch:
    """A host's task.

    Args:
        last: the last reported verdict of this host, by any process; None before the first.

    Attributes:
        state: its present state.
        verdict: the last state that a round ended with; None before the first.
        error: why the verdict is not TRUSTED.
    """

    def __init__(
        self, name: str, setting: Setting, shared: Shared, *, last: Verdict | None = None
    ) -> None:
        self.name = name
        self.verdict: State | None = None
        self.error: ProviderProxyError | None = None
        self._shared = shared
        self._last = last
        self._progress = Progress()
        self._wake = trio.Event()
        self._next: Setting | None = None
        self._tried: ProviderProxyError | None = None  # the error of this round's last try
        self._due = math.inf
        self._is_spread = False
        self._clock: ClockState | None = None
        self._questions = HostQuestions(name, setting, shared.store, budget=shared.budget)

    @property
    def state(self) -> State:
        return self._progress.state

    @property
    def rules(self) -> HostRules:
        return self._questions.setting.rules

    @property
    def ek_name(self) -> str | None:
        """The file name of its VM's EK in `ek_directory`; None without one."""
        return self._questions.setting.ek_name

    def renew(self, setting: Setting) -> None:
        """Use other settings from the next round on, which comes soon if the interval is new."""
        changed = setting.rules.interval_s != self.rules.interval_s
        self._next = setting
        if changed or math.isinf(self._due):
            self._wake.set()

    async def run(self, due: float) -> None:
        """Ask at the interval, for ever.

        Args:
            due: the first time, on trio's clock.
        """
        self._due = due
        try:
            while True:
                with trio.move_on_at(self._due):
                    await self._wake.wait()
                    self._wake = trio.Event()
                    soon = trio.current_time() + self._spread_s()
                    self._due = min(self._due, soon) if self._is_asked() else math.inf
                    continue
                await self._take_next()
                if not self._questions.is_asked:  # any more
                    self._progress, self._due = Progress(), math.inf
                    self.verdict = self._last = None
                    continue
                await self.round()
                self._plan()
        finally:
            await self.aclose()

    def _is_asked(self) -> bool:
        setting = self._next or self._questions.setting
        return setting.endpoint is not None

    def _spread_s(self) -> float:
        setting = self._next or self._questions.setting
        return setting.rules.interval_s * self._shared.rng.uniform(0.1, 1)

    def _plan(self) -> None:
        """When the next round is: the rhythm is kept, and missed rounds are not repeated."""
        if self.verdict is State.INVALID_QUOTE and self.rules.on_invalid == "stop":
            self._due = math.inf
            return
        interval_s, jitter = self.rules.interval_s, self.rules.jitter
        step_s = interval_s * (1 + jitter * self._shared.rng.uniform(-1, 1))
        if not self._is_spread:  # hosts that began together must not continue together
            step_s, self._is_spread = self._spread_s(), True
        now = trio.current_time()
        self._due += step_s
        if self._due < now:
            self._due += math.ceil((now - self._due) / interval_s) * interval_s

    async def aclose(self) -> None:
        """Close the connection to the proxy."""
        await self._questions.aclose()

    async def _take_next(self) -> None:
        if self._next is not None:
            await self._questions.take(self._next)
            self._next = None

    async def round(self) -> State:
        """Ask, with retries, until there is a verdict; the whole has a deadline."""
        rules = self.rules
        self._progress = advance(self._progress, Event.DUE, max_retries=rules.max_retries)
        if not math.isinf(self._due):
            self._shared.metrics.lateness.observe(max(0.0, trio.current_time() - self._due))
        with trio.move_on_after(rules.round_limit_s) as whole:
            await self._ask_on(rules)
        if whole.cancelled_caught:
            tried = f"; the last try: {self._tried}" if self._tried is not None else ""
            late = ReplyError(f"no verdict within {rules.round_limit_s:g} s{tried}")
            self._shared.metrics.checks.labels(type(late).__name__).inc()
            self._progress = advance(self._progress, Event.UNANSWERED, max_retries=0)
            self._settle(late)
        return self.state

    async def _ask_on(self, rules: HostRules) -> None:
        self._tried = None
        while True:
            entry = self._questions.ima_ml_entry
            event, error = await self._attempt()
            self._tried = error
            if _is_paced(error) and self._questions.ima_ml_entry > entry:
                # A proxy sends a long IMA list at a pace of its own: no retry of what did not come.
                self._progress = replace(self._progress, retries=0)
            result = "ok" if error is None else type(error).__name__
            self._shared.metrics.checks.labels(result).inc()
            self._progress = advance(self._progress, event, max_retries=rules.max_retries)
            if self.state is not State.GET_PROVIDER_QUOTE_RETRY:
                self._settle(error)
                return
            retry_after_s = error.retry_after_s if isinstance(error, ReplyError) else None
            await trio.sleep(
                retry_wait_s(
                    self._progress.retries,
                    base_s=rules.retry_interval_s,
                    longest_s=rules.max_retry_s,
                    retry_after_s=retry_after_s,
                    rng=self._shared.rng,
                )
            )

    async def _attempt(self) -> tuple[Event, ProviderProxyError | None]:
        try:
            judged = await self._questions.attest()
        except ProviderProxyError as exc:
            memory.let_go(
                exc
            )  # the error is kept until the next round, and its frames refer to the answer
            return _event_of(exc), exc
        except Exception:
            # A bug that one host's answer triggers must not end the watching of all others.
            log.exception("%s: an unexpected error", self.name)
            return Event.BROKEN, HostError("an unexpected error; see the log")
        self._clock = judged.quote.clock
        if judged.was_reset:
            reason = "the host's TPM was reset: the host has rebooted"
            self._shared.tell(self._report("reset", reason=reason))
        return Event.GOOD, None

    def _settle(self, error: ProviderProxyError | None) -> None:
        """End a round: count, and report what has changed."""
        self.verdict, self.error = self.state, error
        last, verdict = (
            self._last,
            Verdict(self.state, None if error is None else type(error).__name__),
        )
        self._last = verdict
        reason = None if error is None else str(error)
        metrics = self._shared.metrics
        trusted = self.verdict is State.TRUSTED
        metrics.host_trusted.labels(self.name).set(trusted)
        if trusted:
            metrics.host_verified.labels(self.name).set(self._shared.now())
        report = None
        if verdict != last:
            previous = None if last is None else last.state
            report = self._report("verdict", reason=reason, error=error, previous=previous)
        settled = Settled(self.name, verdict, reason, good_for_s(self.rules), report)
        self._shared.settled(settled)

    def _report(
        self,
        kind: str,
        *,
        reason: str | None,
        error: ProviderProxyError | None = None,
        previous: State | None = None,
    ) -> Report:
        rules, ak_name = self.rules, self._questions.ak_name
        return {
            "id": str(uuid.uuid4()),
            "time": datetime.fromtimestamp(self._shared.now(), UTC).isoformat(),
            "kind": kind,
            "host": self.name,
            "uuid": rules.uuid,
            "provider": authority(rules.provider_ip, rules.provider_port),
            "state": self.state.value,
            "previous": previous.value if previous else None,
            "error": type(error).__name__ if error is not None else None,
            "check": error.check if isinstance(error, VerificationError) else None,
            "reason": reason[:MAX_REASON_CHARS] if reason else None,
            "ak_name": ak_name.hex() if ak_name else None,
            "ek_anchor": self._questions.ek_anchor,
            "clock": clock_values(self._clock) if self._clock else None,
        }


def _is_paced(error: ProviderProxyError | None) -> bool:
    return isinstance(error, ReplyError) and error.status == TOO_MANY


def _event_of(error: ProviderProxyError) -> Event:
    if isinstance(error, VerificationError):
        return Event.REFUSED
    return Event.UNANSWERED if isinstance(error, ReplyError) else Event.BROKEN


def good_for_s(rules: HostRules) -> float:
    """How long a verdict may be shown for a host, in seconds: by then the next round has ended."""
    return rules.interval_s * (1 + rules.jitter) + rules.round_limit_s
