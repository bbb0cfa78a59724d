"""The IMA list's replay: true and tampered lists, in parts, violations, allow-lists, any bytes.

The lists are made here from the kernel's own rules (template data, SHA-1, extend) with hashlib alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ima_helpers import (
    BAD,
    BUFFER,
    GOOD,
    HOST,
    Line,
    certificate,
    field,
    line,
    pcr10,
    text,
)

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs.ima import CHUNK_CHARS, MAX_PARTS, ImaReplay, Outcome
from provider_proxy.evidence.logs.ima_judge import LineJudge, Violations
from provider_proxy.evidence.logs.ima_line import MAX_LINE_CHARS, parse_entry
from provider_proxy.evidence.logs.runtime_policy import RuntimePolicy
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import HashAlg


def policy(**values: Any) -> bytes:
    return json.dumps({"meta": {"version": 1}, "release": 0, **values}).encode()


def replaying(
    bank: HashAlg = HashAlg.SHA256,
    policy: RuntimePolicy | None = None,
    violations: Violations = Violations.REFUSE,
) -> ImaReplay:
    return ImaReplay(LineJudge(bank, policy, violations=violations))


def offer(replay: ImaReplay, part: str | None, entry: int, quoted: bytes) -> Outcome:
    for _ in replay.offer(part, entry, quoted):
        pass
    return replay.outcome


@pytest.mark.parametrize("bank", list(HashAlg))
def test_a_true_list_leads_to_the_signed_value(bank: HashAlg) -> None:
    replay = replaying(bank)
    assert offer(replay, text(HOST), 0, pcr10(HOST, bank)) is Outcome.MATCHED
    assert replay.next_entry == len(HOST)
    assert replay.violations == 1


def test_what_came_after_the_quote_is_left_for_later() -> None:
    replay = replaying(HashAlg.SHA256)
    assert offer(replay, text(HOST), 0, pcr10(HOST[:5])) is Outcome.MATCHED
    assert replay.next_entry == 5
    assert offer(replay, text(HOST[5:]), 5, pcr10(HOST)) is Outcome.MATCHED
    assert replay.next_entry == len(HOST)
    assert offer(replay, "", len(HOST), pcr10(HOST)) is Outcome.MATCHED


@pytest.mark.parametrize("part", ["", text(HOST[:1]), text([line("/x", violation=True)])])
def test_a_pcr_that_was_never_extended_proves_nothing(part: str) -> None:
    """Whatever list comes along: none of it is needed to get to zeros."""
    for policy_of in (None, parse_runtime_policy(policy(excludes=[".*"]))):
        replay = replaying(HashAlg.SHA256, policy_of)
        with pytest.raises(LogError, match="never extended"):
            offer(replay, part, 0, bytes(32))
        assert replay.confirmed is None


def test_a_long_list_comes_in_parts() -> None:
    replay, quoted = replaying(HashAlg.SHA256), pcr10(HOST)
    for start in range(0, len(HOST), 100):
        assert replay.outcome is Outcome.MORE
        assert replay.next_entry == start
        offer(replay, text(HOST[start : start + 100]), start, quoted)
    assert replay.outcome is Outcome.MATCHED


def test_a_list_without_end_is_refused() -> None:
    replay = replaying(HashAlg.SHA256)
    for part in range(MAX_PARTS - 1):
        assert offer(replay, text([line(f"/{part}")]), part, bytes(32 * [1])) is Outcome.MORE
    with pytest.raises(LogError, match="does not lead"):
        offer(replay, text([line("/last")]), MAX_PARTS - 1, bytes(32 * [1]))
    assert replay.next_entry == 0


def test_a_list_without_end_is_said_to_be_long() -> None:
    assert MAX_PARTS == 64
    replay = replaying(HashAlg.SHA256)
    for part in range(MAX_PARTS - 1):
        offer(replay, text([line(f"/{part}")]), part, bytes(32 * [1]))
    with pytest.raises(LogError, match="within 64 answers: a list of more than 64 lines"):
        offer(replay, text([line("/last")]), MAX_PARTS - 1, bytes(32 * [1]))


def test_after_a_match_as_many_answers_may_follow() -> None:
    replay = replaying(HashAlg.SHA256)
    offer(replay, text(HOST), 0, pcr10(HOST))
    for part in range(MAX_PARTS - 1):
        offer(replay, text([line(f"/{part}")]), len(HOST) + part, bytes(32 * [1]))
        assert replay.next_entry == len(HOST) + part + 1
    offer(replay, text([line("/last")]), len(HOST) + MAX_PARTS - 1, bytes(32 * [1]))
    assert replay.next_entry == 0  # from the beginning, then


@pytest.mark.parametrize(
    ("first", "told"),
    [("boot_aggregate", False), ("/usr/bin/true", True), ("/boot_aggregate", True)],
)
def test_a_list_without_its_beginning_cannot_be_judged(first: str, told: bool) -> None:
    lines = [line(first), line("/a"), line("boot_aggregate"), line("/b")]
    replay = replaying(HashAlg.SHA256)
    for at, one in enumerate(lines):
        offer(replay, text([one]), at, bytes(32 * [1]))
    with pytest.raises(LogError, match="does not lead to the signed PCR 10") as caught:
        offer(replay, "", len(lines), bytes(32 * [1]))
    assert ("its first entry is not boot_aggregate" in str(caught.value)) is told


def pauses(lines: Sequence[Line]) -> int:
    return len(list(replaying(HashAlg.SHA256).offer(text(lines), 0, pcr10(lines))))


def of_length(number: int, chars: int) -> Line:
    short = line(f"/{number:06}")
    return line(f"/{number:06}" + "x" * (chars - len(short.text)))


def test_others_may_run_between_chunks() -> None:
    assert CHUNK_CHARS == 16 * 1024
    full = [of_length(number, 256) for number in range(64)]  # 16 KiB to the letter
    assert pauses([*full, of_length(64, 256)]) == 0
    assert pauses([*full, of_length(64, 256), of_length(65, 256)]) == 1
    assert pauses([*full[1:], of_length(0, 257), of_length(64, 256)]) == 1


def test_a_list_that_goes_on_within_a_chunk_is_judged_to_the_signed_value() -> None:
    lines = [line(f"/{number}") for number in range(100)]
    for end in (1, 50, 99, 100):
        replay = replaying(HashAlg.SHA256)
        assert pauses(lines[:end]) == (end * len(lines[-1].text) > CHUNK_CHARS)
        assert offer(replay, text(lines), 0, pcr10(lines[:end])) is Outcome.MATCHED
        assert replay.next_entry == end


def test_lines_that_are_known_are_judged_to_the_signed_value() -> None:
    """Another host has measured them before: the quick way through them ends where it must."""
    lines = [line(f"/{number}") for number in range(100)]
    shared = LineJudge(HashAlg.SHA256)
    for end in (100, 1, 50, 99, 100):
        replay = ImaReplay(shared)
        assert offer(replay, text(lines), 0, pcr10(lines[:end])) is Outcome.MATCHED
        assert replay.next_entry == end


def refused(replay: ImaReplay, part: str | None, entry: int, quoted: bytes) -> str:
    """Ask on, with nothing more available, until it is refused."""
    for _ in range(4):
        now = part if replay.next_entry == entry else ""
        try:
            offer(replay, now, replay.next_entry, quoted)
        except LogError as exc:
            return str(exc)
    raise AssertionError("it was not refused")


TAMPERED: dict[str, list[Line]] = {
    "left out": HOST[:3] + HOST[4:],
    "put in": [*HOST[:3], line("/evil"), *HOST[3:]],
    "exchanged": [*HOST[:3], HOST[4], HOST[3], *HOST[5:]],
    "cut": HOST[:-1],
    "another digest": [*HOST[:3], line("/usr/bin/env", BAD), *HOST[4:]],
    "violation hidden": [*HOST[:4], line("/var/log/wtmp"), *HOST[5:]],
    "violation feigned": [*HOST[:3], line("/usr/bin/env", violation=True), *HOST[4:]],
    "none": [],
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_list_is_refused(name: str) -> None:
    replay = replaying(HashAlg.SHA256)
    assert "does not lead" in refused(replay, text(TAMPERED[name]), 0, pcr10(HOST))
    assert replay.next_entry == 0  # the next answer must hold it whole
    assert offer(replay, text(HOST), 0, pcr10(HOST)) is Outcome.MATCHED


def test_a_path_renamed_in_the_text_is_seen_by_its_template_hash() -> None:
    changed = HOST[1].text.replace("systemd", "harmless", 1)
    with pytest.raises(LogError, match="does not match its template hash"):
        parse_entry(changed)


def test_a_reboot_is_replayed_from_the_beginning() -> None:
    replay = replaying(HashAlg.SHA256)
    offer(replay, text(HOST), 0, pcr10(HOST))
    fresh = [line("boot_aggregate", BAD), line("/sbin/init")]
    # The proxy sends the whole list where the entry asked for is beyond its end.
    assert offer(replay, text(fresh), 0, pcr10(fresh)) is Outcome.MATCHED
    assert replay.next_entry == 2
    assert replay.violations == 0


def test_a_reboot_with_a_longer_list_is_found_out() -> None:
    replay = replaying(HashAlg.SHA256)
    offer(replay, text(HOST[:3]), 0, pcr10(HOST[:3]))
    fresh = [line(f"/fresh/{n}") for n in range(10)]
    quoted = pcr10(fresh)
    assert offer(replay, text(fresh[3:]), 3, quoted) is Outcome.MORE
    assert offer(replay, "", 10, quoted) is Outcome.MORE
    assert replay.next_entry == 0
    assert offer(replay, text(fresh), 0, quoted) is Outcome.MATCHED


def test_a_list_from_elsewhere_is_refused() -> None:
    replay = replaying(HashAlg.SHA256)
    with pytest.raises(LogError, match="does not begin"):
        offer(replay, text(HOST[1:]), 1, pcr10(HOST))
    with pytest.raises(LogError, match="no IMA list"):
        offer(replay, None, 0, pcr10(HOST))


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "10",
        HOST[0].text.replace("ima-ng", "ima"),
        HOST[0].text.replace("ima-ng", "evil-ng"),
        HOST[0].text.replace("sha256:", "sha256"),
        HOST[0].text.replace("sha256:", "sha256:zz"),
        HOST[0].text + " more",
        "10 00 ima-ng sha256:00 /x",
        HOST[0].text + "x" * MAX_LINE_CHARS,
    ],
)
def test_what_is_no_line_is_refused(bad: str) -> None:
    with pytest.raises(LogError):
        parse_entry(bad)
    replay = replaying(HashAlg.SHA256)
    with pytest.raises(LogError):
        offer(replay, bad + "\n", 0, bytes(32 * [1]))
    assert replay.next_entry == 0


def test_half_a_line_is_refused() -> None:
    with pytest.raises(LogError, match="within a line"):
        offer(replaying(HashAlg.SHA256), text(HOST)[:-1], 0, pcr10(HOST))


def test_names_that_are_no_utf_8() -> None:
    odd = line(b"/tmp/\xe6\x97\xa5\xff\xfe", shown="/tmp/\u65e5\\xff\\xfe")
    literal = line("/tmp/\\xff")
    parse_entry(line(b"/\\x41" + b"\xff" * 4000, shown="/\\x41" + "\\xff" * 4000).text)
    assert offer(replaying(HashAlg.SHA256), text([odd, literal]), 0, pcr10([odd, literal])) is (
        Outcome.MATCHED
    )


def test_a_signature_s_template_with_five_fields() -> None:
    digest = bytes.fromhex(GOOD)
    data = field(b"sha256:\0" + digest) + field(b"/x\0") + field(b"") + field(b"") + field(b"")
    one = Line(f"10 {hashlib.sha1(data).hexdigest()} ima-modsig sha256:{GOOD} /x   ", data)
    assert offer(replaying(HashAlg.SHA256), text([one]), 0, pcr10([one])) is Outcome.MATCHED


# --- allow-lists --------------------------------------------------------------------------------------


DIGESTS = {
    "boot_aggregate": [GOOD],
    "/usr/lib/systemd/systemd": [GOOD],
    "/usr/bin/bash": [BAD, GOOD],
    "/usr/bin/env": [GOOD],
    "/usr/bin/ls": [GOOD],
}
WIDE: dict[str, Any] = {
    "digests": DIGESTS,
    "excludes": ["/opt/.*"],
    "ima-buf": {".builtin_trusted_keys": [BUFFER]},
}


def judged(violations: Violations = Violations.COUNT, **values: Any) -> str | None:
    replay = replaying(HashAlg.SHA256, parse_runtime_policy(policy(**values)), violations)
    try:
        assert offer(replay, text(HOST), 0, pcr10(HOST)) is Outcome.MATCHED
    except LogError as exc:
        return str(exc)
    return None


def test_an_allow_list_that_fits() -> None:
    assert judged(**WIDE) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"digests": {**DIGESTS, "/usr/bin/bash": [BAD]}}, "entry 2: /usr/bin/bash has the digest"),
        ({"digests": {"boot_aggregate": [GOOD]}}, "entry 1: /usr/lib/systemd/systemd is not in"),
        ({"excludes": ["/var/log/"]}, "entry 7: /opt/0 is not in"),
        ({"ima-buf": {}}, "entry 5: .builtin_trusted_keys is not in the runtime policy's ima-buf"),
        (
            {"digests": {**DIGESTS, "boot_aggregate": [BAD]}},
            "entry 0: boot_aggregate has the digest",
        ),
        (
            {"digests": {k: v for k, v in DIGESTS.items() if k != "boot_aggregate"}},
            "entry 0: boot_aggregate is not in",
        ),
    ],
)
def test_an_allow_list_that_does_not(change: dict[str, Any], why: str) -> None:
    assert why in (judged(**{**WIDE, **change}) or "")


@pytest.mark.parametrize("excludes", [[], ["/var/log/"]])
def test_violations_are_refused_or_counted(excludes: list[str]) -> None:
    """Nothing vouches for a violation's name, so that no exclude can excuse it."""
    wide = {**WIDE, "excludes": ["/opt/.*", *excludes]}
    assert judged(Violations.COUNT, **wide) is None
    assert judged(Violations.REFUSE, **wide) == (
        "IMA entry 4: /var/log/wtmp was written to while it was measured"
    )


def test_violations_are_counted_where_nothing_is_judged() -> None:
    replay = replaying()
    assert offer(replay, text(HOST), 0, pcr10(HOST)) is Outcome.MATCHED
    assert replay.violations == 1


def test_ignored_keyrings_are_for_keys_alone() -> None:
    for name in ("*", ".builtin_trusted_keys"):
        ignoring = {**WIDE, "ima-buf": {}, "ima": {"ignored_keyrings": [name]}}
        assert "entry 5" in (judged(**ignoring) or "")  # two bytes are no key


def test_excludes_are_for_buffers_too() -> None:
    wide = {**WIDE, "ima-buf": {}, "excludes": ["/opt/", r"\.builtin"]}
    assert judged(**wide) is None


@pytest.mark.parametrize("signature", ["", "030204deadbeef"])
def test_a_file_is_not_passed_off_as_a_buffer(signature: str) -> None:
    """Template names are not hashed, and ima-sig and ima-buf have the same fields."""
    good = line("boot_aggregate")
    evil = line("/usr/bin/evil", BAD, template="ima-sig", more=signature)
    lie = Line(evil.text.replace("ima-sig", "ima-buf"), evil.data)
    replay = replaying(HashAlg.SHA256, parse_runtime_policy(policy(excludes=[".*"])))
    with pytest.raises(LogError, match="does not have the digest that its line gives"):
        offer(replay, text([good, lie]), 0, pcr10([good, evil]))


def test_a_violation_teaches_no_key() -> None:
    """A violation's text is not hashed at all, so that it may say anything."""
    _, der = certificate()
    one = line(".ima", hashlib.sha256(der).hexdigest(), template="ima-buf", more=der.hex())
    words = ["10", "00" * 20, *one.text.split(" ")[2:]]
    lines = [line("boot_aggregate"), Line(" ".join(words), b"", violation=True)]
    listed = policy(
        digests={"boot_aggregate": [GOOD]}, keyrings={".ima": [hashlib.sha256(der).hexdigest()]}
    )
    replay = replaying(HashAlg.SHA256, parse_runtime_policy(listed), Violations.COUNT)
    assert offer(replay, text(lines), 0, pcr10(lines)) is Outcome.MATCHED
    assert replay.confirmed is not None
    assert not replay.confirmed.keys


def test_a_path_is_not_spelled_in_another_way() -> None:
    """Excludes match the text: one that looks at letters would miss an escaped one."""
    evil = line("/usr/bin/evil", BAD)
    excludes = policy(digests={}, excludes=["(?!/usr/)"])
    for spelled in ("/\\x75sr/bin/evil", "/usr/bin/\\x65vil"):
        lie = Line(evil.text.replace("/usr/bin/evil", spelled), evil.data)
        replay = replaying(HashAlg.SHA256, parse_runtime_policy(excludes))
        with pytest.raises(LogError, match="does not match its template hash"):
            offer(replay, text([lie]), 0, pcr10([evil]))
    umlaut = line("/tmp/\u00e9")
    lie = Line(umlaut.text.replace("\u00e9", "\\xc3\\xa9"), umlaut.data)
    with pytest.raises(LogError, match="does not match its template hash"):
        parse_entry(lie.text)
    half = line(b"/tmp/x" + b"\xed\xa0\x80", shown="/tmp/x\ud800")
    with pytest.raises(LogError):
        parse_entry(half.text)


def test_a_host_that_measures_nothing_has_no_good_files() -> None:
    replay = replaying(HashAlg.SHA256, parse_runtime_policy(policy(digests={"/a": [GOOD]})))
    with pytest.raises(LogError, match="never extended"):
        offer(replay, "", 0, bytes(32))


def test_a_name_is_no_longer_than_the_kernels() -> None:
    """Patterns take the square of a name's length, or more."""
    parse_entry(line("/" + "x" * 4095).text)
    with pytest.raises(LogError, match="too long"):
        parse_entry(line("/" + "x" * 4096).text)


def test_long_lines_let_others_run_sooner() -> None:
    def pauses(lines: Sequence[Line]) -> int:
        return sum(1 for _ in replaying(HashAlg.SHA256).offer(text(lines), 0, pcr10(lines)))

    assert pauses([line(f"/{n}") for n in range(100)]) <= 2
    assert pauses([line(f"/{n}" + "x" * 4000) for n in range(100)]) >= 20


def test_what_is_not_allowed_is_not_forgotten() -> None:
    replay = replaying(HashAlg.SHA256, parse_runtime_policy(policy(digests={"/a": [GOOD]})))
    lines = [line("/a"), line("/b")]
    with pytest.raises(LogError, match="/b is not in"):
        offer(replay, text(lines), 0, pcr10(lines))
    assert replay.next_entry == 2
    more = [*lines, line("/a")]
    for part, quoted in (("", pcr10(lines)), (text(more[2:]), pcr10(more))):
        with pytest.raises(LogError, match="/b is not in"):
            offer(replay, part, 2, quoted)
    fresh = [line("/a")]  # a reboot ends it
    assert offer(replay, text(fresh), 0, pcr10(fresh)) is Outcome.MATCHED


def test_a_line_that_is_not_proven_yet_is_not_judged() -> None:
    replay = replaying(HashAlg.SHA256, parse_runtime_policy(policy(digests={"/a": [GOOD]})))
    lines = [line("/a"), line("/b")]
    assert offer(replay, text(lines), 0, pcr10(lines[:1])) is Outcome.MATCHED


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        policy(digests=[]),
        policy(digests={"/a": GOOD}),
        policy(digests={"/a": [1]}),
        policy(digests={"/a": ["xyz"]}),
        policy(excludes="x"),
        policy(excludes=["("]),
        policy(ima=[1]),
        policy(ima={"ignored_keyrings": "x"}),
        policy(digests={"/a": ["AB" * 20]}),
        policy(digests={"/a": ["ab" * 19]}),
        policy(ima={"dm_policy": {"rules": 1}}),
        policy(ima={"log_hash_alg": "md5"}),
        policy(ima={"something": 1}),
        policy(hashes={}),
        policy(**{"verification-keys": "key"}),
        policy(allowlist={}),
    ],
)
def test_what_is_no_runtime_policy_is_refused(bad: bytes) -> None:
    with pytest.raises(UsageError):
        parse_runtime_policy(bad)


# --- any bytes ----------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["10", "11", "00" * 20, "ima-ng", "ima-sig", "ima-modsig", f"sha256:{GOOD}", "/x", "", "\\x41"]
)


@given(
    st.lists(st.text(max_size=40) | st.lists(WORDS, max_size=8).map(" ".join), max_size=6),
    st.integers(0, 3),
    st.sampled_from(list(HashAlg)),
)
def test_any_text_gives_typed_errors_alone(lines: list[str], entry: int, bank: HashAlg) -> None:
    replay = replaying(bank, parse_runtime_policy(policy(digests={})))
    try:
        outcome = offer(replay, "\n".join(lines), entry, bytes(bank.digest_bytes))
    except LogError:
        return
    assert outcome is Outcome.MORE or replay.next_entry == 0


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["digests", "excludes", "ima", "keyrings", "ignored_keyrings", "x"]
                ),
                inner,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_runtime_policy_gives_typed_errors_alone(data: bytes) -> None:
    with contextlib.suppress(UsageError):
        parse_runtime_policy(data)
