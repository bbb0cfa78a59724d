"""Makes the daemon's parts out of its configuration; `daemon` runs them.

Nothing here starts a task, opens a listener or waits for a tenant.
"""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import PackageNotFoundError, version

import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.host.api import tenant as server
from provider_proxy.host.api.identity import TenantBook
from provider_proxy.host.audit.file import AuditLog
from provider_proxy.host.audit.records import records_of
from provider_proxy.host.batching.batch import Batch
from provider_proxy.host.batching.batcher import Audit, Batcher
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.config.tables import KEYLIME_AGENT, Config
from provider_proxy.host.logs import HostLogFiles
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import agent_binding, local_tpm
from provider_proxy.host.quoters.ca_signer import open_ca_signer
from provider_proxy.host.quoters.keylime_agent import AgentQuoter
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.registration.registrations import Registrations
from provider_proxy.host.status.board import StatusBoard
from provider_proxy.host.status.recent import Recent
from provider_proxy.host.vtpm.ca import HostCa, open_host_ca
from provider_proxy.host.vtpm.requests import Issuer
from provider_proxy.host.vtpm.service import Keeper

HostQuoter = EsysQuoter | AgentQuoter
OpenQuoter = Callable[[Config, Metrics], AbstractAsyncContextManager[HostQuoter]]
OpenIssuer = Callable[[Config, EsysQuoter], Awaitable[Issuer]]


def open_quoter(config: Config, metrics: Metrics) -> AbstractAsyncContextManager[HostQuoter]:
    """The quoter that the configuration names."""
    if config.quoter.kind == KEYLIME_AGENT:
        return agent_binding.open_quoter(
            config.keylime_agent,
            config.state_dir,
            metrics,
            banks=config.tpm.banks,
            max_duty=config.tpm.max_duty,
            host_uuid=config.host_uuid,
        )
    return local_tpm.open_quoter(config.tpm, config.state_dir, metrics, host_uuid=config.host_uuid)


async def open_ca(config: Config, quoter: EsysQuoter) -> HostCa:
    """The CA that certifies vTPMs where `vtpm.issuer` is "tpm".

    Raises:
        HostError, ServiceError: its key, or its certificate, is not to be had.
    """
    signer = await open_ca_signer(quoter, config.tpm, config.state_dir, config.vtpm.ca_handle)
    return await open_host_ca(
        signer, quoter.ak, config.state_dir, host_uuid=quoter.identity.host_uuid
    )


async def make_issuer(config: Config, quoter: HostQuoter, open_issuer: OpenIssuer) -> Issuer | None:
    """What certifies vTPMs; None where swtpm's own tool does.

    Raises:
        HostError, ServiceError: it cannot be had.
    """
    if not config.vtpm.enabled or config.vtpm.issuer == "delegate":
        return None
    assert not isinstance(quoter, AgentQuoter)  # the configuration refuses it
    return await open_issuer(config, quoter)


def make_batcher(
    config: Config, quoter: HostQuoter, metrics: Metrics, recent: Recent, keeper: Keeper | None
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
        claims=keeper.claims if keeper is not None else None,
        logs=quoter.logs
        if isinstance(quoter, AgentQuoter)
        else HostLogFiles(config.logs.ima, config.logs.uefi),
        boottime=_boottime(),
        audit=_make_audit(config, quoter),
        observe=recent.batch_done,
    )


def make_status_board(
    config: Config,
    quoter: HostQuoter,
    batcher: Batcher,
    recent: Recent,
    metrics: Metrics,
    draining: trio.Event,
) -> StatusBoard:
    """What operators see; it feeds the gauges that others own, too."""
    program = program_version()
    metrics.duty.set_function(lambda: quoter.state.duty)
    metrics.max_duty.set(config.tpm.max_duty)
    metrics.learnt_quote_seconds.set_function(lambda: quoter.state.expected_s)
    metrics.build_info.labels(program, platform.python_version()).set(1)
    return StatusBoard(
        config,
        lambda: quoter.state,
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


def make_registrations(config: Config, quoter: HostQuoter, metrics: Metrics) -> Registrations:
    """The host's registrations, none of them begun; an agent's chip answers no challenge of ours."""
    return Registrations(
        None if isinstance(quoter, AgentQuoter) else quoter,
        metrics,
        host_uuid=quoter.identity.host_uuid,
        state_dir=config.state_dir,
    )


def _make_audit(config: Config, quoter: HostQuoter) -> Audit | None:
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


def make_tenant_door(
    config: Config,
    quoter: HostQuoter,
    batcher: Batcher,
    book: TenantBook,
    recent: Recent,
    registrations: Registrations,
    issuer: Issuer | None,
) -> server.TenantDoor:
    """The tenants' door."""
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
