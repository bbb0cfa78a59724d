"""One line of the kernel's IMA list: read from its text, rebuilt to the bytes that the kernel hashed.

The text is only what the host claims. What is rebuilt counts where a replay leads to a signed PCR;
the template hash in the line shows, before that, whether the line was rebuilt correctly. The kernel
writes names as they are: a byte that is not UTF-8 comes here as `\\xNN`, and a name with a line feed
in it as several lines, which `ima` joins.
Whatever text comes in, only `LogError` comes out.
Source: the kernel's security/integrity/ima (ima_template.c, ima_template_lib.c, ima_fs.c).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from provider_proxy.errors import LogError
from provider_proxy.evidence.model import Hash, HashAlg

MAX_LINE_CHARS = (
    64 * 1024
)  # a path has 4,096 bytes, a signature a thousand, a buffer a few thousand
MAX_NAME_BYTES = 4096  # PATH_MAX; a policy's patterns may take the square of a name's length
MAX_GUESSES = 64  # readings of a name with escapes in it: six of them, in all combinations
LEGACY_NAME_BYTES = 255  # TCG_EVENT_NAME_LEN_MAX: the template `ima` pads names to it, and a NUL

BUFFER = "ima-buf"
LEGACY = "ima"
BOOT_AGGREGATE = "boot_aggregate"
SHA1_CHARS = 40

_TEMPLATES: Mapping[str, str] = {
    LEGACY: "dn",
    "ima-ng": "dn",
    "ima-sig": "dnx",
    BUFFER: "dnx",
    "ima-ngv2": "dn",
    "ima-sigv2": "dnx",
    "ima-modsig": "dnxdx",
    "evm-sig": "dnxtxx442",
}
"""Fields of the templates: d a digest with its algorithm, n a name, t another text, x bytes in hex or
nothing, a digit a number of so many bytes. What a template names second is the name, and x third its
signature or buffer."""

_sha1 = functools.partial(hashlib.sha1, usedforsecurity=False)
_TEMPLATE_HASHES: Mapping[int, Callable[[bytes], Hash]] = {
    SHA1_CHARS: _sha1,
    64: hashlib.sha256,
    96: hashlib.sha384,
    128: hashlib.sha512,
}
"""By the number of hex digits: ascii_runtime_measurements_sha256 and its like have other hashes."""

_HEAD_RE = re.compile(r" ?([0-9]{1,2}) ([0-9a-f]{40,128}) ", re.ASCII)
_DIGEST_RE = re.compile(
    r"((?:(?:ima|verity):)?([a-z0-9_-]{1,32})):((?:[0-9a-f]{2}){1,128})", re.ASCII
)
_LEGACY_DIGEST_RE = re.compile(r"[0-9a-f]{32}|[0-9a-f]{40}", re.ASCII)
_PLAIN_RE = re.compile(
    r"10 ([0-9a-f]{40}) ima-(?:ng|sig) (sha1:[0-9a-f]{40}|sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}"
    r"|sha512:[0-9a-f]{128}) ([!-\[\]-~]{1,4096})",  # printable ASCII but the backslash
    re.ASCII,
)
_PLAIN_DIGESTS: Mapping[str, bytes] = {
    alg.label: (len(alg.label) + 2 + alg.digest_bytes).to_bytes(4, "little")
    + alg.label.encode("ascii")
    + b":\0"
    for alg in HashAlg
}
_ESCAPED_RE = re.compile(rb"\\x([89a-f][0-9a-f])")  # what is ASCII is never escaped
_LEGACY_ALGORITHMS = {32: "md5", 40: "sha1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaEntry:
    """One line.

    Attributes:
        pcr: that it was extended into; 10 but for a kernel's policy with `pcr=`.
        data: the template data, which the kernel hashes into each bank.
        template_hash: over it, as the line says; zeros for a violation.
        algorithm, digest: of the file or buffer, "sha256" for example.
        path: the name as the list shows it.
        extra: the signature, or the buffer; empty without one.
        violation: the file was open for writing while it was read: digest and name mean nothing.
    """

    pcr: int
    template: str
    template_hash: bytes
    data: bytes
    algorithm: str
    digest: bytes
    path: str
    extra: bytes
    violation: bool


def parse_plain(line: str) -> tuple[str, str, bytes] | None:
    """A line of the usual kind, read as `parse_entry` reads it and in half the time.

    Returns:
        Name, digest in hex, template data; None where `parse_entry` must read it, or refuse it.
    """
    found = _PLAIN_RE.match(line)
    if found is None:
        return None
    hashed, digest, name = found.groups()
    tail = line[found.end() :]
    if line[48] == "n":  # ima-ng
        if tail:
            return None
        end = b"\0"
    else:
        if tail not in ("", " "):  # it is signed
            return None
        end = b"\0\0\0\0\0"
    algorithm, _, digest = digest.partition(":")
    data = (
        _PLAIN_DIGESTS[algorithm]
        + bytes.fromhex(digest)
        + (len(name) + 1).to_bytes(4, "little")
        + name.encode("ascii")
        + end
    )
    if _sha1(data).hexdigest() != hashed:
        return None
    return name, digest, data


def looks_like_entry(line: str) -> bool:
    """Whether a line begins as an entry does."""
    return _HEAD_RE.match(line) is not None


def pcr_of(line: str) -> int | None:
    """The PCR that a line was extended into; None where it does not begin as an entry does."""
    head = _HEAD_RE.match(line)
    return None if head is None else int(head[1])


def parse_entry(line: str) -> ImaEntry:
    """Read one line, without its line feed, and check its template hash against its text.

    Raises:
        LogError: not a line that we can rebuild.
    """
    if len(line) > MAX_LINE_CHARS:
        raise LogError("a line of the IMA list is too long")
    head = _HEAD_RE.match(line)
    words = line[head.end() :].split(" ", 2) if head is not None else []
    if head is None or len(words) != 3:
        raise LogError("a line of the IMA list is not '10 <hash> <template> <digest> <name>'")
    template, digest_text, rest = words
    fields = _TEMPLATES.get(template)
    if fields is None:
        raise LogError(f"the IMA list has a template that is not supported: {shown(template)}")
    hashed = _TEMPLATE_HASHES.get(len(head[2]))
    if hashed is None:
        raise LogError("a template hash of the IMA list has a length that no hash has")
    template_hash = bytes.fromhex(head[2])
    algorithm, digest, digest_data = _digest(template, digest_text)
    # Names have no spaces in them where a field follows: the kernel writes an underscore instead.
    text, given = (rest, []) if fields == "dn" else _split(template, fields, rest)
    violation = not any(template_hash)
    more = [_field(kind, value) for kind, value in zip(fields[2:], given, strict=True)]
    for name in _names(text):
        data = _template_data(template, digest_data, name, more)
        if violation or hashed(data).digest() == template_hash:
            break
    else:
        raise LogError(f"the IMA list's entry for {shown(text)} does not match its template hash")
    extra = more[0] if more else b""
    if template == BUFFER and not violation:
        _check_buffer(algorithm, digest, extra)
    return ImaEntry(
        pcr=int(head[1]),
        template=template,
        template_hash=template_hash,
        data=data,
        algorithm=algorithm,
        digest=digest,
        path=text,
        extra=extra,
        violation=violation,
    )


def _digest(template: str, text: str) -> tuple[str, bytes, bytes]:
    """Algorithm, digest, and the two as the template data holds them."""
    if template == LEGACY:
        if _LEGACY_DIGEST_RE.fullmatch(text) is None:
            raise LogError("a digest of the template ima is not MD5 or SHA-1 in hex")
        return _LEGACY_ALGORITHMS[len(text)], bytes.fromhex(text), bytes.fromhex(text)
    found = _DIGEST_RE.fullmatch(text)
    if found is None:
        raise LogError("a digest of the IMA list is not algorithm:hex")
    digest = bytes.fromhex(found[3])
    return found[2], digest, found[1].encode("ascii") + b":\0" + digest


def _split(template: str, fields: str, rest: str) -> tuple[str, list[str]]:
    """The name, and the fields behind it; empty ones at the end may be cut off."""
    name, *given = rest.split(" ")
    given += [""] * (len(fields) - 2 - len(given))
    if len(given) != len(fields) - 2:
        raise LogError(
            f"a line of the IMA list does not have the fields of the template {template}"
        )
    return name, given


def _field(kind: str, text: str) -> bytes:
    """A field behind the name, as the template data holds it."""
    if kind == "t":
        return text.encode("utf-8", "surrogatepass") + b"\0"
    if kind.isdecimal():
        if not (text.isascii() and text.isdecimal() and len(text) <= 10):
            raise LogError("a number of the IMA list is not valid")
        number = int(text)
        if number >> 8 * int(kind):
            raise LogError("a number of the IMA list is too large")
        return number.to_bytes(int(kind), "little")
    if kind == "d" and text:
        return _digest("", text)[2]
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if data.hex() != text:  # white space and capitals would be other forms of the same value
        raise LogError("a field of the IMA list is not hex")
    return data


def _names(text: str) -> Iterator[bytes]:
    """The names that a text may stand for, the likeliest first.

    What was not UTF-8 in a name comes as \\xNN; a backslash may also be just that. A name has one
    form only, or a host could write it so that a policy's patterns miss it.
    """
    try:
        literal = text.encode("utf-8")
    except UnicodeEncodeError:
        raise LogError("a name of the IMA list is not valid text") from None
    escapes = [] if b"\\x" not in literal else [m.span() for m in _ESCAPED_RE.finditer(literal)]
    if len(literal) - 3 * len(escapes) > MAX_NAME_BYTES:
        raise LogError("a name of the IMA list is too long")
    yield literal
    if not escapes:
        return
    every = (1 << len(escapes)) - 1
    guesses = range(every, 0, -1) if every < MAX_GUESSES else (every,)
    for chosen in guesses:
        name = _unescaped(literal, [at for n, at in enumerate(escapes) if chosen >> n & 1])
        if name.decode("utf-8", "backslashreplace") == text:
            yield name


def _unescaped(literal: bytes, escapes: list[tuple[int, int]]) -> bytes:
    parts, at = [], 0
    for start, end in escapes:
        parts += [literal[at:start], bytes.fromhex(literal[start + 2 : end].decode("ascii"))]
        at = end
    return b"".join((*parts, literal[at:]))


def _template_data(template: str, digest: bytes, name: bytes, more: list[bytes]) -> bytes:
    """What the kernel hashes (`ima_calc_field_array_hash`): each field behind its length."""
    if template == LEGACY:
        if len(name) > LEGACY_NAME_BYTES:
            raise LogError("a name of the template ima is too long")
        return digest + name.ljust(LEGACY_NAME_BYTES + 1, b"\0")
    data = (
        len(digest).to_bytes(4, "little")
        + digest
        + (len(name) + 1).to_bytes(4, "little")
        + name
        + b"\0"
    )
    for part in more:
        data += len(part).to_bytes(4, "little") + part
    return data


def _check_buffer(algorithm: str, digest: bytes, buffer: bytes) -> None:
    """A template's name is not hashed, and a file's signature and a buffer use the same field: only a
    buffer has the digest that the line gives (`process_buffer_measurement`).

    Raises:
        LogError: it is not.
    """
    try:
        bank = HashAlg.from_label(algorithm)
    except KeyError:
        raise LogError(
            f"a buffer of the IMA list has an unknown hash algorithm: {shown(algorithm)}"
        ) from None
    if bank.digest(buffer) != digest:
        raise LogError("a buffer of the IMA list does not have the digest that its line gives")


def shown(text: str) -> str:
    """Text from outside, made safe to show."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])
