"""What the watcher remembers of its hosts over restarts: one file, saved as a whole at an interval.

Each accepted clock state counts in memory at once. They are written to disk together, at most once in a
save interval, so that thousands of hosts do not cause hundreds of fsyncs a second. A crash loses at most
the states of the last interval: after it, a rollback of a host to its state at the last save is not
noticed, but an older one is; the pin's own record is another lower bound. A damaged file is an error, not
a fresh start.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from provider_proxy.common.files import FileLock, is_there, read_file, write_private
from provider_proxy.errors import EvidenceFormatError, HostError, LogError
from provider_proxy.evidence.logs.ima import ReplayState
from provider_proxy.evidence.logs.ima_keys import key_of_spki
from provider_proxy.evidence.model import PCR_COUNT, AkName, ClockState
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.evidence.verify import MemoryHistory
from provider_proxy.evidence.wire import clock_values, parse_clock

FORMAT = "provider-proxy/watch-state/1"
FILE_NAME = "hosts.json"
LOCK_NAME = ".lock"
MAX_STATE_BYTES = 96 * 1024 * 1024  # 20,000 hosts with 24 PCRs of first use make 70 MB
MAX_DIGEST_BYTES = 64
MAX_ENTRY = 1 << 40
MAX_KEYS_CHARS = 1024 * 1024
MAX_PROBLEM_CHARS = 2000  # a name and a digest, as text
_HEAD = b'{"format":"' + FORMAT.encode("ascii") + b'","hosts":{'
_TAIL = b"}}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaRecord:
    """How far a host's IMA list is proven, and under which policy.

    Attributes:
        digest: of what the verdicts depend on; a replay continues only under the same.
        state: its keys are those that the host has measured, without the policy's.
    """

    digest: bytes
    state: ReplayState


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRecord:
    """One host's part of the file.

    Attributes:
        ak_name: the AK of the record; another AK's clock does not count.
        newest: None where nothing was accepted yet.
        first_use: PCR values that were trusted at first use; empty for none.
        ima: how far its IMA list is proven; None where it is not.
    """

    ak_name: AkName
    newest: ClockState | None
    first_use: Mapping[int, bytes]
    ima: ImaRecord | None = None


class WatchedHistory(MemoryHistory):
    """One host's history; reports when it has something to save."""

    def __init__(self, records: HostRecords, name: str, newest: ClockState | None) -> None:
        super().__init__(newest)
        self._records = records
        self._name = name

    def accept(self, state: ClockState) -> None:
        """Remember a state; it is saved with the next save."""
        newest = self.newest()
        if newest is None or state > newest:
            super().accept(state)
            self._records.touch(self._name)


class HostRecords:
    """What is known of the hosts, in memory: as it was read, and as it is now. It does not save.

    Attributes:
        is_dirty: something was accepted since the last `take_changed`.
    """

    def __init__(self) -> None:
        self._records: dict[str, HostRecord] = {}
        self._histories: dict[str, tuple[AkName, WatchedHistory]] = {}
        self._first_use: dict[str, tuple[AkName, Mapping[int, bytes]]] = {}
        self._ima: dict[str, tuple[AkName, ImaRecord | None]] = {}
        self._touched: set[str] = set()
        self.is_dirty = False

    def touch(self, name: str) -> None:
        """Note that a host's record has changed.

        A round that was under way when its host was forgotten may still end: another process has the
        host then, and nothing of it is saved here.
        """
        if name in self._histories:
            self._touched.add(name)
            self.is_dirty = True

    def put(self, name: str, record: HostRecord | None) -> None:
        """Begin with the saved record of a host; forget what was known of it before."""
        self.forget(name)
        if record is not None:
            self._records[name] = record

    def forget(self, name: str) -> None:
        """Another process has the host now; what was not saved yet is lost."""
        self._records.pop(name, None)
        self._histories.pop(name, None)
        self._first_use.pop(name, None)
        self._ima.pop(name, None)
        self._touched.discard(name)

    def history(self, name: str, ak_name: AkName, newest: ClockState | None) -> WatchedHistory:
        """The history of a host under one AK; the same object as long as the AK is the same.

        Args:
            newest: the pin's state; counts where it is newer than the saved one.
        """
        known = self._histories.get(name)
        if known is not None and known[0] == ak_name:
            if newest is not None:
                known[1].accept(newest)
            return known[1]
        record = self._records.get(name)
        if record is not None and record.ak_name == ak_name and record.newest is not None:
            newest = record.newest if newest is None else max(newest, record.newest)
        made = WatchedHistory(self, name, newest)
        self._histories[name] = (ak_name, made)
        return made

    def first_use(self, name: str, ak_name: AkName) -> Mapping[int, bytes] | None:
        """PCR values trusted at first use under this AK; None where there were none."""
        mine = self._first_use.get(name)
        if mine is not None and mine[0] == ak_name:
            return mine[1]
        record = self._records.get(name)
        if record is not None and record.ak_name == ak_name:
            return record.first_use or None
        return None

    def was_pinned_anew(self, name: str, ak_name: AkName) -> bool:
        """True where the saved record is about another AK."""
        record = self._records.get(name)
        return record is not None and record.ak_name != ak_name

    def trust_first_use(self, name: str, ak_name: AkName, values: Mapping[int, bytes]) -> None:
        """Remember PCR values permanently."""
        if self.first_use(name, ak_name) != values:
            self._first_use[name] = (ak_name, dict(values))
            self.touch(name)

    def ima(self, name: str, ak_name: AkName) -> ImaRecord | None:
        """How far the IMA list of a host under one AK is proven; None where it is not."""
        mine = self._ima.get(name)
        if mine is not None:
            return mine[1] if mine[0] == ak_name else None
        record = self._records.get(name)
        return record.ima if record is not None and record.ak_name == ak_name else None

    def remember_ima(self, name: str, ak_name: AkName, record: ImaRecord | None) -> None:
        """Remember how far it is proven; None where it must be replayed from its beginning."""
        if self.ima(name, ak_name) != record:
            self._ima[name] = (ak_name, record)
            self.touch(name)

    def take_changed(self) -> Mapping[str, HostRecord]:
        """The records that changed since the last call; later changes are dirty again."""
        self.is_dirty = False
        changed = {}
        for name in self._touched:
            ak_name, history = self._histories[name]
            changed[name] = self._records[name] = HostRecord(
                ak_name=ak_name,
                newest=history.newest(),
                first_use=self.first_use(name, ak_name) or {},
                ima=self.ima(name, ak_name),
            )
        self._touched.clear()
        return changed


class StateStore(HostRecords):
    """The file of a state directory, and the lock that keeps a second watcher out of it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._path = directory / FILE_NAME
        self._lock = FileLock(directory / LOCK_NAME)
        self._parts: dict[str, bytes] = {}  # of the file, a host each

    def open(self) -> None:
        """Lock the directory and read the file.

        Raises:
            HostError: another watcher uses it, or the file is damaged or unreadable.
        """
        if not self._lock.take():
            raise HostError(f"{self._directory}: another watcher uses this state_dir")
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        if is_there(self._path):
            self._records = parse_state(read_file(self._path, MAX_STATE_BYTES), self._path)
            self._parts = {name: encode_record(name, r) for name, r in self._records.items()}

    def close(self) -> None:
        """Unlock the directory. Does not save."""
        self._lock.release()

    def snapshot(self) -> bytes:
        """The file as it should be now; later changes are dirty again.

        Only changes are encoded: encoding a thousand hosts at once would delay those that are due.
        Hosts that are no longer watched stay in it, so that one that comes back keeps its history.
        """
        for name, record in self.take_changed().items():
            self._parts[name] = encode_record(name, record)
        return _HEAD + b",".join(self._parts.values()) + _TAIL

    def write(self, data: bytes) -> None:
        """Write a snapshot to disk; may run in a worker thread.

        Raises:
            HostError: it cannot be written.
        """
        write_private(self._path, data)


def encode_record(name: str, record: HostRecord) -> bytes:
    """A host's part of the file."""
    return json.dumps({name: record_values(record)}, separators=(",", ":")).encode("ascii")[1:-1]


def record_values(record: HostRecord) -> dict[str, object]:
    """A record as JSON has it."""
    values: dict[str, object] = {"ak_name": record.ak_name.hex()}
    if record.newest is not None:
        values["newest"] = clock_values(record.newest)
    if record.first_use:
        values["first_use"] = {str(pcr): v.hex() for pcr, v in record.first_use.items()}
    if record.ima is not None:
        values |= _ima_values(record.ima)
    return values


def parse_state(data: bytes, path: Path) -> dict[str, HostRecord]:
    """Read the file.

    Raises:
        HostError: anything else; the message names the file.
    """
    try:
        values = parse_json_object(data, "state")
        if Fields(values, "state").text("format", 64) != FORMAT:
            raise EvidenceFormatError("its format is not known")
        hosts = values.get("hosts")
        if not isinstance(hosts, dict):
            raise EvidenceFormatError("it has no hosts")
        return {name: parse_record(name, record) for name, record in hosts.items()}
    except EvidenceFormatError as exc:
        raise HostError(
            f"{path} is damaged ({exc}); without it no host's history is known: restore it, or "
            "remove it if you know why it is damaged"
        ) from exc


def parse_record(name: str, record: object) -> HostRecord:
    """A record from JSON. Raises: EvidenceFormatError."""
    if not isinstance(record, dict):
        raise EvidenceFormatError(f"{name} is not an object")
    fields = Fields(record, name)
    first_use: dict[int, bytes] = {}
    if "first_use" in fields:
        pcrs = fields.fields("first_use")
        first_use = {
            pcr: pcrs.hex(str(pcr), MAX_DIGEST_BYTES)
            for pcr in range(PCR_COUNT)
            if str(pcr) in pcrs
        }
    return HostRecord(
        ak_name=AkName(fields.hex("ak_name", 66)),
        newest=parse_clock(fields.fields("newest")) if "newest" in fields else None,
        first_use=first_use,
        ima=_parse_ima(fields) if "ima_entry" in fields else None,
    )


def _ima_values(record: ImaRecord) -> dict[str, object]:
    """Flat, and its keys as one string, which keeps a file of many hosts small."""
    state = record.state
    values: dict[str, object] = {
        "ima_policy": record.digest.hex(),
        "ima_entry": state.next_entry,
        "ima_value": state.value.hex(),
        "ima_violations": state.violations,
        "ima_others": state.others,
    }
    if state.keys:
        values["ima_keys"] = " ".join(
            f"{key.id:x}:{base64.b64encode(key.spki).decode('ascii')}"
            for key in sorted(state.keys, key=lambda key: (key.id, key.spki))
        )
    if state.problem is not None:
        values["ima_problem"] = state.problem
    if state.is_open:
        values["ima_open"] = 1
    return values


def _parse_ima(fields: Fields) -> ImaRecord:
    keys = []
    for text in fields.text("ima_keys", MAX_KEYS_CHARS).split() if "ima_keys" in fields else ():
        key_id, _, spki = text.partition(":")
        try:
            keys.append(key_of_spki(base64.b64decode(spki, validate=True), int(key_id, 16)))
        except (ValueError, LogError) as exc:
            raise EvidenceFormatError(f"ima_keys: {exc}") from exc
    return ImaRecord(
        digest=fields.hex("ima_policy", MAX_DIGEST_BYTES),
        state=ReplayState(
            next_entry=fields.integer("ima_entry", MAX_ENTRY),
            value=fields.hex("ima_value", MAX_DIGEST_BYTES),
            keys=frozenset(keys),
            violations=fields.integer("ima_violations", MAX_ENTRY),
            others=fields.integer("ima_others", MAX_ENTRY),
            problem=fields.text("ima_problem", MAX_PROBLEM_CHARS)
            if "ima_problem" in fields
            else None,
            is_open="ima_open" in fields,
        ),
    )
