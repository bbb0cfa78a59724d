"""Leaf, proof and qualifying data: known answers, RFC 9162's definitions, what must not lead up."""

from __future__ import annotations

import random
import re
from hashlib import sha256

import pytest
from evidence_factory import leaf_bytes, qualifying, request_number, tree_path, tree_root

from provider_proxy.errors import EvidenceFormatError, InclusionError
from provider_proxy.evidence.inclusion import (
    leaf_hash,
    leaf_input,
    node_hash,
    qualifying_data,
    root_from_proof,
)
from provider_proxy.evidence.model import (
    HashAlg,
    InclusionProof,
    LeafHash,
    Nonce,
    PcrMask,
    RootHash,
)

SALT = bytes(range(16))


def proof_of(index: int, size: int, path: tuple[bytes, ...], salt: bytes = SALT) -> InclusionProof:
    return InclusionProof(leaf_index=index, tree_size=size, path=path, salt=salt)


def inputs(size: int) -> list[bytes]:
    rng = random.Random(size)
    return [rng.randbytes(rng.randrange(80)) + b"%d" % n for n in range(size)]


def test_leaf_input_is_the_documented_bytes() -> None:
    # Spelled out by hand from the format's text: a change here changes the format.
    expected = (
        "70726f76696465722d70726f78792f6c6561662f3100"  # provider-proxy/leaf/1 NUL
        "000102030405060708090a0b0c0d0e0f"
        "10" "6162636465666768696a6b6c6d6e6f70"
        "00000083" "000b"
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
    )  # fmt: skip
    got = leaf_input(
        salt=SALT, nonce=Nonce(b"abcdefghijklmnop"), mask=PcrMask(0x83), bank=HashAlg.SHA256
    )
    assert got.hex() == expected


def test_leaf_input_hashes_claims_at_its_end() -> None:
    request = request_number(1)
    common = {"salt": SALT, "nonce": request.nonce, "mask": request.mask, "bank": request.bank}
    got = leaf_input(**common, claims=b"{}")  # type: ignore[arg-type]
    assert got == leaf_bytes(request, SALT, b"{}")
    assert got[-32:] == sha256(b"{}").digest()


@pytest.mark.parametrize(("salt", "nonce"), [(15, 16), (17, 16), (0, 16), (16, 65), (16, 300)])
def test_leaf_input_takes_only_what_has_its_length(salt: int, nonce: int) -> None:
    with pytest.raises(ValueError, match="length"):
        leaf_input(salt=bytes(salt), nonce=Nonce(b"n" * nonce), mask=PcrMask(1), bank=HashAlg.SHA1)


def test_qualifying_data_is_the_documented_text() -> None:
    assert qualifying_data(RootHash(bytes(32)), 2) == b"h27isskouv52dpjextn3de7wpjglyklh"


def test_qualifying_data_is_a_keylime_nonce() -> None:
    rng = random.Random(1)
    for _ in range(200):
        root, size = RootHash(rng.randbytes(32)), 1 << rng.randrange(1, 21)
        text = qualifying_data(root, size)
        assert re.fullmatch(rb"[a-z2-7]{32}", text)  # at most 64 alphanumerics, at most 34 bytes
        assert text == qualifying(root, size)


def test_qualifying_data_binds_root_and_size() -> None:
    root = RootHash(bytes(32))
    texts = {qualifying_data(root, 1 << n) for n in range(21)}
    texts |= {qualifying_data(RootHash(bytes([n]) + bytes(31)), 2) for n in range(1, 100)}
    assert len(texts) == 21 + 99


@pytest.mark.parametrize("size", range(1, 66))
def test_every_leaf_leads_to_the_root_by_one_path_length(size: int) -> None:
    leaves = inputs(size)
    root = tree_root(leaves)
    for index, data in enumerate(leaves):
        path = tree_path(index, leaves)
        leaf = leaf_hash(data)
        assert root_from_proof(leaf, proof_of(index, size, path)) == root
        for length in range(len(path) + 3):
            if length != len(path):
                other = (path + path + (bytes(32),) * 3)[:length]
                with pytest.raises(InclusionError):
                    root_from_proof(leaf, proof_of(index, size, other))


@pytest.mark.parametrize("size", [2, 4, 8, 64])
def test_another_index_leads_elsewhere(size: int) -> None:
    leaves = inputs(size)
    path, leaf = tree_path(1, leaves), leaf_hash(leaves[1])
    roots = [root_from_proof(leaf, proof_of(index, size, path)) for index in range(size)]
    assert roots.count(RootHash(tree_root(leaves))) == 1
    assert len(set(roots)) == size


def test_every_bit_of_the_path_counts() -> None:
    leaves = inputs(8)
    path, leaf = tree_path(5, leaves), leaf_hash(leaves[5])
    root = tree_root(leaves)
    for level in range(3):
        for bit in range(256):
            flipped = (int.from_bytes(path[level], "big") ^ 1 << bit).to_bytes(32, "big")
            other = (*path[:level], flipped, *path[level + 1 :])
            assert root_from_proof(leaf, proof_of(5, 8, other)) != root


def test_a_parent_is_no_leaf() -> None:
    # What merklelib's own verifier falls for: a node offered as leaf, its path one shorter.
    leaves = inputs(8)
    left, right = leaf_hash(leaves[4]), leaf_hash(leaves[5])
    parent = node_hash(left, right)
    path = tree_path(4, leaves)[1:]
    with pytest.raises(InclusionError):
        root_from_proof(LeafHash(parent), proof_of(4, 8, path))
    # As data of a leaf it hashes to something else, whatever the index and size.
    as_data = leaf_hash(left + right)
    assert as_data != parent
    roots = {root_from_proof(as_data, proof_of(index, 4, path)) for index in range(4)}
    assert tree_root(leaves) not in roots


@pytest.mark.parametrize(
    ("index", "size", "salt", "node"),
    [
        (0, 0, 16, 32),
        (0, -2, 16, 32),
        (0, (1 << 20) + 1, 16, 32),
        (2, 2, 16, 32),
        (-1, 2, 16, 32),
        (0, 2, 15, 32),
        (0, 2, 17, 32),
        (0, 2, 16, 31),
        (0, 2, 16, 33),
    ],
)
def test_a_proof_that_can_never_be_one_cannot_be_made(
    index: int, size: int, salt: int, node: int
) -> None:
    with pytest.raises(EvidenceFormatError):
        proof_of(index, size, (bytes(32), bytes(node)), bytes(salt))


def test_the_largest_proof_can_be_made() -> None:
    last = (1 << 20) - 1
    assert len(proof_of(last, 1 << 20, (bytes(32),) * 20).path) == 20


def test_a_root_is_no_proof_of_an_empty_path() -> None:
    leaves = inputs(4)
    root = tree_root(leaves)
    # Only a tree of one has its leaf for root, and the verifier takes no tree below two.
    assert root_from_proof(LeafHash(root), proof_of(0, 1, ())) == root
    for size in (2, 3, 4, 1 << 20):
        with pytest.raises(InclusionError):
            root_from_proof(LeafHash(root), proof_of(0, size, ()))


def test_the_salt_has_no_part_in_the_path() -> None:
    leaves = inputs(2)
    path, leaf = tree_path(0, leaves), leaf_hash(leaves[0])
    proofs = (proof_of(0, 2, path, salt) for salt in (SALT, bytes(16)))
    assert len({root_from_proof(leaf, proof) for proof in proofs}) == 1
