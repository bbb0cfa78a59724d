"""Which AK a tenant may trust for a host: the registrar's record, judged, cached and pinned.

A registrar only proves that whatever can open the EK also holds a key with the AK's name. It checks
neither the AK's attributes nor the EK's certificate, and strangers may replace its records. So here the
AK must have an AK's attributes, the EK's certificate must lead to a CA of the tenant's, and both keys
must be the pinned ones. The cache saves questions, never a check: EK and AK are compared on
every call, pin and chain are checked again every second, and no entry outlives its time to live.
Works under trio and asyncio; an object belongs to one event loop.
"""

from __future__ import annotations

import hmac
import logging
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import anyio
import anyio.to_thread
import httpx

from provider_proxy.errors import (
    BindingError,
    ConfigError,
    EvidenceFormatError,
    PinChangedError,
    ProviderProxyError,
    ReplyError,
)
from provider_proxy.evidence.model import TrustedHost
from provider_proxy.evidence.tpm_keys import (
    parse_ak,
    parse_public,
)
from provider_proxy.trust.cache import SingleFlightCache
from provider_proxy.trust.ek_chain import EndorsementKey, Verdict
from provider_proxy.trust.ek_judges import (
    AskHost,
    EkJudge,
    HostCertificates,
    check_ek,
    is_for_ek,
    vouch,
)
from provider_proxy.trust.expected_eks import demand_ek
from provider_proxy.trust.pins import PinnedHost, PinStore
from provider_proxy.trust.registrar import AgentRecord, AgentRecords

log = logging.getLogger(__name__)

TTL_VARIABLE = "KEYLIME_REGISTRAR_CACHE_TTL_SECS"
DEFAULT_TTL_S = 300.0
MAX_TTL_S = 86400.0  # a record that is older than a day is too old to trust
TTL_RE = re.compile(r"[0-9]{1,5}(\.[0-9]{1,3})?", re.ASCII)
NEGATIVE_TTL_S = 5.0  # a host that registers now is seen after that
UNREACHABLE_TTL_S = 1.0  # an unreachable registrar is asked once a second for each host
# After that a pin that a person changed takes effect, and so does an expired chain. Checking both on
# every call would cost 5 % of a verification.
LOOK_S = 1.0
MAX_ENTRIES = 10_000  # hosts; an entry is about 5 kB


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A host whose AK and EK passed every check of this module just now.

    Attributes:
        pinned: its pin; `host` and `history` are what `Verifier.verify` takes.
        ek_cert: DER, as the registrar has it; None only where the EK was vouched for otherwise.
        ek_verdict: the chain that vouches for the EK; None where it was vouched for otherwise.
        tls_cert: PEM of the certificate that the host's agent shows; None where it has none.
    """

    agent_id: str
    ek_public: bytes
    ek_cert: bytes | None
    ak_public: bytes
    pinned: PinnedHost
    ek_verdict: Verdict | None = None
    tls_cert: bytes | None = None

    @property
    def host(self) -> TrustedHost:
        """The trusted host."""
        return self.pinned.host

    @property
    def history(self) -> PinnedHost:
        """Its clock's history and open nonces."""
        return self.pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """A record whose keys have been read and whose attributes are good."""

    record: AgentRecord
    ek: EndorsementKey


@dataclass(slots=True)
class _Bound:
    """A binding, the record that it was made of, and when pin and chain were checked.

    Attributes:
        ek: the EK that was judged, from the record or from the host's own copy.
    """

    judged: _Judged
    ek: EndorsementKey
    binding: Binding
    looked_at_s: float


def ttl_from_environment(environment: Mapping[str, str]) -> float:
    """The time to live of cached records, in seconds: `KEYLIME_REGISTRAR_CACHE_TTL_SECS`.

    Raises:
        ConfigError: it is set to anything but 0 to 86400.
    """
    text = environment.get(TTL_VARIABLE)
    if text is None:
        return DEFAULT_TTL_S
    if not TTL_RE.fullmatch(text) or float(text) > MAX_TTL_S:
        raise ConfigError(f"{TTL_VARIABLE} must be seconds, 0 to {MAX_TTL_S:g}")
    return float(text)


class RegistrarBindings:
    """The bindings of one registrar.

    Args:
        http: a client with its pool, kept for as long as this object; the caller closes it.
        base_url: "https://registrar:8891".
        pins: where EK and AK are pinned at first trust.
        eks: vouches for EKs.
        ttl_s: how long a record is good; None for the environment's value, or 300 s.
        clock: monotonic seconds.

    Raises:
        UsageError, ConfigError: URL or time to live are wrong.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        base_url: str,
        *,
        pins: PinStore,
        eks: EkJudge,
        ttl_s: float | None = None,
        max_entries: int = MAX_ENTRIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if ttl_s is None:
            ttl_s = ttl_from_environment(os.environ)
        if not 0 <= ttl_s <= MAX_TTL_S or math.isnan(ttl_s):
            raise ConfigError(f"ttl_s must be 0 to {MAX_TTL_S:g}")
        self._registrar = AgentRecords(http, base_url)
        self._pins = pins
        self._eks = eks
        self._max_entries = max_entries
        self._clock = clock
        self._bound: OrderedDict[str, _Bound] = OrderedDict()
        self._records = SingleFlightCache(
            self._fetch,
            ttl_s=ttl_s,
            error_ttl_s=_error_ttl_s,
            max_entries=max_entries,
            clock=clock,
        )

    async def get(
        self, agent_id: str, *, label: str | None = None, ask_host: AskHost | None = None
    ) -> Binding:
        """The binding of a host, from the registrar or from the cache.

        Args:
            label: the name that the host is pinned under; None for its agent id.
            ask_host: asked only where the record's certificate alone leads to no CA: a registrar may
                have encoded it in its own way, and a chip's chain is not in the record.

        Raises:
            NotRegisteredError: the registrar has no active record.
            UntrustedAkError, UntrustedEkError: the record's AK is not one, or nothing vouches for the EK.
            PinChangedError: another EK or AK is pinned.
            BindingError: the record cannot be read.
            ReplyError: the registrar gave no answer, and nothing good is cached.
            HostError: a pin or the directory of CAs cannot be read.
            UsageError: not an agent id, or not a label.
        """
        await self._eks.freshen()
        binding = self._known(agent_id, label or agent_id)
        if binding is not None:
            return binding
        try:
            return await self._trust(agent_id, label or agent_id, ask_host)
        except PinChangedError:
            # The host may have been given a new key and been pinned again since the record was cached.
            if not self._may_ask_again(agent_id):
                raise
            return await self._trust(agent_id, label or agent_id, ask_host)

    async def check(
        self,
        agent_id: str,
        ek_cert: bytes | None,
        ak_public: bytes,
        *,
        ek_chain: tuple[bytes, ...] = (),
        label: str | None = None,
    ) -> Binding:
        """The binding of a host that shows this EK certificate and AK.

        Args:
            ek_cert: DER or near it, from the host, untrusted; None where it shows none.
            ak_public: TPM2B_PUBLIC, from the host, untrusted.
            ek_chain: CAs that the host shows, untrusted.

        Raises:
            BindingError: the registrar recorded another AK, or an EK of another key.
            ProviderProxyError: as `get`.
        """

        async def ask_host() -> HostCertificates:
            return HostCertificates(ek_cert=ek_cert, ek_chain=ek_chain)

        await self._eks.freshen()
        binding = self._known(agent_id, label or agent_id)
        if binding is None:
            binding = await self.get(agent_id, label=label, ask_host=ask_host)
        if _shows(binding, ek_cert, ak_public):
            return binding
        if self._may_ask_again(agent_id):
            binding = await self.get(agent_id, label=label, ask_host=ask_host)
            if _shows(binding, ek_cert, ak_public):
                return binding
        raise BindingError(f"{agent_id} shows another EK certificate or AK than it registered")

    async def record(
        self, agent_id: str, *, ask_host: AskHost | None = None
    ) -> tuple[AgentRecord, Verdict | None]:
        """The record of a host whose AK and EK have passed their checks; pins are not checked.

        Returns:
            The record, and the chain that vouches for its EK; None where no certificate does.

        Raises:
            ProviderProxyError: as `get`, but for `PinChangedError`.
        """
        judged = await self._records.get(agent_id)
        await self._eks.freshen()
        _, verdict = await vouch(self._eks, judged.ek, ask_host)
        return judged.record, verdict

    def _known(self, agent_id: str, label: str) -> Binding | None:
        """What was bound before, where record, CAs and pin are all unchanged."""
        known = self._bound.get(label)
        if known is None or known.judged is not self._records.peek(agent_id):
            return None
        binding = known.binding
        now_s = self._clock()
        if now_s - known.looked_at_s >= LOOK_S:
            if not binding.pinned.is_current():
                return None
            if not binding.pinned.ek_by_hand:
                self._eks.check(known.ek)
            known.looked_at_s = now_s
        self._bound.move_to_end(label)
        return binding

    async def _trust(self, agent_id: str, label: str, ask_host: AskHost | None) -> Binding:
        judged = await self._records.get(agent_id)
        record = judged.record
        looked_at_s = self._clock()
        pinned = self._known_pin(label)
        ek, verdict = judged.ek, None
        expected = self._pins.expected.of(label)
        if expected is not None:
            demand_ek(judged.ek.key, expected, label)
        elif pinned is None or not pinned.ek_by_hand:
            ek, verdict = await vouch(self._eks, judged.ek, ask_host)
        by_list = expected is not None and (pinned is None or not pinned.ek_by_hand)
        if pinned is None or pinned.ek_public is None or by_list:
            # Locks and writes a file. It refuses what is not pinned already.
            pinned = await anyio.to_thread.run_sync(
                lambda: self._pins.pin(
                    label,
                    record.ak_public,
                    ek_public=record.ek_public,
                    ek_by_hand=expected is not None,
                )
            )
        pinned.demand(record.ak_public, record.ek_public)
        binding = Binding(
            agent_id=agent_id,
            ek_public=record.ek_public,
            ek_cert=record.ek_cert,
            ak_public=record.ak_public,
            pinned=pinned,
            ek_verdict=verdict,
            tls_cert=record.tls_cert,
        )
        self._bound[label] = _Bound(judged, ek, binding, looked_at_s)
        self._bound.move_to_end(label)
        if len(self._bound) > self._max_entries:
            self._bound.popitem(last=False)
        return binding

    def _known_pin(self, label: str) -> PinnedHost | None:
        """The pin as its file has it now; None for a host that is not pinned."""
        known = self._bound.get(label)
        if known is not None and known.binding.pinned.is_current():
            return known.binding.pinned
        return self._pins.load(label) if self._pins.has(label) else None

    def _may_ask_again(self, agent_id: str) -> bool:
        """Forget a record that is not recent; a hostile host must not cause a question each time."""
        if self._records.age_s(agent_id) < NEGATIVE_TTL_S:
            return False
        self._records.forget(agent_id)
        return True

    async def _fetch(self, agent_id: str) -> _Judged:
        record = await self._registrar.fetch(agent_id)
        try:
            ek = parse_public(record.ek_public)
            parse_ak(record.ak_public)
        except EvidenceFormatError as exc:
            raise BindingError(f"a key of {agent_id}'s record cannot be read: {exc}") from exc
        check_ek(ek)
        key = EndorsementKey(record.ek_public, record.ek_cert, ek.public_key)
        return _Judged(record=record, ek=key)


def _shows(binding: Binding, ek_cert: bytes | None, ak_public: bytes) -> bool:
    same_ak = hmac.compare_digest(ak_public, binding.ak_public)
    by_hand = binding.pinned.ek_by_hand
    return same_ak and is_for_ek(ek_cert, binding.ek_cert, binding.ek_public, by_hand=by_hand)


def _error_ttl_s(error: ProviderProxyError) -> float:
    """A registrar's answer is kept longer than a missing answer."""
    return UNREACHABLE_TTL_S if isinstance(error, ReplyError) else NEGATIVE_TTL_S
