"""Asks a proxy until its host is fully judged: PCRs by the `Verifier`, then the logs by the `LogJudge`.

A long IMA list comes in parts, each with a nonce and a quote of its own; the last part's quote is the one
that all of the list leads to. If the parts do not end, there is no verdict.
`watch` and `bridge` ask in another way (they keep connections, and share limits among many hosts).
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import anyio.lowlevel

from provider_proxy.errors import ReplyError
from provider_proxy.evidence.logs.ima import MAX_PARTS
from provider_proxy.evidence.logs.judge import LogJudge
from provider_proxy.evidence.model import Evidence, HashAlg, HostLogs, TrustedHost, VerifiedQuote
from provider_proxy.evidence.verify import HostHistory, Verifier, new_challenge
from provider_proxy.evidence.wire import parse_evidence
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.ima_tail import ImaTail
from provider_proxy.tenant.replies import TOO_MANY
from provider_proxy.tenant.step_limit import bounded

WHOLE_LIMIT_S = 900.0  # a kernel's longest list, in parts, at a proxy's rate
MAX_ASKS = 4 * MAX_PARTS  # an IMA list twice, in parts, and waits between them
LEAST_WAIT_S = 0.1
MAX_WAIT_S = 300.0  # for all of a list, whatever Retry-After says: 600 MB at the daemon's 2 MB/s


@dataclass(frozen=True, slots=True, kw_only=True)
class Attested:
    """A host that passed every check.

    Attributes:
        evidence: the last answer; where its host has an IMA list that was judged, `evidence.logs` holds
            the list from its first entry to the last one that was proven.
    """

    quote: VerifiedQuote
    evidence: Evidence


async def attest_whole(
    proxy: ProxyClient,
    verifier: Verifier,
    host: TrustedHost,
    history: HostHistory,
    judge: LogJudge,
    *,
    mask: int,
    bank: HashAlg = HashAlg.SHA256,
    vm: uuid.UUID | None = None,
    timeout_ms: int | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Attested:
    """Ask, verify, judge the logs; returns only for a good host. The whole takes at most `WHOLE_LIMIT_S`.

    Args:
        judge: of a policy whose PCRs are asked for beside `mask`.

    Raises:
        VerificationError: an answer was refused.
        ReplyError: no answer, a list that does not end, or no verdict in time.
    """
    try:
        with anyio.fail_after(WHOLE_LIMIT_S):
            return await _attest(
                proxy,
                verifier,
                host,
                history,
                judge,
                mask=mask,
                bank=bank,
                vm=vm,
                timeout_ms=timeout_ms,
                now=now,
            )
    except TimeoutError as exc:
        raise ReplyError(f"no verdict within {WHOLE_LIMIT_S:g} s") from exc


async def _attest(
    proxy: ProxyClient,
    verifier: Verifier,
    host: TrustedHost,
    history: HostHistory,
    judge: LogJudge,
    *,
    mask: int,
    bank: HashAlg,
    vm: uuid.UUID | None,
    timeout_ms: int | None,
    now: Callable[[], float],
) -> Attested:
    collected, waited_s = ImaTail(0), 0.0
    for _ in range(MAX_ASKS):
        entry = judge.ima_ml_entry
        challenge = new_challenge(
            mask=mask | judge.policy.needed_mask,
            now_s=now(),
            history=history,
            bank=bank,
            vm=vm,
            ima_ml_entry=entry,
            timeout_ms=timeout_ms,
        )
        try:
            evidence = parse_evidence(await proxy.fetch(challenge.request))
            quote = verifier.verify(evidence, challenge, host, history, now_s=now())
        except ReplyError as exc:
            if entry == 0 or exc.status != TOO_MANY or waited_s > MAX_WAIT_S:
                raise
            wait_s = max(LEAST_WAIT_S, exc.retry_after_s or 0.0)
            waited_s += wait_s
            await anyio.sleep(wait_s)  # a long list has more bytes than a tenant may get at once
            continue
        finally:
            history.spend(challenge.request.nonce)  # unanswered or refused: never valid again
        logs = evidence.logs
        if judge.policy.wants_ima and logs.ima is not None:
            logs = collected.add(logs, asked=entry, replayed=entry)
        if await _judged(judge, quote, logs):
            if judge.policy.wants_ima:
                logs, _ = collected.whole(logs, judge.ima_ml_entry)
            return Attested(quote=quote, evidence=dataclasses.replace(evidence, logs=logs))
    raise ReplyError(f"the IMA list is not complete after {MAX_ASKS} answers")


async def _judged(judge: LogJudge, quote: VerifiedQuote, logs: HostLogs) -> bool:
    """False where more of the IMA list is needed."""
    done = False
    for done in bounded(judge.judge(quote, logs)):
        if not done:
            await anyio.lowlevel.checkpoint()
    return done
