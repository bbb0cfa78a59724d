"""Parts of the benchmarks that figures rest on: the frozen servers, and what counts as within 15 %."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import h11
import pytest
import trio
from helpers import LIMIT_S, connect, get_bytes
from tpm_helpers import swtpm_at

from provider_proxy.bench import bare, connections, ima, overload
from provider_proxy.bench.plan import point
from provider_proxy.bench.process import Target
from provider_proxy.bench.slow_chip import SlowChip
from provider_proxy.errors import HostError
from provider_proxy.host.batching.ima_wait import ImaWait
from provider_proxy.host.tpm.chip import close_context, open_context
from provider_proxy.testing.broker import Command
from provider_proxy.testing.disturb import CC_PCR_EXTEND, CC_QUOTE, CHIPS
from provider_proxy.testing.ima import extend

WAIT = ImaWait(mean_ms=24.0, p99_ms=77.0, execs_per_s=76.0)


async def test_the_bare_server_answers_as_the_door_does() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, partial(bare.serve, body=b"x" * 99), [listener])
        async with connect(f"127.0.0.1:{port}") as wire:
            for _ in range(2):
                await wire.send(get_bytes("/anything"))
                with trio.fail_after(LIMIT_S):
                    reply = await wire.reply()
                assert (reply.status, reply.body) == (200, b"x" * 99)
        nursery.cancel_scope.cancel()


def test_the_bare_server_knows_nothing_of_the_door() -> None:
    """A faster server must not make it faster, too."""
    code = (
        "import sys, provider_proxy.bench.bare; "
        "print([name for name in sys.modules if name.startswith('provider_proxy.host')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT_S
    )
    assert done.stdout.strip() == "[]"
    assert h11.__name__ in bare.serve.__globals__


@pytest.mark.real
def test_new_connections_against_the_bare_loop(tmp_path: Path) -> None:
    overload.make_certificates(tmp_path, 1)
    config = overload.tls_config(tmp_path, "state")
    with Target(tmp_path, "bare", config, module="provider_proxy.bench.bare_tls") as target:
        rate = connections.connect(target.host, target.port, tmp_path, 3, clients=2)
        assert rate > 0
        assert (
            connections.connect(target.host, target.port, tmp_path, 2, clients=1, nodelay=False) > 0
        )
        assert target.cpu_s() >= 0
        assert 0 < target.rss_mb() <= target.peak_rss_mb() + 1


@pytest.mark.parametrize("figure", ["mean_ms", "p99_ms", "execs_per_s"])
@pytest.mark.parametrize("factor", [0.84, 1.16])
def test_a_wait_that_is_not_within_15_percent(figure: str, factor: float) -> None:
    at = point("x", "infineon-p256", 100, 2)
    assert ima.compare(at, WAIT, WAIT, 10)["within_15_percent"] is True
    other = replace(WAIT, **{figure: getattr(WAIT, figure) * factor})
    row = ima.compare(at, WAIT, other, 10)
    assert row["within_15_percent"] is False
    assert json.dumps(row)


def command(code: int, asked: float, begin: float, end: float) -> Command:
    return Command(code=code, asked_s=asked, begin_s=begin, end_s=end)


def test_what_the_chip_and_what_the_machine_added() -> None:
    """The first extend waits for a quote, the second for the first, which its caller saw done late."""
    extends = ima.Extends(due=[10.1, 10.2], done=[10.61, 10.66], shell=[12.0])
    commands = [
        command(CC_QUOTE, 10.0, 10.0, 10.5),
        command(CC_PCR_EXTEND, 10.11, 10.5, 10.6),
        command(CC_PCR_EXTEND, 10.62, 10.62, 10.65),
        command(0x144, 10.7, 10.7, 10.8),
        command(CC_PCR_EXTEND, 11.98, 11.98, 11.99),
    ]
    one = ima.read_round(extends, commands)
    assert one.waits_ms == pytest.approx([490, 420])
    assert one.machine_ms == pytest.approx([20, 40])
    assert one.shell_s == pytest.approx([0.011])
    assert one.quotes_s == pytest.approx([0.5])
    assert one.others == 1
    assert one.extends_s == pytest.approx([0.1, 0.03, 0.01])
    with pytest.raises(HostError, match="executed other extends than"):
        ima.read_round(extends, commands[:-1])
    assert json.dumps(ima.compare(ima.POINTS[0], ima.wait_of(one), ima.wait_of(one), 2))


@pytest.mark.real
def test_a_slow_chip_tells_what_it_did(tmp_path: Path) -> None:
    with swtpm_at(tmp_path) as tpm, SlowChip(tpm.tcti, "amd-p256") as chip:
        assert chip.take() == []
        context = open_context(chip.tcti)
        for _ in range(2):
            extend(context)
        close_context(context)
        done = [each for each in chip.take() if each.code == CC_PCR_EXTEND]
        assert len(done) == 2
        for each in done:
            assert each.asked_s <= each.begin_s
            assert each.end_s - each.begin_s >= CHIPS["amd-p256"].extend_s
        assert chip.take() == []


def test_a_slow_chip_is_watched_for_longer() -> None:
    seconds = [ima.open_s(at) for at in ima.POINTS]
    assert min(seconds) == ima.OPEN_S
    assert max(seconds) == ima.LONGEST_OPEN_S == ima.open_s(ima.POINTS[3])


def test_a_round_s_median() -> None:
    rounds = [replace(WAIT, mean_ms=mean, p99_ms=p99) for mean, p99 in ((1, 9), (2, 7), (30, 8))]
    assert ima.median_of(rounds) == replace(WAIT, mean_ms=2, p99_ms=8)


def test_the_bounded_point_keeps_the_bound() -> None:
    (bounded,) = [at for at in ima.POINTS if "bounded" in at.name]
    assert bounded.scenario.max_duty * bounded.scenario.quote_s / 2 == pytest.approx(0.03)
