"""The daemon that is measured: the real one, on an embedded swtpm that may be slowed down.

`python -m provider_proxy.bench.target CONFIG [--quote-delay-ms N] [--baseline BYTES]` prints one JSON
line with its address when it is up, and serves until SIGTERM. With `--baseline` it is the bare
HTTP server instead, which answers every request with a constant of that many bytes.
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

from provider_proxy import daemon, http1
from provider_proxy.config import Config, load_config
from provider_proxy.metrics import Metrics
from provider_proxy.quoters.esys import EsysQuoter, open_quoter
from provider_proxy.tpm.disturb import delay_quotes
from provider_proxy.tpm.faulty import FaultyContext


def _open_slow(
    delay_s: float, config: Config, metrics: Metrics
) -> AbstractAsyncContextManager[EsysQuoter]:
    plan = delay_quotes(delay_s)
    return open_quoter(
        config.tpm, config.state_dir, metrics, open_context=lambda tcti: FaultyContext(tcti, plan)
    )


def _tell(address: str) -> None:
    print(json.dumps({"address": address}), flush=True)


async def _serve_daemon(config: Config, delay_s: float) -> None:
    opener = partial(_open_slow, delay_s) if delay_s else daemon.open_tpm
    async with trio.open_nursery() as nursery:
        started: daemon.Started = await nursery.start(
            partial(daemon.run, config, open_quoter=opener)
        )
        _tell(started.addresses[0])


async def _serve_constant(size: int) -> None:
    """The same HTTP server with nothing behind it."""
    response = http1.Response(body=(b"x" * size,))

    async def answer(_request: http1.Request) -> http1.Response:
        return response

    door = http1.Door(answer, observe=lambda status, reason: None, max_connections=100_000)
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    name = listener.socket.getsockname()
    _tell(f"{name[0]}:{name[1]}")
    daemon.tune_gc()
    await trio.serve_listeners(door.serve, [listener])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--quote-delay-ms", type=float, default=0.0)
    parser.add_argument("--baseline", type=int, default=0, metavar="BYTES")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    if args.baseline:
        trio.run(_serve_constant, args.baseline)
    else:
        trio.run(_serve_daemon, load_config(args.config), args.quote_delay_ms / 1000)


if __name__ == "__main__":
    main()
