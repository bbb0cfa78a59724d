"""One watched host: asks its proxy, verifies, walks the states of `watch`, tells of changes.

A round begins when the host is due and ends with a verdict: TRUSTED, INVALID_QUOTE or FAILED. Each
attempt has a nonce of its own. What was refused is reported at once; what gave no evidence is retried
with growing waits first. Nothing that a proxy sends can end the task.

Invariants: TRUSTED is said only of evidence that passed the `Verifier` and then the logs' replay, in
this very round; a clock state that was accepted once is the baseline of every later nonce.
"""

from __future__ import annotations

import logging
import math
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import trio

from provider_proxy.errors import (
    HostError,
    LogError,
    ProviderProxyError,
    ReplyError,
    VerificationError,
)
from provider_proxy.evidence.logs.ima import MAX_PARTS
from provider_proxy.evidence.model import AkName, ClockState, HostLogs, TrustedHost, VerifiedQuote
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.evidence.verify import HostHistory, Verifier, new_challenge
from provider_proxy.evidence.wire import clock_values, parse_evidence
from provider_proxy.tenant.replies import body_limit
from provider_proxy.tenant.watch.http import Endpoint, ProxyConnection
from provider_proxy.tenant.watch.metrics import WatchMetrics
from provider_proxy.tenant.watch.policy import HostPolicy, PolicyFiles
from provider_proxy.tenant.watch.reports import Report
from provider_proxy.tenant.watch.states import Event, Progress, State, advance, backoff_s
from provider_proxy.tenant.watch.store import StateStore
from provider_proxy.tenant.watch.tables import HostRules
from provider_proxy.trust.pins import PinStore

log = logging.getLogger(__name__)

MAX_REASON_CHARS = 500
MAX_ASKS = 2 * MAX_PARTS  # of one attempt: an IMA list twice, in parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom to trust as a host.

    Attributes:
        newest: the newest clock state that is known beside our own record.
    """

    host: TrustedHost
    newest: ClockState | None = None


class AkSource(Protocol):
    """Says which AK is a host's: `PinnedAks`, or a registrar's record that is checked and pinned."""

    async def trusted(self, name: str, rules: HostRules) -> Trust:
        """Asked before every attempt.

        Raises:
            VerificationError: the key must not be trusted (any more).
            ReplyError: it cannot be found out now.
            UsageError, HostError: our own side is at fault.
        """
        ...


class PinnedAks:
    """The AKs that were pinned with `provider-proxy pin add`; each file is read once."""

    def __init__(self, pins: PinStore) -> None:
        self._pins = pins
        self._known: dict[str, Trust] = {}

    async def trusted(self, name: str, rules: HostRules) -> Trust:
        """Raises: UsageError where the host is not pinned; HostError where its pin is damaged."""
        label = rules.pin or name
        found = self._known.get(label)
        if found is None:
            pinned = self._pins.load(label)
            found = self._known[label] = Trust(host=pinned.host, newest=pinned.newest())
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a host is watched; a reload replaces it as a whole.

    Attributes:
        endpoint: None for a host that is not asked.
    """

    rules: HostRules
    files: PolicyFiles
    aks: AkSource
    endpoint: Endpoint | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all hosts of a watcher share.

    Attributes:
        asking: bounds how many are asked at once.
        now: seconds since the epoch, for reports.
    """

    store: StateStore
    metrics: WatchMetrics
    tell: Callable[[Report], None]
    asking: trio.CapacityLimiter
    rng: random.Random
    now: Callable[[], float] = time.time


class HostWatch:
    """A host's task.

    Attributes:
        state: where it stands.
        verdict: the last state that a round ended with; None before the first.
        error: why the verdict is not TRUSTED.
    """

    def __init__(self, name: str, setting: Setting, shared: Shared) -> None:
        self.name = name
        self.verdict: State | None = None
        self.error: ProviderProxyError | None = None
        self._shared = shared
        self._progress = Progress()
        self._wake = trio.Event()
        self._next: Setting | None = None
        self._due = math.inf
        self._is_spread = False
        self._clock: ClockState | None = None
        self._take(setting)

    @property
    def state(self) -> State:
        return self._progress.state

    @property
    def rules(self) -> HostRules:
        return self._setting.rules

    def _take(self, setting: Setting) -> None:
        """Use a setting from here on."""
        self._setting = setting
        self._ak_name: AkName | None = None  # so that the policy is made anew
        endpoint = setting.endpoint
        self._connection: ProxyConnection | None = None
        if endpoint is not None:
            authority = f"{endpoint.host}:{endpoint.port}"
            self._connection = ProxyConnection(endpoint.connect, authority)

    def renew(self, setting: Setting) -> None:
        """Use another setting from the next round on, which comes soon where the interval is new."""
        changed = setting.rules.interval_s != self.rules.interval_s
        self._next = setting
        if changed or math.isinf(self._due):
            self._wake.set()

    async def run(self, due: float) -> None:
        """Ask again and again, for ever.

        Args:
            due: when the first time is, on trio's clock.
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
                if self._connection is None:  # no longer asked
                    self._progress, self.verdict, self._due = Progress(), None, math.inf
                    continue
                await self.round()
                self._plan()
        finally:
            await self.aclose()

    def _is_asked(self) -> bool:
        setting = self._next or self._setting
        return setting.endpoint is not None

    def _spread_s(self) -> float:
        setting = self._next or self._setting
        return setting.rules.interval_s * self._shared.rng.uniform(0.1, 1)

    def _plan(self) -> None:
        """When the next round is: the beat is kept, and what was missed is not made up for."""
        if self.verdict is State.INVALID_QUOTE and self.rules.on_invalid == "stop":
            self._due = math.inf
            return
        interval_s, jitter = self.rules.interval_s, self.rules.jitter
        step_s = interval_s * (1 + jitter * self._shared.rng.uniform(-1, 1))
        if not self._is_spread:  # hosts that began together must not go on together
            step_s, self._is_spread = self._spread_s(), True
        now = trio.current_time()
        self._due += step_s
        if self._due < now:
            self._due += math.ceil((now - self._due) / interval_s) * interval_s

    async def aclose(self) -> None:
        """Close the connection to the proxy."""
        if self._connection is not None:
            await self._connection.aclose()

    async def _take_next(self) -> None:
        if self._next is not None:
            await self.aclose()
            self._take(self._next)
            self._next = None

    async def round(self) -> State:
        """Ask, with retries, until there is a verdict."""
        rules = self.rules
        self._progress = advance(self._progress, Event.DUE, max_retries=rules.max_retries)
        while True:
            event, error = await self._attempt()
            result = "ok" if error is None else type(error).__name__
            self._shared.metrics.checks.labels(result).inc()
            self._progress = advance(self._progress, event, max_retries=rules.max_retries)
            if self.state is not State.GET_PROVIDER_QUOTE_RETRY:
                self._settle(error)
                return self.state
            retry_after_s = error.retry_after_s if isinstance(error, ReplyError) else None
            await trio.sleep(
                backoff_s(
                    self._progress.retries,
                    base_s=rules.retry_interval_s,
                    longest_s=rules.max_retry_s,
                    retry_after_s=retry_after_s,
                    rng=self._shared.rng,
                )
            )

    async def _attempt(self) -> tuple[Event, ProviderProxyError | None]:
        try:
            await self._attest()
        except VerificationError as exc:
            return Event.REFUSED, exc
        except ReplyError as exc:
            return Event.UNANSWERED, exc
        except ProviderProxyError as exc:
            return Event.BROKEN, exc
        except Exception:
            # A bug that one host's answer meets must not end the watching of all others.
            log.exception("%s: an unexpected error", self.name)
            return Event.BROKEN, HostError("an unexpected error; see the log")
        return Event.GOOD, None

    async def _attest(self) -> None:
        """One attempt: good where it returns."""
        trust = await self._setting.aks.trusted(self.name, self.rules)
        ak_name = trust.host.ak.name
        if self._ak_name != ak_name:
            self._begin(ak_name)
        history = self._shared.store.history(self.name, ak_name, trust.newest)
        for _ in range(MAX_ASKS):
            if await self._ask(trust.host, history):
                break
        else:
            raise LogError("the IMA list has no end")
        if self._policy.first_use is not None:
            self._shared.store.trust_first_use(self.name, ak_name, self._policy.first_use.confirm())

    def _begin(self, ak_name: AkName) -> None:
        """Make the policy; what was trusted at first use is of one AK."""
        store = self._shared.store
        if store.was_pinned_anew(self.name, ak_name):
            log.warning(
                "%s is pinned to another AK than before: its history begins afresh", self.name
            )
        known = store.first_use(self.name, ak_name)
        self._policy = HostPolicy(self.rules, self._setting.files, known)
        self._verifier = Verifier(self._policy.on_pcrs, max_age_s=self.rules.max_age_s)
        self._ak_name = ak_name

    async def _ask(self, host: TrustedHost, history: HostHistory) -> bool:
        """One nonce. False where more of the IMA list is needed."""
        rules, policy = self.rules, self._policy
        connection = self._connection
        assert connection is not None
        async with self._shared.asking:
            if not math.isinf(self._due) and self.state is State.GET_PROVIDER_QUOTE:
                self._shared.metrics.lateness.observe(max(0.0, trio.current_time() - self._due))
            challenge = new_challenge(
                mask=policy.mask,
                now_s=trio.current_time(),
                history=history,
                bank=rules.bank,
                vm=rules.vm,
                ima_ml_entry=policy.ima_ml_entry,
            )
            request = challenge.request
            try:
                with trio.fail_after(rules.timeout_s):
                    body = await connection.get(
                        f"/verifier/quote?{encode_quote_query(request)}", body_limit(request.mask)
                    )
                evidence = parse_evidence(body)
                quote = self._verifier.verify(
                    evidence, challenge, host, history, now_s=trio.current_time()
                )
            except trio.TooSlowError as exc:
                raise ReplyError(f"no whole answer within {rules.timeout_s:g} s") from exc
            finally:
                history.spend(request.nonce)  # unanswered or refused: never good again
            return await self._judge(quote, evidence.logs)

    async def _judge(self, quote: VerifiedQuote, logs: HostLogs) -> bool:
        done = False
        for done in self._policy.judge(quote, logs):
            if not done:
                await trio.lowlevel.checkpoint()
        if done:
            self._clock = quote.clock
            if quote.was_reset:
                self._tell("reset", reason="the host's TPM was reset: the host has rebooted")
        return done

    def _settle(self, error: ProviderProxyError | None) -> None:
        """A round is over: count, and tell where something changed."""
        before, before_error = self.verdict, self.error
        self.verdict, self.error = self.state, error
        metrics = self._shared.metrics
        trusted = self.verdict is State.TRUSTED
        metrics.host_trusted.labels(self.name).set(trusted)
        if trusted:
            metrics.host_verified.labels(self.name).set(self._shared.now())
        if before is self.verdict and type(before_error) is type(error):
            return
        self._tell("verdict", previous=before, reason=None if error is None else str(error))

    def _tell(self, kind: str, *, reason: str | None, previous: State | None = None) -> None:
        error = self.error if kind == "verdict" else None
        rules = self.rules
        self._shared.tell(
            {
                "id": str(uuid.uuid4()),
                "time": datetime.fromtimestamp(self._shared.now(), UTC).isoformat(),
                "kind": kind,
                "host": self.name,
                "uuid": rules.uuid,
                "provider": f"{rules.provider_ip}:{rules.provider_port}",
                "state": self.state.value,
                "previous": previous.value if previous else None,
                "error": type(error).__name__ if error is not None else None,
                "check": error.check if isinstance(error, VerificationError) else None,
                "reason": reason[:MAX_REASON_CHARS] if reason else None,
                "ak_name": self._ak_name.hex() if self._ak_name else None,
                "clock": clock_values(self._clock) if self._clock else None,
            }
        )
