"""What a Keylime registrar recorded for an agent: the API version, one GET, a strict parse.

The `httpx.AsyncClient` is the caller's: its TLS, its pool, its event loop (asyncio or trio). A record
is what a client sent to the registrar's open port and then proved by credential activation. This module
does not judge whether to trust EK and AK. Every call is bounded by `CALL_LIMIT_S` and by a size.
"""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import httpx

from provider_proxy.common.addresses import parse_agent_id, parse_safe_url
from provider_proxy.common.http import IDENTITY, no_answer, read_body
from provider_proxy.errors import (
    BindingError,
    EvidenceFormatError,
    NotRegisteredError,
    ReplyError,
)
from provider_proxy.evidence.strict_json import Fields, parse_json_object

# The versions whose record this module can parse, the best first. 3.0 answers 500 (7.14.3).
OLD_HINT = ", as Keylime before 7.12 does on this port: 7.12 or later is needed"
VERSIONS = ("2.6", "2.5", "2.4", "2.3", "2.2", "2.1", "2.0")
CALL_LIMIT_S = 30.0  # version and record together; Keylime's own tenant waits 60 s
MAX_ANSWER_BYTES = 256 * 1024  # a record with DevID certificates is some 10 kB
MAX_PUBLIC_BYTES = 1024
MAX_CERT_BYTES = 16 * 1024
MAX_VERSIONS = 64
NO_MTLS = "disabled"
# The pooled connection was closed by the other side, by a restarted registrar for example.
STALE = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRecord:
    """A record as the registrar gave it; nothing in it is trusted.

    Attributes:
        ek_public, ak_public: TPM2B_PUBLIC.
        ek_cert: DER; None where the agent sent none.
        tls_cert: PEM of the certificate that the agent shows; None where it has no mTLS.
    """

    agent_id: str
    ek_public: bytes
    ek_cert: bytes | None
    ak_public: bytes
    tls_cert: bytes | None = None


class AgentRecords:
    """One registrar.

    Args:
        http: the caller's client, with the client certificate that the registrar demands.
        base_url: "https://registrar:8891".

    Raises:
        UsageError: the URL is neither https nor http on loopback.
    """

    def __init__(self, http: httpx.AsyncClient, base_url: str) -> None:
        self._http = http
        self._base_url = parse_safe_url(base_url)
        self._version: str | None = None

    async def fetch(self, agent_id: str) -> AgentRecord:
        """Ask for a record.

        Raises:
            NotRegisteredError: there is no record, or it never went through credential activation.
            BindingError: the record has no EK, or belongs to another id.
            ReplyError: no answer, or not a registrar's answer.
            UsageError: not an agent id.
        """
        parse_agent_id(agent_id)
        try:
            with anyio.fail_after(CALL_LIMIT_S):
                return await self._fetch(agent_id)
        except TimeoutError as exc:
            raise ReplyError(f"the registrar gave no answer within {CALL_LIMIT_S:g} s") from exc

    async def _fetch(self, agent_id: str) -> AgentRecord:
        version, was_known = self._version, self._version is not None
        if version is None:
            version = await self._negotiate()
        status, body = await self._get(f"/v{version}/agents/{agent_id}")
        if was_known and _may_be_the_version(status, body):
            negotiated = await self._negotiate()
            if negotiated != version:  # another registrar answers there now
                status, body = await self._get(f"/v{negotiated}/agents/{agent_id}")
        if status == 404 and _is_envelope(body):
            raise NotRegisteredError(f"the registrar has no active record of {agent_id}")
        if status != 200:
            self._version = None
            raise ReplyError(f"the registrar answered {status}", status=status)
        return _parse_record(body, agent_id)

    async def _negotiate(self) -> str:
        status, body = await self._get("/version")
        if status != 200:
            old = OLD_HINT if status in (400, 404) else ""
            raise ReplyError(
                f"the registrar answered {status} when asked for its versions{old}", status=status
            )
        self._version = _best_version(body)
        return self._version

    async def _get(self, path: str) -> tuple[int, bytes]:
        with no_answer("the registrar"):
            try:
                return await self._get_once(path)
            except STALE:
                return await self._get_once(path)  # on a new connection; a GET may be repeated

    async def _get_once(self, path: str) -> tuple[int, bytes]:
        async with self._http.stream("GET", self._base_url + path, headers=IDENTITY) as response:
            body = await read_body(response, MAX_ANSWER_BYTES, "the registrar")
        return response.status_code, body


def _is_envelope(body: bytes) -> bool:
    """True for Keylime's own answer; a path that it does not serve gets an empty body."""
    try:
        return "results" in parse_json_object(body, "the registrar's answer")
    except EvidenceFormatError:
        return False


def _may_be_the_version(status: int, body: bytes) -> bool:
    """True where the path's version, rather than the agent, may be unknown.

    The real registrar (7.14.3) answers 404 without a body, others 400 or 410 with a text.
    """
    return status in (400, 410, 500) or (status == 404 and not _is_envelope(body))


def _best_version(body: bytes) -> str:
    """The best of `VERSIONS` that the registrar has.

    Raises:
        ReplyError: it has none of them, or the answer is not a registrar's.
    """
    try:
        values = parse_json_object(body, "the registrar's versions")
    except EvidenceFormatError as exc:
        raise ReplyError(str(exc)) from exc
    results = values.get("results")
    listed = results.get("supported_versions") if isinstance(results, dict) else None
    if not isinstance(listed, list) or len(listed) > MAX_VERSIONS:
        raise ReplyError("the registrar's answer does not hold a list of versions")
    for version in VERSIONS:
        if version in listed:
            return version
    raise ReplyError("the registrar has none of the API versions " + ", ".join(VERSIONS))


def _parse_record(body: bytes, agent_id: str) -> AgentRecord:
    try:
        values = parse_json_object(body, "record")
        raw = values.get("results")
        fields = Fields(values, "record").fields("results")
        assert isinstance(raw, dict)  # or `fields` would have refused it
        if raw.get("ek_tpm") is None:
            raise BindingError(f"the registrar's record of {agent_id} has no EK")
        if raw.get("agent_id", agent_id) != agent_id:
            raise BindingError(f"the registrar gave another agent's record for {agent_id}")
        return AgentRecord(
            agent_id=agent_id,
            ek_public=fields.base64("ek_tpm", MAX_PUBLIC_BYTES),
            ek_cert=(
                None if raw.get("ekcert") is None else fields.base64("ekcert", MAX_CERT_BYTES)
            ),
            ak_public=fields.base64("aik_tpm", MAX_PUBLIC_BYTES),
            tls_cert=(
                None
                if raw.get("mtls_cert") in (None, NO_MTLS)
                else fields.text("mtls_cert", MAX_CERT_BYTES).encode("utf-8")
            ),
        )
    except (EvidenceFormatError, UnicodeEncodeError) as exc:  # JSON may hold half a character
        raise BindingError(f"the registrar's record of {agent_id} cannot be read: {exc}") from exc
