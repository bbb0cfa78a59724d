"""The tenant's policy files, read once for all hosts that name them, for every command that judges.

Files are the tenant's own and trusted. A reload keeps what was read from a file that has not changed, and
the verdicts that it has already reached.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from provider_proxy.common.files import read_file, read_trusted
from provider_proxy.errors import EvidenceFormatError, UsageError
from provider_proxy.evidence.logs.boot_policy import BootPolicy, parse_boot_policy
from provider_proxy.evidence.logs.ima_judge import LineJudge, Violations
from provider_proxy.evidence.logs.judge import LogPolicy
from provider_proxy.evidence.logs.runtime_policy import RuntimePolicy
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.policy import PcrPolicy, parse_tpm_policy
from provider_proxy.evidence.strict_json import parse_own_json
from provider_proxy.evidence.tpm_keys import PublicKey, parse_public
from provider_proxy.evidence.vtpm_link import VtpmLink, spki_digest

T = TypeVar("T")

MAX_PUBLIC_BYTES = 64 * 1024
MAX_POLICY_BYTES = 1024 * 1024
MAX_RUNTIME_POLICY_BYTES = 256 * 1024 * 1024  # some of 20 MB are in use

_Read = Callable[[Path, int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRules:
    """What a tenant demands of a host's logs, in its own files.

    Attributes:
        ima: the IMA list is replayed; a runtime policy demands that, too.
        runtime_policy: file of Keylime's runtime policy; None to replay only.
        runtime_policy_key: PEM file of the key that must have signed it.
        uefi_mask: PCRs that the firmware's event log must lead to; 0 for those of the boot policy.
        boot_policy: file of the digests that may be extended into them.
    """

    ima: bool = False
    runtime_policy: Path | None = None
    runtime_policy_key: Path | None = None
    violations: Violations = Violations.REFUSE
    uefi_mask: int = 0
    boot_policy: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedLogs:
    """Rules for a host's logs, read.

    Attributes:
        lines: judges the IMA list's lines, shared by all hosts of these rules; None for no list.
        digest: of all that a verdict on a line depends on: a replay continues only under the same.
    """

    policy: LogPolicy
    lines: LineJudge | None
    digest: bytes


class PolicyFiles:
    """Policy files, each read and parsed once for all hosts that name it.

    Args:
        before: those of an earlier reading: unchanged ones are reused.
        read: reads a file; the default refuses one that everybody can write.
    """

    def __init__(self, before: PolicyFiles | None = None, *, read: _Read = read_trusted) -> None:
        self._read = read
        self._before = before._made if before is not None else {}
        self._lines_before = before._lines if before is not None else {}
        self._made: dict[tuple[Path, str], tuple[bytes, object]] = {}
        self._lines: dict[tuple[bytes, HashAlg], LineJudge] = {}

    def tpm(self, path: Path, bank: HashAlg) -> PcrPolicy:
        """Raises: UsageError, HostError."""

        def parse(data: bytes) -> PcrPolicy:
            return parse_tpm_policy(parse_own_json(data, "the policy"), bank=bank)

        return self._once((path, bank.label), MAX_POLICY_BYTES, parse, PcrPolicy)[1]

    def runtime(self, path: Path, key: Path | None = None) -> RuntimePolicy:
        """Raises: UsageError, HostError."""
        return self._runtime(path, key)[1]

    def _runtime(self, path: Path, key: Path | None) -> tuple[bytes, RuntimePolicy]:
        pem = None if key is None else self._read(key, MAX_PUBLIC_BYTES)

        def parse(data: bytes) -> RuntimePolicy:
            return parse_runtime_policy(data, key=pem)

        return self._once(
            (path, str(key or "")), MAX_RUNTIME_POLICY_BYTES, parse, RuntimePolicy, more=pem or b""
        )

    def boot(self, path: Path, bank: HashAlg) -> BootPolicy:
        """Raises: UsageError, HostError."""

        def parse(data: bytes) -> BootPolicy:
            return parse_boot_policy(data, bank=bank)

        return self._once((path, bank.label), MAX_POLICY_BYTES, parse, BootPolicy)[1]

    def logs(self, rules: LogRules, bank: HashAlg) -> JudgedLogs:
        """Read the files that some rules name.

        Raises:
            UsageError: a policy is wrong, or names a PCR that the event log is not checked for.
            HostError: a file cannot be read.
        """
        runtime, digest = None, b"none"
        if rules.runtime_policy is not None:
            digest, runtime = self._runtime(rules.runtime_policy, rules.runtime_policy_key)
        boot = self.boot(rules.boot_policy, bank) if rules.boot_policy is not None else None
        try:
            policy = LogPolicy(
                ima=rules.ima,
                runtime=runtime,
                violations=rules.violations,
                uefi_mask=rules.uefi_mask or (boot.mask if boot is not None else 0),
                boot=boot,
            )
        except UsageError as exc:
            raise UsageError(f"{rules.boot_policy}: {exc}") from exc
        how = f"{rules.violations.value} {bank.label}".encode("ascii")
        digest = hashlib.sha256(digest + how).digest()
        if not policy.wants_ima:
            return JudgedLogs(policy=policy, lines=None, digest=digest)
        lines = self._lines.get((digest, bank)) or self._lines_before.get((digest, bank))
        if lines is None:
            lines = LineJudge(bank, runtime, violations=rules.violations)
        self._lines[digest, bank] = lines
        return JudgedLogs(policy=policy, lines=lines, digest=digest)

    def forget_before(self) -> None:
        """Everything is read: release what only the earlier reading used."""
        self._before, self._lines_before = {}, {}

    def link(self, vm: UUID, ek: Path, *, least: str) -> VtpmLink:
        """The link of a VM to its host, the EK of its vTPM in a file. Raises: UsageError, HostError."""
        return VtpmLink(vm=vm, ek=spki_digest(self.ek(ek)), least=least)

    def ek(self, path: Path) -> PublicKey:
        """The EK of a vTPM: TPM2B_PUBLIC, raw or base64. Raises: UsageError, HostError."""
        data = self._read(path, MAX_PUBLIC_BYTES)
        with contextlib.suppress(binascii.Error):  # then it is raw
            data = base64.b64decode(data.strip(), validate=True)
        try:
            return parse_public(data).public_key
        except EvidenceFormatError as exc:
            raise UsageError(f"{path}: the EK is not a TPM2B_PUBLIC: {exc}") from exc

    def _once(
        self,
        where: tuple[Path, str],
        limit: int,
        parse: Callable[[bytes], T],
        kind: type[T],
        *,
        more: bytes = b"",
    ) -> tuple[bytes, T]:
        """The content of a file, and its digest."""
        found = self._made.get(where)
        if found is None:
            path, _ = where
            data = self._read(path, limit)
            digest = hashlib.sha256(hashlib.sha256(data).digest() + more).digest()
            found = self._before.get(where)
            if found is None or found[0] != digest:
                try:
                    found = digest, parse(data)
                except UsageError as exc:
                    raise UsageError(f"{path}: {exc}") from exc
            self._made[where] = found
        made = found[1]
        assert isinstance(made, kind)
        return found[0], made


def unguarded_files() -> PolicyFiles:
    """Files as a command line names them, even if other users may write them."""
    return PolicyFiles(read=read_file)
