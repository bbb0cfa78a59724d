"""What runs for one host: its agent, its port or its posting, and its record at the registrar."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import trio

from provider_proxy.common.addresses import authority
from provider_proxy.errors import ConfigError
from provider_proxy.tenant.bridge import api
from provider_proxy.tenant.bridge.agent import Agent
from provider_proxy.tenant.bridge.keys import BridgeKeys
from provider_proxy.tenant.bridge.pushing import Pusher
from provider_proxy.tenant.watch.http_server import TenantHttpServer, listen
from provider_proxy.tenant.watch.tables import BridgeTable, RegistrarTable
from provider_proxy.trust.registration.registration import Registration

log = logging.getLogger(__name__)

BIND_AGAIN_S = 5.0
MAX_REGISTERING = 4  # rounds at once: a registrar has one worker a core, and a database of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRegistrar:
    """`RegistrarRules` of an agent."""

    url: str
    ca: Path | None
    client_cert: Path | None
    client_key: Path | None
    contact: str | None
    interval_s: float
    register_unread: bool

    @property
    def insecure_plaintext(self) -> bool:
        return self.url.startswith("http://")


def agent_registrar(bridge: BridgeTable, table: RegistrarTable, port: int | None) -> AgentRegistrar:
    """The registrar of the file, for the agent at a port. Raises: ConfigError without a URL."""
    if table.url is None:
        raise ConfigError("bridge.registrar needs a url")
    return AgentRegistrar(
        url=table.url.rstrip("/"),
        ca=table.ca,
        client_cert=table.cert,
        client_key=table.key,
        contact=None if port is None else authority(bridge.contact_ip or bridge.listen_ip, port),
        interval_s=bridge.register_interval_s,
        register_unread=bridge.register_unread,
    )


class RegistrarAccess:
    """The registrar, for all agents: one client, and a bound on registrations at once."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._turns = trio.CapacityLimiter(MAX_REGISTERING)

    @asynccontextmanager
    async def open_http(self) -> AsyncIterator[httpx.AsyncClient]:
        """The client, which stays open."""
        yield self._http

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One of the slots for registrations."""
        async with self._turns:
            yield


class HostAgent:
    """One host's agent and all that belongs to it.

    Attributes:
        port: where it listens; None in push mode.
        pusher: posts to the verifier; None in pull mode.
        is_listening: its port is open; in push mode: it posts.
    """

    def __init__(
        self,
        agent: Agent,
        port: int | None,
        *,
        bridge: BridgeTable,
        registrar: RegistrarTable,
        access: RegistrarAccess,
        keys: BridgeKeys,
        context: ssl.SSLContext | None,
        pusher: Pusher | None = None,
    ) -> None:
        self.agent = agent
        self.port = port
        self.pusher = pusher
        self.is_listening = False
        self.registration = Registration(
            agent.name,
            agent_registrar(bridge, registrar, port),
            agent.agent_id,
            keys,
            open_http=access.open_http,
            turn=access.turn,
            tls_cert=keys.tls_cert,
        )
        self._ip = bridge.listen_ip
        self._context = context
        self._scope = trio.CancelScope()

    def stop(self) -> None:
        """End it; returns at once."""
        self._scope.cancel()

    async def run(self, *, changed: Callable[[], None]) -> None:
        """Serve, until cancelled.

        Args:
            changed: called when `is_listening` changes.
        """
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.agent.run)
                nursery.start_soon(self.registration.run)
                if self.pusher is not None:
                    await self._post(self.pusher, changed)
                elif self.port is not None:
                    await self._listen(self.port, changed)

    async def _post(self, pusher: Pusher, changed: Callable[[], None]) -> None:
        self.is_listening = True
        changed()
        log.info("%s: agent %s posts (experimental)", self.agent.name, self.agent.agent_id)
        try:
            await pusher.run()
        finally:
            self.is_listening = False
            changed()

    async def _listen(self, port: int, changed: Callable[[], None]) -> None:
        server = TenantHttpServer(partial(api.answer, self.agent), self._context)
        said = ""
        while True:
            try:
                listener = listen(self._ip, port)
            except OSError as exc:
                # Another program has the port, and may free it; the other hosts continue.
                if said != (said := str(exc.strerror or exc)):
                    log.error(
                        "%s: cannot listen at %s:%d: %s", self.agent.name, self._ip, port, said
                    )
                await trio.sleep(BIND_AGAIN_S)
                continue
            self.is_listening = True
            changed()
            log.info(
                "%s: agent %s listens at %s:%d",
                self.agent.name,
                self.agent.agent_id,
                self._ip,
                port,
            )
            try:
                await server.serve(listener)
            finally:
                self.is_listening = False
                changed()
