"""The one judge of a host's logs: library, offline `verify`, `watch`, `keylime-check` and `ek-check`.

A `LogPolicy` says what a tenant demands; a `LogJudge` holds one host's answers against it, each after the
`Verifier` accepted its quote. What a policy names must be there: a missing
list or log, a PCR that was never extended, or a part of a list is refused, never taken for an empty one.
The tenant's Keylime, where it judges too, does so after this, on the lines that were proven here.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import dataclass

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs.boot_policy import BootPolicy
from provider_proxy.evidence.logs.event_log import extended_mask, parse_event_log, replay
from provider_proxy.evidence.logs.ima import ImaReplay, Outcome, ReplayState
from provider_proxy.evidence.logs.ima_judge import IMA_PCR, LineJudge, Violations
from provider_proxy.evidence.logs.ima_line import shown
from provider_proxy.evidence.logs.runtime_policy import RuntimePolicy
from provider_proxy.evidence.model import HashAlg, HostLogs, VerifiedQuote, mask_of, pcrs_of

DEFAULT_UEFI_PCRS = mask_of(range(8))  # the firmware's own; 8 and 9 are the boot loader's


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPolicy:
    """What a tenant demands of a host's logs.

    Attributes:
        ima: the IMA list must lead to PCR 10; a runtime policy demands that, too.
        runtime: which files may have been measured.
        violations: what to do with files that were written to while they were measured.
        uefi_mask: PCRs that the firmware's event log must lead to, each extended at least once.
        boot: which digests may have been extended into them.

    Raises:
        UsageError: the boot policy names a PCR that the log need not lead to.
    """

    ima: bool = False
    runtime: RuntimePolicy | None = None
    violations: Violations = Violations.REFUSE
    uefi_mask: int = 0
    boot: BootPolicy | None = None

    def __post_init__(self) -> None:
        if self.boot is not None and self.boot.mask & ~self.uefi_mask:
            raise UsageError("the boot policy names a PCR that the event log is not checked for")

    @property
    def wants_ima(self) -> bool:
        return self.ima or self.runtime is not None

    @property
    def needed_mask(self) -> int:
        """The PCRs to ask for."""
        return self.uefi_mask | (1 << IMA_PCR if self.wants_ima else 0)


class LogJudge:
    """One host's logs, over many answers.

    Args:
        bank: of the quotes.
        lines: shared by hosts of one policy and bank; None for one of its own.
        state: how far an earlier judge with the same policy had come in this host's list.
    """

    def __init__(
        self,
        policy: LogPolicy,
        bank: HashAlg,
        *,
        lines: LineJudge | None = None,
        state: ReplayState | None = None,
    ) -> None:
        self.policy = policy
        self._ima: ImaReplay | None = None
        if policy.wants_ima:
            made = lines or LineJudge(bank, policy.runtime, violations=policy.violations)
            self._ima = ImaReplay(made, state=state)

    @property
    def ima_ml_entry(self) -> int:
        """Which part of the IMA list to ask for."""
        return self._ima.next_entry if self._ima is not None else 0

    @property
    def violations(self) -> int:
        """IMA entries so far of files that were written to while they were measured."""
        return self._ima.violations if self._ima is not None else 0

    @property
    def other_lines(self) -> int:
        """Lines of the IMA list so far that are of other PCRs."""
        return self._ima.others if self._ima is not None else 0

    @property
    def state(self) -> ReplayState | None:
        """How far the IMA list is proven; None where nothing is yet."""
        return self._ima.confirmed if self._ima is not None else None

    def judge(self, quote: VerifiedQuote, logs: HostLogs) -> Iterator[bool]:
        """Replay an answer's logs to its quote; pauses between chunks of a long list.

        Args:
            quote: of `policy.needed_mask` at least.
            logs: untrusted.

        Yields:
            False at a pause; at the end True once where the host is as wanted, or nothing where more
            of the IMA list is needed: then ask again, with a new nonce, from `ima_ml_entry`.

        Raises:
            LogError: a log is missing, does not fit the signed PCRs, or holds what is not allowed.
        """
        yield from self.without_ima(quote, logs, ends=False)
        if self._ima is not None:
            if logs.ima is None and logs.ima_missing is not None:
                raise LogError(_missing("PCR 10 and no IMA list", logs.ima_missing))
            for _ in self._ima.offer(logs.ima, logs.ima_entry, quote.pcrs[IMA_PCR]):
                yield False
            if self._ima.outcome is not Outcome.MATCHED:
                return
        yield True

    def without_ima(
        self, quote: VerifiedQuote, logs: HostLogs, *, ends: bool = True
    ) -> Iterator[bool]:
        """The same for a quote that another verifier asked for without PCR 10: the event log alone."""
        if self.policy.uefi_mask:
            if logs.uefi is None and logs.uefi_missing is not None:
                raise LogError(_missing("no firmware event log", logs.uefi_missing))
            check_boot_log(logs.uefi, quote, self.policy.uefi_mask, self.policy.boot)
        if ends:
            yield True


def _missing(what: str, why: str) -> str:
    """The message, with the reason that the host gives; a reason excuses nothing."""
    return f"the answer has {what}; the host's reason: {shown(why)}"


class AnswerLogs:
    """The logs of one answer as a `Policy` for the `Verifier`: for evidence without later answers.

    Args:
        logs: of the answer that is verified; untrusted.

    Attributes:
        violations, other_lines: of the IMA list that was judged last.
    """

    def __init__(self, policy: LogPolicy, logs: HostLogs) -> None:
        self._policy = policy
        self._logs = logs
        self.violations = 0
        self.other_lines = 0

    @property
    def needed_mask(self) -> int:
        return self._policy.needed_mask

    def check(self, quote: VerifiedQuote) -> None:
        """Raises: LogError: as `LogJudge.judge`, and where the answer has a part of the IMA list only."""
        judge = LogJudge(self._policy, quote.bank)
        *_, done = (False, *judge.judge(quote, self._logs))
        if not done:
            raise LogError(
                "the IMA list does not lead to the signed PCR 10: the answer holds only a part "
                "of the list (give the whole list), or the list was changed"
            )
        self.violations, self.other_lines = judge.violations, judge.other_lines


def check_boot_log(
    log: bytes | None, quote: VerifiedQuote, mask: int, policy: BootPolicy | None = None
) -> None:
    """Replay a log to the signed values of some PCRs, and judge its events.

    Args:
        log: untrusted; None where the answer has none.
        mask: the PCRs that must come out, each extended at least once; all of them requested.

    Raises:
        LogError: no log, a damaged one, one that leads to other values, an event not allowed.
    """
    if log is None:
        raise LogError("the answer has no firmware event log")
    events = parse_event_log(log)
    values = replay(events, quote.bank)
    for pcr in pcrs_of(mask):
        expected = values.get(pcr, bytes(quote.bank.digest_bytes))
        if not hmac.compare_digest(expected, quote.pcrs[pcr]):
            raise LogError(f"the firmware's event log does not lead to the signed PCR {pcr}")
    empty = policy.empty_mask if policy is not None else 0
    if unmeasured := pcrs_of(mask & ~extended_mask(events) & ~empty):
        raise LogError(
            f"PCR {unmeasured[0]} was never extended: the firmware measured nothing into it, so nothing "
            "is known of what ran"
        )
    if policy is not None:
        policy.check(events, quote.bank)
