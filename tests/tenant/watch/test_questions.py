"""What `watch` and `bridge` share: one question and its judgement, for somebody who wants more of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import trio
import trio.testing
from ima_helpers import HOST, text
from listed_tpms import ImaTpm, ima_proxy
from watch_helpers import Rig

from provider_proxy.errors import LogError, PolicyError
from provider_proxy.evidence.model import ClockState, HostLogs, Nonce
from provider_proxy.tenant.ima_tail import ImaTail
from provider_proxy.tenant.watch.questions import HostQuestions, Wanted

PCR_10 = 1 << 10


def lines(*numbers: int) -> str:
    return "".join(f"line {number}\n" for number in numbers)


def offered(tail: ImaTail, entry: int, *numbers: int, asked: int, replayed: int) -> tuple[str, int]:
    given = tail.add(HostLogs(ima=lines(*numbers), ima_entry=entry), asked=asked, replayed=replayed)
    assert given.ima is not None
    return given.ima, given.ima_entry


def collected(tail: ImaTail, proven: int) -> tuple[str, int, bool]:
    logs, done = tail.whole(HostLogs(), proven)
    assert logs.ima is not None
    return logs.ima, logs.ima_entry, done


# --- the list that another verifier wants -----------------------------------------------------------


def test_who_is_behind_the_replay_gets_its_own_part() -> None:
    tail = ImaTail(3)
    assert offered(tail, 3, 3, 4, 5, 6, asked=3, replayed=5) == (lines(5, 6), 5)
    assert collected(tail, 7) == (lines(3, 4, 5, 6), 3, True)


def test_who_is_ahead_of_the_replay_gets_its_own_part() -> None:
    tail = ImaTail(5)
    assert offered(tail, 3, 3, 4, 5, 6, asked=3, replayed=3) == (lines(3, 4, 5, 6), 3)
    assert collected(tail, 7) == (lines(5, 6), 5, True)


def test_what_is_not_proven_is_cut_off() -> None:
    tail = ImaTail(3)
    offered(tail, 3, 3, 4, 5, asked=3, replayed=3)
    assert collected(tail, 4) == (lines(3), 3, True)
    assert collected(tail, 3) == ("", 3, True)


def test_a_part_that_ends_before_what_is_proven_is_not_whole() -> None:
    tail = ImaTail(0)
    assert offered(tail, 0, 0, 1, asked=0, replayed=9) == (lines(0, 1), 0)
    assert collected(tail, 9)[2] is False
    assert tail.next_entry == 2
    assert offered(tail, 2, 2, 3, asked=2, replayed=3) == (lines(3), 3)
    assert collected(tail, 4) == (lines(0, 1, 2, 3), 0, True)


def test_a_list_that_begins_again_is_collected_from_its_beginning() -> None:
    tail = ImaTail(7)
    assert offered(tail, 0, 0, 1, asked=7, replayed=9) == (lines(0, 1), 0)
    assert collected(tail, 2) == (lines(0, 1), 0, True)


def test_a_part_that_nobody_asked_for_is_left_to_the_replay() -> None:
    tail = ImaTail(7)
    assert offered(tail, 2, 2, 3, asked=7, replayed=9) == (lines(2, 3), 2)
    assert tail.next_entry == 7


def test_a_cut_line_stays_cut() -> None:
    tail = ImaTail(1)
    given = tail.add(HostLogs(ima="a\nb\nhalf", ima_entry=1), asked=1, replayed=2)
    assert (given.ima, given.ima_entry) == ("b\nhalf", 2)


# --- questions --------------------------------------------------------------------------------------


@pytest.fixture
def rig(tmp_path: Path, nursery: trio.Nursery) -> Rig:
    made = Rig(tmp_path)
    made.proxy.serve_in(nursery)
    return made


def questions(rig: Rig, **rules: object) -> HostQuestions:
    setting = rig.setting(**({"insecure_any_state": False} | rules))
    return HostQuestions("h", setting, rig.store, budget=rig.budget, judged_elsewhere=True)


async def test_the_caller_s_nonce_and_mask_are_asked_for(rig: Rig) -> None:
    numbers = itertools.count()
    wanted = Wanted(mask=0x12, make_nonce=lambda: Nonce(b"%032d" % next(numbers)))
    host = questions(rig)
    for number in range(2):
        judged = await host.attest(wanted)
        request = rig.proxy.asked[-1][1]
        assert request.nonce == b"%032d" % number
        assert request.mask == 0x12
        assert set(judged.quote.pcrs) == {1, 4}
    await host.aclose()


async def test_the_host_s_own_policies_are_asked_for_besides(rig: Rig, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"0": ["' + "00" * 32 + '"]}')
    host = questions(rig, tpm_policy=policy)
    with pytest.raises(PolicyError):
        await host.attest(Wanted(mask=0x10))
    assert rig.proxy.asked[-1][1].mask == 0x11
    await host.aclose()


def ima_rig(tmp_path: Path, nursery: trio.Nursery, *, part: int = 10_000) -> tuple[Rig, ImaTpm]:
    rig = Rig(tmp_path, proxy=ima_proxy(part))
    rig.proxy.serve_in(nursery)
    assert isinstance(rig.proxy.tpm, ImaTpm)
    return rig, rig.proxy.tpm


async def test_a_list_is_replayed_though_no_policy_here_wants_it(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig, _ = ima_rig(tmp_path, nursery)
    host = questions(rig)
    judged = await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=0))
    assert (judged.logs.ima, judged.logs.ima_entry) == (text(HOST), 0)
    rig.proxy.answer = rig.proxy.good
    rig.proxy.logs = {"ima_measurement_list": text(HOST[1:]), "ima_measurement_list_entry": 0}
    with pytest.raises(LogError):
        await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=0))
    rig.proxy.logs = {}
    with pytest.raises(LogError, match="no IMA list"):  # absent is not empty
        await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=0))
    await host.aclose()


async def test_two_who_count_differently_get_what_each_needs(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig, tpm = ima_rig(tmp_path, nursery)
    host = questions(rig)
    tpm.lines = 100
    await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=0))
    tpm.lines = 200
    judged = await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=50))
    assert (judged.logs.ima, judged.logs.ima_entry) == (text(HOST[50:200]), 50)
    judged = await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=200))
    assert (judged.logs.ima, judged.logs.ima_entry) == ("", 200)
    assert [request.ima_ml_entry for _, request in rig.proxy.asked] == [0, 50, 200]
    await host.aclose()


async def test_a_long_list_is_put_together(tmp_path: Path, nursery: trio.Nursery) -> None:
    rig, tpm = ima_rig(tmp_path, nursery, part=250)
    tpm.lines = 600
    host = questions(rig)
    judged = await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=0))
    assert (judged.logs.ima, judged.logs.ima_entry) == (text(HOST[:600]), 0)
    judged = await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=100))
    assert (judged.logs.ima, judged.logs.ima_entry) == (text(HOST[100:600]), 100)
    await host.aclose()


async def test_a_reboot_gives_the_list_from_its_beginning(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    rig, tpm = ima_rig(tmp_path, nursery)
    host = questions(rig)
    await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=0))
    tpm.clock = ClockState(reset_count=tpm.clock.reset_count + 1, restart_count=0, clock_ms=5)
    rig.proxy.answer = rig.proxy.good
    tpm.lines = 3
    rig.proxy.logs = {"ima_measurement_list": text(HOST[:3]), "ima_measurement_list_entry": 0}
    judged = await host.attest(Wanted(logs=True, mask=PCR_10, ima_ml_entry=len(HOST)))
    assert (judged.logs.ima, judged.logs.ima_entry) == (text(HOST[:3]), 0)
    assert judged.was_reset
    await host.aclose()
