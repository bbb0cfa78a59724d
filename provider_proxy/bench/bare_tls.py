"""The smallest server of mutual TLS: a loop over blocking `ssl.SSLSocket`s. Frozen, as `bare` is.

`python -m provider_proxy.bench.bare_tls CONFIG` takes the files out of the `[listen]` table of a daemon's
configuration, prints one JSON line with its address, and serves one connection after the other.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import tomllib
from pathlib import Path

RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def main() -> None:
    """Entry point."""
    listen = tomllib.loads(Path(sys.argv[1]).read_text())["listen"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(listen["tls_cert"], listen["tls_key"])
    context.load_verify_locations(listen["client_ca"])
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    host, port = listener.getsockname()
    print(json.dumps({"address": f"{host}:{port}"}), flush=True)
    while True:
        raw, _ = listener.accept()
        with contextlib.suppress(OSError):
            sock = context.wrap_socket(raw, server_side=True)
            sock.recv(16 * 1024)
            sock.getpeercert(binary_form=True)
            sock.sendall(RESPONSE)
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.unwrap()
            sock.close()
        raw.close()


if __name__ == "__main__":
    main()
