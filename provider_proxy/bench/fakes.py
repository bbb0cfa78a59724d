"""Fake proxies for `bench watch`: thousands of hosts in one cheap process, real evidence.

`python -m provider_proxy.bench.fakes` serves two groups of hosts on two ports of loopback, each with a
`SoftTpm`, which signs a quote for all requests of a window as the daemon does. It prints a JSON line when
it is up, and answers each line on stdin with one: `flip` changes a PCR of the second group, `take` gives
what was seen since the last `take`. It reports when each connection's requests came, so that the
watcher's punctuality is measured from outside.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import secrets
import sys
import time
from functools import partial

from provider_proxy.evidence.inclusion import leaf_input, qualifying_data
from provider_proxy.evidence.model import SALT_BYTES, HashAlg, InclusionProof, QuoteRequest
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.wire import EvidenceEncoder
from provider_proxy.host.batching.merkle import build_tree
from provider_proxy.testing.soft_tpm import SoftTpm

WINDOW_S = 0.02
FLIPPED_PCR = 0
MIN_LEAVES = 2


class Group:
    """Hosts that share a TPM and a port."""

    def __init__(self) -> None:
        self.tpm = SoftTpm(pcrs={FLIPPED_PCR: b"good"})
        self.errors_s: list[float] = []
        self.gaps: list[float] = []
        self.checks = 0
        self.connections = 0
        self._waiting: list[tuple[Host, QuoteRequest]] = []

    def add(self, host: Host, request: QuoteRequest) -> None:
        """Put a request into the open batch, or open one."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(WINDOW_S, self._seal)
        self._waiting.append((host, request))

    def _seal(self) -> None:
        batch, self._waiting = self._waiting, []
        salts = [secrets.token_bytes(SALT_BYTES) for _ in batch]
        leaves = [
            leaf_input(salt=salt, nonce=asked.nonce, mask=asked.mask, bank=asked.bank)
            for salt, (_, asked) in zip(salts, batch, strict=True)
        ]
        size = max(MIN_LEAVES, 1 << (len(leaves) - 1).bit_length())
        leaves += [secrets.token_bytes(32) for _ in range(size - len(leaves))]
        tree = build_tree(leaves)
        mask = 0
        for _, asked in batch:
            mask |= asked.mask
        quote = self.tpm.quote(qualifying_data(tree.root, tree.size), HashAlg.SHA256, mask)
        encoder = EvidenceEncoder(
            quote,
            ak_name=self.tpm.ak.name,
            hash_alg=self.tpm.ak.signature_hash,
            enc_alg=self.tpm.ak.enc_alg,
            sign_alg=self.tpm.ak.sign_alg,
            quote_ms=1.0,
        )
        for index, (host, _) in enumerate(batch):
            proof = InclusionProof(
                leaf_index=index, tree_size=size, path=tree.paths[index], salt=salts[index]
            )
            host.answer(b"".join(encoder.encode(proof)))

    def take(self) -> dict[str, object]:
        """What was seen since the last time."""
        seen: dict[str, object] = {
            "checks": self.checks,
            "gaps_s": self.gaps,
            "connections": self.connections,
        }
        self.checks, self.gaps = 0, []
        return seen


class Host(asyncio.Protocol):
    """One connection: one watched host."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._last_s: float | None = None
        self._spread = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._group.connections += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            now = time.monotonic()
            if self._last_s is not None:
                if self._spread:
                    self._group.gaps.append(round(now - self._last_s, 4))
                self._spread = True  # the first gap is shorter on purpose
            self._last_s = now
            self._group.checks += 1
            query = head.split(b" ", 2)[1].partition(b"?")[2].decode("ascii")
            self._group.add(self, parse_quote_query(query))

    def answer(self, body: bytes) -> None:
        """Send the evidence."""
        assert self._transport is not None
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(body) + body)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    groups = [Group(), Group()]
    servers = [
        await loop.create_server(partial(Host, group), "127.0.0.1", 0, backlog=4096)
        for group in groups
    ]
    tell = {
        "ports": [server.sockets[0].getsockname()[1] for server in servers],
        "aks": [base64.b64encode(group.tpm.ak_public).decode("ascii") for group in groups],
        "good": groups[0].tpm.read(HashAlg.SHA256, 1 << FLIPPED_PCR).values[0][1].hex(),
    }
    print(json.dumps(tell), flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        if line == b"flip\n":
            groups[1].tpm.extend(FLIPPED_PCR, b"bad")
            print(json.dumps({"at": time.monotonic()}), flush=True)
        elif line == b"reset\n":
            groups[1].tpm.reset({FLIPPED_PCR: b"good"})
            print(json.dumps({"at": time.monotonic()}), flush=True)
        else:
            print(json.dumps([group.take() for group in groups]), flush=True)


def main() -> None:
    """Entry point; serves until stdin ends."""
    argparse.ArgumentParser().parse_args()
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
