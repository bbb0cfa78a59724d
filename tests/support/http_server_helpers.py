"""The tenants' API over a fake batcher, for tests: no socket and no TPM."""

from __future__ import annotations

from collections.abc import Callable

import trio
import trio.testing
from helpers import make_answer

from provider_proxy.errors import (
    ProviderProxyError,
)
from provider_proxy.evidence.model import HashAlg, QuoteRequest, Tenant
from provider_proxy.host.api import tenant as server
from provider_proxy.host.batching.batch import Answer
from provider_proxy.host.http.messages import Peer
from provider_proxy.host.http.server import HttpServer
from provider_proxy.testing.soft_tpm import SoftTpm

NONCE = "nonce-0123456789"
VM = "0ddba11c-0ffe-4bad-8bad-00000c0ffee0"
TENANT = Tenant(name="tenant", pcr_allow=0xFFFFFF)
IDENTITY = server.identity_results(
    ak_public=b"ak public",
    ak_pem=b"-----BEGIN",
    ak_name=b"\x00\x0bname",
    ek_public=b"ek public",
    ek_cert=None,
    ek_chain=(),
    host_uuid=VM,
    software=True,
)


class FakeSubmit:
    """Answers at once, late, or with an error; remembers what it was given."""

    def __init__(self) -> None:
        self.tpm = SoftTpm()
        self.calls: list[tuple[QuoteRequest, Tenant, float]] = []
        self.is_gone: Callable[[], bool] | None = None
        self.error: ProviderProxyError | None = None
        self.delay_s = 0.0

    async def __call__(
        self,
        request: QuoteRequest,
        tenant: Tenant,
        *,
        timeout_s: float,
        is_gone: Callable[[], bool] | None = None,
    ) -> Answer:
        self.calls.append((request, tenant, timeout_s))
        self.is_gone = is_gone
        await trio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return make_answer(self.tpm, request)


def make_server(
    submit: server.Submit,
    *,
    identify: Callable[[Peer], Tenant] = lambda peer: TENANT,
    banks: tuple[HashAlg, ...] = (HashAlg.SHA256, HashAlg.SHA1),
    registrations: Callable[[Tenant], server.Registrations] = lambda tenant: (),
    vtpm_ca: bytes | None = b"certificate",
) -> HttpServer:
    handler = server.TenantApi(
        submit,
        identify,
        identity=IDENTITY,
        registrations=registrations,
        version="1.2.3",
        banks=banks,
        default_timeout_ms=30_000,
        max_timeout_ms=60_000,
        vtpm_ca=None if vtpm_ca is None else server.vtpm_ca_results(vtpm_ca),
    )
    return HttpServer(handler, observe=lambda status, reason: None)
