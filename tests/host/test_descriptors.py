"""Few open files: the servers stay open for who asks, the TPM and the admin listener keep theirs."""

from __future__ import annotations

import logging
import os
import re
import resource
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import command, connect, get, plain_toml, serving

from provider_proxy.common import descriptors
from provider_proxy.host.http.listeners import REPORT_S, RETRY_S, open_listeners

FEW = ("sh", "-c", 'ulimit -n 80; exec "$@"', "sh")


def test_all_that_may_be_open_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.__setitem__(0, pair[0]))
    assert descriptors.raise_limit() == 4096
    assert limits == [4096, 4096]
    open_now = len(os.listdir("/proc/self/fd"))
    assert descriptors.room(100) == pytest.approx(4096 - 100 - open_now, abs=2)
    assert descriptors.room(5000) == 0
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert descriptors.raise_limit() == descriptors.UNLIMITED
    assert descriptors.room(0) > 1_000_000


@pytest.mark.real
async def test_idle_connections_leave_files_for_all_else(tmp_path: Path) -> None:
    """With room for a few connections, many that say nothing; then quotes, probes, and no restart."""
    tables = '[limits]\nmax_connections = 4000\n[admin]\naddress = "127.0.0.1:0"\n'
    toml = plain_toml(tmp_path, tables=tables)
    async with serving(tmp_path, toml, launcher=FEW) as serve:
        address, admin = serve.addresses[0], serve.admin
        found = re.search(r"limits\.max_connections is 4000, .* allows only (\d+)", serve.log)
        assert found is not None
        assert 4 <= int(found[1]) <= 60

        async def works() -> None:
            assert (await get(admin, "/readyz")).status == 200
            reply = await get(address, f"/verifier/quote?nonce={os.urandom(16).hex()}&mask=0x1")
            assert reply.status == 200

        await works()
        async with AsyncExitStack() as stack:
            for _ in range(150):
                await stack.enter_async_context(connect(address))
            await works()
            for _ in range(40):
                await stack.enter_async_context(connect(admin))
            await works()
        await works()
        assert "Traceback" not in serve.log
        assert serve.log.count("\n") < 60


@pytest.mark.real
async def test_a_limit_that_is_too_low_is_said(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(plain_toml(tmp_path))
    done = await trio.run_process(
        [*FEW[:2], 'ulimit -n 40; exec "$@"', "sh", *command("serve", "--config", config)],
        check=False,
        capture_stderr=True,
    )
    assert done.returncode == 3
    assert b"the limit of open files is too low for a connection" in done.stderr


async def test_a_shortage_is_said_once_a_minute_and_ends_by_itself(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (listener,) = open_listeners("a test", ["127.0.0.1:0"], None)
    tries = 0
    short = True

    async def accept() -> None:
        nonlocal tries
        tries += 1
        if short:
            raise OSError(24, "Too many open files")
        await trio.sleep_forever()

    monkeypatch.setattr(listener, "accept", accept)

    async def handler(stream: object) -> None:
        raise AssertionError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, handler)
        await trio.sleep(2 * REPORT_S + 1)
        assert tries == pytest.approx((2 * REPORT_S + 1) / RETRY_S, rel=0.01)
        errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert len(errors) == 3
        assert "were not logged" in errors[1]
        short = False
        await trio.sleep(1)
        before = tries
        await trio.sleep(10)
        assert tries == before
        nursery.cancel_scope.cancel()
