"""Replays the kernel's IMA list to a PCR 10 of the bank SHA-256, on the standard library alone.

Templates ima-ng and ima-sig: each field is its length, little-endian, and its bytes. The kernel extends
SHA-256 of that, and all ones for an entry whose template hash is zero (a violation). Source: the
kernel's Documentation/security/IMA-templates.rst and security/integrity/ima/ima_template_lib.c.
"""

from __future__ import annotations

from hashlib import sha256


def matching_prefix(log: str, pcr10: bytes) -> tuple[int, int] | None:
    """How many entries lead to a PCR's value, of how many; None where no prefix does."""
    lines = [line for line in log.split("\n") if line]
    value = bytes(32)
    for number, line in enumerate(lines, 1):
        value = sha256(value + extended(line)).digest()
        if value == pcr10:
            return number, len(lines)
    return None


def extended(line: str) -> bytes:
    """What the kernel extends for a line of the ASCII list."""
    _, template_hash, template, digest, rest = line.split(" ", 4)
    if set(template_hash) == {"0"}:
        return b"\xff" * 32
    name, signature = rest, b""
    if template == "ima-sig":
        head, _, last = rest.rpartition(" ")
        name, signature = (head, bytes.fromhex(last)) if last and head else (rest.rstrip(" "), b"")
    algorithm, _, value = digest.partition(":")
    fields = [algorithm.encode() + b":\0" + bytes.fromhex(value), name.encode() + b"\0"]
    if template == "ima-sig":
        fields.append(signature)
    return sha256(b"".join(len(f).to_bytes(4, "little") + f for f in fields)).digest()
