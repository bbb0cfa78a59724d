"""Keeps the registry of vTPMs true: takes the hooks' words, reads EKs back, sees what stopped.

    run ─┬─ hooks      a task a connection of a hook
         ├─ confirm    reads running vTPMs back, one at a time, some times each
         └─ watch      marks VMs whose swtpm has ended, and forgets those that are gone

The registry's writes happen in a worker thread, one at a time; tenants' look-ups never wait for them.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from provider_proxy.common.log import Event
from provider_proxy.errors import HostError, ProviderProxyError, VtpmError
from provider_proxy.host.config.tables import Vtpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.vtpm import readback
from provider_proxy.host.vtpm.claims import Claims, entry_values
from provider_proxy.host.vtpm.entries import CONFIRMED, STARTS, Ek, Entry
from provider_proxy.host.vtpm.hook_server import HookDoor, HookListener
from provider_proxy.host.vtpm.messages import VmEvent
from provider_proxy.host.vtpm.registry import CloneError, Registry, RunningError
from provider_proxy.host.vtpm.requests import MAX_CERTIFICATE_BYTES, CertificateRequest, Issuer
from provider_proxy.host.vtpm.running import running_vms

log = logging.getLogger(__name__)

T = TypeVar("T")

WATCH_S = 10.0  # how long a VM whose end nobody told may count as running
# After its start a vTPM is read at once. One that comes in from another host has its EK only once the
# migration is over, of which libvirt says nothing: it is read at the last interval until it has one.
CONFIRM_AFTER_S = (0.0, 2.0, 10.0, 60.0, 300.0)


class ReadEks(Protocol):
    """Reads a vTPM's EKs: `readback.read_eks`."""

    async def __call__(
        self, state_root: Path, vm: uuid.UUID, *, uid: int, work: Path, limit_s: float
    ) -> tuple[Ek, ...]:
        """The EKs. Raises: VtpmError, HostError."""
        ...


class Keeper:
    """The daemon's part of the link. Open the hooks' socket, `start`, then `run` in a nursery.

    Args:
        uid: of the swtpm user.
        work: a directory for copies of state files, best in memory.
        issuer: makes certificates; None where swtpm_localca does.
        read_eks: reads a vTPM back.

    Attributes:
        claims: what the batcher asks.
        door: what serves the hooks.
        issuer: as it was given.
    """

    def __init__(
        self,
        settings: Vtpm,
        registry: Registry,
        metrics: Metrics,
        *,
        uid: int,
        work: Path,
        issuer: Issuer | None = None,
        read_eks: ReadEks = readback.read_eks,
        event_uid: int = 0,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self._uid = uid
        self._work = work
        self.issuer = issuer
        self._read_eks = read_eks
        self._one = trio.Lock()
        self._due: dict[uuid.UUID, tuple[float, int]] = {}
        self._wake = trio.Event()
        self.claims = Claims(registry.get)
        self.door = HookDoor(
            self,
            uid=uid,
            event_uid=event_uid,
            observe=lambda op, outcome: metrics.vtpm_messages.labels(op, outcome).inc(),
        )
        for state in ("confirmed", "claimed", "stopped"):
            metrics.vtpm_vms.labels(state).set_function(partial(self._count, state))

    def _count(self, state: str) -> int:
        return sum(_state_of(entry) == state for entry in self._registry.all())

    def listed(self) -> list[dict[str, object]]:
        """Every VM, for the operator."""
        found = sorted(self._registry.all(), key=lambda entry: (entry.name, entry.vm))
        return [entry_values(entry) for entry in found]

    async def start(self) -> None:
        """Hold the registry against what runs.

        Raises:
            HostError: it cannot be seen, or the registry cannot be written.
        """
        await trio.to_thread.run_sync(readback.remove_copies, self._work)
        running = await trio.to_thread.run_sync(self._running)
        changed = await self._do(lambda: self._registry.reconcile(running))
        for entry in changed:
            _log(logging.INFO, entry.vm, "runs" if entry.running else "does not run")
        for entry in self._registry.all():
            if entry.running:
                self._schedule(entry.vm)

    async def run(self, hooks: Sequence[HookListener]) -> None:
        """Serve hooks, confirm and watch, until cancelled."""
        async with trio.open_nursery() as nursery:
            for listener in hooks:
                nursery.start_soon(listener.serve, self.door.serve)
            nursery.start_soon(self._watch)
            if self._settings.confirm:
                nursery.start_soon(self._confirm_all)

    # --- the hooks' words ---------------------------------------------------------------------------

    async def certify(self, request: CertificateRequest) -> bytes | None:
        """Register an EK and, where this host issues, certify it; see `door.Handler`."""
        try:
            entry = await self._register(request)
        except RunningError:
            # Its stop was not told, for the hook has a second at most: does it run?
            await self._stop_ended(only=request.vm)
            entry = await self._register(request)
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
            raise HostError(f"the certificate is longer than {MAX_CERTIFICATE_BYTES} bytes")
        return certificate

    async def _register(self, request: CertificateRequest) -> Entry:
        issuer = self._settings.issuer
        return await self._do(lambda: self._registry.register(request, issuer=issuer))

    async def happened(self, event: VmEvent) -> None:
        """Take libvirt's word; see `door.Handler`."""
        await self._do(lambda: self._registry.happened(event.vm, event.name, event.event))
        _log(logging.INFO, event.vm, event.event, name=event.name)
        if event.event in STARTS:
            self._schedule(event.vm)
        else:
            self._due.pop(event.vm, None)

    async def _do(self, change: Callable[[], T]) -> T:
        """Change the registry, alone. A change that has begun is finished, whoever is cancelled."""
        async with self._one:
            return await trio.to_thread.run_sync(change)

    # --- reading back -------------------------------------------------------------------------------

    def _schedule(self, vm: uuid.UUID, attempt: int = 0) -> None:
        delay_s = CONFIRM_AFTER_S[min(attempt, len(CONFIRM_AFTER_S) - 1)]
        self._due[vm] = (trio.current_time() + delay_s, attempt)
        self._wake.set()

    async def _confirm_all(self) -> None:
        while True:
            if not self._due:
                self._wake = trio.Event()
                await self._wake.wait()
            vm = min(self._due, key=lambda vm: self._due[vm][0])
            when, attempt = self._due[vm]
            if when > trio.current_time():
                self._wake = trio.Event()
                with trio.move_on_at(when):
                    await self._wake.wait()
                continue
            del self._due[vm]
            entry = self._registry.get(vm)
            if entry is None or not entry.running:
                continue
            outcome = await self._confirm(entry)
            self._metrics.vtpm_confirmations.labels(outcome).inc()
            goes_on = attempt + 1 < len(CONFIRM_AFTER_S) or not entry.eks
            if outcome == "failed" and goes_on and vm not in self._due:
                self._schedule(vm, attempt + 1)

    async def _confirm(self, entry: Entry) -> str:
        """Read one vTPM back; what came of it."""
        settings = self._settings
        try:
            eks = await self._read_eks(
                settings.state_root,
                entry.vm,
                uid=self._uid,
                work=self._work,
                limit_s=settings.confirm_limit_s,
            )
            now = await self._do(lambda: self._registry.read_back(entry, eks))
        except readback.EncryptedError as exc:
            _log(logging.INFO, entry.vm, "stays claimed", why=exc)
            return "encrypted"
        except CloneError as exc:
            _log(logging.ERROR, entry.vm, "has no link", why=exc)
            return "clone"
        except (VtpmError, HostError) as exc:
            _log(logging.WARNING, entry.vm, "not confirmed", why=exc)
            return "failed"
        if now is None:
            return "outdated"
        if entry.eks and now.generation != entry.generation:
            _log(logging.WARNING, entry.vm, "corrected", why="another EK was registered")
            return "corrected"
        _log(logging.INFO, entry.vm, "confirmed")
        return "confirmed"

    # --- what runs ----------------------------------------------------------------------------------

    def _running(self) -> frozenset[uuid.UUID]:
        settings = self._settings
        return running_vms(settings.run_root, settings.state_root, self._uid)

    async def _watch(self) -> None:
        while True:
            await trio.sleep(WATCH_S)
            try:
                await self._stop_ended()
                gone = await self._do(lambda: self._registry.prune(self._is_there))
            except ProviderProxyError as exc:
                log.error("the registry of vTPMs: %s", exc)
                continue
            for entry in gone:
                _log(logging.INFO, entry.vm, "forgotten", why="its vTPM is gone")

    async def _stop_ended(self, only: uuid.UUID | None = None) -> None:
        """Mark VMs that count as running and whose swtpm has ended. Never the other way round: a
        process can call itself anything, and libvirt's word is root's."""
        seen: Iterable[Entry] = [
            entry for entry in self._registry.all() if entry.running and only in (None, entry.vm)
        ]
        if not seen:
            return
        running = await trio.to_thread.run_sync(self._running)
        ended = [entry for entry in seen if entry.vm not in running]
        for entry in await self._do(lambda: self._registry.stop(ended)) if ended else ():
            _log(logging.WARNING, entry.vm, "does not run", why="its swtpm has ended untold")

    def _is_there(self, vm: uuid.UUID) -> bool:
        """Whether a VM's vTPM has its folder; True where that cannot be seen."""
        try:
            (self._settings.state_root / str(vm)).lstat()
        except FileNotFoundError:
            return not self._settings.state_root.is_dir()  # an unmounted one says nothing
        except OSError:
            return True
        return True


def _state_of(entry: Entry) -> str:
    if not entry.running:
        return "stopped"
    return "confirmed" if entry.state == CONFIRMED else "claimed"


def _log(level: int, vm: uuid.UUID, what: str, **more: object) -> None:
    log.log(level, Event("vtpm", {"vm": vm, "what": what, **more}))
