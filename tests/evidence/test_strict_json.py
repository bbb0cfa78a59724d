"""JSON from any writer is read in one way only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from provider_proxy.errors import EvidenceFormatError, UsageError
from provider_proxy.evidence.logs import policy_making
from provider_proxy.evidence.logs.boot_policy import parse_boot_policy
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.policy import parse_tpm_policy
from provider_proxy.evidence.strict_json import (
    MAX_DEPTH,
    MAX_PARTS,
    parse_json_object,
    parse_own_json,
)
from provider_proxy.tenant.keylime import KeylimePolicies
from provider_proxy.tenant.policies import PolicyFiles

GOOD, BAD = "11" * 32, "22" * 32

REFUSED = [
    (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
    (b'{"b": 0, "a": 1, "c": 0, "a": 2}', "has the key 'a' twice"),
    (b'{"%b": 1, "%b": 2}' % (b"a" * 81, b"a" * 81), f"has the key '{'a' * 80}' twice"),
    (b'{"a": 1%be999}' % (b"0" * 90), f"holds the number 1{'0' * 79}, which"),
    (b'{"b": {"a": 1, "\\u0061": 2}}', "has the key 'a' twice"),
    (b'{"a": NaN}', "holds NaN"),
    (b'{"a": -Infinity}', "holds -Infinity"),
    (b'{"a": 1e999}', "holds the number 1e999"),
    (b"[1]", "is not a JSON object"),
    (b"", "is not JSON in UTF-8"),
    (b'{"a": "\xff"}', "is not JSON in UTF-8: byte 7"),
    ('{"a": 1}'.encode("utf-16"), "is not JSON in UTF-8"),
    (b'{"a": 1} {"a": 1}', "is not JSON in UTF-8: Extra data"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, "is nested too deeply"),
    (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON in UTF-8"),
]


@pytest.mark.parametrize(("data", "words"), REFUSED)
def test_both_readers_refuse_the_same(data: bytes, words: str) -> None:
    with pytest.raises(EvidenceFormatError, match=r"^the answer") as theirs:
        parse_json_object(data, "the answer")
    assert words in str(theirs.value)
    with pytest.raises(UsageError, match=r"^the policy") as own:
        parse_own_json(data, "the policy")
    assert words in str(own.value)


def test_the_number_of_parts_is_bounded() -> None:
    assert MAX_PARTS == 100_000
    separators = b'"' + b"," * MAX_PARTS + b'"'  # in quotes they part nothing
    for first in (b"1", separators):
        most = b'{"a":[' + first + b",1" * (MAX_PARTS - 3) + b"]}"  # with the brackets one less
        assert len(str(parse_json_object(most, "the answer"))) > MAX_PARTS
        with pytest.raises(EvidenceFormatError, match="too many parts"):
            parse_json_object(most.replace(b"]", b",1]"), "the answer")


@pytest.mark.parametrize(("opened", "closed"), [('{"a":', "}"), ('{"a":[', "]}")])
def test_the_depth_is_bounded_on_every_python(opened: str, closed: str) -> None:
    times = MAX_DEPTH // (2 if "[" in opened else 1)
    value = parse_json_object((opened * times + "1" + closed * times).encode(), "the answer")
    assert list(value) == ["a"]
    times += 1
    with pytest.raises(EvidenceFormatError, match="nested too deep"):
        parse_json_object((opened * times + "1" + closed * times).encode(), "the answer")


def test_what_is_wide_is_not_deep() -> None:
    assert len(parse_json_object(b'{"a": [%b[]]}' % (b"[]," * 500), "the answer")["a"]) == 501  # type: ignore[arg-type]


def test_what_comes_over_a_network_has_few_parts() -> None:
    data = json.dumps({"a": [[]] * MAX_PARTS}).encode()
    with pytest.raises(EvidenceFormatError, match="too many parts"):
        parse_json_object(data, "the answer")
    assert len(parse_own_json(data, "the policy")["a"]) == MAX_PARTS


@pytest.mark.parametrize("part", ["1", "{}", '""', '","', "[]"])
def test_parts_of_every_kind_are_counted(part: str) -> None:
    data = ('{"a": [' + ",".join([part] * (MAX_PARTS + 1)) + "]}").encode()
    with pytest.raises(EvidenceFormatError, match="too many parts"):
        parse_json_object(data, "the answer")
    few = ('{"a": [' + ",".join([part] * (MAX_PARTS // 3)) + "]}").encode()
    assert len(parse_json_object(few, "the answer")["a"]) == MAX_PARTS // 3  # type: ignore[arg-type]


def test_text_is_one_part_whatever_it_holds() -> None:
    """Names of files in an IMA list: commas, braces, quotes and backslashes."""
    text = '/mail/cur/1.host:2,S {"[\\"\\' * MAX_PARTS
    assert parse_json_object(json.dumps({"a": text}).encode(), "the answer") == {"a": text}


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf{}", "\ufeff{}"])
def test_a_byte_order_mark_is_named(data: bytes | str) -> None:
    with pytest.raises(UsageError, match="begins with a byte order mark: save it"):
        parse_own_json(data, "the policy")


def test_a_message_about_a_key_is_short_and_printable() -> None:
    key = "\x1b[2J" + "k" * 5000
    with pytest.raises(EvidenceFormatError) as caught:
        parse_json_object(
            json.dumps({"a": 1}).encode()[:-1]
            + f",{json.dumps(key)}:1,{json.dumps(key)}:2}}".encode(),
            "the answer",
        )
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


TPM = f'{{"0": ["{BAD}"], "0": ["{GOOD}"]}}'
RUNTIME = f'{{"digests": {{"/bin/sh": ["{BAD}"], "/bin/sh": ["{GOOD}"]}}}}'


def test_no_policy_takes_the_last_of_two_equal_keys(tmp_path: Path) -> None:
    """Keylime's own reader takes the last; a person who reviews the file sees the first."""
    with pytest.raises(UsageError, match="has the key '0' twice"):
        parse_boot_policy(TPM.encode(), bank=HashAlg.SHA256)
    with pytest.raises(UsageError, match="has the key '/bin/sh' twice"):
        parse_runtime_policy(RUNTIME.encode())
    with pytest.raises(UsageError, match="the tpm policy has the key '0' twice"):
        KeylimePolicies(tpm=TPM)
    with pytest.raises(UsageError, match="the runtime policy has the key '/bin/sh' twice"):
        KeylimePolicies(runtime=RUNTIME)
    with pytest.raises(UsageError, match="the measured-boot policy has the key 'a' twice"):
        KeylimePolicies(measured_boot='{"a": 1, "a": 2}')
    path = tmp_path / "policy.json"
    path.write_text(TPM)
    with pytest.raises(UsageError, match=r"policy\.json: the policy has the key '0' twice"):
        PolicyFiles().tpm(path, HashAlg.SHA256)
    assert parse_tpm_policy({"0": GOOD}).needed_mask == 1


def test_keys_of_runtime_policies_that_are_merged_are_read_strictly() -> None:
    keys = '{"keyids": [], "pubkeys": [], "pubkeys": ["x"]}'
    with pytest.raises(UsageError, match="verification-keys has the key 'pubkeys' twice"):
        policy_making._merge_keys([{"verification-keys": keys}])
