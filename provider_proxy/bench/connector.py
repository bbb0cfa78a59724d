"""Opens mutual-TLS connections one after the other, a small request each, as a verifier does that
keeps none open.

`python -m provider_proxy.bench.connector HOST PORT CA CERT COUNT [--no-nodelay]` prints how many seconds
it took, and how many were answered.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from pathlib import Path

from provider_proxy.bench.tenant_tls import tenant_context

REQUEST = b"GET /version HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n"
TLS_NAME = "localhost"  # in the certificates of `overload`


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("ca", type=Path)
    parser.add_argument("cert", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--no-nodelay", action="store_true")
    args = parser.parse_args()
    context = tenant_context(args.ca, args.cert)
    begin = time.monotonic()
    good = 0
    for _ in range(args.count):
        raw = socket.create_connection((args.host, args.port))
        if not args.no_nodelay:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(raw, server_hostname=TLS_NAME) as sock:
            sock.sendall(REQUEST)
            answer = b""
            while part := sock.recv(65536):
                answer += part
            good += answer.startswith(b"HTTP/1.1 200 ")
    print(json.dumps({"seconds": time.monotonic() - begin, "good": good}))


if __name__ == "__main__":
    main()
