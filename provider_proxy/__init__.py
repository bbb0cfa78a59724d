"""Verify a shared TPM quote as a tenant: what `import provider_proxy` gives needs `cryptography` alone.

    host = TrustedHost(ak=parse_ak(ak_tpm))
    history = MemoryHistory()
    challenge = new_challenge(mask=0xFF, now_s=time.monotonic(), history=history)
    ...send challenge.request, receive `body`...
    quote = Verifier(policy).verify(body, challenge, host, history, now_s=time.monotonic())
    quote.pcrs[0]

`provider_proxy.tenant.client` asks over HTTP and `provider_proxy.trust.bindings` finds out which AK
to trust (extra `client`); the daemon needs the extra `host`.
"""

from provider_proxy.errors import ProviderProxyError, ReplyError, UsageError, VerificationError
from provider_proxy.evidence.deep_quote import ask_host, deep_nonce, deep_verify, new_deep_question
from provider_proxy.evidence.logs.boot_policy import BootPolicy, parse_boot_policy
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.logs.judge import AnswerLogs, LogJudge, LogPolicy
from provider_proxy.evidence.logs.runtime_policy import RuntimePolicy
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import (
    AttestationKey,
    ClockState,
    Evidence,
    HashAlg,
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
)
from provider_proxy.evidence.policy import (
    AllOf,
    PcrPolicy,
    Policy,
    UnsafeAcceptAny,
    parse_tpm_policy,
)
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.evidence.tpm_keys import insecure_ak_from_pem, parse_ak
from provider_proxy.evidence.verify import (
    Challenge,
    HostHistory,
    MemoryHistory,
    Verifier,
    new_challenge,
)
from provider_proxy.evidence.vtpm_link import VtpmLink, ek_digest
from provider_proxy.evidence.wire import parse_evidence

__all__ = [
    "AllOf",
    "AnswerLogs",
    "AttestationKey",
    "BootPolicy",
    "Challenge",
    "ClockState",
    "Evidence",
    "HashAlg",
    "HostHistory",
    "LogJudge",
    "LogPolicy",
    "MemoryHistory",
    "PcrPolicy",
    "Policy",
    "ProviderProxyError",
    "QuoteRequest",
    "ReplyError",
    "RuntimePolicy",
    "TrustedHost",
    "UnsafeAcceptAny",
    "UsageError",
    "VerificationError",
    "VerifiedQuote",
    "Verifier",
    "Violations",
    "VtpmLink",
    "ask_host",
    "deep_nonce",
    "deep_verify",
    "ek_digest",
    "encode_quote_query",
    "insecure_ak_from_pem",
    "new_challenge",
    "new_deep_question",
    "parse_ak",
    "parse_boot_policy",
    "parse_evidence",
    "parse_runtime_policy",
    "parse_tpm_policy",
]
