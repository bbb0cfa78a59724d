"""The helper's knowledge: which VMs are here, and what each vTPM holds, read while it runs and on each
change.

    run ─┬─ look    libvirt's status files: at each change in their folder, at a QEMU's end, each second
         └─ read    running vTPMs, one at a time: at once, again when the state has been written,
                    and again with growing pauses where it could not be read

Followers are woken at every change; `seen` is always complete. Registers and signs nothing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from provider_proxy.common.log import Event
from provider_proxy.errors import HostError, VtpmError
from provider_proxy.host.vtpm.entries import Ek
from provider_proxy.host.vtpm.helper.presence import Present
from provider_proxy.host.vtpm.helper.readback import EncryptedError, Stamp
from provider_proxy.host.vtpm.helper.status import StatePlace
from provider_proxy.host.vtpm.helper.window import Mark
from provider_proxy.host.vtpm.sightings import Holds, Sighting, Window

log = logging.getLogger(__name__)

LOOK_S = 1.0  # where no change was notified
GAP_S = 0.03  # least time from one look to the next, however often the folder is touched
REREAD_S = 10.0  # a guest can have its vTPM written as often as it likes
RETRY_S = (0.5, 2.0, 10.0, 60.0, 300.0)  # the last one is repeated
HOST_TROUBLE_RETRIES = 3  # for this many failures the earlier reading still counts


class Looks(Protocol):
    """`presence.Presence`."""

    folder: int

    def look(self) -> dict[uuid.UUID, Present]:
        """Every domain that is here. Raises: HostError."""
        ...

    def ends_fd(self) -> int:
        """Readable once one has ended."""
        ...


class Reads(Protocol):
    """`readback.StateSource`."""

    def stamp(self, vm: uuid.UUID, place: StatePlace) -> Stamp | None:
        """Changes when the state is written."""
        ...

    async def read_eks(
        self, vm: uuid.UUID, place: StatePlace, secret: uuid.UUID | None = None
    ) -> tuple[Ek, ...]:
        """The EKs. Raises: VtpmError, HostError."""
        ...


@dataclass(slots=True)
class _Reading:
    """When a vTPM is to be read next, and how that went before."""

    run: str
    due_s: float
    stamp: Stamp | None = None  # of the state as it was read last
    failures: int = 0


class Eyes:
    """Looks at VMs and reads vTPMs; see the module's docstring.

    Args:
        find_mark: gives the mark that root's hook has written for a VM.
        on_look: called after each look, for the service manager's watchdog.
    """

    def __init__(
        self,
        presence: Looks,
        source: Reads,
        find_mark: Callable[[uuid.UUID], Mark | None],
        *,
        on_look: Callable[[], None] = lambda: None,
    ) -> None:
        self._presence = presence
        self._source = source
        self._find_mark = find_mark
        self._on_look = on_look
        self._present: dict[uuid.UUID, Present] = {}
        self._readings: dict[uuid.UUID, _Reading] = {}
        self._one = trio.Lock()  # one swtpm at a time
        self._changed = trio.Event()
        self._wake_reader = trio.Event()
        self.seen: dict[uuid.UUID, Sighting] = {}

    async def changed(self) -> None:
        """Return at the next change of `seen`."""
        await self._changed.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look and read, until cancelled.

        Raises:
            HostError: this process can no longer look.
        """
        # Otherwise a last SIGIO, which trio re-raises at the end, would kill the process.
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        with (
            trio.open_signal_receiver(signal.SIGIO) as changes,
            _told_of_changes(self._presence.folder),
        ):
            self.look()
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_all)
                while True:
                    with trio.move_on_after(LOOK_S):
                        async with trio.open_nursery() as waiting:
                            waiting.start_soon(_first, changes, waiting.cancel_scope)
                            await trio.lowlevel.wait_readable(self._presence.ends_fd())
                            waiting.cancel_scope.cancel()
                    await trio.sleep(GAP_S)
                    self.look()

    # --- looking ------------------------------------------------------------------------------------

    def look(self) -> None:
        """Update the VMs that are here now. Raises: HostError."""
        self._present = self._presence.look()
        now = trio.current_time()
        seen: dict[uuid.UUID, Sighting] = {}
        for vm, present in self._present.items():
            before = self.seen.get(vm)
            is_same = before is not None and before.run == present.run
            holds = before.holds if before is not None and is_same else Holds()
            seen[vm] = _sighting(present, holds)
            self._plan(present, now)
        self._readings = {vm: plan for vm, plan in self._readings.items() if vm in seen}
        self._publish(seen)
        self._on_look()

    def _plan(self, present: Present, now: float) -> None:
        vm = present.domain.vm
        plan = self._readings.get(vm)
        if not present.domain.runs:
            if plan is not None and plan.run != present.run:
                del self._readings[vm]
            return
        if plan is None or plan.run != present.run:
            self._readings[vm] = _Reading(present.run, due_s=now)
            self._wake_reader.set()
        elif plan.failures == 0 and plan.due_s <= now:
            if self._source.stamp(vm, present.domain.place) != plan.stamp:
                self._wake_reader.set()
            else:
                plan.due_s = now  # not readable: the next look tries again

    def _publish(self, seen: dict[uuid.UUID, Sighting]) -> None:
        if seen != self.seen:
            for vm, sighting in seen.items():
                before = self.seen.get(vm)
                if before is None or (before.run, before.runs) != (sighting.run, sighting.runs):
                    _log(vm, "runs" if sighting.runs else "waits", origin=sighting.origin)
            for vm in self.seen.keys() - seen.keys():
                _log(vm, "is no longer here")
            self.seen = seen
            self._changed.set()
            self._changed = trio.Event()

    # --- reading ------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        while True:
            now = trio.current_time()
            vm = self._next(now)
            if vm is not None:
                await self._read(self._present[vm])
                continue
            later = [plan.due_s for plan in self._readings.values() if plan.failures]
            self._wake_reader = trio.Event()
            with trio.move_on_at(min(later, default=float("inf"))):
                await self._wake_reader.wait()

    def _next(self, now: float) -> uuid.UUID | None:
        """The next VM to read: those never read come first."""
        due = [
            (plan.stamp is not None, plan.due_s, vm)
            for vm, plan in self._readings.items()
            if plan.due_s <= now
            and self._present[vm].domain.runs
            and (
                plan.failures
                or plan.stamp is None
                or self._source.stamp(vm, self._present[vm].domain.place) != plan.stamp
            )
        ]
        return min(due, default=(False, 0.0, None))[2]

    async def _read(self, present: Present) -> None:
        vm, plan = present.domain.vm, self._readings[present.domain.vm]
        # Taken before the copy, so that a write meanwhile causes another reading.
        stamp = self._source.stamp(vm, present.domain.place)
        try:
            holds = await self.holds(vm, present.domain.place, present.domain.secret)
        except HostError as exc:
            holds = Holds(reading="failed", why=str(exc))
            if plan.failures < HOST_TROUBLE_RETRIES and vm in self.seen:
                holds = self.seen[vm].holds  # the failure says nothing about the vTPM
            log.warning("vTPM of %s: %s", vm, exc)
            plan.failures += 1
        else:
            # Encrypted with one of libvirt's secrets: libvirt may give it later.
            is_open = holds.reading == "failed" or (
                holds.reading == "encrypted" and present.domain.secret is not None
            )
            plan.failures = plan.failures + 1 if is_open else 0
        plan.stamp = stamp
        delay_s = RETRY_S[min(plan.failures, len(RETRY_S)) - 1] if plan.failures else REREAD_S
        plan.due_s = trio.current_time() + delay_s
        now = self.seen.get(vm)
        if now is not None and now.run == present.run and now.runs:
            if now.holds != holds:
                _log(vm, "was read", found=holds.reading, eks=len(holds.eks), why=holds.why)
            self._publish({**self.seen, vm: dataclasses.replace(now, holds=holds)})

    async def holds(self, vm: uuid.UUID, place: StatePlace, secret: uuid.UUID | None) -> Holds:
        """Read one vTPM's state. Raises: HostError."""
        try:
            async with self._one:
                eks = await self._source.read_eks(vm, place, secret)
        except EncryptedError as exc:
            return Holds(reading="encrypted", why=str(exc))
        except VtpmError as exc:
            return Holds(reading="failed", why=str(exc))
        return Holds(reading="read", eks=tuple(sorted(eks, key=lambda ek: ek.alg)))

    async def check(self, vm: uuid.UUID) -> Window:
        """Whether a VM's vTPM is being made now, and what it holds.

        Raises:
            HostError: this process cannot look.
        """
        self.look()
        mark = self._find_mark(vm)
        if mark is None or vm in self.seen:
            return Window(open=False, holds=Holds())
        holds = await self.holds(vm, mark.place, mark.secret)
        return Window(open=self._find_mark(vm) is not None, holds=holds)


def _sighting(present: Present, holds: Holds) -> Sighting:
    domain = present.domain
    return Sighting(
        vm=domain.vm,
        name=domain.name,
        run=present.run,
        runs=domain.runs,
        origin=present.origin,
        holds=holds,
    )


@contextmanager
def _told_of_changes(folder: int) -> Iterator[None]:
    """SIGIO at each change in a folder: F_NOTIFY of fcntl(2). Without it there is a look each second."""
    kinds = fcntl.DN_CREATE | fcntl.DN_DELETE | fcntl.DN_RENAME | fcntl.DN_MODIFY
    # A descriptor of its own: os.listdir closes a copy of the other, which ends the notification.
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        fcntl.fcntl(fd, fcntl.F_NOTIFY, kinds | fcntl.DN_MULTISHOT)
    except OSError as exc:
        log.warning("the kernel does not report changes: %s; looking each second", exc.strerror)
    try:
        yield
    finally:
        os.close(fd)


async def _first(changes: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in changes:
        break
    scope.cancel()


def _log(vm: uuid.UUID, what: str, **more: object) -> None:
    log.info("%s", Event("vtpm", {"vm": vm, "what": what, **more}))
