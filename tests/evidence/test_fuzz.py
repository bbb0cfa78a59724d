"""Whatever bytes come in: a typed refusal, or the very verdict that the unchanged bytes have."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
from evidence_factory import (
    MASK,
    VM,
    FixedTpm,
    SealedBatch,
    challenge_of,
    envelope,
    pcr_blob,
    qualifying,
    quote_text,
    rsa_key,
    seal,
    seal_with_claims,
    tree_path,
    tree_root,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vectors import ak_cases

from provider_proxy.errors import ParameterError, UsageError, VerificationError
from provider_proxy.evidence.attestation import parse_attest, parse_signature
from provider_proxy.evidence.inclusion import leaf_hash, leaf_input, root_from_proof
from provider_proxy.evidence.model import (
    HashAlg,
    InclusionProof,
    LeafHash,
    Nonce,
    PcrMask,
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
)
from provider_proxy.evidence.policy import PcrPolicy, UnsafeAcceptAny, parse_tpm_policy
from provider_proxy.evidence.query import encode_quote_query, parse_quote_query
from provider_proxy.evidence.request_file import RequestRecord, encode_request, parse_request
from provider_proxy.evidence.strict_json import parse_json_object
from provider_proxy.evidence.tpm_keys import insecure_ak_from_pem, parse_ak, parse_public
from provider_proxy.evidence.verify import Verifier
from provider_proxy.evidence.wire import (
    encode_pcr_blob,
    encode_quote,
    parse_evidence,
    parse_pcr_blob,
    parse_quote,
)

settings.register_profile(
    "fuzz", max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
fuzz = settings.get_profile("fuzz")

VERIFIER = Verifier(UnsafeAcceptAny())
ECC, RSA, CLAIMED = seal(FixedTpm(), 8), seal(FixedTpm(rsa_key()), 8), seal_with_claims()
BATCHES = [
    pytest.param(ECC, id="ecdsa"),
    pytest.param(RSA, id="rsassa"),
    pytest.param(CLAIMED, id="claims"),
]
NUMBER = 1

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=1 << 60)
    | st.floats(allow_nan=False)
    | st.text()
    | st.text(alphabet="0123456789abcdefx", max_size=70),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)
edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "insert", "delete", "double", "swap"]),
        st.integers(min_value=0),
        st.integers(min_value=0, max_value=255),
        st.integers(min_value=1, max_value=40),
    ),
    min_size=1,
    max_size=4,
)
Edits = list[tuple[str, int, int, int]]


def edit(data: bytes, changes: Edits) -> bytes:
    """Some byte-level changes, one after the other."""
    out = bytearray(data)
    for how, where, byte, length in changes:
        at = where % (len(out) + 1)
        if how == "insert":
            out[at:at] = bytes([byte]) * (length % 4 + 1)
        elif at == len(out):
            continue
        elif how == "set":
            out[at] = byte
        elif how == "flip":
            out[at] ^= 1 << byte % 8
        elif how == "delete":
            del out[at : at + length]
        elif how == "double":
            out[at:at] = out[at : at + length]
        else:
            out[at : at + 2] = out[at : at + 2][::-1]
    return bytes(out)


def verdict(batch: SealedBatch, body: bytes) -> VerifiedQuote | None:
    """The verified quote, or None where it was refused; any other exception comes through."""
    challenge, history = challenge_of(batch.requests[NUMBER])
    host = TrustedHost(ak=batch.tpm.ak)
    try:
        quote = VERIFIER.verify(body, challenge, host, history, now_s=1.0)
    except VerificationError:
        # What was refused is neither remembered nor held against the next answer.
        assert history.is_open(batch.requests[NUMBER].nonce)
        assert history.newest() is None
        return None
    return quote


def refuses_or_reads(parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except VerificationError:
        return


PARSERS: list[Callable[[bytes], object]] = [
    parse_evidence,
    parse_public,
    parse_ak,
    parse_attest,
    parse_signature,
    parse_pcr_blob,
    lambda data: parse_json_object(data, "x"),
]


@fuzz
@given(st.binary(max_size=3000))
def test_any_bytes(data: bytes) -> None:
    for parse in PARSERS:
        refuses_or_reads(parse, data)
    assert verdict(ECC, data) is None


@fuzz
@given(json_values)
def test_any_json(value: Any) -> None:
    body = envelope(value)
    refuses_or_reads(parse_evidence, body)
    assert verdict(ECC, body) is None


KEYS = [
    *ECC.results(NUMBER),
    *("merkle.leaf_index", "merkle.tree_size", "merkle.path", "merkle.salt", "merkle.x"),
    *("timing.queued_ms", "claims", "boottime", "x"),
    *("ima_measurement_list", "ima_measurement_list_entry", "mb_measurement_list"),
]


@pytest.mark.parametrize("batch", BATCHES)
def test_any_json_in_any_field(batch: SealedBatch) -> None:
    good = verdict(batch, batch.body(NUMBER))
    assert good is not None

    @fuzz
    @given(st.lists(st.tuples(st.sampled_from(KEYS), json_values), min_size=1, max_size=3))
    def run(changes: list[tuple[str, Any]]) -> None:
        results = copy.deepcopy(batch.results(NUMBER))
        for key, value in changes:
            outer, _, last = key.rpartition(".")
            target = results[outer] if outer else results
            if isinstance(target, dict):
                target[last] = value
        assert verdict(batch, envelope(results)) in (None, good)

    run()


@pytest.mark.parametrize("batch", BATCHES)
def test_any_edit_of_a_body(batch: SealedBatch) -> None:
    body = batch.body(NUMBER)
    good = verdict(batch, body)

    @fuzz
    @given(edits)
    def run(changes: Edits) -> None:
        assert verdict(batch, edit(body, changes)) in (None, good)

    run()


@pytest.mark.parametrize("batch", BATCHES)
def test_every_bit_of_a_body(batch: SealedBatch) -> None:
    body = batch.body(NUMBER)
    good = verdict(batch, body)
    for at in range(len(body)):
        for bit in range(8):
            changed = bytearray(body)
            changed[at] ^= 1 << bit
            assert verdict(batch, bytes(changed)) in (None, good), (at, bit)


@pytest.mark.parametrize("batch", BATCHES)
def test_every_byte_of_a_body_removed_or_doubled(batch: SealedBatch) -> None:
    body = batch.body(NUMBER)
    good = verdict(batch, body)
    for at in range(len(body)):
        for changed in (body[:at] + body[at + 1 :], body[: at + 1] + body[at:]):
            assert verdict(batch, changed) in (None, good), at


@pytest.mark.parametrize("batch", BATCHES)
def test_any_edit_of_the_quotes_parts(batch: SealedBatch) -> None:
    # Below base64, where an edit of the body seldom gets.
    quote = batch.quote
    parts = [quote.attest, quote.signature, pcr_blob(quote.pcrs)]
    good = verdict(batch, batch.body(NUMBER))

    @fuzz
    @given(st.integers(min_value=0, max_value=2), edits)
    def run(which: int, changes: Edits) -> None:
        changed = [edit(part, changes) if n == which else part for n, part in enumerate(parts)]
        results = batch.results(NUMBER, quote=quote_text(changed[0], changed[1], changed[2]))
        assert verdict(batch, envelope(results)) in (None, good)
        if which == 0:
            assert verdict(batch, envelope(results)) is None or changed[0] == parts[0]

    run()


@fuzz
@given(edits, st.booleans())
def test_any_edit_of_an_attest_that_the_ak_signed(changes: Edits, relabel: bool) -> None:
    # The AK signs whatever: what comes through shows this request's own values and no others.
    attest = edit(ECC.quote.attest, changes)
    parts = (attest, ECC.tpm.sign(attest), pcr_blob(ECC.quote.pcrs))
    results = ECC.results(NUMBER, quote=quote_text(*parts))
    if relabel:
        results["mask"] = "0xff"
    good, quote = verdict(ECC, ECC.body(NUMBER)), verdict(ECC, envelope(results))
    assert good is not None
    if quote is not None:
        assert (quote.bank, quote.pcrs, quote.ak_name) == (good.bank, good.pcrs, good.ak_name)
        assert parse_attest(attest).extra_data == ECC.qualifying


@fuzz
@given(
    st.integers(min_value=0, max_value=7),
    st.lists(st.binary(min_size=32, max_size=32), max_size=5),
    st.sampled_from([2, 4, 8, 16, 32]),
    st.binary(min_size=16, max_size=16),
)
def test_any_proof_of_another_batch(index: int, path: list[bytes], size: int, salt: bytes) -> None:
    results = ECC.results(NUMBER)
    results["merkle"] = {
        "leaf_index": index,
        "tree_size": size,
        "path": [node.hex() for node in path],
        "salt": salt.hex(),
    }
    assert verdict(ECC, envelope(results)) is None


@fuzz
@given(st.binary(max_size=1100) | edits.map(lambda changes: edit(ak_cases.ecc_public(), changes)))
@example(ak_cases.ecc_public())
def test_any_public_and_what_it_is_named(data: bytes) -> None:
    refuses_or_reads(parse_public, data)
    try:
        ak = parse_ak(data)
    except VerificationError:
        return
    # Another structure is another key by name, even where the key inside is the same.
    assert ak.name == HashAlg(int.from_bytes(ak.name[:2], "big")).to_bytes(2, "big") + HashAlg(
        int.from_bytes(ak.name[:2], "big")
    ).digest(data[2:])
    assert (ak.name == FixedTpm().ak.name) == (data == FixedTpm().ak_public)


def test_every_bit_of_a_public() -> None:
    for public in (ak_cases.ecc_public(), ak_cases.rsa_public()):
        name = parse_ak(public).name
        for at in range(len(public)):
            for bit in range(8):
                changed = bytearray(public)
                changed[at] ^= 1 << bit
                try:
                    other = parse_ak(bytes(changed))
                except VerificationError:
                    continue
                assert other.name != name


@fuzz
@given(
    st.binary(max_size=2000) | edits.map(lambda changes: edit(pcr_blob(ECC.quote.pcrs), changes))
)
@example(pcr_blob(ECC.quote.pcrs))
def test_a_pcr_blob_has_one_writing(data: bytes) -> None:
    try:
        pcrs = parse_pcr_blob(data)
    except VerificationError:
        return
    assert encode_pcr_blob(pcrs) == data


quote_edits = edits.map(
    lambda changes: edit(encode_quote(ECC.quote).encode(), changes).decode("latin-1")
)


@fuzz
@given(st.text(max_size=200) | quote_edits)
@example(encode_quote(ECC.quote))
def test_a_quote_string_has_one_writing(text: str) -> None:
    try:
        quote = parse_quote(text)
    except VerificationError:
        return
    assert encode_quote(quote) == text


@fuzz
@given(st.binary(max_size=200) | edits.map(lambda changes: edit(ECC.quote.signature, changes)))
def test_any_signature_is_none_of_another_text(data: bytes) -> None:
    other = ECC.quote.attest[:-1] + b"\0"
    results = ECC.results(NUMBER, quote=quote_text(other, data, pcr_blob(ECC.quote.pcrs)))
    assert verdict(ECC, envelope(results)) is None


# -- the tenants' own inputs: other errors, as strictly --

query_text = st.text(
    alphabet=st.characters(exclude_categories=()) | st.sampled_from("&=%+0123456789abcdefx~-._"),
    max_size=120,
)
names = st.sampled_from(
    ["nonce", "mask", "bank", "vm", "ima_ml_entry", "timeout_ms", "logs", "x", ""]
)
some_values = query_text | st.sampled_from(["n" * 16, "0x1", "sha256", str(VM), "0", "1"])


@fuzz
@given(query_text | st.lists(st.tuples(names, some_values).map("=".join), max_size=8).map("&".join))
@example("nonce=nnnnnnnnnnnnnnnn&mask=0x1")
@example("nonce=%00%ff%C3%28&mask=\ud800")
def test_any_query(query: str) -> None:
    told = ""
    try:
        request = parse_quote_query(query)
    except ParameterError as exc:
        told = f"{exc.status} {exc}"
    if told:
        assert told.startswith("400 ")
        assert told.isprintable()  # it goes into a log and into an answer
        return
    assert parse_quote_query(encode_quote_query(request)) == request


requests = st.builds(
    QuoteRequest,
    nonce=st.text(alphabet="ABCXYZabcxyz0189._~-", min_size=16, max_size=64).map(
        lambda text: Nonce(text.encode())
    ),
    mask=st.integers(min_value=1, max_value=0xFFFFFF).map(PcrMask),
    bank=st.sampled_from(HashAlg),
    vm=st.none() | st.uuids(),
    ima_ml_entry=st.integers(min_value=0, max_value=1 << 31),
    timeout_ms=st.none() | st.integers(min_value=1, max_value=600_000),
    logs=st.booleans(),
)


@fuzz
@given(requests)
def test_any_request_comes_back_from_its_query(request: QuoteRequest) -> None:
    assert parse_quote_query(encode_quote_query(request)) == request


RECORD = RequestRecord(
    request=QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(MASK), vm=VM),
    made_at_s=1.5,
    url="https://host",
    answered_after_s=0.5,
    evidence_sha256=bytes(32),
)


@fuzz
@given(
    st.binary(max_size=400)
    | json_values.map(envelope)
    | edits.map(lambda changes: edit(encode_request(RECORD), changes))
)
@example(encode_request(RECORD))
def test_any_request_file(data: bytes) -> None:
    try:
        record = parse_request(data)
    except UsageError:
        return
    assert parse_request(encode_request(record)) == record


policy_keys = st.sampled_from(["0", "7", "mask", "24", "-1"]) | st.text(max_size=5)


@fuzz
@given(st.dictionaries(policy_keys, json_values))
@example({"0": "00" * 32})
def test_any_tpm_policy(values: dict[str, Any]) -> None:
    try:
        policy = parse_tpm_policy(values)
    except UsageError:
        return
    assert isinstance(policy, PcrPolicy)
    assert policy.needed_mask


pems = st.binary(max_size=300).map(lambda data: b"-----BEGIN PUBLIC KEY-----\n" + data)


@fuzz
@given(pems | st.binary(max_size=300))
def test_any_pem(data: bytes) -> None:
    refuses_or_reads(insecure_ak_from_pem, data)


# -- the leaf --

leaves = st.tuples(
    st.binary(min_size=16, max_size=16),
    st.binary(max_size=64),  # any bytes, not only a nonce's: the encoding itself must hold
    st.integers(min_value=0, max_value=(1 << 32) - 1),
    st.sampled_from(HashAlg),
    st.binary(max_size=80),
)
Leaf = tuple[bytes, bytes, int, HashAlg, bytes]


def input_of(leaf: Leaf) -> bytes:
    salt, nonce, mask, bank, claims = leaf
    return leaf_input(salt=salt, nonce=Nonce(nonce), mask=PcrMask(mask), bank=bank, claims=claims)


@fuzz
@given(leaves)
def test_a_leaf_can_be_read_back(leaf: Leaf) -> None:
    # What can be read back in one way only cannot have been written from two.
    data = input_of(leaf)
    label, rest = data[:22], data[22:]
    salt, length, rest = rest[:16], rest[16], rest[17:]
    nonce, rest = rest[:length], rest[length:]
    mask, bank, claims_hash = struct.unpack(">IH32s", rest)
    assert label == b"provider-proxy/leaf/1\x00"
    assert (salt, nonce, mask, bank) == leaf[:4]
    assert claims_hash == sha256(leaf[4]).digest()


@fuzz
@given(leaves, leaves, st.integers(min_value=0, max_value=31))
def test_two_requests_never_have_one_leaf(first: Leaf, other: Leaf, mixed: int) -> None:
    # `mixed` takes some parts of the first into the second: they differ in as little as one part.
    second = tuple(
        a if mixed >> n & 1 else b for n, (a, b) in enumerate(zip(first, other, strict=True))
    )
    same_input = input_of(first) == input_of(second)  # type: ignore[arg-type]
    assert same_input == (first == second)


@fuzz
@given(leaves, st.integers(min_value=1, max_value=40))
def test_a_byte_moved_between_neighbours_is_another_leaf(leaf: Leaf, count: int) -> None:
    salt, nonce, mask, bank, claims = leaf
    moved = nonce[: max(0, len(nonce) - count)]
    if moved != nonce:
        assert input_of((salt, moved, mask, bank, nonce[len(moved) :] + claims)) != input_of(leaf)


@fuzz
@given(leaves)
def test_a_leaf_is_no_node(leaf: Leaf) -> None:
    data = input_of(leaf)
    assert len(data) > 64  # a node hashes 64 bytes
    assert leaf_hash(data) != sha256(b"\x01" + data).digest()


@fuzz
@given(st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=40, unique=True), st.data())
def test_a_root_has_one_leaf_at_an_index(inputs: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(min_value=0, max_value=len(inputs) - 1))
    path = tree_path(index, inputs)
    proof = InclusionProof(leaf_index=index, tree_size=len(inputs), path=path, salt=bytes(16))
    root = tree_root(inputs)
    assert root_from_proof(leaf_hash(inputs[index]), proof) == root
    other = data.draw(st.binary(min_size=32, max_size=32))
    if other != leaf_hash(inputs[index]):
        assert root_from_proof(LeafHash(other), proof) != root
    assert qualifying(root, len(inputs)) != qualifying(root, len(inputs) + 1)
