"""Which AK a Keylime agent quotes with: the record of the provider's own registrar, checked and pinned.

The registrar is asked at the start and while the circuit is open, never for a quote. The record's AK must
be valid, its EK must lead to a CA that the provider trusts, and both must be those that were pinned at
first. The agent must show the record's TLS certificate.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from provider_proxy.common.http import http_client
from provider_proxy.common.tls import client_context, pinned_context
from provider_proxy.errors import (
    AkChangedError,
    HostError,
    PinChangedError,
    ReplyError,
    UsageError,
    VerificationError,
)
from provider_proxy.evidence.model import HashAlg
from provider_proxy.host.config.chip_tables import KeylimeAgent
from provider_proxy.host.config.material import agent_files, agent_registrar_files
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import keylime_agent
from provider_proxy.host.quoters.agent_http import AgentClient
from provider_proxy.host.quoters.keylime_agent import AgentBinding, AgentQuoter
from provider_proxy.host.quoters.tpm_opener import HostIdentity, uuid_of_ek
from provider_proxy.trust.bindings import Binding, RegistrarBindings
from provider_proxy.trust.ek_judges import EkJudge, UnsafeAnyEk
from provider_proxy.trust.ek_store import EkStore
from provider_proxy.trust.pins import PinStore

PINS = "agent-pins"  # below state_dir
REGISTRAR_S = 30.0


@asynccontextmanager
async def open_quoter(
    settings: KeylimeAgent,
    state_dir: Path,
    metrics: Metrics,
    *,
    banks: tuple[HashAlg, ...],
    max_duty: float,
    ima_wait_s: float | None = None,
    host_uuid: uuid.UUID | None = None,
) -> AsyncIterator[AgentQuoter]:
    """The agent that the configuration describes, for as long as the context lasts.

    Args:
        banks: that the daemon offers; an agent quotes only the bank of its AK's hash.
        max_duty, ima_wait_s: see `Pace`.

    Raises:
        HostError: the registrar's record is not valid, or the agent gives no quote.
    """
    judge = _judge(settings)

    async def bind() -> AgentBinding:
        bound = await _bind(settings, state_dir / PINS, judge, host_uuid)
        if banks != (bound.ak.signature_hash,):
            bank = bound.ak.signature_hash.label
            raise HostError(
                f'tpm.banks: the agent quotes the bank {bank} only; set tpm.banks = ["{bank}"]'
            )
        return bound

    async with keylime_agent.open_quoter(
        bind, max_duty, metrics, state_dir, ima_wait_s=ima_wait_s
    ) as quoter:
        yield quoter


def _judge(settings: KeylimeAgent) -> EkJudge:
    if not settings.ek_ca:
        return UnsafeAnyEk()
    return EkStore(*settings.ek_ca, insecure_virtual=settings.insecure_virtual_ek)


async def _bind(
    settings: KeylimeAgent, pins: Path, judge: EkJudge, host_uuid: uuid.UUID | None
) -> AgentBinding:
    """Ask the registrar.

    Raises:
        AkChangedError: AK or EK are not the pinned ones.
        HostError: no answer, no record, or a record that is not valid.
    """
    assert settings.registrar_url is not None  # config requires all three
    assert settings.agent_id is not None
    assert settings.url is not None
    try:
        context = client_context(agent_registrar_files(settings))
        async with http_client(
            context, read_limit_s=REGISTRAR_S, tls_name=settings.registrar_tls_name
        ) as http:
            bindings = RegistrarBindings(
                http, settings.registrar_url, pins=PinStore(pins), eks=judge, ttl_s=0
            )
            binding = await bindings.get(settings.agent_id)
    except PinChangedError as exc:
        raise AkChangedError(f"the agent's keys at the registrar: {exc}") from exc
    except (VerificationError, ReplyError, UsageError) as exc:
        raise HostError(f"the agent's record at the registrar: {exc}") from exc
    return AgentBinding(
        ak=binding.host.ak,
        identity=HostIdentity(
            ak_public=binding.ak_public,
            ek_public=binding.ek_public,
            ek_cert=binding.ek_cert,
            host_uuid=host_uuid or uuid_of_ek(binding.ek_public),
            software=settings.insecure_no_ek,  # it may be software: the EK is not checked then
        ),
        client=AgentClient(settings.url, _agent_context(settings, binding)),
    )


def _agent_context(settings: KeylimeAgent, binding: Binding) -> ssl.SSLContext | None:
    assert settings.url is not None
    if not settings.url.startswith("https://"):
        return None
    if binding.tls_cert is None:
        raise HostError("the agent's record at the registrar names no TLS certificate")
    return pinned_context(binding.tls_cert, agent_files(settings))
