"""The status line: its words, how often it is told, and that a real daemon tells it."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import LIMIT_S, Asker, connect, plain_toml, quote_over, serving, trusted_ak

from provider_proxy.host.status import unit_line
from provider_proxy.host.status.recent import PastBatch
from provider_proxy.host.tpm.state import ChipState


def batch(number: int, *, leaves: int = 1, outcome: str = "ok") -> PastBatch:
    return PastBatch(
        number=number,
        opened=0.0,
        sealed=0.0,
        done=0.0,
        leaves=leaves,
        size=256,
        mask=1,
        bank="sha256",
        wait_ms=0.0,
        quote_ms=187.4,
        sealed_by="window",
        outcome=outcome,
        reason="",
    )


class Work:
    """What is done, and the chip, as far as the status line looks."""

    def __init__(self) -> None:
        self.last: PastBatch | None = None
        self.trouble: str | None = None

    def chip(self) -> ChipState:
        return ChipState(expected_s=0.1, pause_s=0.1, trouble=self.trouble)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    lines: list[tuple[float, str]] = []

    def notify(state: str, *, limit_s: float) -> None:
        assert limit_s == 0  # nobody waits for a line to be read
        lines.append((trio.current_time(), state))

    monkeypatch.setattr("provider_proxy.common.systemd.notify", notify)
    return lines


def test_words() -> None:
    line = unit_line.status_line
    assert line(None, 0, None) == "no batch yet; 0 waiting"
    assert line(batch(7), 0, None) == "batch 7: 1 leaf in 187 ms; 0 waiting"
    last = batch(812, leaves=143)
    assert line(last, 12, None) == "batch 812: 143 leaves in 187 ms; 12 waiting"
    bad = batch(813, leaves=2, outcome="QuoteError")
    assert line(bad, 1, None) == "batch 813: 2 leaves refused, QuoteError; 1 waiting"
    trouble = line(last, 12, "the TPM\nfailed " + "x" * 1000)
    assert trouble.startswith("no quotes: the TPM failed xxx")
    assert trouble.endswith("x; 12 waiting")
    assert len(trouble) < 300


async def test_at_most_once_a_second_and_only_what_is_new(
    autojump_clock: trio.testing.MockClock, told: list[tuple[float, str]]
) -> None:
    work = Work()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(unit_line.run, work, work.chip, lambda: 0)
        for number in range(1000):
            await trio.sleep(0.01)
            work.last = batch(number)
        busy = len(told)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert 9 <= busy <= 11
    assert len(told) <= busy + 1
    assert told[-1][1] == "STATUS=batch 999: 1 leaf in 187 ms; 0 waiting"
    assert all(after - before >= 1 for (before, _), (after, _) in itertools.pairwise(told))


@pytest.mark.real
async def test_a_real_daemon_tells_its_last_batch(tmp_path: Path) -> None:
    async with serving(tmp_path, plain_toml(tmp_path / "s")) as serve:
        assert [line for line, _ in serve.notify.status] == [unit_line.OPENING]
        asker = Asker(await trusted_ak(serve.address))
        async with connect(serve.address) as wire:
            await quote_over(wire, asker)
        line = ""
        with trio.fail_after(LIMIT_S):
            while "batch 1: " not in line:
                line = (await serve.notify.sock.recv(1000)).decode()
        assert line.startswith("STATUS=batch 1: 1 leaf in ")
        assert line.endswith(" ms; 0 waiting")
        assert await serve.stop(signal.SIGTERM) == 0
