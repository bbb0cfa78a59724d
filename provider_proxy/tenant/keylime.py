"""A tenant's own, unmodified Keylime verifier judges the host's quote.

Two verifiers judge one answer. Keylime checks a quote and knows the tenant's policies, but it expects one
nonce for one quote: it cannot check that the tenant's nonce is a leaf under the signed root, nor compare
the signed PCR selection with what was asked. `Verifier` checks just that, and `LogJudge` the logs, always
first. Only what has passed goes to `POST /v2.x/verify/evidence`, with `nonce` = the qualifying data.

Sources: Keylime 7.14, `VerifyEvidenceHandler` and `process_verify_attestation`; API 2.5 or 2.6, as the
verifier supports. Earlier releases do not have this request.
Does not check: the host's clock at Keylime (`Verifier` does); revocation.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx

from provider_proxy.errors import KeylimeRefusedError, ReplyError, UsageError
from provider_proxy.evidence import attestation
from provider_proxy.evidence.logs.ima_judge import IMA_PCR, Violations
from provider_proxy.evidence.logs.judge import DEFAULT_UEFI_PCRS, LogJudge, LogPolicy
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import Evidence, HashAlg, TrustedHost, VerifiedQuote, mask_of
from provider_proxy.evidence.policy import parse_tpm_policy
from provider_proxy.evidence.strict_json import parse_own_json
from provider_proxy.evidence.verify import HostHistory, Verifier
from provider_proxy.evidence.wire import encode_quote
from provider_proxy.tenant.asking import attest_whole
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.replies import status_text
from provider_proxy.tenant.verifier_api import FIRST_WITH_EVIDENCE, VerifierApi

BOOT_PCRS = (*range(10), *range(11, 16))  # what Keylime's measured-boot policies may read
MAX_POLICY_BYTES = 64 * 1024 * 1024  # runtime policies of tens of thousands of files are 20 MB
MAX_ANSWER_BYTES = 256 * 1024 * 1024  # it sends back everything that it was sent
MAX_REASONS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KeylimePolicies:
    """What the tenant gives its verifier for this host, each as JSON text; at least one.

    Attributes:
        tpm: `tpm_policy`, {"0": ["hex", …]}.
        runtime: `runtime_policy`, for the IMA list.
        measured_boot: `mb_policy`, for the firmware's log.
        runtime_key: PEM of the key that must have signed the runtime policy; None for an unsigned one.
        violations: what to do with files that were written to while IMA measured them.
        uefi_mask: PCRs that the firmware's log must lead to before Keylime applies `mb_policy`.
        logs: what is demanded of the logs before Keylime judges; made from these.

    Raises:
        UsageError: there is no policy, or one is not a JSON object, is too large, or demands what is not
            judged here.
    """

    tpm: str | None = None
    runtime: str | None = None
    measured_boot: str | None = None
    runtime_key: bytes | None = None
    violations: Violations = Violations.REFUSE
    uefi_mask: int = DEFAULT_UEFI_PCRS
    logs: LogPolicy = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = {"tpm": self.tpm, "runtime": self.runtime, "measured-boot": self.measured_boot}
        if not any(given.values()):
            raise UsageError("Keylime's verifier needs at least one policy")
        for name, text in given.items():
            if text is not None and len(text) > MAX_POLICY_BYTES:
                raise UsageError(f"the {name} policy is larger than {MAX_POLICY_BYTES} bytes")
        if self.measured_boot is not None:
            parse_own_json(self.measured_boot, "the measured-boot policy")
        runtime = None
        if self.runtime is not None:
            runtime = parse_runtime_policy(self.runtime.encode("utf-8"), key=self.runtime_key)
        elif self.runtime_key is not None:
            raise UsageError("a key for a runtime policy is given, and no runtime policy")
        logs = LogPolicy(
            runtime=runtime,
            violations=self.violations,
            uefi_mask=0 if self.measured_boot is None else self.uefi_mask,
        )
        object.__setattr__(self, "logs", logs)
        _ = self.mask  # reads the TPM policy

    @property
    def mask(self) -> int:
        """The PCRs that these policies read."""
        mask = 0
        if self.tpm is not None:
            mask |= parse_tpm_policy(parse_own_json(self.tpm, "the tpm policy")).needed_mask
        if self.runtime is not None:
            mask |= 1 << IMA_PCR
        if self.measured_boot is not None:
            mask |= mask_of(BOOT_PCRS)
        return mask


class KeylimeVerifier:
    """The tenant's verifier.

    Args:
        http: the caller's client, which trusts the verifier's CA; the caller closes it.
        base_url: "https://verifier:8881".
    """

    def __init__(self, http: httpx.AsyncClient, base_url: str) -> None:
        self._api = VerifierApi(http, base_url)
        self._version: str | None = None

    async def judge(
        self, evidence: Evidence, policies: KeylimePolicies, *, ek_public: bytes, ak_public: bytes
    ) -> None:
        """Return if Keylime accepts the quote.

        Does not check: that the tenant's nonce is in it; give only what `Verifier.verify` accepted.

        Args:
            ek_public, ak_public: TPM2B_PUBLIC, from the tenant's own registrar.

        Raises:
            KeylimeRefusedError: it refuses it.
            NotSupportedError: it is older than 7.14, which does not have this request.
            ReplyError: no answer, or one that cannot be understood.
        """
        if self._version is None:
            self._version = await self._api.negotiate(FIRST_WITH_EVIDENCE, "/verify/evidence")
        body = json.dumps(
            {
                "type": "tpm",
                "data": _request_data(evidence, policies, ek_public, ak_public),
            }
        ).encode("utf-8")
        path = f"/v{self._version}/verify/evidence"
        status, answer = await self._api.call("POST", path, body, limit=MAX_ANSWER_BYTES)
        if status != 200:
            raise ReplyError(
                f"the verifier answered {status}: {status_text(answer)}", status=status
            )
        reasons = _parse_verdict(answer)
        if reasons is not None:
            raise KeylimeRefusedError(reasons)


def _request_data(
    evidence: Evidence, policies: KeylimePolicies, ek_public: bytes, ak_public: bytes
) -> Mapping[str, str]:
    nonce = attestation.parse_attest(evidence.quote.attest).extra_data
    data = {
        "quote": encode_quote(evidence.quote),
        "nonce": nonce.decode("ascii"),
        "hash_alg": evidence.hash_alg.label,
        "tpm_ek": base64.b64encode(ek_public).decode("ascii"),
        "tpm_ak": base64.b64encode(ak_public).decode("ascii"),
        "tpm_policy": policies.tpm or "",
        "runtime_policy": policies.runtime or "",
        "mb_policy": policies.measured_boot or "",
    }
    if evidence.logs.ima is not None:
        data["ima_measurement_list"] = evidence.logs.ima
    if evidence.logs.uefi is not None:
        data["mb_log"] = base64.b64encode(evidence.logs.uefi).decode("ascii")
    return data


def _parse_verdict(answer: bytes) -> tuple[str, ...] | None:
    """None where every part of the answer says that it is good; otherwise its reasons."""
    try:  # it is trusted, and repeats a policy that may have a million parts
        results = parse_own_json(answer, "the verifier's answer").get("results")
    except UsageError as exc:
        raise ReplyError(str(exc)) from exc
    failures = results.get("failures") if isinstance(results, dict) else None
    if not isinstance(results, dict) or not isinstance(failures, list):
        raise ReplyError("the verifier's answer does not hold a verdict")
    if results.get("valid") is True and not failures:
        return None
    return tuple(map(_reason, failures[:MAX_REASONS])) or ("no reason given",)


def _reason(failure: object) -> str:
    """One failure in one short printable line."""
    kind, context = failure, None
    if isinstance(failure, dict):
        kind, context = failure.get("type"), failure.get("context")
    text = str(kind) if context is None else f"{kind}: {json.dumps(context, sort_keys=True)}"
    return "".join(c if c.isprintable() else "?" for c in text[:500])


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredHost:
    """A host as the tenant's own registrar recorded it; see `bindings`.

    Attributes:
        ek_public, ak_public: TPM2B_PUBLIC.
    """

    host: TrustedHost
    history: HostHistory
    ek_public: bytes
    ak_public: bytes


async def ask_host(
    proxy: ProxyClient,
    registered: RegisteredHost,
    verifier: Verifier,
    policies: KeylimePolicies,
    *,
    mask: int = 0,
    timeout_ms: int | None = None,
    now: Callable[[], float] = time.monotonic,
) -> tuple[VerifiedQuote, Evidence]:
    """The first half of `check_host`: verify and judge the answer, for Keylime to judge next.

    Keylime takes a missing list for an empty one, and a PCR 10 of zeros for a match of any list, so the
    logs are judged here first.

    Raises:
        VerificationError: this program's checks refuse it, including those of its logs.
        ReplyError: the proxy gave no answer.
    """
    judge = LogJudge(policies.logs, HashAlg.SHA256)
    attested = await attest_whole(
        proxy,
        verifier,
        registered.host,
        registered.history,
        judge,
        mask=mask | policies.mask,
        timeout_ms=timeout_ms,
        now=now,
    )
    return attested.quote, attested.evidence


async def check_host(
    proxy: ProxyClient,
    registered: RegisteredHost,
    verifier: Verifier,
    keylime: KeylimeVerifier,
    policies: KeylimePolicies,
    *,
    mask: int = 0,
    timeout_ms: int | None = None,
    now: Callable[[], float] = time.monotonic,
) -> VerifiedQuote:
    """Ask the proxy, check the inclusion, then let the tenant's Keylime judge; return if it is good.

    Args:
        verifier: its policy may be `UnsafeAcceptAny`: Keylime has the policies.
        mask: PCRs to ask for beyond those that the policies read.

    Raises:
        VerificationError: this program refuses it (Keylime was not asked), or Keylime does.
        ReplyError: proxy or verifier gave no answer.
    """
    verified, evidence = await ask_host(
        proxy, registered, verifier, policies, mask=mask, timeout_ms=timeout_ms, now=now
    )
    await keylime.judge(
        evidence, policies, ek_public=registered.ek_public, ak_public=registered.ak_public
    )
    return verified
