"""Leaves to a tree with its root and proofs; the one module that uses merklelib.

merklelib 1.0 builds the tree and `inclusion` verifies; the batch's self-check compares the two for
every leaf that is sent. merklelib's `Hasher` is replaced by one over raw digests, which halves the time
for a leaf. The tree equals RFC 9162's for every size.

merklelib 1.0 uses `collections.Iterable`, which Python 3.10 removed. The workaround puts a namespace
that has it into merklelib's own module; the standard library is not changed.

Its sources declare the encoding "future_fstrings": UTF-8 whose f-strings Python 2 can read. The
package with that encoding runs code at every start of Python, so it is not installed: UTF-8 is
registered under that name while merklelib is imported.
"""

from __future__ import annotations

import codecs
import collections
import collections.abc
import encodings.utf_8
import secrets
import types
from collections.abc import Sequence
from dataclasses import dataclass

from provider_proxy.evidence import inclusion
from provider_proxy.evidence.model import HASH_BYTES, RootHash


def _future_fstrings(name: str) -> codecs.CodecInfo | None:
    return encodings.utf_8.getregentry() if name == "future_fstrings" else None


codecs.register(_future_fstrings)
try:
    import merklelib.merkle
finally:
    codecs.unregister(_future_fstrings)

if not hasattr(collections, "Iterable"):
    merklelib.merkle.collections = types.SimpleNamespace(
        Iterable=collections.abc.Iterable, OrderedDict=collections.OrderedDict
    )


class _DigestHasher(merklelib.merkle.Hasher):  # type: ignore[misc]  # merklelib has no types
    """RFC 9162's hashes over raw digests; merklelib's own goes through hex text."""

    def __init__(self) -> None:
        super().__init__()

    def hash_leaf(self, data: bytes) -> bytes:
        return inclusion.leaf_hash(data)

    def hash_children(self, left: bytes, right: bytes) -> bytes:
        return inclusion.node_hash(left, right)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A batch's tree. `paths[i]` leads from leaf i to the root."""

    root: RootHash
    size: int
    paths: tuple[tuple[bytes, ...], ...]


def build_tree(leaf_inputs: Sequence[bytes], *, wanted: Sequence[int] | None = None) -> Tree:
    """Build the tree over some leaf inputs, in their order.

    Args:
        leaf_inputs: at least one, all different (a salt in each makes them so).
        wanted: indexes whose path is needed; all of them where None. `paths` follows its order.

    Raises:
        ValueError: no leaf, or two equal ones.
    """
    if not leaf_inputs:
        raise ValueError("a tree needs at least one leaf")
    tree = merklelib.merkle.MerkleTree(list(leaf_inputs), _DigestHasher())
    leaves = tree.leaves
    if len(leaves) != len(leaf_inputs):  # merklelib's map collapses equal leaves
        raise ValueError("two leaves are equal")
    indexes = range(len(leaves)) if wanted is None else wanted
    root = RootHash(bytes.fromhex(tree.merkle_root))
    paths = tuple(_path(leaves[index]) for index in indexes)
    _take_apart(leaves)
    return Tree(root=root, size=len(leaves), paths=paths)


def _path(node: merklelib.merkle.MerkleNode) -> tuple[bytes, ...]:
    """The siblings from a leaf up to the root. merklelib's `get_proof` takes
    twice as long: it looks the leaf up by its hash and wraps each sibling twice."""
    path = []
    parent = node.parent
    while parent is not None:
        sibling = parent.right if parent.left is node else parent.left
        if isinstance(
            sibling, merklelib.merkle.MerkleNode
        ):  # an odd node at a level's end has none
            path.append(sibling.hash)
        node, parent = parent, parent.parent
    return tuple(path)


def _take_apart(nodes: Sequence[merklelib.merkle.MerkleNode]) -> None:
    """Remove each node's link to its parent: parents link to children, so a tree is a cycle."""
    for node in nodes:
        while node is not None:
            parent, node.parent = node.parent, None
            node = parent


def padding(count: int) -> list[bytes]:
    """Random leaf inputs that fill `count` leaves up to a power of two of at least two.

    The size of a tree then shows a tenant only the next power of two, and a single tenant's tree
    looks like any other.
    """
    missing = (1 << max(1, (count - 1).bit_length())) - count
    return [secrets.token_bytes(HASH_BYTES) for _ in range(missing)]
