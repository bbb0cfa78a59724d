"""SIGHUP: reads the configuration, the tenants, the registrars, the certificates and the CRL again, and
loses nothing.

The new state is made completely before any of it is used; if a part of it is bad, the old one stays.
Connections stay open: later ones get the new TLS context, and every request uses the new directory.
Settings that cannot change while serving (addresses, TPM, batch, limits) are named in the log and need a
restart.
"""

from __future__ import annotations

import dataclasses
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from provider_proxy.common import systemd
from provider_proxy.common.dates import Calendar, Dated
from provider_proxy.errors import ConfigError, ProviderProxyError
from provider_proxy.host.api.front import FrontApi, FrontJudge, load_front_judge
from provider_proxy.host.api.identity import TenantDirectory, load_tenant_directory
from provider_proxy.host.api.tenant import TenantApi
from provider_proxy.host.config.material import read_dates
from provider_proxy.host.config.tables import Config
from provider_proxy.host.http import listeners
from provider_proxy.host.registration.registrations import HostRegistration, Registrations

log = logging.getLogger(__name__)

ReadConfig = Callable[[], Config]
RELOADED = ("tenants", "tenant_defaults", "registrars")
RELOADED_LISTEN = ("tls_cert", "tls_key", "client_ca", "client_crl", "crl_strict", "front_peers")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Fresh:
    """Everything that a reload replaces, made before any of it is used."""

    config: Config
    directory: TenantDirectory
    front: FrontJudge | None
    context: ssl.SSLContext | None
    registrations: Sequence[HostRegistration]
    dates: Sequence[Dated]


class Reloader:
    """Replaces what a reload can change.

    Args:
        config: as it was read at the start.
        read_config: reads it again.
    """

    def __init__(
        self,
        config: Config,
        read_config: ReadConfig,
        server: TenantApi,
        servers: Sequence[listeners.Listener],
        registrations: Registrations,
        calendar: Calendar,
        front: FrontApi | None = None,
    ) -> None:
        self._front = front
        self._config = config
        self._read_config = read_config
        self._server = server
        self._registrations = registrations
        self._calendar = calendar
        self._tls = [server for server in servers if server.context is not None]

    async def run(self, signals: AsyncIterator[int]) -> None:
        """Reload at each signal, until cancelled."""
        async for _ in signals:
            systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await self.reload()
            except ProviderProxyError as exc:
                log.error("reload refused, keeping the old configuration: %s", exc)
            systemd.notify("READY=1")

    async def reload(self) -> None:
        """Read everything again and use it.

        Raises:
            ConfigError, HostError: a part of it is not valid; nothing has changed.
        """
        fresh = await trio.to_thread.run_sync(self._load)
        for key in _unchangeable(self._config, fresh.config):
            log.warning("reload: %s has changed; restart the daemon to use the new value", key)
        self._server.identify = fresh.directory.find
        if self._front is not None and fresh.front is not None:
            self._front.judge = fresh.front
        if fresh.context is not None:
            for listener in self._tls:
                listener.context = fresh.context
        self._registrations.replace(fresh.registrations)
        self._calendar.replace(fresh.dates)
        self._calendar.warn()
        log.info(
            "reloaded: %d tenants, %d registrars",
            len(fresh.config.tenants),
            len(fresh.registrations),
        )

    def _load(self) -> _Fresh:
        config = self._read_config()
        if config.listen.insecure_plaintext != self._config.listen.insecure_plaintext:
            raise ConfigError(
                "listen.insecure_plaintext cannot change at a reload; restart the daemon"
            )
        directory = load_tenant_directory(config.listen, config.tenant_defaults, config.tenants)
        return _Fresh(
            config=config,
            directory=directory,
            front=load_front_judge(config.listen, directory),
            context=listeners.tls_context(config.listen),
            registrations=self._registrations.make(config.registrars),
            dates=read_dates(config),
        )


def _unchangeable(old: Config, new: Config) -> list[str]:
    """Keys that differ and that a reload cannot change."""
    found = []
    for field in dataclasses.fields(Config):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name in RELOADED or before == after:
            continue
        if not dataclasses.is_dataclass(before):
            found.append(field.name)
            continue
        found += [
            f"{field.name}.{part.name}"
            for part in dataclasses.fields(before)
            if getattr(before, part.name) != getattr(after, part.name)
            and not (field.name == "listen" and part.name in RELOADED_LISTEN)
        ]
    return found
