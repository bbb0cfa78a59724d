"""Asks provider-proxy-vtpm which VMs are here, until the state of one has been read; prints its lines."""

from __future__ import annotations

import socket

with socket.socket(socket.AF_UNIX) as sock:
    sock.connect("/run/provider-proxy-vtpm.sock")
    sock.sendall(b'{"version":1,"op":"watch"}\n')
    for line in sock.makefile():
        print(line, end="", flush=True)
        if '"reading":"read"' in line or '"reading":"failed"' in line:
            break
