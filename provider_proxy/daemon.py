"""The daemon: one nursery, in which everything that it is runs, and the way up and down.

    run ─┬─ batcher.run         fill and flush
         ├─ keeper.run          the registry of vTPMs and its hooks, with vtpm.enabled
         ├─ doors               a listener each; a task a connection
         ├─ registrations       a task a tenant's registrar; none keeps READY or a quote waiting
         ├─ watchdog            ends the process where a TPM command hangs
         └─ signals             SIGTERM and SIGINT begin the drain, SIGHUP reloads

Up: TPM and keys, then listeners, then READY. Down: STOPPING; new requests get 503 and a closed
connection; what waits is sealed and answered, for `limits.drain_ms` at most; then the doors close.
"""

from __future__ import annotations

import gc
import logging
import platform
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy import http1, listeners, server, sysd, watchdog
from provider_proxy.admin import AdminDoor
from provider_proxy.audit import records_of
from provider_proxy.audit_file import AuditLog
from provider_proxy.batch import Batch
from provider_proxy.batcher import Audit, Batcher
from provider_proxy.config_tables import Config
from provider_proxy.errors import HostError
from provider_proxy.hostlogs import HostLogFiles
from provider_proxy.metrics import Metrics
from provider_proxy.quoters.ca_signer import open_ca_signer
from provider_proxy.quoters.esys import EsysQuoter, open_quoter
from provider_proxy.recent import Recent
from provider_proxy.registrations import Registrations
from provider_proxy.reload import ReadConfig, Reloader
from provider_proxy.status import StatusBoard
from provider_proxy.tenants import TenantBook, load_book
from provider_proxy.vtpm.ca import HostCa, open_host_ca
from provider_proxy.vtpm.keeper import Keeper
from provider_proxy.vtpm.opening import open_keeper, share_socket
from provider_proxy.vtpm.requests import Issuer
from provider_proxy.waiting_room import BatchSettings

log = logging.getLogger(__name__)

GC_THRESHOLD = 100_000  # objects in the youngest generation; some 10 MB of garbage at most
CLOSE_LIMIT_S = 5.0  # for answers that are on their way when the drain is over

OpenQuoter = Callable[[Config, Metrics], AbstractAsyncContextManager[EsysQuoter]]
OpenIssuer = Callable[[Config, EsysQuoter], Awaitable[Issuer]]


def open_tpm(config: Config, metrics: Metrics) -> AbstractAsyncContextManager[EsysQuoter]:
    """The quoter that the configuration names."""
    return open_quoter(config.tpm, config.state_dir, metrics, host_uuid=config.host_uuid)


async def open_ca(config: Config, quoter: EsysQuoter) -> HostCa:
    """The CA that certifies vTPMs where `vtpm.issuer` is "tpm".

    Raises:
        HostError, ServiceError: its key, or its certificate, is not to be had.
    """
    signer = await open_ca_signer(quoter, config.tpm, config.state_dir, config.vtpm.ca_handle)
    return await open_host_ca(
        signer, quoter.ak, config.state_dir, host_uuid=quoter.identity.host_uuid
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Where a running daemon listens; tests ask for port 0."""

    addresses: list[str]
    admin_addresses: list[str]


async def run(
    config: Config,
    *,
    open_quoter: OpenQuoter = open_tpm,
    open_issuer: OpenIssuer = open_ca,
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
    inherited = sysd.take_listen_sockets()
    adopted = listeners.adopt_listeners(inherited, context)
    metrics = Metrics()
    async with (
        open_quoter(config, metrics) as quoter,
        open_keeper(
            config.vtpm,
            config.state_dir,
            metrics,
            issuer := await _issuer(config, quoter, open_issuer),
        ) as keeper,
    ):
        recent = Recent()
        batcher = _make_batcher(config, quoter, metrics, recent, keeper)
        registrations = Registrations(
            quoter, metrics, host_uuid=quoter.identity.host_uuid, state_dir=config.state_dir
        )
        registrations.replace(await trio.to_thread.run_sync(registrations.make, config.registrars))
        draining = trio.Event()
        tenant_door = _tenant_door(config, quoter, batcher, book, recent, registrations, issuer)
        tenants = http1.Door(
            tenant_door,
            observe=metrics.count_request,
            observe_handshake=metrics.count_handshake,
            max_connections=config.limits.max_connections,
            max_per_address=config.limits.max_connections_per_address,
            busy_status=config.limits.busy_status,
        )
        metrics.connections.set_function(lambda: tenants.connections)
        board = _status_board(config, quoter, batcher, recent, metrics, draining)
        admin = http1.Door(
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
                nursery.start_soon(watchdog.run, quoter, config.tpm.hang_limit_s)
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
                    sysd.notify("READY=1")
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


async def _issuer(config: Config, quoter: EsysQuoter, open_issuer: OpenIssuer) -> Issuer | None:
    if not config.vtpm.enabled or config.vtpm.issuer == "delegate":
        return None
    return await open_issuer(config, quoter)


def _make_batcher(
    config: Config, quoter: EsysQuoter, metrics: Metrics, recent: Recent, keeper: Keeper | None
) -> Batcher:
    settings = BatchSettings(
        window_s=config.batch.window_ms / 1000,
        max_leaves=config.batch.max_leaves,
        isolate_mask=config.batch.isolate_pcrs,
        max_queue=config.limits.max_queue,
    )
    return Batcher(
        quoter,
        settings,
        metrics,
        claims=keeper.claims if keeper is not None else None,
        logs=HostLogFiles(config.logs.ima, config.logs.uefi),
        boottime=_boottime(),
        audit=_make_audit(config, quoter),
        observe=recent.batch_done,
    )


def _status_board(
    config: Config,
    quoter: EsysQuoter,
    batcher: Batcher,
    recent: Recent,
    metrics: Metrics,
    draining: trio.Event,
) -> StatusBoard:
    program = program_version()
    metrics.duty.set_function(lambda: quoter.duty)
    metrics.max_duty.set(config.tpm.max_duty)
    metrics.learnt_quote_seconds.set_function(lambda: quoter.expected_s)
    metrics.build_info.labels(program, platform.python_version()).set(1)
    return StatusBoard(
        config,
        quoter,
        lambda: batcher.queue,
        recent,
        metrics,
        draining=draining.is_set,
        host={
            "uuid": str(quoter.identity.host_uuid),
            "ak_name": quoter.ak.name.hex(),
            "software": quoter.identity.software,
        },
        program=program,
    )


def _make_audit(config: Config, quoter: EsysQuoter) -> Audit | None:
    if not config.audit.enabled:
        return None
    audit_log = AuditLog(
        config.audit.path, max_bytes=config.audit.max_mb * 1_000_000, keep=config.audit.keep
    )
    start = secrets.token_hex(8)  # makes batch numbers unique over restarts

    async def record(batch: Batch) -> None:
        await audit_log.write(
            records_of(batch, start=start, ak_name=quoter.ak.name, time=time.time())
        )

    return record


def _boottime() -> int:
    return int(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))


def _tenant_door(
    config: Config,
    quoter: EsysQuoter,
    batcher: Batcher,
    book: TenantBook,
    recent: Recent,
    registrations: Registrations,
    issuer: Issuer | None,
) -> server.TenantDoor:
    identity = quoter.identity
    return server.TenantDoor(
        batcher.submit,
        book.find,
        identity=server.identity_results(
            ak_public=identity.ak_public,
            ak_pem=quoter.ak.public_key.public_bytes(
                Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
            ),
            ak_name=quoter.ak.name,
            ek_public=identity.ek_public,
            ek_cert=identity.ek_cert,
            host_uuid=str(identity.host_uuid),
            software=identity.software,
        ),
        registrations=lambda tenant: registrations.for_tenant(tenant.name),
        version=program_version(),
        banks=config.tpm.banks,
        default_timeout_ms=config.limits.default_timeout_ms,
        max_timeout_ms=config.limits.max_timeout_ms,
        count=recent.count,
        vtpm_ca=server.vtpm_ca_results(issuer.certificate) if isinstance(issuer, HostCa) else None,
    )


def program_version() -> str:
    """This program's version; "unknown" where it runs from sources that were never installed."""
    try:
        return version("provider-proxy")
    except PackageNotFoundError:
        return "unknown"


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


async def _accept(door: http1.Door, listener: listeners.Listener) -> None:
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
    tenants: http1.Door,
    doors: trio.CancelScope,
) -> None:
    """Wait for a signal; then answer what waits and close the doors."""
    async for number in signals:
        log.info("%s: draining", signal.Signals(number).name)
        break
    sysd.notify("STOPPING=1")
    draining.set()
    with trio.move_on_after(config.limits.drain_ms / 1000) as scope:
        await batcher.drain()
    if scope.cancelled_caught:
        log.warning("limits.drain_ms is over; whoever still waits is refused")
        batcher.abandon()
    with trio.move_on_after(CLOSE_LIMIT_S):
        await tenants.finish()
    doors.cancel()
