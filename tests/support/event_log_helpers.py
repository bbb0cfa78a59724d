"""Boot logs for tests, made with hashlib and struct from the specification: none of our code."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

from provider_proxy.evidence.logs.event_log import (
    EV_NO_ACTION,
)
from provider_proxy.evidence.model import HashAlg

ALGORITHMS = {0x04: 20, 0x0B: 32, 0x0C: 48, 0x12: 32}  # 0x12: SM3, which we do not know
SEPARATOR = 4
ACTION = 5
S_CRTM = 8


def spec(algorithms: Mapping[int, int] = ALGORITHMS) -> bytes:
    """TCG_EfiSpecIDEvent."""
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms))
    for alg, size in algorithms.items():
        data += struct.pack("<HH", alg, size)
    return data + b"\0"


def old(pcr: int, kind: int, data: bytes, digest: bytes | None = None) -> bytes:
    """TCG_PCR_EVENT."""
    sha1 = hashlib.sha1(data).digest() if digest is None else digest
    return struct.pack("<II20sI", pcr, kind, sha1, len(data)) + data


def digest_of(alg: int, data: bytes) -> bytes:
    if alg in set(HashAlg):
        return HashAlg(alg).digest(data)
    return bytes(ALGORITHMS[alg])


def new(
    pcr: int,
    kind: int,
    data: bytes,
    algorithms: Mapping[int, int] = ALGORITHMS,
    *,
    measured: bytes | None = None,
) -> bytes:
    """TCG_PCR_EVENT2; its digests are those of `data`, or of `measured` where that is given."""
    event = struct.pack("<III", pcr, kind, len(algorithms))
    for alg in algorithms:
        event += struct.pack("<H", alg) + digest_of(alg, data if measured is None else measured)
    return event + struct.pack("<I", len(data)) + data


def header(algorithms: Mapping[int, int] = ALGORITHMS) -> bytes:
    return old(0, EV_NO_ACTION, spec(algorithms), bytes(20))


def locality(value: int) -> bytes:
    return new(0, EV_NO_ACTION, b"StartupLocality\0" + bytes([value]))


EVENTS = [
    (0, S_CRTM, b"firmware 1.2"),
    (1, ACTION, b"settings"),
    (7, 0x80000001, b"SecureBoot\x01"),
    (0, SEPARATOR, bytes(4)),
    (7, SEPARATOR, bytes(4)),
    (4, 0x80000003, b"loader"),
]
BODY = b"".join(new(*event) for event in EVENTS)
LOG = header() + locality(3) + BODY
MEASURED = 0x93  # the PCRs of these events


def expected(bank: HashAlg, begin: int = 0) -> dict[int, bytes]:
    values = {0: bytes(bank.digest_bytes - 1) + bytes([begin])}
    for pcr, _, data in EVENTS:
        before = values.get(pcr, bytes(bank.digest_bytes))
        values[pcr] = bank.digest(before + bank.digest(data))
    return values
