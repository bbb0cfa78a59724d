"""From a tenant's own nonce to the 32 characters that the TPM signs: evidence format 1.

Pure functions over bytes. The proxy computes them when it seals a batch, the tenant when it verifies,
the daemon's self-check with the very same code. docs/evidence-format.md has the formulas.

Invariants: `leaf_input` is injective (every part has a fixed place or a length before it), so that no
chosen nonce can pass for another leaf; `root_from_proof` accepts exactly one path length for an index
and a size (RFC 9162, section 2.1.3.2), and never an interior node as a leaf.
"""

from __future__ import annotations

import base64
import functools
from hashlib import sha256

from provider_proxy.errors import InclusionError
from provider_proxy.evidence.model import (
    MAX_NONCE_CHARS,
    SALT_BYTES,
    HashAlg,
    InclusionProof,
    LeafHash,
    Nonce,
    PcrMask,
    RootHash,
)

LEAF_LABEL = b"provider-proxy/leaf/1\x00"
ROOT_LABEL = b"provider-proxy/root/1\x00"
LEAF_PREFIX = b"\x00"  # RFC 9162 section 2.1.1: domain separation of leaves and nodes
NODE_PREFIX = b"\x01"
BOUND_BYTES = 20  # 160 bits: 32 base32 characters, within the 34 bytes of a SHA-256-only TPM


def leaf_input(
    *, salt: bytes, nonce: Nonce, mask: PcrMask, bank: HashAlg, claims: bytes = b""
) -> bytes:
    """What a leaf's hash is taken over.

    Args:
        salt: 16 random bytes of the proxy's, fresh for each leaf.
        claims: the exact bytes of the reply's claims; empty where it has none.

    Returns:
        label || salt || u8(len nonce) || nonce || u32(mask) || u16(bank) || SHA-256(claims).
    """
    if len(salt) != SALT_BYTES or len(nonce) > MAX_NONCE_CHARS:
        raise ValueError("the salt or the nonce has a wrong length")  # callers hold checked values
    return b"".join(
        (
            LEAF_LABEL,
            salt,
            len(nonce).to_bytes(1, "big"),
            nonce,
            mask.to_bytes(4, "big"),
            bank.to_bytes(2, "big"),
            sha256(claims).digest(),
        )
    )


def leaf_hash(data: bytes) -> LeafHash:
    """RFC 9162's hash of a leaf."""
    return LeafHash(sha256(LEAF_PREFIX + data).digest())


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 9162's hash of an inner node."""
    return sha256(NODE_PREFIX + left + right).digest()


def root_from_proof(leaf: LeafHash, proof: InclusionProof) -> RootHash:
    """The root that this leaf leads to, with its index, the tree's size and the path.

    Does not check: that a TPM has signed the root; compare the qualifying data for that.

    Raises:
        InclusionError: the path is longer or shorter than index and size demand.
    """
    index, last = proof.leaf_index, proof.tree_size - 1
    node: bytes = leaf
    for sibling in proof.path:
        if last == 0:
            raise InclusionError("the path is longer than the tree is high")
        if index & 1 or index == last:
            node = sha256(NODE_PREFIX + sibling + node).digest()
            while not index & 1 and index:
                index >>= 1
                last >>= 1
        else:
            node = sha256(NODE_PREFIX + node + sibling).digest()
        index >>= 1
        last >>= 1
    if last != 0:
        raise InclusionError("the path is shorter than the tree is high")
    return RootHash(node)


@functools.lru_cache(maxsize=64)  # the self-check asks for one root as often as a batch has leaves
def qualifying_data(root: RootHash, tree_size: int) -> bytes:
    """What TPM2_Quote gets as qualifyingData: 32 ASCII characters, a valid Keylime nonce.

    The tree's size is bound in, so that one root cannot be presented with two sizes.
    """
    bound = sha256(ROOT_LABEL + tree_size.to_bytes(8, "big") + root).digest()
    return base64.b32encode(bound[:BOUND_BYTES]).lower()
