"""provider-proxy-vtpm's socket: the daemon sends a question, and gets one line or a stream of lines.

The socket comes from systemd (`provider-proxy-vtpm.socket`, for the daemon's user only) or is made at a
path. The peer's uid from the kernel is checked as well. Every wait has a deadline, every line a bound,
and the number of connections is small.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import socket
import stat
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import trio

from provider_proxy.common import systemd
from provider_proxy.errors import HostError, ProviderProxyError
from provider_proxy.host.vtpm.helper.eyes import Eyes
from provider_proxy.host.vtpm.hook_server import peer_uid, read_line
from provider_proxy.host.vtpm.sightings import (
    HEARTBEAT_S,
    MAX_QUESTION_BYTES,
    Alive,
    Gone,
    Holds,
    Sighting,
    Window,
    encode_word,
    parse_question,
)

log = logging.getLogger(__name__)

QUESTION_LIMIT_S = 5.0
SEND_LIMIT_S = 5.0  # a daemon that does not read is disconnected, and connects again
CHECK_LIMIT_S = 17.0  # less than the hook server waits
MAX_CONNECTIONS = 32
BACKLOG = 32


class Server:
    """Serves the daemon's connections.

    Args:
        uids: of users that may connect.
    """

    def __init__(self, eyes: Eyes, uids: Collection[int]) -> None:
        self._eyes = eyes
        self._uids = frozenset(uids)
        self._open = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection and close it."""
        async with stream:
            try:
                uid = peer_uid(stream)
                if uid not in self._uids:
                    log.warning("uid %d may not connect to this socket", uid)
                    return
                if self._open >= MAX_CONNECTIONS:
                    log.warning("refused a connection: %d are open already", MAX_CONNECTIONS)
                    return
                self._open += 1
                try:
                    await self._converse(stream)
                finally:
                    self._open -= 1
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                return
            except ProviderProxyError as exc:
                log.warning("a question was not answered: %s", exc)

    async def _converse(self, stream: trio.SocketStream) -> None:
        with trio.fail_after(QUESTION_LIMIT_S):
            line = await read_line(stream, MAX_QUESTION_BYTES)
        question = parse_question(line)
        if question != "watch":
            await _send(stream, encode_word(await self._check(question)))
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, stream, nursery.cancel_scope)
            await self._tell(stream)

    async def _check(self, vm: uuid.UUID) -> Window:
        with trio.move_on_after(CHECK_LIMIT_S):
            return await self._eyes.check(vm)
        return Window(open=False, holds=Holds(reading="failed", why="reading it took too long"))

    async def _tell(self, stream: trio.SocketStream) -> None:
        told: dict[uuid.UUID, Sighting] = {}
        while True:
            seen = self._eyes.seen
            lines = [encode_word(word) for vm, word in seen.items() if told.get(vm) != word]
            lines += [encode_word(Gone(vm=vm)) for vm in told if vm not in seen]
            await _send(stream, b"".join([*lines, encode_word(Alive())]))
            told = seen
            with trio.move_on_after(HEARTBEAT_S):
                while self._eyes.seen is told:
                    await self._eyes.changed()


async def _send(stream: trio.SocketStream, data: bytes) -> None:
    with trio.fail_after(SEND_LIMIT_S):
        await stream.send_all(data)


async def _until_gone(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Wait for the end of the connection; the daemon must send nothing more."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.receive_some(1)
    scope.cancel()


def open_socket(path: Path | None) -> socket.socket:
    """The socket from systemd, or a new one at `path`, for its owner and group.

    Raises:
        HostError: neither is given, or the path cannot be used.
    """
    inherited = systemd.take_listen_sockets()
    if inherited:
        if len(inherited) != 1 or inherited[0].family != socket.AF_UNIX:
            raise HostError(
                "systemd must hand over exactly one unix socket: see provider-proxy-vtpm.socket"
            )
        return inherited[0]
    if path is None:
        raise HostError("no socket from systemd, and --socket is not given")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        sock.bind(str(path))
        path.chmod(0o660)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise HostError(f"cannot listen at {path}: {exc.strerror}") from exc
    return sock


def uid_of(name: str, what: str) -> int:
    """A user's uid. Raises: HostError: the user does not exist."""
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError) as exc:
        raise HostError(f"{what}: the user {name!r} does not exist") from exc


async def run(eyes: Eyes, sock: socket.socket, *, daemon_uid: int) -> None:
    """Look, read and answer, until cancelled.

    Raises:
        HostError: this process can no longer look.
    """
    sock.setblocking(False)
    listener: trio.abc.Listener[Any] = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    server = Server(eyes, {daemon_uid, 0, os.geteuid()})
    async with trio.open_nursery() as nursery:
        await nursery.start(eyes.run)
        systemd.notify("READY=1")
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
