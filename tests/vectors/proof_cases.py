"""Vectors: the inclusion proof and the claims."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from evidence_factory import OTHER_VM, VM, claims_about, seal_with_claims

from vectors.cases import MISSING, Base, Case, flip_hex
from vectors.reply_cases import base_case

FORMAT = "EvidenceFormatError"
CLAIMS = "ClaimsError"
INCLUSION = "InclusionError"
QUALIFYING = "QualifyingDataError"


def cases() -> Iterator[Case]:
    base = base_case()
    yield base.case("unchanged: what the next are made from", "Batch")
    yield from _inclusion(base)
    yield from _claims()


def _inclusion(base: Base) -> Iterator[Case]:
    merkle: dict[str, Any] = base.results["merkle"]
    index, path = merkle["leaf_index"], merkle["path"]

    def case(comment: str, error: str, **changes: object) -> Case:
        return base.case(comment, "Inclusion", error, body=base.edited("merkle", merkle | changes))

    for wrong in range(8):
        if wrong != index:
            yield case(f"leaf_index {wrong} instead of {index}", QUALIFYING, leaf_index=wrong)
    for level in range(3):
        flipped = [flip_hex(node) if at == level else node for at, node in enumerate(path)]
        yield case(f"path flipped at level {level}", QUALIFYING, path=flipped)
    yield case("path from the root downwards", QUALIFYING, path=path[::-1])
    yield case("path of equal length, all zero", QUALIFYING, path=["00" * 32] * 3)
    yield case("salt flipped", QUALIFYING, salt=flip_hex(merkle["salt"]))
    yield case("path empty", INCLUSION, path=[])
    yield case("path without its lowest node: a parent offered as leaf", INCLUSION, path=path[1:])
    yield case("path without its highest node", INCLUSION, path=path[:-1])
    yield case("path with the root on top", INCLUSION, path=[*path, base.batch.root.hex()])
    yield case("path with a zero below", INCLUSION, path=["00" * 32, *path])
    yield case("path of 20", INCLUSION, path=(path * 7)[:20])
    yield case("tree_size doubled", INCLUSION, tree_size=16)
    yield case("tree_size 2^20", INCLUSION, tree_size=1 << 20)
    yield case("tree_size halved", INCLUSION, tree_size=4, leaf_index=index % 4)
    yield case(
        "half the size, half the index, the path from level 1: a parent's place offered",
        QUALIFYING,
        tree_size=4,
        leaf_index=index >> 1,
        path=path[1:],
    )
    yield case("twice the size, the path longer", QUALIFYING, tree_size=16, path=[*path, path[0]])
    for size in (1, 3, 5, 6, 7, 9, 12, 1000):
        yield case(f"tree_size {size}", FORMAT, tree_size=size, leaf_index=min(index, size - 1))
    yield case("a single leaf of a tree of one", FORMAT, tree_size=1, leaf_index=0, path=[])
    yield case("path of 21", FORMAT, path=path * 7)
    for comment, node in (
        ("31 bytes", "00" * 31),
        ("33 bytes", "00" * 33),
        ("no hex", "0x" + "00" * 31),
        ("white space in it", "00 " * 21 + "0"),
        ("a newline in it", path[0][:32] + "\n" + path[0][33:]),
        ("digits of another script", "\uff10" * 64),
    ):
        yield case(f"path entry: {comment}", FORMAT, path=[node, *path[1:]])
    yield case("path entry: a number", FORMAT, path=[0, *path[1:]])


def _claims() -> Iterator[Case]:
    base = Base(seal_with_claims(), 1)
    plain = Base(seal_with_claims(), 0)
    yield base.case("claims as asked: what the next are made from", "Claims")
    yield base.case("claims left out", "Claims", CLAIMS, body=base.edited("claims", MISSING))
    yield base.case(
        "claims of the right VM, changed", "Claims", QUALIFYING,
        body=base.edited("claims", _b64(claims_about().replace(b"11111111", b"22222222"))),
    )  # fmt: skip
    yield base.case(
        "claims written anew, same values", "Claims", QUALIFYING,
        body=base.edited("claims", _b64(claims_about().replace(b",", b", "))),
    )  # fmt: skip
    for comment, value in (
        ("null", None), ("an object", {}), ("not base64", "e30"), ("spare bits set", "e31="),
        ("over 16 kB", _b64(b" " * 20000)),
    ):  # fmt: skip
        yield base.case(
            f"claims {comment}", "Claims Field", FORMAT, body=base.edited("claims", value)
        )
    good = claims_about()
    for comment, claims in (
        ("about another VM", claims_about(OTHER_VM)),
        ("empty", b""),
        ("not JSON", b"vm"),
        ("a list", b"[" + good + b"]"),
        ("without vm", b"{}"),
        ("vm null", b'{"vm":null}'),
        ("vm in capitals", good.replace(str(VM).encode(), str(VM).upper().encode())),
        ("vm twice, alike", good[:-1] + b',"vm":"%s"}' % str(VM).encode()),
        ("vm twice, another first", b'{"vm":"%s",' % str(OTHER_VM).encode() + good[1:]),
        ("a key twice further in", good[:-1] + b',"x":{"a":1,"a":2}}'),
        ("NaN in them", good[:-1] + b',"x":NaN}'),
        ("not UTF-8", good[:-1] + b',"x":"\xff"}'),
        ("text after them", good + b"{}"),
        ("3000 lists deep in vm", b'{"vm":' + b"[" * 3000 + b"]" * 3000 + b"}"),
    ):
        # The proxy put exactly these into the leaf, so that nothing but their meaning is wrong.
        yield Base(seal_with_claims(claims=claims), 1).case(
            f"claims, bound into the leaf, {comment}", "Claims", CLAIMS
        )
    yield plain.case(
        "claims that nobody asked for", "Claims", CLAIMS,
        body=plain.edited("claims", _b64(claims_about())),
    )  # fmt: skip
    yield plain.case(
        "empty claims that nobody asked for", "Claims", CLAIMS, body=plain.edited("claims", "")
    )
    unasked = Base(seal_with_claims(), 1)
    bare = unasked.batch.requests[0]
    yield unasked.case(
        "another tenant's answer with its claims", "Claims Request", CLAIMS, request=bare
    )


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
