"""What one line of an IMA list extends, and whether it is allowed: for one host after another.

Hosts of one kind measure the same files, so verdicts are remembered by the line's whole text; where a
verdict depends on the keys that a host has measured, by these as well. `LineWalk` reads a list line by
line, and joins the lines of a name that has line feeds in it.
This module knows no signed PCRs: `ima` says which lines are proven.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from provider_proxy.errors import LogError
from provider_proxy.evidence.logs.ima_keys import NO_KEYS, KeySet
from provider_proxy.evidence.logs.ima_line import (
    MAX_LINE_CHARS,
    MAX_NAME_BYTES,
    ImaEntry,
    looks_like_entry,
    parse_entry,
    parse_plain,
    pcr_of,
    shown,
)
from provider_proxy.evidence.logs.runtime_policy import RuntimePolicy
from provider_proxy.evidence.model import HashAlg

IMA_PCR = 10
MAX_JOINED_LINES = 32  # no real name has so many line feeds
MAX_REMEMBERED_CHARS = 8 * 1024 * 1024  # some 45,000 lines, twice: 50 MB
_IMA_PREFIX = f"{IMA_PCR} "


class Violations(enum.StrEnum):
    """What to do with a file that was open for writing while it was measured."""

    REFUSE = "refuse"
    COUNT = "count"  # as Keylime's verifier does by default


class JudgedLine(NamedTuple):
    """What one entry does. A tuple, because every line of every list makes one.

    Attributes:
        extended: what PCR 10 was extended with; None for an entry of another PCR.
        problem: why it is not allowed; None where it is, or where there is no policy.
        violation: its digest and its name mean nothing.
        needs: the keys that the verdict depends on; None where it depends on no key.
        keys: the host's keys after it.
    """

    extended: bytes | None
    problem: str | None = None
    violation: bool = False
    needs: KeySet | None = None
    keys: KeySet = NO_KEYS


class LineJudge:
    """Judges lines for any number of hosts.

    Args:
        bank: of the signed PCR 10.
        policy: None to only replay; violations are then counted, whatever `violations` says.

    Attributes:
        usual: what PCR 10 is extended with by lines that were judged lately, are allowed, and concern
            nothing else: most of most lists, for the loop that goes through them.
    """

    def __init__(
        self,
        bank: HashAlg,
        policy: RuntimePolicy | None = None,
        *,
        violations: Violations = Violations.REFUSE,
    ) -> None:
        self.bank = bank
        self.policy = policy
        self.violations = violations
        self.first_keys = NO_KEYS if policy is None else policy.keys
        self._hasher = bank.hasher
        self._ones = b"\xff" * bank.digest_bytes
        self.usual: dict[str, bytes] = {}
        self._young: dict[str, JudgedLine] = {}
        self._old: dict[str, JudgedLine] = {}
        self._chars = 0

    def judge(self, line: str, keys: KeySet) -> JudgedLine:
        """One entry.

        Raises:
            LogError: it cannot be read.
        """
        made = self._young.get(line)
        if made is not None and (made.needs is None or made.needs == keys):
            return made
        made = self._old.get(line)
        if made is None or not (made.needs is None or made.needs == keys):
            made = self._judge(line, keys)
        if self._chars > MAX_REMEMBERED_CHARS:
            self._old, self._young, self.usual, self._chars = self._young, {}, {}, 0
        self._young[line] = made
        if made.needs is None and made.problem is None and not made.violation and made.extended:
            self.usual[line] = made.extended
        self._chars += len(line)
        return made

    def _judge(self, line: str, keys: KeySet) -> JudgedLine:
        plain = parse_plain(line)
        if plain is not None:
            name, digest, data = plain
            extended = self._hasher(data).digest()
            if self.policy is None:
                return JudgedLine(extended)
            return JudgedLine(extended, self.policy.unsigned_problem(name, digest))
        if not line.startswith(_IMA_PREFIX):
            pcr = pcr_of(line)
            if pcr is not None and pcr != IMA_PCR:
                return JudgedLine(extended=None)
        entry = parse_entry(line)
        if entry.violation:
            return JudgedLine(
                extended=self._ones, problem=self._violation_problem(entry), violation=True
            )
        extended = self.bank.digest(entry.data)
        if self.policy is None:
            return JudgedLine(extended=extended)
        verdict = self.policy.judge(entry, keys)
        needs = keys if self.policy.depends_on_keys(entry) else None
        return JudgedLine(
            extended=extended, problem=verdict.problem, needs=needs, keys=verdict.keys
        )

    def _violation_problem(self, entry: ImaEntry) -> str | None:
        if self.policy is None or self.violations is Violations.COUNT:
            return None
        return f"{shown(entry.path)} was written to while it was measured"


class LineWalk:
    """Goes through one host's list.

    Attributes:
        keys: the host's keys so far.
        is_open: the last entry's name may go on in the next line, because no hash proves its text.
    """

    def __init__(self, judge: LineJudge) -> None:
        self._judge = judge
        self.keys = judge.first_keys
        self.is_open = False
        self._open_chars = 0

    def step(self, lines: Sequence[str], at: int) -> tuple[JudgedLine | None, int]:
        """Judge the entry at a place.

        Returns:
            What it does, None for the rest of a name that no hash proves; and how many lines it
            takes.

        Raises:
            LogError: it cannot be read.
        """
        line = lines[at]
        if self.is_open and self._goes_on(line):
            return None, 1
        try:
            made, count = self._judge.judge(line, self.keys), 1
        except LogError:
            joined = self._joined(lines, at)
            if joined is None:
                raise
            made, count = joined
        if made.needs is not None:
            self.keys = made.keys
        self.is_open = made.violation or made.extended is None
        self._open_chars = 0
        return made, count

    def _goes_on(self, line: str) -> bool:
        self._open_chars += len(line) + 1
        return self._open_chars <= MAX_NAME_BYTES and not looks_like_entry(line)

    def _joined(self, lines: Sequence[str], at: int) -> tuple[JudgedLine, int] | None:
        """A name with line feeds splits an entry into several lines: the template hash shows which."""
        chars = len(lines[at])
        for end in range(at + 1, min(at + MAX_JOINED_LINES, len(lines))):
            chars += len(lines[end]) + 1
            if chars > MAX_LINE_CHARS:
                break
            try:
                made = self._judge.judge("\n".join(lines[at : end + 1]), self.keys)
            except LogError:
                continue
            return made, end + 1 - at
        return None
