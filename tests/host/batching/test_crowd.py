"""Slow and hostile clients in numbers, at the real daemon; a good tenant is served all the same."""

from __future__ import annotations

import contextlib
import random
import signal
from pathlib import Path

import pytest
import trio
from helpers import (
    LIMIT_S,
    Asker,
    connect,
    plain_toml,
    quote_over,
    serving,
    trusted_ak,
)

pytestmark = pytest.mark.real

SLOW = 1000
ROOM = "[limits]\nmax_connections = 600\nmax_connections_per_address = 200\n"


async def drip(address: str, source: str, nursery: trio.Nursery) -> None:
    """A connection that sends a byte of a request now and then, as long as it may."""
    host, _, port = address.rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port), local_address=source)

    async def go_on() -> None:
        async with stream:
            for byte in b"GET /verifier/quote?nonce=" * 100:
                try:
                    await stream.send_all(bytes([byte]))
                except trio.BrokenResourceError:
                    return
                await trio.sleep(random.uniform(0.5, 1.5))

    nursery.start_soon(go_on)


async def test_a_thousand_slow_clients_do_not_keep_a_tenant_out(tmp_path: Path) -> None:
    async with serving(tmp_path, plain_toml(tmp_path / "s", tables=ROOM)) as daemon:
        asker = Asker(await trusted_ak(daemon.address))
        async with trio.open_nursery() as nursery:
            for number in range(SLOW):
                await drip(daemon.address, f"127.0.0.{2 + number % 200}", nursery)
            with trio.fail_after(LIMIT_S):
                for _ in range(10):
                    async with connect(daemon.address) as wire:
                        await quote_over(wire, asker)
            nursery.cancel_scope.cancel()
        assert await daemon.stop(signal.SIGTERM) == 0


async def test_one_address_cannot_take_every_place(tmp_path: Path) -> None:
    """The first 200 of it stay, later ones are closed; another address comes in."""
    async with serving(tmp_path, plain_toml(tmp_path / "s", tables=ROOM)) as daemon:
        asker = Asker(await trusted_ak(daemon.address))
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                await drip(daemon.address, "127.0.0.9", nursery)
            host, _, port = daemon.address.rpartition(":")
            with trio.fail_after(LIMIT_S):
                extra = await trio.open_tcp_stream(host, int(port), local_address="127.0.0.9")
                async with extra:
                    with contextlib.suppress(trio.BrokenResourceError):  # closed with a reset
                        assert await extra.receive_some(1) == b""
                async with connect(daemon.address) as wire:
                    await quote_over(wire, asker)
            nursery.cancel_scope.cancel()
