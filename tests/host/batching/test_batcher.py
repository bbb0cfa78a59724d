"""The batching rule, with a threadless quoter on trio's mock clock: no threads, exact times."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable

import pytest
import trio
import trio.testing
from batch_helpers import ALL, ISOLATED, QUOTE_S, WINDOW_S, Asker, make_request, running, tenant
from helpers import FakeQuoter

from provider_proxy.errors import (
    ClientGoneError,
    DeadlineError,
    DrainingError,
    NotFoundError,
    OverloadedError,
    ParameterError,
    QuoteError,
    SelfCheckError,
    TenantLimitError,
    TpmError,
)
from provider_proxy.evidence.model import (
    HashAlg,
    HostLogs,
    Quote,
    QuoteRequest,
    Tenant,
    TrustedHost,
)
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier
from provider_proxy.evidence.wire import LogsPart, encode_logs
from provider_proxy.host.batching.batch import Answer
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.batching.queue import BatchSettings, Line
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.tpm.state import ChipState
from provider_proxy.testing.soft_tpm import SoftTpm


def check(tpm: SoftTpm, request: QuoteRequest, answer: Answer) -> None:
    """As its tenant would."""
    history = MemoryHistory()
    history.open(request.nonce)
    Verifier(UnsafeAcceptAny()).verify(
        b"".join(answer.body()),
        Challenge(request=request, made_at_s=0),
        TrustedHost(ak=tpm.ak),
        history,
        now_s=1,
    )


async def test_a_window_is_one_quote_and_everybody_verifies(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        requests = [await asker.ask(make_request(1 << n)) for n in range(9)]
        await trio.sleep(WINDOW_S + QUOTE_S + 0.01)
        assert len(quoter.quotes) == 1
        assert quoter.quotes[0][2] == 0x1FF  # the OR of the masks
        for request in requests:
            check(quoter.tpm, request, asker.answers[request])
        assert {a.proof.tree_size for a in asker.answers.values()} == {16}
        assert len({a.proof.leaf_index for a in asker.answers.values()}) == 9


async def test_a_lone_request_waits_for_window_and_quote(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        begin = trio.current_time()
        request = await asker.ask()
        await trio.sleep(1)
        assert asker.times[request] - begin == pytest.approx(WINDOW_S + QUOTE_S, abs=1e-6)
        assert asker.answers[request].proof.tree_size == 2
        assert asker.answers[request].queued_s == pytest.approx(WINDOW_S, abs=1e-6)


async def test_a_window_of_zero_does_not_wait(autojump_clock: trio.testing.MockClock) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter, window_s=0.0) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        begin = trio.current_time()
        request = await asker.ask()
        await trio.sleep(1)
        assert asker.times[request] - begin == pytest.approx(QUOTE_S, abs=1e-6)


async def test_while_the_chip_is_busy_the_next_batch_collects(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Requests that come during a quote share the next one, however many windows it is long."""
    quoter = FakeQuoter(delay_s=1.0)
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        await asker.ask()
        await trio.sleep(WINDOW_S + 0.01)  # the first quote has begun
        for _ in range(8):
            await asker.ask()
            await trio.sleep(0.1)  # two windows each
        await trio.sleep(3)
        assert len(quoter.quotes) == 2
        assert len(asker.answers) == 9


async def test_a_full_batch_does_not_wait_for_the_window(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with (
        running(quoter, window_s=30.0, max_leaves=4) as batcher,
        trio.open_nursery() as nursery,
    ):
        asker = Asker(batcher, nursery)
        for _ in range(4):
            await asker.ask()
        await trio.sleep(QUOTE_S + 0.01)
        assert len(asker.answers) == 4


async def test_more_than_a_batch_holds_goes_into_the_next(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter, max_leaves=4) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        for _ in range(10):
            await asker.ask()
        await trio.sleep(WINDOW_S + 3 * QUOTE_S + 0.1)
        assert len(asker.answers) == 10
        assert len(quoter.quotes) == 3


async def test_a_resting_chip_is_not_asked(autojump_clock: trio.testing.MockClock) -> None:
    """The duty's pause is kept; what comes meanwhile shares one batch."""
    quoter = FakeQuoter(delay_s=QUOTE_S, pause_s=1.0)
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        await asker.ask()
        await trio.sleep(WINDOW_S + QUOTE_S + 0.01)
        begin = trio.current_time()
        late = [await asker.ask() for _ in range(3)]
        await trio.sleep(3)
        assert len(quoter.quotes) == 2
        assert all(asker.times[request] - begin > 0.9 for request in late)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, HashAlg.SHA256, ALL), (1, HashAlg.SHA1, ALL)),  # bank
        ((1, HashAlg.SHA256, ALL), (1 | 1 << 10, HashAlg.SHA256, ALL)),  # an isolated PCR
        ((1, HashAlg.SHA256, ALL), (1, HashAlg.SHA256, 0xFF)),  # allowed PCRs
    ],
)
async def test_unlike_requests_never_share_a_quote(
    autojump_clock: trio.testing.MockClock,
    one: tuple[int, HashAlg, int],
    other: tuple[int, HashAlg, int],
) -> None:
    quoter = FakeQuoter()
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        for mask, bank, allow in (one, other):
            await asker.ask(make_request(mask, bank), tenant(f"t{allow}{bank}{mask}", allow))
        await trio.sleep(1)
        assert len(asker.answers) == 2
        assert len(quoter.quotes) == 2


async def test_a_tenant_never_receives_a_pcr_it_may_not_see(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter()
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        narrow = await asker.ask(make_request(0b01), tenant("narrow", 0b01))
        await asker.ask(make_request(0b11), tenant("wide", 0b11))
        await trio.sleep(1)
        masks = sorted(mask for _, _, mask in quoter.quotes)
        assert masks == [0b01, 0b11]
        body = b"".join(asker.answers[narrow].body())
        assert b'"mask":"0x1"' in body


async def test_a_foreign_pcr_is_refused_before_it_takes_a_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter()
    async with running(quoter) as batcher:
        with pytest.raises(ParameterError) as caught:
            await batcher.submit(make_request(0b10), tenant("t", 0b01), timeout_s=9)
        assert caught.value.parameter == "mask"
    assert not quoter.quotes


async def test_batch_keys_take_turns(autojump_clock: trio.testing.MockClock) -> None:
    """A key whose line is never empty does not keep another from its turn."""
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter, max_leaves=2) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        for _ in range(20):
            await asker.ask(make_request(1))
        begin = trio.current_time()
        other = await asker.ask(make_request(1 << 23))
        await trio.sleep(20 * QUOTE_S)
        assert asker.times[other] - begin < WINDOW_S + 3 * QUOTE_S


async def test_tenants_take_turns_in_a_line(autojump_clock: trio.testing.MockClock) -> None:
    """One tenant's flood delays another by one more batch at most."""
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter, max_leaves=4) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        for _ in range(40):
            await asker.ask(who=tenant("flood"))
        begin = trio.current_time()
        good = await asker.ask(who=tenant("good"))
        await trio.sleep(20 * QUOTE_S)
        assert asker.times[good] - begin < WINDOW_S + 2 * QUOTE_S


async def test_a_tenant_has_two_kinds_waiting_at_most(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        who = tenant("many masks")
        await asker.ask(make_request(1 << 23), who)
        await asker.ask(make_request(1 << 16), who)
        third = await asker.ask(make_request(1 << 15), who)
        assert isinstance(asker.errors[third], TenantLimitError)
        # Joining another tenant's line counts as well.
        await asker.ask(make_request(1 << 14), tenant("other"))
        joining = await asker.ask(make_request(1 << 14), who)
        assert isinstance(asker.errors[joining], TenantLimitError)
        again = await asker.ask(make_request(1 << 23), who)
        await trio.sleep(2)
        assert again in asker.answers


async def test_kinds_are_bounded_over_all_tenants(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter, isolate_mask=ALL) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        requests = [await asker.ask(make_request(n)) for n in range(1, 70)]
        refused = [r for r in requests if isinstance(asker.errors.get(r), OverloadedError)]
        assert len(refused) == 69 - 64
        nursery.cancel_scope.cancel()


async def test_a_full_queue_refuses_with_a_time_to_come_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter, max_queue=3) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        for _ in range(3):
            await asker.ask()
        fourth = await asker.ask()
        error = asker.errors[fourth]
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s is not None
        assert error.retry_after_s >= 1
        await trio.sleep(1)
        fifth = await asker.ask()
        await trio.sleep(1)
        assert fifth in asker.answers


async def test_a_wait_beyond_the_deadline_is_refused_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=10.0)
    async with running(quoter, max_leaves=1) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        for _ in range(3):
            await asker.ask()
        late = await asker.ask(timeout_s=15.0)
        assert isinstance(asker.errors[late], OverloadedError)
        patient = await asker.ask(timeout_s=100.0)
        await trio.sleep(60)
        assert patient in asker.answers


async def test_who_hung_up_is_not_quoted(autojump_clock: trio.testing.MockClock) -> None:
    quoter = FakeQuoter()
    metrics = Metrics()
    async with running(quoter, metrics=metrics) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        gone = await asker.ask(make_request(0b10), is_gone=lambda: True)
        here = await asker.ask(make_request(0b01), is_gone=lambda: False)
        await trio.sleep(1)
        assert isinstance(asker.errors[gone], ClientGoneError)
        assert here in asker.answers
        assert [mask for _, _, mask in quoter.quotes] == [0b01]
        assert metrics.registry.get_sample_value("provider_proxy_abandoned_total") == 1


async def test_a_batch_of_none_takes_no_quote(autojump_clock: trio.testing.MockClock) -> None:
    quoter = FakeQuoter()
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        await asker.ask(is_gone=lambda: True)
        await trio.sleep(1)
        assert not quoter.quotes
        later = await asker.ask()
        await trio.sleep(1)
        assert later in asker.answers


async def test_a_cancelled_request_leaves_its_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its place in the queue, its line and its mask go with it."""
    quoter = FakeQuoter()
    async with running(quoter, max_queue=1) as batcher, trio.open_nursery() as nursery:
        with trio.move_on_after(0.01):
            await batcher.submit(make_request(1 << 23), tenant(), timeout_s=9)
        asker = Asker(batcher, nursery)
        request = await asker.ask(make_request(1))
        await trio.sleep(1)
        assert request in asker.answers
        assert [mask for _, _, mask in quoter.quotes] == [1]


async def test_a_failed_quote_reaches_every_waiter_and_the_loop_goes_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter()
    quoter.error = TpmError("TPM2_Quote: something (0x0101)", code=0x101)
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        requests = [await asker.ask() for _ in range(5)]
        await trio.sleep(1)
        assert {type(asker.errors[request]) for request in requests} == {QuoteError}
        assert len({id(asker.errors[request]) for request in requests}) == 5
        assert "0x0101" not in str(asker.errors[requests[0]])  # not the tenants' business
        quoter.error = None
        again = await asker.ask()
        await trio.sleep(1)
        assert again in asker.answers


async def test_a_quote_that_takes_too_long_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """At the latest deadline of its batch: nobody waits longer."""

    class Hanging(FakeQuoter):
        @property
        def state(self) -> ChipState:
            return dataclasses.replace(super().state, expected_s=0.1)

    quoter = Hanging(delay_s=1000)
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        request = await asker.ask(timeout_s=5)
        patient = await asker.ask(timeout_s=9)
        await trio.sleep(8.9)
        assert not asker.errors
        await trio.sleep(0.2)
        assert isinstance(asker.errors[request], DeadlineError)
        assert isinstance(asker.errors[patient], DeadlineError)


async def test_trouble_is_told_at_once(autojump_clock: trio.testing.MockClock) -> None:
    quoter = FakeQuoter()
    async with running(quoter) as batcher:
        quoter.trouble = "the TPM is out of order"
        with pytest.raises(QuoteError) as caught:
            await batcher.submit(make_request(), tenant(), timeout_s=9)
        assert caught.value.retry_after_s is not None
        quoter.trouble = None
        await batcher.submit(make_request(), tenant(), timeout_s=9)


class LyingQuoter(FakeQuoter):
    """Quotes something else than it was asked for."""

    def __init__(self, lie: Callable[[Quote], Quote]) -> None:
        super().__init__()
        self._lie = lie

    async def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        return self._lie(await super().quote(qualifying, bank, mask))


@pytest.mark.parametrize(
    "lie",
    [
        lambda q: Quote(attest=q.attest, signature=bytes(len(q.signature)), pcrs=q.pcrs),
        lambda q: Quote(attest=q.attest[:-1] + b"?", signature=q.signature, pcrs=q.pcrs),
        lambda q: SoftTpm().quote(b"x" * 32, HashAlg.SHA256, 1),
        lambda q: Quote(attest=b"", signature=b"", pcrs=q.pcrs),
    ],
)
async def test_nothing_leaves_that_a_tenant_would_refuse(
    autojump_clock: trio.testing.MockClock, lie: Callable[[Quote], Quote]
) -> None:
    metrics = Metrics()
    async with (
        running(LyingQuoter(lie), metrics=metrics) as batcher,
        trio.open_nursery() as nursery,
    ):
        asker = Asker(batcher, nursery)
        request = await asker.ask()
        await trio.sleep(1)
        assert isinstance(asker.errors[request], SelfCheckError)
    assert metrics.registry.get_sample_value("provider_proxy_selfcheck_failures_total") == 1


async def test_a_quote_over_fewer_pcrs_than_asked_does_not_leave(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Narrow(FakeQuoter):
        async def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
            return await super().quote(qualifying, bank, mask & -mask)

    async with running(Narrow()) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        request = await asker.ask(make_request(0b11))
        await trio.sleep(1)
        assert isinstance(asker.errors[request], SelfCheckError)


async def test_drain_answers_what_waits_and_takes_nothing_new(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter, window_s=30.0) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        waiting = [await asker.ask(make_request(mask)) for mask in (1, 2, 1 << 23)]
        nursery.start_soon(batcher.drain)
        await trio.testing.wait_all_tasks_blocked()
        late = await asker.ask()
        assert isinstance(asker.errors[late], DrainingError)
        with trio.fail_after(10):
            await batcher.drain()
        assert all(request in asker.answers for request in waiting)
        assert len(quoter.quotes) == 2


async def test_stopping_lets_go_of_everybody(autojump_clock: trio.testing.MockClock) -> None:
    """In line, at the chip, and between the two tasks."""
    quoter = FakeQuoter(delay_s=100.0)
    async with trio.open_nursery() as nursery:
        async with running(quoter, max_leaves=2) as batcher:
            asker = Asker(batcher, nursery)
            for _ in range(7):
                await asker.ask(timeout_s=10_000)
            await trio.sleep(50)  # two are at the chip
        with trio.fail_after(1):
            await trio.testing.wait_all_tasks_blocked()
        assert len(asker.errors) == 7
        assert {type(error) for error in asker.errors.values()} == {DrainingError}
        with pytest.raises(DrainingError):
            await batcher.submit(make_request(), tenant(), timeout_s=9)


async def test_claims_are_fixed_at_the_seal_and_hashed_into_the_leaf(
    autojump_clock: trio.testing.MockClock,
) -> None:
    vm = uuid.UUID(int=7)
    state = {"running": True}

    def claims(who: Tenant, request: QuoteRequest) -> bytes:
        if not state["running"] or who.name != "owner":
            raise NotFoundError("no VM of yours with this UUID runs on this host")
        return b'{"vm":"%s"}' % str(request.vm).encode()

    quoter = FakeQuoter()
    async with running(quoter, claims=claims) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        good = await asker.ask(make_request(vm=vm), tenant("owner"))
        foreign = await asker.ask(make_request(vm=vm), tenant("stranger"))
        await trio.sleep(1)
        check(quoter.tpm, good, asker.answers[good])
        assert isinstance(asker.errors[foreign], NotFoundError)
        stops = await asker.ask(make_request(vm=vm), tenant("owner"))
        state["running"] = False
        await trio.sleep(1)
        assert isinstance(asker.errors[stops], NotFoundError)


async def test_without_claims_a_vm_is_not_found(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeQuoter()) as batcher:
        with pytest.raises(NotFoundError):
            await batcher.submit(make_request(vm=uuid.UUID(int=7)), tenant(), timeout_s=9)


async def test_logs_are_read_after_the_quote_and_go_to_who_asked(
    autojump_clock: trio.testing.MockClock,
) -> None:
    quoter = FakeQuoter()

    class Logs:
        async def read(self, requests: tuple[QuoteRequest, ...]) -> tuple[LogsPart | None, ...]:
            assert quoter.quotes
            return tuple(
                encode_logs(HostLogs(ima="10 x\n")) if r.mask & 1 else None for r in requests
            )

    async with running(quoter, logs=Logs()) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        with_logs, without = await asker.ask(make_request(1)), await asker.ask(make_request(2))
        await trio.sleep(1)
        assert b"ima_measurement_list" in b"".join(asker.answers[with_logs].body())
        assert b"ima_measurement_list" not in b"".join(asker.answers[without].body())
        check(quoter.tpm, with_logs, asker.answers[with_logs])


async def test_a_long_ima_list_keeps_nobody_else_waiting(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Slow:
        async def read(self, requests: tuple[QuoteRequest, ...]) -> tuple[LogsPart | None, ...]:
            if any(r.mask >> 10 & 1 for r in requests):
                await trio.sleep(20)
            return (None,) * len(requests)

    async with running(FakeQuoter(), logs=Slow()) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        slow = await asker.ask(make_request(1 << 10))
        await trio.sleep(1)
        quick = [await asker.ask(make_request(1)) for _ in range(3)]
        await trio.sleep(2)
        assert all(request in asker.answers for request in quick)
        assert slow not in asker.answers
        await trio.sleep(20)
        assert slow in asker.answers


async def test_a_thousand_in_a_real_worker_thread_all_verify() -> None:
    """The same with the tree worker that serves."""
    quoter = FakeQuoter()
    batcher = Batcher(
        quoter, BatchSettings(isolate_mask=ISOLATED, window_s=0.0, max_leaves=512), Metrics()
    )
    answers: dict[QuoteRequest, Answer] = {}

    async def one(number: int) -> None:
        request = make_request(1 + number % 255)
        answers[request] = await batcher.submit(request, tenant(str(number)), timeout_s=60)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(batcher.run)
            async with trio.open_nursery() as tenants:
                for number in range(1000):
                    tenants.start_soon(one, number)
            nursery.cancel_scope.cancel()
    assert len(answers) == 1000
    assert len(quoter.quotes) <= 4
    for request, answer in answers.items():
        check(quoter.tpm, request, answer)


def test_an_empty_line_is_never_ripe() -> None:
    line = Line()
    assert line.take(5) == []
    assert line.oldest == float("inf")
