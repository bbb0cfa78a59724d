"""The tenant's verdict: evidence in, `VerifiedQuote` out, or a `VerificationError`.

`Verifier.verify` runs the numbered checks of docs/evidence-format.md in their order, each with an
error class of its own. It has no clock, no file and no socket: the caller hands in the time that
passed and what it remembers of the host (`HostHistory`). What it returns holds signed facts only.

Invariants: whatever bytes come in, nothing but `VerificationError` comes out (or `UsageError` for a
policy that reads PCRs that were not requested); a nonce verifies once; nonce, mask and bank come from the
tenant's own `Challenge`, never from the reply.
"""

from __future__ import annotations

import hmac
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from provider_proxy.errors import (
    ClaimsError,
    ClockError,
    EvidenceFormatError,
    MaskNotCoveredError,
    NonceSpentError,
    PcrSelectionError,
    QualifyingDataError,
    SignatureError,
    StaleEvidenceError,
    UsageError,
)
from provider_proxy.evidence import attestation, inclusion, strict_json, wire
from provider_proxy.evidence.model import (
    AttestationKey,
    ClockState,
    Evidence,
    HashAlg,
    InclusionProof,
    Nonce,
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
    check_mask,
)
from provider_proxy.evidence.policy import Policy

DEFAULT_MAX_AGE_S = 60.0  # a slow chip under load answers within seconds; a held quote is older
NONCE_BYTES = 24  # 192 random bits; at least 128 are needed
MAX_OPEN_NONCES = 100_000  # bounds the memory of a caller that never spends them: 10 MB


class HostHistory(Protocol):
    """What a tenant remembers of one host. `pins` keeps it in files, `MemoryHistory` does not."""

    def newest(self) -> ClockState | None:
        """The newest clock state accepted so far."""
        ...

    def open(self, nonce: Nonce) -> None:
        """Remember a nonce as sent and unanswered."""
        ...

    def spend(self, nonce: Nonce) -> bool:
        """Close an open nonce; False where it is not open."""
        ...

    def is_open(self, nonce: Nonce) -> bool:
        """True between `open` and `spend`."""
        ...

    def accept(self, state: ClockState) -> None:
        """Remember a state that passed every check; keeps the newest."""
        ...


class MemoryHistory:
    """A `HostHistory` that ends with the process."""

    def __init__(self, newest: ClockState | None = None) -> None:
        self._newest = newest
        self._open: dict[Nonce, None] = {}

    def newest(self) -> ClockState | None:
        return self._newest

    def open(self, nonce: Nonce) -> None:
        """Past `MAX_OPEN_NONCES` the oldest is forgotten, and its answer will be refused."""
        self._open[nonce] = None
        if len(self._open) > MAX_OPEN_NONCES:
            del self._open[next(iter(self._open))]

    def is_open(self, nonce: Nonce) -> bool:
        return nonce in self._open

    def spend(self, nonce: Nonce) -> bool:
        if nonce not in self._open:
            return False
        del self._open[nonce]
        return True

    def accept(self, state: ClockState) -> None:
        if self._newest is None or state > self._newest:
            self._newest = state


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """One question of a tenant, with what it knew when it asked.

    Attributes:
        made_at_s: when the nonce was made, on the tenant's own clock.
        baseline: the newest state of the host accepted before; None for the first.
    """

    request: QuoteRequest
    made_at_s: float
    baseline: ClockState | None = None


def new_challenge(
    *,
    mask: int,
    now_s: float,
    history: HostHistory,
    nonce: Nonce | None = None,
    bank: HashAlg = HashAlg.SHA256,
    vm: uuid.UUID | None = None,
    ima_ml_entry: int = 0,
    timeout_ms: int | None = None,
    logs: bool = True,
) -> Challenge:
    """Make a fresh nonce and open it in the host's history.

    Args:
        now_s: the tenant's monotonic clock, in seconds; give `Verifier.verify` the same clock's.
        nonce: made by the caller, with at least 128 fresh random bits; None for one
            that is made here.

    Raises:
        ParameterError: the mask is empty or reaches beyond PCR 23.
    """
    if nonce is None:
        nonce = Nonce(secrets.token_urlsafe(NONCE_BYTES).encode("ascii"))
    challenge = Challenge(
        request=QuoteRequest(
            nonce=nonce,
            mask=check_mask(mask),
            bank=bank,
            vm=vm,
            ima_ml_entry=ima_ml_entry,
            timeout_ms=timeout_ms,
            logs=logs,
        ),
        made_at_s=now_s,
        baseline=history.newest(),
    )
    history.open(nonce)
    return challenge


class Verifier:
    """Runs the checks; one may serve any number of hosts.

    Args:
        policy: judges the host's state; there is no default, because none would be safe.
        max_age_s: how old a nonce may be when its answer is there.
    """

    def __init__(self, policy: Policy, *, max_age_s: float = DEFAULT_MAX_AGE_S) -> None:
        self._policy = policy
        self._max_age_s = max_age_s

    def verify(
        self,
        evidence: bytes | Evidence,
        challenge: Challenge,
        host: TrustedHost,
        history: HostHistory,
        *,
        now_s: float,
    ) -> VerifiedQuote:
        """Check an answer to `challenge`.

        Args:
            evidence: the reply's body, untrusted bytes (or already through `wire.parse_evidence`).
            now_s: when the answer was there, on the clock of `challenge.made_at_s`.

        Raises:
            VerificationError: the class says which check failed; the nonce stays open.
            UsageError: the policy reads PCRs that were not requested.
            HostError: the history cannot be kept; nothing counts as verified.
        """
        request = challenge.request
        if self._policy.needed_mask & ~request.mask:
            raise UsageError("the policy reads PCRs that were not requested")
        # 0 form, and the tenant's own records
        self._check_fresh(challenge, history, now_s)
        if isinstance(evidence, bytes):
            evidence = wire.parse_evidence(evidence)
        # 1 a TPM's quote
        attest = attestation.parse_attest(evidence.quote.attest)
        # 2 signed by the trusted AK
        _check_signed(evidence, host.ak)
        # 3, 4 over a root that holds this very request
        claims = check_request_in_quote(request, evidence.proof, evidence.claims, attest)
        # 5 the values are the signed ones and hold what was asked
        _check_selection(evidence, attest, request, host.ak)
        # 6 the TPM's clock does not run back
        if challenge.baseline is not None:
            check_clock(attest.clock, challenge.baseline)
        # 7 policy
        wanted = {pcr: v for pcr, v in evidence.quote.pcrs.values if request.mask >> pcr & 1}
        verified = VerifiedQuote(
            bank=attest.bank,
            pcrs=wanted,
            clock=attest.clock,
            clock_safe=attest.clock_safe,
            firmware_version=attest.firmware_version,
            was_reset=challenge.baseline is not None
            and attest.clock.reset_count > challenge.baseline.reset_count,
            ak_name=host.ak.name,
            claims=claims,
        )
        self._policy.check(verified)
        history.accept(attest.clock)
        if not history.spend(request.nonce):
            raise NonceSpentError("this nonce has verified already")
        return verified

    def _check_fresh(self, challenge: Challenge, history: HostHistory, now_s: float) -> None:
        if not history.is_open(challenge.request.nonce):
            raise NonceSpentError(
                "this nonce is not open: it has verified already, or was never sent"
            )
        age = now_s - challenge.made_at_s
        if not 0 <= age <= self._max_age_s:
            raise StaleEvidenceError(
                f"the answer came {age:.1f} s after its nonce was made; "
                f"0 to {self._max_age_s:g} s are allowed"
            )


def _check_signed(evidence: Evidence, ak: AttestationKey) -> None:
    """Check 2, labels included: an honest reply's labels are those of the key that signed it."""
    signature = attestation.parse_signature(evidence.quote.signature)
    attestation.check_signature(evidence.quote.attest, signature, ak)
    if evidence.hash_alg != signature.hash_alg or evidence.sign_alg != signature.sign_alg:
        raise SignatureError("hash_alg or sign_alg is not that of the signature")
    if evidence.enc_alg != ak.enc_alg:
        raise SignatureError("enc_alg is not the kind of the trusted AK")
    if ak.name and not hmac.compare_digest(evidence.ak_name, ak.name):
        raise SignatureError("ak_name is not the trusted AK's")


def check_request_in_quote(
    request: QuoteRequest, proof: InclusionProof, claims: bytes | None, attest: attestation.Attest
) -> Mapping[str, object] | None:
    """Checks 3 and 4: the request is a leaf under the root that was quoted.

    Args:
        claims: the reply's exact bytes; None where it has none.

    Returns:
        The claims, parsed; None where none were asked for.

    Raises:
        ClaimsError, InclusionError, QualifyingDataError: as the error tree says.
        EvidenceFormatError: format 1 does not have trees of this size.
    """
    if proof.tree_size < 2 or proof.tree_size & (proof.tree_size - 1):
        raise EvidenceFormatError("tree_size is not a power of two of at least 2")
    parsed = _check_claims(request.vm, claims)
    leaf = inclusion.leaf_hash(
        inclusion.leaf_input(
            salt=proof.salt,
            nonce=request.nonce,
            mask=request.mask,
            bank=request.bank,
            claims=claims or b"",
        )
    )
    root = inclusion.root_from_proof(leaf, proof)
    expected = inclusion.qualifying_data(root, proof.tree_size)
    if not hmac.compare_digest(expected, attest.extra_data):
        raise QualifyingDataError("the quote was not taken over a root that holds this request")
    return parsed


def _check_claims(vm: uuid.UUID | None, claims: bytes | None) -> Mapping[str, object] | None:
    """Claims are there exactly if a VM was asked for, and are about that VM."""
    if vm is None:
        if claims is not None:
            raise ClaimsError("the reply has claims that were not asked for")
        return None
    if claims is None:
        raise ClaimsError("the reply lacks the claims that were asked for")
    try:
        values = strict_json.parse_json_object(claims, "claims")
    except EvidenceFormatError as exc:
        raise ClaimsError(str(exc)) from exc
    if values.get("vm") != str(vm):
        raise ClaimsError("the claims are about another VM")
    return values


def _check_selection(
    evidence: Evidence, attest: attestation.Attest, request: QuoteRequest, ak: AttestationKey
) -> None:
    """Check 5: bank and bitmap as signed, values as signed, the request covered."""
    if evidence.bank != attest.bank or evidence.mask != attest.mask:
        raise PcrSelectionError("the reply's bank or mask is not the signed one")
    attestation.check_pcrs(attest, evidence.quote.pcrs, ak.signature_hash)
    check_covered(attest, request)


def check_covered(attest: attestation.Attest, request: QuoteRequest) -> None:
    """Check 5: the signed selection holds every requested PCR, in the requested bank.

    Raises:
        MaskNotCoveredError: it does not.
    """
    if attest.bank != request.bank or request.mask & ~attest.mask:
        raise MaskNotCoveredError("the quote does not cover the requested PCRs in their bank")


def check_clock(clock: ClockState, baseline: ClockState) -> None:
    """Check 6: not older than what was accepted before the nonce was sent.

    Equal is fine (two nonces, one quote). A risen reset_count may lower the rest.

    Raises:
        ClockError: the TPM, or a copy of it, went back in time.
    """
    if clock < baseline:
        raise ClockError("the TPM's clock is older than one that was accepted before")
