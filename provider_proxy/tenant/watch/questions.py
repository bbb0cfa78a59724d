"""Asks one host's proxy and judges the answer, for `watch` and `bridge`.

A question has a fresh nonce; its answer passes the `Verifier`'s checks, then the host's policies with the
replay of its logs. A long IMA list takes several questions. The caller sets deadlines for the
whole and retries, and acts on the verdict.

Invariants: what `attest` returns passed every check in this very call; a clock state that was accepted
once is the baseline of every later nonce; a nonce without a good answer is never valid again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from provider_proxy.common.addresses import authority
from provider_proxy.errors import EvidenceFormatError, LogError, ReplyError
from provider_proxy.evidence.logs.ima import MAX_PARTS
from provider_proxy.evidence.model import (
    AkName,
    ClockState,
    HostLogs,
    Nonce,
    TrustedHost,
    VerifiedQuote,
)
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.evidence.verify import HostHistory, Verifier, new_challenge
from provider_proxy.evidence.wire import parse_evidence
from provider_proxy.tenant.identity import MAX_IDENTITY_BYTES, parse_identity
from provider_proxy.tenant.identity import PATH as IDENTITY_PATH
from provider_proxy.tenant.ima_tail import ImaTail
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.replies import body_limit
from provider_proxy.tenant.step_limit import bounded
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.http import Endpoint, ProxyConnection
from provider_proxy.tenant.watch.policy import HostPolicy
from provider_proxy.tenant.watch.store import HostRecords
from provider_proxy.tenant.watch.tables import HostRules
from provider_proxy.trust.ek_judges import AskHost, HostCertificates
from provider_proxy.trust.pins import PinStore

log = logging.getLogger(__name__)

MAX_ASKS = 2 * MAX_PARTS  # of one attempt: an IMA list twice, in parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """The trusted keys of a host.

    Attributes:
        newest: the newest clock state that is known from elsewhere.
        ek_anchor: the CA that vouches for the host's chip; None where a person does, or nothing does.
    """

    host: TrustedHost
    newest: ClockState | None = None
    ek_anchor: str | None = None


class AkSource(Protocol):
    """Gives a host's AK: `PinnedAks`, or a registrar's record that is checked and pinned."""

    async def trusted(self, name: str, rules: HostRules, ask_host: AskHost | None = None) -> Trust:
        """Called before every attempt.

        Args:
            ask_host: gives the host's own copy of its EK's certificates.

        Raises:
            VerificationError: the key must not be trusted (any more).
            ReplyError: the registrar gave no answer.
            UsageError, HostError: this program or its files are at fault.
        """
        ...


class PinnedAks:
    """The AKs that were pinned with `provider-proxy pin add`; each file is read once."""

    def __init__(self, pins: PinStore) -> None:
        self._pins = pins
        self._known: dict[str, Trust] = {}

    async def trusted(self, name: str, rules: HostRules, ask_host: AskHost | None = None) -> Trust:
        """Raises: UsageError where the host is not pinned; HostError where its pin is damaged."""
        label = rules.pin or name
        found = self._known.get(label)
        if found is None:
            pinned = self._pins.load(label)
            found = self._known[label] = Trust(host=pinned.host, newest=pinned.newest())
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How to ask and judge a host; a reload replaces it as a whole.

    Attributes:
        endpoint: None for a host that is not asked.
        ek_name: the file name in `ek_directory` of the EK of the host's VM; None without one.
    """

    rules: HostRules
    files: PolicyFiles
    aks: AkSource
    endpoint: Endpoint | None
    ek_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the caller wants besides what the host's own policies read.

    Attributes:
        mask: PCRs, besides the policies'.
        ima_ml_entry: the IMA list from this entry on, where `mask` has PCR 10; None for the part that
            the replay needs.
        make_nonce: makes each question's nonce; None for a random one.
        logs: whether the logs of the PCRs in `mask` are wanted.
    """

    mask: int = 0
    logs: bool = False
    ima_ml_entry: int | None = None
    make_nonce: Callable[[], Nonce] | None = None


NOTHING = Wanted()


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """An answer that passed every check.

    Attributes:
        logs: its IMA list from the wanted entry on (or from 0), up to the line that leads to the
            signed PCR 10; and the firmware's log, judged only where a policy says so.
        was_reset: the host's TPM was reset since the last answer that was accepted.
    """

    quote: VerifiedQuote
    logs: HostLogs
    was_reset: bool


class HostQuestions:
    """One host's questions, one after the other.

    Args:
        budget: shared by all hosts; large answers wait for memory in it.
        judged_elsewhere: another verifier has policies for this host, so none is needed here; an
            IMA list that is asked for is replayed all the same.

    Attributes:
        ak_name: of the AK that was trusted last.
        ek_anchor: the CA that vouches for its chip; None where no certificate does.
    """

    def __init__(
        self,
        name: str,
        setting: Setting,
        store: HostRecords,
        *,
        budget: Budget,
        judged_elsewhere: bool = False,
    ) -> None:
        self._name = name
        self._store = store
        self._budget = budget
        self._judged_elsewhere = judged_elsewhere
        self._take(setting)

    def _take(self, setting: Setting) -> None:
        self.setting = setting
        self.ak_name: AkName | None = None  # so that the policy is made again
        self.ek_anchor: str | None = None
        endpoint = setting.endpoint
        self._connection: ProxyConnection | None = None
        if endpoint is not None:
            where = authority(endpoint.host, endpoint.port)
            self._connection = ProxyConnection(endpoint.connect, where)
            self._provider = setting.rules.provider or where

    @property
    def is_asked(self) -> bool:
        """False for a host that is only listed."""
        return self._connection is not None

    @property
    def ima_ml_entry(self) -> int:
        """The entry of the host's IMA list that is asked for next."""
        return 0 if self.ak_name is None else self._policy.ima_ml_entry

    async def take(self, setting: Setting) -> None:
        """Use other settings from now on; the connection is kept if they do not change it."""
        before = self.setting
        if setting.endpoint == before.endpoint and setting.rules.provider == before.rules.provider:
            self.setting = setting
            self.ak_name = None
            return
        await self.aclose()
        self._take(setting)

    async def aclose(self) -> None:
        """Close the connection to the proxy."""
        if self._connection is not None:
            await self._connection.aclose()

    async def attest(self, wanted: Wanted = NOTHING) -> Judged:
        """Ask, as often as the IMA list needs; returns only for a good host.

        Raises:
            VerificationError: the answer was refused, or the AK is not to be trusted.
            ReplyError: no answer.
            UsageError, HostError: our own side is at fault.
        """
        trust = await self.setting.aks.trusted(self._name, self.setting.rules, self.host_shows)
        self.ek_anchor = trust.ek_anchor
        ak_name = trust.host.ak.name
        if self.ak_name != ak_name:
            self._begin(ak_name)
        history = self._store.history(self._name, ak_name, trust.newest)
        tail = None if wanted.ima_ml_entry is None else ImaTail(wanted.ima_ml_entry)
        was_reset = False
        try:
            for _ in range(MAX_ASKS):
                quote, logs, done = await self._ask(trust.host, history, wanted, tail)
                was_reset |= quote.was_reset
                if done:
                    break
            else:
                raise LogError("the IMA list has no end")
        finally:  # after a refusal, too: what is proven need not be proven again
            self._store.remember_ima(self._name, ak_name, self._policy.proven)
        if self._policy.first_use is not None:
            self._store.trust_first_use(self._name, ak_name, self._policy.first_use.confirm())
        return Judged(quote=quote, logs=logs, was_reset=was_reset)

    async def host_shows(self) -> HostCertificates:
        """The host's own copy of its EK's certificates. Raises: ReplyError."""
        connection, timeout_s = self._connection, self.setting.rules.timeout_s
        assert connection is not None
        async with self._budget.room(self._provider) as room:
            try:
                with trio.fail_after(timeout_s):
                    body = await connection.get(IDENTITY_PATH, MAX_IDENTITY_BYTES, room)
                identity = parse_identity(body)
            except trio.TooSlowError as exc:
                raise ReplyError(f"no complete identity within {timeout_s:g} s") from exc
            except EvidenceFormatError as exc:
                raise ReplyError(f"the proxy's identity cannot be read: {exc}") from exc
        return HostCertificates(ek_cert=identity.ek_cert, ek_chain=identity.ek_chain)

    def _begin(self, ak_name: AkName) -> None:
        """Make the policy; values trusted at first use count for one AK only."""
        if self._store.was_pinned_anew(self._name, ak_name):
            log.warning(
                "%s is pinned to another AK than before: its history starts again", self._name
            )
        known = self._store.first_use(self._name, ak_name)
        rules = self.setting.rules
        self._policy = HostPolicy(
            rules,
            self.setting.files,
            known,
            judged_elsewhere=self._judged_elsewhere,
            proven=self._store.ima(self._name, ak_name),
        )
        self._verifier = Verifier(self._policy.on_pcrs, max_age_s=rules.max_age_s)
        self.ak_name = ak_name

    async def _ask(
        self, host: TrustedHost, history: HostHistory, wanted: Wanted, tail: ImaTail | None
    ) -> tuple[VerifiedQuote, HostLogs, bool]:
        """One question. The last part of the result is False where more of the IMA list is needed."""
        rules, policy = self.setting.rules, self._policy
        connection = self._connection
        assert connection is not None
        entry = policy.ima_ml_entry
        async with self._budget.room(self._provider) as room:
            challenge = new_challenge(
                mask=policy.mask_with(wanted.mask),
                now_s=trio.current_time(),
                history=history,
                nonce=None if wanted.make_nonce is None else wanted.make_nonce(),
                bank=rules.bank,
                vm=rules.vm,
                ima_ml_entry=entry if tail is None else min(entry, tail.next_entry),
                logs=rules.ima or rules.uefi or wanted.logs,
            )
            request = challenge.request
            try:
                with trio.fail_after(rules.timeout_s):
                    body = await connection.get(
                        f"/verifier/quote?{encode_quote_query(request)}", body_limit(request), room
                    )
                came_at_s = trio.current_time()
                async with room.turn():
                    evidence = await room.work(parse_evidence, body)
                    quote = self._verifier.verify(
                        evidence, challenge, host, history, now_s=came_at_s
                    )
                    logs = evidence.logs
                    if tail is not None and logs.ima is not None:
                        logs = tail.add(logs, asked=request.ima_ml_entry, replayed=entry)
                    done = await self._judge(quote, logs)
            except trio.TooSlowError as exc:
                raise ReplyError(f"no complete answer within {rules.timeout_s:g} s") from exc
            finally:
                history.spend(request.nonce)  # unanswered or refused: never valid again
            if not done or tail is None or evidence.logs.ima is None:
                return quote, logs, done
            return quote, *tail.whole(logs, policy.ima_ml_entry)

    async def _judge(self, quote: VerifiedQuote, logs: HostLogs) -> bool:
        done = False
        for done in bounded(self._policy.judge(quote, logs)):
            if not done:
                await trio.lowlevel.checkpoint()
        return done
