"""The verifier in push mode, for all agents of a bridge: its two HTTP clients.

Agents show no client certificate, because with one Keylime treats them as an administrator; their token
says what they may do. Policies are read with the administrator's certificate, if there is one.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from provider_proxy.common.http import http_client
from provider_proxy.common.tls import TlsFiles, client_context
from provider_proxy.errors import ConfigError
from provider_proxy.tenant.bridge.agent import Agent
from provider_proxy.tenant.bridge.keys import BridgeKeys
from provider_proxy.tenant.bridge.push_api import CALL_LIMIT_S, PushVerifier
from provider_proxy.tenant.bridge.pushing import Pusher
from provider_proxy.tenant.verifier_api import VerifierApi
from provider_proxy.tenant.watch.tables import BridgeTable

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16  # to the verifier, of all agents together
NAMES = ("bridge.verifier_ca", "bridge.verifier_cert", "bridge.verifier_key")


class PushAccess:
    """Reads files: do not create it in trio's thread.

    Raises:
        ConfigError: there is no verifier_url.
        HostError: a TLS file is wrong.
    """

    def __init__(self, table: BridgeTable, keys: BridgeKeys) -> None:
        if table.verifier_url is None:
            raise ConfigError("mode = push needs bridge.verifier_url")
        self._url = table.verifier_url
        self._name = table.verifier_tls_name
        self._keys = keys
        self._agents_tls = client_context(TlsFiles(ca=table.verifier_ca, names=NAMES))
        self._admin_tls = None
        if table.verifier_cert is not None:
            files = TlsFiles(
                ca=table.verifier_ca, cert=table.verifier_cert, key=table.verifier_key, names=NAMES
            )
            self._admin_tls = client_context(files)
        self._agents_http: httpx.AsyncClient | None = None
        self._admin: VerifierApi | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep the clients open."""
        log.warning("push mode is experimental, in Keylime and here")
        async with self._client(self._agents_tls) as self._agents_http:
            if self._admin_tls is None:
                log.warning(
                    "without bridge.verifier_cert it cannot be checked whether the verifier ignores "
                    "a runtime policy (meta.generator 0 or 1)"
                )
                yield
                return
            async with self._client(self._admin_tls) as admin:
                self._admin = VerifierApi(admin, self._url)
                yield

    def _client(self, context: ssl.SSLContext) -> httpx.AsyncClient:
        return http_client(
            context, read_limit_s=CALL_LIMIT_S, pool=MAX_CONNECTIONS, tls_name=self._name
        )

    def pusher(self, agent: Agent) -> Pusher:
        """What posts for an agent; its clients must be open."""
        assert self._agents_http is not None
        verifier = PushVerifier(self._agents_http, self._url, agent.agent_id, self._keys)
        read = None if self._admin is None else self._admin.runtime_policy
        return Pusher(agent, verifier, read_policy=read)
