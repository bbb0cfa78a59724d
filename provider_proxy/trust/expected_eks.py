"""An inventory: the digest of each host's EK, from a purchase or from a person's own reading.

For chips that carry no certificate, and for tenants that trust their own list more than a maker's CA. A
person vouches for the hosts in it: a host's EK must be the listed one, whatever certificate it has. It
is one file beside the pins, replaced as a whole.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

from provider_proxy.common.files import read_trusted, write_private
from provider_proxy.common.settings.values import LABEL_RE
from provider_proxy.errors import HostError, PinChangedError, UntrustedEkError, UsageError
from provider_proxy.evidence.tpm_keys import PublicKey
from provider_proxy.evidence.vtpm_link import spki_digest

FILE = "expected-eks"  # in the directory of the pins
MAX_BYTES = 16 * 1024 * 1024
MAX_HOSTS = 100_000
DIGEST_RE = re.compile(r"[0-9A-Fa-f]{2}(?::?[0-9A-Fa-f]{2}){31}", re.ASCII)
SEPARATOR_RE = re.compile(r"[\s,;]+", re.ASCII)


def parse_digest(text: str) -> bytes:
    """SHA-256 of a SubjectPublicKeyInfo, hex, with or without colons.

    Raises:
        UsageError: it is not.
    """
    if not DIGEST_RE.fullmatch(text):
        raise UsageError(f"{text[:80]!r} is not a SHA-256 digest: 64 hexadecimal digits")
    return bytes.fromhex(text.replace(":", ""))


def parse_inventory(data: bytes, what: str) -> dict[str, bytes]:
    """Hosts and the digests of their EKs: a line each, "HOST SHA256" or with a comma, # begins a comment.

    Args:
        what: the file, for messages.

    Raises:
        UsageError: a line is wrong, or a host is listed twice; the message names the line.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as exc:
        raise UsageError(f"{what} is not UTF-8 text") from exc
    found: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = SEPARATOR_RE.sub(" ", line.partition("#")[0]).split()
        if not words:
            continue
        try:
            label, text = words
            digest = parse_digest(text)
        except ValueError as exc:
            raise UsageError(
                f"{what}, line {number}: it must be a host and a SHA-256 digest"
            ) from exc
        except UsageError as exc:
            raise UsageError(f"{what}, line {number}: {exc}") from exc
        if not LABEL_RE.fullmatch(label):
            raise UsageError(f"{what}, line {number}: {label[:80]!r} is not a host's label")
        if found.setdefault(label, digest) != digest:
            raise UsageError(
                f"{what}, line {number}: {label} is listed twice, with different digests"
            )
    if len(found) > MAX_HOSTS:
        raise UsageError(f"{what} has more than {MAX_HOSTS} hosts")
    return found


class ExpectedEks:
    """The inventory beside a directory of pins.

    Args:
        pins: the directory.
    """

    def __init__(self, pins: Path) -> None:
        self._path = pins / FILE
        self._stamp: object = None
        self._known: Mapping[str, bytes] = {}

    def of(self, label: str) -> bytes | None:
        """The digest of a host's EK; None where the inventory does not name the host.

        Raises:
            HostError: the inventory is damaged, or everybody can write it.
        """
        return self._load().get(label)

    def add(self, new: Mapping[str, bytes], *, replace: bool = False) -> int:
        """Add hosts, all or none.

        Args:
            replace: a host may have another digest than before; the change is meant.

        Returns:
            How many hosts the inventory names now.

        Raises:
            PinChangedError: a host has another digest already, and `replace` was not given.
            HostError: the file cannot be read or written.
        """
        known = dict(self._load())
        for label, digest in new.items():
            if known.setdefault(label, digest) != digest and not replace:
                raise PinChangedError(
                    f"the inventory names another EK for {label}; nothing was changed. If the change is "
                    "meant, give --replace"
                )
        known |= new
        lines = [f"{label} {digest.hex()}\n" for label, digest in sorted(known.items())]
        write_private(self._path, "".join(lines).encode("ascii"))
        return len(known)

    def _load(self) -> Mapping[str, bytes]:
        stamp = None
        with contextlib.suppress(FileNotFoundError):
            now = os.stat(self._path)
            stamp = (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        if stamp != self._stamp:
            self._known = {} if stamp is None else self._read()
            self._stamp = stamp
        return self._known

    def _read(self) -> Mapping[str, bytes]:
        try:
            return parse_inventory(read_trusted(self._path, MAX_BYTES), str(self._path))
        except UsageError as exc:
            raise HostError(f"the inventory of EKs is damaged: {exc}") from exc


def demand_ek(key: PublicKey, expected: bytes, who: str) -> None:
    """Raises: UntrustedEkError where a key is not the one of this digest."""
    if not hmac.compare_digest(spki_digest(key), expected):
        raise UntrustedEkError(
            f"{who} has another EK ({spki_digest(key).hex()}) than the expected one "
            f"({expected.hex()})"
        )
