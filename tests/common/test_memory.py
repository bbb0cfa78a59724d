"""The garbage collector comes by the clock, whatever its thresholds say."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import FakeQuoter, daemon_with, plain_toml, until

from provider_proxy.common import memory
from provider_proxy.host.config.load import load_config


class Cycle:
    def __init__(self) -> None:
        self.itself = self


async def test_a_cycle_is_freed_by_the_clock(autojump_clock: trio.testing.MockClock) -> None:
    gc.disable()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(memory.collect)
            for wait_s in (memory.GC_EVERY_S - 1, memory.GC_EVERY_S - 2):
                ref = weakref.ref(Cycle())
                await trio.sleep(wait_s)
                assert ref() is not None
                await trio.sleep(2)
                assert ref() is None
            nursery.cancel_scope.cancel()
    finally:
        gc.enable()


async def test_between_full_collections_what_is_young_is_collected(
    autojump_clock: trio.testing.MockClock,
) -> None:
    old = Cycle()
    gc.collect()
    gc.disable()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(memory.collect, young_s=1.0, full_s=10.0))
            await trio.sleep(0.5)
            young, left = weakref.ref(Cycle()), weakref.ref(old)
            del old
            await trio.sleep(1)
            assert young() is None
            assert left() is not None
            await trio.sleep(8)
            assert left() is not None
            await trio.sleep(1)
            assert left() is None
            nursery.cancel_scope.cancel()
    finally:
        gc.enable()


def test_what_lasts_is_not_walked_again() -> None:
    kept = Cycle()
    left = weakref.ref(kept)
    try:
        memory.settle()
        del kept
        gc.collect()
        assert left() is not None
        memory.settle()  # after a reload: what it took the place of goes
        assert left() is None
    finally:
        gc.unfreeze()


async def test_the_daemon_collects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GC_EVERY_S", 0.01)
    path = tmp_path / "config.toml"
    path.write_text(plain_toml(tmp_path))
    async with daemon_with(FakeQuoter(), load_config(path, environ={})):
        gc.disable()
        try:
            ref = weakref.ref(Cycle())
            await until(lambda: ref() is None)
        finally:
            gc.enable()
