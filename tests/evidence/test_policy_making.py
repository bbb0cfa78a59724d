"""What a policy is made of, what a merged one says, and how it is put into words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ima_helpers import BAD, GOOD, line

from provider_proxy.errors import UsageError
from provider_proxy.evidence.logs import policy_making
from provider_proxy.evidence.logs.event_log import EV_NO_ACTION, BootEvent
from provider_proxy.evidence.logs.ima_line import parse_entry
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import HashAlg

SHA256 = HashAlg.SHA256


def made(hashed: str = "sha1", *excludes: str) -> dict[str, Any]:
    lines = [line("/a", hashed=hashed), line("/b", BAD, hashed=hashed), line("/a", hashed=hashed)]
    return policy_making.make_runtime_policy([parse_entry(x.text) for x in lines], excludes)


@pytest.mark.parametrize("hashed", ["sha1", "sha256", "sha384", "sha512"])
def test_a_runtime_policy_is_keylimes(hashed: str) -> None:
    assert made(hashed) == {
        "meta": {"version": 1, "generator": 3},
        "release": 0,
        "digests": {"/a": [GOOD], "/b": [BAD]},
        "excludes": [],
        "keyrings": {},
        "ima": {"ignored_keyrings": [], "log_hash_alg": hashed, "dm_policy": None},
        "ima-buf": {},
        "verification-keys": "",
    }
    assert policy_making.make_runtime_policy([])["ima"]["log_hash_alg"] == "sha1"


def test_lists_of_several_kinds_make_no_policy() -> None:
    entries = [parse_entry(line(hashed=h).text) for h in ("sha1", "sha256")]
    with pytest.raises(UsageError, match="several kinds"):
        policy_making.make_runtime_policy(entries)


def test_entries_of_other_pcrs_are_left_out() -> None:
    lines = [line("/a").text, line("/other", pcr=11).text, line("/n\nm").text]
    flat = "\n".join(lines).split("\n")
    assert [e.path for e in policy_making.entries_of(flat, SHA256)] == ["/a", "/n\nm"]


def test_a_boot_policy_has_the_digests_of_its_pcrs() -> None:
    def event(pcr: int, data: bytes, kind: int = 4) -> BootEvent:
        return BootEvent(pcr=pcr, kind=kind, digests={SHA256: SHA256.digest(data)}, data=data)

    events = [event(0, b"a"), event(0, b"b", EV_NO_ACTION), event(5, b"c"), event(0, b"a")]
    policy = policy_making.make_boot_policy(events, SHA256, 0b11)
    assert policy == {"0": [SHA256.digest(b"a").hex()], "1": []}


def test_pcrs_without_a_lasting_value() -> None:
    assert policy_making.MOVING_PCRS == 1 << 10 | 1 << 16 | 1 << 23


def keys(*pairs: tuple[int, str], ids: int | None = None) -> str:
    numbers = [number for number, _ in pairs][:ids]
    return json.dumps({"keyids": numbers, "pubkeys": [key for _, key in pairs]})


def test_merged_keys_are_each_there_once() -> None:
    one = made() | {"verification-keys": keys((1, "A"), (2, "B"))}
    two = made() | {"verification-keys": keys((2, "B"), (3, "B"), (9, "C"), ids=2)}
    merged, _ = policy_making.merge([one, two, made()])
    assert json.loads(merged["verification-keys"]) == {
        "meta": {"version": 1},
        "keyids": [1, 2, 3, 0],
        "pubkeys": ["A", "B", "B", "C"],
    }
    assert policy_making.merge([made(), made()])[0]["verification-keys"] == ""


def test_merged_options_are_those_of_all() -> None:
    one, two, bare = made("sha1", "/x"), made("sha1", "/y", "/x"), made()
    one |= {"release": 4}
    two |= {"release": 2}
    one["ima"] = {"ignored_keyrings": [".a", ".b"]}
    two["ima"] = {"ignored_keyrings": [".b", ".c"], "log_hash_alg": "sha1"}
    bare["ima"] = None
    del bare["release"]
    merged, lost = policy_making.merge([one, two, bare])
    assert (merged["release"], merged["excludes"], lost) == (4, ["/x", "/y"], [])
    assert merged["ima"]["ignored_keyrings"] == [".a", ".b", ".c"]
    assert merged["digests"] == {"/a": [GOOD], "/b": [BAD]}
    assert policy_making.merge([bare, bare])[0]["release"] == 0


def words(**values: Any) -> str:
    policy = parse_runtime_policy(json.dumps({"digests": {}} | values).encode())
    return "\n".join(policy_making.explain_runtime(policy))


def test_a_runtime_policy_in_words() -> None:
    plain = words()
    assert "Files: none may" in plain
    assert "boot_aggregate is not listed" in plain
    for part in ("Not judged", "has signed them", "Keys:", "Keys in the keyrings", "Other buffers"):
        assert part not in plain
    names = {f"/{n}": [GOOD] for n in range(5)}
    assert "Files: /0, /1, /2, /3, /4 may" in words(digests=names)
    names["/5"] = [GOOD]
    assert "Files: 6 names (/0, /1, /2, /3, /4, …) may" in words(digests=names)
    assert "one of 2 known states" in words(digests={"boot_aggregate": [GOOD, BAD]})
    assert "names that match '(/tmp/)' from" in words(excludes=["/tmp/"])
    assert "Keys: .ima may be loaded" in words(keyrings={".ima": [GOOD]})
    assert "keyrings .a, .b are not judged" in words(ima={"ignored_keyrings": [".b", ".a"]})
    assert "Other buffers: dm may be measured" in words(**{"ima-buf": {"dm": [GOOD]}})


def test_other_policies_in_words() -> None:
    values = {"10": [GOOD, BAD, "11" * 20], "mask": "0x404", "2": GOOD, "3": ["22" * 48, BAD]}
    assert list(policy_making.explain_tpm(values, HashAlg.SHA256)) == [
        f"PCR 2 must be {GOOD}.",
        f"PCR 3 must be {BAD}.",
        "PCR 10 must be one of 2 values.",
    ]
    boot = list(policy_making.explain_boot({4: frozenset((b"a", b"b")), 1: frozenset()}))
    assert boot[1] == "PCR 1: never extended."
    assert "nothing but 2 known digests" in boot[2]
