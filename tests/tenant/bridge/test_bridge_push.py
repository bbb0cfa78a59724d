"""A host's agent in push mode, over a fake verifier that speaks as Keylime 7.14.3's does."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from bridged import Bridged, bridge_keys, bridged_in
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from ima_helpers import HOST, text
from listed_tpms import ImaTpm, ima_proxy
from watch_helpers import Rig

from provider_proxy.errors import NotSupportedError, ReplyError
from provider_proxy.evidence.attestation import parse_attest
from provider_proxy.evidence.model import ClockState, QuoteRequest
from provider_proxy.evidence.tpm_keys import TPM_ALG_NULL
from provider_proxy.tenant.bridge.keys import BridgeKeys
from provider_proxy.tenant.bridge.push_api import NotEnrolledError, Offer, PushVerifier
from provider_proxy.tenant.bridge.pushing import Pusher
from provider_proxy.testing.soft_tpm import SoftTpm

Jumping = trio.testing.MockClock
CHALLENGE = bytes(range(16))
OFFER = Offer(boottime=2, entries=1)


class FakeVerifier:
    """Keylime's verifier, as far as an agent sees it.

    Attributes:
        token: that it takes; another one is 401.
        asks: what it wants of an offer; None for what follows from `mask` and `wants_ima`.
        answers: statuses and bodies that come instead of the next good ones, by the path's end.
    """

    def __init__(self) -> None:
        self.token = "id.secret"
        self.enrolled = True
        self.mask = [0]
        self.wants_ima = False
        self.entry = 0
        self.status = "PASS"
        self.asks: Any = None
        self.answers: dict[str, list[tuple[int, Any]]] = {}
        self.calls: list[tuple[str, str, Any]] = []
        self.offered: list[Any] = []
        self.evidence: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        path = request.url.path
        self.calls.append((request.method, path, body))
        for end, answers in self.answers.items():
            if path.endswith(end) and answers:
                status, values = answers.pop(0)
                headers = {"Retry-After": "7"} if status in (429, 503) else {}
                return httpx.Response(status, json=values, headers=headers)
        attributes = body["data"]["attributes"] if body else {}
        if path == "/v3.0/sessions":
            return self._session({"authentication_requested": [self._pop()]})
        if path == "/v3.0/sessions/7-a":
            self._check_possession(attributes)
            if not self.enrolled:
                return self._session({"evaluation": "fail"})
            return self._session({"evaluation": "pass", "token": self.token})
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return httpx.Response(401, json={"errors": [{"detail": "who are you?"}]})
        if request.method == "GET":
            return httpx.Response(200, json={"results": {"attestation_status": self.status}})
        if request.method == "POST":
            self.offered.append(attributes)
            asks = self._requested() if self.asks is None else self.asks
            return httpx.Response(200, json={"data": {"attributes": {"evidence_requested": asks}}})
        found = {item["evidence_type"]: item["data"] for item in attributes["evidence_collected"]}
        self.evidence.append(found)
        return httpx.Response(202, json={"data": {}, "meta": {"seconds_to_next_attestation": 60}})

    def _session(self, attributes: dict[str, Any]) -> httpx.Response:
        return httpx.Response(200, json={"data": {"id": "7-a", "attributes": attributes}})

    def _pop(self) -> dict[str, Any]:
        return {"chosen_parameters": {"challenge": base64.b64encode(CHALLENGE).decode()}}

    def _check_possession(self, attributes: dict[str, Any]) -> None:
        proof = attributes["authentication_provided"][0]["data"]
        message = base64.b64decode(proof["message"])
        assert message[:6] == b"\xffTCG\x80\x17"
        assert CHALLENGE in message

    def _requested(self) -> list[dict[str, Any]]:
        chosen = self._pop()["chosen_parameters"] | {"selected_subjects": {"sha256": self.mask}}
        asks = [{"evidence_type": "tpm_quote", "chosen_parameters": chosen}]
        if self.wants_ima:
            ima = {"starting_offset": self.entry}
            asks.append({"evidence_type": "ima_log", "chosen_parameters": ima})
        return asks

    def quote(self, number: int = -1) -> tuple[bytes, bytes]:
        """Message and signature of a quote that was given."""
        data = self.evidence[number]["tpm_quote"]
        return base64.b64decode(data["message"]), base64.b64decode(data["signature"])


class Pushed:
    """An agent that posts to a fake verifier."""

    def __init__(self, bridged: Bridged, keys: BridgeKeys, **options: Any) -> None:
        self.bridged = bridged
        self.verifier = FakeVerifier()
        http = httpx.AsyncClient(transport=httpx.MockTransport(self.verifier))
        agent = bridged.agent
        self.api = PushVerifier(http, "https://verifier:8881/", agent.agent_id, keys)
        self.pusher = Pusher(agent, self.api, **options)


@pytest.fixture(scope="session")
def keys() -> BridgeKeys:
    return bridge_keys()


@pytest.fixture
def make(keys: BridgeKeys, tmp_path: Path, nursery: trio.Nursery) -> Callable[..., Any]:
    return partial(bridged_in, nursery, tmp_path, keys)


@pytest.fixture
def push(make: Any, keys: BridgeKeys) -> Callable[..., Any]:
    async def made(**options: Any) -> Pushed:
        policy = options.pop("read_policy", None)
        return Pushed(await make(**options), keys, read_policy=policy)

    return made


async def rounds(pushed: Pushed, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await pushed.pusher.run()


# --- the protocol -----------------------------------------------------------------------------------


async def test_a_session_is_made_once_and_again_where_the_token_is_refused(
    autojump_clock: Jumping, push: Any
) -> None:
    pushed = await push()
    for _ in range(3):
        await pushed.api.offer(OFFER)
    assert [path for _, path, _ in pushed.verifier.calls].count("/v3.0/sessions") == 1
    pushed.verifier.token = "id.other"
    await pushed.api.offer(OFFER)
    assert [path for _, path, _ in pushed.verifier.calls].count("/v3.0/sessions") == 2
    pushed.verifier.answers["attestations"] = [(401, {}), (401, {})]
    with pytest.raises(ReplyError, match="401"):
        await pushed.api.offer(OFFER)


async def test_an_agent_that_nobody_added_is_said_with_the_command(
    autojump_clock: Jumping, push: Any
) -> None:
    pushed = await push()
    pushed.verifier.enrolled = False
    with pytest.raises(NotEnrolledError, match="keylime_tenant --push-model -c add -u"):
        await pushed.api.offer(OFFER)


async def test_a_verifier_without_push_mode_is_said(autojump_clock: Jumping, push: Any) -> None:
    pushed = await push()
    pushed.verifier.answers["sessions"] = [(404, {})]
    with pytest.raises(NotSupportedError, match=r"needs Keylime 7\.14\.3"):
        await pushed.api.offer(OFFER)


@pytest.mark.parametrize(
    ("end", "body"),
    [
        ("sessions", []),
        ("sessions", {"data": {"id": "../x", "attributes": {}}}),
        ("sessions", {"data": {"id": "7", "attributes": {"authentication_requested": []}}}),
        ("sessions", {"data": {"id": "a/b", "attributes": {"authentication_requested": [{}]}}}),
        ("7-a", {"data": {"attributes": {"evaluation": "pass"}}}),
        ("7-a", {"data": {"attributes": {"evaluation": "pass", "token": "a\r\nX: 1"}}}),
        ("attestations", {"data": {"attributes": {"evidence_requested": "all"}}}),
        ("attestations", {"data": {"attributes": {"evidence_requested": [{}] * 9}}}),
        (
            "attestations",
            {"data": {"attributes": {"evidence_requested": [{"evidence_type": "disk"}]}}},
        ),
    ],
)
async def test_an_answer_that_makes_no_sense_is_none(
    autojump_clock: Jumping, push: Any, end: str, body: Any
) -> None:
    pushed = await push()
    pushed.verifier.answers[end] = [(200, body)]
    with pytest.raises(ReplyError):
        await pushed.api.offer(OFFER)


@pytest.mark.parametrize("call", [1, 2, 3])
async def test_a_verifier_that_breaks_off_is_asked_again(
    autojump_clock: Jumping, push: Any, call: int
) -> None:
    """In the session, in the proof, in the offer."""
    pushed = await push()
    fake, calls = pushed.verifier, []

    def breaks(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        if len(calls) == call:
            raise httpx.ReadError("reset")
        answer: httpx.Response = fake(request)
        return answer

    http = httpx.AsyncClient(transport=httpx.MockTransport(breaks))
    pushed.api._http = http
    await rounds(pushed, 30)
    assert len(fake.evidence) == 1


@pytest.mark.parametrize(
    "asks",
    [
        [],
        [{"evidence_type": "ima_log", "chosen_parameters": {"starting_offset": 0}}],
        [{"evidence_type": "ima_log", "chosen_parameters": {"starting_offset": -1}}],
        [
            {
                "evidence_type": "tpm_quote",
                "chosen_parameters": {
                    "challenge": "AAAA",
                    "selected_subjects": {"sha256": [24]},
                },
            }
        ],
        [
            {
                "evidence_type": "tpm_quote",
                "chosen_parameters": {"challenge": "", "selected_subjects": {"sha256": [1]}},
            }
        ],
    ],
)
async def test_a_request_without_a_challenge_or_with_other_pcrs_is_none(
    autojump_clock: Jumping, push: Any, asks: Any
) -> None:
    pushed = await push()
    pushed.verifier.asks = asks
    with pytest.raises(ReplyError):
        await pushed.api.offer(OFFER)


# --- rounds -----------------------------------------------------------------------------------------


async def test_a_quote_is_over_the_verifier_s_challenge(
    autojump_clock: Jumping,
    push: Any,
    keys: BridgeKeys,
) -> None:
    pushed = await push()
    pushed.verifier.mask = [0, 3]
    await rounds(pushed, 130)
    assert len(pushed.verifier.evidence) == 3  # at the verifier's pace
    message, signature = pushed.verifier.quote()
    attest = parse_attest(message)
    assert (attest.extra_data, attest.mask) == (CHALLENGE, 0b1001)  # PCR 16 was not asked for
    keys.ak.public_key().verify(signature[6:], message, padding.PKCS1v15(), hashes.SHA256())
    assert pushed.pusher.posted.verdict == "pass"
    asked = [request.nonce for _, request in pushed.bridged.rig.proxy.asked]
    assert len(set(asked)) == len(asked) == 4  # one more to learn the boot


async def test_the_list_is_posted_from_where_the_verifier_counts(
    autojump_clock: Jumping,
    push: Any,
    tmp_path: Path,
    nursery: trio.Nursery,
) -> None:
    of_list = Rig(tmp_path / "ima", proxy=ima_proxy())
    with_list = of_list.proxy.answer

    def answer(request: QuoteRequest) -> bytes | None:
        if request.wants_ima:
            return with_list(request)
        of_list.proxy.logs = {}
        return of_list.proxy.good(request)

    of_list.proxy.answer = answer
    of_list.proxy.serve_in(nursery)
    tpm = of_list.proxy.tpm
    assert isinstance(tpm, ImaTpm)
    pushed = await push(rig=of_list)
    pushed.verifier.mask, pushed.verifier.wants_ima = [10], True
    tpm.lines = 100
    await rounds(pushed, 10)
    assert pushed.verifier.evidence[-1]["ima_log"]["entries"] == text(HOST[:100])
    tpm.lines, pushed.verifier.entry = 150, 100
    await rounds(pushed, 10)
    assert (
        pushed.verifier.offered[-1]["evidence_supported"][2]["capabilities"]["entry_count"] == 100
    )
    assert pushed.verifier.evidence[-1]["ima_log"]["entries"] == text(HOST[100:150])
    # A bridge that was restarted does not know how long the list is, and the verifier says so.
    pushed.pusher._entries = 1
    pushed.verifier.answers["attestations"] = [(422, {"errors": [{"detail": "offset"}]})]
    pushed.verifier.entry = 150
    await rounds(pushed, 10)
    assert (
        pushed.verifier.offered[-1]["evidence_supported"][2]["capabilities"]["entry_count"] == 150
    )
    assert pushed.verifier.evidence[-1]["ima_log"]["entries"] == ""


async def test_a_reset_between_offer_and_quote_begins_another_attestation(
    autojump_clock: Jumping, push: Any
) -> None:
    pushed = await push()
    await rounds(pushed, 10)
    before = pushed.verifier.offered[-1]["system_info"]["boot_time"]
    pushed.bridged.rig.proxy.tpm.clock = ClockState(reset_count=9, restart_count=0, clock_ms=1)
    await rounds(pushed, 10)
    times = [offer["system_info"]["boot_time"] for offer in pushed.verifier.offered]
    assert times == [before, before, 10]
    assert len(pushed.verifier.evidence) == 2


async def test_a_refusal_is_posted_with_its_reason_and_nothing_signed(
    autojump_clock: Jumping, push: Any
) -> None:
    pushed = await push()
    await rounds(pushed, 10)
    pushed.bridged.rig.aks.tpm = SoftTpm()
    await rounds(pushed, 130)
    refused = pushed.verifier.evidence[1:]
    assert len(refused) == 3
    for number in range(1, 4):
        message, signature = pushed.verifier.quote(number)
        assert signature == TPM_ALG_NULL.to_bytes(2, "big") + b"\x00\x0b"
        assert CHALLENGE not in message
    notes = [
        offer["evidence_supported"][0]["capabilities"].get("evidence_version")
        for offer in pushed.verifier.offered
    ]
    said = [note for note in notes if note]
    assert len(said) == 1  # told once, and again only where it changes
    assert said[0].startswith("refused: SignatureError: ")
    assert pushed.bridged.agent.standing.result == "refused"


async def test_silence_posts_nothing(autojump_clock: Jumping, push: Any) -> None:
    pushed = await push()
    pushed.bridged.rig.proxy.answer = lambda request: None
    await rounds(pushed, 100)
    assert pushed.verifier.evidence == []
    assert "no answer" in pushed.pusher.posted.error


async def test_a_verifier_that_wants_us_to_wait_is_obeyed(
    autojump_clock: Jumping, push: Any
) -> None:
    pushed = await push()
    pushed.verifier.answers["attestations"] = [(429, {"errors": [{"detail": "too soon"}]})]
    began = trio.current_time()
    await rounds(pushed, 6.9)
    assert pushed.verifier.evidence == []
    await rounds(pushed, 5)
    assert len(pushed.verifier.evidence) == 1
    assert trio.current_time() - began < 13


@pytest.mark.parametrize(
    ("policy", "is_ignored"),
    [
        ({"meta": {"generator": 0}, "digests": {"/bin/a": ["00"]}}, True),
        ({"meta": {"generator": 1}, "excludes": ["x"]}, True),
        ({"meta": {"generator": 1}, "digests": {}, "excludes": []}, False),
        (None, False),
    ],
)
async def test_a_policy_that_push_mode_ignores_stops_the_posts(
    autojump_clock: Jumping, push: Any, policy: Any, is_ignored: bool
) -> None:
    asked = []

    async def read(agent_id: str) -> Any:
        asked.append(agent_id)
        return policy

    pushed = await push(read_policy=read)
    await rounds(pushed, 130)
    assert bool(pushed.verifier.evidence) != is_ignored
    assert set(asked) == {pushed.bridged.agent.agent_id}
    if is_ignored:
        assert "meta.generator" in pushed.pusher.posted.error
    else:
        assert len(asked) == 1  # it may be large


async def test_a_bug_ends_one_round(
    autojump_clock: Jumping, push: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = await push()
    monkeypatch.setattr(pushed.api, "offer", lambda offer: 1 // 0)
    await rounds(pushed, 1)
    assert "unexpected error" in pushed.pusher.posted.error
    monkeypatch.undo()
    await rounds(pushed, 100)
    assert pushed.verifier.evidence
