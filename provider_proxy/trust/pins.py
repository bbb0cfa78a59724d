"""Pinned hosts: which AK a tenant trusts for a host, and how far that host's TPM clock has come.

A registrar lets strangers replace its records, and a cache expires; a pin does neither. The AK, and
the EK where it is known, are pinned at first trust; a change is refused until a person pins again. The
newest clock state that was ever accepted is kept on disk, so that a host that is rolled back to an old
snapshot of its TPM is noticed. One JSON file a host, written atomically; several processes may share
the directory.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from provider_proxy.common.files import files_in, is_there, read_trusted, write_private
from provider_proxy.common.settings.values import LABEL_RE
from provider_proxy.errors import EvidenceFormatError, HostError, PinChangedError, UsageError
from provider_proxy.evidence.model import ClockState, TrustedHost
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.evidence.tpm_keys import parse_ak, parse_public
from provider_proxy.evidence.verify import MemoryHistory
from provider_proxy.evidence.wire import clock_values, parse_clock
from provider_proxy.trust.expected_eks import ExpectedEks

FORMAT = "provider-proxy/pin/1"
MAX_PIN_BYTES = 16 * 1024
BY_PERSON, BY_REGISTRAR = "person", "registrar"  # who vouched that this EK is the host's


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pin:
    """What a pin's file holds.

    Attributes:
        ak_public, ek_public: TPM2B_PUBLIC; the EK is None where only the AK was pinned.
        ek_by_hand: a person vouched for the EK, so that it needs no certificate.
        newest: the newest clock state accepted; None before the first.
    """

    ak_public: bytes
    ek_public: bytes | None = None
    ek_by_hand: bool = False
    newest: ClockState | None = None

    def keys(self) -> tuple[bytes, bytes | None, bool]:
        return self.ak_public, self.ek_public, self.ek_by_hand


class PinnedHost(MemoryHistory):
    """A pinned host: `host` to verify against, and its history, kept on disk.

    Open nonces are kept in memory only: after a restart their answers are refused.
    """

    def __init__(self, path: Path, label: str, pin: _Pin, stamp: object):
        super().__init__(pin.newest)
        self.host = TrustedHost(ak=parse_ak(pin.ak_public), label=label)
        self._path = path
        self._pin = pin
        self._stamp = stamp
        self._path_text = os.fspath(path)  # used on every attestation; a Path is slower

    @property
    def ek_public(self) -> bytes | None:
        """The pinned EK, TPM2B_PUBLIC; None where only the AK is pinned."""
        return self._pin.ek_public

    @property
    def ek_by_hand(self) -> bool:
        """True where a person vouched for the EK."""
        return self._pin.ek_by_hand

    def demand(self, ak_public: bytes, ek_public: bytes) -> None:
        """Raises: PinChangedError where this AK or this EK is not the pinned one."""
        if ak_public != self._pin.ak_public:
            name = parse_ak(ak_public).name
            raise PinChangedError(
                f"{self.host.label} is pinned to the AK {self.host.ak.name.hex()}, not "
                f"{name.hex()}; if the change is meant, pin it again with `pin add --replace`"
            )
        if self._pin.ek_public is not None and ek_public != self._pin.ek_public:
            raise PinChangedError(
                f"{self.host.label} is pinned to another EK, so this is another TPM; if the change is "
                "meant, pin it again with `pin add --replace`"
            )

    def is_current(self) -> bool:
        """False where the file is gone or has other keys; reads it only if it has changed.

        Raises:
            HostError: the file is damaged.
        """
        stamp = _stamp_of(self._path_text)
        if stamp is None or stamp == self._stamp:
            return stamp is not None
        if _read(self._path).keys() != self._pin.keys():
            return False
        self._stamp = stamp  # taken before the file was read: a later change is read again
        return True

    def newest(self) -> ClockState | None:
        """The newest state that any process accepted.

        Raises:
            PinChangedError: another AK or EK has been pinned since this object was loaded.
            HostError: the pin is gone, or is damaged.
        """
        on_disk = self._on_disk().newest
        mine = super().newest()
        if on_disk is None or (mine is not None and mine > on_disk):
            return mine
        return on_disk

    def _on_disk(self) -> _Pin:
        pin = _read(self._path)
        if pin.ak_public != self._pin.ak_public:
            raise PinChangedError(f"{self.host.label} has since been pinned to another AK")
        if self._pin.ek_public is not None and pin.ek_public != self._pin.ek_public:
            raise PinChangedError(f"{self.host.label} has since been pinned to another EK")
        return pin

    def accept(self, state: ClockState) -> None:
        """Remember a state; on disk where it is the newest of all processes.

        Raises:
            PinChangedError: another AK or EK has been pinned since; the new pin is kept.
            HostError: the pin cannot be read or written.
        """
        with _locked(self._path.parent):
            pin = self._on_disk()
            if pin.newest is None or state > pin.newest:
                write_private(self._path, _encode(dataclasses.replace(pin, newest=state)))
        super().accept(state)


class PinStore:
    """A directory of pins.

    Args:
        directory: created if it is missing, for its owner only.

    Attributes:
        expected: the inventory of EKs beside the pins.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.expected = ExpectedEks(directory)

    def path_of(self, label: str) -> Path:
        """The file of a pin, whether it exists or not. Raises: UsageError for an invalid label."""
        if not LABEL_RE.fullmatch(label):
            raise UsageError("a host's label must be at most 101 letters, digits, '.', '_' and '-'")
        return self._directory / f"{label}.json"

    def labels(self) -> list[str]:
        """The pinned hosts, in order of their names. Raises: HostError: the directory cannot be read."""
        return [path.stem for path in files_in(self._directory, ".json")]

    def has(self, label: str) -> bool:
        """True where a host is pinned. Raises: UsageError for an invalid label."""
        return is_there(self.path_of(label))

    def pin(
        self,
        label: str,
        ak_public: bytes,
        *,
        ek_public: bytes | None = None,
        ek_by_hand: bool = False,
        replace: bool = False,
    ) -> PinnedHost:
        """Trust an AK, and an EK where it is given, for a host from now on.

        An EK is added to a pin of the same AK that has none yet; the clock's history goes on.

        Args:
            ak_public: TPM2B_PUBLIC; its attributes are checked.
            ek_public: TPM2B_PUBLIC of the EK that is in the same TPM.
            ek_by_hand: a person vouches for this EK: its certificate is not checked.
            replace: a person says that the change is meant; the clock's history starts over.

        Raises:
            PinChangedError: another AK or EK is pinned, and `replace` was not given.
            UntrustedAkError, EvidenceFormatError: not an AK, or not a key.
            UsageError: an invalid label.
        """
        path = self.path_of(label)
        parse_ak(ak_public)
        if ek_public is not None:
            parse_public(ek_public)
        new = _Pin(ak_public=ak_public, ek_public=ek_public, ek_by_hand=ek_by_hand)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise HostError(f"cannot make {self._directory}: {exc.strerror}") from exc
        with _locked(self._directory):
            if is_there(path) and not replace:
                pinned = self.load(label)
                pinned.demand(ak_public, ek_public or pinned.ek_public or b"")
                if ek_public is None or (
                    pinned.ek_public and (pinned.ek_by_hand or not ek_by_hand)
                ):
                    return pinned
                new = dataclasses.replace(new, newest=pinned.newest())
            write_private(path, _encode(new))
        return self.load(label)

    def load(self, label: str) -> PinnedHost:
        """A pinned host.

        Raises:
            UsageError: it is not pinned.
            HostError: its file is damaged.
        """
        path = self.path_of(label)
        stamp = _stamp_of(path)
        _check_directory(self._directory)
        if stamp is None:
            raise UsageError(f"{label} is not pinned")
        return PinnedHost(path, label, _read(path), stamp)

    def remove(self, label: str) -> None:
        """Forget a host.

        Raises:
            UsageError: it is not pinned.
        """
        path = self.path_of(label)
        with _locked(self._directory):
            if not is_there(path):
                raise UsageError(f"{label} is not pinned")
            path.unlink()


def _check_directory(directory: Path) -> None:
    """Raises: HostError where other users could replace a pin."""
    with contextlib.suppress(OSError):  # the call that opens it reports the error
        if directory.stat().st_mode & stat.S_IWOTH:
            raise HostError(f"{directory}: everybody can write it: chmod o-w {directory}")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process that holds it."""
    _check_directory(directory)
    try:
        fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise HostError(f"cannot lock {directory}: {exc.strerror}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _stamp_of(path: Path | str) -> object:
    """Changes whenever the file is replaced; None where it is missing."""
    try:
        now = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise HostError(f"cannot look at {path}: {exc.strerror}") from exc
    return now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size


def _is_by_person(text: str) -> bool:
    if text not in (BY_PERSON, BY_REGISTRAR):
        raise EvidenceFormatError("it is not known who vouched for the EK")
    return text == BY_PERSON


def _encode(pin: _Pin) -> bytes:
    values: dict[str, object] = {
        "format": FORMAT,
        "ak_tpm": base64.b64encode(pin.ak_public).decode("ascii"),
        "ak_name": parse_ak(pin.ak_public).name.hex(),  # for people; not read back
    }
    if pin.ek_public is not None:
        values["ek_tpm"] = base64.b64encode(pin.ek_public).decode("ascii")
        values["ek_by"] = BY_PERSON if pin.ek_by_hand else BY_REGISTRAR
    if pin.newest is not None:
        values["newest"] = clock_values(pin.newest)
    return json.dumps(values, indent=2).encode("ascii") + b"\n"


def _read(path: Path) -> _Pin:
    return _parse(read_trusted(path, MAX_PIN_BYTES), path)


def parse_pin(data: bytes, label: str) -> tuple[TrustedHost, ClockState | None]:
    """The host that a pin's file trusts, and the newest clock state in it.

    Raises:
        HostError: it is damaged.
    """
    pin = _parse(data, label)
    return TrustedHost(ak=parse_ak(pin.ak_public), label=label), pin.newest


def _parse(data: bytes, path: Path | str) -> _Pin:
    try:
        fields = Fields(parse_json_object(data, "pin"), "pin")
        if fields.text("format", 64) != FORMAT:
            raise EvidenceFormatError("an unknown format")
        has_ek = "ek_tpm" in fields
        return _Pin(
            ak_public=fields.base64("ak_tpm", 1024),
            ek_public=fields.base64("ek_tpm", 1024) if has_ek else None,
            ek_by_hand=has_ek and _is_by_person(fields.text("ek_by", 64)),
            newest=parse_clock(fields.fields("newest")) if "newest" in fields else None,
        )
    except EvidenceFormatError as exc:
        raise HostError(f"the pin {path} is damaged: {exc}") from exc
