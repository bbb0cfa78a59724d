"""The kernel's IMA list, replayed to the PCR 10 that the TPM signed.

The list is unsigned text; only the replay proves it. The PCR's value is computed line by line, and the
prefix that leads to the signed value is proven. What follows was measured after the quote and proves
nothing yet. Lines of other PCRs are counted and passed over.

Invariants: no line counts as seen before a signed value confirmed it; a line that the policy does not
allow is not forgotten until the list begins from the start; a PCR 10 that was never extended proves
nothing and is refused; whatever bytes come in, only `LogError` comes out.
Source: the kernel's security/integrity/ima (5.8 and later: before that, other banks got padded SHA-1).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from provider_proxy.errors import LogError
from provider_proxy.evidence.logs.ima_judge import LineJudge, LineWalk
from provider_proxy.evidence.logs.ima_keys import KeySet
from provider_proxy.evidence.logs.ima_line import BOOT_AGGREGATE

MAX_PARTS = 64  # answers until one list is complete: of 7 MB each, two and a half million lines
CHUNK_CHARS = 16 * 1024  # between two chances for others to run: a hundred lines, about 1 ms


class Outcome(enum.Enum):
    """What an answer's part of the list led to."""

    MATCHED = enum.auto()
    MORE = enum.auto()  # ask again, from `ImaReplay.next_entry`


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayState:
    """How far a host's list is proven; enough to go on from there, in another process too.

    Attributes:
        next_entry: lines that are proven.
        value: of PCR 10 behind them.
        keys: that the host has measured, and those of the policy.
        problem: the first line that is not allowed, and why; None where all are.
        is_open: the last line's name may go on.
    """

    next_entry: int
    value: bytes
    keys: KeySet
    violations: int
    others: int
    problem: str | None = None
    is_open: bool = False


class ImaReplay:
    """One host's list, over many answers.

    Args:
        judge: says what each line extends, and whether it is allowed; hosts may share one.
        state: how far an earlier replay with the same policy had come.

    Attributes:
        next_entry: what to ask for next, as `ima_ml_entry`.
        violations: entries so far that IMA recorded as violations: their digest means nothing.
        others: lines so far of other PCRs.
        outcome: of the last `offer` that was run to its end.
        confirmed: the state that the last signed value confirmed; None before the first.
    """

    def __init__(self, judge: LineJudge, *, state: ReplayState | None = None) -> None:
        self._judge = judge
        self._bank = judge.bank
        self.outcome = Outcome.MORE
        self.restart()
        if state is not None and len(state.value) == self._bank.digest_bytes:
            self._resume(state)

    def restart(self) -> None:
        """Forget the list; the next answer must hold it from its beginning."""
        self._walk = LineWalk(self._judge)
        self._value = bytes(self._bank.digest_bytes)
        self._from_zero = True
        self._parts = 0
        self._problem: str | None = None
        self._first: str | None = None
        self.next_entry = 0
        self.violations = 0
        self.others = 0
        self.confirmed: ReplayState | None = None

    def _resume(self, state: ReplayState) -> None:
        self._walk.keys, self._walk.is_open = state.keys, state.is_open
        self._value = state.value
        self._from_zero = False
        self._problem = state.problem
        self.next_entry = state.next_entry
        self.violations, self.others = state.violations, state.others
        self.confirmed = state

    def offer(self, text: str | None, entry: int, quoted: bytes) -> Iterator[None]:
        """Replay an answer's part of the list; a generator that pauses between chunks of lines.

        Args:
            text: whole lines from `entry` on, untrusted; None where the answer has no list.
            quoted: the signed PCR 10 of the same answer.

        Raises:
            LogError: the list does not lead to the signed value, or holds what is not allowed. The
                list is then asked for from its beginning, or the problem is remembered.
        """
        if text is None:
            raise LogError("the answer has PCR 10 and no IMA list")
        if entry != self.next_entry:
            if entry != 0:
                raise LogError("the IMA list does not begin at the entry that was asked for")
            self.restart()  # the host has rebooted: its list is shorter than what we had
        lines = text.split("\n")
        if lines.pop():
            self.restart()
            raise LogError("the IMA list ends within a line")
        if self.next_entry == 0 and lines:
            self._first = lines[0]
        at = 0
        while at < len(lines) and self._value != quoted:
            try:
                at = self._chunk(lines, at, quoted)
            except LogError:
                self.restart()
                raise
            if at < len(lines):
                yield
        self._settle(self._value == quoted, bool(lines))

    def _chunk(self, lines: Sequence[str], at: int, quoted: bytes) -> int:
        """Take some lines, up to the one that leads to the signed value; return where the next begin."""
        walk, hasher, value = self._walk, self._bank.hasher, self._value
        begin, chars = at, 0
        while at < len(lines) and chars <= CHUNK_CHARS:
            line = lines[at]
            chars += len(line)
            usual = None if walk.is_open else self._judge.usual.get(line)
            if usual is not None:
                at += 1
                value = hasher(value + usual).digest()
                if value == quoted:
                    break
                continue
            made, count = walk.step(lines, at)
            at += count
            if made is None:
                continue
            if made.extended is None:
                self.others += 1
                continue
            if made.problem is not None and self._problem is None:
                self._problem = f"IMA entry {self.next_entry + at - count - begin}: {made.problem}"
            self.violations += made.violation
            value = hasher(value + made.extended).digest()
            if value == quoted:
                break
        self._value = value
        self.next_entry += at - begin
        return at

    def _settle(self, matched: bool, has_lines: bool) -> None:
        """Confirm the lines that were taken, or set what to ask for next."""
        if matched:
            self.outcome = Outcome.MATCHED
            self._confirm()
            return
        self.outcome = Outcome.MORE
        self._parts += 1
        if has_lines and self._parts < MAX_PARTS:
            return  # an answer holds a bounded part of a long list
        incremental, reason = not self._from_zero, self._reason(has_lines)
        self.restart()
        if not incremental:
            raise LogError(reason)

    def _confirm(self) -> None:
        self._from_zero = False
        self._parts = 0
        if not any(self._value):  # not even the boot aggregate
            raise LogError("PCR 10 was never extended: the host's kernel measures nothing")
        self.confirmed = ReplayState(
            next_entry=self.next_entry,
            value=self._value,
            keys=self._walk.keys,
            violations=self.violations,
            others=self.others,
            problem=self._problem,
            is_open=self._walk.is_open,
        )
        if self._problem is not None:
            raise LogError(self._problem)

    def _reason(self, has_lines: bool) -> str:
        """Why a list that was read from its beginning is refused."""
        if has_lines:
            return (
                f"the IMA list does not lead to the signed PCR 10 within {MAX_PARTS} answers: a list of "
                f"more than {self.next_entry} lines is not judged"
            )
        reason = "the IMA list does not lead to the signed PCR 10"
        if self._first is not None and f" {BOOT_AGGREGATE}" not in self._first:
            reason += (
                "; its first entry is not boot_aggregate: the beginning of the list is missing, "
                "and the host cannot be judged until it reboots"
            )
        return reason
