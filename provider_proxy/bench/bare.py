"""The smallest HTTP server on h11 and trio: what the daemon's CPU is measured against.

Frozen: it shares no code with the daemon's server, so a faster daemon does not make it faster, too. It
answers every request with the same bytes, and has what h11's own example of a trio server has: h11 for
both directions and a deadline a request. No limits, TLS or counters. If it changes, figures from before
and after cannot be compared.
"""

from __future__ import annotations

from email.utils import formatdate

import h11
import trio

RECEIVE_BYTES = 16 * 1024
LIMIT_S = 75.0


async def serve(stream: trio.SocketStream, body: bytes) -> None:
    """Answer each request of a connection with this body, until the client ends."""
    conn = h11.Connection(h11.SERVER)
    headers = [
        (b"Date", formatdate(usegmt=True).encode("ascii")),
        (b"Content-Type", b"application/json"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Cache-Control", b"no-store"),
    ]
    async with stream:
        while await _answer(stream, conn, headers, body):
            conn.start_next_cycle()


async def _answer(
    stream: trio.SocketStream,
    conn: h11.Connection,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
) -> bool:
    """Answer one request; False where the connection ends."""
    with trio.move_on_after(LIMIT_S):
        while True:
            event = conn.next_event()
            if event is h11.NEED_DATA:
                conn.receive_data(bytes(await stream.receive_some(RECEIVE_BYTES)))
            elif isinstance(event, h11.ConnectionClosed):
                return False
            elif isinstance(event, h11.EndOfMessage):
                response = h11.Response(status_code=200, reason=b"OK", headers=headers)
                parts = [conn.send(response), conn.send(h11.Data(data=body))]
                parts.append(conn.send(h11.EndOfMessage()))
                await stream.send_all(b"".join(part for part in parts if part))
                return bool(conn.our_state is h11.DONE)
    return False
