"""The watcher's AKs from the tenant's registrars: their records, checked, cached and pinned.

`bindings` does the checking: the AK's attributes, the EK's chain to a vendor's CA, both keys against the
pin, on every call. Here each `[registrars.NAME]` gets one pooled client. A host that names a
registrar gets its AK from there; the AKs of all others are pinned by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import httpx

from provider_proxy.common.http import http_client
from provider_proxy.common.tls import TlsFiles, client_context
from provider_proxy.tenant.watch.questions import PinnedAks, Trust
from provider_proxy.tenant.watch.tables import HostRules, RegistrarTable, WatchConfig
from provider_proxy.trust.bindings import Binding, RegistrarBindings
from provider_proxy.trust.ek_judges import AskHost, EkJudge, UnsafeAnyEk
from provider_proxy.trust.ek_store import EkStore
from provider_proxy.trust.pins import PinStore

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0  # a registrar answers from its database; the host's own retries come after it


class Registrars:
    """The clients and bindings of all registrars; outlives a reload.

    Args:
        config: its `registrars` and `pins`.

    Raises:
        HostError: a TLS file or the directory of CAs cannot be read.
        UsageError: no CA in it.
    """

    def __init__(self, config: WatchConfig) -> None:
        self.pins = PinStore(config.pins)
        self._clients: list[httpx.AsyncClient] = []
        self.bindings: Mapping[str, RegistrarBindings] = {
            name: self._open(name, table) for name, table in config.registrars.items()
        }

    def _open(self, name: str, table: RegistrarTable) -> RegistrarBindings:
        eks: EkJudge = UnsafeAnyEk()
        if table.ek_ca:
            eks = EkStore(*table.ek_ca, insecure_virtual=table.insecure_virtual_ek)
        client = open_client(name=name, table=table)
        self._clients.append(client)
        assert table.url is not None
        return RegistrarBindings(client, table.url, pins=self.pins, eks=eks)

    async def aclose(self) -> None:
        """Close the clients."""
        for client in self._clients:
            await client.aclose()


def open_client(*, name: str, table: RegistrarTable) -> httpx.AsyncClient:
    """A client for one registrar. Raises: HostError where a TLS file is wrong."""
    context = client_context(registrar_files(name, table))
    return http_client(context, read_limit_s=TIMEOUT_S, tls_name=table.tls_name)


def registrar_files(name: str, table: RegistrarTable) -> TlsFiles:
    """The TLS files for a registrar, by the names of their keys."""
    names = (f"registrars.{name}.ca", f"registrars.{name}.cert", f"registrars.{name}.key")
    return TlsFiles(ca=table.ca, cert=table.cert, key=table.key, names=names)


class KnownAks:
    """An `AkSource`: a registrar for the hosts that name one, the pins for the others."""

    def __init__(self, registrars: Registrars) -> None:
        self._bindings = registrars.bindings
        self._pinned = PinnedAks(registrars.pins)
        self._bound: dict[str, tuple[Binding, Trust]] = {}

    async def trusted(self, name: str, rules: HostRules, ask_host: AskHost | None = None) -> Trust:
        """Raises: as `RegistrarBindings.get`, or `PinnedAks.trusted`."""
        if rules.registrar is None:
            return await self._pinned.trusted(name, rules, ask_host)
        assert rules.uuid is not None
        bindings = self._bindings[rules.registrar]
        binding = await bindings.get(rules.uuid, label=rules.pin or name, ask_host=ask_host)
        known = self._bound.get(name)
        if known is None or known[0] is not binding:
            verdict = binding.ek_verdict
            anchor = None if verdict is None else verdict.anchor.certificate.name
            if anchor is not None and (known is None or known[1].ek_anchor != anchor):
                assert verdict is not None
                log.info(
                    "%s: the maker of its TPM is %s, proven under %s", name, verdict.maker, anchor
                )
            trust = Trust(host=binding.host, newest=binding.pinned.newest(), ek_anchor=anchor)
            known = self._bound[name] = (binding, trust)
        return known[1]
