"""One agent over a fake proxy, on a clock that jumps: polls, refusals, silence, reboots, the API."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from bridged import NONCE, bridge_keys, bridged_in
from evidence_factory import VM
from ima_helpers import HOST, text
from link_claims import EK
from listed_tpms import ImaTpm, ima_proxy
from watch_helpers import FakeProxy, Rig, link

from provider_proxy.errors import UsageError
from provider_proxy.evidence.attestation import parse_attest
from provider_proxy.evidence.model import ClockState
from provider_proxy.evidence.wire import parse_quote
from provider_proxy.tenant.bridge import api
from provider_proxy.tenant.bridge.agent import AWAY_HOLD_S
from provider_proxy.tenant.bridge.keys import BridgeKeys
from provider_proxy.tenant.bridge.quoting import data_pcr, host_nonce
from provider_proxy.tenant.bridge.view import MAX_STATES, KeylimeView
from provider_proxy.testing.soft_tpm import SoftTpm

Jumping = trio.testing.MockClock
INTEGRITY = f"/v2.6/quotes/integrity?nonce={NONCE}&partial=0&mask="


@pytest.fixture(scope="session")
def keys() -> BridgeKeys:
    return bridge_keys()


@pytest.fixture
def make(keys: BridgeKeys, tmp_path: Path, nursery: trio.Nursery) -> Callable[..., Any]:
    return partial(bridged_in, nursery, tmp_path, keys)


# --- good polls -------------------------------------------------------------------------------------


async def test_a_poll_is_a_fresh_question_made_of_its_nonce(
    autojump_clock: Jumping, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bridged = await make()
    for number in range(3):
        nonce = f"{NONCE}{number}"
        results = await bridged.poll(0x3, nonce=nonce)
        attest = parse_attest(parse_quote(results["quote"]).attest)
        assert attest.extra_data == nonce.encode()
        assert attest.mask == 0x3 | 1 << 16
    asked = [request for _, request in bridged.rig.proxy.asked]
    assert len({request.nonce for request in asked}) == 3
    assert {request.mask for request in asked} == {0x3}  # never the host's PCR 16
    line = next(r for r in caplog.records if "host nonce" in r.message)
    random = bytes.fromhex(line.args[2])  # type: ignore[index,arg-type]
    assert asked[0].nonce == host_nonce(random, f"{NONCE}0".encode(), bridged.agent.agent_id)
    assert bridged.agent.standing.result == "good"


async def test_the_values_are_the_host_s_and_pcr_16_the_agent_s(
    autojump_clock: Jumping, make: Any
) -> None:
    bridged = await make()
    status, _, results = await bridged.get(INTEGRITY + "0x10001")
    assert status == 200
    values = dict(parse_quote(results["quote"]).pcrs.values)
    tpm = bridged.rig.proxy.tpm
    assert values[0] == dict(tpm.read(parse_quote(results["quote"]).pcrs.bank, 1).values)[0]
    assert values[16] == data_pcr(results["pubkey"])
    assert bridged.agent.agent_id in results["pubkey"]
    assert (results["hash_alg"], results["enc_alg"], results["sign_alg"]) == (
        "sha256",
        "rsa",
        "rsassa",
    )


async def test_an_identity_is_asked_of_the_host_too(autojump_clock: Jumping, make: Any) -> None:
    bridged = await make()
    status, _, results = await bridged.get(f"/v2.1/quotes/identity?nonce={NONCE}")
    assert status == 200
    assert parse_quote(results["quote"]).pcrs.mask == 1 << 16
    assert len(bridged.rig.proxy.asked) == 1


async def test_the_host_s_own_policy_counts_though_keylime_does_not_ask(
    autojump_clock: Jumping, make: Any, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"0": ["' + "00" * 32 + '"]}')
    bridged = await make(rules={"tpm_policy": policy})
    results = await bridged.poll(0x10)
    assert results["hash_alg"].startswith("refused: PolicyError: PCR 0 is ")


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"eks": []}, "EkNotLinkedError"),
        ({"running": False}, "VmNotRunningError"),
        ({"vm": "6f1d2c3b-4a5e-4c7d-8e9f-0a1b2c3d4e5f"}, "ClaimsError"),
    ],
)
async def test_a_host_that_is_no_longer_linked_to_the_vm_is_refused(
    autojump_clock: Jumping, make: Any, tmp_path: Path, changes: dict[str, Any], refused: str | None
) -> None:
    path = tmp_path / "ek"
    path.write_bytes(EK)
    bridged = await make(rules={"vm": VM, "vm_ek": path})
    link(bridged.rig.proxy, **changes)
    results = await bridged.poll()
    if refused is None:
        assert results["hash_alg"] == "sha256"
        link(bridged.rig.proxy, running=False)  # the VM goes on elsewhere
        refused, results = "VmNotRunningError", await bridged.poll()
    assert results["hash_alg"].startswith(f"refused: {refused}: ")
    assert results["quote"] == "r"


# --- refusals ---------------------------------------------------------------------------------------


async def test_a_refusal_has_its_reason_and_nothing_signed(
    autojump_clock: Jumping, make: Any
) -> None:
    bridged = await make()
    bridged.rig.aks.tpm = SoftTpm()
    results = await bridged.poll()
    assert results["hash_alg"].startswith("refused: SignatureError: ")
    assert results["quote"] == "r"
    assert not {"ima_measurement_list", "boottime"} & set(results)
    assert bridged.agent.standing.result == "refused"
    assert bridged.metrics.registry.get_sample_value(
        "provider_proxy_bridge_polls_total", {"result": "refused"}
    )


async def test_a_reason_with_a_host_s_words_is_one_short_line_of_ascii(
    autojump_clock: Jumping, make: Any
) -> None:
    assert api.printable("a\nb\x1b[31m\u2028\u00e9" + "x" * 1000) == "a?b?[31m??" + "x" * 390


async def test_a_clock_that_runs_back_is_refused(autojump_clock: Jumping, make: Any) -> None:
    bridged = await make()
    tpm = bridged.rig.proxy.tpm
    await bridged.poll()
    tpm.clock = ClockState(reset_count=1, restart_count=0, clock_ms=3)
    assert (await bridged.poll())["hash_alg"].startswith("refused: ClockError")


async def test_a_clock_that_falls_at_a_restart_is_refused(
    autojump_clock: Jumping, make: Any
) -> None:
    """`Verifier` takes it, Keylime could not follow it, and no chip does it."""
    bridged = await make()
    await bridged.poll()
    bridged.rig.proxy.tpm.clock = ClockState(reset_count=1, restart_count=1, clock_ms=3)
    assert "went back without a reset" in (await bridged.poll())["hash_alg"]


@pytest.mark.parametrize("refuse", [True, False])
async def test_what_a_crash_does_is_a_setting(
    autojump_clock: Jumping, make: Any, refuse: bool
) -> None:
    bridged = await make(refuse_unsafe=refuse)
    bridged.rig.proxy.tpm.clock_safe = False
    results = await bridged.poll()
    assert results["hash_alg"].startswith("refused: ClockError") == refuse
    if not refuse:
        assert parse_attest(parse_quote(results["quote"]).attest).clock_safe


async def test_an_old_answer_replayed_is_refused(autojump_clock: Jumping, make: Any) -> None:
    bridged = await make()
    await bridged.poll()
    kept = bridged.rig.proxy.good(bridged.rig.proxy.asked[0][1])
    bridged.rig.proxy.answer = lambda request: kept
    assert (await bridged.poll())["hash_alg"].startswith("refused: QualifyingDataError")


# --- clocks -----------------------------------------------------------------------------------------


def still(tpm: SoftTpm) -> None:
    """Two quotes of it show one clock."""
    frozen = tpm.clock
    real = tpm.quote
    counts = {"left": 2}

    def quote(*args: Any) -> Any:
        if counts["left"] > 0:
            counts["left"] -= 1
            tpm.clock = frozen
        return real(*args)

    tpm.quote = quote  # type: ignore[method-assign,assignment]


async def test_an_equal_clock_asks_again(autojump_clock: Jumping, make: Any) -> None:
    bridged = await make()
    still(bridged.rig.proxy.tpm)
    shown = []
    for _ in range(3):
        results = await bridged.poll()
        shown.append(parse_attest(parse_quote(results["quote"]).attest).clock.clock_ms)
    assert shown == sorted(set(shown))
    assert len(bridged.rig.proxy.asked) == 4  # the second poll took two questions


# --- silence ----------------------------------------------------------------------------------------


async def test_a_silent_host_is_408_soon_and_sooner_the_next_time(
    autojump_clock: Jumping, make: Any
) -> None:
    bridged = await make(hold_s=3.0)
    bridged.rig.proxy.answer = lambda request: None
    for waited in (3.0, AWAY_HOLD_S, AWAY_HOLD_S):
        began = trio.current_time()
        status, said, _ = await bridged.get(INTEGRITY + "0x1")
        assert (status, "the host gave no answer" in said) == (408, True)
        assert trio.current_time() - began == pytest.approx(waited)
        await trio.sleep(2)
    assert bridged.agent.standing.result == "no answer"


async def test_a_host_that_answers_late_is_back_at_the_next_poll(
    autojump_clock: Jumping, make: Any
) -> None:
    """It takes a second, which nobody waits for from a host that was silent: its answer counts still."""
    bridged = await make(hold_s=3.0)
    proxy: FakeProxy = bridged.rig.proxy
    proxy.answer = lambda request: None
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 408
    serve = proxy._serve

    async def slow(stream: trio.abc.Stream) -> None:
        await trio.sleep(1)
        await serve(stream)

    proxy.answer, proxy._serve = proxy.good, slow  # type: ignore[method-assign]
    proxy.kept = False
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 408
    await trio.sleep(2)
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 200


async def test_a_host_is_waited_for_as_it_is_used_to(autojump_clock: Jumping, make: Any) -> None:
    bridged = await make(hold_s=40.0)
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 200
    bridged.rig.proxy.answer = lambda request: None
    began = trio.current_time()
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 408
    assert trio.current_time() - began == pytest.approx(1.0)


@pytest.mark.parametrize("fault", ["refused", "503", "nonsense"])
async def test_no_evidence_is_no_verdict(autojump_clock: Jumping, make: Any, fault: str) -> None:
    bridged = await make()
    proxy = bridged.rig.proxy
    if fault == "refused":
        proxy.refuses = True
    else:
        proxy.answer = lambda request: (
            b"HTTP/1.1 503 X\r\nContent-Length: 2\r\n\r\n{}"
            if fault == "503"
            else b"no http\r\n\r\n"
        )
    status, _, results = await bridged.get(INTEGRITY + "0x1")
    assert (status, results) == (408, {})
    proxy.refuses, proxy.answer = False, proxy.good
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 200


async def test_two_who_ask_at_once_are_both_answered(autojump_clock: Jumping, make: Any) -> None:
    """The verifier's poll and the tenant's identity."""
    bridged = await make()
    seen: list[int] = []

    async def one(target: str) -> None:
        seen.append((await bridged.get(target))[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, INTEGRITY + "0x1")
        nursery.start_soon(one, f"/v2.6/quotes/identity?nonce={NONCE}")
    assert seen == [200, 200]


async def test_a_pin_that_is_missing_is_our_own_fault(autojump_clock: Jumping, make: Any) -> None:
    bridged = await make()
    bridged.rig.aks.error = UsageError("h is not pinned")
    status, said, _ = await bridged.get(INTEGRITY + "0x1")
    assert (status, "cannot judge the host: h is not pinned" in said) == (500, True)


async def test_a_bug_ends_one_poll(
    autojump_clock: Jumping, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridged = await make()
    monkeypatch.setattr(bridged.agent, "_show", lambda poll, judged: 1 // 0)
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 500
    monkeypatch.undo()
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 200


# --- the IMA list and reboots -----------------------------------------------------------------------


async def test_the_list_goes_out_as_keylime_counts(
    autojump_clock: Jumping, make: Any, tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig = Rig(tmp_path / "ima", proxy=ima_proxy())
    rig.proxy.serve_in(nursery)
    tpm = rig.proxy.tpm
    assert isinstance(tpm, ImaTpm)
    bridged = await make(rig=rig)
    entry = 0
    for size in (100, 200, 200, 300):
        tpm.lines = size
        results = await bridged.poll(1 << 10, entry)
        assert results["ima_measurement_list"] == text(HOST[entry:size])
        assert results["ima_measurement_list_entry"] == entry
        assert results["boottime"] == 2
        entry = size
    # A verifier that has counted otherwise than we have seen, or beyond the end, gets the whole list.
    for asked in (50, 301, 999_999_999):
        results = await bridged.poll(1 << 10, asked)
        assert (results["ima_measurement_list_entry"], results["ima_measurement_list"]) == (
            0,
            text(HOST[:300]),
        )


async def test_a_reboot_gives_the_whole_list_with_its_new_boot(
    autojump_clock: Jumping, make: Any, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """A part of the list beside another boottime would count at Keylime as good, unchecked."""
    rig = Rig(tmp_path / "ima", proxy=ima_proxy())
    rig.proxy.serve_in(nursery)
    tpm = rig.proxy.tpm
    assert isinstance(tpm, ImaTpm)
    bridged = await make(rig=rig)
    tpm.lines = 100
    await bridged.poll(1 << 10, 0)
    tpm.clock = ClockState(reset_count=2, restart_count=0, clock_ms=1)
    tpm.lines = 150  # longer than before already: the list itself does not show the reboot
    results = await bridged.poll(1 << 10, 100)
    assert (results["ima_measurement_list_entry"], results["boottime"]) == (0, 3)
    assert results["ima_measurement_list"] == text(HOST[:150])


async def test_a_reboot_whose_answer_got_lost(
    autojump_clock: Jumping, make: Any, tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig = Rig(tmp_path / "ima", proxy=ima_proxy())
    rig.proxy.serve_in(nursery)
    tpm = rig.proxy.tpm
    assert isinstance(tpm, ImaTpm)
    bridged = await make(rig=rig)
    tpm.lines = 100
    await bridged.poll(1 << 10, 0)
    tpm.clock = ClockState(reset_count=2, restart_count=0, clock_ms=1)
    await bridged.poll(
        1 << 10, 100
    )  # its answer is lost: Keylime still counts 100 of the first boot
    results = await bridged.poll(1 << 10, 100)
    assert (results["ima_measurement_list_entry"], results["boottime"]) == (0, 3)


def test_a_verifier_s_state_is_certain_or_unknown() -> None:
    view = KeylimeView()
    assert view.asked(7) is None
    view.answered(7, 1)
    assert view.asked(7) == 1
    view.answered(9, 1)  # lost, perhaps
    assert view.asked(7) == 1
    view.answered(7, 2)
    assert view.asked(7) is None  # of which boot?
    assert view.asked(0) is None
    assert view.asked(7) is None
    view.answered(5, 3)
    assert view.asked(5) == 3
    for number in range(MAX_STATES):
        view.answered(100 + number, 4)
    assert view.asked(5) is None


# --- the rest of the API ----------------------------------------------------------------------------


async def test_every_version_is_spoken_alike(autojump_clock: Jumping, make: Any) -> None:
    bridged = await make()
    status, _, results = await bridged.get("/version")
    assert status == 200
    assert results["supported_versions"] == ["2.1", "2.2", "2.3", "2.4", "2.5", "2.6"]
    assert results["supported_version"] == "2.6"
    for version in results["supported_versions"]:
        status, _, results = await bridged.get(f"/v{version}/agent/info")
        assert results["agent_uuid"] == bridged.agent.agent_id
        assert (await bridged.get(f"/v{version}/keys/pubkey"))[0] == 200


@pytest.mark.parametrize("version", ["1.0", "2.7", "3.0", "x"])
async def test_an_unknown_version_is_said_in_keylime_s_words(
    autojump_clock: Jumping, make: Any, version: str
) -> None:
    status, said, _ = await (await make()).get(f"/v{version}/quotes/identity?nonce=a")
    assert (status, said) == (400, f"API version not supported: v{version}")


@pytest.mark.parametrize("path", ["keys/ukey", "keys/vkey", "keys/verify"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_payloads_are_refused_with_words(
    autojump_clock: Jumping, make: Any, path: str, method: str
) -> None:
    status, said, _ = await (await make()).get(f"/v2.6/{path}?challenge=x", method)
    assert (status, "accepts no payload" in said) == (400, True)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v2.6/quotes/integrity?nonce=a-b&mask=0x1&partial=1", 400),
        (f"/v2.6/quotes/integrity?nonce={'a' * 65}&mask=0x1&partial=1", 400),
        ("/v2.6/quotes/integrity?mask=0x1&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=&mask=0x1&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a%00b&mask=0x1&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a%0Ab&mask=0x1&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=%C3%A9&mask=0x1&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=0x111111111&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=1&partial=1&ima_ml_entry=1111111111", 400),
        ("http://other/v2.6/quotes/integrity?nonce=a&mask=1&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=0x1", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=0x1&partial=2", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=0x1000000&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=-1&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a&nonce=b&mask=1&partial=1", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=1&partial=1&ima_ml_entry=-1", 400),
        ("/v2.6/quotes/integrity?nonce=a&mask=1&partial=1&ima_ml_entry=1e3", 400),
        ("/v2.6/quotes/integrity?" + "&".join(f"a{n}=1" for n in range(40)), 400),
        ("/v2.6/quotes/integrity", 400),
        ("/v2.6/nothing", 404),
        ("/", 400),
        ("/v2.6/", 404),
    ],
)
async def test_what_is_no_poll_asks_no_host(
    autojump_clock: Jumping, make: Any, target: str, status: int
) -> None:
    bridged = await make()
    assert (await bridged.get(target))[0] == status
    assert bridged.rig.proxy.asked == []


async def test_a_mask_of_nothing_asks_the_host_all_the_same(
    autojump_clock: Jumping, make: Any
) -> None:
    """Of PCR 16 alone, and of nothing: a fresh proof of the host, though none of its PCRs is shown."""
    bridged = await make()
    for mask in ("0x0", "0x10000"):
        status, _, results = await bridged.get(INTEGRITY + mask)
        assert status == 200
        assert parse_quote(results["quote"]).pcrs.mask == 1 << 16
    assert len(bridged.rig.proxy.asked) == 2


async def test_a_mask_without_0x_is_hex_as_keylime_s_agents_read_it(
    autojump_clock: Jumping, make: Any
) -> None:
    bridged = await make()
    await bridged.get(INTEGRITY + "10")
    assert bridged.rig.proxy.asked[0][1].mask == 0x10


async def test_a_revocation_is_taken_note_of(
    autojump_clock: Jumping, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bridged = await make()
    assert (await bridged.get("/v2.6/notifications/revocation", "POST"))[0] == 200
    assert "reports a revocation" in caplog.text
    assert (await bridged.get("/v2.6/notifications/revocation"))[0] == 405


async def test_a_changed_setting_gives_the_open_question_up(
    autojump_clock: Jumping, make: Any
) -> None:
    bridged = await make()
    bridged.rig.proxy.answer = lambda request: None
    seen: list[int] = []

    async def poll() -> None:
        seen.append((await bridged.get(INTEGRITY + "0x1"))[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(poll)
        await trio.sleep(0.5)
        await bridged.agent.take(bridged.rig.setting())
    assert seen == [408]
    bridged.rig.proxy.answer = bridged.rig.proxy.good
    assert (await bridged.get(INTEGRITY + "0x1"))[0] == 200
