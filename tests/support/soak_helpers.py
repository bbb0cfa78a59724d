"""What the hostile soak is made of: the daemon, its log in a pipe and its audit log behind a link, and
attacks that end with their `Event`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers import command, free_port

from provider_proxy.bench.overload import make_certificates, tls_config
from provider_proxy.bench.process import Vitals

FEW_FILES = 200
LIMIT_S = 30.0
BATCH = 100  # connections that an attack opens at a time
SLOW_S = 0.05
FULL = Path("/dev/full")
HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01"


class Daemon(Vitals):
    """The real daemon over an embedded TPM, with mutual TLS and few descriptors.

    Attributes:
        read_on: clear while nobody reads its log.
        tenants: TLS contexts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tenants = make_certificates(folder, 2)
        self.port, admin = free_port(), free_port()
        self._admin = f"http://127.0.0.1:{admin}"
        self._audit = folder / "audit.jsonl"
        self.fill_disk(full=False)
        text = tls_config(folder, "state", max_duty=1.0).replace("127.0.0.1:0", self.address)
        config = folder / "soak.toml"
        config.write_text(
            f'{text}[admin]\naddress = "127.0.0.1:{admin}"\n'
            f"[audit]\nenabled = true\npath = {json.dumps(str(self._audit))}\n"
        )
        self.process = subprocess.Popen(
            [
                *("sh", "-c", f'ulimit -n {FEW_FILES}; exec "$@"', "sh"),
                *command("--log-level", "debug", "serve", "--config", config),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        super().__init__(self.process.pid)
        self.read_on = threading.Event()
        self.read_on.set()
        self.log = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait_for(lambda: self.status("/readyz") == 200, "was ready")
        except BaseException:
            self.kill()
            raise

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        while self.read_on.wait(LIMIT_S):
            data = os.read(self.process.stderr.fileno(), 65536)
            if not data:
                return
            self.log = (self.log + data)[-200_000:]

    def status(self, path: str) -> int:
        """What the admin listener answers; 0 where it does not."""
        try:
            with urllib.request.urlopen(self._admin + path, timeout=LIMIT_S) as answer:
                return int(answer.status)
        except OSError as exc:
            return getattr(exc, "code", 0)

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's samples that have the label."""
        with urllib.request.urlopen(f"{self._admin}/metrics", timeout=LIMIT_S) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"provider_proxy_{name}") and label in line
        )

    def wait_for(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not holds():
            assert self.process.poll() is None, self.log.decode(errors="replace")[-4000:]
            assert time.monotonic() < end, f"it never {what}"
            time.sleep(0.1)

    def stop(self) -> int:
        """SIGTERM, and nobody reads the log meanwhile; its exit code."""
        self.read_on.clear()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(LIMIT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.read_on.set()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def fill_disk(self, *, full: bool) -> None:
        """Have the audit log written where no byte fits, or where it was."""
        link = self.folder / "link"
        target = FULL if full else self.folder / "audit.real"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(self._audit)

    def connect(self, source: int = 1, limit_s: float = LIMIT_S) -> socket.socket:
        sock = socket.socket()
        sock.settimeout(limit_s)
        try:
            sock.bind((f"127.0.{source}.1", 0))
            sock.connect(("127.0.0.1", self.port))
        except BaseException:
            sock.close()
            raise
        return sock

    def tenant(self, number: int = 0) -> ssl.SSLSocket:
        sock = self.connect()
        tls = self.tenants[number].wrap_socket(
            sock, server_hostname="localhost", do_handshake_on_connect=False
        )
        try:
            tls.do_handshake()
        except BaseException:
            tls.close()
            raise
        return tls


class GoodTenant:
    """Polls over a connection that it keeps; another one where that has broken.

    Attributes:
        met: statuses of its answers; 0 for a connection that was refused or has broken.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._done = threading.Event()
        self.met: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        tls: ssl.SSLSocket | None = None
        while not self._done.wait(SLOW_S):
            try:
                tls = tls or self._daemon.tenant()
                self.met[ask(tls)] += 1
            except (OSError, ValueError):
                self.met[0] += 1
                if tls is not None:
                    tls.close()
                tls = None
        if tls is not None:
            tls.close()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def ask(tls: ssl.SSLSocket) -> int:
    """Ask for a quote; the status. Raises: OSError, ValueError where there is no whole answer."""
    target = f"/verifier/quote?nonce={secrets.token_hex(16)}&mask=0x1&logs=none"
    tls.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    data = b""
    while b"\r\n\r\n" not in data:
        data += tls.recv(65536) or b"\r\n\r\n"
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        part = tls.recv(65536)
        if not part:
            raise ConnectionError("closed")
        body += part
    return int(head.split(b" ")[1])


# --- attacks: each goes on until it is told to end ----------------------------------------------------


@contextlib.contextmanager
def held(daemon: Daemon, first: bytes, addresses: int) -> Iterator[list[socket.socket]]:
    """Many connections that have sent a little, from so many addresses."""
    socks: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for number in range(3 * BATCH):
            with contextlib.suppress(OSError):
                sock = stack.enter_context(daemon.connect(1 + number % addresses, 0.1))
                sock.sendall(first)
                socks.append(sock)
        yield socks


def closing(daemon: Daemon, end: threading.Event) -> None:
    """Connections that open, say nothing or a ClientHello, and close."""
    where = ("127.0.0.1", str(daemon.port))
    while not end.is_set():
        done = subprocess.run(
            [
                *(sys.executable, "-m", "provider_proxy.bench.attackers", "close", *where),
                *("1000", "--at-once", str(BATCH)),
            ],
            check=True,
            capture_output=True,
            timeout=LIMIT_S,
        )
        assert json.loads(done.stdout)["connections"] == 1000


def stalling(daemon: Daemon, end: threading.Event) -> None:
    """Handshakes that stall after half a ClientHello, more than there are descriptors."""
    while not end.is_set():
        with held(daemon, HALF_A_HELLO, 2):
            end.wait(2.0)


def idling(daemon: Daemon, end: threading.Event) -> None:
    """Connections that say nothing, more than there are descriptors."""
    with held(daemon, b"", 100):
        end.wait(LIMIT_S)


def dripping(daemon: Daemon, end: threading.Event) -> None:
    """A tenant's heads, byte by byte."""
    while not end.is_set():
        with contextlib.suppress(OSError), daemon.tenant(1) as tls:
            for byte in b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000:
                if end.wait(SLOW_S):
                    break
                tls.sendall(bytes([byte]))


def pipelining(daemon: Daemon, end: threading.Event) -> None:
    """A tenant's requests, hundreds at once, none of whose answers is read."""
    while not end.is_set():
        with contextlib.suppress(OSError), daemon.tenant(1) as tls:
            tls.settimeout(1.0)
            with contextlib.suppress(OSError):
                for _ in range(20):
                    tls.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
            end.wait(0.5)


def sending_bodies(daemon: Daemon, end: threading.Event) -> None:
    """A tenant's bodies, in chunks without an end."""
    while not end.is_set():
        with contextlib.suppress(OSError), daemon.tenant(1) as tls:
            tls.settimeout(1.0)
            tls.sendall(b"GET /version HTTP/1.1\r\nHost: l\r\nTransfer-Encoding: chunked\r\n\r\n")
            while not end.is_set():
                tls.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")


def leaving(daemon: Daemon, end: threading.Event) -> None:
    """A tenant that asks for a quote and resets the connection."""
    while not end.is_set():
        with contextlib.suppress(OSError), daemon.tenant(1) as tls:
            nonce = secrets.token_hex(16)
            tls.sendall(
                f"GET /verifier/quote?nonce={nonce}&mask=0x1 HTTP/1.1\r\nHost: l\r\n\r\n".encode()
            )
            tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        end.wait(SLOW_S)


def filling_the_disk(daemon: Daemon, end: threading.Event) -> None:
    """The audit log's disk is full."""
    daemon.fill_disk(full=True)
    try:
        end.wait(LIMIT_S)
    finally:
        daemon.fill_disk(full=False)


def not_reading_the_log(daemon: Daemon, end: threading.Event) -> None:
    """The log's reader stalls, while refused handshakes fill the pipe."""
    daemon.read_on.clear()
    try:
        while not end.is_set():
            with contextlib.suppress(OSError), daemon.connect() as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                select.select([sock], [], [], 1.0)
    finally:
        daemon.read_on.set()


ATTACKS: dict[str, Callable[[Daemon, threading.Event], None]] = {
    attack.__name__: attack
    for attack in (
        closing,
        stalling,
        idling,
        dripping,
        pipelining,
        sending_bodies,
        leaving,
        filling_the_disk,
        not_reading_the_log,
    )
}
