"""Bounds what comes over a connection before an answer's body, for httpx.

httpcore skips interim answers (1xx) for as long as they come, and parses each: a server that sends
nothing else keeps an event loop busy until a deadline ends it. Neither library has a limit for that. So
the bytes of each head are counted here; the reader of a body bounds the body.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import httpcore
import httpx

MAX_HEAD_BYTES = 32 * 1024  # interim answers included; Keylime's heads have 300 bytes
READ_BYTES = 4096  # at a time, so that other tasks run in between

_left: ContextVar[list[int] | None] = ContextVar("_left", default=None)


async def trace(name: str, _info: dict[str, Any]) -> None:
    """httpcore's `trace` of a request: says when a head is waited for. It runs in the request's task."""
    if name == "http11.receive_response_headers.started":
        _left.set([MAX_HEAD_BYTES])
    elif name.startswith("http11.receive_response_headers."):
        _left.set(None)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        left = _left.get()
        if left is None:
            return await self._stream.read(max_bytes, timeout)
        data = await self._stream.read(min(max_bytes, READ_BYTES), timeout)
        left[0] -= len(data)
        if left[0] < 0:
            raise httpcore.RemoteProtocolError(f"more than {MAX_HEAD_BYTES} bytes before a body")
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, backend: httpcore.AsyncNetworkBackend) -> None:
        self._backend = backend

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(
            await self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        )

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._backend.connect_unix_socket(path, timeout, socket_options))

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


def bounded_transport(context: ssl.SSLContext, limits: httpx.Limits) -> httpx.AsyncHTTPTransport:
    """httpx's transport, with such streams. Its requests need the extension `trace`.

    httpx has no parameter for httpcore's backend; a test over a socket holds that this reaches it.
    """
    transport = httpx.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits)
    pool = transport._pool
    assert isinstance(pool, httpcore.AsyncConnectionPool)
    pool._network_backend = _Backend(pool._network_backend)
    return transport
