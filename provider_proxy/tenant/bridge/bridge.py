"""The bridge: shows hosts behind provider-proxy as agents to the tenant's own, unmodified Keylime.

One nursery: an agent a host with its registration, the saving of clock states, the admin listener, and
signals. A reload is prepared as a whole before any of it is used; if a part of it is bad, the old
configuration stays. It is the tenant's own program: control of it is control of the verdict, as with the
verifier itself.
"""

from __future__ import annotations

import logging
import signal
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import trio

from provider_proxy.common import memory
from provider_proxy.common.addresses import split_address
from provider_proxy.common.dates import Calendar
from provider_proxy.common.files import write_public
from provider_proxy.errors import ConfigError, HostError, ProviderProxyError
from provider_proxy.tenant.bridge.admin import Admin
from provider_proxy.tenant.bridge.agent import Agent
from provider_proxy.tenant.bridge.agents import HostAgent, RegistrarAccess, agent_registrar
from provider_proxy.tenant.bridge.keys import BridgeKeys, load_keys
from provider_proxy.tenant.bridge.metrics import BridgeMetrics
from provider_proxy.tenant.bridge.ports import PortTable
from provider_proxy.tenant.bridge.push_access import PushAccess
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.http_server import TenantHttpServer, listen
from provider_proxy.tenant.watch.preflight import read_dates
from provider_proxy.tenant.watch.questions import HostQuestions, Setting
from provider_proxy.tenant.watch.registrars import KnownAks, Registrars
from provider_proxy.tenant.watch.saving import save, save_often
from provider_proxy.tenant.watch.store import StateStore
from provider_proxy.tenant.watch.tables import WatchConfig
from provider_proxy.tenant.watch.watcher import make_settings
from provider_proxy.trust.registration.client import http_client, tls_context

log = logging.getLogger(__name__)

ReadConfig = Callable[[], WatchConfig]
KEYS_FILE = "keys.pem"
EK_CA_FILE = "ek-ca.pem"  # for Keylime's tpm_cert_store


def state_dir_of(config: WatchConfig) -> Path:
    """The directory of the bridge's state."""
    return config.bridge.state_dir or config.state_dir / "bridge"


def keys_of(config: WatchConfig) -> BridgeKeys:
    """The bridge's keys; created if they are missing and belong in its own directory.

    Raises:
        HostError: the file is missing, damaged, or readable by others.
    """
    bridge = config.bridge
    path = bridge.keys or state_dir_of(config) / KEYS_FILE
    make_for = None if bridge.keys else bridge.contact_ip or bridge.listen_ip
    return load_keys(path, make_for=make_for)


def is_pushed(setting: Setting) -> bool:
    """Whether a host's agent posts, and has no port."""
    return setting.rules.mode == "push"


def asked_hosts(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The hosts that get an agent."""
    return {name: setting for name, setting in settings.items() if setting.endpoint is not None}


class Bridge:
    """All agents of a configuration. Reads files: do not call it in trio's thread.

    Raises:
        UsageError, HostError: a file, the keys or the state cannot be used.
    """

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self.metrics = BridgeMetrics()
        self.calendar = Calendar(read_dates(config), show=self.metrics.show_dates)
        self.keys = keys_of(config)
        directory = state_dir_of(config)
        self._store = StateStore(directory)
        self._budget = Budget()
        self._ports = PortTable(directory, config.bridge.first_port, config.bridge.last_port)
        self._registrars = Registrars(config)
        self._settings = make_settings(config, KnownAks(self._registrars), judged_elsewhere=True)
        assert config.bridge.registrar is not None
        self._registrar = config.registrars[config.bridge.registrar]
        rules = agent_registrar(config.bridge, self._registrar, 1)
        self._registrar_tls = tls_context(f"registrars.{config.bridge.registrar}", rules)
        self._context: ssl.SSLContext | None = None
        if config.bridge.client_ca is not None:
            self._context = self.keys.server_context(config.bridge.client_ca)
        self._push: PushAccess | None = None
        if any(map(is_pushed, asked_hosts(self._settings).values())):
            self._push = PushAccess(config.bridge, self.keys)
        self.agents: dict[str, HostAgent] = {}
        self._seen_states: set[str] = set()

    @property
    def config(self) -> WatchConfig:
        return self._config

    async def run(
        self,
        read_config: ReadConfig | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until SIGTERM or SIGINT, or until cancelled; SIGHUP reads the hosts again.

        Raises:
            HostError: another bridge uses the state, or it cannot be saved at the end.
        """
        self._store.open()
        try:
            write_public(state_dir_of(self._config) / EK_CA_FILE, self.keys.ek_ca)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                async with (
                    http_client(self._registrar_tls, tls_name=self._registrar.tls_name) as http,
                    nullcontext() if self._push is None else self._push.open(),
                    trio.open_nursery() as nursery,
                ):
                    self._access = RegistrarAccess(http)
                    nursery.start_soon(
                        save_often,
                        self._store,
                        self._config.save_interval_s,
                        self.metrics.save_failures.inc,
                    )
                    nursery.start_soon(memory.collect)
                    nursery.start_soon(self.calendar.run)
                    await self._open_admin(nursery)
                    self._start(nursery, asked_hosts(self._settings))
                    log.info("serving %d hosts as Keylime agents", len(self.agents))
                    task_status.started()
                    await self._heed(nursery, signals, read_config)
                    log.info("stopping")
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._registrars.aclose()
                try:
                    await save(self._store, self.metrics.save_failures.inc)
                finally:
                    self._store.close()

    async def _open_admin(self, nursery: trio.Nursery) -> None:
        ip, port = split_address(self._config.bridge.admin)
        try:
            listener = listen(ip, port)
        except OSError as exc:
            raise HostError(f"bridge.admin: cannot listen at {ip}:{port}: {exc.strerror}") from exc
        nursery.start_soon(TenantHttpServer(Admin(self).answer, None).serve, listener)

    async def _heed(
        self,
        nursery: trio.Nursery,
        signals: AsyncIterator[int],
        read_config: ReadConfig | None,
    ) -> None:
        """Return at SIGTERM or SIGINT."""
        async for number in signals:
            if number != signal.SIGHUP:
                return
            if read_config is not None:
                await self._reload(nursery, read_config)

    def _start(self, nursery: trio.Nursery, settings: Mapping[str, Setting]) -> None:
        bridge = self._config.bridge
        ports = self._ports.ports_of(_with_ports(settings))
        for name, setting in settings.items():
            questions = HostQuestions(
                name, setting, self._store, budget=self._budget, judged_elsewhere=True
            )
            agent = Agent(
                name,
                questions,
                self.keys,
                self.metrics,
                hold_s=bridge.hold_s,
                refuse_unsafe=bridge.after_crash == "refuse",
            )
            pusher = None
            if is_pushed(setting):
                assert self._push is not None
                pusher = self._push.pusher(agent)
            made = self.agents[name] = HostAgent(
                agent,
                ports.get(name),
                bridge=bridge,
                registrar=self._registrar,
                access=self._access,
                keys=self.keys,
                context=self._context,
                pusher=pusher,
            )
            made.registration.observe = lambda state: self._count()
            nursery.start_soon(partial(made.run, changed=self._count))

    def _count(self) -> None:
        agents = self.agents.values()
        self.metrics.listening.set(sum(each.is_listening for each in agents))
        states = Counter(each.registration.status.state.value for each in agents)
        self._seen_states |= set(states)
        for state in self._seen_states:
            self.metrics.registrations.labels(state).set(states[state])

    async def _reload(self, nursery: trio.Nursery, read_config: ReadConfig) -> None:
        """Read the hosts again; an error is logged, and nothing changes."""
        try:
            config = await trio.to_thread.run_sync(read_config)
            for name in ("state_dir", "pins", "registrars", "bridge"):
                if getattr(config, name) != getattr(self._config, name):
                    raise ConfigError(f"{name} has changed: restart to apply it")
            aks = KnownAks(self._registrars)
            settings = await trio.to_thread.run_sync(_settings_again, config, aks, self._settings)
            dates = await trio.to_thread.run_sync(read_dates, config)
            asked = asked_hosts(settings)
            if self._push is None and any(map(is_pushed, asked.values())):
                raise ConfigError("restart to add the first host with mode = push")
            if self._context is None and not all(map(is_pushed, asked.values())):
                raise ConfigError("restart to add the first host with mode = pull")
            await trio.to_thread.run_sync(self._ports.ports_of, _with_ports(asked))
        except ProviderProxyError as exc:
            log.error("reload failed, the old configuration stays: %s", exc)
            return
        moved = {n for n, a in self.agents.items() if n in asked and _has_moved(a, asked[n])}
        for name in moved | (set(self.agents) - set(asked)):
            self.agents.pop(name).stop()
            self.metrics.forget_host(name)
        for name in set(self.agents) & set(asked):
            await self.agents[name].agent.take(asked[name])
        self._start(nursery, {n: s for n, s in asked.items() if n not in self.agents})
        self._config, self._settings = config, settings
        self.calendar.replace(dates)
        self.calendar.warn()
        self._count()
        log.info("reloaded: %d hosts", len(asked))


def _with_ports(settings: Mapping[str, Setting]) -> list[str]:
    return [name for name, setting in settings.items() if not is_pushed(setting)]


def _has_moved(agent: HostAgent, setting: Setting) -> bool:
    """From one mode to the other."""
    return is_pushed(setting) != (agent.pusher is not None)


def _settings_again(
    config: WatchConfig, aks: KnownAks, before: Mapping[str, Setting]
) -> Mapping[str, Setting]:
    return make_settings(config, aks, judged_elsewhere=True, before=before)
