"""A value that exists is a valid one: what the model's classes refuse to be made of."""

from __future__ import annotations

import pytest

from provider_proxy.errors import EvidenceFormatError, ParameterError
from provider_proxy.evidence.model import (
    MAX_TREE_SIZE,
    HashAlg,
    InclusionProof,
    Nonce,
    PcrMask,
    PcrValues,
    QuoteRequest,
    check_mask,
    mask_of,
    pcrs_of,
)


def pcr_values(*numbers: int, bank: HashAlg = HashAlg.SHA256, length: int = 32) -> PcrValues:
    return PcrValues(bank=bank, values=tuple((n, bytes(length)) for n in numbers))


@pytest.mark.parametrize("numbers", [(), (0,), (23,), (0, 1, 23)])
def test_pcr_numbers_ascend(numbers: tuple[int, ...]) -> None:
    assert pcr_values(*numbers).mask == mask_of(numbers)
    assert pcrs_of(pcr_values(*numbers).mask) == numbers


@pytest.mark.parametrize("numbers", [(1, 0), (0, 0), (24,), (-1,), (-1, 0), (0, 24), (2, 1, 3)])
def test_other_pcr_numbers_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(EvidenceFormatError, match="ascending"):
        pcr_values(*numbers)


@pytest.mark.parametrize("bank", list(HashAlg))
def test_a_pcr_value_is_a_digest_of_its_bank(bank: HashAlg) -> None:
    pcr_values(7, bank=bank, length=bank.digest_bytes)
    for length in (0, bank.digest_bytes - 1, bank.digest_bytes + 1):
        with pytest.raises(EvidenceFormatError, match="length"):
            pcr_values(7, bank=bank, length=length)


def proof(**changes: object) -> InclusionProof:
    values = {"leaf_index": 0, "tree_size": 2, "path": (bytes(32),), "salt": bytes(16)}
    return InclusionProof(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"tree_size": 1},
        {"tree_size": MAX_TREE_SIZE},
        {"leaf_index": 1},
        {"leaf_index": MAX_TREE_SIZE - 1, "tree_size": MAX_TREE_SIZE},
        {"path": ()},
        {"path": (bytes(32),) * 2},
    ],
)
def test_a_proof_within_its_bounds(changes: dict[str, object]) -> None:
    proof(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tree_size": 0}, "tree_size"),
        ({"tree_size": MAX_TREE_SIZE + 1}, "tree_size"),
        ({"leaf_index": -1}, "leaf_index"),
        ({"leaf_index": 2}, "leaf_index"),
        ({"salt": bytes(15)}, "salt"),
        ({"salt": bytes(17)}, "salt"),
        ({"path": (bytes(31),)}, "path"),
        ({"path": (bytes(32), bytes(33))}, "path"),
    ],
)
def test_a_proof_out_of_bounds_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(EvidenceFormatError, match=words):
        proof(**changes)


@pytest.mark.parametrize("mask", [1, 1 << 23, (1 << 24) - 1])
def test_a_mask_names_pcrs(mask: int) -> None:
    assert check_mask(mask) == mask


@pytest.mark.parametrize("mask", [0, -1, 1 << 24, 1 << 63])
def test_other_masks_are_refused(mask: int) -> None:
    with pytest.raises(ParameterError):
        check_mask(mask)
    with pytest.raises(ParameterError):
        QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(mask))


@pytest.mark.parametrize(("length", "good"), [(15, False), (16, True), (64, True), (65, False)])
def test_a_nonce_has_its_length(length: int, good: bool) -> None:
    if good:
        QuoteRequest(nonce=Nonce(b"n" * length), mask=PcrMask(1))
        return
    with pytest.raises(ParameterError, match="nonce"):
        QuoteRequest(nonce=Nonce(b"n" * length), mask=PcrMask(1))


@pytest.mark.parametrize(
    ("mask", "ima", "boot"),
    [
        *((1 << pcr, pcr == 10, pcr <= 15 and pcr != 10) for pcr in range(24)),
        (0x401, True, True),
    ],
)
def test_which_logs_a_mask_brings(mask: int, ima: bool, boot: bool) -> None:
    request = QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(mask))
    assert (request.wants_ima, request.wants_boot_log) == (ima, boot)
    silent = QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(mask), logs=False)
    assert not silent.wants_ima
    assert not silent.wants_boot_log
