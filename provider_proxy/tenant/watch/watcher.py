"""Watches many hosts in one process: a task for each host, and saving, metrics and signals.

First rounds are spread, so that neither this process nor a proxy handles all hosts at once, and spread
again after the first question, so that it lasts. A reload is prepared as a whole before any of it is
used; if a part of it is bad, the old configuration stays. At the end reports are delivered and the
state saved.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import random
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from provider_proxy.common import memory
from provider_proxy.common.dates import Calendar
from provider_proxy.common.files import read_file
from provider_proxy.common.tls import client_context
from provider_proxy.errors import ConfigError, ProviderProxyError, first_of
from provider_proxy.evidence.vtpm_link import spire_name
from provider_proxy.tenant.policies import PolicyFiles
from provider_proxy.tenant.watch.alive import beat
from provider_proxy.tenant.watch.budget import Budget
from provider_proxy.tenant.watch.ek_directory import EkDirectory, lives_s
from provider_proxy.tenant.watch.host import HostWatch, Shared
from provider_proxy.tenant.watch.http import Endpoint
from provider_proxy.tenant.watch.metrics import WatchMetrics, write_now, write_often
from provider_proxy.tenant.watch.policy import HostPolicy
from provider_proxy.tenant.watch.preflight import host_files, read_dates
from provider_proxy.tenant.watch.questions import AkSource, Setting
from provider_proxy.tenant.watch.registrars import KnownAks, Registrars
from provider_proxy.tenant.watch.reports import (
    DRAIN_LIMIT_S,
    Reporter,
    Settled,
    open_sinks,
)
from provider_proxy.tenant.watch.saving import save, save_often
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.store import StateStore
from provider_proxy.tenant.watch.tables import HostRules, WatchConfig

log = logging.getLogger(__name__)

STARTS_PER_S = 200.0  # TLS handshakes with client certificates cost 2 ms each
COLLECT_YOUNG_S = 1.0  # a full collection visits the objects of 2,000 waiting hosts: 100,000
COLLECT_S = 300.0
MAX_TLS_BYTES = 4 * 1024 * 1024  # a bundle of every public CA has 250 kB
Contexts = dict[tuple[Path | None, Path | None, Path | None], tuple[ssl.SSLContext, bytes]]
ReadConfig = Callable[[], WatchConfig]


def make_settings(
    config: WatchConfig,
    aks: AkSource,
    *,
    judged_elsewhere: bool = False,
    before: Mapping[str, Setting] | None = None,
) -> Mapping[str, Setting]:
    """Everything that the hosts need, made and checked.

    Args:
        judged_elsewhere: see `HostPolicy`.
        before: the settings so far; unchanged policy files are not parsed again.

    Raises:
        UsageError: a policy file is wrong.
        HostError: a file is missing or not PEM.
    """
    files = PolicyFiles(next(iter(before.values())).files if before else None)
    endpoints = Endpoints()
    settings = {}
    for name, rules in config.hosts.items():
        endpoint = None
        if rules.need_provider_quote:
            # Reads its files, and raises now if they are wrong.
            HostPolicy(rules, files, judged_elsewhere=judged_elsewhere)
            endpoint = endpoints.of(name, rules)
        ek_name = None if rules.vm_ek is None else spire_name(files.ek(rules.vm_ek))
        settings[name] = Setting(
            rules=rules, files=files, aks=aks, endpoint=endpoint, ek_name=ek_name
        )
    files.forget_before()
    return settings


class Endpoints:
    """Where hosts' proxies answer; hosts with the same TLS files share a context."""

    def __init__(self) -> None:
        self._contexts: Contexts = {}

    def of(self, name: str, rules: HostRules) -> Endpoint:
        """A host's endpoint. Raises: HostError where a TLS file is missing or wrong."""
        context, tls = None, b""
        if not rules.insecure_plaintext:
            key = (rules.tls_ca, rules.tls_cert, rules.tls_key)
            if key not in self._contexts:
                # The files first: a change during this is then noticed at the next reload.
                digest = _digest_of(key)
                self._contexts[key] = client_context(host_files(name, rules)), digest
            context, tls = self._contexts[key]
        return Endpoint(
            host=rules.provider_ip,
            port=rules.provider_port,
            context=context,
            server_name=rules.tls_name or rules.provider_ip,
            tls=tls,
        )


def _digest_of(paths: Iterable[Path | None]) -> bytes:
    """A digest of some files; the code that needs an unreadable one reports it."""
    made = hashlib.sha256()
    for path in paths:
        data = b""
        if path is not None:
            with contextlib.suppress(ProviderProxyError):
                data = read_file(path, MAX_TLS_BYTES)
        made.update(hashlib.sha256(data).digest())
    return made.digest()


class Watcher:
    """All hosts of a configuration.

    Args:
        config: as it was read.
        write: for JSON lines; None for no output.
        rng: spreads first rounds, intervals and retries; not used for secrets.

    Raises:
        UsageError, HostError: as `make_settings`; or the state_dir cannot be used.
    """

    def __init__(
        self,
        config: WatchConfig,
        *,
        write: Callable[[bytes], object] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._config = config
        self.metrics = WatchMetrics()
        self._write = write
        self._rng = rng or random.Random()  # noqa: S311  # spreads; no secret
        self._store = StateStore(config.state_dir)
        self._registrars = Registrars(config)
        self._calendar = Calendar(read_dates(config), show=self.metrics.show_dates)
        self._settings = make_settings(config, KnownAks(self._registrars))
        self._budget = Budget()
        self._reporter: Reporter | None = None
        self._eks = None if config.ek_dir is None else EkDirectory(config.ek_dir)
        self._scopes: dict[str, trio.CancelScope] = {}
        self.hosts: dict[str, HostWatch] = {}

    async def run(
        self,
        read_config: ReadConfig | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Watch until SIGTERM or SIGINT, or until cancelled; SIGHUP reads the hosts again.

        Raises:
            HostError: stdout was closed, or the state cannot be saved at the end.
        """
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            if self._eks is not None:
                self._eks.open()
            try:
                await self._with_reports(self._watch, signals, read_config, task_status)
            finally:
                if self._eks is not None:
                    self._eks.close()

    async def once(self) -> Mapping[str, HostWatch]:
        """One round of every host that is asked.

        Raises:
            HostError: the state cannot be saved.
        """
        await self._with_reports(self._round_of_all)
        return self.hosts

    async def _with_reports(self, body: Callable[..., object], *args: object) -> None:
        """Run something while reports are delivered; then save, and deliver the rest."""
        self._store.open()
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._registrars.aclose)
                self._reporter = Reporter(
                    await open_sinks(stack, self._config, self._write, rng=self._rng), self.metrics
                )
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._reporter.run)
                        try:
                            await body(*args)  # type: ignore[misc]
                        finally:
                            self._reporter.close()
                            nursery.cancel_scope.deadline = trio.current_time() + DRAIN_LIMIT_S
                except BaseExceptionGroup as group:
                    ours, others = group.split(ProviderProxyError)
                    if ours is None or others is not None:
                        raise
                    raise first_of(ours) from group
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await save(self._store, self.metrics.save_failures.inc)
                finally:
                    self._store.close()

    def _host(self, name: str, setting: Setting) -> HostWatch:
        reporter = self._reporter
        assert reporter is not None
        shared = Shared(
            store=self._store,
            metrics=self.metrics,
            tell=reporter.tell,
            settled=self._settled,
            budget=self._budget,
            rng=self._rng,
        )
        host = self.hosts[name] = HostWatch(name, setting, shared)
        return host

    def _settled(self, settled: Settled) -> None:
        """Handle the end of a host's round."""
        assert self._reporter is not None
        self._reporter.settled(settled)
        host = self.hosts.get(settled.host)
        if self._eks is None or host is None or host.ek_name is None:
            return
        if settled.verdict.state is State.TRUSTED:
            self._eks.proven(settled.host, host.ek_name, lives_s(host.rules))
        else:
            self._eks.refuted(settled.host)

    async def _round_of_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for name, setting in self._settings.items():
                host = self._host(name, setting)
                if setting.endpoint is not None:
                    nursery.start_soon(_round_and_close, host)
        write_now(self.metrics, self._config.metrics, self._states())

    async def _watch(
        self,
        signals: AsyncIterator[int],
        read_config: ReadConfig | None,
        task_status: trio.TaskStatus[None],
    ) -> None:
        async with trio.open_nursery() as nursery:
            if self._eks is not None:
                nursery.start_soon(self._eks.run)
            nursery.start_soon(beat, *(() if self._eks is None else (self._eks.is_true,)))
            nursery.start_soon(
                functools.partial(memory.collect, young_s=COLLECT_YOUNG_S, full_s=COLLECT_S)
            )
            nursery.start_soon(self._calendar.run)
            nursery.start_soon(
                save_often,
                self._store,
                self._config.save_interval_s,
                self.metrics.save_failures.inc,
            )
            nursery.start_soon(write_often, self.metrics, self._config.metrics, self._states)
            self._start(nursery, self._settings)
            asked = sum(setting.endpoint is not None for setting in self._settings.values())
            memory.settle()
            log.info("watching %d hosts, %d more are listed", asked, len(self._settings) - asked)
            task_status.started()
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                if read_config is not None:
                    await self._reload(nursery, read_config)
            log.info("stopping")
            nursery.cancel_scope.cancel()

    def _start(self, nursery: trio.Nursery, settings: Mapping[str, Setting]) -> None:
        due_s = trio.current_time()
        asked = sum(setting.endpoint is not None for setting in settings.values())
        for name, setting in settings.items():
            host = self._host(name, setting)
            due = math.inf
            if setting.endpoint is not None:
                due = due_s
                # All of them within one interval, for any number of hosts.
                due_s += min(1 / STARTS_PER_S, setting.rules.interval_s / asked)
            self._scopes[name] = trio.CancelScope()
            nursery.start_soon(_within, self._scopes[name], host, due)

    async def _reload(self, nursery: trio.Nursery, read_config: ReadConfig) -> None:
        """Read the hosts again; an error is logged, and nothing changes."""
        try:
            config = await trio.to_thread.run_sync(read_config)
            aks = KnownAks(self._registrars)
            for rules in config.hosts.values():
                if rules.registrar is not None and rules.registrar not in self._config.registrars:
                    raise ConfigError(f"registrars.{rules.registrar} is new: restart to use it")
            make = functools.partial(make_settings, config, aks, before=self._settings)
            settings = await trio.to_thread.run_sync(make)
            dates = await trio.to_thread.run_sync(read_dates, config)
        except ProviderProxyError as exc:
            log.error("reload failed, the old configuration stays: %s", exc)
            return
        for name in (
            "state_dir",
            "pins",
            "registrars",
            "webhook",
            "command",
            "metrics",
            "ek_dir",
            "save_interval_s",
        ):
            if getattr(config, name) != getattr(self._config, name):
                log.warning("reload: %s has changed: restart to apply it", name)
        self._calendar.replace(dates)
        self._calendar.warn()
        for name in set(self._settings) - set(settings):
            self._scopes.pop(name).cancel()
            del self.hosts[name]
            if self._eks is not None:
                self._eks.refuted(name)
            self.metrics.forget_host(name)
        for name in set(self._settings) & set(settings):
            self.hosts[name].renew(settings[name])
        new = {name: setting for name, setting in settings.items() if name not in self.hosts}
        self._start(nursery, new)
        self._settings = settings
        memory.settle()
        log.info("reloaded: %d hosts", len(settings))

    def _states(self) -> list[State]:
        return [host.state for host in self.hosts.values()]


async def _within(scope: trio.CancelScope, host: HostWatch, due: float) -> None:
    with scope:
        await host.run(due)


async def _round_and_close(host: HostWatch) -> None:
    try:
        await host.round()
    finally:
        await host.aclose()


def verdicts(hosts: Mapping[str, HostWatch]) -> tuple[int, int, int]:
    """How many asked hosts are trusted, refused, and without evidence."""
    asked = [host for host in hosts.values() if host.verdict is not None]
    trusted = sum(host.verdict is State.TRUSTED for host in asked)
    refused = sum(host.verdict is State.INVALID_QUOTE for host in asked)
    return trusted, refused, len(asked) - trusted - refused
