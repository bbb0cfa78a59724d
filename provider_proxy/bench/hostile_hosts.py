"""Hostile hosts for `bench hostile`: proxies that stay silent, flood, stall, or send costly JSON, pieces
of one byte, endless interim answers, or one line at a time.

`python -m provider_proxy.bench.hostile_hosts` serves a kind of host a port of loopback, and prints a JSON
line with the ports when it is up. The trickling host is good until it reads `turn` on stdin: from then on
its PCR 10 leads nowhere, and it gives its IMA list line by line, each answer just in time. It ends with
its stdin.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial

from provider_proxy.bench.fakes import MIN_LEAVES
from provider_proxy.bench.ima_lists import make_line
from provider_proxy.evidence.inclusion import leaf_input, qualifying_data
from provider_proxy.evidence.model import HashAlg, HostLogs, InclusionProof, QuoteRequest
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.wire import (
    MAX_EVIDENCE_WITH_LOGS_BYTES,
    EvidenceEncoder,
    encode_logs,
)
from provider_proxy.host.batching.merkle import build_tree
from provider_proxy.testing.soft_tpm import SoftTpm

LARGE = MAX_EVIDENCE_WITH_LOGS_BYTES - 1024
IMA_PCR = 10
TRICKLE_S = 1.8  # between question and answer, below the host's timeout_s of 2

Answer = Callable[[asyncio.StreamWriter, QuoteRequest], Awaitable[None]]


def _head(length: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length


async def _silent(_writer: asyncio.StreamWriter, _request: QuoteRequest) -> None:
    await asyncio.sleep(3600)


async def _flood(writer: asyncio.StreamWriter, _request: QuoteRequest) -> None:
    writer.write(_head(LARGE))
    for _ in range(LARGE // 65536):
        writer.write(b" " * 65536)
        await writer.drain()
    writer.write(b" " * (LARGE % 65536))


async def _stall(writer: asyncio.StreamWriter, _request: QuoteRequest) -> None:
    writer.write(_head(LARGE) + b" " * (LARGE // 2))
    await writer.drain()
    await asyncio.sleep(3600)


def _bomb() -> bytes:
    keys = b",".join(b'"%d":1.%se-300' % (number, b"9" * 20) for number in range(270_000))
    body = b'{"results":{' + keys + b"}}"
    return _head(len(body)) + body


async def _explode(bomb: bytes, writer: asyncio.StreamWriter, _request: QuoteRequest) -> None:
    writer.write(bomb)
    await writer.drain()


async def _drip(writer: asyncio.StreamWriter, _request: QuoteRequest) -> None:
    writer.write(_head(1000))
    for _ in range(1000):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.1)


async def _crumbs(writer: asyncio.StreamWriter, _request: QuoteRequest) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(LARGE // 8192):
        writer.write(b"1\r\n \r\n" * 8192)
        await writer.drain()


async def _interim(writer: asyncio.StreamWriter, _request: QuoteRequest) -> None:
    for _ in range(LARGE // 65536):
        writer.write(b"HTTP/1.1 102 \r\n\r\n" * 4096)
        await writer.drain()


class Trickler:
    """A host that is good, and then promises that more of its IMA list will explain its PCR 10."""

    def __init__(self) -> None:
        _, data, _, _ = make_line(0)
        self.tpm = SoftTpm(pcrs={IMA_PCR: bytes(32) + hashlib.sha256(data).digest()})
        self.is_bad = False
        self.asked = 0

    def turn(self) -> float:
        """Become bad; when, by the monotonic clock."""
        self.tpm.extend(IMA_PCR, b"evil")
        self.is_bad = True
        return time.monotonic()

    async def answer(self, writer: asyncio.StreamWriter, request: QuoteRequest) -> None:
        """Evidence with a line of the list."""
        self.asked += 1
        entry = request.ima_ml_entry
        text = make_line(entry)[0] if self.is_bad or entry == 0 else ""
        if self.is_bad:
            await asyncio.sleep(TRICKLE_S)
        body = self._seal(request, text + "\n" if text else "", entry)
        writer.write(_head(len(body)) + body)
        await writer.drain()

    def _seal(self, request: QuoteRequest, ima: str, entry: int) -> bytes:
        salt = bytes(16)
        leaf = leaf_input(salt=salt, nonce=request.nonce, mask=request.mask, bank=request.bank)
        tree = build_tree([leaf, bytes(32)])
        quote = self.tpm.quote(qualifying_data(tree.root, tree.size), HashAlg.SHA256, request.mask)
        encoder = EvidenceEncoder(
            quote,
            ak_name=self.tpm.ak.name,
            hash_alg=self.tpm.ak.signature_hash,
            enc_alg=self.tpm.ak.enc_alg,
            sign_alg=self.tpm.ak.sign_alg,
            quote_ms=1.0,
        )
        proof = InclusionProof(leaf_index=0, tree_size=MIN_LEAVES, path=tree.paths[0], salt=salt)
        logs = encode_logs(HostLogs(ima=ima, ima_entry=entry))
        return b"".join(encoder.encode(proof, logs=logs))


async def _until_gone(reader: asyncio.StreamReader, answer: Awaitable[None]) -> None:
    """Answer; end where the client hangs up, so that a silent host does not collect connections."""
    answering = asyncio.ensure_future(answer)
    hung_up = asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait({answering, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ConnectionResetError("the client hung up")
        answering.result()
    finally:
        for task in (answering, hung_up):
            task.cancel()
        await asyncio.gather(answering, hung_up, return_exceptions=True)


async def _converse(
    answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                query = head.split(b" ", 2)[1].partition(b"?")[2].decode("ascii")
                await _until_gone(reader, answer(writer, parse_quote_query(query)))
    finally:
        writer.close()


async def _serve() -> None:
    trickler = Trickler()
    kinds: dict[str, Answer] = {
        "silent": _silent,
        "flood": _flood,
        "stall": _stall,
        "bomb": partial(_explode, _bomb()),
        "drip": _drip,
        "crumbs": _crumbs,
        "interim": _interim,
        "trickle": trickler.answer,
    }
    ports = {}
    for name, answer in kinds.items():
        server = await asyncio.start_server(
            partial(_converse, answer), "127.0.0.1", 0, backlog=4096
        )
        ports[name] = server.sockets[0].getsockname()[1]
    ak = base64.b64encode(trickler.tpm.ak_public).decode("ascii")
    print(json.dumps({"ports": ports, "ak": ak}), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        if line == b"turn\n":
            print(json.dumps({"at": trickler.turn()}), flush=True)


def main() -> None:
    """Entry point; serves until stdin ends."""
    argparse.ArgumentParser().parse_args()
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
