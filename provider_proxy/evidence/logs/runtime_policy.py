"""Which files IMA may have measured: Keylime's runtime policy, the part without signatures.

Judges one entry of the list at a time; `ima` says which entries are proven. What would need signatures
or device-mapper rules is refused when the policy is read: to leave it out would judge other than
Keylime does. The policy is the tenant's own file, its patterns included; the paths come from the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from provider_proxy.errors import UsageError
from provider_proxy.evidence.logs.ima import BUFFER, ImaEntry, shown
from provider_proxy.evidence.strict_json import parse_own_json

BOOT_AGGREGATE = "boot_aggregate"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimePolicy:
    """Which files may have been measured.

    Attributes:
        digests: path to the digests that are good.
        excludes: paths that are not judged; matched from the beginning, as Keylime does.
        buffers: the same for names of `ima-buf` lines (keys that were loaded).
        ignored_keyrings: names of `ima-buf` lines that are not judged; "*" for all.
    """

    digests: Mapping[str, frozenset[bytes]]
    excludes: re.Pattern[str] | None = None
    buffers: Mapping[str, frozenset[bytes]] = field(default_factory=dict)
    ignored_keyrings: frozenset[str] = frozenset()

    def problem(self, entry: ImaEntry, index: int) -> str | None:
        """Why an entry is not allowed; None where it is.

        The first entry may be the boot aggregate: the kernel writes it before anything runs, and the
        boot PCRs say the same.
        """
        if index == 0 and entry.path == BOOT_AGGREGATE:
            return None
        if entry.template == BUFFER:
            if entry.path in self.ignored_keyrings or "*" in self.ignored_keyrings:
                return None
            allowed = self.buffers.get(entry.path)
        else:
            if self.excludes is not None and self.excludes.match(entry.path):
                return None
            allowed = self.digests.get(entry.path)
        if allowed is None:
            return f"{shown(entry.path)} is not in the runtime policy"
        if entry.violation:
            return f"{shown(entry.path)} was written to while it was measured"
        if entry.digest not in allowed:
            return f"{shown(entry.path)} has the digest {entry.digest.hex()}, which is not allowed"
        return None


_POLICY_KEYS = {
    *("meta", "release", "digests", "excludes", "keyrings", "ima", "ima-buf"),
    "verification-keys",
}


def parse_runtime_policy(data: bytes) -> RuntimePolicy:
    """Read Keylime's runtime policy (JSON).

    Raises:
        UsageError: not such a policy, or one that needs signatures or device-mapper rules, which are
            not judged here: to leave them out would accept or refuse other files than Keylime does.
    """
    values = parse_own_json(data, "the runtime policy")
    if not set(values) <= _POLICY_KEYS:
        raise UsageError("the runtime policy is not an object of Keylime's keys")
    options = values.get("ima") or {}
    if not isinstance(options, dict):
        raise UsageError("the runtime policy's ima is not an object")
    if values.get("verification-keys") or options.get("dm_policy"):
        raise UsageError("the runtime policy has verification-keys or dm_policy: not judged here")
    ignored = options.get("ignored_keyrings") or []
    excludes = values.get("excludes") or []
    if not _all_text(ignored) or not _all_text(excludes):
        raise UsageError("the runtime policy's excludes or ignored_keyrings are not lists of text")
    try:
        pattern = re.compile("|".join(f"(?:{text})" for text in excludes)) if excludes else None
    except re.error as exc:
        raise UsageError(f"the runtime policy's excludes: {exc}") from exc
    buffers = {
        **_digest_lists(values.get("keyrings"), "keyrings"),
        **_digest_lists(values.get("ima-buf"), "ima-buf"),
    }
    return RuntimePolicy(
        digests=_digest_lists(values.get("digests"), "digests"),
        excludes=pattern,
        buffers=buffers,
        ignored_keyrings=frozenset(ignored),
    )


def _all_text(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(text, str) for text in values)


def _digest_lists(values: object, what: str) -> dict[str, frozenset[bytes]]:
    found: dict[str, frozenset[bytes]] = {}
    if values is None:
        return found
    if not isinstance(values, dict):
        raise UsageError(f"the runtime policy's {what} is not an object")
    for path, digests in values.items():
        if not _all_text(digests):
            raise UsageError(f"the runtime policy's {what} of {shown(path)} is not a list of hex")
        try:
            found[path] = frozenset(bytes.fromhex(text) for text in digests)
        except ValueError as exc:
            raise UsageError(f"the runtime policy's {what} of {shown(path)}: no hex") from exc
    return found
