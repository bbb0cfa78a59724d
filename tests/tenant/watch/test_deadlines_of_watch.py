"""What a hostile host cannot do to a watcher: gain time beyond the documented bound, hold memory, hold
up others. Proxies on memory streams; the clock jumps."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import trio
import trio.testing
from ima_helpers import HOST
from listed_tpms import ImaTpm
from watch_helpers import FakeAks, FakeProxy, Rig, response

from provider_proxy.errors import ReplyError
from provider_proxy.evidence.model import QuoteRequest
from provider_proxy.tenant.watch.budget import SMALL_BYTES, Budget
from provider_proxy.tenant.watch.host import good_for_s
from provider_proxy.tenant.watch.http import Endpoint, ProxyConnection
from provider_proxy.tenant.watch.questions import Trust
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.tables import HostRules
from provider_proxy.trust.ek_judges import AskHost

Jumping = trio.testing.MockClock


@pytest.fixture
def rig(tmp_path: Path, nursery: trio.Nursery) -> Rig:
    made = Rig(tmp_path, proxy=FakeProxy(ImaTpm()))
    made.proxy.serve_in(nursery)
    return made


def trickle(proxy: FakeProxy) -> None:
    """A line of the IMA list an answer, each just in time, with more to come."""

    def endless(request: QuoteRequest) -> bytes:
        proxy.logs = {
            "ima_measurement_list": HOST[5].text + "\n",
            "ima_measurement_list_entry": request.ima_ml_entry,
        }
        return proxy.good(request)

    proxy.answer = endless


# --- the whole has a deadline -------------------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0.5, 3.9, 1000.0])
async def test_a_round_ends_in_time_whatever_the_host_does(
    autojump_clock: Jumping, rig: Rig, delay_s: float
) -> None:
    """Half a second, just in time, or never: a host that was good is not so any longer."""
    host = rig.host(
        ima=True, timeout_s=4.0, retry_interval_s=0.1, round_limit_s=20.0, interval_s=5.0
    )
    tpm = rig.proxy.tpm
    assert isinstance(tpm, ImaTpm)
    tpm.lines = 1
    rig.proxy.logs = {
        "ima_measurement_list": HOST[0].text + "\n",
        "ima_measurement_list_entry": 0,
    }
    assert await host.round() is State.TRUSTED
    trickle(rig.proxy)
    tpm.lines = 400
    rig.proxy.delay_s = delay_s
    began = trio.current_time()
    assert await host.round() is State.FAILED
    assert trio.current_time() - began == pytest.approx(20.0)
    assert rig.states() == ["TRUSTED", "FAILED"]
    assert "no verdict within 20 s" in rig.reports[-1]["reason"]
    assert good_for_s(host.rules) == pytest.approx(25.0)  # there is no jitter here


async def test_the_last_try_is_told_of(autojump_clock: Jumping, rig: Rig) -> None:
    rig.proxy.answer = lambda request: response(503, b"{}", "Retry-After: 3600")
    host = rig.host(round_limit_s=20.0, max_retry_s=3600.0)
    assert await host.round() is State.FAILED
    assert "no verdict within 20 s; the last try: the proxy answered 503" in str(host.error)
    assert rig.checks("ReplyError") == 2


async def test_the_source_of_the_ak_is_within_the_deadline(
    autojump_clock: Jumping, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_args: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(rig.aks, "trusted", hang)
    host = rig.host(round_limit_s=20.0)
    assert await host.round() is State.FAILED
    assert trio.current_time() == pytest.approx(20.0)


async def test_bytes_that_drip_are_within_the_deadline(autojump_clock: Jumping, rig: Rig) -> None:
    rig.proxy.drip_s = 1.0
    host = rig.host(timeout_s=4.0, retry_interval_s=0.1, round_limit_s=20.0)
    assert await host.round() is State.FAILED
    assert trio.current_time() == pytest.approx(20.0)
    assert 4 <= len(rig.proxy.asked) <= 6


# --- waiting holds nothing that others need -----------------------------------------------------------


async def test_silent_hosts_hold_up_nobody(
    autojump_clock: Jumping, rig: Rig, tmp_path: Path, nursery: trio.Nursery
) -> None:
    silent = Rig(tmp_path / "silent", budget=rig.budget)
    silent.proxy.answer = lambda request: None
    silent.proxy.serve_in(nursery)
    async with trio.open_nursery() as asking:
        for _ in range(600):
            asking.start_soon(silent.host().round)
        await trio.testing.wait_all_tasks_blocked()
        assert len(silent.proxy.asked) == 600
        began = trio.current_time()
        assert await rig.host().round() is State.TRUSTED
        assert trio.current_time() == began
        asking.cancel_scope.cancel()


async def test_a_host_that_stalls_within_a_large_answer_holds_its_own_share(
    autojump_clock: Jumping, rig: Rig, tmp_path: Path, nursery: trio.Nursery
) -> None:
    large = 6 * SMALL_BYTES
    rig.budget = Budget(total=4 * large, share=2 * large, in_worker=rig.budget.in_worker)
    bad = Rig(tmp_path / "bad", budget=rig.budget)
    bad.proxy.answer = lambda request: response(200, b" " * SMALL_BYTES, length=large)
    bad.proxy.kept = True
    bad.proxy.serve_in(nursery)
    rig.proxy.logs = {"mb_measurement_list": "A" * (2 * SMALL_BYTES)}
    async with trio.open_nursery() as asking:
        for _ in range(50):
            asking.start_soon(bad.host(ima=True, provider="bad").round)
        await trio.testing.wait_all_tasks_blocked()
        assert len(bad.proxy.asked) == 50
        assert rig.budget.held == 2 * large
        began = trio.current_time()
        assert await rig.host(uefi=True).round() is State.INVALID_QUOTE  # judged: it is not a log
        assert trio.current_time() == began
        asking.cancel_scope.cancel()
    assert rig.budget.held == 0


# --- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
async def test_no_log_is_asked_for_and_none_is_read_where_no_policy_reads_one(
    autojump_clock: Jumping, rig: Rig, chunked: bool
) -> None:
    head = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {1 << 20}"
    body = b"10001\r\n" + b" " * 0x10001 if chunked else b" " * (1 << 20)
    rig.proxy.answer = lambda request: f"HTTP/1.1 200 X\r\n{head}\r\n\r\n".encode() + body
    host = rig.host(max_retries=0)
    assert await host.round() is State.FAILED
    assert isinstance(host.error, ReplyError)
    assert f"larger than {SMALL_BYTES} bytes" in str(host.error)
    assert [request.logs for _, request in rig.proxy.asked] == [False]
    await rig.host(ima=True, max_retries=0).round()
    await rig.host(uefi=True, max_retries=0).round()
    assert [request.logs for _, request in rig.proxy.asked] == [False, True, True]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 9000, "pieces"),
        (b"HTTP/1.1 102 X\r\n\r\n" * 9000, "too many interim answers"),
    ],
)
async def test_an_answer_that_costs_more_than_its_bytes_is_given_up(
    autojump_clock: Jumping, rig: Rig, answer: bytes, problem: str
) -> None:
    """Each piece costs the event loop of all hosts the same, however small it is."""
    rig.proxy.answer = lambda request: answer
    host = rig.host(max_retries=0)
    assert await host.round() is State.FAILED
    assert problem in str(host.error)


async def test_a_front_may_cut_an_answer_and_say_one_thing_before(
    autojump_clock: Jumping, rig: Rig
) -> None:
    def cut(request: QuoteRequest) -> bytes:
        body = rig.proxy.good(request).partition(b"\r\n\r\n")[2]
        chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:])]
        head = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"
        return b"HTTP/1.1 103 X\r\n\r\n" + head + b"".join(chunks) + b"0\r\n\r\n"

    rig.proxy.answer = cut
    assert await rig.host().round() is State.TRUSTED


async def test_large_answers_are_parsed_beside_the_event_loop_one_at_a_time(
    autojump_clock: Jumping, rig: Rig
) -> None:
    now, most, seen = 0, 0, []

    async def worker(work: object, body: bytes) -> object:
        nonlocal now, most
        now += 1
        most = max(most, now)
        seen.append(len(body))
        await trio.sleep(1)
        now -= 1
        assert callable(work)
        return work(body)

    rig.budget = Budget(in_worker=worker)
    rig.proxy.logs = {"mb_measurement_list": "A" * (2 * SMALL_BYTES)}
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(rig.host(uefi=True).round)
        nursery.start_soon(rig.host().round)
    assert most == 1
    assert len(seen) == 3  # the last one is refused for its size


async def test_a_large_answer_in_chunks_takes_room_too(autojump_clock: Jumping, rig: Rig) -> None:
    held: list[int] = []

    async def worker(work: Callable[[bytes], object], body: bytes) -> object:
        held.append(rig.budget.held)
        await trio.lowlevel.checkpoint()
        return work(body)

    def chunked(request: QuoteRequest) -> bytes:
        body = rig.proxy.good(request).partition(b"\r\n\r\n")[2]
        head = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"
        return head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)

    rig.budget = Budget(in_worker=worker)
    rig.proxy.logs = {"mb_measurement_list": "A" * (2 * SMALL_BYTES)}
    rig.proxy.answer = chunked
    await rig.host(uefi=True).round()
    assert len(held) == 1
    assert held[0] > 2 * SMALL_BYTES


async def test_a_connection_that_does_not_come_has_a_deadline(autojump_clock: Jumping) -> None:
    connection = ProxyConnection(trio.sleep_forever, "h")
    async with Budget().room("p") as room:
        with trio.fail_after(100), pytest.raises(ReplyError, match="no connection within 10 s"):
            await connection.get("/", 1000, room)


async def test_the_host_s_certificates_have_a_deadline(autojump_clock: Jumping, rig: Rig) -> None:
    class AsksTheHost(FakeAks):
        async def trusted(
            self, name: str, rules: HostRules, ask_host: AskHost | None = None
        ) -> Trust:
            assert ask_host is not None
            await ask_host()
            return await super().trusted(name, rules)

    rig.aks = AsksTheHost(rig.proxy.tpm)
    rig.proxy.identity = response(200, b"{", length=1000)
    host = rig.host(timeout_s=2.0, max_retries=0, round_limit_s=20.0)
    assert await host.round() is State.FAILED
    assert str(host.error) == "no complete identity within 2 s"


# --- what is left of a bad host's answer ---------------------------------------------------------------


@pytest.mark.parametrize("length", [1 << 20, 2 << 20])
async def test_the_error_that_is_kept_does_not_keep_the_answer(
    autojump_clock: Jumping, rig: Rig, length: int
) -> None:
    """Two thousand hosts would hold two thousand answers, outside of any budget."""
    rig.proxy.answer = lambda request: response(200, b" " * (1 << 20), length=length)
    host = rig.host(ima=True, max_retries=1, timeout_s=1.0)
    assert await host.round() is not State.TRUSTED
    assert host.error is not None
    assert largest_bytes_held_by(host.error) < 1 << 16


def largest_bytes_held_by(error: BaseException) -> int:
    """The size of the largest byte string that an error keeps alive: by its traceback, above all."""
    seen: dict[int, object] = {}
    queue: list[object] = [error]
    while queue:
        one = queue.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
            continue
        seen[id(one)] = one
        queue += gc.get_referents(one)
    return max((len(one) for one in seen.values() if isinstance(one, bytes | bytearray)), default=0)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_a_connection_that_is_refused_leaves_no_cycle(name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # nothing listens there
        endpoint = Endpoint(host=name, port=port, context=None, server_name=name)

        async def refused() -> None:
            with pytest.raises(OSError):  # of one address, or of all that a name has
                await endpoint.connect()

        await refused()
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                await refused()
            found = gc.collect()
        finally:
            gc.enable()
    assert found == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_an_address_is_connected_to(address: str) -> None:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host=address)
        port = listener.socket.getsockname()[1]
        endpoint = Endpoint(host=address, port=port, context=None, server_name="x")
        async with await endpoint.connect() as ours, await listener.accept() as theirs:
            await ours.send_all(b"x")
            assert await theirs.receive_some(1) == b"x"
        await listener.aclose()
        nursery.cancel_scope.cancel()
