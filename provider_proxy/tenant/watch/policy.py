"""The policy for a watched host: its policy files, read once, and the judgement of verified evidence.

PCR values are judged by the `Verifier`; the logs beside the quote are judged here, after it, because
they prove nothing before the PCRs are verified. Policy files are the tenant's own and trusted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from provider_proxy.errors import PolicyError
from provider_proxy.evidence.logs.ima_judge import IMA_PCR
from provider_proxy.evidence.logs.judge import LogJudge
from provider_proxy.evidence.model import HostLogs, VerifiedQuote, mask_of
from provider_proxy.evidence.policy import AllOf, Policy, UnsafeAcceptAny
from provider_proxy.tenant.policies import JudgedLogs, LogRules, PolicyFiles
from provider_proxy.tenant.watch.store import ImaRecord
from provider_proxy.tenant.watch.tables import HostRules

ANY_STATE_MASK = 1  # insecure_any_state asks for PCR 0, because a quote needs a PCR


class FirstUsePolicy:
    """The PCRs must have the values of the first answer.

    Args:
        mask: the PCRs.
        known: their values; None before the first answer, which is accepted with any values.

    Attributes:
        known: as above; set by `confirm`.
    """

    def __init__(self, mask: int, known: Mapping[int, bytes] | None) -> None:
        self.needed_mask = mask
        self.known: Mapping[int, bytes] | None = None
        self._first: Mapping[int, bytes] = {}
        if (
            known is not None and mask_of(known) == mask
        ):  # other PCRs: the next answer is a first use again
            self.known = dict(known)

    def check(self, quote: VerifiedQuote) -> None:
        """Raises: PolicyError naming the first PCR that has changed."""
        values = {pcr: v for pcr, v in quote.pcrs.items() if self.needed_mask >> pcr & 1}
        if self.known is None:
            self._first = values
            return
        for pcr, value in sorted(values.items()):
            if self.known[pcr] != value:
                raise PolicyError(
                    f"PCR {pcr} is {value.hex()}, which is not its value at first use"
                )

    def confirm(self) -> Mapping[int, bytes]:
        """Trust the values of the last checked quote, because it passed every other check too."""
        if self.known is None:
            self.known = self._first
        return self.known


class HostPolicy:
    """All policies of one host.

    Args:
        rules: the host's own.
        files: where its policy files are read.
        known: PCR values at first use, from an earlier run.
        judged_elsewhere: another verifier has policies for the host, so none is needed here; an
            IMA list that came with a signed PCR 10 is replayed even where `ima` is not set.

        proven: how far the host's IMA list was proven before; counts under the same policy only.

    Attributes:
        mask: the PCRs that these policies read.
        on_pcrs: what the `Verifier` judges.
        judged_logs: the rules for its logs.

    Raises:
        UsageError: a policy file is wrong.
        HostError: it cannot be read.
    """

    def __init__(
        self,
        rules: HostRules,
        files: PolicyFiles,
        known: Mapping[int, bytes] | None = None,
        *,
        judged_elsewhere: bool = False,
        proven: ImaRecord | None = None,
    ) -> None:
        judged = files.logs(log_rules(rules, replays_ima=judged_elsewhere), rules.bank)
        self.judged_logs: JudgedLogs = judged
        state = None
        if proven is not None and proven.digest == judged.digest and judged.lines is not None:
            keys = proven.state.keys | judged.lines.first_keys
            state = dataclasses.replace(proven.state, keys=keys)
        self._judge = LogJudge(judged.policy, rules.bank, lines=judged.lines, state=state)
        policies: list[Policy] = []
        if rules.tpm_policy is not None:
            policies.append(files.tpm(rules.tpm_policy, rules.bank))
        self.first_use: FirstUsePolicy | None = None
        if rules.first_use_pcrs:
            self.first_use = FirstUsePolicy(rules.first_use_pcrs, known)
            policies.append(self.first_use)
        if rules.vm is not None and rules.vm_ek is not None:
            policies.append(files.link(rules.vm, rules.vm_ek, least=rules.vm_least))
        log_mask = judged.policy.uefi_mask | (1 << IMA_PCR if rules.ima else 0)
        if log_mask or rules.insecure_any_state or judged_elsewhere:
            policies.append(UnsafeAcceptAny())  # the logs are judged after the PCRs, below
        self.on_pcrs: Policy = AllOf(policies)
        self.mask = self.on_pcrs.needed_mask | log_mask

    def mask_with(self, more: int) -> int:
        """The PCRs to ask for, if the caller wants `more`; at least one."""
        return self.mask | more or ANY_STATE_MASK

    @property
    def ima_ml_entry(self) -> int:
        """Which part of the IMA list to ask for."""
        return self._judge.ima_ml_entry

    @property
    def violations(self) -> int:
        """IMA entries so far of files that were written to while they were measured."""
        return self._judge.violations

    @property
    def proven(self) -> ImaRecord | None:
        """How far the IMA list is proven; None where nothing is yet."""
        state, lines = self._judge.state, self.judged_logs.lines
        if state is None or lines is None:
            return None
        learned = dataclasses.replace(state, keys=state.keys - lines.first_keys)
        return ImaRecord(digest=self.judged_logs.digest, state=learned)

    def judge(self, quote: VerifiedQuote, logs: HostLogs) -> Iterator[bool]:
        """Replay the logs to the quote; see `LogJudge.judge`.

        Raises:
            LogError: a log does not fit the signed PCRs, or holds what is not allowed.
        """
        if IMA_PCR not in quote.pcrs:  # another verifier did not ask for it this time
            yield from self._judge.without_ima(quote, logs)
        else:
            yield from self._judge.judge(quote, logs)


def log_rules(rules: HostRules, *, replays_ima: bool = False) -> LogRules:
    """The rules for a host's logs.

    Args:
        replays_ima: its IMA list is replayed in any case.
    """
    return LogRules(
        ima=rules.ima or replays_ima,
        runtime_policy=rules.runtime_policy,
        runtime_policy_key=rules.runtime_policy_key,
        violations=rules.ima_violations,
        uefi_mask=rules.uefi_pcrs if rules.uefi else 0,
        boot_policy=rules.boot_policy,
    )
