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

from provider_proxy.bench import bare, connections, ima, overload
from provider_proxy.bench.plan import point
from provider_proxy.bench.process import Target
from provider_proxy.host.batching.ima_wait import ImaWait

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
    """A faster door must not make it faster, too."""
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


def test_a_round_s_median() -> None:
    rounds = [replace(WAIT, mean_ms=mean, p99_ms=p99) for mean, p99 in ((1, 9), (2, 7), (30, 8))]
    assert ima.median_of(rounds) == replace(WAIT, mean_ms=2, p99_ms=8)


def test_the_bounded_point_keeps_the_bound() -> None:
    (bounded,) = [at for at in ima.POINTS if "bounded" in at.name]
    assert bounded.scenario.max_duty * bounded.scenario.quote_s / 2 == pytest.approx(0.03)
