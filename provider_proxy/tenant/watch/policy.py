"""What a watched host must be: its policy files read once, and one judgement of verified evidence.

PCR values are judged by the `Verifier`; the logs beside the quote are judged here, after it, for they
mean nothing before the PCRs are verified. Policy files are the tenant's own and trusted.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from provider_proxy.common.files import read_trusted
from provider_proxy.errors import PolicyError, UsageError, VerificationError
from provider_proxy.evidence.logs.event_log import BootPolicy, check_boot_log, parse_boot_policy
from provider_proxy.evidence.logs.ima import IMA_PCR, ImaReplay, Outcome
from provider_proxy.evidence.logs.runtime_policy import RuntimePolicy, parse_runtime_policy
from provider_proxy.evidence.model import HashAlg, HostLogs, VerifiedQuote, mask_of
from provider_proxy.evidence.policy import (
    AllOf,
    PcrPolicy,
    Policy,
    UnsafeAcceptAny,
    parse_tpm_policy,
)
from provider_proxy.evidence.strict_json import parse_own_json
from provider_proxy.evidence.vtpm_link import VtpmLink, ek_digest
from provider_proxy.tenant.watch.tables import HostRules

T = TypeVar("T")

MAX_PUBLIC_BYTES = 64 * 1024
MAX_POLICY_BYTES = 1024 * 1024
MAX_RUNTIME_POLICY_BYTES = 256 * 1024 * 1024  # ones of 20 MB are in use
ANY_STATE_MASK = 1  # insecure_any_state asks for PCR 0, for a quote needs one


class PolicyFiles:
    """Policy files, each read and parsed once for all hosts that name it."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, HashAlg | None], object] = {}

    def tpm(self, path: Path, bank: HashAlg) -> PcrPolicy:
        """Raises: UsageError, HostError."""

        def parse(data: bytes) -> PcrPolicy:
            return parse_tpm_policy(parse_own_json(data, "the policy"), bank=bank)

        return self._once(path, bank, MAX_POLICY_BYTES, parse, PcrPolicy)

    def runtime(self, path: Path) -> RuntimePolicy:
        """Raises: UsageError, HostError."""
        return self._once(path, None, MAX_RUNTIME_POLICY_BYTES, parse_runtime_policy, RuntimePolicy)

    def boot(self, path: Path, bank: HashAlg) -> BootPolicy:
        """Raises: UsageError, HostError."""

        def parse(data: bytes) -> BootPolicy:
            return parse_boot_policy(data, bank=bank)

        return self._once(path, bank, MAX_POLICY_BYTES, parse, BootPolicy)

    def link(self, vm: UUID, ek: Path, *, confirmed: bool) -> VtpmLink:
        """The link of a VM to its host, the EK of its vTPM in a file. Raises: UsageError, HostError."""
        data = read_trusted(ek, MAX_PUBLIC_BYTES)
        with contextlib.suppress(binascii.Error):  # raw, then
            data = base64.b64decode(data.strip(), validate=True)
        try:
            return VtpmLink(vm=vm, ek=ek_digest(data), confirmed=confirmed)
        except VerificationError as exc:
            raise UsageError(f"{ek}: {exc}") from exc

    def _once(
        self,
        path: Path,
        bank: HashAlg | None,
        limit: int,
        parse: Callable[[bytes], T],
        kind: type[T],
    ) -> T:
        made = self._read.get((path, bank))
        if not isinstance(made, kind):
            try:
                made = parse(read_trusted(path, limit))
            except UsageError as exc:
                raise UsageError(f"{path}: {exc}") from exc
            self._read[path, bank] = made
        return made


class FirstUsePolicy:
    """The PCRs must be what they were at the first answer.

    Args:
        mask: the PCRs.
        known: their values; None before the first answer, which is accepted whatever it says.

    Attributes:
        known: as above; set by `confirm`.
    """

    def __init__(self, mask: int, known: Mapping[int, bytes] | None) -> None:
        self.needed_mask = mask
        self.known: Mapping[int, bytes] | None = None
        self._first: Mapping[int, bytes] = {}
        if known is not None and mask_of(known) == mask:  # other PCRs: it is first use again
            self.known = dict(known)

    def check(self, quote: VerifiedQuote) -> None:
        """Raises: PolicyError naming the first PCR that has changed."""
        values = {pcr: v for pcr, v in quote.pcrs.items() if self.needed_mask >> pcr & 1}
        if self.known is None:
            self._first = values
            return
        for pcr, value in sorted(values.items()):
            if self.known[pcr] != value:
                raise PolicyError(f"PCR {pcr} is {value.hex()}, which it was not at first use")

    def confirm(self) -> Mapping[int, bytes]:
        """The quote that was checked last is good in every other way too: the values are trusted."""
        if self.known is None:
            self.known = self._first
        return self.known


class HostPolicy:
    """All that one host must be.

    Args:
        rules: the host's own.
        files: where its policy files are read.
        known: PCR values of the first use, from an earlier run.
        judged_elsewhere: another verifier has policies for the host, so that it needs none here; an
            IMA list that came with a signed PCR 10 is replayed even where `ima` is not set.

    Attributes:
        mask: the PCRs that these policies read.
        on_pcrs: what the `Verifier` judges.

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
    ) -> None:
        self._uefi_mask = rules.uefi_pcrs if rules.uefi else 0
        self._boot = files.boot(rules.boot_policy, rules.bank) if rules.boot_policy else None
        if self._boot is not None and mask_of(self._boot.allowed) & ~self._uefi_mask:
            raise UsageError(f"{rules.boot_policy}: names a PCR that is not among uefi_pcrs")
        self._ima: ImaReplay | None = None
        if rules.ima or judged_elsewhere:
            runtime = files.runtime(rules.runtime_policy) if rules.runtime_policy else None
            self._ima = ImaReplay(rules.bank, runtime)
        policies: list[Policy] = []
        if rules.tpm_policy is not None:
            policies.append(files.tpm(rules.tpm_policy, rules.bank))
        self.first_use: FirstUsePolicy | None = None
        if rules.first_use_pcrs:
            self.first_use = FirstUsePolicy(rules.first_use_pcrs, known)
            policies.append(self.first_use)
        if rules.vm is not None and rules.vm_ek is not None:
            policies.append(files.link(rules.vm, rules.vm_ek, confirmed=rules.vm_confirmed))
        log_mask = self._uefi_mask | (1 << IMA_PCR if rules.ima else 0)
        if log_mask or rules.insecure_any_state or judged_elsewhere:
            policies.append(UnsafeAcceptAny())  # the logs are judged after the PCRs, below
        self.on_pcrs: Policy = AllOf(policies)
        self.mask = self.on_pcrs.needed_mask | log_mask

    def mask_with(self, more: int) -> int:
        """The PCRs to ask for, where somebody else wants `more`; one at least."""
        return self.mask | more or ANY_STATE_MASK

    @property
    def ima_ml_entry(self) -> int:
        """Which part of the IMA list to ask for."""
        return self._ima.next_entry if self._ima is not None else 0

    @property
    def violations(self) -> int:
        """IMA entries so far of files that were written to while they were measured."""
        return self._ima.violations if self._ima is not None else 0

    def judge(self, quote: VerifiedQuote, logs: HostLogs) -> Iterator[bool]:
        """Replay the logs to the quote; pauses between chunks of a long one.

        Yields:
            False at a pause; at the end True once where the host is as wanted, or nothing where more
            of the IMA list is needed: then ask again, with a new nonce.

        Raises:
            LogError: a log does not fit the signed PCRs, or holds what is not allowed.
        """
        if self._uefi_mask:
            check_boot_log(logs.uefi, quote, self._uefi_mask, self._boot)
        if self._ima is not None and IMA_PCR in quote.pcrs:
            for _ in self._ima.offer(logs.ima, logs.ima_entry, quote.pcrs[IMA_PCR]):
                yield False
            if self._ima.outcome is not Outcome.MATCHED:
                return
        yield True
