"""A Keylime registrar in this process, that behaves as the real one does (test_registrar_contract.py
holds both to the same tests), and a TPM that needs no chip."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import trio
from challenges import encode_challenge
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tpm2_pytss.types import TPM2B_NAME, TPM2B_PUBLIC
from tpm2_pytss.utils import make_credential as make_credential_for

from provider_proxy.errors import EvidenceFormatError, QuoteError, TpmError
from provider_proxy.evidence.tpm_keys import parse_public
from provider_proxy.testing.soft_tpm import SoftTpm

VERSIONS = ["1.0", "2.0", "2.1", "2.2", "2.3", "2.4", "2.5", "2.6", "3.0"]
PATH_RE = re.compile(r"/v2\.[0-6]/agents/([A-Za-z0-9._-]+)")
RC_INTEGRITY = 0x09F
DER = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

Wrap = Callable[[bytes, bytes, bytes], bytes]
"""EK, AK and a key to a challenge that only that TPM solves."""


def sized(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def wrap(ek: bytes, ak: bytes, key: bytes) -> bytes:
    """TPM2_MakeCredential, for a real TPM."""
    public, _ = TPM2B_PUBLIC.unmarshal(ek)
    blob, secret = make_credential_for(public, key, TPM2B_NAME(parse_public(ak).name))
    return encode_challenge(blob.marshal(), secret.marshal())


def wrap_for_fake(ek: bytes, ak: bytes, key: bytes) -> bytes:
    """For `FakeTpm`: nothing is hidden."""
    return encode_challenge(sized(sized(hashlib.sha256(ek + ak).digest()) + key), sized(b"seed"))


@dataclass(slots=True)
class Stored:
    """A record."""

    body: dict[str, object]
    key: bytes
    active: bool = False
    regcount: int = 1


class FakeRegistrar:
    """Answers as Keylime 7.14's.

    Args:
        has_cert: True where its clients have a certificate, so that they may read.

    Attributes:
        records: by agent id.
        calls: method and path of each request.
        intercept: answers instead, or raises, where it gives something; None lets it pass.
    """

    def __init__(self, *, wrap: Wrap = wrap_for_fake, has_cert: bool = True) -> None:
        self._wrap = wrap
        self.has_cert = has_cert
        self.versions = list(VERSIONS)
        self.records: dict[str, Stored] = {}
        self.calls: list[tuple[str, str]] = []
        self.bodies: list[dict[str, object]] = []
        self.intercept: Callable[[httpx.Request], Awaitable[httpx.Response | None]] | None = None

    @asynccontextmanager
    async def open_http(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client of this registrar; no sockets."""
        async with httpx.AsyncClient(transport=httpx.MockTransport(self.handle)) as http:
            yield http

    async def handle(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        self.calls.append((request.method, request.url.path))
        if self.intercept is not None:
            answer = await self.intercept(request)
            if answer is not None:
                return answer
        return self.answer(request)

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/version":
            return reply(200, {"current_version": "2.6", "supported_versions": self.versions})
        match = PATH_RE.fullmatch(request.url.path)
        if match is None:
            return reply(404)
        body = json.loads(request.content) if request.content else {}
        if request.method == "POST":
            self.bodies.append(body)
            return self._register(match[1], body)
        if request.method == "PUT":
            return self._activate(match[1], str(body.get("auth_tag")))
        assert request.method == "GET"
        return self._read(match[1])

    def _register(self, agent_id: str, body: dict[str, object]) -> httpx.Response:
        before = self.records.get(agent_id)
        if before is not None:
            for name in ("ek_tpm", "ekcert", "aik_tpm"):
                old = before.body.get(name)
                if old is not None and old != body.get(name):
                    return reply(403, status="re-registration with different TPM identity")
        try:
            ek, ak = (base64.b64decode(str(body[name])) for name in ("ek_tpm", "aik_tpm"))
            parse_public(ak)
            public = parse_public(ek).public_key
        except EvidenceFormatError:
            return raw(500, b"")  # the real one stumbles over it
        try:
            cert = body.get("ekcert")
            if cert is not None:
                found = x509.load_der_x509_certificate(base64.b64decode(str(cert))).public_key()
                if found.public_bytes(*DER) != public.public_bytes(*DER):
                    raise ValueError("another key")
        except ValueError:
            return reply(400, status="Could not register agent with invalid data")
        key = os.urandom(24).hex()[:32].encode("ascii")
        count = before.regcount + 1 if before is not None else 1
        self.records[agent_id] = Stored(body, key, regcount=count)
        return reply(200, {"blob": base64.b64encode(self._wrap(ek, ak, key)).decode("ascii")})

    def _activate(self, agent_id: str, tag: str) -> httpx.Response:
        stored = self.records.get(agent_id)
        if stored is None:
            return reply(404)
        text = base64.b64encode(stored.key)
        if tag != hmac.new(text, agent_id.encode(), hashlib.sha384).hexdigest():
            del self.records[agent_id]
            return reply(400, status=f"Auth tag '{tag}' does not match")
        stored.active = True
        return reply(200)

    def _read(self, agent_id: str) -> httpx.Response:
        if not self.has_cert:
            return raw(403, b'{"errors": [{"status": "403"}]}')
        stored = self.records.get(agent_id)
        if stored is None or not stored.active:
            return reply(404)
        names = ("ek_tpm", "ekcert", "aik_tpm", "mtls_cert", "ip", "port")
        values = {name: stored.body.get(name) for name in names}
        return reply(200, {"agent_id": agent_id, "regcount": stored.regcount, **values})


def reply(
    code: int, results: dict[str, object] | None = None, *, status: str = ""
) -> httpx.Response:
    """Keylime's envelope."""
    envelope = {"code": code, "status": status or "Success", "results": results or {}}
    return raw(code, json.dumps(envelope).encode())


def raw(code: int, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    """Any answer, that comes in pieces as from a socket."""

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 4096):
            await trio.lowlevel.checkpoint()
            yield body[at : at + 4096]

    return httpx.Response(code, content=pieces(), headers=headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeKeys:
    """What is registered."""

    ak_public: bytes
    ek_public: bytes
    ek_cert: bytes | None = None


class FakeTpm:
    """A `registration.TpmIdentity` that solves the challenges of `wrap_for_fake`.

    Attributes:
        activations: how many were asked for.
        error: raised instead, where set.
        delay_s: of trio's clock.
    """

    def __init__(self, *, ek_cert: bytes | None = None) -> None:
        self.identity = FakeKeys(
            ak_public=SoftTpm().ak_public, ek_public=SoftTpm().ak_public, ek_cert=ek_cert
        )
        self.activations = 0
        self.error: Exception | None = None
        self.delay_s = 0.0

    async def activate_credential(self, credential: bytes, secret: bytes) -> bytes:
        self.activations += 1
        await trio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        mine = hashlib.sha256(self.identity.ek_public + self.identity.ak_public).digest()
        if credential[4:36] != mine:
            raise refusal()
        return credential[36:]


def refusal(code: int = RC_INTEGRITY, text: str = "the TPM refused") -> QuoteError:
    """What `EsysQuoter` raises for a credential that is not for its keys."""
    error = QuoteError(text, retry_after_s=1.0)
    error.__cause__ = TpmError("TPM2_ActivateCredential", code=code)
    return error
