"""The tenant's check of a vTPM's link: the library as a tenant calls it, the command on saved
evidence. What claims and deep quotes must look like stands in the vectors; Keylime's way, in
test_ek_check.py."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import time
import uuid
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from evidence_factory import VM, FixedTpm, SealedBatch, ec_key, request_number
from helpers import make_answer
from hypothesis import given
from hypothesis import strategies as st
from link_claims import CLAIMS, EK, OTHER_EK, claims_bytes
from places import DOCS

import provider_proxy
from provider_proxy import VtpmLink, ask_host, deep_verify, ek_digest, new_deep_question
from provider_proxy.cli import main as cli
from provider_proxy.errors import (
    EkNotLinkedError,
    LinkClaimsError,
    LinkError,
    NonceSpentError,
    StaleEvidenceError,
    UsageError,
)
from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, QuoteRequest, TrustedHost
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.request_file import RequestRecord, encode_request
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import MemoryHistory
from provider_proxy.evidence.vtpm_link import parse_claims
from provider_proxy.evidence.wire import encode_quote
from provider_proxy.testing.soft_tpm import SoftTpm

GOOD, REFUSED, USAGE, ENVIRONMENT = 0, 1, 2, 3
LINK = VtpmLink(vm=VM, ek=ek_digest(EK))


def eks_of(number: int, *, alg: str = "p256") -> dict[str, object]:
    return {"alg": alg, "spki_sha256": f"{number:064x}"}


# --- the library ------------------------------------------------------------------------------------


def test_without_claims_nothing_is_linked() -> None:
    with pytest.raises(LinkClaimsError):
        parse_claims(None)


@pytest.mark.parametrize(
    "text", [str(VM).upper(), VM.hex, f"{{{VM}}}"[:36], str(VM)[:-1] + " ", "x" * 36, str(VM) + "0"]
)
def test_a_vm_has_one_writing(text: str) -> None:
    assert parse_claims(CLAIMS).vm == VM
    with pytest.raises(LinkClaimsError, match=r"claims\.vm"):
        parse_claims(CLAIMS | {"vm": text})


@pytest.mark.parametrize(
    ("key", "most", "more"),
    [
        ("generation", (1 << 53) - 1, 1 << 53),
        ("issuer", "a" * 32, "a" * 33),
        ("eks", [eks_of(n) for n in range(16)], [eks_of(n) for n in range(17)]),
        ("eks", [eks_of(0, alg="a" * 32)], [eks_of(0, alg="a" * 33)]),
    ],
)
def test_a_claim_may_reach_its_limit(key: str, most: object, more: object) -> None:
    parse_claims(CLAIMS | {key: most})
    with pytest.raises(LinkClaimsError, match=f"claims.{key}"):
        parse_claims(CLAIMS | {key: more})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(CLAIMS)), JSON_VALUES))
def test_whatever_is_claimed_links_or_is_a_link_error(changes: dict[str, object]) -> None:
    with contextlib.suppress(LinkError):
        LINK.judge(parse_claims(CLAIMS | changes))
        assert "eks" not in changes or changes["eks"] == CLAIMS["eks"]
        assert changes.get("running", True) is True


def test_a_link_reads_no_pcr() -> None:
    assert LINK.needed_mask == 0


def test_the_least_state_is_one_that_there_is() -> None:
    with pytest.raises(UsageError, match="least state"):
        VtpmLink(vm=VM, ek=bytes(32), least="unknown")


def test_an_ek_is_given_by_its_digest() -> None:
    with pytest.raises(UsageError):
        VtpmLink(vm=VM, ek=EK)
    with pytest.raises(EkNotLinkedError):
        ek_digest(b"\x00\x04nope")


class Deep:
    """A tenant between a vTPM and a host."""

    def __init__(self) -> None:
        self.vtpm = SoftTpm(pcrs={0: b"guest"})
        self.host = SoftTpm()
        self.history = MemoryHistory()
        self.question = new_deep_question(now_s=100.0)
        self.quote = self.vtpm.quote(self.question.nonce, HashAlg.SHA256, 1)
        self.challenge = ask_host(
            self.question, self.quote, link=LINK, mask=1, history=self.history
        )
        answer = make_answer(self.host, self.challenge.request, claims=claims_bytes())
        self.body = b"".join(answer.body())

    def verify(self, *, now_s: float = 101.0, link: VtpmLink = LINK) -> dict[int, bytes]:
        verified = deep_verify(
            self.body,
            self.challenge,
            TrustedHost(ak=self.host.ak),
            self.history,
            nonce=self.question.nonce,
            vtpm_quote=self.quote,
            vak=parse_ak(self.vtpm.ak_public),
            vtpm_policy=UnsafeAcceptAny(),
            host_policy=UnsafeAcceptAny(),
            link=link,
            now_s=now_s,
        )
        assert verified.host.claims == CLAIMS
        return dict(verified.vtpm.pcrs)


def test_a_deep_quote_verifies_once() -> None:
    deep = Deep()
    assert deep.verify() == {0: sha256(b"guest").digest()}
    with pytest.raises(NonceSpentError):
        deep.verify()


def test_a_deep_quote_is_as_old_as_the_vtpm_s_nonce() -> None:
    deep = Deep()
    with pytest.raises(StaleEvidenceError):
        deep.verify(now_s=161.0)


def test_a_deep_quote_about_another_vm_was_never_asked_for() -> None:
    deep = Deep()
    with pytest.raises(UsageError):
        deep.verify(link=VtpmLink(vm=uuid.uuid4(), ek=ek_digest(EK)))


DOC = (DOCS / "vtpm.md").read_text(encoding="utf-8")


def test_the_documented_code_runs() -> None:
    vtpm, host = SoftTpm(pcrs={0: b"guest"}), SoftTpm()

    def ask_the_proxy(request: QuoteRequest) -> bytes:
        return b"".join(make_answer(host, request, claims=claims_bytes(confirmed=True)).body())

    names: dict[str, Any] = vars(provider_proxy) | {
        "time": time,
        "ordered": VM,
        "ek_tpm": EK,
        "host": TrustedHost(ak=host.ak),
        "history": MemoryHistory(),
        "vak": vtpm.ak,
        "host_pcrs": UnsafeAcceptAny(),
        "guest_pcrs": UnsafeAcceptAny(),
        "ask_the_proxy": ask_the_proxy,
        "ask_the_agent": lambda nonce: vtpm.quote(nonce, HashAlg.SHA256, 1),
    }
    blocks = re.findall(r"^```python\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["quote"].claims["confirmed"] is True
    assert dict(names["both"].vtpm.pcrs) == {0: sha256(b"guest").digest()}


# --- saved evidence ---------------------------------------------------------------------------------


class Saved:
    """A tenant's files, all good: evidence with claims, and a vTPM's quote that its nonce holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = FixedTpm()
        vtpm = FixedTpm(ec_key("vak"))
        quote = vtpm.quote(b"tenant-nonce-0123456789", HashAlg.SHA256, 1)
        self.put("vtpm-quote", encode_quote(quote).encode())
        self.put("vak", base64.b64encode(vtpm.ak_public))
        self.put("ak", self.host.ak_public)
        self.put("ek", base64.b64encode(EK))
        self.put("other-ek", OTHER_EK)
        self.put("policy.json", json.dumps({"0": [sha256(b"firmware").hexdigest()]}).encode())
        self.ask(request_number(7, mask=0x1, vm=VM))
        # The nonce that `fetch --vtpm-quote` takes, from the text of the format.
        joined = b"provider-proxy/deep/1\0" + bytes([23]) + b"tenant-nonce-0123456789"
        joined += sha256(quote.attest).digest() + sha256(quote.signature).digest()
        self.deep = QuoteRequest(
            nonce=Nonce(sha256(joined).hexdigest().encode()), mask=PcrMask(1), vm=VM
        )

    def put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def ask(self, request: QuoteRequest, **claims: object) -> None:
        batch = SealedBatch(tpm=self.host, requests=(request,), claims=(claims_bytes(**claims),))
        body = batch.body(0)
        record = RequestRecord(
            request=request,
            made_at_s=0.0,
            answered_after_s=1.0,
            evidence_sha256=sha256(body).digest(),
        )
        self.put("evidence", body)
        self.put("request", encode_request(record))

    def run(self, words: str, *more: str) -> int:
        line = f"{words} evidence --request request --ak-tpm ak --tpm-policy policy.json"
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            return cli.run([*line.split(), *more])
        finally:
            os.chdir(before)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


OWN_LINK = ("--vm", str(VM), "--ek", "ek")
DEEP = ("--vtpm-quote", "vtpm-quote", "--vtpm-nonce", "tenant-nonce-0123456789", "--vak", "vak")
ANY = "--insecure-any-vtpm-state"


@pytest.mark.parametrize("words", ["verify-link files", "verify"])
def test_saved_evidence_is_linked(
    saved: Saved, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saved.run(words, *OWN_LINK) == GOOD
    said = capsys.readouterr()
    assert f"linked: VM {VM} runs on the host" in said.out
    assert "claimed, not confirmed" in said.out
    assert saved.run(words, *OWN_LINK, "--json") == GOOD
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    values = values.get("link", values)
    assert values["ek"] == ek_digest(EK).hex()
    assert values["state"] == "claimed"


def test_verify_says_that_claims_were_not_judged(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saved.run("verify") == GOOD
    assert "not judged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--vm", str(uuid.uuid4()), "--ek", "ek"), "WrongVmError"),
        (("--vm", str(VM), "--ek", "other-ek"), "EkNotLinkedError"),
        ((*OWN_LINK, "--least", "confirmed"), "NotConfirmedError"),
        ((*OWN_LINK, "--ek-issuer", "tpm"), "LinkIssuerError"),
        ((*OWN_LINK, *DEEP, ANY), "DeepNonceError"),
    ],
)
def test_saved_evidence_is_refused(
    saved: Saved, more: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saved.run("verify-link files", *more) == REFUSED
    assert error in capsys.readouterr().err


def test_saved_evidence_of_a_vm_that_is_off(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.ask(request_number(7, mask=0x1, vm=VM), running=False)
    assert saved.run("verify-link files", *OWN_LINK) == REFUSED
    assert "VmNotRunningError" in capsys.readouterr().err
    saved.ask(request_number(7, mask=0x1))
    assert saved.run("verify-link files", *OWN_LINK) == REFUSED  # claims that were not asked for


def test_saved_deep_quote(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    saved.ask(saved.deep)
    assert saved.run("verify-link files", *OWN_LINK, *DEEP, ANY, "--json") == GOOD
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["vtpm_pcrs"] == {"0": sha256(b"firmware").hexdigest()}
    assert saved.run("verify-link files", *OWN_LINK, *DEEP, "--vtpm-policy", "policy.json") == GOOD
    (saved.folder / "policy2.json").write_text(json.dumps({"0": ["00" * 32]}))
    assert (
        saved.run("verify-link files", *OWN_LINK, *DEEP, "--vtpm-policy", "policy2.json") == REFUSED
    )
    assert "VtpmQuoteError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        OWN_LINK[:2],
        OWN_LINK[2:],
        ("--vm", "web", "--ek", "ek"),
        ("--vm", str(VM), "--ek", "policy.json"),
        (*OWN_LINK, *DEEP),
        (*OWN_LINK, ANY),
        (*OWN_LINK, *DEEP[:4], ANY),
        (*OWN_LINK, *DEEP[2:], ANY),
        (*OWN_LINK, *DEEP[2:], ANY, "--vtpm-quote", "policy.json"),
    ],
)
def test_half_a_link_is_a_usage_error(saved: Saved, more: tuple[str, ...]) -> None:
    code: object
    try:
        code = saved.run("verify-link files", *more)
    except SystemExit as exc:  # argparse's own
        code = exc.code
    assert code == USAGE
