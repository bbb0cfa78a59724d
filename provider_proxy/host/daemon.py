"""The daemon: one nursery, in which everything that it is runs, and the way up and down.

    run ─┬─ batcher.run         fill and flush
         ├─ keeper.run          the registry of vTPMs and its hooks, with vtpm.enabled
         ├─ doors               a listener each; a task a connection
         ├─ registrations       a task a tenant's registrar; none keeps READY or a quote waiting
         ├─ watchdog            ends the process where a TPM command hangs
         ├─ unit_status         a line for `systemctl status`
         └─ signals             SIGTERM and SIGINT begin the drain, SIGHUP reloads

Up: TPM and keys, then listeners, then READY. Down: STOPPING; new requests get 503 and a closed
connection; what waits is sealed and answered, for `limits.drain_ms` at most; then the doors close.
"""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from provider_proxy.errors import HostError
from provider_proxy.host import assembly, systemd
from provider_proxy.host.api.admin import AdminDoor
from provider_proxy.host.api.identity import load_book
from provider_proxy.host.assembly import OpenIssuer, OpenQuoter
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.config.tables import Config
from provider_proxy.host.http import listeners, server
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.reload import ReadConfig, Reloader
from provider_proxy.host.status import unit_line, watchdog
from provider_proxy.host.status.recent import Recent
from provider_proxy.host.vtpm.open_service import open_keeper, share_socket

log = logging.getLogger(__name__)

GC_THRESHOLD = 100_000  # objects in the youngest generation; some 10 MB of garbage at most
CLOSE_LIMIT_S = 5.0  # for answers that are on their way when the drain is over


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Where a running daemon listens; tests ask for port 0."""

    addresses: list[str]
    admin_addresses: list[str]


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
        open_quoter: opens the TPM; benchmarks put one with a delay there.
        open_issuer: opens what certifies vTPMs where `vtpm.issuer` is "tpm".
        read_config: reads the configuration again, for SIGHUP; None where there is no file.

    Raises:
        HostError: TPM, key, port or file is missing.
        ConfigError: an inherited socket does not fit the configuration.
    """
    context = listeners.tls_context(config.listen)
    book = load_book(config.listen, config.tenant_defaults, config.tenants)
    inherited = systemd.take_listen_sockets()
    adopted = listeners.adopt_listeners(inherited, context)
    metrics = Metrics()
    systemd.notify_status(unit_line.OPENING)
    async with (
        open_quoter(config, metrics) as quoter,
        open_keeper(
            config.vtpm,
            config.state_dir,
            metrics,
            issuer := await assembly.make_issuer(config, quoter, open_issuer),
        ) as keeper,
    ):
        recent = Recent()
        batcher = assembly.make_batcher(config, quoter, metrics, recent, keeper)
        registrations = assembly.make_registrations(config, quoter, metrics)
        registrations.replace(await trio.to_thread.run_sync(registrations.make, config.registrars))
        draining = trio.Event()
        tenant_door = assembly.make_tenant_door(
            config, quoter, batcher, book, recent, registrations, issuer
        )
        tenants = server.Door(
            tenant_door,
            observe=metrics.count_request,
            observe_handshake=metrics.count_handshake,
            max_connections=config.limits.max_connections,
            max_per_address=config.limits.max_connections_per_address,
            busy_status=config.limits.busy_status,
        )
        metrics.connections.set_function(lambda: tenants.connections)
        board = assembly.make_status_board(config, quoter, batcher, recent, metrics, draining)
        admin = server.Door(
            AdminDoor(
                metrics,
                board.not_ready,
                board.results,
                registrations.for_provider,
                vms=keeper.listed if keeper is not None else None,
            ),
            observe=lambda status, reason: None,
        )
        async with (
            _opened(
                adopted
                or listeners.open_listeners("listen.address", config.listen.address, context),
                ours=not adopted,
            ) as open_doors,
            _opened(
                listeners.open_listeners("admin.address", config.admin.address, None), ours=True
            ) as open_admin,
            _opened(_open_hooks(config), ours=True) as open_hooks,
        ):
            started = Started(
                addresses=listeners.describe(open_doors),
                admin_addresses=listeners.describe(open_admin),
            )
            _announce(config, started)
            if keeper is not None:
                await keeper.start()  # the socket is there: nothing that happens now is missed
            tune_gc()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(batcher.run)
                registrations.start(nursery)
                nursery.start_soon(watchdog.run, lambda: quoter.state, config.tpm.hang_limit_s)
                if keeper is not None:
                    nursery.start_soon(keeper.run, open_hooks)
                for listener in open_admin:
                    nursery.start_soon(_accept, admin, listener)
                reloader = Reloader(
                    config,
                    read_config or (lambda: config),
                    tenant_door,
                    open_doors,
                    registrations,
                )
                await nursery.start(_reload_at_signal, reloader)
                with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                    task_status.started(started)
                    systemd.notify("READY=1")
                    nursery.start_soon(
                        unit_line.run, recent, lambda: quoter.state, lambda: batcher.queue.waiting
                    )
                    async with trio.open_nursery() as doors:
                        for listener in open_doors:
                            doors.start_soon(_accept, tenants, listener)
                        doors.start_soon(
                            _drain_at_signal,
                            config,
                            signals,
                            draining,
                            batcher,
                            tenants,
                            doors.cancel_scope,
                        )
                nursery.cancel_scope.cancel()
    log.info("stopped")


def tune_gc() -> None:
    """Make the cyclic garbage collector rare: reference counts free what requests leave behind.

    A batch of a thousand keeps some ten thousand objects alive at once, and the default threshold of
    700 has the collector walk them again and again: a fifth of the daemon's CPU (measured).
    """
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 100)


def _open_hooks(config: Config) -> list[listeners.Listener]:
    if not config.vtpm.enabled:
        return []
    opened = listeners.open_listeners("vtpm.socket", (f"unix:{config.vtpm.socket}",), None)
    try:
        share_socket(config.vtpm)
    except HostError:
        listeners.close_all(opened)
        raise
    return opened


def _announce(config: Config, started: Started) -> None:
    for address in started.addresses:
        log.info("listening on %s", address)
    for address in started.admin_addresses:
        log.info("admin listens on %s", address)
    if config.listen.insecure_plaintext:
        log.warning("listen.insecure_plaintext: requests and answers travel in the clear")
    elif config.listen.client_ca is None:
        log.warning("listen.client_ca is not set: whoever reaches the port may ask for quotes")


@asynccontextmanager
async def _opened(
    opened: Sequence[listeners.Listener], *, ours: bool
) -> AsyncIterator[Sequence[listeners.Listener]]:
    """Close listeners in the end; the unix sockets that are ours are removed, systemd's stay."""
    names = listeners.describe(opened)
    try:
        yield opened
    finally:
        listeners.close_all(opened)
        if ours:
            listeners.remove_unix_sockets(names)


async def _accept(door: server.Door, listener: listeners.Listener) -> None:
    await trio.serve_listeners(door.serve, [listener])


async def _reload_at_signal(
    reloader: Reloader, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        await reloader.run(signals)


async def _drain_at_signal(
    config: Config,
    signals: AsyncIterator[int],
    draining: trio.Event,
    batcher: Batcher,
    tenants: server.Door,
    doors: trio.CancelScope,
) -> None:
    """Wait for a signal; then answer what waits and close the doors."""
    async for number in signals:
        log.info("%s: draining", signal.Signals(number).name)
        break
    systemd.notify("STOPPING=1")
    draining.set()
    with trio.move_on_after(config.limits.drain_ms / 1000) as scope:
        await batcher.drain()
    if scope.cancelled_caught:
        log.warning("limits.drain_ms is over; whoever still waits is refused")
        batcher.abandon()
    with trio.move_on_after(CLOSE_LIMIT_S):
        await tenants.finish()
    doors.cancel()
