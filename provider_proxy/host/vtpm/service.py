"""The vTPM service: keeps the registry of vTPMs up to date from the EK hook and provider-proxy-vtpm.

    run ─┬─ hooks      a task for each connection of provider-proxy-ekhook
         ├─ follow     which VMs are here, and what their vTPMs hold, from provider-proxy-vtpm
         └─ prune      forgets VMs that are gone

A VM has claims while the follower says that it runs, and only if its entry is about this life of the
VM (the same QEMU process). The registry is written in a worker thread, one change at a time; tenants'
look-ups never wait for that.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from provider_proxy.common.log import Event
from provider_proxy.errors import HostError, ProviderProxyError, VtpmError
from provider_proxy.host.config.chip_tables import Vtpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.vtpm.claims import Claims, entry_values
from provider_proxy.host.vtpm.entries import Entry, ek_of
from provider_proxy.host.vtpm.follower import Follower
from provider_proxy.host.vtpm.hook_server import HookListener, HookServer
from provider_proxy.host.vtpm.registry import CloneError, Registry
from provider_proxy.host.vtpm.requests import MAX_CERTIFICATE_BYTES, CertificateRequest, Issuer
from provider_proxy.host.vtpm.sightings import Gone, Sighting, Window

log = logging.getLogger(__name__)

T = TypeVar("T")

PRUNE_S = 60.0
STATES = ("confirmed", "registered", "claimed", "stopped")


class VtpmService:
    """The daemon's part of the link. Open the hooks' socket, `start`, then `run` in a nursery.

    Args:
        uid: of the swtpm user.
        issuer: issues certificates; None where swtpm_localca does.

    Attributes:
        claims: the batcher's source of claims.
        server: serves the hooks.
        follower: follows what provider-proxy-vtpm sees.
        issuer: as passed.
    """

    def __init__(
        self,
        settings: Vtpm,
        registry: Registry,
        metrics: Metrics,
        *,
        uid: int,
        issuer: Issuer | None = None,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self.issuer = issuer
        self._one = trio.Lock()
        self.follower = Follower(settings.helper, self.take, max_vms=settings.max_vms)
        self.claims = Claims(self.running_entry)
        self.server = HookServer(
            self,
            uid=uid,
            observe=lambda op, outcome: metrics.vtpm_messages.labels(op, outcome).inc(),
        )
        for state in STATES:
            metrics.vtpm_vms.labels(state).set_function(partial(self._count, state))

    def _count(self, state: str) -> int:
        return sum(_state_of(entry) == state for entry in self._registry.all())

    def listed(self) -> list[dict[str, object]]:
        """Every VM, for the operator."""
        found = sorted(self._registry.all(), key=lambda entry: (entry.name, entry.vm))
        return [
            {**entry_values(entry), "running": self.running_entry(entry.vm) is not None}
            for entry in found
        ]

    def running_entry(self, vm: uuid.UUID) -> Entry | None:
        """The entry of a VM that runs here now; None for any other."""
        sighting = self.follower.current(vm)
        entry = self._registry.get(vm)
        if sighting is None or entry is None or not sighting.runs or entry.run != sighting.run:
            return None
        return entry

    async def start(self) -> None:
        """Mark all VMs as stopped until provider-proxy-vtpm says otherwise.

        Raises:
            HostError: the registry cannot be written.
        """
        await self._do(lambda: self._registry.stop(entry.vm for entry in self._registry.all()))

    async def run(self, hooks: Sequence[HookListener]) -> None:
        """Serve hooks, follow and prune, until cancelled."""
        async with trio.open_nursery() as nursery:
            for listener in hooks:
                nursery.start_soon(listener.serve, self.server.serve)
            nursery.start_soon(self.follower.run)
            nursery.start_soon(self._prune)

    # --- the EK hook --------------------------------------------------------------------------------

    async def certify(self, request: CertificateRequest) -> bytes | None:
        """Register an EK and, where this host issues, certify it; see `hook_server.Handler`."""
        _check_window(await self.follower.check(request.vm), request)
        issuer = self._settings.issuer
        entry = await self._do(lambda: self._registry.register(request, issuer=issuer))
        _log(
            logging.INFO,
            entry.vm,
            "registered",
            name=entry.name,
            kind=request.kind,
            generation=entry.generation,
        )
        if self.issuer is None:
            return None
        certificate = await self.issuer.issue(request)
        if len(certificate) > MAX_CERTIFICATE_BYTES:
            raise HostError(f"the certificate has more than {MAX_CERTIFICATE_BYTES} bytes")
        return certificate

    async def _do(self, change: Callable[[], T]) -> T:
        """Change the registry, one at a time. A change that has started is finished even if cancelled."""
        async with self._one:
            return await trio.to_thread.run_sync(change)

    # --- what provider-proxy-vtpm sees --------------------------------------------------------------

    async def take(self, word: Sighting | Gone) -> None:
        """Bring the registry up to date; claims already follow the new fact."""
        try:
            if isinstance(word, Sighting):
                await self._saw(word)
                return
            await self._do(lambda: self._registry.stop([word.vm]))
            _log(logging.INFO, word.vm, "is no longer here")
            for other in self.follower.sightings():  # a copy of its vTPM may count now
                entry = self._registry.get(other.vm)
                if other.runs and other.holds.eks and entry is not None and not entry.eks:
                    await self._saw(other)
        except (HostError, VtpmError) as exc:
            log.error("the registry of vTPMs: %s", exc)

    async def _saw(self, sighting: Sighting) -> None:
        old = self._registry.get(sighting.vm)
        try:
            now = await self._do(lambda: self._registry.saw(sighting))
        except CloneError as exc:
            self._metrics.vtpm_confirmations.labels("clone").inc()
            _log(logging.ERROR, sighting.vm, "has no link", why=exc)
            return
        if old is None or (old.run, old.running) != (now.run, now.running):
            what = "runs" if now.running else "waits"
            _log(logging.INFO, now.vm, what, name=now.name, origin=sighting.origin)
        if not sighting.runs or sighting.holds.reading == "unread":
            return
        self._report(old, now, sighting)

    def _report(self, old: Entry | None, now: Entry, sighting: Sighting) -> None:
        """Count and log the result of reading a vTPM back."""
        holds = sighting.holds
        if holds.reading != "read":
            self._metrics.vtpm_confirmations.labels(holds.reading).inc()
            level = logging.INFO if holds.reading == "encrypted" else logging.WARNING
            _log(level, now.vm, "not confirmed", state=now.state, why=holds.why)
        elif old is not None and old.eks and now.generation != old.generation and old.run:
            self._metrics.vtpm_confirmations.labels("corrected").inc()
            _log(
                logging.WARNING,
                now.vm,
                "corrected",
                why="its state holds another EK than was registered",
            )
        elif old is None or (old.state, old.run) != (now.state, now.run):
            self._metrics.vtpm_confirmations.labels("confirmed").inc()
            _log(logging.INFO, now.vm, "confirmed")

    # --- what is gone -------------------------------------------------------------------------------

    async def _prune(self) -> None:
        while True:
            await trio.sleep(PRUNE_S)
            try:
                gone = await self._do(lambda: self._registry.prune(self._is_there))
            except ProviderProxyError as exc:
                log.error("the registry of vTPMs: %s", exc)
                continue
            for entry in gone:
                _log(logging.INFO, entry.vm, "forgotten", why="its vTPM is gone")

    def _is_there(self, vm: uuid.UUID) -> bool:
        """Whether a VM's vTPM has its directory; True where that cannot be seen."""
        root = self._settings.state_root
        try:
            root.stat()
        except OSError:
            return True  # a root that is missing or cannot be read proves nothing
        try:
            (root / str(vm)).lstat()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True


def _check_window(window: Window, request: CertificateRequest) -> None:
    """Check that swtpm_setup makes this VM's vTPM now and has made this EK, as far as can be seen.

    Raises:
        VtpmError: it does not, or the state cannot be read although it is not encrypted.
    """
    if not window.open:
        raise VtpmError(
            "libvirt's hook has not reported that this VM's vTPM is being made now; is "
            "provider-proxy-vmhook in /etc/libvirt/hooks/qemu.d, and was libvirtd restarted since?"
        )
    if window.holds.reading == "encrypted":
        return
    if window.holds.reading != "read":
        raise VtpmError(f"the vTPM's state cannot be read: {window.holds.why}")
    if ek_of(request.public_key) not in window.holds.eks:
        raise VtpmError("the vTPM's state does not hold this EK")


def _state_of(entry: Entry) -> str:
    if not entry.running:
        return "stopped"
    return entry.state


def _log(level: int, vm: uuid.UUID, what: str, **more: object) -> None:
    log.log(level, Event("vtpm", {"vm": vm, "what": what, **more}))
