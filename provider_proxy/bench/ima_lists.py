"""IMA lists of any length for benchmarks: each line another file, hashed as the kernel does."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from provider_proxy.evidence.logs.ima_keys import FileKey, file_key

NAME = "/usr/lib/x86_64-linux-gnu/package-{:07}/libfile.so.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class List:
    """A list, its PCR 10 (SHA-256), and the digests that a policy has for it."""

    lines: list[str]
    value: bytes
    digests: dict[str, list[str]]

    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


def _field(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def make_line(number: int, signature: bytes | None = None) -> tuple[str, bytes, str, str]:
    """A line, its template data, its name and its digest."""
    name = "boot_aggregate" if number == 0 else NAME.format(number)
    digest = hashlib.sha256(b"%d" % number).digest()
    data = _field(b"sha256:\0" + digest) + _field(name.encode() + b"\0")
    template, tail = "ima-ng", ""
    if signature is not None:
        data += _field(signature)
        template, tail = "ima-sig", f" {signature.hex()}"
    template_hash = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    text = f"10 {template_hash} {template} sha256:{digest.hex()} {name}{tail}"
    return text, data, name, digest.hex()


def make_list(count: int, *, key: rsa.RSAPrivateKey | None = None) -> List:
    """A list of so many lines; each signed where a key is given."""
    lines, digests, value = [], {}, bytes(32)
    known = None if key is None else file_key(key.public_key())
    for number in range(count):
        signature = None if key is None or known is None else _signature(key, known, number)
        text, data, name, digest = make_line(number, signature)
        lines.append(text)
        digests[name] = [digest]
        value = hashlib.sha256(value + hashlib.sha256(data).digest()).digest()
    return List(lines=lines, value=value, digests=digests)


def _signature(key: rsa.RSAPrivateKey, known: FileKey, number: int) -> bytes:
    digest = hashlib.sha256(b"%d" % number).digest()
    value = key.sign(digest, padding.PKCS1v15(), Prehashed(hashes.SHA256()))
    return struct.pack(">BBBIH", 3, 2, 4, known.id, len(value)) + value


def write_list(path: Path, first: int, count: int) -> None:
    """Append lines to a file, without holding them all."""
    with path.open("a", encoding="ascii") as file:
        for number in range(first, first + count):
            file.write(make_line(number)[0] + "\n")


def runtime_policy(digests: dict[str, list[str]], verification_keys: str = "") -> bytes:
    """Keylime's runtime policy that lists these."""
    return json.dumps(
        {
            "meta": {"version": 1, "generator": 3},
            "release": 0,
            "digests": digests,
            "excludes": [],
            "keyrings": {},
            "ima": {"ignored_keyrings": [], "log_hash_alg": "sha1", "dm_policy": None},
            "ima-buf": {},
            "verification-keys": verification_keys,
        }
    ).encode("utf-8")
