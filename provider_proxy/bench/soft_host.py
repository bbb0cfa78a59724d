"""A host's proxy that costs next to nothing: one signature of P-256 and seven hashes an answer.

Its proofs are those of a batch of 64, so that verifying them costs as much as in operation; the other
leaves of its trees are always the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from provider_proxy.evidence.inclusion import (
    leaf_hash,
    leaf_input,
    qualifying_data,
    root_from_proof,
)
from provider_proxy.evidence.model import SALT_BYTES, HashAlg, InclusionProof
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.wire import EvidenceEncoder
from provider_proxy.testing.soft_tpm import SoftTpm

LEAVES = 64
HEIGHT = 6


class SoftHost:
    """The host."""

    def __init__(self) -> None:
        self.tpm = SoftTpm(pcrs={0: b"firmware"})
        path = tuple(number.to_bytes(32, "big") for number in range(HEIGHT))
        self._proof = InclusionProof(
            leaf_index=0, tree_size=LEAVES, path=path, salt=bytes(SALT_BYTES)
        )

    def answer(self, target: str) -> bytes:
        """The body of a good answer to GET `target`."""
        request = parse_quote_query(target.partition("?")[2])
        proof = self._proof
        leaf = leaf_input(
            salt=proof.salt, nonce=request.nonce, mask=request.mask, bank=request.bank
        )
        root = root_from_proof(leaf_hash(leaf), proof)
        quote = self.tpm.quote(qualifying_data(root, LEAVES), HashAlg.SHA256, request.mask)
        encoder = EvidenceEncoder(
            quote,
            ak_name=self.tpm.ak.name,
            hash_alg=HashAlg.SHA256,
            enc_alg=self.tpm.ak.enc_alg,
            sign_alg=self.tpm.ak.sign_alg,
            quote_ms=1.0,
        )
        return b"".join(encoder.encode(proof))

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[int]:
        """Answer over HTTP on loopback, connections kept; the port."""

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    body = self.answer(head.split(b" ", 2)[1].decode("ascii"))
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n" % len(body) + body
                    )
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()

        server = await asyncio.start_server(converse, "127.0.0.1", 0)
        async with server:
            port: int = server.sockets[0].getsockname()[1]
            yield port
