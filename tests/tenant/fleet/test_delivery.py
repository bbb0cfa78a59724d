"""Deliveries from the outbox while a receiver is away: few tries, and nothing again that was taken."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from provider_proxy.tenant.fleet import outbox
from provider_proxy.tenant.fleet.delivery import DELIVERIES_AT_ONCE, Delivery


class Outbox:
    """The table, in memory; stands in for the database, whose work it answers itself."""

    def __init__(self, count: int) -> None:
        self.waiting = {
            n: outbox.Waiting(id=uuid.UUID(int=n), host=f"h{n}", body=b"%d" % n, tries=0)
            for n in range(count)
        }
        self.failed: list[uuid.UUID] = []

    async def run(self, work: Callable[..., Any]) -> Any:
        return work(self)


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def next_reports(table: Outbox, shards: Sequence[int]) -> list[outbox.Waiting]:
        return list(table.waiting.values())

    def delivered(table: Outbox, ids: Sequence[uuid.UUID]) -> None:
        for id_ in ids:
            del table.waiting[id_.int]

    def failed(table: Outbox, id_: uuid.UUID, wait_s: float) -> None:
        table.failed.append(id_)

    for name, function in (
        ("next_reports", next_reports),
        ("delivered", delivered),
        ("failed", failed),
    ):
        monkeypatch.setattr(outbox, name, function)


class Receiver:
    """Takes what `takes` says."""

    at_once = together = 1

    def __init__(self, name: str, takes: Callable[[bytes], bool]) -> None:
        self.name, self.takes = name, takes
        self.got: list[bytes] = []

    async def deliver(self, body: bytes) -> bool:
        self.got.append(body)
        return self.takes(body)


def make(table: Outbox, *sinks: Receiver) -> Delivery:
    return Delivery(table, sinks, lambda: [0], rng=random.Random(1))  # type: ignore[arg-type]


pytestmark = pytest.mark.usefixtures("patched")


async def test_a_receiver_that_is_away_is_tried_with_a_few() -> None:
    table, away = Outbox(150), Receiver("webhook", lambda _: False)
    delivery = make(table, away)
    pauses = [delivery._pause_s()]
    for _ in range(6):
        await delivery._round([0])
        pauses.append(delivery._pause_s())
    assert len(away.got) <= 6 * 2 * DELIVERIES_AT_ONCE
    assert pauses[0] < 1 < pauses[-1] <= 30
    away.takes = lambda _: True
    await delivery._round([0])
    assert not table.waiting
    assert delivery._pause_s() < 1


async def test_one_report_that_is_refused_holds_up_no_other() -> None:
    table, picky = Outbox(40), Receiver("webhook", lambda body: body != b"3")
    await make(table, picky)._round([0])
    assert list(table.waiting) == [3]
    assert table.failed == [uuid.UUID(int=3)]


async def test_who_has_taken_a_report_does_not_get_it_again() -> None:
    table = Outbox(3)
    lines, webhook = Receiver("stdout", lambda _: True), Receiver("webhook", lambda _: False)
    delivery = make(table, lines, webhook)
    await delivery._round([0])
    await delivery._round([0])
    webhook.takes = lambda _: True
    await delivery._round([0])
    assert not table.waiting
    assert sorted(lines.got) == [b"0", b"1", b"2"]  # hosts have no order among each other
    assert len(webhook.got) == 9
