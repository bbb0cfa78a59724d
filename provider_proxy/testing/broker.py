"""Lets several programs use one swtpm at once, as a bare TPM device would: for tests and benchmarks.

swtpm serves one connection. The broker holds it, and passes on whole commands of any number of clients,
one at a time, first come first served. Unlike the kernel's resource manager it gives no client
a space of its own: all share the TPM's sessions and transient objects, so that one client can exhaust
them for all. A plan (see `faulty`) may slow commands down or disturb them.

Threads, not trio: its clients are other programs and blocking libraries.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from provider_proxy.testing.disturb import HEADER_BYTES, Plan, refusal

MAX_RESPONSE_BYTES = 8192
ACCEPT_POLL_S = 0.2


Serve = Callable[[socket.socket], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command that was passed on: its TPM_CC, and monotonic seconds.

    Attributes:
        asked_s: when it came.
        begin_s, end_s: when it had the TPM, and until when.
    """

    code: int
    asked_s: float
    begin_s: float
    end_s: float


class Broker:
    """A broker over the swtpm behind `tcti` ("swtpm:path=…").

    Args:
        observe: told of each command that was passed on; called by several threads, in turns.

    Attributes:
        tcti: what its clients open.
    """

    def __init__(
        self,
        tcti: str,
        plan: Plan | None = None,
        *,
        observe: Callable[[Command], None] = lambda command: None,
    ) -> None:
        self._observe = observe
        self._upstream = tcti.removeprefix("swtpm:path=")
        self.plan = plan
        self._directory = tempfile.TemporaryDirectory(prefix="provider-proxy-")
        path = Path(self._directory.name) / "tpm"
        self.tcti = f"swtpm:path={path}"
        self._turn = threading.Lock()
        self._tpm = _connect(self._upstream)
        self._control = _connect(self._upstream + ".ctrl")
        self._stop = threading.Event()
        self._clients: set[socket.socket] = set()
        self._threads = [
            threading.Thread(target=self._accept, args=(_listen(path), self._serve), daemon=True),
            threading.Thread(
                target=self._accept,
                args=(_listen(path.with_name("tpm.ctrl")), self._serve_control),
                daemon=True,
            ),
        ]

    def __enter__(self) -> Broker:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for client in list(self._clients):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._tpm.close()
        self._control.close()
        self._directory.cleanup()

    def _accept(self, listener: socket.socket, serve: Serve) -> None:
        listener.settimeout(ACCEPT_POLL_S)
        with listener:
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    client, _ = listener.accept()
                    client.settimeout(None)
                    self._clients.add(client)
                    threading.Thread(target=self._guard, args=(client, serve), daemon=True).start()

    def _guard(self, client: socket.socket, serve: Serve) -> None:
        with client, contextlib.suppress(OSError):
            serve(client)
        self._clients.discard(client)

    def _serve(self, client: socket.socket) -> None:
        while command := _read_command(client):
            response = self._execute(command)
            if response is None:
                return
            client.sendall(response)

    def _execute(self, command: bytes) -> bytes | None:
        """Pass a command on; None where the plan drops the connection."""
        code = int.from_bytes(command[6:10], "big")
        asked_s = time.monotonic()
        with self._turn:
            begin_s = time.monotonic()
            action = self.plan(code) if self.plan else None
            if action is not None:
                if action.drop:
                    return None
                if action.hold is not None:
                    action.hold.wait()
                if action.code:
                    time.sleep(action.delay_s)
                    return refusal(action.code)
            self._tpm.sendall(command)
            if action is not None:
                time.sleep(action.delay_s)  # the TPM works in the meantime
            response = _read_command(self._tpm)
            end_s = time.monotonic()
            self._observe(Command(code=code, asked_s=asked_s, begin_s=begin_s, end_s=end_s))
        if action is not None and action.garble is not None:
            return action.garble(response)
        return response

    def _serve_control(self, client: socket.socket) -> None:
        """The control channel says nothing that matters to several clients: always done."""
        while client.recv(MAX_RESPONSE_BYTES):
            client.sendall(bytes(4))


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(128)
    return listener


def _connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(path)
    return client


def _read_command(sock: socket.socket) -> bytes:
    """One whole TPM command or response, by the size in its header; empty at the end."""
    data = _read_exactly(sock, HEADER_BYTES)
    if len(data) < HEADER_BYTES:
        return b""
    return data + _read_exactly(sock, int.from_bytes(data[2:6], "big") - HEADER_BYTES)


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            break
        data += part
    return data
