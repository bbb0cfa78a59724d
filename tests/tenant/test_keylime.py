"""Stock Keylime as the judge: what it is given, how its answers are read. The real one is beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from helpers import make_evidence

from provider_proxy.errors import (
    InclusionError,
    KeylimeRefusedError,
    NotSupportedError,
    QualifyingDataError,
    ReplyError,
    SignatureError,
    UsageError,
    VerificationError,
)
from provider_proxy.evidence.model import TrustedHost, VerifiedQuote
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.verify import MemoryHistory, Verifier
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.keylime import (
    KeylimePolicies,
    KeylimeVerifier,
    RegisteredHost,
    check_host,
)
from provider_proxy.testing.soft_tpm import SoftTpm

GOOD = {"0": ["00" * 32]}
EK = b"\x00\x04fake"
IMA_LINES = [("/usr/bin/one", b"one"), ("/usr/bin/two", b"two")]


def text(values: object) -> str:
    return json.dumps(values)


# --- policies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policies", "mask"),
    [
        (KeylimePolicies(tpm=text(GOOD)), 0x1),
        (KeylimePolicies(tpm=text({"0": "00" * 32, "7": ["11" * 32]})), 0x81),
        (KeylimePolicies(runtime="{}"), 0x400),
        (KeylimePolicies(measured_boot="{}"), 0xFBFF),
        (KeylimePolicies(tpm=text(GOOD), runtime="{}"), 0x401),
    ],
)
def test_the_pcrs_that_policies_read(policies: KeylimePolicies, mask: int) -> None:
    assert policies.mask == mask


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "at least one policy"),
        ({"tpm": ""}, "at least one policy"),
        ({"tpm": "[]"}, "not a JSON object"),
        ({"tpm": "{"}, "not JSON"),
        ({"runtime": "7"}, "not a JSON object"),
        ({"measured_boot": "no"}, "not JSON"),
        ({"tpm": "{}"}, "at least one PCR"),
        ({"tpm": text({"24": "00" * 32})}, "PCR 24"),
    ],
)
def test_policies_that_are_none(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KeylimePolicies(**given)


# --- both judges, with answers of our own -----------------------------------------------------------


class Site:
    """A proxy over a software TPM, and a verifier that answers what it is told."""

    def __init__(self) -> None:
        self.tpm = SoftTpm(pcrs={0: b"boot"})
        self.verdict = httpx.Response(200, json={"results": {"valid": True, "failures": []}})
        self.asked: list[dict[str, str]] = []
        self.versions = ["1.0", "2.0", "2.1", "2.5", "2.6", "3.0"]
        self.spoil: Callable[[bytes], bytes] = lambda body: body
        self.registered = RegisteredHost(
            host=TrustedHost(ak=self.tpm.ak),
            history=MemoryHistory(),
            ek_public=EK,
            ak_public=self.tpm.ak_public,
        )

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/verifier/quote":
            asked = parse_quote_query(request.url.query.decode("ascii"))
            return httpx.Response(200, content=self.spoil(make_evidence(self.tpm, asked)))
        if request.url.path == "/version":
            return httpx.Response(200, json={"results": {"supported_versions": self.versions}})
        best = max(version for version in self.versions if version < "3")
        assert (request.method, request.url.path) == ("POST", f"/v{best}/verify/evidence")
        body = json.loads(request.content)
        assert body["type"] == "tpm"
        self.asked.append(body["data"])
        return self.verdict

    async def check(self, policies: KeylimePolicies | None = None) -> VerifiedQuote:
        async with httpx.AsyncClient(transport=httpx.MockTransport(self)) as http:
            return await check_host(
                ProxyClient(http, "https://proxy"),
                self.registered,
                Verifier(UnsafeAcceptAny()),
                KeylimeVerifier(http, "https://verifier/"),
                policies or KeylimePolicies(tpm=text(GOOD)),
            )


async def test_good_where_both_are_content() -> None:
    site = Site()
    verified = await site.check()
    assert set(verified.pcrs) == {0}
    (data,) = site.asked
    assert data["hash_alg"] == "sha256"
    assert data["tpm_policy"] == text(GOOD)
    assert len(data["nonce"]) == 32
    assert data["quote"].startswith("r")
    assert data["tpm_ek"] == "AARmYWtl"


async def test_a_verifier_is_asked_in_its_own_version() -> None:
    site = Site()
    site.versions = ["2.4", "2.5"]
    await site.check()
    assert len(site.asked) == 1


@pytest.mark.parametrize(
    ("versions", "release"),
    [
        (["2.1", "2.4"], "Keylime 7.13 (API 2.4)"),
        (["2.1", "2.3"], "Keylime 7.12 (API 2.3)"),
        (["2.0", "2.1"], "Keylime before 7.12 (API 2.1)"),
    ],
)
async def test_a_verifier_that_cannot_be_asked_says_which_it_is(
    versions: list[str], release: str
) -> None:
    site = Site()
    site.versions = versions
    with pytest.raises(NotSupportedError, match=r"Keylime 7\.14\.0 or later") as caught:
        await site.check()
    assert release in str(caught.value)
    assert site.asked == []


VERDICTS: dict[str, tuple[httpx.Response, type[Exception], str]] = {
    "refused": (
        httpx.Response(
            200,
            json={
                "results": {
                    "valid": False,
                    "failures": [{"type": "pcr_validation.invalid_pcr_0", "context": {"got": "x"}}],
                }
            },
        ),
        KeylimeRefusedError,
        'pcr_validation.invalid_pcr_0: {"got": "x"}',
    ),
    "no reason": (
        httpx.Response(200, json={"results": {"valid": False, "failures": []}}),
        KeylimeRefusedError,
        "it gives no reason",
    ),
    "both": (
        httpx.Response(200, json={"results": {"valid": True, "failures": ["x\n"]}}),
        KeylimeRefusedError,
        "refuses: x\\?",
    ),
    "truthy": (
        httpx.Response(200, json={"results": {"valid": 1, "failures": []}}),
        KeylimeRefusedError,
        "it gives no reason",
    ),
    "no failures": (
        httpx.Response(200, json={"results": {"valid": True}}),
        ReplyError,
        "holds no verdict",
    ),
    "no results": (httpx.Response(200, json={"valid": True}), ReplyError, "holds no verdict"),
    "a list": (httpx.Response(200, json=[]), ReplyError, "not a JSON object"),
    "no json": (httpx.Response(200, content=b"<html>"), ReplyError, "not JSON"),
    "400": (httpx.Response(400, json={"results": {}}), ReplyError, "answered 400"),
    "500": (
        httpx.Response(500, json={"results": {"valid": True, "failures": []}}),
        ReplyError,
        "answered 500",
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
async def test_anything_but_a_clear_yes_is_no(name: str) -> None:
    site = Site()
    site.verdict, kind, message = VERDICTS[name]
    with pytest.raises(kind, match=message):
        await site.check()


async def test_a_long_answer_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("provider_proxy.tenant.keylime.MAX_ANSWER_BYTES", 10)
    with pytest.raises(ReplyError, match="larger than 10 bytes"):
        await Site().check()


def another_salt(body: bytes) -> bytes:
    values = json.loads(body)
    values["results"]["merkle"]["salt"] = "00" * 15 + "ff"
    return json.dumps(values).encode()


def a_path_too_long(body: bytes) -> bytes:
    values = json.loads(body)
    values["results"]["merkle"]["path"] *= 2
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (another_salt, QualifyingDataError),
        (a_path_too_long, InclusionError),
        (lambda _: b"{}", VerificationError),
    ],
)
async def test_keylime_never_sees_what_we_refuse(
    spoil: Callable[[bytes], bytes], kind: type[VerificationError]
) -> None:
    site = Site()
    site.spoil = spoil
    with pytest.raises(kind):
        await site.check()
    assert site.asked == []


async def test_another_ak_than_the_registered_one() -> None:
    site = Site()
    site.registered = replace(site.registered, host=TrustedHost(ak=SoftTpm().ak))
    with pytest.raises(SignatureError):
        await site.check()
    assert site.asked == []


async def test_a_nonce_is_never_left_open() -> None:
    site = Site()
    history = MemoryHistory()
    site.registered = replace(site.registered, history=history)
    site.spoil = another_salt
    with pytest.raises(QualifyingDataError):
        await site.check()
    assert not history._open
