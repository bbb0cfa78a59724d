"""All registrations of a host: made from the configuration, started, replaced at a reload, reported.

One task for each registrar, in the nursery given to `start`. A reload replaces them all, so that each
checks its registrar at once with the present certificates; the state of those whose table has not changed
is kept.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import trio

from provider_proxy.errors import ConfigError
from provider_proxy.host.config.registrars import RegistrarTable, agent_id_of, check_distinct
from provider_proxy.host.metrics import Metrics
from provider_proxy.trust.registration.client import http_client, tls_context
from provider_proxy.trust.registration.registration import Registration
from provider_proxy.trust.registration.round import TpmIdentity
from provider_proxy.trust.registration.state import State, for_provider, for_tenant

log = logging.getLogger(__name__)

LOCKS = "registrars"  # below state_dir: a file a registrar, empty
STATES = tuple(state.value for state in State)


class HostRegistration(Registration):
    """The host in the registrar of one of its tenants."""

    table: RegistrarTable


def make_registration(
    name: str,
    table: RegistrarTable,
    tpm: TpmIdentity,
    *,
    host_uuid: uuid.UUID,
    state_dir: Path,
) -> HostRegistration:
    """The registration that a table describes. Reads files: not for trio's thread.

    Raises:
        HostError: a certificate or key cannot be used.
    """
    return HostRegistration(
        name,
        table,
        agent_id_of(name, table, host_uuid),
        tpm,
        open_http=partial(
            http_client, tls_context(f"registrars.{name}", table), tls_name=table.tls_name
        ),
        lock=state_dir / LOCKS / f"{name}.lock",
    )


class Registrations:
    """The host's registrations, by the registrars' names.

    Args:
        tpm: the TPM to register; None where a Keylime agent owns the chip and registers it.
        state_dir: for the locks among this host's processes.
    """

    def __init__(
        self, tpm: TpmIdentity | None, metrics: Metrics, *, host_uuid: uuid.UUID, state_dir: Path
    ) -> None:
        self._tpm = tpm
        self._metrics = metrics
        self._host_uuid = host_uuid
        self._state_dir = state_dir
        self._nursery: trio.Nursery | None = None
        self._running: dict[str, HostRegistration] = {}
        self._scopes: list[trio.CancelScope] = []

    def make(self, tables: Mapping[str, RegistrarTable]) -> tuple[HostRegistration, ...]:
        """Registrations for a configuration; not started, and nothing is replaced yet.

        Raises:
            HostError: a certificate or key cannot be used.
            ConfigError: two registrars would have one id.
        """
        if not tables:
            return ()
        if self._tpm is None:
            raise ConfigError('registrars need quoter.kind = "tpm"')
        made = tuple(
            make_registration(
                name, table, self._tpm, host_uuid=self._host_uuid, state_dir=self._state_dir
            )
            for name, table in tables.items()
        )
        check_distinct({each.name: each.agent_id for each in made})
        return made

    def replace(self, fresh: Sequence[HostRegistration]) -> None:
        """Run these instead of the present ones."""
        for scope in self._scopes:
            scope.cancel()
        self._scopes = []
        old, self._running = self._running, {each.name: each for each in fresh}
        for name in old.keys() - self._running.keys():
            self._metrics.forget_registration(name, STATES)
        for name, each in self._running.items():
            before = old.get(name)
            if before is not None and before.table == each.table:
                each.status = before.status
            each.observe = partial(self._observe, name)
            self._observe(name, each.status.state)
            if self._nursery is not None:
                self._start(self._nursery, each)

    def start(self, nursery: trio.Nursery) -> None:
        """Start a task for each in `nursery`, and for those that come later."""
        self._nursery = nursery
        for each in self._running.values():
            self._start(nursery, each)

    def _start(self, nursery: trio.Nursery, registration: HostRegistration) -> None:
        if registration.table.insecure_plaintext:
            log.warning(
                "registrars.%s.insecure_plaintext: the registrar is not authenticated",
                registration.name,
            )
        scope = trio.CancelScope()
        self._scopes.append(scope)

        async def run() -> None:
            with scope:
                await registration.run()

        nursery.start_soon(run, name=f"registrar {registration.name}")

    def _observe(self, name: str, state: State) -> None:
        self._metrics.set_registration(name, state.value, STATES)

    def for_tenant(self, tenant: str) -> list[dict[str, object]]:
        """A tenant's own registrations, as it may see them."""
        return [
            for_tenant(each.name, each.agent_id, each.status)
            for each in self._running.values()
            if each.table.tenant == tenant
        ]

    def for_provider(self) -> list[dict[str, object]]:
        """All of them, with what went wrong."""
        return [
            for_provider(
                each.name,
                each.agent_id,
                each.status,
                url=each.table.url,
                tenant=each.table.tenant,
            )
            for each in self._running.values()
        ]
