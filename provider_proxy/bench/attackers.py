"""Clients for `bench hostile`, a process each: attackers, and the good tenants beside them.

`python -m provider_proxy.bench.attackers MODE …` opens so many connections or runs so many seconds, and
prints one JSON line: what it did and how long it took. Nothing here runs longer than `WORK_LIMIT_S`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import select
import socket
import ssl
import threading
import time
from pathlib import Path

from provider_proxy.bench.tenant_tls import tenant_context

SOURCES = 200  # addresses of loopback that attackers come from: limits for each address do not help
LIMIT_S = 20.0
WORK_LIMIT_S = 300.0  # of one process; on a slow machine less is done, and reported
POLL_S = 0.25  # of a good tenant


def _hello() -> bytes:
    """A ClientHello, as the ssl module sends it."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def close_many(host: str, port: int, count: int, at_once: int) -> dict[str, object]:
    """Open so many at a time; say nothing, a ClientHello, or read a part of the answer to it; close."""
    hello = _hello()
    begin = time.monotonic()
    done = 0
    while done < count and time.monotonic() < begin + WORK_LIMIT_S:
        socks = []
        for number in range(min(at_once, count - done)):
            sock = socket.socket()
            sock.setblocking(False)
            sock.bind((f"127.0.{1 + (done + number) % SOURCES}.1", 0))
            sock.connect_ex((host, port))
            socks.append(sock)
        waiting = select.poll()
        for sock in socks[1::2]:
            waiting.register(sock, select.POLLOUT)
        for _ in range(at_once):
            ready = waiting.poll(50)
            if not ready:
                break
            for fd, _ in ready:
                waiting.unregister(fd)
        for sock in socks[1::2]:
            with contextlib.suppress(OSError):
                sock.send(hello)
        answered = select.poll()
        for sock in socks[3::4]:
            answered.register(sock, select.POLLIN)
        answered.poll(20)
        for sock in socks[3::4]:
            with contextlib.suppress(OSError):
                sock.recv(100)
        for sock in socks:
            sock.close()
        done += len(socks)
    return {"connections": done, "seconds": time.monotonic() - begin}


def request_many(host: str, port: int, count: int, ca: str, pem: str) -> dict[str, object]:
    """Good requests by mutual TLS, each over a connection of its own that is closed afterwards."""
    context = tenant_context(Path(ca), Path(pem))
    left = [count]
    failed = [0]
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not left[0] or time.monotonic() > begin + WORK_LIMIT_S:
                    return
                left[0] -= 1
            try:
                _ask(host, port, context, "/version")
            except OSError:
                failed[0] += 1

    begin = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"requests": count - left[0], "failed": failed[0], "seconds": time.monotonic() - begin}


def _ask(host: str, port: int, context: ssl.SSLContext, path: str) -> None:
    with (
        socket.create_connection((host, port), LIMIT_S) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as tls,
    ):
        tls.sendall(f"GET {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n".encode())
        while tls.recv(65536):
            pass


def poll(host: str, port: int, seconds: float, ca: str, pems: list[str]) -> dict[str, object]:
    """Tenants that poll for quotes over connections that they keep; latencies in ms."""
    end = time.monotonic() + seconds
    found: list[float] = []
    errors = [0]

    def tenant(pem: str) -> None:
        context = tenant_context(Path(ca), Path(pem))
        tls: ssl.SSLSocket | None = None
        while time.monotonic() < end:
            begin = time.monotonic()
            try:
                if tls is None:
                    sock = socket.create_connection((host, port), LIMIT_S)
                    tls = context.wrap_socket(sock, server_hostname="localhost")
                    begin = time.monotonic()
                _quote(tls)
                found.append((time.monotonic() - begin) * 1000)
            except OSError:
                errors[0] += 1
                if tls is not None:
                    tls.close()
                tls = None
            time.sleep(POLL_S)
        if tls is not None:
            tls.close()

    threads = [threading.Thread(target=tenant, args=(pem,)) for pem in pems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"latencies_ms": found, "errors": errors[0]}


def _quote(tls: ssl.SSLSocket) -> None:
    nonce = secrets.token_hex(16)
    target = f"/verifier/quote?nonce={nonce}&mask=0x1&logs=none"
    tls.sendall(f"GET {target} HTTP/1.1\r\nHost: b\r\n\r\n".encode())
    data = b""
    while b"\r\n\r\n" not in data:
        part = tls.recv(65536)
        if not part:
            raise ConnectionError("closed")
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(head[:40])
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        part = tls.recv(65536)
        if not part:
            raise ConnectionError("closed")
        body += part


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("close", "request", "poll"))
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=float)
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--ca", default="")
    parser.add_argument("--pem", action="append", default=[])
    args = parser.parse_args()
    if args.mode == "close":
        done = close_many(args.host, args.port, int(args.count), args.at_once)
    elif args.mode == "request":
        done = request_many(args.host, args.port, int(args.count), args.ca, args.pem[0])
    else:
        done = poll(args.host, args.port, args.count, args.ca, args.pem)
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
