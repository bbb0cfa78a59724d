"""Makes policies from what golden hosts have proven, merges them, and says in words what they demand.

What goes in was replayed to signed PCRs before, or is a policy that a person wrote; what comes out is
JSON values that the readers of policies take. A merged policy accepts what one of its parts accepts, for
the days in which some hosts have an update and others do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs.event_log import EV_NO_ACTION, BootEvent
from provider_proxy.evidence.logs.ima_judge import IMA_PCR, LineJudge, LineWalk
from provider_proxy.evidence.logs.ima_keys import key_in_buffer
from provider_proxy.evidence.logs.ima_line import BUFFER, ImaEntry, parse_entry, shown
from provider_proxy.evidence.logs.runtime_policy import RuntimePolicy
from provider_proxy.evidence.logs.runtime_policy_file import pattern_of
from provider_proxy.evidence.model import HashAlg, VerifiedQuote, pcrs_of
from provider_proxy.evidence.strict_json import parse_own_json

Policy = dict[str, Any]
LISTS = ("digests", "keyrings", "ima-buf")
GENERATOR = 3  # LegacyAllowList: what Keylime's own tool writes, and what its verifiers judge by
LOG_HASHES = {20: "sha1", 32: "sha256", 48: "sha384", 64: "sha512"}
MOVING_PCRS = (
    1 << IMA_PCR | 1 << 16 | 1 << 23
)  # they change while a host runs, or any user can reset them
SHOWN_NAMES = 5


def entries_of(lines: Sequence[str], bank: HashAlg) -> Iterator[ImaEntry]:
    """The entries of PCR 10 in a list, those with line feeds in their names joined.

    Raises:
        LogError: a line cannot be read.
    """
    walk, at = LineWalk(LineJudge(bank)), 0
    while at < len(lines):
        made, count = walk.step(lines, at)
        if made is not None and made.extended is not None:
            yield parse_entry("\n".join(lines[at : at + count]))
        at += count


def make_runtime_policy(entries: Iterable[ImaEntry], excludes: Sequence[str] = ()) -> Policy:
    """Keylime's runtime policy that allows these entries.

    Violations are left out: nothing vouches for what they say.

    Args:
        excludes: patterns of names that are not judged; their entries are not listed.

    Raises:
        UsageError: the entries have template hashes of several kinds, or an exclude is invalid.
    """
    policy = _empty_runtime_policy(list(excludes))
    pattern = pattern_of(list(excludes))
    widths = set()
    for entry in entries:
        widths.add(len(entry.template_hash))
        if entry.violation or (pattern is not None and pattern.match(entry.path)):
            continue
        part = "digests" if entry.template != BUFFER else _list_of(entry)
        listed = policy[part].setdefault(entry.path, [])
        if entry.digest.hex() not in listed:
            listed.append(entry.digest.hex())
    if len(widths) > 1:
        raise UsageError(
            "the IMA lists have template hashes of several kinds: make one policy for each kind"
        )
    if widths:
        policy["ima"]["log_hash_alg"] = LOG_HASHES[widths.pop()]
    return policy


def _list_of(entry: ImaEntry) -> str:
    try:
        return "ima-buf" if key_in_buffer(entry.extra) is None else "keyrings"
    except LogError:
        return "keyrings"  # a key that signs no files: it is listed, and stays refused


def _empty_runtime_policy(excludes: list[str]) -> Policy:
    return {
        "meta": {"version": 1, "generator": GENERATOR},
        "release": 0,
        "digests": {},
        "excludes": excludes,
        "keyrings": {},
        "ima": {"ignored_keyrings": [], "log_hash_alg": "sha1", "dm_policy": None},
        "ima-buf": {},
        "verification-keys": "",
    }


def make_boot_policy(events: Iterable[BootEvent], bank: HashAlg, mask: int) -> Policy:
    """The boot policy that allows these events: the PCRs of a mask, each with its digests."""
    policy: Policy = {str(pcr): [] for pcr in pcrs_of(mask)}
    for event in events:
        listed = policy.get(str(event.pcr))
        if event.kind == EV_NO_ACTION or listed is None:
            continue
        digest = event.digests[bank].hex()
        if digest not in listed:
            listed.append(digest)
    return policy


def make_tpm_policy(quote: VerifiedQuote, mask: int) -> Policy:
    """The `tpm_policy` of a quote's PCRs that are in a mask."""
    return {str(pcr): [value.hex()] for pcr, value in quote.pcrs.items() if mask >> pcr & 1}


def merge(policies: Sequence[Policy]) -> tuple[Policy, list[str]]:
    """A policy that accepts what one of some policies of one kind accepts.

    Returns:
        It, and what it lost: PCRs that not all of them name.

    Raises:
        UsageError: they are of several kinds, or contradict each other.
    """
    kinds = {is_runtime(policy) for policy in policies}
    if len(kinds) != 1:
        raise UsageError("a runtime policy can only be merged with runtime policies")
    return (_merge_runtime(policies), []) if kinds.pop() else _merge_pcrs(policies)


def is_runtime(policy: Mapping[str, Any]) -> bool:
    """Whether this is a runtime policy, and not one of PCRs."""
    return not all(key.isdecimal() or key == "mask" for key in policy)


def _merge_pcrs(policies: Sequence[Policy]) -> tuple[Policy, list[str]]:
    named = [set(policy) - {"mask"} for policy in policies]
    both = set.intersection(*named)
    if not both:
        raise UsageError("the policies have no PCR in common: together they demand nothing")
    merged: Policy = {}
    for pcr in sorted(both, key=int):
        values = [policy[pcr] for policy in policies]
        if any(value == [] for value in values) and any(values):
            raise UsageError(f"PCR {pcr} must not be extended in one policy, and must in another")
        merged[pcr] = _union(v if isinstance(v, list) else [v] for v in values)
    lost = sorted(set.union(*named) - both, key=int)
    return merged, [
        f"PCR {pcr} is not in all of the policies: the merged policy does not check it"
        for pcr in lost
    ]


def _merge_runtime(policies: Sequence[Policy]) -> Policy:
    merged = _empty_runtime_policy(_union(p.get("excludes") or [] for p in policies))
    hashes = {(p.get("ima") or {}).get("log_hash_alg") or "sha1" for p in policies}
    if len(hashes) > 1:
        raise UsageError(
            "the policies have different values of log_hash_alg: they are for different kinds of lists"
        )
    merged["release"] = max(p.get("release") or 0 for p in policies)
    merged["ima"]["log_hash_alg"] = hashes.pop()
    merged["ima"]["ignored_keyrings"] = _union(
        (p.get("ima") or {}).get("ignored_keyrings") or [] for p in policies
    )
    for part in LISTS:
        for policy in policies:
            for name, digests in (policy.get(part) or {}).items():
                merged[part][name] = _union((merged[part].get(name, []), digests))
    merged["verification-keys"] = _merge_keys(policies)
    return merged


def _merge_keys(policies: Sequence[Policy]) -> str:
    ids: list[int] = []
    keys: list[str] = []
    for policy in policies:
        if policy.get("verification-keys"):
            values = parse_own_json(policy["verification-keys"], "verification-keys")
            for place, key in enumerate(values["pubkeys"]):
                key_id = values["keyids"][place] if place < len(values["keyids"]) else 0
                if (key_id, key) not in zip(ids, keys, strict=True):
                    ids.append(key_id)
                    keys.append(key)
    if not keys:
        return ""
    return json.dumps({"meta": {"version": 1}, "keyids": ids, "pubkeys": keys})


def _union(lists: Iterable[Sequence[Any]]) -> list[Any]:
    return list(dict.fromkeys(item for values in lists for item in values))


# --- in words -------------------------------------------------------------------------------------------


def explain_runtime(policy: RuntimePolicy) -> Iterator[str]:
    """What a runtime policy demands of a host."""
    yield "PCR 10 must have been extended, and the IMA list must lead to it."
    yield f"Files: {_names(policy.digests)} may have been measured, with the digests listed."
    if "boot_aggregate" in policy.digests:
        count = len(policy.digests["boot_aggregate"])
        yield f"boot_aggregate: the boot PCRs may be one of {count} known states."
    else:
        yield "boot_aggregate is not listed: every host is refused, because each list begins with it."
    if policy.excludes is not None:
        yield (
            f"Not judged: names that match {policy.excludes.pattern!r} from their beginning. A host may "
            "measure any file under such a name."
        )
    if policy.keys:
        ids = ", ".join(sorted(f"{key.id:08x}" for key in policy.keys))
        yield f"Files that are not listed are allowed where one of the keys {ids} has signed them."
    if policy.keyrings:
        yield (
            f"Keys: {_names(policy.keyrings)} may be loaded, with the digests listed; files that such a "
            "key has signed are allowed from then on."
        )
    if policy.ignored_keyrings:
        names = ", ".join(sorted(map(shown, policy.ignored_keyrings)))
        yield f"Keys in the keyrings {names} are not judged, and their signatures do not allow files."
    if policy.buffers:
        yield f"Other buffers: {_names(policy.buffers)} may be measured, with the digests listed."
    yield "Anything else is refused. Violations are refused, or counted where ima_violations says so."


def explain_boot(allowed: Mapping[int, frozenset[bytes]]) -> Iterator[str]:
    """What a boot policy demands of the firmware's event log."""
    yield "The firmware's event log must lead to the PCRs below, as the TPM signed them."
    for pcr, digests in sorted(allowed.items()):
        if digests:
            yield (
                f"PCR {pcr}: extended at least once, and with nothing but {len(digests)} known digests, "
                "in any order and number."
            )
        else:
            yield f"PCR {pcr}: never extended."


def explain_tpm(values: Mapping[str, Any], bank: HashAlg) -> Iterator[str]:
    """What a `tpm_policy` demands of a bank's PCRs: values of other banks match nothing."""
    for pcr, digests in sorted(
        ((int(key), v) for key, v in values.items() if key != "mask"), key=lambda item: item[0]
    ):
        every = digests if isinstance(digests, list) else [digests]
        listed = [digest for digest in every if len(digest) == 2 * bank.digest_bytes]
        known = f"one of {len(listed)} values" if len(listed) > 1 else f"{listed[0]}"
        yield f"PCR {pcr} must be {known}."


def _names(lists: Mapping[str, frozenset[str]]) -> str:
    if not lists:
        return "none"
    names = sorted(lists)
    first = ", ".join(map(shown, names[:SHOWN_NAMES]))
    return first if len(names) <= SHOWN_NAMES else f"{len(names)} names ({first}, …)"
