"""Stands in for a daemon's admin listener: one VM that runs and is confirmed."""

from __future__ import annotations

import json
import os
import socket
import sys

path = sys.argv[1]
vm = {"vm": "v", "running": True, "confirmed": True, "spire": ["e" * 64]}
body = json.dumps({"code": 200, "status": "Success", "results": {"enabled": True, "vms": [vm]}})
head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
with socket.socket(socket.AF_UNIX) as server:
    server.bind(path)
    os.chmod(path, 0o666)
    server.listen()
    while True:
        with server.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(f"{head}Connection: close\r\n\r\n{body}".encode())
