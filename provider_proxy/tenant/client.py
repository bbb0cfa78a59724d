"""Asks a proxy over HTTP. The `httpx.AsyncClient` is the caller's: its TLS, its pool, its event loop
(asyncio or trio). Trusts nothing that comes back; `verify` judges it.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import httpx

from provider_proxy.common.http import IDENTITY, no_answer, read_body
from provider_proxy.errors import EvidenceFormatError, ReplyError
from provider_proxy.evidence.model import HashAlg, QuoteRequest, TrustedHost, VerifiedQuote
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.evidence.verify import HostHistory, Verifier, new_challenge
from provider_proxy.tenant.replies import body_limit, refused

ANSWER_LIMIT_S = 300.0  # for all of an answer, above the longest timeout_ms: a trickle is no answer
MAX_IDENTITY_BYTES = 64 * 1024
MAX_CHAIN = 8  # certificates between the EK's and its maker's
MAX_REGISTRATIONS = 100  # a tenant has one registrar, or a few
NAME_RE = re.compile(r"[A-Za-z0-9._-]{1,80}", re.ASCII)
MAX_CA_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedRegistration:
    """The host in one of the tenant's own registrars, as the proxy says.

    Attributes:
        registrar: the provider's name of it.
        agent_id: the host's id there.
        state: "registered", for example; docs/registration.md has them all.
    """

    registrar: str
    agent_id: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedIdentity:
    """What a proxy *says* of its host's keys. Unsigned: compare it with the registrar's record.

    Attributes:
        ak_public, ek_public: TPM2B_PUBLIC, unparsed.
        ek_cert: DER; None where the TPM has none.
        ek_chain: CAs that may stand between `ek_cert` and its maker's, DER.
        registrations: those of the tenant that asked.
    """

    ak_public: bytes
    ek_public: bytes
    ek_cert: bytes | None
    host_uuid: str
    software: bool
    ek_chain: tuple[bytes, ...] = ()
    registrations: tuple[ClaimedRegistration, ...] = ()


class ProxyClient:
    """One proxy.

    Args:
        http: the caller's client; the caller closes it.
        base_url: "https://host:8890".
    """

    def __init__(self, http: httpx.AsyncClient, base_url: str) -> None:
        self._http = http
        self._base_url = base_url.rstrip("/")

    async def fetch(self, request: QuoteRequest) -> bytes:
        """Ask for a quote; the body of the answer, unverified and of bounded size.

        Raises:
            ReplyError: no answer, an HTTP error, or too large an answer.
        """
        target = f"/verifier/quote?{encode_quote_query(request)}"
        return await self._get(target, body_limit(request))

    async def identity(self) -> ClaimedIdentity:
        """Ask for the host's keys.

        Raises:
            ReplyError: as `fetch`.
            EvidenceFormatError: not an identity.
        """
        body = await self._get("/verifier/identity", MAX_IDENTITY_BYTES)
        values = parse_json_object(body, "identity")
        results = Fields(values, "identity").fields("results")
        raw = values["results"]
        has_cert = isinstance(raw, dict) and raw.get("ek_cert") is not None
        if not isinstance(raw, dict) or not isinstance(raw.get("software"), bool):
            raise EvidenceFormatError("identity.results.software is not true or false")
        host_uuid = results.text("host_uuid", 36)
        if not NAME_RE.fullmatch(host_uuid):
            raise EvidenceFormatError("identity.results.host_uuid is none")
        return ClaimedIdentity(
            ak_public=results.base64("ak_tpm", 1024),
            ek_public=results.base64("ek_tpm", 1024),
            ek_cert=results.base64("ek_cert", 16 * 1024) if has_cert else None,
            host_uuid=host_uuid,
            software=bool(raw["software"]),
            ek_chain=_parse_chain(raw.get("ek_chain", [])),
            registrations=_parse_registrations(raw.get("registrations", [])),
        )

    async def vtpm_ca(self) -> bytes:
        """Ask for the certificate of the host's vTPM CA: DER, for `check_ca_certificate` to judge.

        Raises:
            ReplyError: as `fetch`; status 404 where the host has no CA.
            EvidenceFormatError: not such an answer.
        """
        body = await self._get("/verifier/vtpm-ca", MAX_IDENTITY_BYTES)
        results = Fields(parse_json_object(body, "vtpm-ca"), "vtpm-ca").fields("results")
        return results.base64("ca_cert", MAX_CA_BYTES)

    async def attest(
        self,
        verifier: Verifier,
        host: TrustedHost,
        history: HostHistory,
        *,
        mask: int,
        bank: HashAlg = HashAlg.SHA256,
        vm: uuid.UUID | None = None,
        timeout_ms: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> VerifiedQuote:
        """Make a nonce, ask, verify: the whole of a tenant's work in one call.

        Args:
            vm: whose link to the host is asked for; the policy then holds a `VtpmLink`.

        Raises:
            ReplyError: no answer.
            VerificationError: the answer was refused.
        """
        challenge = new_challenge(
            mask=mask, now_s=now(), history=history, bank=bank, vm=vm, timeout_ms=timeout_ms
        )
        try:
            body = await self.fetch(challenge.request)
            return verifier.verify(body, challenge, host, history, now_s=now())
        finally:
            history.spend(challenge.request.nonce)  # unanswered or refused: never good again

    async def _get(self, path: str, limit: int) -> bytes:
        try:
            with anyio.fail_after(ANSWER_LIMIT_S), no_answer("the proxy"):
                async with self._http.stream(
                    "GET", self._base_url + path, headers=IDENTITY
                ) as response:
                    body = await read_body(response, limit, "the proxy")
        except TimeoutError as exc:
            raise ReplyError(f"the proxy gave no whole answer within {ANSWER_LIMIT_S:g} s") from exc
        if response.status_code != 200:
            retry_after = response.headers.get("retry-after", "")
            raise refused(response.status_code, body, retry_after)
        return body


def _parse_chain(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > MAX_CHAIN:
        raise EvidenceFormatError(f"identity.results.ek_chain is not a list of at most {MAX_CHAIN}")
    return tuple(
        Fields({"certificate": item}, "identity.results.ek_chain").base64("certificate", 16 * 1024)
        for item in value
    )


def _parse_registrations(value: object) -> tuple[ClaimedRegistration, ...]:
    if not isinstance(value, list) or len(value) > MAX_REGISTRATIONS:
        raise EvidenceFormatError(
            f"identity.results.registrations is not a list of at most {MAX_REGISTRATIONS}"
        )
    found = []
    for item in value:
        fields = Fields(item if isinstance(item, dict) else {}, "identity.results.registrations")
        texts = {name: fields.text(name, 80) for name in ("registrar", "agent_id", "state")}
        if not all(map(NAME_RE.fullmatch, texts.values())):
            raise EvidenceFormatError("identity.results.registrations holds a name that is none")
        found.append(ClaimedRegistration(**texts))
    return tuple(found)
