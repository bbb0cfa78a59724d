"""Asks a proxy over HTTP. The `httpx.AsyncClient` is the caller's: its TLS, its pool, its event loop
(asyncio or trio). Nothing that comes back is trusted; `verify` judges it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import anyio
import httpx

from provider_proxy.common.http import IDENTITY, no_answer, read_body
from provider_proxy.errors import ReplyError
from provider_proxy.evidence.model import HashAlg, QuoteRequest, TrustedHost, VerifiedQuote
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.evidence.verify import HostHistory, Verifier, new_challenge
from provider_proxy.tenant.identity import (
    MAX_IDENTITY_BYTES,
    PATH,
    ClaimedIdentity,
    parse_identity,
)
from provider_proxy.tenant.replies import body_limit, refused

ANSWER_LIMIT_S = 300.0  # for a whole answer, above the longest timeout_ms: a trickle must end
MAX_CA_BYTES = 16 * 1024


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
        body = await self._get(PATH, MAX_IDENTITY_BYTES)
        return parse_identity(body)

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
        """Make a nonce, ask, verify: all of a tenant's work in one call.

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
            history.spend(challenge.request.nonce)  # unanswered or refused: never valid again

    async def _get(self, path: str, limit: int) -> bytes:
        try:
            with anyio.fail_after(ANSWER_LIMIT_S), no_answer("the proxy"):
                async with self._http.stream(
                    "GET", self._base_url + path, headers=IDENTITY
                ) as response:
                    body = await read_body(response, limit, "the proxy")
        except TimeoutError as exc:
            raise ReplyError(
                f"the proxy gave no complete answer within {ANSWER_LIMIT_S:g} s"
            ) from exc
        if response.status_code != 200:
            retry_after = response.headers.get("retry-after", "")
            raise refused(response.status_code, body, retry_after)
        return body
