"""Which files IMA may have measured: Keylime's runtime policy, judged line by line as Keylime judges.

Judges one entry of the list at a time; `ima` says which entries are proven, and `runtime_policy_file`
reads the policy. A key that a host measures into a listed keyring counts: files that this key signed
are allowed from that line on. The policy is the tenant's own file, its patterns included; names, digests,
signatures and keys in the list come from the host.
docs/policies.md lists the intended differences from Keylime 7.14.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from provider_proxy.errors import LogError
from provider_proxy.evidence.logs.ima_keys import (
    MAX_KEYS,
    NO_KEYS,
    FileKey,
    KeySet,
    is_signed,
    key_in_buffer,
)
from provider_proxy.evidence.logs.ima_line import BUFFER, ImaEntry, shown

EVERY_KEYRING = "*"
_SIGNED_TEMPLATES = frozenset(("ima-sig", "ima-sigv2", "ima-modsig"))

DigestLists = Mapping[str, frozenset[str]]
"""Names to the digests that are good, in lower-case hex."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a policy says of one entry.

    Attributes:
        problem: why it is not allowed; None where it is.
        keys: the host's keys after it.
    """

    problem: str | None
    keys: KeySet


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimePolicy:
    """Which files may have been measured.

    Attributes:
        digests: paths to the digests that are good.
        excludes: names that are not judged; matched from the beginning, as Keylime does.
        keyrings: the same as `digests` for keys that were loaded, by the keyring's name.
        buffers: the same for other buffers that were measured.
        ignored_keyrings: keyrings whose keys are not judged, and not learned; "*" for all.
        keys: that may have signed files.
    """

    digests: DigestLists
    excludes: re.Pattern[str] | None = None
    keyrings: DigestLists = field(default_factory=dict)
    buffers: DigestLists = field(default_factory=dict)
    ignored_keyrings: frozenset[str] = frozenset()
    keys: KeySet = NO_KEYS

    def judge(self, entry: ImaEntry, keys: KeySet) -> Verdict:
        """What is wrong with an entry, and the keys that the host has after it.

        Does not check: whether it is a violation, whose name and digest mean nothing.

        Args:
            keys: those of the policy, and those that the host has measured before.
        """
        if entry.template == BUFFER:
            return self._judge_buffer(entry, keys)
        return Verdict(problem=self._file_problem(entry, keys), keys=keys)

    def depends_on_keys(self, entry: ImaEntry) -> bool:
        """Whether the verdict may change with other keys."""
        return bool(entry.extra)

    def unsigned_problem(self, name: str, digest: str) -> str | None:
        """Why a file without a signature is not allowed; None where it is.

        Args:
            digest: in hex.
        """
        return self._list_problem(name, digest, self.digests)

    def _file_problem(self, entry: ImaEntry, keys: KeySet) -> str | None:
        if not entry.extra or entry.template not in _SIGNED_TEMPLATES:
            return self.unsigned_problem(entry.path, entry.digest.hex())
        # A signature proves as much as a list does, and costs more: it is looked at last.
        if entry.digest.hex() in self.digests.get(entry.path, ()):
            return None
        if self.excludes is not None and self.excludes.match(entry.path):
            return None
        if is_signed(entry.extra, entry.digest, entry.algorithm, keys):
            return None
        problem = self.unsigned_problem(entry.path, entry.digest.hex())
        return f"{problem}, and no trusted key has signed it"

    def _judge_buffer(self, entry: ImaEntry, keys: KeySet) -> Verdict:
        try:
            key = key_in_buffer(entry.extra)
        except LogError as exc:
            return Verdict(problem=f"{shown(entry.path)}: {exc}", keys=keys)
        if key is None:
            return Verdict(problem=self._buffer_problem(entry, self.buffers), keys=keys)
        if EVERY_KEYRING in self.ignored_keyrings or entry.path in self.ignored_keyrings:
            return Verdict(problem=None, keys=keys)
        problem = self._buffer_problem(entry, self.keyrings)
        if problem is not None:
            return Verdict(problem=problem, keys=keys)
        return self._learn(key, keys)

    def _learn(self, key: FileKey, keys: KeySet) -> Verdict:
        if len(keys) >= MAX_KEYS and key not in keys:
            return Verdict(problem=f"more than {MAX_KEYS} keys were loaded", keys=keys)
        return Verdict(problem=None, keys=keys | {key})

    def _buffer_problem(self, entry: ImaEntry, lists: DigestLists) -> str | None:
        return self._list_problem(entry.path, entry.digest.hex(), lists)

    def _list_problem(self, name: str, digest: str, lists: DigestLists) -> str | None:
        if self.excludes is not None and self.excludes.match(name):
            return None
        allowed = lists.get(name)
        if allowed is None:
            return f"{shown(name)} is not in the runtime policy{self._where(lists)}"
        if digest not in allowed:
            return f"{shown(name)} has the digest {digest}, which is not allowed"
        return None

    def _where(self, lists: DigestLists) -> str:
        if lists is self.keyrings:
            return "'s keyrings"
        return "'s ima-buf" if lists is self.buffers else ""

    def names(self) -> Iterator[str]:
        """Every name that has a list of digests."""
        yield from self.digests
        yield from self.keyrings
        yield from self.buffers
