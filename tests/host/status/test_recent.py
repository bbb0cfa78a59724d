"""What is remembered of the last minutes: bounded, and never a nonce."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import trio
import trio.testing
from batch_helpers import QUOTE_S, WINDOW_S, Asker, make_request, running
from helpers import FakeQuoter
from status_helpers import HOST, NONCE, TROUBLED, make_batch, make_board
from tpm_helpers import sample

from provider_proxy.errors import QuoteError, TpmError
from provider_proxy.host.batching.batch import Batch, SealedBy
from provider_proxy.host.batching.batcher import Queue
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.status import recent as module
from provider_proxy.host.status.recent import (
    MAX_LISTED,
    MAX_PAIRS,
    OTHERS,
    RING,
    SPAN_MINUTES,
    Recent,
)


class Clock:
    """Two clocks that a test moves."""

    def __init__(self) -> None:
        self.monotonic = 1000.0

    def recent(self) -> Recent:
        return Recent(clock=lambda: 5000.0 + self.monotonic, monotonic=lambda: self.monotonic)


def tenants_of(recent: Recent) -> dict[str, Any]:
    found: dict[str, Any] = recent.tenants()
    return found


def test_a_batch_is_remembered_by_the_calendar_s_clock() -> None:
    clock = Clock()
    recent = clock.recent()
    clock.monotonic = 1001.0
    recent.batch_done(
        make_batch(7, leaves=3, opened=1000.5, wait_s=0.25, by=SealedBy.CHIP, mask=0x8FF)
    )
    assert recent.batches() == [
        {
            "number": 7,
            "opened": 6000.5,
            "sealed": 6000.75,
            "done": 6001.0,
            "leaves": 3,
            "size": 4,
            "mask": "0x8ff",
            "bank": "sha256",
            "wait_ms": 250.0,
            "quote_ms": 188.0,
            "sealed_by": "chip",
            "outcome": "ok",
            "reason": "",
        }
    ]


def test_a_failed_batch_says_why_and_no_more_than_fits() -> None:
    recent = Clock().recent()
    error = QuoteError("the TPM gave no quote")
    error.__cause__ = TpmError("x" * 1000, code=0x101)
    recent.batch_done(make_batch(1, error=error))
    (batch,) = recent.batches()
    assert (batch["outcome"], batch["reason"]) == ("QuoteError", "x" * 200)


def test_the_ring_is_bounded() -> None:
    recent = Clock().recent()
    for number in range(RING + 10):
        recent.batch_done(make_batch(number, leaves=1))
    assert [batch["number"] for batch in recent.batches()] == list(range(10, RING + 10))


def test_no_nonce_is_remembered() -> None:
    recent = Clock().recent()
    recent.batch_done(make_batch(1, error=QuoteError("no")))
    recent.count("acme", "ok")
    everything = json.dumps(make_board(recent).results()) + repr(vars(recent))
    assert NONCE not in everything
    assert "b'" not in everything


def test_tenants_are_counted_by_reason_and_the_refused_come_first() -> None:
    recent = Clock().recent()
    for tenant, reason, count in (
        ("good", "ok", 5),
        ("better", "ok", 9),
        ("over", "TenantLimitError", 2),
        ("over", "ok", 1),
    ):
        for _ in range(count):
            recent.count(tenant, reason)
    assert tenants_of(recent) == {
        "span_s": 300,
        "answered": 15,
        "refused": 2,
        "listed": [
            {"name": "over", "answered": 1, "refused": {"TenantLimitError": 2}},
            {"name": "better", "answered": 9, "refused": {}},
            {"name": "good", "answered": 5, "refused": {}},
        ],
        "more": 0,
    }


def test_what_is_old_is_forgotten() -> None:
    clock = Clock()
    recent = clock.recent()
    for _ in range(SPAN_MINUTES + 3):
        recent.count("acme", "ok")
        clock.monotonic += 60
    clock.monotonic -= 60
    assert tenants_of(recent)["answered"] == SPAN_MINUTES
    clock.monotonic += 60 * SPAN_MINUTES
    assert tenants_of(recent)["listed"] == []


def test_many_who_look_cost_one_sum() -> None:
    clock = Clock()
    recent = clock.recent()
    recent.count("acme", "ok")
    assert tenants_of(recent)["answered"] == 1
    recent.count("acme", "ok")
    assert recent.tenants() is recent.tenants()
    clock.monotonic += module.FRESH_S
    assert tenants_of(recent)["answered"] == 2


def test_a_crowd_is_bounded() -> None:
    recent = Clock().recent()
    for number in range(MAX_PAIRS + 50):
        recent.count(f"tenant-{number}-{'x' * 500}", "ok")
    found = tenants_of(recent)
    assert found["answered"] == MAX_PAIRS + 50
    assert len(found["listed"]) == MAX_LISTED
    assert found["more"] == MAX_PAIRS + 1 - MAX_LISTED
    assert found["listed"][0] == {"name": OTHERS, "answered": 50, "refused": {}}
    assert all(len(t["name"]) <= module.MAX_NAME_CHARS for t in found["listed"])


# --- what the batcher hands over ------------------------------------------------------------------


async def test_why_a_batch_was_sealed(autojump_clock: trio.testing.MockClock) -> None:
    quoter, seen, metrics = FakeQuoter(delay_s=QUOTE_S), list[Batch](), Metrics()
    async with (
        running(quoter, max_leaves=4, observe=seen.append, metrics=metrics) as batcher,
        trio.open_nursery() as nursery,
    ):
        asker = Asker(batcher, nursery)
        await asker.ask()
        await trio.sleep(1)
        assert [batch.sealed_by for batch in seen] == [SealedBy.WINDOW]
        for _ in range(4):
            await asker.ask()
        await trio.sleep(1)
        assert [batch.sealed_by for batch in seen[1:]] == [SealedBy.FULL]
        await asker.ask()
        await trio.sleep(WINDOW_S + 0.01)  # the first is being quoted
        await asker.ask()
        await trio.sleep(1)
        assert [batch.sealed_by for batch in seen[2:]] == [SealedBy.WINDOW, SealedBy.CHIP]
        await asker.ask()
        await batcher.drain()
        assert seen[4].sealed_by is SealedBy.DRAIN
        assert all(batch.quote_s == pytest.approx(QUOTE_S) for batch in seen)
        assert batcher.queue == Queue(waiting=0, lines=0, oldest_s=0.0)
    for by, count in (("window", 2), ("full", 1), ("chip", 1), ("drain", 1)):
        assert sample(metrics, "batches_sealed_total", {"by": by}) == count


async def test_who_waits_can_be_seen(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeQuoter(), window_s=10.0) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        await asker.ask(make_request(1))
        await trio.sleep(2)
        await asker.ask(make_request(1 << 10))  # isolated: a line of its own
        await asker.ask(make_request(1 << 1))
        seen = batcher.queue
        assert (seen.waiting, seen.lines) == (3, 2)
        assert seen.oldest_s == pytest.approx(2, abs=1e-6)
        await batcher.drain()


async def test_a_batch_that_fails_is_handed_over(autojump_clock: trio.testing.MockClock) -> None:
    quoter, seen = FakeQuoter(delay_s=QUOTE_S), list[Batch]()
    quoter.error = QuoteError("the TPM refused")
    async with (
        running(quoter, observe=seen.append) as batcher,
        trio.open_nursery() as nursery,
    ):
        await Asker(batcher, nursery).ask()
        await trio.sleep(1)
        (batch,) = seen
        assert (batch.outcome, len(batch.waiters)) == ("QuoteError", 1)
        assert batch.quote_s == pytest.approx(QUOTE_S)


async def test_a_batch_is_one_line_of_the_log(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    quoter = FakeQuoter(delay_s=QUOTE_S)
    async with running(quoter) as batcher, trio.open_nursery() as nursery:
        asker = Asker(batcher, nursery)
        requests = [await asker.ask(make_request(0x81)) for _ in range(3)]
        await trio.sleep(1)
        quoter.error = QuoteError('refused\nINFO batch=9 "x"')
        await asker.ask()
        await trio.sleep(1)
    lines = [r.getMessage() for r in caplog.records if r.name == "provider_proxy.batch_report"]
    assert lines == [
        "batch=1 leaves=3 size=4 bank=sha256 mask=0x81 wait_ms=50.0 quote_ms=200.0 "
        "sealed_by=window outcome=ok",
        "batch=2 leaves=1 size=2 bank=sha256 mask=0x1 wait_ms=50.0 quote_ms=200.0 "
        'sealed_by=window outcome=QuoteError reason="refused\\nINFO batch=9 \\"x\\""',
    ]
    assert not any(request.nonce.decode() in line for request in requests for line in lines)


def test_the_queue_s_view_is_in_the_status() -> None:
    board = make_board(
        Clock().recent(),
        chip=TROUBLED,
        queue=Queue(waiting=3, lines=2, oldest_s=0.1234),
    )
    status: dict[str, Any] = board.results()
    assert status["state"] == "trouble"
    assert status["why"] == status["chip"]["trouble"] == "the TPM is out of order"
    assert status["queue"] == {"waiting": 3, "lines": 2, "oldest_ms": 123.4, "max_queue": 8192}
    assert status["host"]["ak_name"] == HOST["ak_name"]
    assert make_board(Clock().recent(), draining=True).results()["state"] == "draining"
