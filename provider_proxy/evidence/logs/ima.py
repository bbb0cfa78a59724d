"""The kernel's IMA list, replayed to the PCR 10 that the TPM signed.

The list is unsigned text. Its only authority is the replay: line by line the PCR's value is computed,
and the prefix that leads to the signed value is proven; what follows it was measured after the quote
and proves nothing yet. A line's template data is rebuilt from its text and hashed into the bank, so
that the SHA-1 in the line is a check of the rebuilding and nothing else.

Invariants: no line counts as seen before a signed value confirmed it; a line that the policy does not
allow is not forgotten until the list begins anew; whatever bytes come in, only `LogError` comes out.
Source: the kernel's security/integrity/ima (5.8 and later: before that, other banks got padded SHA-1).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from provider_proxy.errors import LogError
from provider_proxy.evidence.model import HashAlg

IMA_PCR = 10
MAX_LINE_CHARS = (
    64 * 1024
)  # a path has 4,096 bytes, a signature a thousand, a buffer a few thousand
MAX_PARTS = 64  # answers until one list is complete: 7 MB each make more than a kernel keeps
MAX_NAME_BYTES = 4096  # PATH_MAX; a policy's patterns may take the square of a name's length
CHUNK_LINES = 256  # between two chances for others to run: about 2 ms
CHUNK_CHARS = 16 * 1024  # the same where the lines are longer than usual
_SHA1_BYTES = 20
_DIGEST_RE = re.compile(r"(?:(?:ima|verity):)?([a-z0-9_-]{1,32}):([0-9a-f]{2,256})", re.ASCII)
_ESCAPED_RE = re.compile(rb"\\x([89a-f][0-9a-f])")  # what is ASCII is never escaped

BUFFER = "ima-buf"
_TEMPLATES: Mapping[str, str] = {
    "ima-ng": "dn",
    "ima-sig": "dns",
    BUFFER: "dns",
    "ima-ngv2": "dn",
    "ima-sigv2": "dns",
    "ima-modsig": "dnsds",
}
"""Fields of the templates: d a digest with its algorithm, n a name, s bytes in hex or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaEntry:
    """One line.

    Attributes:
        data: the template data, which the kernel hashes into each bank.
        template_hash: SHA-1 over it, as the line says; zeros for a violation.
        digest: of the file.
        violation: the file was open for writing while it was read; its digest means nothing.
    """

    template: str
    template_hash: bytes
    data: bytes
    digest: bytes
    path: str
    violation: bool


def parse_entry(line: str) -> ImaEntry:
    """Read one line, without its line feed, and hold its template hash against its text.

    Raises:
        LogError: not a line that we can rebuild.
    """
    if len(line) > MAX_LINE_CHARS:
        raise LogError("a line of the IMA list is too long")
    words = line.split(" ")
    if len(words) < 5 or words[0] != str(IMA_PCR):
        raise LogError("a line of the IMA list is not '10 <hash> <template> <digest> <name>'")
    template = words[2]
    fields = _TEMPLATES.get(template)
    if fields is None:
        raise LogError(f"the IMA list has a template that is not read: {shown(template)}")
    given = words[3:]
    given += [""] * (len(fields) - len(given))  # empty fields at the end may be cut off
    if len(given) != len(fields):
        raise LogError(f"a line of the IMA list has not the fields of {template}")
    template_hash = _hex(words[1])
    if len(template_hash) != _SHA1_BYTES:
        raise LogError("a template hash of the IMA list is no SHA-1")
    digest = _DIGEST_RE.fullmatch(given[0])
    if digest is None:
        raise LogError("a digest of the IMA list is not algorithm:hex")
    name = _name(given[1])
    data = _template_data(fields, given, name)
    violation = not any(template_hash)
    if not violation and _sha1(data) != template_hash:
        # What was not UTF-8 in a file's name comes as \xNN; a backslash may also be just that.
        name = _ESCAPED_RE.sub(lambda m: bytes.fromhex(m[1].decode("ascii")), name)
        data = _template_data(fields, given, name)
        # One name has one writing, or it could be written so that a policy's patterns miss it.
        is_only_writing = name.decode("utf-8", "backslashreplace") == given[1]
        if _sha1(data) != template_hash or not is_only_writing:
            raise LogError(f"the IMA list's line of {shown(given[1])} is not what was hashed")
    if template == BUFFER:
        _check_buffer(digest[0], given[2], violation)
    return ImaEntry(
        template=template,
        template_hash=template_hash,
        data=data,
        digest=_hex(digest[2]),
        path=given[1],
        violation=violation,
    )


def _name(text: str) -> bytes:
    try:
        name = text.encode("utf-8")
    except UnicodeEncodeError:
        raise LogError("a name of the IMA list is no text") from None
    if len(_ESCAPED_RE.sub(b".", name)) > MAX_NAME_BYTES:
        raise LogError("a name of the IMA list is too long")
    return name


def _check_buffer(digest: str, buffer: str, violation: bool) -> None:
    """A template's name is not hashed, and a file's signature stands where a buffer does: what tells a
    buffer is that the digest is over it (`process_buffer_measurement`).

    Raises:
        LogError: it is not, or the line is a violation, whose text nothing vouches for.
    """
    label, _, digits = digest.rpartition(":")
    try:
        bank = HashAlg.from_label(label)
    except KeyError:
        raise LogError(f"a buffer of the IMA list has the hash {shown(label)}") from None
    if violation or bank.digest(_hex(buffer)) != _hex(digits):
        raise LogError("a digest of the IMA list is not the digest of its buffer")


def _sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()


def _template_data(fields: str, given: list[str], name: bytes) -> bytes:
    """Each field with its length before it, little-endian (`ima_calc_field_array_hash`)."""
    parts = []
    for kind, text in zip(fields, given, strict=True):
        if kind == "n":
            part = name + b"\0"
        elif kind == "d" and text:
            algorithm, _, digits = text.rpartition(":")
            part = algorithm.encode("utf-8", "replace") + b":\0" + _hex(digits)
        else:
            part = _hex(text)
        parts.append(len(part).to_bytes(4, "little") + part)
    return b"".join(parts)


def _hex(text: str) -> bytes:
    # bytes.fromhex alone would skip white space.
    if text and not (text.isascii() and text.isalnum()):
        raise LogError("the IMA list has something that is no hex")
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise LogError("the IMA list has something that is no hex") from None


def shown(text: str) -> str:
    """Text from outside, fit to be shown."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


class EntryPolicy(Protocol):
    """Judges entries: `runtime_policy.RuntimePolicy`."""

    def problem(self, entry: ImaEntry, index: int) -> str | None:
        """Why an entry is not allowed; None where it is."""
        ...


class Outcome(enum.Enum):
    """What an answer's part of the list led to."""

    MATCHED = enum.auto()
    MORE = enum.auto()  # ask again, from `ImaReplay.next_entry`


class ImaReplay:
    """One host's list, over many answers.

    Args:
        bank: of the signed PCR 10.
        policy: judges the entries; None to only replay.

    Attributes:
        next_entry: what to ask for next, as `ima_ml_entry`.
        violations: entries seen so far whose digest means nothing.
        outcome: of the last `offer` that was run to its end.
    """

    def __init__(self, bank: HashAlg, policy: EntryPolicy | None = None) -> None:
        self._bank = bank
        self._policy = policy
        self.outcome = Outcome.MORE
        self.restart()

    def restart(self) -> None:
        """Forget the list; the next answer must hold it from its beginning."""
        self._value = bytes(self._bank.digest_bytes)
        self._from_zero = True
        self._parts = 0
        self._problem: str | None = None
        self._tentative_problem: str | None = None
        self.next_entry = 0
        self.violations = 0

    def offer(self, text: str | None, entry: int, quoted: bytes) -> Iterator[None]:
        """Replay an answer's part of the list; a generator that pauses between chunks of lines.

        Args:
            text: whole lines from `entry` on, untrusted; None where the answer has no list.
            quoted: the signed PCR 10 of the same answer.

        Raises:
            LogError: the list does not lead to the signed value, or holds what is not allowed. The
                list is asked for from its beginning next time, or what is wrong remembered.
        """
        if text is None:
            raise LogError("the answer has PCR 10 and no IMA list")
        if entry != self.next_entry:
            if entry != 0:
                raise LogError("the IMA list does not begin where it was asked to")
            self.restart()  # the host has rebooted: its list is shorter than what we had
        lines = text.split("\n")
        if lines.pop():
            self.restart()
            raise LogError("the IMA list ends within a line")
        matched = hmac.compare_digest(self._value, quoted)
        count = chars = 0
        for line in lines:
            if matched:
                break
            self._take(line)
            matched = hmac.compare_digest(self._value, quoted)
            count, chars = count + 1, chars + len(line)
            if count == CHUNK_LINES or chars > CHUNK_CHARS:
                count = chars = 0
                yield
        self._settle(matched, bool(lines))

    def _take(self, line: str) -> None:
        try:
            entry = parse_entry(line)
        except LogError:
            self.restart()
            raise
        if self._policy is not None and self._tentative_problem is None:
            problem = self._policy.problem(entry, self.next_entry)
            if problem is not None:
                self._tentative_problem = f"IMA entry {self.next_entry}: {problem}"
        if entry.violation:
            self.violations += 1
            extended = b"\xff" * self._bank.digest_bytes
        else:
            extended = self._bank.digest(entry.data)
        self._value = self._bank.digest(self._value + extended)
        self.next_entry += 1

    def _settle(self, matched: bool, has_lines: bool) -> None:
        """Confirm what was taken, or say what to ask for next."""
        if matched:
            self.outcome = Outcome.MATCHED
            self._from_zero = False
            self._parts = 0
            self._problem = self._problem or self._tentative_problem
            if self._policy is not None and self.next_entry == 0:  # not even the boot aggregate
                raise LogError("PCR 10 was never extended: the host's kernel measures nothing")
            if self._problem is not None:
                raise LogError(self._problem)
            return
        self.outcome = Outcome.MORE
        self._parts += 1
        if has_lines and self._parts < MAX_PARTS:
            return  # an answer holds a bounded part of a long list
        incremental = not self._from_zero
        self.restart()
        if not incremental:
            raise LogError("the IMA list does not lead to the signed PCR 10")
