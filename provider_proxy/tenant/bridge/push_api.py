"""Keylime's push API, for one host's agent: a session, and in it attestations (Keylime 7.14.3, API 3.0).

    POST  /v3.0/sessions, PATCH /v3.0/sessions/ID        a challenge that the AK answers; a bearer token
    POST  /v3.0/agents/ID/attestations                   what can be shown; what the verifier wants of it
    PATCH /v3.0/agents/ID/attestations/latest            the evidence
    GET   /v2.6/agents/ID                                the verdict

Push mode is experimental in Keylime, and so it is here. The verifier is the tenant's own; its answers are
bounded all the same. If the token is refused, a new session is made, once.
Source: Keylime 7.14.3, `web/verifier/`, `models/verifier/`, `verification/tpm_engine.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
import trio

from provider_proxy.common.http import no_answer, read_body
from provider_proxy.errors import EvidenceFormatError, NotSupportedError, ReplyError
from provider_proxy.evidence.model import PCR_COUNT
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.evidence.wire import MAX_EVIDENCE_WITH_LOGS_BYTES
from provider_proxy.tenant.bridge.keys import RSA_BITS, BridgeKeys
from provider_proxy.tenant.bridge.quoting import make_possession
from provider_proxy.tenant.replies import MAX_RETRY_AFTER_S, MAX_STATUS_CHARS

PUSH, STATUS = (
    "/v3.0",
    "/v2.6",
)  # only the administrator may read attestations; an agent may read its state
CALL_LIMIT_S = 60.0  # a whole call; it may send an IMA list of megabytes
MAX_ANSWER_BYTES = MAX_EVIDENCE_WITH_LOGS_BYTES + 1024 * 1024  # the evidence comes back
MAX_TOKEN_CHARS = 1024
MAX_CHALLENGE_BYTES = 64
MAX_ENTRY = 10**9
SESSIONS = f"{PUSH}/sessions"
JSON_API = "application/vnd.api+json"
QUOTE, IMA, UEFI = "tpm_quote", "ima_log", "uefi_log"
CLASSES = {QUOTE: "certification", IMA: "log", UEFI: "log"}


class NotEnrolledError(ReplyError):
    """The verifier does not know the agent (yet)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What an attestation will show.

    Attributes:
        boottime: rises with each reset of the host's TPM, Keylime reads it as seconds since the epoch.
        entries: how many lines the host's IMA list has at least.
        note: kept by the verifier with the attestation, and shown with it: why a host is refused.
    """

    boottime: int
    entries: int
    note: str | None = None

    def attributes(self) -> dict[str, object]:
        """JSON, as the verifier accepts it."""
        key = {
            "key_class": "asymmetric",
            "key_algorithm": "rsa",
            "key_size": RSA_BITS,
            "server_identifier": "ak",
        }
        quote: dict[str, object] = {
            "component_version": "2.0",
            "signature_schemes": ["rsassa"],
            "hash_algorithms": ["sha256"],
            "available_subjects": {"sha256": list(range(PCR_COUNT))},
            "certification_keys": [key],
        }
        if self.note is not None:
            quote["evidence_version"] = self.note
        ima = {
            "entry_count": self.entries,
            "supports_partial_access": True,
            "appendable": True,
            "formats": ["text/plain"],
        }
        uefi = {
            "supports_partial_access": False,
            "appendable": False,
            "formats": ["application/octet-stream"],
        }
        supported = [
            {"evidence_class": CLASSES[kind], "evidence_type": kind, "capabilities": able}
            for kind, able in ((QUOTE, quote), (UEFI, uefi), (IMA, ima))
        ]
        return {
            "evidence_supported": supported,
            "system_info": {"boot_time": self.boottime},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the verifier wants from an offer.

    Attributes:
        challenge: goes into the quote.
        mask: PCRs of the SHA-256 bank.
        ima_offset: the IMA list from this line on; None where it is not wanted.
        kinds: of the evidence, in the order in which it must come.
    """

    challenge: bytes
    mask: int
    ima_offset: int | None
    kinds: tuple[str, ...]


class PushVerifier:
    """One agent at a verifier in push mode.

    Args:
        http: without a client certificate: agents prove themselves with their AK.
        base_url: "https://verifier:8881".
    """

    def __init__(
        self, http: httpx.AsyncClient, base_url: str, agent_id: str, keys: BridgeKeys
    ) -> None:
        self._http = http
        self._base = base_url.rstrip("/")
        self._attestations = f"{PUSH}/agents/{agent_id}/attestations"
        self._agent_id = agent_id
        self._keys = keys
        self._token: str | None = None

    async def offer(self, offer: Offer) -> Request:
        """Begin an attestation.

        Raises:
            NotEnrolledError: the agent was not added to the verifier.
            ReplyError: the verifier does not accept one now, or gave no answer.
        """
        body = {"data": {"type": "attestation", "attributes": offer.attributes()}}
        answer = await self._in_session("POST", self._attestations, body)
        return _read_request(answer)

    async def submit(self, evidence: Sequence[tuple[str, Mapping[str, object]]]) -> float:
        """Send the evidence, by kind, in the wanted order; seconds until the next attestation.

        Raises: ReplyError
        """
        collected = [
            {"evidence_class": CLASSES[kind], "evidence_type": kind, "data": data}
            for kind, data in evidence
        ]
        body = {"data": {"type": "attestation", "attributes": {"evidence_collected": collected}}}
        answer = await self._in_session("PATCH", f"{self._attestations}/latest", body)
        try:
            seconds = Fields(answer, "the answer").fields("meta")
            return min(seconds.number("seconds_to_next_attestation"), MAX_RETRY_AFTER_S)
        except EvidenceFormatError as exc:
            raise ReplyError(f"the verifier's answer to evidence cannot be read: {exc}") from exc

    async def verdict(self) -> str | None:
        """The verifier's verdict: pass, fail or timeout; None where it has none yet.

        Raises: ReplyError
        """
        answer = await self._in_session("GET", f"{STATUS}/agents/{self._agent_id}", None)
        try:
            found = Fields(answer, "the answer").fields("results").text("attestation_status", 32)
        except EvidenceFormatError as exc:
            raise ReplyError(f"the verifier's verdict cannot be read: {exc}") from exc
        return found.lower() if found in ("PASS", "FAIL", "TIMEOUT") else None

    async def _in_session(
        self, method: str, path: str, body: Mapping[str, object] | None
    ) -> Mapping[str, object]:
        had_one = self._token is not None
        if not had_one:
            await self._open_session()
        try:
            return await self._call(method, path, body)
        except ReplyError as exc:
            if exc.status != 401:
                raise
            self._token = None
            if not had_one:
                raise
        await self._open_session()
        return await self._call(method, path, body)

    async def _open_session(self) -> None:
        attributes: dict[str, object] = {
            "agent_id": self._agent_id,
            "authentication_supported": [_POP],
        }
        body: dict[str, object] = {"data": {"type": "session", "attributes": attributes}}
        try:
            data = Fields(await self._call("POST", SESSIONS, body), "the session").fields("data")
            session = data.text("id", 64)
            asked = data.fields("attributes")
            challenge = _challenge(asked.objects("authentication_requested", 8))
        except EvidenceFormatError as exc:
            raise ReplyError(f"the verifier's session cannot be read: {exc}") from exc
        if not session.replace("-", "").isalnum():
            raise ReplyError("the verifier's session has an id that is not valid")
        message, signature = make_possession(self._keys, challenge)
        proof = _POP | {"data": {"message": _b64(message), "signature": _b64(signature)}}
        attributes = {"agent_id": self._agent_id, "authentication_provided": [proof]}
        body = {"data": {"type": "session", "id": session, "attributes": attributes}}
        answer = await self._call("PATCH", f"{SESSIONS}/{session}", body)
        try:
            got = Fields(answer, "the session").fields("data").fields("attributes")
            if got.text("evaluation", 32) != "pass":
                # Keylime's only answer for an agent that it does not know.
                raise NotEnrolledError(
                    f"the verifier does not know agent {self._agent_id}: add it with keylime_tenant "
                    f"--push-model -c add -u {self._agent_id}"
                )
            token = got.text("token", MAX_TOKEN_CHARS)
        except EvidenceFormatError as exc:
            raise ReplyError(f"the verifier's session cannot be read: {exc}") from exc
        if not token.isascii() or not token.isprintable():
            raise ReplyError("the verifier's token is not text that a header can hold")
        self._token = token

    async def _call(
        self, method: str, path: str, body: Mapping[str, object] | None
    ) -> Mapping[str, object]:
        headers = {} if body is None else {"Content-Type": JSON_API, "Accept": JSON_API}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        content = None if body is None else json.dumps(body).encode("ascii")
        try:
            with no_answer("the verifier"), trio.fail_after(CALL_LIMIT_S):
                async with self._http.stream(
                    method, self._base + path, content=content, headers=headers
                ) as response:
                    received = await read_body(response, MAX_ANSWER_BYTES, "the verifier")
        except trio.TooSlowError as exc:
            raise ReplyError(
                f"the verifier gave no complete answer within {CALL_LIMIT_S:g} s"
            ) from exc
        if response.status_code not in (200, 201, 202):
            raise _refused(response, received, path)
        try:
            return parse_json_object(received, "the verifier's answer")
        except EvidenceFormatError as exc:
            raise ReplyError(str(exc)) from exc


_POP: dict[str, object] = {"authentication_class": "pop", "authentication_type": "tpm_pop"}


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _refused(response: httpx.Response, body: bytes, path: str) -> ReplyError:
    status, wait = response.status_code, response.headers.get("retry-after", "")
    seconds = None
    if wait.isascii() and wait.isdecimal() and len(wait) < 9:
        seconds = min(float(wait), MAX_RETRY_AFTER_S)
    text = f"the verifier answered {status}: {_reason(body)}"
    if status == 404 and path == SESSIONS:
        return NotSupportedError(
            "the verifier does not support push mode, which needs Keylime 7.14.3 with mode = push",
            status=404,
        )
    return ReplyError(text, status=status, retry_after_s=seconds)


def _reason(body: bytes) -> str:
    """The words of a JSON:API error, or of Keylime's envelope; one short printable line."""
    try:
        values = parse_json_object(body, "the answer")
    except EvidenceFormatError:
        return "no reason given"
    errors = values.get("errors")
    words = []
    for error in errors[:4] if isinstance(errors, list) else ():
        if isinstance(error, dict):
            words.append(str(error.get("detail") or error.get("title") or "no reason given"))
    text = "; ".join(words) or str(values.get("status", "no reason given"))
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_STATUS_CHARS])


def _challenge(asked: Sequence[Fields]) -> bytes:
    if not asked:
        raise EvidenceFormatError("it has no challenge")
    challenge = asked[0].fields("chosen_parameters").base64("challenge", MAX_CHALLENGE_BYTES)
    if not challenge:
        raise EvidenceFormatError("the challenge is empty")
    return challenge


def _read_request(answer: Mapping[str, object]) -> Request:
    """Raises: ReplyError"""
    try:
        attributes = Fields(answer, "the answer").fields("data").fields("attributes")
        challenge, mask, offset = b"", 0, None
        kinds = []
        for item in attributes.objects("evidence_requested", len(CLASSES)):
            kind = item.text("evidence_type", 32)
            if kind not in CLASSES or kind in kinds:
                raise EvidenceFormatError(f"evidence of the kind {kind!r} was not offered")
            kinds.append(kind)
            if kind == QUOTE:
                chosen = item.fields("chosen_parameters")
                challenge = _challenge((item,))
                subjects = chosen.fields("selected_subjects")
                for pcr in subjects.integers("sha256", PCR_COUNT, PCR_COUNT - 1):
                    mask |= 1 << pcr
            elif kind == IMA:
                offset = item.fields("chosen_parameters").integer("starting_offset", MAX_ENTRY)
    except EvidenceFormatError as exc:
        raise ReplyError(f"the verifier's request for evidence cannot be read: {exc}") from exc
    if not challenge:
        raise ReplyError(
            "the verifier asks for no quote of this agent: it has no policy for it, or only one that "
            "push mode ignores"
        )
    return Request(challenge=challenge, mask=mask, ima_offset=offset, kinds=tuple(kinds))
