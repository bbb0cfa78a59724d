"""merklelib's trees against RFC 9162 and against `inclusion`, which tenants verify with."""

from __future__ import annotations

import collections
import random

import pytest
from evidence_factory import tree_path, tree_root

from provider_proxy.evidence.inclusion import leaf_hash, root_from_proof
from provider_proxy.evidence.model import InclusionProof
from provider_proxy.host.batching.merkle import build_tree, padding


def inputs(size: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(f"{seed} {size}")
    return [rng.randbytes(32) for _ in range(size)]


def leads_to(root: bytes, data: bytes, index: int, size: int, path: tuple[bytes, ...]) -> bool:
    proof = InclusionProof(leaf_index=index, tree_size=size, path=path, salt=bytes(16))
    return root_from_proof(leaf_hash(data), proof) == root


@pytest.mark.parametrize("first", range(1, 300, 30))
def test_every_size_agrees_with_rfc9162_and_every_proof_verifies(first: int) -> None:
    for size in range(first, first + 30):
        leaves = inputs(size)
        tree = build_tree(leaves)
        assert tree.size == size
        assert tree.root == tree_root(leaves)
        assert len(tree.paths) == size
        for index, data in enumerate(leaves):
            assert leads_to(tree.root, data, index, size, tree.paths[index])
        last = size - 1  # the leaf whose path is irregular in a tree of no power of two
        assert tree.paths[last] == tree_path(last, leaves)


@pytest.mark.parametrize("size", [2, 3, 7, 64, 1024])
def test_wanted_paths_come_in_their_order(size: int) -> None:
    leaves = inputs(size)
    wanted = list(range(size))
    random.Random(size).shuffle(wanted)
    wanted = wanted[: size // 2 + 1]
    tree = build_tree(leaves, wanted=wanted)
    assert len(tree.paths) == len(wanted)
    for index, path in zip(wanted, tree.paths, strict=True):
        assert leads_to(tree.root, leaves[index], index, size, path)


def test_order_of_the_leaves_is_kept() -> None:
    rng = random.Random(5)
    for size in (2, 5, 16, 33):
        leaves = inputs(size)
        for _ in range(5):
            rng.shuffle(leaves)
            assert build_tree(leaves).root == tree_root(leaves)


def test_leaves_of_any_length_and_look() -> None:
    # merklelib's own hasher would go through hex text; ours takes bytes as they are.
    leaves = [b"", b"\x00", b"00", b"\xff" * 200, b"deadbeef", bytes.fromhex("deadbeef")]
    assert build_tree(leaves).root == tree_root(leaves)


def test_a_leaf_that_looks_like_a_node_is_a_leaf() -> None:
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    leaves = [b"\x01" + left + right, b"c"]
    assert build_tree(leaves).root == tree_root(leaves)


@pytest.mark.parametrize("places", [(0, 1), (0, 7), (3, 6)])
def test_equal_leaves_are_refused(places: tuple[int, int]) -> None:
    leaves = inputs(8)
    leaves[places[1]] = leaves[places[0]]
    with pytest.raises(ValueError, match="equal"):
        build_tree(leaves)


def test_no_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        build_tree([])


def test_no_path_is_built_that_nobody_wants() -> None:
    assert build_tree(inputs(4), wanted=()).paths == ()


def test_padding_gives_the_least_power_of_two_from_two_on() -> None:
    for count in range(1, 1100):
        size = count + len(padding(count))
        assert size & (size - 1) == 0
        assert size >= 2
        assert size == 2 or size < 2 * count


def test_padding_is_random() -> None:
    drawn = padding(513) + padding(513)
    assert len(set(drawn)) == len(drawn) == 2 * 511
    assert {len(leaf) for leaf in drawn} == {32}


def test_the_standard_library_stays_as_it_is() -> None:
    # The repair of merklelib 1.0 belongs into merklelib's namespace: others look into collections.
    assert not hasattr(collections, "Iterable")
