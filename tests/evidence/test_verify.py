"""The tenant's verdict: which check comes first, what is remembered, what is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from evidence_factory import (
    CLOCK,
    MASK,
    OTHER_VM,
    VM,
    FixedTpm,
    SealedBatch,
    challenge_of,
    claims_about,
    ec_key,
    envelope,
    expected_pcrs,
    judge,
    pcr_blob,
    quote_text,
    request_number,
    seal,
    seal_with_claims,
)
from vectors.cases import flip

from provider_proxy import errors
from provider_proxy.errors import (
    ClockError,
    EvidenceFormatError,
    NonceSpentError,
    ParameterError,
    PolicyError,
    StaleEvidenceError,
    UsageError,
    VerificationError,
)
from provider_proxy.evidence import verify
from provider_proxy.evidence.model import (
    NONCE_RE,
    AkName,
    ClockState,
    HashAlg,
    Nonce,
    PcrMask,
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
)
from provider_proxy.evidence.policy import AllOf, PcrPolicy, Policy, UnsafeAcceptAny
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier, new_challenge
from provider_proxy.evidence.wire import parse_evidence

TPM = FixedTpm()
HOST = TrustedHost(ak=TPM.ak)
ANY = Verifier(UnsafeAcceptAny())


class Spy:
    """A policy that remembers what it saw, and does what it is told."""

    def __init__(self, then: Callable[[VerifiedQuote], None] = lambda quote: None, needed: int = 0):
        self.then = then
        self.needed_mask = needed
        self.seen: list[VerifiedQuote] = []

    def check(self, quote: VerifiedQuote) -> None:
        self.seen.append(quote)
        self.then(quote)


def refuse(_quote: VerifiedQuote) -> None:
    raise PolicyError("no")


def test_a_verified_quote_is_what_was_signed_and_asked() -> None:
    batch = seal(TPM, 3, extra_mask=0x7C00)
    quote = judge(batch.body(1), batch.requests[1], TPM.ak_public)
    assert quote == VerifiedQuote(
        bank=HashAlg.SHA256,
        pcrs=expected_pcrs(TPM, batch.requests[1]),
        clock=CLOCK,
        clock_safe=True,
        firmware_version=0x20191023_00163636,
        was_reset=False,
        ak_name=TPM.ak.name,
        claims=None,
    )


def test_only_requested_pcrs_are_shown() -> None:
    requests = (
        request_number(1, mask=1 << 7),
        request_number(2, mask=0x3),
        request_number(3, mask=1 << 23),
    )
    batch = SealedBatch(tpm=TPM, requests=requests, extra_mask=1 << 10)
    for number, request in enumerate(requests):
        spy = Spy()
        quote = judge(batch.body(number), request, TPM.ak_public, policy=spy)
        assert dict(quote.pcrs) == expected_pcrs(TPM, request)
        assert spy.seen == [quote]  # the policy sees no more than the caller


def test_nothing_unsigned_is_on_a_verified_quote() -> None:
    shown = {field.name for field in dataclasses.fields(VerifiedQuote)}
    assert not shown & {"boottime", "timing", "logs", "hash_alg", "mask", "proof"}
    batch = seal(TPM)
    plain = judge(batch.body(0), batch.requests[0], TPM.ak_public)
    results = batch.results(0) | {
        "boottime": 5,
        "timing": {"queued_ms": 1e9, "quote_ms": 0},
        "ima_measurement_list": "10 ...",
        "ima_measurement_list_entry": 3,
        "mb_measurement_list": "AAAA",
    }
    assert judge(envelope(results), batch.requests[0], TPM.ak_public) == plain


def test_claims_are_shown_as_they_were_bound() -> None:
    batch = seal_with_claims(TPM)
    quote = judge(batch.body(1), batch.requests[1], TPM.ak_public)
    assert quote.claims == json.loads(claims_about())


def test_parsed_evidence_is_judged_alike() -> None:
    batch = seal(TPM)
    challenge, history = challenge_of(batch.requests[0])
    quote = ANY.verify(parse_evidence(batch.body(0)), challenge, HOST, history, now_s=1.0)
    assert quote == judge(batch.body(0), batch.requests[0], TPM.ak_public)


# Each takes the results and the attestation's fields a step further from good. In the order of the
# checks: with faults n, n+1, ... in one evidence it is number n that must be named.
@dataclasses.dataclass
class Faulty:
    """One evidence with the faults from number `first` on."""

    first: int

    def has(self, name: str) -> bool:
        return FAULTS.index(name) >= self.first

    def verdict(self) -> VerifiedQuote:
        asked = request_number(500, mask=MASK | 0x8 if self.has("MaskNotCoveredError") else MASK)
        batch = SealedBatch(tpm=TPM, requests=(asked, request_number(501)))
        extra = bytes(32) if self.has("QualifyingDataError") else batch.qualifying
        kind = 0x8017 if self.has("NotAQuoteError") else 0x8018
        pcrs = TPM.read(HashAlg.SHA256, MASK)
        attest = TPM.attest(extra, HashAlg.SHA256, MASK, kind=kind)
        signature = TPM.sign(attest)
        if self.has("SignatureError"):
            signature = flip(signature, -1)
        if self.has("PcrDigestError"):
            swapped = tuple((n, bytes([n]) * 32) for n, _ in pcrs.values)
            pcrs = dataclasses.replace(pcrs, values=swapped)
        results = batch.results(0, quote=quote_text(attest, signature, pcr_blob(pcrs)))
        results["mask"] = "0x3" if self.has("PcrSelectionError") else hex(MASK)
        if self.has("InclusionError"):
            results["merkle"]["path"] *= 2
        if self.has("ClaimsError"):
            results["claims"] = "e30="
        if self.has("EvidenceFormatError"):
            results["format"] = 2
        baseline = dataclasses.replace(CLOCK, clock_ms=CLOCK.clock_ms + self.has("ClockError"))
        challenge, history = challenge_of(asked, baseline=baseline)
        if self.has("NonceSpentError"):
            history.spend(asked.nonce)
        policy: Policy = UnsafeAcceptAny()
        if self.has("UsageError"):
            policy = Spy(refuse, needed=1 << 20)
        elif self.has("PolicyError"):
            policy = Spy(refuse)
        now_s = 1e6 if self.has("StaleEvidenceError") else 1.0
        return Verifier(policy).verify(envelope(results), challenge, HOST, history, now_s=now_s)


FAULTS = [
    "UsageError",  # of the caller's own making: told before anything is judged
    "NonceSpentError",
    "StaleEvidenceError",
    "EvidenceFormatError",
    "NotAQuoteError",
    "SignatureError",
    "ClaimsError",
    "InclusionError",
    "QualifyingDataError",
    "PcrSelectionError",
    "PcrDigestError",
    "MaskNotCoveredError",
    "ClockError",
    "PolicyError",
]


@pytest.mark.parametrize("first", range(len(FAULTS)), ids=FAULTS)
def test_the_first_failing_check_is_named(first: int) -> None:
    with pytest.raises((VerificationError, UsageError)) as caught:
        Faulty(first).verdict()
    assert type(caught.value).__name__ == FAULTS[first]


def test_without_a_fault_the_same_evidence_is_good() -> None:
    assert Faulty(len(FAULTS)).verdict().clock == CLOCK


def test_the_order_of_checks_is_the_numbers_order() -> None:
    numbers = [getattr(errors, name).check for name in FAULTS if name != "UsageError"]
    assert numbers == sorted(numbers)
    about_the_key = {"UntrustedAkError", "PinChangedError"}  # before there is any evidence
    about_the_key |= {"NotRegisteredError", "BindingError", "UntrustedEkError"}
    assert set(FAULTS) - {"UsageError"} | about_the_key == {
        cls.__name__ for cls in VerificationError.__subclasses__()
    }


def test_a_nonce_verifies_once() -> None:
    batch = seal(TPM)
    challenge, history = challenge_of(batch.requests[0])
    ANY.verify(batch.body(0), challenge, HOST, history, now_s=1.0)
    assert not history.is_open(batch.requests[0].nonce)
    for _ in range(2):
        with pytest.raises(NonceSpentError):
            ANY.verify(batch.body(0), challenge, HOST, history, now_s=1.0)


def test_a_nonce_that_was_never_opened_is_refused() -> None:
    batch = seal(TPM)
    challenge, _ = challenge_of(batch.requests[0])
    with pytest.raises(NonceSpentError):
        ANY.verify(batch.body(0), challenge, HOST, MemoryHistory(), now_s=1.0)


def test_a_refused_answer_leaves_the_nonce_open_and_the_history_as_it_was() -> None:
    batch = seal(TPM)
    old = ClockState(reset_count=1, restart_count=0, clock_ms=0)
    challenge, history = challenge_of(batch.requests[0], baseline=old)
    for body, verifier in (
        (b"{}", ANY),
        (batch.body(1), ANY),
        (batch.body(0), Verifier(AllOf([]))),
    ):
        with pytest.raises(VerificationError):
            verifier.verify(body, challenge, HOST, history, now_s=1.0)
        assert history.newest() == old
    # A sender of rubbish cannot make the tenant refuse the true answer.
    ANY.verify(batch.body(0), challenge, HOST, history, now_s=2.0)
    assert history.newest() == CLOCK


def test_a_nonce_spent_while_the_policy_judged_does_not_verify() -> None:
    batch = seal(TPM)
    challenge, history = challenge_of(batch.requests[0])
    inner: list[VerifiedQuote] = []

    def verify_inside(_quote: VerifiedQuote) -> None:
        inner.append(ANY.verify(batch.body(0), challenge, HOST, history, now_s=1.0))

    with pytest.raises(NonceSpentError):
        Verifier(Spy(verify_inside)).verify(batch.body(0), challenge, HOST, history, now_s=1.0)
    assert len(inner) == 1


def test_two_nonces_of_one_quote_verify_both() -> None:
    batch = seal(TPM, 2)
    history = MemoryHistory()
    for number, request in enumerate(batch.requests):
        history.open(request.nonce)
        challenge = Challenge(request=request, made_at_s=0.0, baseline=history.newest())
        ANY.verify(batch.body(number), challenge, HOST, history, now_s=1.0)
    assert history.newest() == CLOCK


@pytest.mark.parametrize("age_s", [0.0, 0.001, 9.999, 10.0])
def test_an_answer_within_its_age_passes(age_s: float) -> None:
    batch = seal(TPM)
    challenge, history = challenge_of(batch.requests[0])
    challenge = dataclasses.replace(challenge, made_at_s=1000.0)
    verifier = Verifier(UnsafeAcceptAny(), max_age_s=10.0)
    verifier.verify(batch.body(0), challenge, HOST, history, now_s=1000.0 + age_s)


@pytest.mark.parametrize("age_s", [10.001, 1e9, -0.001, -1e9, float("inf"), float("nan")])
def test_an_answer_outside_its_age_is_stale(age_s: float) -> None:
    batch = seal(TPM)
    challenge, history = challenge_of(batch.requests[0])
    challenge = dataclasses.replace(challenge, made_at_s=1000.0)
    verifier = Verifier(UnsafeAcceptAny(), max_age_s=10.0)
    with pytest.raises(StaleEvidenceError):
        verifier.verify(batch.body(0), challenge, HOST, history, now_s=1000.0 + age_s)


def state(reset: int, restart: int, clock_ms: int) -> ClockState:
    return ClockState(reset_count=reset, restart_count=restart, clock_ms=clock_ms)


def verdict_at(clock: ClockState, baseline: ClockState | None) -> VerifiedQuote:
    tpm = FixedTpm(clock=clock)
    batch = seal(tpm)
    return judge(batch.body(0), batch.requests[0], tpm.ak_public, baseline=baseline)


@pytest.mark.parametrize(
    ("clock", "was_reset"),
    [
        (state(5, 3, 1000), False),
        (state(5, 3, 1001), False),
        (state(5, 4, 0), False),
        (state(6, 0, 0), True),
        (state(6, 3, 1000), True),
        (state((1 << 32) - 1, (1 << 32) - 1, (1 << 64) - 1), True),
    ],
)
def test_a_clock_may_stand_or_rise(clock: ClockState, was_reset: bool) -> None:
    quote = verdict_at(clock, state(5, 3, 1000))
    assert quote.clock == clock
    assert quote.was_reset is was_reset


@pytest.mark.parametrize(
    "clock", [state(5, 3, 999), state(5, 2, 5000), state(4, 9, 9000), state(0, 0, 0)]
)
def test_a_clock_that_went_back_is_refused(clock: ClockState) -> None:
    with pytest.raises(ClockError):
        verdict_at(clock, state(5, 3, 1000))


def test_the_first_clock_of_a_host_is_taken_as_it_is() -> None:
    assert verdict_at(state(0, 0, 0), None).was_reset is False


def test_reordered_answers_pass() -> None:
    # Asked one, asked two; two's answer came first, from a later quote.
    history = MemoryHistory(state(7, 0, 10))
    early, late = (
        seal(FixedTpm(clock=state(7, 1, ms)), seed=seed) for ms, seed in ((100, 1), (200, 2))
    )
    challenges = []
    for batch in (early, late):
        history.open(batch.requests[0].nonce)
        challenges.append(
            Challenge(request=batch.requests[0], made_at_s=0.0, baseline=history.newest())
        )
    ANY.verify(late.body(0), challenges[1], HOST, history, now_s=1.0)
    ANY.verify(early.body(0), challenges[0], HOST, history, now_s=1.0)
    assert history.newest() == state(7, 1, 200)  # and the older one takes nothing back


def test_an_answer_older_than_the_baseline_of_its_own_challenge_is_refused() -> None:
    history = MemoryHistory()
    held = seal(FixedTpm(clock=state(7, 1, 100)), seed=1)
    history.accept(state(7, 1, 200))
    history.open(held.requests[0].nonce)
    challenge = Challenge(request=held.requests[0], made_at_s=0.0, baseline=history.newest())
    with pytest.raises(ClockError):
        ANY.verify(held.body(0), challenge, HOST, history, now_s=1.0)


def test_a_policy_reading_unasked_pcrs_is_the_callers_mistake() -> None:
    batch = seal(TPM, extra_mask=1 << 4)  # the quote would even hold PCR 4
    challenge, history = challenge_of(batch.requests[0])
    value = dict(TPM.read(HashAlg.SHA256, 1 << 4).values)[4]
    verifier = Verifier(AllOf([UnsafeAcceptAny(), PcrPolicy({4: [value]})]))
    with pytest.raises(UsageError):
        verifier.verify(batch.body(0), challenge, HOST, history, now_s=1.0)
    assert history.is_open(batch.requests[0].nonce)


def test_a_policy_on_asked_pcrs_judges_their_values() -> None:
    batch = seal(TPM)
    values = expected_pcrs(TPM, batch.requests[0])
    good = PcrPolicy({pcr: [value] for pcr, value in values.items()})
    judge(batch.body(0), batch.requests[0], TPM.ak_public, policy=good)
    bad = PcrPolicy({0: [bytes(32)]})
    with pytest.raises(PolicyError):
        judge(batch.body(0), batch.requests[0], TPM.ak_public, policy=bad)


def test_an_empty_policy_refuses() -> None:
    batch = seal(TPM)
    with pytest.raises(PolicyError):
        judge(batch.body(0), batch.requests[0], TPM.ak_public, policy=AllOf([]))


def test_a_bare_public_key_has_no_name_to_compare() -> None:
    batch = seal(TPM)
    results = batch.results(0) | {"ak_name": "00"}
    bare = TrustedHost(ak=dataclasses.replace(TPM.ak, name=AkName(b"")))
    challenge, history = challenge_of(batch.requests[0])
    quote = ANY.verify(envelope(results), challenge, bare, history, now_s=1.0)
    assert quote.ak_name == b""  # what the proxy says of it is not shown as the key's name


def test_an_answer_for_another_host_is_refused() -> None:
    other = FixedTpm(ec_key("another ak"))
    batch = seal(other)
    with pytest.raises(errors.SignatureError):
        judge(batch.body(0), batch.requests[0], TPM.ak_public)


def test_a_vm_is_asked_for_by_the_challenge_not_by_the_policy() -> None:
    batch = seal_with_claims(TPM)
    for vm, request in ((OTHER_VM, batch.requests[1]), (VM, batch.requests[0])):
        asked = dataclasses.replace(request, vm=vm)
        with pytest.raises(errors.ClaimsError):
            judge(batch.body(batch.requests.index(request)), asked, TPM.ak_public)


def test_any_tree_size_that_is_no_power_of_two_is_refused() -> None:
    batch = seal(TPM)
    for size in [*range(1, 2), *(n for n in range(3, 300) if n & (n - 1)), (1 << 20) - 1]:
        results: dict[str, Any] = batch.results(0)
        results["merkle"] |= {"tree_size": size, "leaf_index": 0}
        with pytest.raises(EvidenceFormatError, match="power of two"):
            judge(envelope(results), batch.requests[0], TPM.ak_public)


def test_a_new_challenge_is_fresh_open_and_knows_the_newest_state() -> None:
    history = MemoryHistory(CLOCK)
    challenges = [new_challenge(mask=0x81, now_s=5.0, history=history) for _ in range(100)]
    nonces = {challenge.request.nonce for challenge in challenges}
    assert len(nonces) == 100
    for challenge in challenges:
        nonce = challenge.request.nonce
        assert challenge.request == QuoteRequest(nonce=nonce, mask=PcrMask(0x81))
        assert NONCE_RE.fullmatch(nonce.decode())
        assert len(nonce) * 6 == 192  # base64url: six random bits a character
        assert history.is_open(nonce)
        assert challenge.baseline == CLOCK
        assert challenge.made_at_s == 5.0


def test_a_new_challenge_asks_what_it_was_told() -> None:
    challenge = new_challenge(
        mask=0x400,
        now_s=0.0,
        history=MemoryHistory(),
        bank=HashAlg.SHA384,
        vm=VM,
        ima_ml_entry=7,
        timeout_ms=900,
    )
    request = challenge.request
    assert (request.mask, request.bank, request.vm) == (0x400, HashAlg.SHA384, VM)
    assert (request.ima_ml_entry, request.timeout_ms) == (7, 900)
    assert challenge.baseline is None


@pytest.mark.parametrize("mask", [0, -1, 1 << 24, 1 << 64])
def test_a_challenge_without_pcrs_is_not_made(mask: int) -> None:
    history = MemoryHistory()
    with pytest.raises(ParameterError):
        new_challenge(mask=mask, now_s=0.0, history=history)


def test_memory_history_keeps_the_newest_state() -> None:
    history = MemoryHistory()
    assert history.newest() is None
    for accepted, newest in (
        (state(1, 1, 5), state(1, 1, 5)),
        (state(1, 1, 4), state(1, 1, 5)),
        (state(1, 0, 9), state(1, 1, 5)),
        (state(2, 0, 0), state(2, 0, 0)),
        (state(1, 9, 9), state(2, 0, 0)),
    ):
        history.accept(accepted)
        assert history.newest() == newest


def test_memory_history_remembers_as_many_nonces_as_it_says() -> None:
    assert verify.MAX_OPEN_NONCES == 100_000


def test_memory_history_forgets_the_oldest_open_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_OPEN_NONCES", 3)
    history = MemoryHistory()
    nonces = [Nonce(b"nonce number %04d" % n) for n in range(5)]
    for nonce in nonces:
        history.open(nonce)
    # A forgotten one can only be refused: forgetting never opens a server.
    assert [history.is_open(nonce) for nonce in nonces] == [False, False, True, True, True]
    assert not history.spend(nonces[0])
    assert history.spend(nonces[4])
    assert not history.spend(nonces[4])


def test_the_history_is_spent_for_this_nonce_alone() -> None:
    batch = seal(TPM, 2)
    challenge, history = challenge_of(batch.requests[0])
    history.open(batch.requests[1].nonce)
    ANY.verify(batch.body(0), challenge, HOST, history, now_s=1.0)
    assert history.is_open(batch.requests[1].nonce)
