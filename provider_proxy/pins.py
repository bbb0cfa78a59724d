"""Pinned hosts: which AK a tenant trusts for a host, and how far that host's TPM clock has come.

A registrar lets strangers replace its records and a cache runs out; a pin does neither. The AK's name
is pinned at first trust, a change is refused until a person pins anew, and the newest clock state that
was ever accepted outlives the process, so that a host rolled back to an old snapshot of its TPM is
noticed. One JSON file a host, written atomically; several processes may share the directory.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from provider_proxy.attestation_key import parse_ak
from provider_proxy.errors import EvidenceFormatError, HostError, PinChangedError, UsageError
from provider_proxy.files import read_file, write_private
from provider_proxy.model import ClockState, TrustedHost
from provider_proxy.verify import MemoryHistory
from provider_proxy.wire import Fields, clock_values, parse_clock, parse_json_object

FORMAT = "provider-proxy/pin/1"
MAX_PIN_BYTES = 16 * 1024
LABEL_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", re.ASCII)  # a safe file name


class PinnedHost(MemoryHistory):
    """A pinned host: `host` to verify against, and its history, kept on disk.

    Open nonces live in memory alone: after a restart their answers are refused.
    """

    def __init__(self, path: Path, host: TrustedHost, ak_public: bytes, newest: ClockState | None):
        super().__init__(newest)
        self.host = host
        self._path = path
        self._ak_public = ak_public

    def newest(self) -> ClockState | None:
        """The newest state that any process accepted.

        Raises:
            PinChangedError: another AK has been pinned since this object was loaded.
            HostError: the pin has gone, or is damaged.
        """
        on_disk = self._on_disk()
        mine = super().newest()
        if on_disk is None or (mine is not None and mine > on_disk):
            return mine
        return on_disk

    def _on_disk(self) -> ClockState | None:
        ak_public, newest = _parse(read_file(self._path, MAX_PIN_BYTES), self._path)
        if ak_public != self._ak_public:
            raise PinChangedError(f"{self.host.label} was pinned anew, to another AK")
        return newest

    def accept(self, state: ClockState) -> None:
        """Remember a state; on disk where it is the newest of all processes.

        Raises:
            PinChangedError: another AK has been pinned since; that person's word stands.
            HostError: the pin cannot be read or written.
        """
        with _locked(self._path.parent):
            on_disk = self._on_disk()
            if on_disk is None or state > on_disk:
                write_private(self._path, _encode(self._ak_public, state))
        super().accept(state)


class PinStore:
    """A directory of pins.

    Args:
        directory: made where it is missing, for its owner alone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, label: str) -> Path:
        if not LABEL_RE.fullmatch(label):
            raise UsageError("a host's label is letters, digits, '.', '_' and '-', 101 at most")
        return self._directory / f"{label}.json"

    def labels(self) -> list[str]:
        """The pinned hosts, in order of their names."""
        return sorted(path.stem for path in self._directory.glob("*.json"))

    def pin(self, label: str, ak_public: bytes, *, anew: bool = False) -> PinnedHost:
        """Trust an AK for a host from now on.

        Args:
            ak_public: TPM2B_PUBLIC; its attributes are checked.
            anew: a person said that the change is meant; the clock's history begins afresh.

        Raises:
            PinChangedError: another AK is pinned, and `anew` was not said.
            UntrustedAkError, EvidenceFormatError: not an AK.
            UsageError: a label that is no name.
        """
        path = self._path(label)
        key = parse_ak(ak_public)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self._directory):
            if path.exists() and not anew:
                pinned = self.load(label)
                if pinned.host.ak.name != key.name:
                    raise PinChangedError(
                        f"{label} is pinned to the AK {pinned.host.ak.name.hex()}, not "
                        f"{key.name.hex()}; pin anew if the change is meant"
                    )
                return pinned
            write_private(path, _encode(ak_public, None))
        return self.load(label)

    def load(self, label: str) -> PinnedHost:
        """A pinned host.

        Raises:
            UsageError: it is not pinned.
            HostError: its file is damaged.
        """
        path = self._path(label)
        if not path.exists():
            raise UsageError(f"{label} is not pinned")
        ak_public, newest = _parse(read_file(path, MAX_PIN_BYTES), path)
        host = TrustedHost(ak=parse_ak(ak_public), label=label)
        return PinnedHost(path, host, ak_public, newest)

    def remove(self, label: str) -> None:
        """Forget a host.

        Raises:
            UsageError: it is not pinned.
        """
        path = self._path(label)
        with _locked(self._directory):
            if not path.exists():
                raise UsageError(f"{label} is not pinned")
            path.unlink()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    try:
        fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise HostError(f"cannot lock {directory}: {exc.strerror}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _encode(ak_public: bytes, newest: ClockState | None) -> bytes:
    values: dict[str, object] = {
        "format": FORMAT,
        "ak_tpm": base64.b64encode(ak_public).decode("ascii"),
        "ak_name": parse_ak(ak_public).name.hex(),  # for people; not read back
    }
    if newest is not None:
        values["newest"] = clock_values(newest)
    return json.dumps(values, indent=2).encode("ascii") + b"\n"


def _parse(data: bytes, path: Path) -> tuple[bytes, ClockState | None]:
    try:
        fields = Fields(parse_json_object(data, "pin"), "pin")
        if fields.text("format", 64) != FORMAT:
            raise EvidenceFormatError("an unknown format")
        ak_public = fields.base64("ak_tpm", 1024)
        newest = parse_clock(fields.fields("newest")) if "newest" in fields else None
        return ak_public, newest
    except EvidenceFormatError as exc:
        raise HostError(f"the pin {path} is damaged: {exc}") from exc
