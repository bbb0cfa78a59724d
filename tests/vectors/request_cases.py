"""Vectors: good answers of all sizes, and good answers to the wrong question, key, time or clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from evidence_factory import (
    CLOCK,
    MASK,
    OTHER_VM,
    VM,
    FixedTpm,
    SealedBatch,
    ec_key,
    request_number,
    rsa_key,
    seal,
    seal_with_claims,
)

from provider_proxy.evidence.model import ClockState, HashAlg, Nonce, PcrMask
from provider_proxy.evidence.tpm_writer import AK_ATTRIBUTES, encode_public
from vectors.cases import Base, Case

SIGNATURE = "SignatureError"
QUALIFYING = "QualifyingDataError"
CLOCK_ERROR = "ClockError"
STALE = "StaleEvidenceError"
UNTRUSTED = "UntrustedAkError"
FIXED_TPM, RESTRICTED, DECRYPT = 1 << 1, 1 << 16, 1 << 17


def valid_cases() -> Iterator[Case]:
    for count, numbers in (
        (1, (0,)), (2, (0, 1)), (3, (0, 2)), (5, (4,)), (8, (0, 7)), (64, (0, 63)), (1000, (0, 999)),
    ):  # fmt: skip
        for tpm in (FixedTpm(), FixedTpm(rsa_key())):
            batch = seal(tpm, count, seed=count)
            for number in numbers:
                yield Base(batch, number).case(
                    f"batch of {count}, request {number}, {tpm.ak.sign_alg}", "Batch"
                )
    for tpm in (FixedTpm(), FixedTpm(rsa_key()), FixedTpm(rsa_key(), hash_alg=HashAlg.SHA384)):
        name = f"{tpm.ak.sign_alg} {tpm.hash_alg.label}"
        claimed = seal_with_claims(tpm)
        yield Base(claimed, 1).case(f"{name}: with claims", "Claims")
        yield Base(claimed, 0).case(f"{name}: without, beside one with claims", "Claims")
        for bank in HashAlg:
            batch = seal(tpm, 2, bank=bank, seed=10)
            yield Base(batch, 0).case(f"{name}: bank {bank.label}", "Bank")
        wide = seal(tpm, 2, extra_mask=0x7C00, seed=11)
        yield Base(wide, 0).case(f"{name}: more quoted than asked", "Superset")
    everybody = SealedBatch(
        tpm=FixedTpm(),
        requests=tuple(request_number(60_000 + pcr, mask=1 << pcr) for pcr in range(24)),
        seed=12,
    )
    yield Base(everybody, 0).case("24 tenants, a PCR each: the first", "Superset")
    yield Base(everybody, 23).case("24 tenants, a PCR each: the last", "Superset")
    yield Base(seal(mask=0xFFFFFF, seed=13), 0).case("all PCRs", "Batch")
    for nonce in (b"." * 16, b"~" * 64, b"AZaz09._~-AZaz09._~-"):
        request = dataclasses.replace(request_number(0), nonce=Nonce(nonce))
        batch = SealedBatch(tpm=FixedTpm(), requests=(request,), seed=14)
        yield Base(batch, 0).case(f"a nonce of {len(nonce)} characters", "Batch")


def cases() -> Iterator[Case]:
    base = Base(seal(count=8, seed=7), 2)
    yield base.case("unchanged: what the next are made from", "Batch")
    yield from _questions(base)
    yield from _times(base)
    yield from _keys(base)


def _questions(base: Base) -> Iterator[Case]:
    own, others = base.request, base.batch
    for comment, request in (
        ("another tenant's nonce of the same batch", others.requests[3]),
        ("another nonce", request_number(70_000)),
        ("its nonce cut", dataclasses.replace(own, nonce=Nonce(own.nonce[:-1]))),
        ("its nonce in other case", dataclasses.replace(own, nonce=Nonce(own.nonce.swapcase()))),
        ("a PCR less", dataclasses.replace(own, mask=PcrMask(MASK & ~1))),
        ("a PCR more", dataclasses.replace(own, mask=PcrMask(MASK | 1 << 4))),
        ("other PCRs", dataclasses.replace(own, mask=PcrMask(0x7C))),
        ("bank sha1", dataclasses.replace(own, bank=HashAlg.SHA1)),
        ("bank sha384", dataclasses.replace(own, bank=HashAlg.SHA384)),
    ):
        yield base.case(f"asked with {comment}", "Request", QUALIFYING, request=request)
    asked = dataclasses.replace(own, vm=VM)
    yield base.case("asked for a VM", "Request Claims", "ClaimsError", request=asked)
    claimed = Base(seal_with_claims(), 1)
    asked = dataclasses.replace(claimed.request, vm=OTHER_VM)
    yield claimed.case("asked for another VM", "Request Claims", "ClaimsError", request=asked)
    asked = dataclasses.replace(claimed.request, vm=None)
    yield claimed.case("asked for no VM", "Request Claims", "ClaimsError", request=asked)


def _times(base: Base) -> Iterator[Case]:
    for age_s, error in (
        (0.0, ""), (60.0, ""), (60.001, STALE), (3600.0, STALE), (-0.001, STALE), (1e12, STALE),
    ):  # fmt: skip
        yield base.case(f"{age_s} s old", "Freshness", error, age_s=age_s)
    reset, restart, clock = CLOCK.reset_count, CLOCK.restart_count, CLOCK.clock_ms
    for comment, counts, error in (
        ("the same state", (reset, restart, clock), ""),
        ("a millisecond older", (reset, restart, clock - 1), ""),
        ("a restart ago, its clock higher", (reset, restart - 1, clock + 1), ""),
        ("a reset ago, all else higher", (reset - 1, restart + 9, clock + 10**9), ""),
        ("a millisecond newer", (reset, restart, clock + 1), CLOCK_ERROR),
        ("a restart newer, its clock lower", (reset, restart + 1, 0), CLOCK_ERROR),
        ("a reset newer, all else lower", (reset + 1, 0, 0), CLOCK_ERROR),
        ("a reset newer", (reset + 1, restart, clock), CLOCK_ERROR),
        ("the highest counts", ((1 << 32) - 1, (1 << 32) - 1, (1 << 64) - 1), CLOCK_ERROR),
    ):
        baseline = ClockState(reset_count=counts[0], restart_count=counts[1], clock_ms=counts[2])
        yield base.case(f"baseline: {comment}", "Clock", error, baseline=baseline)
    newest = ClockState(
        reset_count=(1 << 32) - 1, restart_count=(1 << 32) - 1, clock_ms=(1 << 64) - 1
    )
    for state, comment in ((newest, "the highest counts"), (ClockState(
        reset_count=0, restart_count=0, clock_ms=0), "counts of zero")):  # fmt: skip
        other = Base(seal(FixedTpm(clock=state), 2, seed=8), 0)
        yield other.case(f"TPM with {comment}", "Clock", baseline=state)


def _keys(base: Base) -> Iterator[Case]:
    key = ec_key().public_key()
    other = FixedTpm(ec_key("another ak"))
    same_key = encode_public(key, AK_ATTRIBUTES | 1 << 10)
    yield base.case("trusted: another EC key", "Key", SIGNATURE, ak=other.ak_public)
    yield base.case("trusted: an RSA key", "Key", SIGNATURE, ak=FixedTpm(rsa_key()).ak_public)
    yield base.case("trusted: the key under another name", "Key Label", SIGNATURE, ak=same_key)
    for comment, attributes in (
        ("a software key: none of an AK's attributes but sign", 1 << 18),
        ("a key that signs anything: not restricted", AK_ATTRIBUTES & ~RESTRICTED),
        ("a key that can leave its TPM: not fixedTPM", AK_ATTRIBUTES & ~FIXED_TPM),
        ("a key that decrypts too", AK_ATTRIBUTES | DECRYPT),
    ):
        # Signature, name and all the rest are good: nothing but the attributes speaks against it.
        public = encode_public(key, attributes)
        name = b"\x00\x0b" + HashAlg.SHA256.digest(public[2:])
        body = base.requoted(ak_name=name.hex())
        yield base.case(f"trusted: {comment}", "Key", UNTRUSTED, ak=public, body=body)
