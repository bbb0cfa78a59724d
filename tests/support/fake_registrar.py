"""A Keylime registrar in this process: what the real one (7.14.3) answers, for what tests need of it.

It keeps records, makes real credentials, checks the tags, and forgets a record whose tag is wrong. The
contract tests of test_bindings hold it against the real one. Faults can be planted between.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from hashlib import sha256

import httpx
from cryptography.hazmat.primitives.asymmetric import rsa
from soft_ek import auth_tag, make_credential

from provider_proxy.evidence.tpm_keys import parse_public

VERSIONS = ("1.0", "2.0", "2.1", "2.2", "2.3", "2.4", "2.5", "2.6", "3.0")
PATH_RE = re.compile(r"/v([0-9.]+)/agents/([^/]+)")


class FakeRegistrar:
    """Answers requests; `calls` are the paths of all that came.

    Attributes:
        versions: what it serves; may be changed at any time.
        before: awaited before each answer; may wait, or raise what a broken connection raises.
        override: an answer instead of its own, where it returns one.
    """

    url = "https://registrar.example:8891"

    def __init__(self) -> None:
        self.versions: tuple[str, ...] = VERSIONS
        self.calls: list[str] = []
        self.before: Callable[[], Awaitable[None]] | None = None
        self.override: Callable[[httpx.Request], httpx.Response | None] | None = None
        self._records: dict[str, dict[str, object]] = {}
        self._secrets: dict[str, bytes] = {}

    def client(self) -> httpx.AsyncClient:
        """A client that reaches this registrar and nothing else."""
        return httpx.AsyncClient(transport=httpx.MockTransport(self._answer))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request.url.path)
        if self.before is not None:
            await self.before()
        if self.override is not None:
            answer = self.override(request)
            if answer is not None:
                return answer
        return self.handle(request.method, request.url.path, request.content)

    def handle(self, method: str, path: str, content: bytes = b"") -> httpx.Response:
        """One request's answer."""
        if path == "/version":
            versions: dict[str, object] = {
                "current_version": "2.6",
                "supported_versions": list(self.versions),
            }
            return envelope(200, versions)
        match = PATH_RE.fullmatch(path)
        if match is None or match[1] not in self.versions:
            return httpx.Response(404)  # an empty body, unlike for an agent that is unknown
        if match[1] == "3.0":
            return httpx.Response(500)
        agent_id = match[2]
        if method == "POST":
            return self._register(agent_id, json.loads(content))
        if method == "PUT":
            return self._activate(agent_id, json.loads(content))
        record = self._records.get(agent_id)
        if record is None or not record["active"]:
            return envelope(404, {}, f"Agent with ID '{agent_id}' not found")
        if method == "DELETE":
            del self._records[agent_id]
            return envelope(200, {})
        return envelope(200, {k: v for k, v in record.items() if k != "active"})

    def _register(self, agent_id: str, values: dict[str, object]) -> httpx.Response:
        known = self._records.get(agent_id)
        if known is not None and any(
            known[key] != values[key] for key in ("ek_tpm", "ekcert", "aik_tpm")
        ):
            return envelope(
                403, {}, "Agent re-registration with different TPM identity is forbidden"
            )
        ek = parse_public(base64.b64decode(str(values["ek_tpm"]))).public_key
        assert isinstance(ek, rsa.RSAPublicKey)
        area = base64.b64decode(str(values["aik_tpm"]))[2:]
        secret = secrets.token_hex(16).encode()
        self._secrets[agent_id] = secret
        self._records[agent_id] = {"agent_id": agent_id, **values, "regcount": 1, "active": False}
        blob = make_credential(ek, b"\x00\x0b" + sha256(area).digest(), secret)
        return envelope(200, {"blob": base64.b64encode(blob).decode()})

    def _activate(self, agent_id: str, values: dict[str, object]) -> httpx.Response:
        record = self._records.get(agent_id)
        if record is None:
            return envelope(404, {}, f"Agent with ID '{agent_id}' not found")
        if values["auth_tag"] != auth_tag(self._secrets[agent_id], agent_id):
            del self._records[agent_id]
            return envelope(400, {}, "auth_tag is wrong")
        record["active"] = True
        return envelope(200, {})


def envelope(code: int, results: dict[str, object], status: str = "Success") -> httpx.Response:
    """Keylime's."""
    body = json.dumps({"code": code, "status": status, "results": results})
    return httpx.Response(code, content=body, headers={"Content-Type": "application/json"})
