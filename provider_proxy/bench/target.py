"""The daemon that is measured: the real one, on an embedded swtpm that may be slowed down or
disturbed.

`python -m provider_proxy.bench.target CONFIG` prints one JSON line with its address when it is up, and
serves until SIGTERM. With `--baseline BYTES` it is the bare HTTP server instead, which answers every
request with a constant of that many bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import trio

from provider_proxy.bench import bare
from provider_proxy.common import memory
from provider_proxy.host import assembly, daemon
from provider_proxy.host.config.load import load_config
from provider_proxy.host.config.tables import Config
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.local_tpm import EsysQuoter, open_quoter
from provider_proxy.testing.disturb import (
    CHIPS,
    Plan,
    delay_quotes,
    refuse_some,
    slow_down,
    together,
)
from provider_proxy.testing.faulty import FaultyContext


def _open_disturbed(
    plan: Plan, config: Config, metrics: Metrics
) -> AbstractAsyncContextManager[EsysQuoter]:
    return open_quoter(
        config.tpm, config.state_dir, metrics, open_context=lambda tcti: FaultyContext(tcti, plan)
    )


LAG_EVERY_S = 0.005


def _tell(address: str) -> None:
    print(json.dumps({"address": address}), flush=True)


async def _serve_daemon(config: Config, plans: list[Plan], lag_file: Path | None) -> None:
    opener = partial(_open_disturbed, together(*plans)) if plans else assembly.open_quoter
    async with trio.open_nursery() as watching:
        async with trio.open_nursery() as nursery:
            started: daemon.Started = await nursery.start(
                partial(daemon.run, config, open_quoter=opener)
            )
            if lag_file is not None:
                watching.start_soon(_note_lag, lag_file)
            _tell(started.addresses[0])
        watching.cancel_scope.cancel()


async def _note_lag(path: Path) -> None:
    """Write how late the event loop wakes, in ms, every few ms until the end."""
    lags = []
    try:
        while True:
            due = trio.current_time() + LAG_EVERY_S
            await trio.sleep_until(due)
            lags.append(round((trio.current_time() - due) * 1000, 3))
    finally:
        path.write_text(json.dumps(lags))  # noqa: ASYNC240  # the end: nobody waits


async def _serve_bare(size: int) -> None:
    """The frozen server, which answers with a constant of so many bytes."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()
    _tell(f"{address[0]}:{address[1]}")
    memory.tune_gc()
    await trio.serve_listeners(partial(bare.serve, body=b"x" * size), [listener])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--quote-delay-ms", type=float, default=0.0)
    parser.add_argument("--chip", choices=sorted(CHIPS))
    parser.add_argument("--log-level", default="critical")
    parser.add_argument("--fault-share", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loop-lag", type=Path, metavar="FILE")
    parser.add_argument("--baseline", type=int, default=0, metavar="BYTES")
    args = parser.parse_args()
    logging.basicConfig(level=args.log_level.upper(), stream=sys.stderr)
    if args.baseline:
        trio.run(_serve_bare, args.baseline)
    else:
        plans = []
        if args.fault_share:
            plans.append(refuse_some(args.fault_share, args.seed))
        if args.chip:
            plans.append(slow_down(CHIPS[args.chip]))
        if args.quote_delay_ms:
            plans.append(delay_quotes(args.quote_delay_ms / 1000))
        trio.run(_serve_daemon, load_config(args.config, environ={}), plans, args.loop_lag)


if __name__ == "__main__":
    main()
