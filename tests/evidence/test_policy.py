"""Policies judge what was signed, and fail closed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from provider_proxy.errors import PolicyError, UsageError
from provider_proxy.evidence.model import AkName, ClockState, HashAlg, VerifiedQuote
from provider_proxy.evidence.policy import (
    AllOf,
    PcrPolicy,
    Policy,
    UnsafeAcceptAny,
    parse_tpm_policy,
)

GOOD, OTHER, BAD = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32


def quote_with(pcrs: Mapping[int, bytes], bank: HashAlg = HashAlg.SHA256) -> VerifiedQuote:
    return VerifiedQuote(
        bank=bank,
        pcrs=pcrs,
        clock=ClockState(reset_count=1, restart_count=0, clock_ms=1),
        clock_safe=True,
        firmware_version=1,
        was_reset=False,
        ak_name=AkName(b""),
        claims=None,
    )


class Refuse:
    """A policy with a reason, that counts how often it was asked."""

    def __init__(self, reason: str, needed_mask: int = 0) -> None:
        self.reason = reason
        self.needed_mask = needed_mask
        self.asked = 0

    def check(self, quote: VerifiedQuote) -> None:
        self.asked += 1
        raise PolicyError(self.reason)


def refused(policy: Policy, quote: VerifiedQuote) -> str:
    with pytest.raises(PolicyError) as caught:
        policy.check(quote)
    return str(caught.value)


def test_allowed_values_pass() -> None:
    policy = PcrPolicy({0: [GOOD, OTHER], 7: [GOOD]})
    assert policy.needed_mask == 0x81
    policy.check(quote_with({0: GOOD, 7: GOOD}))
    policy.check(quote_with({0: OTHER, 7: GOOD, 8: BAD}))


@pytest.mark.parametrize(
    ("pcrs", "told"),
    [
        ({0: BAD, 7: GOOD}, f"PCR 0 is {BAD.hex()}"),
        ({0: GOOD, 7: OTHER}, "PCR 7"),  # good for PCR 0 is not good for PCR 7
        ({7: GOOD}, "PCR 0 is not in the quote"),
        ({}, "PCR 0 is not in the quote"),
        ({0: b"", 7: GOOD}, "PCR 0"),
        ({0: GOOD[:-1], 7: GOOD}, "PCR 0"),
        ({0: BAD, 7: BAD}, "PCR 0"),
    ],
)
def test_other_values_are_refused_by_number(pcrs: dict[int, bytes], told: str) -> None:
    policy = PcrPolicy({7: [GOOD], 0: [GOOD, OTHER]})
    assert told in refused(policy, quote_with(pcrs))


def test_another_bank_is_refused() -> None:
    # Equal digests of two banks say nothing about each other.
    assert "bank" in refused(PcrPolicy({0: [GOOD]}), quote_with({0: GOOD}, HashAlg.SHA384))


def test_digests_may_come_as_an_iterator() -> None:
    PcrPolicy({0: iter([BAD, GOOD])}).check(quote_with({0: GOOD}))
    policy = PcrPolicy({0: iter([GOOD])})
    for _ in range(2):  # an iterator read once, not once a check
        policy.check(quote_with({0: GOOD}))


@pytest.mark.parametrize(
    ("allowed", "bank"),
    [
        ({}, HashAlg.SHA256),
        ({0: []}, HashAlg.SHA256),
        ({0: [GOOD], 1: []}, HashAlg.SHA256),
        ({0: [b""]}, HashAlg.SHA256),
        ({0: [GOOD, GOOD[:20]]}, HashAlg.SHA256),
        ({0: [GOOD]}, HashAlg.SHA1),
        ({-1: [GOOD]}, HashAlg.SHA256),
        ({24: [GOOD]}, HashAlg.SHA256),
    ],
)
def test_a_policy_that_cannot_hold_is_a_usage_error(
    allowed: dict[int, Iterable[bytes]], bank: HashAlg
) -> None:
    with pytest.raises(UsageError):
        PcrPolicy(allowed, bank=bank)


def test_an_empty_all_of_refuses() -> None:
    assert "empty" in refused(AllOf([]), quote_with({0: GOOD}))
    assert "empty" in refused(AllOf([UnsafeAcceptAny(), AllOf(())]), quote_with({0: GOOD}))


def test_all_of_wants_all_and_tells_the_first() -> None:
    first, second = Refuse("first"), Refuse("second")
    quote = quote_with({0: GOOD})
    AllOf([PcrPolicy({0: [GOOD]}), UnsafeAcceptAny()]).check(quote)
    assert refused(AllOf([UnsafeAcceptAny(), first, second]), quote) == "first"
    assert (first.asked, second.asked) == (1, 0)
    assert "PCR 0" in refused(AllOf([UnsafeAcceptAny(), PcrPolicy({0: [BAD]})]), quote)


def test_all_of_reads_an_iterator_once() -> None:
    policy = AllOf(iter([Refuse("no")]))
    for _ in range(2):
        assert refused(policy, quote_with({})) == "no"


def test_all_of_needs_what_its_parts_need() -> None:
    assert AllOf([]).needed_mask == 0
    parts: list[Policy] = [UnsafeAcceptAny(), Refuse("", 0x3), AllOf([PcrPolicy({23: [GOOD]})])]
    assert AllOf(parts).needed_mask == 0x800003


def test_accept_any_says_that_it_is_unsafe() -> None:
    UnsafeAcceptAny().check(quote_with({}))
    assert UnsafeAcceptAny().needed_mask == 0
    assert UnsafeAcceptAny.__name__.startswith("Unsafe")


def test_keylimes_tpm_policy_is_read() -> None:
    policy = parse_tpm_policy(
        {"0": [GOOD.hex(), OTHER.hex().upper()], "7": GOOD.hex(), "mask": "0x81"}
    )
    assert policy.needed_mask == 0x81
    policy.check(quote_with({0: OTHER, 7: GOOD}))
    assert "PCR 7" in refused(policy, quote_with({0: GOOD, 7: OTHER}))


def test_hex_of_a_tpm_policy_may_have_either_case() -> None:
    text = ("0123456789abcdefABCDEF" * 3)[:64]
    parse_tpm_policy({"0": text}).check(quote_with({0: bytes.fromhex(text)}))


def test_a_tpm_policy_is_of_its_bank() -> None:
    policy = parse_tpm_policy({"23": ["ab" * 48]}, bank=HashAlg.SHA384)
    policy.check(quote_with({23: b"\xab" * 48}, HashAlg.SHA384))
    with pytest.raises(
        UsageError, match="PCR 23 has digests of other banks only, and needs one of sha256"
    ):
        parse_tpm_policy({"23": ["ab" * 48]})


def test_values_of_other_banks_are_passed_over() -> None:
    """As Keylime's documents write a policy: one value for each bank that a host may be asked in."""
    values = [digit * size for digit in ("0", "1") for size in (40, 64, 96, 128)]
    for bank in HashAlg:
        policy = parse_tpm_policy({"22": values, "15": values[:4]}, bank=bank)
        size = bank.digest_bytes
        policy.check(quote_with({22: bytes(size), 15: bytes(size)}, bank))
        policy.check(quote_with({22: b"\x11" * size, 15: bytes(size)}, bank))
        assert "PCR 15" in refused(policy, quote_with({22: bytes(size), 15: b"\x11" * size}, bank))
    with pytest.raises(UsageError, match="PCR 15"):
        parse_tpm_policy({"22": values, "15": [values[0]]})


@pytest.mark.parametrize("size", [1, 16, 19, 21, 28, 31, 33, 47, 49, 63, 65])
def test_a_value_of_no_bank_s_length_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes: no bank's digest has this length"):
        parse_tpm_policy({"0": [GOOD.hex(), "00" * size]})


@pytest.mark.parametrize("pcr", [0, 1, 23])
def test_each_pcr_may_be_named(pcr: int) -> None:
    policy = parse_tpm_policy({str(pcr): GOOD.hex(), "mask": hex(1 << pcr)})
    assert policy.needed_mask == 1 << pcr
    policy.check(quote_with({pcr: GOOD}))
    assert f"PCR {pcr} " in refused(policy, quote_with({pcr: BAD}))


@pytest.mark.parametrize("mask", ["0x81", "129", "0b10000001", "0x000081"])
def test_a_mask_of_the_named_pcrs_is_taken(mask: str) -> None:
    parse_tpm_policy({"0": GOOD.hex(), "7": GOOD.hex(), "mask": mask})


@pytest.mark.parametrize(
    "mask", ["0x80", "0x83", "0x1000081", "-0x81", "", "x", "81", 0x81, None, ["0x81"], "9" * 5000]
)
def test_a_mask_that_says_something_else_is_refused(mask: object) -> None:
    with pytest.raises(UsageError, match="take the mask out"):
        parse_tpm_policy({"0": GOOD.hex(), "7": GOOD.hex(), "mask": mask})


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="empty"),
        pytest.param({"mask": "0x0"}, id="a mask alone"),
        pytest.param({"0": []}, id="no value"),
        pytest.param({"0": None}, id="null"),
        pytest.param({"0": 7}, id="a number"),
        pytest.param({"0": {"a": GOOD.hex()}}, id="an object"),
        pytest.param({"0": [GOOD.hex(), 7]}, id="a number in the list"),
        pytest.param({"0": [[GOOD.hex()]]}, id="a list in the list"),
        pytest.param({"0": ""}, id="empty text"),
        pytest.param({"0": GOOD.hex()[1:]}, id="odd"),
        pytest.param({"0": " " + GOOD.hex()}, id="white space"),
        pytest.param({"0": "0x" + GOOD.hex()}, id="0x"),
        pytest.param({"0": "00" * 20}, id="SHA-1"),
        pytest.param({"24": GOOD.hex()}, id="PCR 24"),
        pytest.param({"-1": GOOD.hex()}, id="PCR -1"),
        pytest.param({"0x1": GOOD.hex()}, id="hex key"),
        pytest.param({"": GOOD.hex()}, id="empty key"),
        pytest.param({"001": GOOD.hex()}, id="three digits"),
        pytest.param({"\u0661": GOOD.hex()}, id="another script's digit"),
        pytest.param({"\u00b2": GOOD.hex()}, id="superscript"),
        pytest.param({"0": GOOD.hex(), "00": BAD.hex()}, id="PCR 0 twice"),
        pytest.param({"9" * 5000: GOOD.hex()}, id="5000 digits"),
        pytest.param({"meta": {}, "0": GOOD.hex()}, id="another key"),
    ],
)
def test_other_tpm_policies_are_usage_errors(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        parse_tpm_policy(values)
