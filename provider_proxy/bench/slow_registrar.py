"""A process of `bench bindings`: a registrar with one worker that needs a fixed time for each call.

It answers `/version`, and one record to a request for any agent, one call after the other on all
connections. Prints its port as a JSON line; ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

VERSIONS = {"current_version": "2.6", "supported_versions": ["2.5", "2.6"]}


class _Worker:
    """The one worker."""

    def __init__(self, record: object, call_s: float) -> None:
        self._answers = {True: _answer(VERSIONS), False: _answer(record)}
        self._call_s = call_s
        self._lock = asyncio.Lock()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept alive."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                async with self._lock:
                    await asyncio.sleep(self._call_s)
                writer.write(self._answers[head.startswith(b"GET /version ")])
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            writer.close()


def _answer(results: object) -> bytes:
    body = json.dumps({"code": 200, "status": "Success", "results": results}).encode("ascii")
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


async def _run(record: object, call_s: float) -> None:
    server = await asyncio.start_server(_Worker(record, call_s).serve, "127.0.0.1", 0)
    async with server:
        print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
        await asyncio.to_thread(sys.stdin.buffer.read)  # until the parent process ends


if __name__ == "__main__":
    asyncio.run(_run(json.loads(Path(sys.argv[1]).read_bytes()), float(sys.argv[2])))
