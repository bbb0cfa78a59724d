"""What `bench bridge` puts around a bridge: a verifier with its ten places, a registrar, hanging hosts.

As Keylime's verifier does, each poll is a connection of its own with mutual TLS, without resumption, and
a client certificate of RSA-2048; or of P-256, which costs the load less and the bridge more. Everything
runs in the process of the benchmark, on another core than the bridge.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from provider_proxy.tenant.bridge.keys import BridgeKeys

PLACES = 10  # connections of one worker of Keylime's verifier
QUOTE_INTERVAL_S = 2.0  # Keylime's default
RETRY_WAITS_S = (2.0, 4.0, 8.0, 16.0, 32.0)  # its default; afterwards this load begins again
MASK = 0x1
CLIENT = "client.pem"  # certificate and key of a client
LIGHT_CLIENT = "light-client.pem"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


def make_clients(directory: Path) -> tuple[Path, ssl.SSLContext, ssl.SSLContext]:
    """A CA's certificate file, and TLS of clients that have its certificates: of RSA, and of P-256."""
    ca_key, key = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    now = datetime.now(UTC)

    def certificate(name: str, of: PrivateKey, *, is_ca: bool) -> x509.Certificate:
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench CA")])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(of.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), True)
            .sign(ca_key, hashes.SHA256())
        )

    def client(name: str, of: PrivateKey) -> ssl.SSLContext:
        own = directory / name
        own.touch(0o600)
        own.write_bytes(
            of.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            + certificate("bench client", of, is_ca=False).public_bytes(pem)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the load's own bridge; the handshake costs the same
        context.load_cert_chain(own)
        return context

    pem = serialization.Encoding.PEM
    ca = directory / "client-ca.crt"
    ca.write_bytes(certificate("bench CA", ca_key, is_ca=True).public_bytes(pem))
    light = ec.generate_private_key(ec.SECP256R1())
    return ca, client(CLIENT, key), client(LIGHT_CLIENT, light)


@dataclass
class Verifier:
    """Polls agents.

    Attributes:
        seen: when each good answer of an agent was there, by port.
        took_s: how long each good poll took.
        failed: statuses that were not 200, counted.
    """

    context: ssl.SSLContext
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PLACES))
    seen: dict[int, list[float]] = field(default_factory=dict)
    took_s: list[float] = field(default_factory=list)
    failed: dict[int, int] = field(default_factory=dict)

    async def poll(self, port: int) -> int:
        """One poll; the status, 0 where there was no answer."""
        began = time.monotonic()
        nonce = secrets.token_hex(10)
        target = f"/v2.6/quotes/integrity?nonce={nonce}&mask={MASK:#x}&partial=1&ima_ml_entry=0"
        async with self.places:
            try:
                status = await self._get(port, target)
            except (OSError, asyncio.IncompleteReadError):
                status = 0
        now = time.monotonic()
        if status == 200:
            self.seen.setdefault(port, []).append(now)
            self.took_s.append(now - began)
        else:
            self.failed[status] = self.failed.get(status, 0) + 1
        return status

    async def _get(self, port: int, target: str) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=self.context)
        try:
            writer.write(
                f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.read(-1)
            is_good = b'"hash_alg":"sha256"' in body
            return int(head.split(b" ", 2)[1]) if is_good or b"200" not in head[:15] else -1
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def watch(self, port: int, first_s: float) -> None:
        """Poll an agent as Keylime does, for ever."""
        await asyncio.sleep(first_s)
        retries = 0
        while True:
            status = await self.poll(port)
            if status == 200:
                retries = 0
                await asyncio.sleep(QUOTE_INTERVAL_S)
            else:
                await asyncio.sleep(RETRY_WAITS_S[retries % len(RETRY_WAITS_S)])
                retries += 1


@asynccontextmanager
async def registrar(keys: BridgeKeys, contacts: Mapping[str, int]) -> AsyncIterator[int]:
    """A registrar that has every agent's record already; its port.

    Args:
        contacts: port of each agent, by its id.
    """
    record: dict[str, object] = {
        "aik_tpm": base64.b64encode(keys.ak_public).decode("ascii"),
        "ek_tpm": base64.b64encode(keys.ek_public).decode("ascii"),
        "ekcert": base64.b64encode(keys.ek_cert).decode("ascii"),
        "mtls_cert": keys.tls_cert,
        "ip": "127.0.0.1",
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode("ascii")
                results: Mapping[str, object] = {"supported_versions": ["2.6"]}
                if path != "/version":
                    agent_id = path.rpartition("/")[2]
                    results = {**record, "agent_id": agent_id, "port": contacts[agent_id]}
                body = json.dumps({"code": 200, "results": results}).encode("ascii")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port: int = server.sockets[0].getsockname()[1]
        yield port


@asynccontextmanager
async def hanging() -> AsyncIterator[int]:
    """A proxy that takes every connection and never answers; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port: int = server.sockets[0].getsockname()[1]
        yield port
