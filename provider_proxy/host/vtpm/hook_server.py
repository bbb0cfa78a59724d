"""The hooks' server: a unix socket, one line in, one line out.

Accepts root and the swtpm user only, by the peer's uid from the kernel. Every wait has a deadline and
every user a limit of connections. Does not use the registry; the handler does.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, Protocol

import trio

from provider_proxy.common.few_lines import FewLines
from provider_proxy.errors import ProviderProxyError
from provider_proxy.host.vtpm.messages import (
    MAX_LINE_BYTES,
    encode_error,
    encode_good,
    parse_message,
)
from provider_proxy.host.vtpm.requests import CertificateRequest

log = logging.getLogger(__name__)

LINE_LIMIT_S = 5.0  # a hook sends its line at once
ANSWER_LIMIT_S = 18.0  # less than the 20 s after which the hook gives up
SEND_LIMIT_S = 5.0
CONNECTIONS_A_USER = 64  # a host that boots starts several VMs at a time
LINES_A_MINUTE = 20
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)


class HookStream(Protocol):
    """A connection from the listener."""

    @property
    def socket(self) -> Any:
        """For the peer's credentials from the kernel."""
        ...

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        """Some bytes; empty at the end."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send it all."""
        ...

    async def aclose(self) -> None:
        """Close it."""
        ...


class HookListener(Protocol):
    """A listening socket."""

    async def serve(self, handler: Callable[[HookStream], Awaitable[None]]) -> NoReturn:
        """Serve each connection in a task of its own."""
        ...


class Handler(Protocol):
    """What answers the hooks: the vTPM service."""

    async def certify(self, request: CertificateRequest) -> bytes | None:
        """Register an EK; returns a certificate, or None where swtpm_localca is to make one.

        Raises:
            VtpmError, HostError, ServiceError: it was not registered, or no certificate was made.
        """
        ...


class HookServer:
    """Serves hooks' connections.

    Args:
        uid: of the swtpm user.
        observe: counts messages, by operation and outcome.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        uid: int,
        observe: Callable[[str, str], None],
    ) -> None:
        self._handler = handler
        self._uids = {uid, 0}
        self._observe = observe
        self._open: Counter[int] = Counter()
        self._lines = FewLines(LINES_A_MINUTE)

    async def serve(self, stream: HookStream) -> None:
        """Serve one connection and close it."""
        async with aclosing(stream):
            try:
                uid = peer_uid(stream)
                if uid not in self._uids:
                    self._observe("connect", "refused")
                    self._warn(
                        "uid %d may not connect to vtpm.socket; only root and vtpm.swtpm_user may",
                        uid,
                    )
                    return
                if self._open[uid] >= CONNECTIONS_A_USER:
                    self._observe("connect", "too many")
                    return
                self._open[uid] += 1
                try:
                    await self._converse(stream)
                finally:
                    self._open[uid] -= 1
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                self._observe("connect", "gone")
            except Exception:
                # A bug that shows with one hook must not end the service for the tenants.
                log.exception("hooks: a connection ended with an unexpected error")
                self._observe("connect", "bug")

    def _warn(self, text: str, *values: object) -> None:
        """Log a line unless this minute's lines are used up: a process must not fill the log."""
        more = self._lines.take()
        if more is not None:
            log.warning("hooks: " + text + "%s", *values, more)

    async def _converse(self, stream: HookStream) -> None:
        line = b""
        with trio.move_on_after(LINE_LIMIT_S):
            line = await read_line(stream)
        if not line.endswith(b"\n"):
            self._observe("connect", "no line")
            return
        with trio.move_on_after(SEND_LIMIT_S + ANSWER_LIMIT_S):
            answer = await self._answer(line)
            with trio.move_on_after(SEND_LIMIT_S):
                await stream.send_all(answer)

    async def _answer(self, line: bytes) -> bytes:
        op = "message"
        try:
            request = parse_message(line)
            op = "certify"
            with trio.fail_after(ANSWER_LIMIT_S):
                answer = encode_good(await self._handler.certify(request))
        except ProviderProxyError as exc:
            self._observe(op, type(exc).__name__)
            self._warn("%s refused: %s", op, exc)
            return encode_error(str(exc))
        except trio.TooSlowError:
            self._observe(op, "TooSlowError")
            log.error("hooks: %s took longer than %g s", op, ANSWER_LIMIT_S)
            return encode_error(f"no answer within {ANSWER_LIMIT_S:g} s")
        self._observe(op, "ok")
        return answer


def peer_uid(stream: HookStream) -> int:
    """The peer's uid from the kernel. Raises: OSError where the peer is gone."""
    data = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    assert isinstance(data, bytes)
    uid: int = _UCRED.unpack(data)[1]
    return uid


async def read_line(stream: HookStream, limit: int = MAX_LINE_BYTES) -> bytes:
    """Bytes up to a newline, at most `limit`; bytes after it are dropped."""
    line = b""
    while b"\n" not in line and len(line) < limit:
        part = await stream.receive_some(limit - len(line))
        if not part:
            break
        line += part
    head, newline, _ = line.partition(b"\n")
    return head + newline
