"""Speaks to a Keylime agent: version negotiation and `quotes/integrity`, one request at a time.

Answers are untrusted: bounded, parsed strictly, and checked by the quoter. Every failure is an
`AgentError` with the step to take (see `tpm.response_codes`). Source: Keylime's agent API 2.0 to 2.6.

    AGAIN   408, 500 and 502: the agent's TPM gave no quote this time
    CLEAN   no connection, a broken or garbled answer, an API version that the agent no longer supports
    SLOW    429 and 503: it asks for fewer requests
    FATAL   any other refusal: a retry cannot help until an operator changes something
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass

import httpx
import trio

from provider_proxy.common.failures import is_certificate_refused, why
from provider_proxy.common.http import NO_ANSWER, http_client, read_body
from provider_proxy.errors import EvidenceFormatError, HostError, ReplyError
from provider_proxy.evidence.model import Quote
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.evidence.wire import parse_quote
from provider_proxy.host.tpm.response_codes import Step

API_VERSIONS = (
    "2.6",
    "2.5",
    "2.4",
    "2.3",
    "2.2",
    "2.1",
    "2.0",
)  # best first; the same for our requests
MAX_VERSION_BYTES = 64 * 1024
MAX_QUOTE_BYTES = 160 * 1024 * 1024  # the whole IMA list once, escaped
MAX_QUOTE_CHARS = 64 * 1024  # a quote string; 24 PCRs and RSA-4096 are 4 kB
MAX_UEFI_BYTES = 1024 * 1024
MAX_IMA_ENTRIES = 10_000_000
CONNECT_S = 5.0
ANSWER_S = 60.0  # for the whole answer; Keylime's request_timeout: a slow TPM may have a queue
STEP_OF_STATUS = {
    408: Step.AGAIN,
    500: Step.AGAIN,
    502: Step.AGAIN,
    504: Step.AGAIN,
    429: Step.SLOW,
    503: Step.SLOW,
}
UNSUPPORTED_RE = re.compile(r"version not supported", re.IGNORECASE)


class AgentError(HostError):
    """The agent gave no usable quote.

    Attributes:
        step: what to do next.
        cause: for metrics, from a bounded set of names.
    """

    def __init__(self, message: str, *, step: Step, cause: str) -> None:
        super().__init__(message)
        self.step = step
        self.cause = cause


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReply:
    """An agent's answer, parsed and not judged.

    Attributes:
        ima: lines of its IMA list from entry `ima_entry` on; None where it sent none.
        uefi: the firmware's event log; None where it sent none.
    """

    quote: Quote
    ima: str | None
    ima_entry: int
    uefi: bytes | None


class AgentClient:
    """One agent, one pooled connection.

    Args:
        url: "https://127.0.0.1:9002".
        context: see `pinned_context`; None for a plaintext agent on loopback.
        transport: sends requests; tests pass one with an agent of their own.
    """

    def __init__(
        self,
        url: str,
        context: ssl.SSLContext | None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._version: str | None = None
        self._http = http_client(
            context, read_limit_s=ANSWER_S, connect_limit_s=CONNECT_S, pool=1, transport=transport
        )

    async def close(self) -> None:
        """Close the connection."""
        await self._http.aclose()

    async def quote(self, nonce: str, mask: int, ima_entry: int) -> AgentReply:
        """Ask for a quote over the AK's bank.

        Args:
            nonce: becomes the quote's qualifying data; at most 64 letters and digits.
            ima_entry: the first wanted entry of the IMA list.

        Raises:
            AgentError: the agent gave none.
        """
        version = self._version or await self._negotiate()
        status, body = await self._get(
            f"/v{version}/quotes/integrity?nonce={nonce}&mask={mask:#x}&partial=1"
            f"&ima_ml_entry={ima_entry}",
            MAX_QUOTE_BYTES,
        )
        if status != 200:
            raise self._refusal(status, body)
        try:
            return _parse_reply(body)
        except EvidenceFormatError as exc:
            raise AgentError(
                f"the agent's answer is not a quote: {exc}", step=Step.CLEAN, cause="UNREADABLE"
            ) from exc

    async def _negotiate(self) -> str:
        status, body = await self._get("/version", MAX_VERSION_BYTES)
        if status != 200:
            raise self._refusal(status, body)
        try:
            spoken = _parse_versions(body)
        except EvidenceFormatError as exc:
            raise AgentError(
                f"the agent did not tell its API version: {exc}",
                step=Step.CLEAN,
                cause="UNREADABLE",
            ) from exc
        for version in API_VERSIONS:
            if version in spoken:
                self._version = version
                return version
        raise AgentError(
            f"the agent supports none of the API versions {API_VERSIONS[-1]} to {API_VERSIONS[0]}",
            step=Step.FATAL,
            cause="VERSION",
        )

    def _refusal(self, status: int, body: bytes) -> AgentError:
        reason = _reason(body)
        step = STEP_OF_STATUS.get(status, Step.FATAL)
        if status == 400 and UNSUPPORTED_RE.search(reason):
            self._version = None  # it was replaced by another release: ask again
            step = Step.CLEAN
        return AgentError(
            f"the agent answered {status}: {reason}", step=step, cause=f"HTTP_{status}"
        )

    async def _get(self, path: str, limit: int) -> tuple[int, bytes]:
        try:
            with trio.fail_after(ANSWER_S):
                async with self._http.stream("GET", self._url + path) as response:
                    body = await read_body(response, limit, "the agent")
        except trio.TooSlowError as exc:
            raise AgentError(
                f"no complete answer from the agent within {ANSWER_S:g} s",
                step=Step.CLEAN,
                cause="IO",
            ) from exc
        except ReplyError as exc:
            raise AgentError(str(exc), step=Step.FATAL, cause="TOO_LARGE") from exc
        except NO_ANSWER as exc:
            self._version = None  # another agent may start in its place
            is_stranger = is_certificate_refused(
                exc
            )  # only the registrar knows its new certificate
            raise AgentError(
                f"no answer from the agent: {why(exc)}",
                step=Step.FATAL if is_stranger else Step.CLEAN,
                cause="CERTIFICATE" if is_stranger else "IO",
            ) from exc
        return response.status_code, body


def _parse_versions(body: bytes) -> set[str]:
    results = Fields(parse_json_object(body, "version"), "version").fields("results")
    spoken = {results.text("supported_version", 16)}
    if "supported_versions" in results:
        listed = parse_json_object(body, "version")["results"]
        assert isinstance(listed, dict)  # `fields` has checked it
        versions = listed["supported_versions"]
        if not isinstance(versions, list):
            raise EvidenceFormatError("version.results.supported_versions is not a list")
        spoken |= {version for version in versions if isinstance(version, str)}
    return spoken


def _parse_reply(body: bytes) -> AgentReply:
    results = Fields(parse_json_object(body, "agent"), "agent").fields("results")
    ima = None
    entry = 0
    if "ima_measurement_list" in results:
        ima = results.text("ima_measurement_list", MAX_QUOTE_BYTES)
        entry = results.integer("ima_measurement_list_entry", MAX_IMA_ENTRIES)
    return AgentReply(
        quote=parse_quote(results.text("quote", MAX_QUOTE_CHARS)),
        ima=ima,
        ima_entry=entry,
        uefi=results.base64("mb_measurement_list", MAX_UEFI_BYTES)
        if "mb_measurement_list" in results
        else None,
    )


def _reason(body: bytes) -> str:
    """The envelope's status, made safe for a log: one short printable line."""
    try:
        text = Fields(parse_json_object(body[:MAX_VERSION_BYTES], "refusal"), "refusal").text(
            "status", 1000
        )
    except EvidenceFormatError:
        return "no reason given"
    return "".join(c if c.isprintable() else "?" for c in text[:200])
