"""The registry of vTPMs: in memory for look-ups, in SQLite so that it survives a restart.

A change is committed in one transaction and synced to the disk before it can be seen: a hook that got
an answer can rely on it, even if the process is killed then. Methods that change an entry block for a
disk write, and only one thread may call them at a time; `get` is one dict look-up and never waits. That
a VM runs is stored for the operator and to detect copies; the vTPM service decides what tenants see.

Invariants: an EK belongs to one VM; there are at most `max_vms` VMs.
"""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from provider_proxy.common.files import make_private_folder
from provider_proxy.errors import HostError, VtpmError
from provider_proxy.host.vtpm import entries
from provider_proxy.host.vtpm.entries import Ek, Entry
from provider_proxy.host.vtpm.requests import CertificateRequest
from provider_proxy.host.vtpm.sightings import Sighting

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE vms (
    vm TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, running INTEGER NOT NULL,
    making INTEGER NOT NULL, generation INTEGER NOT NULL, issuer TEXT NOT NULL,
    migrated INTEGER NOT NULL, registered_at INTEGER NOT NULL, changed_at INTEGER NOT NULL,
    run TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE eks (
    spki_sha256 TEXT PRIMARY KEY, alg TEXT NOT NULL,
    vm TEXT NOT NULL REFERENCES vms ON DELETE CASCADE,
    spire TEXT NOT NULL DEFAULT ''
) STRICT;
"""
# Version 1 accepted EKs at any time: they stay "claimed" until they are read back.
UPGRADES = {
    1: "ALTER TABLE vms ADD COLUMN run TEXT NOT NULL DEFAULT '';"
    "ALTER TABLE eks ADD COLUMN spire TEXT NOT NULL DEFAULT ''"
}
VM_COLUMNS = (
    *("vm", "name", "state", "running", "making", "generation", "issuer", "migrated"),
    *("registered_at", "changed_at", "run"),
)
PRUNE_AFTER_S = 3600  # libvirt makes a vTPM's directory some time before swtpm_setup runs


class CloneError(VtpmError):
    """Two VMs hold the same EK: the state file of one is a copy of the other's."""


class Registry:
    """All VMs with a vTPM that this host knows.

    Args:
        path: of the database; made where it is missing, readable by its owner only.
        max_vms: the limit of entries.
        now: seconds since the epoch.

    Raises:
        HostError: the file cannot be opened, or is not a registry.
    """

    def __init__(self, path: Path, *, max_vms: int, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._max_vms = max_vms
        self._now = now
        self._entries: dict[uuid.UUID, Entry] = {}
        self._holder: dict[str, uuid.UUID] = {}
        try:
            make_private_folder(path.parent)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            # Several threads use it, but only one at a time.
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as exc:
            raise HostError(f"cannot open the registry of vTPMs {path}: {exc}") from exc
        try:
            self._open()
        except (sqlite3.Error, ValueError) as exc:
            self._db.close()
            raise HostError(f"the registry of vTPMs {path} cannot be read: {exc}") from exc

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(
                f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        elif version in UPGRADES:
            self._db.executescript(
                f"BEGIN IMMEDIATE; {UPGRADES[version]}; PRAGMA user_version = {SCHEMA_VERSION};"
                " COMMIT;"
            )
        elif version != SCHEMA_VERSION:
            raise ValueError(
                f"its version is {version}, and this program supports {SCHEMA_VERSION}"
            )
        eks: dict[str, list[Ek]] = {}
        columns = "spki_sha256, alg, vm, spire"
        for digest, alg, vm, spire in self._db.execute(f"SELECT {columns} FROM eks"):  # noqa: S608  # constants
            eks.setdefault(vm, []).append(Ek(alg=alg, spki_sha256=digest, spire=spire))
        for row in self._db.execute(f"SELECT {', '.join(VM_COLUMNS)} FROM vms"):  # noqa: S608  # constants
            values = dict(zip(VM_COLUMNS, row, strict=True))
            for flag in ("running", "making", "migrated"):
                values[flag] = bool(values[flag])
            keys = tuple(sorted(eks.get(values["vm"], ()), key=lambda ek: ek.alg))
            values["vm"] = uuid.UUID(values["vm"])
            self._remember(Entry(**values, eks=keys))

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def get(self, vm: uuid.UUID) -> Entry | None:
        """The entry of a VM, as of now."""
        return self._entries.get(vm)

    def all(self) -> tuple[Entry, ...]:
        """Every entry, as of now."""
        return tuple(self._entries.copy().values())

    def register(self, request: CertificateRequest, *, issuer: str) -> Entry:
        """Add a new EK of a VM whose vTPM is being made.

        Does not check: that root has the vTPM made now; the vTPM service does.

        Raises:
            CloneError: the EK belongs to another VM.
            VtpmError: the registry is full, or the VM is running.
        """
        old, ek = self.get(request.vm), entries.ek_of(request.public_key)
        holder = self._holder.get(ek.spki_sha256)
        if holder not in (None, request.vm):
            raise CloneError("this EK is registered for another VM")
        if old is not None and old.running:
            raise VtpmError("this VM is running, so its vTPM exists already")
        name = request.vmid.rpartition(":")[0]
        return self._put(old, entries.registered(old, request.vm, name, ek, issuer=issuer))

    def saw(self, sighting: Sighting) -> Entry:
        """Apply what provider-proxy-vtpm sees of a VM; returns its entry.

        Raises:
            CloneError: another running VM has one of its EKs: this VM's EKs are forgotten.
            VtpmError: the registry is full.
        """
        vm, holds = sighting.vm, sighting.holds
        old = self.get(vm)
        if not sighting.runs:  # it arrives or leaves: the facts about its vTPM stay as they are
            waiting = old or Entry(vm=vm, name=sighting.name)
            return self._put(old, dataclasses.replace(waiting, running=False))
        new = entries.saw(old, vm, sighting.name, run=sighting.run, origin=sighting.origin)
        new = dataclasses.replace(new, running=True)
        if holds.reading == "unread":
            return self._put(old, new)
        if holds.reading != "read":
            return self._put(old, entries.lowered(new))
        holders = {self._holder.get(ek.spki_sha256) for ek in holds.eks} - {None, vm}
        others = [other for other in map(self.get, filter(None, holders)) if other is not None]
        if any(other.running for other in others):
            self._put(old, entries.without(new, new.eks))
            names = ", ".join(str(other.vm) for other in others)
            raise CloneError(f"its vTPM is a copy of the vTPM of {names}")
        changed = [(other, entries.without(other, holds.eks)) for other in others]
        entry = self._stamp(old, entries.read_back(new, holds.eks))
        if entry != old or changed:
            removed = self._make_room() if old is None else ()
            self._save([*(self._stamp(*pair) for pair in changed), entry], removed)
        return entry

    def stop(self, vms: Iterable[uuid.UUID]) -> list[Entry]:
        """Mark VMs as not running here; returns the entries that this changed."""
        olds = [entry for entry in map(self.get, vms) if entry is not None and entry.running]
        if not olds:
            return []
        news = [self._stamp(old, dataclasses.replace(old, running=False)) for old in olds]
        self._save(news)
        return news

    def prune(self, is_there: Callable[[uuid.UUID], bool]) -> list[Entry]:
        """Forget VMs that do not run and whose vTPM's directory is gone.

        Args:
            is_there: whether a VM's vTPM still has its directory.
        """
        before = self._now() - PRUNE_AFTER_S
        gone = [
            entry
            for entry in self.all()
            if not entry.running and entry.changed_at < before and not is_there(entry.vm)
        ]
        if gone:
            self._save([], removed=gone)
        return gone

    def _stamp(self, old: Entry | None, new: Entry) -> Entry:
        return entries.stamped(new, old, int(self._now()))

    def _put(self, old: Entry | None, new: Entry) -> Entry:
        entry = self._stamp(old, new)
        if entry is not old:
            self._save([entry], removed=self._make_room() if old is None else ())
        return entry

    def _make_room(self) -> list[Entry]:
        if len(self._entries) < self._max_vms:
            return []
        idle = [entry for entry in self.all() if not entry.running]
        if not idle:
            raise VtpmError(
                f"the registry is full: vtpm.max_vms = {self._max_vms}, and all these VMs run"
            )
        # Those being made go last, but they can go: any process of the swtpm user can register one.
        return [min(idle, key=lambda entry: (entry.making, entry.changed_at))]

    def _save(self, changed: Sequence[Entry], removed: Sequence[Entry] = ()) -> None:
        """Commit, then remember.

        Raises:
            HostError: the disk is full, for example; the registry is unchanged then.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for entry in (*removed, *changed):
                    self._db.execute("DELETE FROM vms WHERE vm = ?", (str(entry.vm),))
                for entry in changed:
                    self._insert(entry)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as exc:
            raise HostError(f"cannot write the registry of vTPMs {self._path}: {exc}") from exc
        for entry in removed:
            self._forget(entry.vm)
        for entry in changed:
            self._forget_keys(entry.vm)
        for entry in changed:
            self._remember(entry)

    def _insert(self, entry: Entry) -> None:
        values = [getattr(entry, column) for column in VM_COLUMNS]
        values[0] = str(entry.vm)
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT INTO vms ({', '.join(VM_COLUMNS)}) VALUES ({marks})", values)  # noqa: S608  # constants
        self._db.executemany(
            "INSERT INTO eks (spki_sha256, alg, vm, spire) VALUES (?, ?, ?, ?)",
            [(ek.spki_sha256, ek.alg, str(entry.vm), ek.spire) for ek in entry.eks],
        )

    def _remember(self, entry: Entry) -> None:
        self._entries[entry.vm] = entry
        for ek in entry.eks:
            self._holder[ek.spki_sha256] = entry.vm

    def _forget_keys(self, vm: uuid.UUID) -> None:
        old = self._entries.get(vm)
        for ek in old.eks if old is not None else ():
            self._holder.pop(ek.spki_sha256, None)

    def _forget(self, vm: uuid.UUID) -> None:
        self._forget_keys(vm)
        self._entries.pop(vm, None)
