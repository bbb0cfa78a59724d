"""The tenant API: routes, and what each answers.

Hands a checked request to `Submit` and gives its answer, or the error's status, to `http.server`. Never
decides when a quote is taken, and knows a tenant only by what `identify` says of the connection.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from typing import Protocol, TypeVar

import trio

from provider_proxy.errors import (
    DeadlineError,
    MethodError,
    NotFoundError,
    ParameterError,
    ProviderProxyError,
    UnknownTenantError,
)
from provider_proxy.evidence.model import HashAlg, QuoteRequest, Tenant
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.wire import FORMAT, encode_envelope
from provider_proxy.host.api.quotas import Quotas
from provider_proxy.host.batching.batch import Answer
from provider_proxy.host.http.messages import WHAT_IS_ALLOWED, Peer, Request, Response
from provider_proxy.host.status.recent import STRANGERS

API_VERSION = "1.0"


class Submit(Protocol):
    """What answers a request: `Batcher.submit`."""

    async def __call__(
        self,
        request: QuoteRequest,
        tenant: Tenant,
        *,
        timeout_s: float,
        is_gone: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer, or raise a `RequestError` or `ServiceError`."""
        ...


R = TypeVar("R")

Count = Callable[[str, str], None]
"""Told how a tenant's request ended: the tenant's name, and "ok" or an error's class."""

Registrations = Sequence[Mapping[str, object]]
"""The values of some registrations."""

Identify = Callable[[Peer], Tenant]
"""Finds a connection's tenant. Raises `RequestError` for a client that is not admitted."""

TurnAway = Callable[[str, str, bytes | None], object]


class TenantApi:
    """The handler of the tenants' listeners.

    Args:
        identify: finds a connection's tenant; the attribute may be replaced, for later requests.
        identity: results of `GET /verifier/identity`.
        version: of this program.
        count: told how each request of a known tenant ended.
        turned_away: told of a client that is not a tenant: why, the address, the certificate.
        registrations: those of a tenant, for its `GET /verifier/identity`.
        vtpm_ca: results of `GET /verifier/vtpm-ca`; None where the host has no such CA.
    """

    def __init__(
        self,
        submit: Submit,
        identify: Identify,
        *,
        identity: Mapping[str, object],
        registrations: Callable[[Tenant], Registrations] = lambda tenant: (),
        version: str,
        banks: tuple[HashAlg, ...],
        default_timeout_ms: int,
        max_timeout_ms: int,
        count: Count = lambda tenant, reason: None,
        turned_away: TurnAway = lambda reason, address, certificate: None,
        vtpm_ca: Mapping[str, object] | None = None,
    ) -> None:
        self._count = count
        self._turned_away = turned_away
        self._submit = submit
        self._quotas = Quotas()
        self.identify = identify
        self._identity = encode_envelope(200, "Success", identity)
        self._identity_results = identity
        self._registrations = registrations
        self._vtpm_ca = None if vtpm_ca is None else encode_envelope(200, "Success", vtpm_ca)
        self._version = encode_envelope(
            200,
            "Success",
            {
                "supported_version": API_VERSION,
                "supported_versions": [API_VERSION],
                "evidence_formats": [FORMAT],
                "provider_proxy": version,
            },
        )
        self._description = resources.files("provider_proxy").joinpath("openapi.json").read_bytes()
        self._banks = banks
        self._default_timeout_ms = default_timeout_ms
        self._max_timeout_ms = max_timeout_ms
        self._routes: dict[str, Callable[[Request, Tenant], Awaitable[Response]]] = {
            "/verifier/quote": self._quote,
            "/verifier/identity": self._get_identity,
            "/verifier/vtpm-ca": self._get_vtpm_ca,
            "/version": self._get_version,
            "/openapi.json": self._get_description,
        }

    async def __call__(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            RequestError, ServiceError: `http.server` makes a response of them.
        """
        if request.method == "OPTIONS":
            return WHAT_IS_ALLOWED
        try:
            tenant = self.identify(request.peer)
        except UnknownTenantError as exc:
            self._count(STRANGERS, type(exc).__name__)
            self._turned_away(str(exc), request.peer.name, request.peer.certificate)
            raise
        try:
            response = await route(self._routes, request)(request, tenant)
        except ProviderProxyError as exc:
            self._count(tenant.name, type(exc).__name__)
            raise
        self._count(tenant.name, response.reason)
        return response

    async def _quote(self, request: Request, tenant: Tenant) -> Response:
        if request.method != "GET":
            raise MethodError("use GET: a quote takes TPM time, so no other method is answered")
        asked = parse_quote_query(request.query)
        if asked.bank not in self._banks:
            offered = ", ".join(bank.label for bank in self._banks)
            raise ParameterError("bank", f"is not offered by this host; offered: {offered}")
        timeout_ms = asked.timeout_ms or self._default_timeout_ms
        if timeout_ms > self._max_timeout_ms:
            raise ParameterError("timeout_ms", f"must be at most {self._max_timeout_ms}")
        quota = self._quotas.enter(tenant, wants_logs=asked.wants_ima)
        body: tuple[bytes, ...] = ()
        deadline = trio.current_time() + timeout_ms / 1000
        try:
            request.peer.limit(timeout_ms / 1000)
            answer = await self._submit(
                asked, tenant, timeout_s=timeout_ms / 1000, is_gone=request.peer.is_gone
            )
            body = answer.body()
        except trio.Cancelled:
            if trio.current_time() >= deadline:  # `http.server` tells the tenant
                self._count(tenant.name, DeadlineError.__name__)
            raise
        finally:
            self._quotas.leave(quota, log_bytes=sum(map(len, body[1:])))
        return Response(body=body)

    async def _get_identity(self, request: Request, tenant: Tenant) -> Response:
        no_query(request)
        own = list(self._registrations(tenant))
        if not own:
            return Response(body=(self._identity,))
        results = {**self._identity_results, "registrations": own}
        return Response(body=(encode_envelope(200, "Success", results),))

    async def _get_vtpm_ca(self, request: Request, _tenant: Tenant) -> Response:
        no_query(request)
        if self._vtpm_ca is None:
            raise NotFoundError("this host has no vTPM CA of its own")
        return Response(body=(self._vtpm_ca,))

    async def _get_version(self, request: Request, _tenant: Tenant) -> Response:
        no_query(request)
        return Response(body=(self._version,))

    async def _get_description(self, request: Request, _tenant: Tenant) -> Response:
        no_query(request)
        return Response(body=(self._description,))


def route(routes: Mapping[str, R], request: Request) -> R:
    """The handler of a request's path.

    Raises:
        NotFoundError, MethodError: the path or the method is unknown.
    """
    found = routes.get(request.path)
    if found is None:
        raise NotFoundError("no such path")
    if request.method not in ("GET", "HEAD"):
        raise MethodError("use GET or HEAD: this path answers no other method")
    return found


def no_query(request: Request) -> None:
    """Raises: ParameterError where a path that takes no parameters was given some."""
    if request.query:
        raise ParameterError("query", "this path takes no parameters")


def identity_results(
    *,
    ak_public: bytes,
    ak_pem: bytes,
    ak_name: bytes,
    ek_public: bytes,
    ek_cert: bytes | None,
    ek_chain: Sequence[bytes],
    host_uuid: str,
    software: bool,
) -> dict[str, object]:
    """The results of `GET /verifier/identity`."""
    return {
        "ak_tpm": base64.b64encode(ak_public).decode("ascii"),
        "ak_pem": ak_pem.decode("ascii"),
        "ak_name": ak_name.hex(),
        "ek_tpm": base64.b64encode(ek_public).decode("ascii"),
        "ek_cert": base64.b64encode(ek_cert).decode("ascii") if ek_cert is not None else None,
        "ek_chain": [base64.b64encode(each).decode("ascii") for each in ek_chain],
        "host_uuid": host_uuid,
        "software": software,
        "registrations": [],
    }


def vtpm_ca_results(certificate: bytes) -> dict[str, object]:
    """The results of `GET /verifier/vtpm-ca`.

    Args:
        certificate: the CA's, DER.
    """
    return {"ca_cert": base64.b64encode(certificate).decode("ascii")}
