"""Makes the daemon's parts from its configuration, as one value; `daemon` runs them.

    configuration → metrics → quoter → vTPM service → batcher → registrations → servers → listeners

Nothing here starts one of the daemon's tasks or waits for a tenant.
"""

from __future__ import annotations

import platform
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from dataclasses import dataclass

import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.common.addresses import Networks
from provider_proxy.common.dates import Calendar
from provider_proxy.common.version import program_version
from provider_proxy.host import preflight
from provider_proxy.host.api.admin import AdminApi
from provider_proxy.host.api.front import FrontApi, make_front_api
from provider_proxy.host.api.identity import TenantDirectory, load_tenant_directory
from provider_proxy.host.api.tenant import TenantApi, identity_results, vtpm_ca_results
from provider_proxy.host.audit.file import AuditLog
from provider_proxy.host.audit.records import records_of
from provider_proxy.host.batching.batch import Batch
from provider_proxy.host.batching.batcher import Audit, Batcher, LogSource
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.config.chip_tables import KEYLIME_AGENT
from provider_proxy.host.config.material import read_dates
from provider_proxy.host.config.tables import Config
from provider_proxy.host.http import listeners
from provider_proxy.host.http.server import HttpServer
from provider_proxy.host.listening import ADDRESS, FRONT, adopt, listening, open_hooks, opened
from provider_proxy.host.logs.files import HostLogFiles
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import agent_binding, local_tpm
from provider_proxy.host.quoters.ca_signer import open_ca_signer
from provider_proxy.host.quoters.keylime_agent import AgentLogs, AgentQuoter
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.quoters.tpm_opener import is_software
from provider_proxy.host.registration.registrations import Registrations
from provider_proxy.host.status.board import StatusBoard
from provider_proxy.host.status.recent import Recent
from provider_proxy.host.tpm import ima
from provider_proxy.host.vtpm.ca import HostCa, open_host_ca
from provider_proxy.host.vtpm.open_service import open_vtpm_service
from provider_proxy.host.vtpm.requests import Issuer
from provider_proxy.host.vtpm.service import VtpmService

ADMIN_CONNECTIONS = 16  # Prometheus, a status page or two, `top`; one more closes the longest idle

HostQuoter = EsysQuoter | AgentQuoter
OpenQuoter = Callable[[Config, Metrics], AbstractAsyncContextManager[HostQuoter]]
OpenIssuer = Callable[[Config, EsysQuoter], Awaitable[Issuer]]


def open_quoter(config: Config, metrics: Metrics) -> AbstractAsyncContextManager[HostQuoter]:
    """The quoter that the configuration names."""
    ima_wait_s = ima.wait_bound_s(config.tpm.ima_wait_ms)
    if config.quoter.kind == KEYLIME_AGENT:
        return agent_binding.open_quoter(
            config.keylime_agent,
            config.state_dir,
            metrics,
            banks=config.tpm.banks,
            max_duty=config.tpm.max_duty,
            ima_wait_s=ima_wait_s,
            host_uuid=config.host_uuid,
        )
    return local_tpm.open_quoter(
        config.tpm,
        config.state_dir,
        metrics,
        host_uuid=config.host_uuid,
        ima_wait_s=None if is_software(config.tpm.tcti) else ima_wait_s,
    )


async def open_ca(config: Config, quoter: EsysQuoter) -> HostCa:
    """The CA that certifies vTPMs where `vtpm.issuer` is "tpm".

    Raises:
        HostError, ServiceError: its key or its certificate is not available.
    """
    signer = await open_ca_signer(quoter, config.tpm, config.state_dir, config.vtpm.ca_handle)
    return await open_host_ca(
        signer, quoter.ak, config.state_dir, host_uuid=quoter.identity.host_uuid
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All that the daemon runs, made and connected.

    Attributes:
        vtpm_service: the registry of vTPMs; None where `vtpm.enabled` is false.
        draining: set once the daemon is shutting down.
        tenant_api, tenants: the tenants' requests, and the server that reads them.
        front_api, front: the same for a front's listeners; None where there are none.
        admin: the server of the admin listener.
        open_tenants, open_admin, open_hooks: the listeners, in the order of the configuration.
    """

    metrics: Metrics
    calendar: Calendar
    quoter: HostQuoter
    vtpm_service: VtpmService | None
    recent: Recent
    batcher: Batcher
    registrations: Registrations
    draining: trio.Event
    tenant_api: TenantApi
    tenants: HttpServer
    admin: HttpServer
    front_api: FrontApi | None
    front: HttpServer
    open_tenants: Sequence[listeners.Listener]
    open_front: Sequence[listeners.Listener]
    open_admin: Sequence[listeners.Listener]
    open_hooks: Sequence[listeners.Listener]


@asynccontextmanager
async def open_parts(
    config: Config, *, open_quoter: OpenQuoter = open_quoter, open_issuer: OpenIssuer = open_ca
) -> AsyncIterator[Parts]:
    """Open the TPM, the registry and the listeners, for as long as the context lasts.

    Args:
        open_quoter: opens the TPM; benchmarks pass one with a delay.
        open_issuer: opens what certifies vTPMs where `vtpm.issuer` is "tpm".

    Raises:
        HostError: TPM, key, port or file is missing.
        ConfigError: an inherited socket does not fit the configuration.
    """
    # Files first: their faults are reported before the chip makes a key.
    context = listeners.tls_context(config.listen)
    directory = load_tenant_directory(config.listen, config.tenant_defaults, config.tenants)
    adopted = adopt(config.listen, context)
    metrics = Metrics()
    calendar = Calendar(read_dates(config), show=metrics.show_dates)
    preflight.check_start(config, inherited=adopted.keys())
    async with AsyncExitStack() as stack:
        quoter = await stack.enter_async_context(open_quoter(config, metrics))
        issuer = await _make_issuer(config, quoter, open_issuer)
        vtpm_service = await stack.enter_async_context(
            open_vtpm_service(config.vtpm, config.state_dir, metrics, issuer)
        )
        recent, draining = Recent(), trio.Event()
        logs = _make_logs(config, quoter)
        stack.callback(logs.close)
        batcher = _make_batcher(config, quoter, metrics, recent, vtpm_service, logs)
        registrations = _make_registrations(config, quoter, metrics)
        registrations.replace(await trio.to_thread.run_sync(registrations.make, config.registrars))
        server = _make_tenant_api(config, quoter, batcher, directory, recent, registrations, issuer)
        tenants = HttpServer(
            server,
            observe=metrics.count_request,
            observe_handshake=metrics.count_handshake,
            turned_away=recent.turned_away.shaken,
            max_connections=config.limits.max_connections,
            max_per_address=config.limits.max_connections_per_address,
            busy_status=config.limits.busy_status,
            passed_on=Networks(config.listen.proxy_protocol_from).holds,
        )
        front_api = make_front_api(
            config.listen, server, directory, recent.count, recent.turned_away.note
        )
        front = HttpServer(
            front_api or server,
            observe=metrics.count_request,
            observe_handshake=metrics.count_handshake,
            turned_away=recent.turned_away.shaken,
            max_connections=config.limits.max_connections,
            max_per_address=config.limits.max_connections,
            busy_status=config.limits.busy_status,
            front=True,
        )
        metrics.connections.set_function(lambda: tenants.connections + front.connections)
        board = _make_status_board(config, quoter, batcher, recent, metrics, draining, calendar)
        admin = AdminApi(
            metrics,
            board.not_ready,
            board.results,
            registrations.for_provider,
            vms=vtpm_service.listed if vtpm_service is not None else None,
        )
        yield Parts(
            metrics=metrics,
            calendar=calendar,
            quoter=quoter,
            vtpm_service=vtpm_service,
            recent=recent,
            batcher=batcher,
            registrations=registrations,
            draining=draining,
            tenant_api=server,
            tenants=tenants,
            front_api=front_api,
            front=front,
            admin=HttpServer(
                admin, observe=lambda status, reason: None, max_connections=ADMIN_CONNECTIONS
            ),
            open_tenants=stack.enter_context(
                listening(ADDRESS, config.listen.address, context, adopted)
            ),
            open_front=stack.enter_context(listening(FRONT, config.listen.front, context, adopted)),
            open_admin=stack.enter_context(
                opened(listeners.open_listeners("admin.address", config.admin.address, None))
            ),
            open_hooks=stack.enter_context(opened(open_hooks(config))),
        )


async def _make_issuer(
    config: Config, quoter: HostQuoter, open_issuer: OpenIssuer
) -> Issuer | None:
    """The issuer of vTPMs' certificates; None where swtpm's own tool issues them.

    Raises:
        HostError, ServiceError: it cannot be opened.
    """
    if not config.vtpm.enabled or config.vtpm.issuer == "delegate":
        return None
    assert not isinstance(quoter, AgentQuoter)  # the configuration refuses it
    return await open_issuer(config, quoter)


def _make_logs(config: Config, quoter: HostQuoter) -> HostLogFiles | AgentLogs:
    if isinstance(quoter, AgentQuoter):
        return quoter.logs
    return HostLogFiles(config.logs.ima, config.logs.uefi, directory=config.state_dir)


def _make_batcher(
    config: Config,
    quoter: HostQuoter,
    metrics: Metrics,
    recent: Recent,
    vtpm_service: VtpmService | None,
    logs: LogSource,
) -> Batcher:
    """The batcher, with the host's logs, claims and audit log."""
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
        claims=vtpm_service.claims if vtpm_service is not None else None,
        logs=logs,
        boottime=_boottime(),
        audit=_make_audit(config, quoter, metrics),
        observe=recent.batch_done,
    )


def _make_status_board(
    config: Config,
    quoter: HostQuoter,
    batcher: Batcher,
    recent: Recent,
    metrics: Metrics,
    draining: trio.Event,
    calendar: Calendar,
) -> StatusBoard:
    """The status that operators see; it also sets gauges of other parts."""
    program = program_version()
    metrics.duty.set_function(lambda: quoter.state.duty)
    metrics.max_duty.set_function(lambda: min(config.tpm.max_duty, quoter.state.max_duty))
    metrics.learnt_quote_seconds.set_function(lambda: quoter.state.expected_s)
    metrics.build_info.labels(program, platform.python_version()).set(1)
    return StatusBoard(
        config,
        lambda: quoter.state,
        lambda: batcher.queue,
        recent,
        metrics,
        draining=draining.is_set,
        calendar=calendar,
        host={
            "uuid": str(quoter.identity.host_uuid),
            "ak_name": quoter.ak.name.hex(),
            "software": quoter.identity.software,
        },
        program=program,
    )


def _make_registrations(config: Config, quoter: HostQuoter, metrics: Metrics) -> Registrations:
    """The host's registrations, not started; a Keylime agent's chip cannot answer our challenges."""
    return Registrations(
        None if isinstance(quoter, AgentQuoter) else quoter,
        metrics,
        host_uuid=quoter.identity.host_uuid,
        state_dir=config.state_dir,
    )


def _make_audit(config: Config, quoter: HostQuoter, metrics: Metrics) -> Audit | None:
    if not config.audit.enabled:
        return None
    size, keep, on_loss = config.audit.max_mb * 1_000_000, config.audit.keep, metrics.audit_lost.inc
    audit_log = AuditLog(config.audit.path, max_bytes=size, keep=keep, on_loss=on_loss)

    async def record(batch: Batch) -> None:
        await audit_log.write(records_of(batch, ak_name=quoter.ak.name, time=time.time()))

    return record


def _boottime() -> int:
    return int(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))


def _make_tenant_api(
    config: Config,
    quoter: HostQuoter,
    batcher: Batcher,
    directory: TenantDirectory,
    recent: Recent,
    registrations: Registrations,
    issuer: Issuer | None,
) -> TenantApi:
    """The tenant API."""
    identity = quoter.identity
    return TenantApi(
        batcher.submit,
        directory.find,
        identity=identity_results(
            ak_public=identity.ak_public,
            ak_pem=quoter.ak.public_key.public_bytes(
                Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
            ),
            ak_name=quoter.ak.name,
            ek_public=identity.ek_public,
            ek_cert=identity.ek_cert,
            ek_chain=identity.ek_chain,
            host_uuid=str(identity.host_uuid),
            software=identity.software,
        ),
        registrations=lambda tenant: registrations.for_tenant(tenant.name),
        version=program_version(),
        banks=config.tpm.banks,
        default_timeout_ms=config.limits.default_timeout_ms,
        max_timeout_ms=config.limits.max_timeout_ms,
        count=recent.count,
        turned_away=recent.turned_away.note,
        vtpm_ca=vtpm_ca_results(issuer.certificate) if isinstance(issuer, HostCa) else None,
    )
