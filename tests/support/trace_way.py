"""The way of one nonce through the package, from the socket to the reply: which modules it enters.

    python tests/support/trace_way.py

A daemon of this process, over a real swtpm, answers one request. Each call of a function of the package,
and each return from one, is a step, in whichever thread; what runs before the request is sent and after
its reply has come does not count. Two steps in a row in different files are a change of module, in
different folders a change of folder.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType

import trio
from helpers import plain_toml

import provider_proxy
from provider_proxy.host import daemon
from provider_proxy.host.config.load import parse_config

ROOT = f"{Path(provider_proxy.__file__).parent}/"
REQUEST = b"GET /verifier/quote?nonce=%s&mask=0x1 HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"n" * 32)
LIMIT_S = 60


def changes(places: Sequence[str]) -> int:
    """How often one place is followed by another."""
    return sum(before != after for before, after in pairwise(places))


async def way() -> list[str]:
    """The files of the steps, relative to the package."""
    steps: list[str] = []

    def step(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event in ("call", "return") and name.startswith(ROOT):
            steps.append(name.removeprefix(ROOT))

    with tempfile.TemporaryDirectory() as folder, trio.fail_after(LIMIT_S):
        config = parse_config(tomllib.loads(plain_toml(Path(folder))))
        threading.setprofile(step)  # the workers' threads begin later
        async with trio.open_nursery() as nursery:
            started = await nursery.start(daemon.run, config)
            host, _, port = started.addresses[0].rpartition(":")
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await trio.sleep(0.5)  # the daemon has nothing else to do by now
                steps.clear()
                sys.setprofile(step)
                await stream.send_all(REQUEST)
                reply = await stream.receive_some(65536)
                sys.setprofile(None)
                taken = list(steps)
            nursery.cancel_scope.cancel()
        threading.setprofile(None)
    assert reply.startswith(b"HTTP/1.1 200 "), reply
    return taken


def main() -> None:
    """Print the figures."""
    steps = trio.run(way)
    print(f"calls and returns: {len(steps)}")
    print(f"modules: {len(set(steps))}")
    print(f"changes of module: {changes(steps)}")
    print(f"changes of folder: {changes([str(Path(step).parent) for step in steps])}")


if __name__ == "__main__":
    main()
