"""The vectors of tests/vectors against the package, and the generator against its files."""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any

import pytest
from evidence_factory import VM, challenge_of, judge, seal_with_claims
from places import VECTORS
from vectors import generate

from provider_proxy import errors
from provider_proxy.evidence.attestation import (
    check_pcrs,
    check_signature,
    parse_attest,
    parse_signature,
)
from provider_proxy.evidence.deep_quote import DeepVerified, deep_verify
from provider_proxy.evidence.inclusion import root_from_proof
from provider_proxy.evidence.model import (
    HASH_BYTES,
    ClockState,
    HashAlg,
    InclusionProof,
    LeafHash,
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
    parse_bank,
    parse_mask,
    parse_nonce,
)
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.vtpm_link import VtpmLink
from provider_proxy.evidence.wire import encode_pcr_blob, parse_pcr_blob, parse_quote

MAX_FILE_BYTES = 300_000
NO_VECTOR = {
    "NonceSpentError",  # about two calls, and a vector is one
    "PinChangedError",  # about a store of pins
    "PolicyError",  # about a policy, and a vector has none
    "KeylimeRefusedError",  # about somebody else's verifier
    "UntrustedCaError",  # certificates: test_vtpm_ca.py
    "EkCertificateError",
    "NotRegisteredError",  # about a registrar's record, and a vector has none
    "BindingError",
    "UntrustedEkError",
}


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((VECTORS / name).read_bytes())
    return document


OTHER_FORMS = ("ak.json", "link.json", "deep.json")
EVIDENCE_FILES = [name for name in generate.FILES if name not in OTHER_FORMS]
ALL_FILES = [*generate.FILES, "rfc9162_inclusion.json", "tpm2_tools.json"]


def entries_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = document.get("testGroups", [document])
    return [test | {"ak": group.get("ak")} for group in groups for test in group["tests"]]


def params(*names: str) -> list[Any]:
    return [
        pytest.param(test, id=f"{name.removesuffix('.json')}-{test['tcId']}")
        for name in names
        for test in entries_of(load(name))
    ]


def request_of(test: dict[str, Any]) -> QuoteRequest:
    request = test["request"]
    return QuoteRequest(
        nonce=parse_nonce(request["nonce"]),
        mask=parse_mask(request["mask"]),
        bank=parse_bank(request["bank"]),
        vm=uuid.UUID(request["vm"]) if request["vm"] else None,
    )


def baseline_of(test: dict[str, Any]) -> ClockState | None:
    if "baseline" not in test:
        return None
    state = test["baseline"]
    return ClockState(
        reset_count=state["resetCount"],
        restart_count=state["restartCount"],
        clock_ms=state["clockMs"],
    )


@pytest.mark.parametrize("test", params(*EVIDENCE_FILES))
def test_evidence(test: dict[str, Any]) -> None:
    body = (
        test["evidence"].encode()
        if "evidence" in test
        else base64.b64decode(test["evidenceBase64"])
    )
    ak = base64.b64decode(test["ak"])
    request, baseline, age_s = request_of(test), baseline_of(test), test["ageS"]
    if test["result"] == "valid":
        quote = judge(body, request, ak, baseline=baseline, age_s=age_s)
        assert {str(pcr): value.hex() for pcr, value in quote.pcrs.items()} == test["pcrs"]
        assert quote.bank == request.bank
        return
    with pytest.raises(errors.VerificationError) as caught:
        judge(body, request, ak, baseline=baseline, age_s=age_s)
    assert type(caught.value).__name__ == test["error"], f"{test['comment']}: {caught.value}"


@pytest.mark.parametrize("test", params("ak.json"))
def test_ak(test: dict[str, Any]) -> None:
    public = base64.b64decode(test["public"])
    if test["result"] == "valid":
        assert parse_ak(public).name.hex() == test["name"]
        return
    with pytest.raises(errors.VerificationError) as caught:
        parse_ak(public)
    assert type(caught.value).__name__ == test["error"], f"{test['comment']}: {caught.value}"


@pytest.mark.parametrize("test", params("link.json"))
def test_link(test: dict[str, Any]) -> None:
    batch = seal_with_claims(claims=test["claims"].encode())
    wanted = test["wanted"]
    link = VtpmLink(
        vm=uuid.UUID(wanted["vm"]),
        ek=bytes.fromhex(wanted["ek"]),
        least=wanted["least"],
        issuer=wanted["issuer"],
    )
    request, ak = batch.requests[1], batch.tpm.ak_public
    if test["result"] == "valid":
        judge(batch.body(1), request, ak, policy=link)
        return
    with pytest.raises(errors.VerificationError) as caught:
        judge(batch.body(1), request, ak, policy=link)
    assert type(caught.value).__name__ == test["error"], f"{test['comment']}: {caught.value}"


class AcceptsPcrs:
    """A policy that reads PCRs 0 and 7 and accepts any value."""

    needed_mask = 0x81

    def check(self, quote: VerifiedQuote) -> None:
        assert {0, 7} <= set(quote.pcrs)


@pytest.mark.parametrize("test", params("deep.json"))
def test_deep(test: dict[str, Any]) -> None:
    document = load("deep.json")
    request = QuoteRequest(nonce=parse_nonce(test["hostNonce"]), mask=parse_mask("0x83"), vm=VM)
    challenge, history = challenge_of(request)

    def run() -> DeepVerified:
        return deep_verify(
            test["evidence"].encode(),
            challenge,
            TrustedHost(ak=parse_ak(base64.b64decode(document["hostAk"]))),
            history,
            nonce=test["nonce"].encode(),
            vtpm_quote=parse_quote(test["vtpmQuote"]),
            vak=parse_ak(base64.b64decode(test["vak"])),
            vtpm_policy=AcceptsPcrs(),
            host_policy=UnsafeAcceptAny(),
            link=VtpmLink(vm=VM, ek=bytes.fromhex(document["ek"])),
            now_s=0.5,
        )

    if test["result"] == "valid":
        assert run().host.claims is not None
        return
    with pytest.raises(errors.VerificationError) as caught:
        run()
    assert type(caught.value).__name__ == test["error"], f"{test['comment']}: {caught.value}"
    if "cause" in test:
        assert type(caught.value.__cause__).__name__ == test["cause"]
    assert history.is_open(request.nonce)


@pytest.mark.parametrize("test", params("rfc9162_inclusion.json"))
def test_rfc9162_inclusion(test: dict[str, Any]) -> None:
    leaf, root = base64.b64decode(test["leafHash"]), base64.b64decode(test["root"])
    try:
        # Our leaves are hashes by type; a value of another length is not a leaf and never gets that far.
        found = len(leaf) == HASH_BYTES and root == root_from_proof(
            LeafHash(leaf),
            InclusionProof(
                leaf_index=test["leafIdx"],
                tree_size=test["treeSize"],
                path=tuple(base64.b64decode(node) for node in test["proof"] or ()),
                salt=bytes(16),
            ),
        )
    except errors.VerificationError:
        found = False
    assert found == (test["result"] == "valid"), test["comment"]


@pytest.mark.parametrize("test", params("tpm2_tools.json"))
def test_quote_of_tpm2_tools(test: dict[str, Any]) -> None:
    document = load("tpm2_tools.json")
    ak = parse_ak(base64.b64decode(document["keys"][test["key"]]["public"]))
    attest, signature = base64.b64decode(test["attest"]), base64.b64decode(test["signature"])
    # The AK signed all of them, the refused ones too: it is what they say that is wrong.
    check_signature(attest, parse_signature(signature), ak)
    if test["result"] == "invalid":
        with pytest.raises(errors.VerificationError) as caught:
            parse_attest(attest)
        assert type(caught.value).__name__ == test["error"]
        return
    parsed, blob = parse_attest(attest), base64.b64decode(test["pcrBlob"])
    pcrs = parse_pcr_blob(blob)
    check_pcrs(parsed, pcrs, ak.signature_hash)
    assert encode_pcr_blob(pcrs) == blob
    assert parsed.extra_data == document["extraData"].encode()
    assert parsed.bank == HashAlg.from_label(test["bank"])
    assert {str(pcr): value.hex() for pcr, value in pcrs.values} == test["pcrs"]
    assert parsed.clock.reset_count == 1
    assert parsed.clock_safe


@pytest.mark.parametrize("name", ["ecc", "rsa", "p384", "ek-ecc", "ek-rsa"])
def test_key_of_tpm2_tools(name: str) -> None:
    key = load("tpm2_tools.json")["keys"][name]
    public = base64.b64decode(key["public"])
    if key["result"] == "valid":
        assert parse_ak(public).name.hex() == key["name"]
        return
    with pytest.raises(errors.UntrustedAkError):
        parse_ak(public)


@pytest.mark.parametrize("name", generate.FILES)
def test_generator_writes_the_very_file(name: str) -> None:
    assert generate.render(name) == (VECTORS / name).read_bytes()


@pytest.mark.parametrize("name", ALL_FILES)
def test_file_is_complete(name: str) -> None:
    document = load(name)
    tests = entries_of(document)
    assert (VECTORS / name).stat().st_size < MAX_FILE_BYTES
    assert document["numberOfTests"] == len(tests)
    assert [test["tcId"] for test in tests] == list(range(1, len(tests) + 1))
    assert {flag for test in tests for flag in test["flags"]} == set(document["notes"])
    assert all(
        (test["result"] == "invalid") == ("error" in test) or "leafIdx" in test for test in tests
    )


def test_every_file_is_known() -> None:
    assert {path.name for path in VECTORS.glob("*.json")} == set(ALL_FILES)


def test_no_two_vectors_of_a_file_are_the_same() -> None:
    for name in EVIDENCE_FILES:
        seen: dict[str, str] = {}
        for test in entries_of(load(name)):
            keys = ("ak", "request", "ageS", "baseline", "evidence", "evidenceBase64")
            content = json.dumps([test.get(key) for key in keys])
            twin = seen.setdefault(content, test["comment"])
            assert twin == test["comment"], f"{name}: {twin!r} and {test['comment']!r}"


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {s for direct in kind.__subclasses__() for s in (direct, *subclasses(direct))}


def test_every_failure_class_has_a_vector() -> None:
    kinds = {*errors.VerificationError.__subclasses__(), *subclasses(errors.LinkError)}
    classes = {cls.__name__ for cls in kinds}
    named = {
        test["error"] for name in ALL_FILES for test in entries_of(load(name)) if "error" in test
    }
    assert named == classes - NO_VECTOR
