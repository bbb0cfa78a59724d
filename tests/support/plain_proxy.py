"""A proxy on a port of loopback over a `SoftTpm`, which can be made to lie, to hang and to go away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
from helpers import free_port
from watch_helpers import FakeProxy

from provider_proxy.testing.soft_tpm import SoftTpm


@dataclass
class PlainProxy:
    """The fake and where it listens.

    Attributes:
        fake: its `answer` and `tpm` may be replaced at any time.
    """

    port: int = field(default_factory=free_port)
    fake: FakeProxy = field(default_factory=FakeProxy)
    _scope: trio.CancelScope | None = None

    @property
    def rules(self) -> dict[str, object]:
        """What the watcher's file says of it."""
        return {
            "provider_ip": "127.0.0.1",
            "provider_port": self.port,
            "insecure_plaintext": True,
        }

    async def serve(self, nursery: trio.Nursery) -> None:
        """Begin to listen."""
        self._scope = trio.CancelScope()
        await nursery.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[object]) -> None:
        assert self._scope is not None
        with self._scope:
            await trio.serve_tcp(
                self.fake._serve, self.port, host="127.0.0.1", task_status=task_status
            )

    async def close(self) -> None:
        """Go away: connections break and none is accepted."""
        assert self._scope is not None
        self._scope.cancel()
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def plain_proxies(count: int, **pcrs: bytes) -> AsyncIterator[list[PlainProxy]]:
    """Some of them, each with a TPM of its own."""
    del pcrs
    async with trio.open_nursery() as nursery:
        proxies = [PlainProxy(fake=FakeProxy(SoftTpm(pcrs={0: b"firmware"}))) for _ in range(count)]
        for proxy in proxies:
            await proxy.serve(nursery)
        yield proxies
        nursery.cancel_scope.cancel()
