"""Two quotes that belong together: the vTPM's over the tenant's nonce, then the host's over both.

The host's nonce is a digest of the tenant's nonce and of the vTPM's quote, so the host's TPM signed its
state and the link *after* the vTPM had signed its own: a link that ended before cannot vouch for it. The
proxy knows nothing of this; it is a nonce like any other. No clock, no file, no socket.

Order of a tenant's work: `new_deep_question`; the VM's agent quotes over its nonce; `ask_host` makes the
challenge for the proxy; `deep_verify` judges both answers.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from hashlib import sha256

from provider_proxy.errors import (
    DeepNonceError,
    QualifyingDataError,
    UsageError,
    VerificationError,
    VtpmQuoteError,
)
from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import (
    AttestationKey,
    Evidence,
    HashAlg,
    Nonce,
    Quote,
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
    check_mask,
    parse_nonce,
)
from provider_proxy.evidence.policy import AllOf, Policy
from provider_proxy.evidence.verify import (
    DEFAULT_MAX_AGE_S,
    Challenge,
    HostHistory,
    Verifier,
    check_covered,
)
from provider_proxy.evidence.vtpm_link import VtpmLink

DEEP_LABEL = b"provider-proxy/deep/1\x00"
NONCE_BYTES = 20  # 160 random bits; as hex 40 characters, which any vTPM and agent takes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepQuestion:
    """A tenant's nonce for the vTPM, and when it was made on the tenant's own clock."""

    nonce: Nonce
    made_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepVerified:
    """Both verdicts: `host` with the link's claims, `vtpm` with the VM's own PCRs."""

    host: VerifiedQuote
    vtpm: VerifiedQuote


def new_deep_question(*, now_s: float) -> DeepQuestion:
    """Make a fresh nonce for the vTPM's quote: 40 hex digits, a valid Keylime nonce."""
    return DeepQuestion(
        nonce=Nonce(secrets.token_hex(NONCE_BYTES).encode("ascii")), made_at_s=now_s
    )


def deep_nonce(nonce: bytes, vtpm_quote: Quote) -> Nonce:
    """The nonce for the host: binds the tenant's nonce and the vTPM's whole quote.

    hex(SHA-256("provider-proxy/deep/1" || 0x00 || u8(len nonce) || nonce || SHA-256(TPMS_ATTEST)
    || SHA-256(TPMT_SIGNATURE))): 64 characters. Injective, as every part has a fixed or stated length.

    Raises:
        ParameterError: the nonce is not 16 to 64 characters of `[A-Za-z0-9._~-]`.
    """
    checked = parse_nonce(nonce.decode("latin-1"))
    digest = sha256(
        DEEP_LABEL
        + bytes([len(checked)])
        + checked
        + sha256(vtpm_quote.attest).digest()
        + sha256(vtpm_quote.signature).digest()
    )
    return Nonce(digest.hexdigest().encode("ascii"))


def ask_host(
    question: DeepQuestion,
    vtpm_quote: Quote,
    *,
    link: VtpmLink,
    mask: int,
    history: HostHistory,
    bank: HashAlg = HashAlg.SHA256,
    timeout_ms: int | None = None,
) -> Challenge:
    """The challenge for the host's proxy, opened in the host's history.

    It is as old as the question, so that `max_age_s` bounds the age of both quotes.

    Raises:
        ParameterError: the mask is empty or reaches beyond PCR 23.
    """
    challenge = Challenge(
        request=QuoteRequest(
            nonce=deep_nonce(question.nonce, vtpm_quote),
            mask=check_mask(mask),
            bank=bank,
            vm=link.vm,
            timeout_ms=timeout_ms,
        ),
        made_at_s=question.made_at_s,
        baseline=history.newest(),
    )
    history.open(challenge.request.nonce)
    return challenge


def verify_vtpm_quote(
    quote: Quote, nonce: bytes, vak: AttestationKey, policy: Policy
) -> VerifiedQuote:
    """The vTPM's own quote: signed by the vAK over the tenant's nonce, PCRs as signed and as wanted.

    Does not check: that the vAK and the linked EK live in one vTPM; the credential activation of the
    tenant's own registrar does. Nor the vTPM's clock.

    Args:
        vak: from `attestation_key.parse_ak`, which checks a vTPM's AK as any other.

    Raises:
        VtpmQuoteError: refused; the cause is the error of the check that refused.
    """
    try:
        attest = attestation.parse_attest(quote.attest)
        signature = attestation.parse_signature(quote.signature)
        attestation.check_signature(quote.attest, signature, vak)
        if not hmac.compare_digest(attest.extra_data, bytes(nonce)):
            raise QualifyingDataError("it was not taken over the tenant's nonce")
        attestation.check_pcrs(attest, quote.pcrs, vak.signature_hash)
        if policy.needed_mask:
            check_covered(
                attest, QuoteRequest(nonce=Nonce(bytes(nonce)), mask=check_mask(policy.needed_mask))
            )
        verified = VerifiedQuote(
            bank=attest.bank,
            pcrs=dict(quote.pcrs.values),
            clock=attest.clock,
            clock_safe=attest.clock_safe,
            firmware_version=attest.firmware_version,
            was_reset=False,
            ak_name=vak.name,
            claims=None,
        )
        policy.check(verified)
    except VerificationError as exc:
        raise VtpmQuoteError(f"the vTPM's quote: {type(exc).__name__}: {exc}") from exc
    return verified


def deep_verify(
    evidence: bytes | Evidence,
    challenge: Challenge,
    host: TrustedHost,
    history: HostHistory,
    *,
    nonce: bytes,
    vtpm_quote: Quote,
    vak: AttestationKey,
    vtpm_policy: Policy,
    host_policy: Policy,
    link: VtpmLink,
    now_s: float,
    max_age_s: float = DEFAULT_MAX_AGE_S,
) -> DeepVerified:
    """Judge the vTPM's quote and the host's evidence as one.

    Args:
        challenge: from `ask_host`; or one whose nonce is `deep_nonce(nonce, vtpm_quote)`.
        nonce: the tenant's own, over which the vTPM was to quote.
        vtpm_policy, host_policy: judge the PCRs of each; there is no default, because none would be safe.
        link: which VM and EK must be linked.

    Raises:
        VtpmQuoteError: the vTPM's quote was refused.
        DeepNonceError: the host was not asked over this vTPM's quote and this nonce.
        VerificationError: the host's evidence or the link was refused; see `Verifier.verify`.
        UsageError: the host was asked about another VM than `link` is about, or about no VM.
    """
    vtpm = verify_vtpm_quote(vtpm_quote, nonce, vak, vtpm_policy)
    if not hmac.compare_digest(challenge.request.nonce, deep_nonce(nonce, vtpm_quote)):
        raise DeepNonceError("the host's quote does not come after this quote of the vTPM")
    if challenge.request.vm != link.vm:
        raise UsageError("the host was not asked about the VM that the link is about")
    policy = AllOf((host_policy, link))
    quote = Verifier(policy, max_age_s=max_age_s).verify(
        evidence, challenge, host, history, now_s=now_s
    )
    return DeepVerified(host=quote, vtpm=vtpm)
