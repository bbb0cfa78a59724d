"""The daemon: one nursery in which all its tasks run, its start and its stop.

    run ─┬─ batcher.run          fill and flush
         ├─ vtpm_service.run     the registry of vTPMs and its hooks, with vtpm.enabled
         ├─ servers              a listener each; a task for each connection
         ├─ registrations        a task for each registrar; none delays READY or a quote
         ├─ watchdog             ends the process when a TPM command hangs
         ├─ calendar.run         warns of what expires
         ├─ memory.collect       the garbage collector, at fixed times
         ├─ unit_status          a line for `systemctl status`
         └─ signals              SIGTERM and SIGINT start the drain, SIGHUP reloads

Start: TPM and keys, then listeners, then READY. Stop: STOPPING; new requests get 503 and a closed
connection; waiting requests are sealed and answered, for `limits.drain_ms` at most; then the servers
close.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from provider_proxy.common import descriptors, memory, systemd
from provider_proxy.errors import HostError
from provider_proxy.host import assembly
from provider_proxy.host.assembly import OpenIssuer, OpenQuoter
from provider_proxy.host.config.tables import Config
from provider_proxy.host.http import listeners
from provider_proxy.host.http.server import HttpServer
from provider_proxy.host.reload import ReadConfig, Reloader
from provider_proxy.host.status import unit_line, watchdog

log = logging.getLogger(__name__)

RESERVED_FILES = assembly.ADMIN_CONNECTIONS + 16  # TPM, audit log, host's logs, state, registrars
CLOSE_LIMIT_S = 5.0  # for answers that are being sent when the drain is over


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Where a running daemon listens; tests ask for port 0."""

    addresses: list[str]
    admin_addresses: list[str]
    front_addresses: list[str] = field(default_factory=list)


async def run(
    config: Config,
    *,
    open_quoter: OpenQuoter = assembly.open_quoter,
    open_issuer: OpenIssuer = assembly.open_ca,
    read_config: ReadConfig | None = None,
    task_status: trio.TaskStatus[Started] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until SIGTERM or SIGINT, or until cancelled.

    Args:
        open_quoter: opens the TPM; benchmarks pass one with a delay.
        open_issuer: opens what certifies vTPMs where `vtpm.issuer` is "tpm".
        read_config: reads the configuration again, for SIGHUP; None where there is no file.

    Raises:
        HostError: TPM, key, port or file is missing.
        ConfigError: an inherited socket does not fit the configuration.
    """
    descriptors.raise_limit()
    systemd.notify_status(unit_line.OPENING)
    opening = assembly.open_parts(config, open_quoter=open_quoter, open_issuer=open_issuer)
    async with opening as parts:
        started = Started(
            addresses=listeners.describe(parts.open_tenants),
            admin_addresses=listeners.describe(parts.open_admin),
            front_addresses=listeners.describe(parts.open_front),
        )
        _announce(config, started)
        _hold_to_descriptors(config, parts.tenants, parts.front)
        if parts.vtpm_service is not None:
            await parts.vtpm_service.start()  # the socket exists: no event from now on is missed
        memory.tune_gc()
        async with trio.open_nursery() as nursery:
            _start(nursery, config, parts)
            reloader = Reloader(
                config,
                read_config or (lambda: config),
                parts.tenant_api,
                (*parts.open_tenants, *parts.open_front),
                parts.registrations,
                parts.calendar,
                parts.front_api,
            )
            await nursery.start(_reload_at_signal, reloader)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                task_status.started(started)
                systemd.notify("READY=1")
                nursery.start_soon(
                    unit_line.run,
                    parts.recent,
                    lambda: parts.quoter.state,
                    lambda: parts.batcher.queue.waiting,
                )
                async with trio.open_nursery() as servers:
                    for listener in parts.open_tenants:
                        servers.start_soon(listener.serve, parts.tenants.serve)
                    for listener in parts.open_front:
                        servers.start_soon(listener.serve, parts.front.serve)
                    servers.start_soon(
                        _drain_at_signal, config, signals, parts, servers.cancel_scope
                    )
            nursery.cancel_scope.cancel()
    log.info("stopped")


def _start(nursery: trio.Nursery, config: Config, parts: assembly.Parts) -> None:
    """Start the tasks that run from before READY to the end."""
    nursery.start_soon(parts.batcher.run)
    nursery.start_soon(memory.collect)
    nursery.start_soon(parts.calendar.run)
    parts.registrations.start(nursery)
    nursery.start_soon(watchdog.run, lambda: parts.quoter.state, config.tpm.hang_limit_s)
    if parts.vtpm_service is not None:
        nursery.start_soon(parts.vtpm_service.run, parts.open_hooks)
    for listener in parts.open_admin:
        nursery.start_soon(listener.serve, parts.admin.serve)


def _hold_to_descriptors(config: Config, tenants: HttpServer, front: HttpServer) -> None:
    """Limit connections to what the open files limit leaves after the daemon's other files.

    Raises:
        HostError: it leaves room for none.
    """
    room = descriptors.room(RESERVED_FILES)
    if room < 1:
        raise HostError(
            f"the limit of open files is too low for a connection: {RESERVED_FILES} are kept for the "
            "TPM, the logs and the admin listener; raise it (LimitNOFILE= in the unit, ulimit -n)"
        )
    front.limit_connections(room)
    if tenants.limit_connections(room) < config.limits.max_connections:
        log.warning(
            "limits.max_connections is %d, but the limit of open files allows only %d; raise it "
            "(LimitNOFILE= in the unit, ulimit -n)",
            config.limits.max_connections,
            room,
        )


def _announce(config: Config, started: Started) -> None:
    for address in started.addresses:
        log.info("listening on %s", address)
    for address in started.front_addresses:
        log.info("listening for the front on %s", address)
    for address in started.admin_addresses:
        log.info("listening for the admin API on %s", address)
    if config.listen.insecure_plaintext:
        log.warning("listen.insecure_plaintext: requests and answers are not encrypted")
    elif config.listen.client_ca is None:
        log.warning(
            "listen.client_ca is not set: any client that reaches the port may ask for quotes"
        )


async def _reload_at_signal(
    reloader: Reloader, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        await reloader.run(signals)


async def _drain_at_signal(
    config: Config,
    signals: AsyncIterator[int],
    parts: assembly.Parts,
    servers: trio.CancelScope,
) -> None:
    """Wait for a signal; then answer the waiting requests and close the servers."""
    async for number in signals:
        log.info("%s: draining", signal.Signals(number).name)
        break
    systemd.notify("STOPPING=1")
    parts.draining.set()
    with trio.move_on_after(config.limits.drain_ms / 1000) as scope:
        await parts.batcher.drain()
    if scope.cancelled_caught:
        log.warning("limits.drain_ms is over; requests that still wait are refused")
        parts.batcher.abandon()
    with trio.move_on_after(CLOSE_LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.tenants.finish)
            nursery.start_soon(parts.front.finish)
    servers.cancel()
