"""Stock Keylime as the judge: what it is given, how its answers are read. The real one is beside."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from event_log_helpers import LOG, MEASURED
from helpers import make_evidence
from ima_helpers import GOOD as FILE
from ima_helpers import Line, line
from ima_helpers import text as listed
from listed_tpms import ListedTpm
from watch_helpers import b64

from provider_proxy.errors import (
    InclusionError,
    KeylimeRefusedError,
    LogError,
    NotSupportedError,
    QualifyingDataError,
    ReplyError,
    SignatureError,
    UsageError,
    VerificationError,
)
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.model import (
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
)
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
        ({"runtime": text({"hashes": {}})}, "older Keylime"),
        ({"runtime": "{}", "runtime_key": b"x"}, "not signed"),
        ({"tpm": text(GOOD), "runtime_key": b"x"}, "no runtime policy"),
    ],
)
def test_policies_that_are_none(given: dict[str, Any], message: str) -> None:
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
        self.logs: Callable[[QuoteRequest], dict[str, object]] = lambda request: {}
        self.questions: list[QuoteRequest] = []
        self.busy: set[int] = set()
        self.registered = RegisteredHost(
            host=TrustedHost(ak=self.tpm.ak),
            history=MemoryHistory(),
            ek_public=EK,
            ak_public=self.tpm.ak_public,
        )

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/verifier/quote":
            asked = parse_quote_query(request.url.query.decode("ascii"))
            self.questions.append(asked)
            if len(self.questions) in self.busy:
                return httpx.Response(429, headers={"Retry-After": "2"}, json={"status": "slower"})
            values = json.loads(make_evidence(self.tpm, asked))
            values["results"] |= self.logs(asked)
            return httpx.Response(200, content=self.spoil(json.dumps(values).encode()))
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
        "no reason given",
    ),
    "both": (
        httpx.Response(200, json={"results": {"valid": True, "failures": ["x\n"]}}),
        KeylimeRefusedError,
        "refuses: x\\?",
    ),
    "truthy": (
        httpx.Response(200, json={"results": {"valid": 1, "failures": []}}),
        KeylimeRefusedError,
        "no reason given",
    ),
    "no failures": (
        httpx.Response(200, json={"results": {"valid": True}}),
        ReplyError,
        "does not hold a verdict",
    ),
    "no results": (
        httpx.Response(200, json={"valid": True}),
        ReplyError,
        "does not hold a verdict",
    ),
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


# --- logs: ours judges first --------------------------------------------------------------------------

LINES = [line("boot_aggregate"), *(line(f"/usr/bin/{n}") for n in range(40))]
RUNTIME = text({"digests": {one.text.split(" ")[4]: [FILE] for one in LINES}})


def listing(lines: Sequence[Line], part: int = 1000) -> Callable[[QuoteRequest], dict[str, object]]:
    """Answers with so many lines at most."""

    def logs(request: QuoteRequest) -> dict[str, object]:
        start = request.ima_ml_entry if request.ima_ml_entry <= len(lines) else 0
        return {
            "ima_measurement_list": listed(lines[start : start + part]),
            "ima_measurement_list_entry": start,
        }

    return logs


def ima_site(lines: Sequence[Line] = LINES) -> Site:
    site = Site()
    site.tpm = ListedTpm(lines)
    site.registered = replace(site.registered, host=TrustedHost(ak=site.tpm.ak))
    site.logs = listing(lines)
    return site


async def test_keylime_gets_the_list_that_was_proven() -> None:
    site = ima_site()
    site.logs = listing([*LINES, line("/later")])
    await site.check(KeylimePolicies(runtime=RUNTIME))
    assert site.asked[0]["ima_measurement_list"] == listed(LINES)


async def test_a_long_list_is_fetched_to_its_end() -> None:
    site = ima_site()
    site.logs = listing(LINES, part=7)
    await site.check(KeylimePolicies(runtime=RUNTIME))
    assert [request.ima_ml_entry for request in site.questions] == [0, 7, 14, 21, 28, 35]
    assert site.asked[0]["ima_measurement_list"] == listed(LINES)


async def test_a_tenant_s_limit_of_bytes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("provider_proxy.tenant.asking.anyio.sleep", sleep)
    site = ima_site()
    site.logs = listing(LINES, part=7)
    site.busy = {3, 4}
    await site.check(KeylimePolicies(runtime=RUNTIME))
    assert waits == [2.0, 2.0]
    assert site.asked[0]["ima_measurement_list"] == listed(LINES)
    site.busy = {len(site.questions) + 1}  # of the first part: there is nothing to go on with
    with pytest.raises(ReplyError, match="429"):
        await site.check(KeylimePolicies(runtime=RUNTIME))


async def test_a_list_whose_end_does_not_come_is_no_verdict() -> None:
    site = ima_site()
    logs = listing(LINES, part=7)

    def then_silence(request: QuoteRequest) -> dict[str, object]:
        if request.ima_ml_entry >= 21:
            raise httpx.ConnectError("gone")
        return logs(request)

    site.logs = then_silence
    with pytest.raises(ReplyError, match="gone"):
        await site.check(KeylimePolicies(runtime=RUNTIME))
    assert site.asked == []


MEASURES_NOTHING: dict[str, dict[str, object]] = {
    "no list": {},
    "an empty one": {"ima_measurement_list": "", "ima_measurement_list_entry": 0},
    "a violation": {
        "ima_measurement_list": listed([line("/x", violation=True)]),
        "ima_measurement_list_entry": 0,
    },
}


@pytest.mark.parametrize("name", MEASURES_NOTHING)
@pytest.mark.parametrize("violations", list(Violations))
async def test_a_host_that_measures_nothing_is_refused(name: str, violations: Violations) -> None:
    site = ima_site([])
    site.logs = lambda request: MEASURES_NOTHING[name]
    with pytest.raises(LogError):
        await site.check(KeylimePolicies(runtime=RUNTIME, violations=violations))
    assert site.asked == []


async def test_what_the_runtime_policy_does_not_allow_is_refused_first() -> None:
    site = ima_site([*LINES, line("/evil")])
    with pytest.raises(LogError, match="/evil is not in"):
        await site.check(KeylimePolicies(runtime=RUNTIME))
    assert site.asked == []


async def test_violations_may_be_counted() -> None:
    site = ima_site([*LINES, line("/x", violation=True)])
    with pytest.raises(LogError, match="/x was written to"):
        await site.check(KeylimePolicies(runtime=RUNTIME))
    await site.check(KeylimePolicies(runtime=RUNTIME, violations=Violations.COUNT))
    assert len(site.asked) == 1


def _same(answer: dict[str, object], _: QuoteRequest) -> dict[str, object]:
    return answer


async def test_a_measured_boot_policy_needs_a_log_that_fits() -> None:
    policies = KeylimePolicies(measured_boot="{}", uefi_mask=MEASURED)
    for log, why in (
        (None, "no firmware event log"),
        (LOG[:-40], "ends early|does not lead"),
    ):
        site = ima_site()
        answer: dict[str, object] = {} if log is None else {"mb_measurement_list": b64(log)}
        site.logs = functools.partial(_same, answer)
        with pytest.raises(LogError, match=why):
            await site.check(policies)
        assert site.asked == []
    site.logs = lambda request: {"mb_measurement_list": b64(LOG)}
    await site.check(policies)
    assert site.asked[0]["mb_log"] == b64(LOG)
    with pytest.raises(LogError, match="PCR 2 was never extended"):
        await site.check(replace(policies, uefi_mask=0xFF))
