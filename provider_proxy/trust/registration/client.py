"""Talks to one Keylime registrar, as an agent does: its version, register, activate, read the record.

Trusts nothing that comes back: sizes, times and forms are bounded, redirects and the environment's
proxies are not followed, and a server that cannot prove its name is not used. Never lists and never
deletes: another TPM's record stays as it is. Every failure is a `RegistrarError`.
Source: Keylime 7.14's registrar; docs/registration.md has the calls.
"""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import trio

from provider_proxy.common import http
from provider_proxy.common.failures import printable
from provider_proxy.common.http import no_answer, read_body
from provider_proxy.common.tls import client_context, client_files
from provider_proxy.errors import EvidenceFormatError, RegistrarError, ReplyError
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.trust.registration.credential import MAX_BLOB_BYTES

MAX_BODY_BYTES = 64 * 1024  # a record has 5 kB with an EK certificate
MAX_KEY_BYTES = 1024  # a TPM2B_PUBLIC
MAX_CERT_BYTES = 16 * 1024
CALL_LIMIT_S = 30.0  # for a whole call, from connecting to the last byte
CONNECT_LIMIT_S = 10.0
NEWEST = (2, 6)  # of the tested versions; 3.0 answers 500 in Keylime 7.14
OLDEST = (
    2,
    3,
)  # Keylime 7.12; earlier ones refuse an EK's or AK's attributes, and serve no TLS port
OVERWRITING = (2, 4)  # up to Keylime 7.13 any client that registers may replace another's record
TOO_OLD = "as Keylime before 7.12 does, which does not accept these keys: 7.12 or later is needed"
VERSION_RE = re.compile(r"(\d{1,3})\.(\d{1,3})", re.ASCII)
MAX_VERSIONS = 64


class RegistrarRules(Protocol):
    """How to reach one registrar: a table of the daemon's file, or the bridge's."""

    @property
    def url(self) -> str:
        """ "https://registrar:8891"."""
        ...

    @property
    def ca(self) -> Path | None:
        """CA of its certificate; None for the CAs that the system trusts."""
        ...

    @property
    def client_cert(self) -> Path | None:
        """Client certificate; without one a registrar does not let a client read."""
        ...

    @property
    def client_key(self) -> Path | None: ...

    @property
    def insecure_plaintext(self) -> bool:
        """The URL is http://."""
        ...

    @property
    def contact(self) -> str | None:
        """IP address and port that the record names."""
        ...

    @property
    def interval_s(self) -> float:
        """How often the record is checked, in seconds."""
        ...

    @property
    def register_unread(self) -> bool:
        """Register even where another TPM's record could be replaced unnoticed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a registrar keeps of a host.

    Attributes:
        ek_public, ak_public: TPM2B_PUBLIC; empty where the record has none.
        ek_cert: DER; None without one.
        contact: IP address and port for the tenant's verifier; None where it has none.
        tls_cert: PEM of the certificate that answers at `contact`; None where it has none.
    """

    ek_public: bytes
    ak_public: bytes
    ek_cert: bytes | None = None
    contact: tuple[str, int] | None = None
    tls_cert: str | None = None


def tls_context(key: str, table: RegistrarRules) -> ssl.SSLContext | None:
    """TLS to a registrar; None for an http:// URL. Reads files: do not call it in trio's thread.

    Args:
        key: "registrars.NAME", for messages.

    Raises:
        HostError: a file is wrong; the message says which and why.
    """
    if table.insecure_plaintext:
        return None
    return client_context(client_files(key, table))


def http_client(
    context: ssl.SSLContext | None, *, tls_name: str | None = None
) -> httpx.AsyncClient:
    """The pooled client of one registrar."""
    return http.http_client(context, read_limit_s=CALL_LIMIT_S, pool=2, tls_name=tls_name)


class RegistrarClient:
    """One registrar.

    Args:
        http: its pooled client; the caller closes it.
        url: "https://host:8891".
        agent_id: the host's id there.
    """

    def __init__(self, http: httpx.AsyncClient, url: str, agent_id: str) -> None:
        self._http = http
        self._url = url
        self._agent_id = agent_id
        self._version = NEWEST

    async def negotiate(self) -> str:
        """Ask for the registrar's API versions, and use the newest that both sides support.

        Raises:
            RegistrarError: no answer, or no version that both sides support.
        """
        try:
            results = self._results(await self._call("GET", "/version"))
        except RegistrarError as exc:
            if exc.status not in (400, 404):
                raise
            raise RegistrarError(f"{exc}, {TOO_OLD}", status=exc.status) from exc
        raw = results.get("supported_versions")
        if not isinstance(raw, list) or len(raw) > MAX_VERSIONS:
            raise RegistrarError("the registrar does not say which versions it supports")
        found = [VERSION_RE.fullmatch(item) for item in raw if isinstance(item, str)]
        versions = [(int(match[1]), int(match[2])) for match in found if match is not None]
        common = [version for version in versions if OLDEST <= version <= NEWEST]
        if not common and versions and max(versions) < OLDEST:
            raise RegistrarError(
                "the registrar supports API {}.{} at most, ".format(*max(versions)) + TOO_OLD
            )
        if not common:
            raise RegistrarError(
                f"the registrar supports none of the API versions 2.{OLDEST[1]} to 2.{NEWEST[1]}"
            )
        self._version = max(common)
        return "{}.{}".format(*self._version)

    @property
    def overwrites(self) -> bool:
        """Whether this registrar lets one TPM replace the record of another; 7.14 answers 403."""
        return self._version <= OVERWRITING

    async def read(self) -> Record | None:
        """The record, if it is active; None where it is inactive or missing.

        Raises:
            RegistrarError: no answer, or not allowed: `status` is 400 or 403 without a certificate
                that the registrar accepts.
        """
        try:
            body = await self._call("GET", self._path())
        except RegistrarError as exc:
            if exc.status == 404:
                return None
            raise
        return _parse_record(self._results(body))

    async def register(self, record: Record) -> bytes:
        """Make or renew the record, which is then inactive until it is activated.

        Returns:
            The challenge, uncut.

        Raises:
            RegistrarError: `status` is 403 where another TPM has the id, 400 where the keys are
                refused.
        """
        ip, port = record.contact or (None, None)
        cert = record.ek_cert
        body = {
            "ek_tpm": base64.b64encode(record.ek_public).decode("ascii"),
            "aik_tpm": base64.b64encode(record.ak_public).decode("ascii"),
            "ekcert": base64.b64encode(cert).decode("ascii") if cert is not None else None,
            "ip": ip,
            "port": port,
            **({"mtls_cert": record.tls_cert} if record.tls_cert is not None else {}),
        }
        results = self._results(await self._call("POST", self._path(), body))
        try:
            return Fields(results, "the registrar's answer").base64("blob", MAX_BLOB_BYTES)
        except EvidenceFormatError as exc:
            raise RegistrarError(str(exc)) from exc

    async def activate(self, tag: str) -> None:
        """Answer the challenge; a wrong answer deletes the record.

        Raises:
            RegistrarError: `status` is 400 where the answer is wrong, 404 where the record is gone.
        """
        await self._call("PUT", self._path(), {"auth_tag": tag})

    def _path(self) -> str:
        return "/v{}.{}/agents/{}".format(*self._version, self._agent_id)

    async def _call(self, method: str, path: str, body: object = None) -> bytes:
        """One exchange; the body of a 200.

        Raises:
            RegistrarError: no answer in time, too large an answer, or another status.
        """
        try:
            with trio.fail_after(CALL_LIMIT_S), no_answer("the registrar", RegistrarError):
                async with self._http.stream(method, self._url + path, json=body) as response:
                    status = response.status_code
                    data = await read_body(response, MAX_BODY_BYTES, "the registrar")
        except trio.TooSlowError as exc:
            raise RegistrarError(f"the registrar gave no answer within {CALL_LIMIT_S:g} s") from exc
        except ReplyError as exc:
            raise RegistrarError(str(exc)) from exc
        if status != 200:
            raise RegistrarError(
                f"the registrar answered {status}: {_status_text(data)}", status=status
            )
        return data

    def _results(self, body: bytes) -> Mapping[str, object]:
        try:
            results = parse_json_object(body, "the registrar's answer").get("results")
        except EvidenceFormatError as exc:
            raise RegistrarError(str(exc)) from exc
        if not isinstance(results, dict):
            raise RegistrarError("the registrar's answer has no results")
        return results


def _parse_record(results: Mapping[str, object]) -> Record:
    fields = Fields(results, "the record")

    def optional(key: str, limit: int) -> bytes | None:
        return None if results.get(key) is None else fields.base64(key, limit)

    try:
        contact = None
        if results.get("ip") is not None and results.get("port") is not None:
            contact = (fields.text("ip", 64), fields.integer("port", 65535))
        return Record(
            ek_public=optional("ek_tpm", MAX_KEY_BYTES) or b"",
            ak_public=optional("aik_tpm", MAX_KEY_BYTES) or b"",
            ek_cert=optional("ekcert", MAX_CERT_BYTES),
            contact=contact,
            tls_cert=(
                None
                if results.get("mtls_cert") is None
                else fields.text("mtls_cert", MAX_CERT_BYTES)
            ),
        )
    except EvidenceFormatError as exc:
        raise RegistrarError(str(exc)) from exc


def _status_text(body: bytes) -> str:
    """The envelope's status, made safe to show."""
    try:
        text = parse_json_object(body, "the answer").get("status")
    except EvidenceFormatError:
        text = None
    return printable(text) if isinstance(text, str) and text else "no reason given"
