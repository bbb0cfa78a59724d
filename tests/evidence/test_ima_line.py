"""One line of an IMA list, at the ends of what is read."""

from __future__ import annotations

import hashlib
import struct

import pytest
from ima_helpers import GOOD, Line, field, line

from provider_proxy.errors import LogError
from provider_proxy.evidence.logs.ima_line import (
    MAX_GUESSES,
    MAX_LINE_CHARS,
    MAX_NAME_BYTES,
    looks_like_entry,
    parse_entry,
    pcr_of,
    shown,
)

HASH = "ab" * 20


def refused(text: str) -> str:
    with pytest.raises(LogError) as caught:
        parse_entry(text)
    return str(caught.value)


def test_limits_are_the_documented_ones() -> None:
    assert MAX_LINE_CHARS == 65_536
    assert MAX_NAME_BYTES == 4_096
    assert MAX_GUESSES == 64


@pytest.mark.parametrize("behind", ["", "ima-ng", f"ima-ng sha256:{GOOD}", "ima-ng ", " "])
def test_a_line_has_five_words(behind: str) -> None:
    assert "is not '10 <hash>" in refused(f"10 {HASH} {behind}")
    assert "is not '10 <hash>" in refused(f"10 {bytes(20).hex()} {behind}")


@pytest.mark.parametrize("digits", [42, 62, 66, 94, 98, 126])
def test_a_template_hash_is_as_long_as_a_hash(digits: int) -> None:
    """Zeros are a violation, and nothing then holds the hash against the line."""
    assert "a length that no hash has" in refused(f"10 {'0' * digits} ima-ng sha256:{GOOD} /x")


@pytest.mark.parametrize("digits", [38, 130])
def test_a_hash_out_of_bounds_is_no_line(digits: int) -> None:
    text = f"10 {'0' * digits} ima-ng sha256:{GOOD} /x"
    assert "is not '10 <hash>" in refused(text)
    assert not looks_like_entry(text)
    assert pcr_of(text) is None


@pytest.mark.parametrize(("shown_pcr", "pcr"), [("10", 10), (" 9", 9), ("9", 9), ("11", 11)])
def test_the_pcr_of_a_line(shown_pcr: str, pcr: int) -> None:
    text = shown_pcr + line().text[2:]
    assert looks_like_entry(text)
    assert pcr_of(text) == pcr
    assert parse_entry(text).pcr == pcr


def test_a_file_s_line() -> None:
    one = line("/bin/sh", template="ima-sig", more="0302")
    entry = parse_entry(one.text)
    assert (entry.template, entry.path, entry.extra) == ("ima-sig", "/bin/sh", b"\3\2")
    assert (entry.algorithm, entry.digest.hex(), entry.violation) == ("sha256", GOOD, False)
    assert entry.template_hash == hashlib.sha1(one.data).digest()
    assert entry.data == one.data


@pytest.mark.parametrize(("algorithm", "chars"), [("md5", 32), ("sha1", 40)])
def test_the_template_ima_has_md5_or_sha1(algorithm: str, chars: int) -> None:
    entry = parse_entry(line("/x", "ab" * (chars // 2), template="ima").text)
    assert (entry.algorithm, len(entry.digest)) == (algorithm, chars // 2)


@pytest.mark.parametrize("chars", [30, 34, 38, 42, 64])
def test_the_template_ima_has_no_other_digest(chars: int) -> None:
    text = line("/x", "ab" * (chars // 2), template="ima").text
    assert "not MD5 or SHA-1" in refused(text)


@pytest.mark.parametrize(
    ("template", "longest"), [("ima", 255), ("ima-ng", 4096), ("ima-sig", 4096)]
)
def test_a_name_has_its_length(template: str, longest: int) -> None:
    digest = "ab" * 20 if template == "ima" else GOOD
    more = "" if template == "ima-sig" else None
    for name in ("a" * longest, "é" * (longest // 2)):
        assert parse_entry(line(name, digest, template=template, more=more).text).path == name
    for name in ("a" * (longest + 1), "é" * (longest // 2 + 1)):
        one = line("x", digest, template=template, more=more)
        assert "too long" in refused(one.text.replace(" x", f" {name}", 1))


def test_a_byte_that_is_no_text_counts_once() -> None:
    raw = b"\xff" * 4096
    assert parse_entry(line(raw, shown="\\xff" * 4096).text).path == "\\xff" * 4096
    assert "too long" in refused(line(raw + b"a", shown="\\xff" * 4096 + "a").text)


@pytest.mark.parametrize(("count", "read"), [(1, True), (6, True), (7, False)])
def test_every_reading_of_six_escapes_is_tried(count: int, read: bool) -> None:
    """All but one are text that looks like an escape; of more than six they are read all or none."""
    for place in range(count):
        parts = [b"\\xff" if at != place else b"\xff" for at in range(count)]
        one = line(b"/" + b"".join(parts), shown="/" + "\\xff" * count)
        if read or count == 1:
            assert parse_entry(one.text).data == one.data
        else:
            assert "does not match its template hash" in refused(one.text)
    every = line(b"/" + b"\xff" * count, shown="/" + "\\xff" * count)
    assert parse_entry(every.text).data == every.data


def evm(uid: str, gid: str, mode: str) -> Line:
    """A line with numbers: four bytes, four, two."""
    numbers = [int(uid) & 0xFFFFFFFF, int(gid) & 0xFFFFFFFF, int(mode) & 0xFFFF]
    data = field(b"sha256:\0" + bytes.fromhex(GOOD)) + field(b"/x\0") + field(b"") + field(b"\0")
    data += field(b"") + field(b"")
    for form, number in zip(("<I", "<I", "<H"), numbers, strict=True):
        data += field(struct.pack(form, number))
    digest = hashlib.sha1(data).hexdigest()
    return Line(f"10 {digest} evm-sig sha256:{GOOD} /x     {uid} {gid} {mode}", data)


@pytest.mark.parametrize(
    "numbers", [("0", "0", "0"), ("4294967295", "0", "65535"), ("0", "4294967295", "33188")]
)
def test_numbers_have_their_bytes(numbers: tuple[str, str, str]) -> None:
    one = evm(*numbers)
    assert parse_entry(one.text).data == one.data


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        (("4294967296", "0", "0"), "too large"),
        (("0", "0", "65536"), "too large"),
        (("00000000000", "0", "0"), "not valid"),
        (("0", "-1", "0"), "not valid"),
    ],
)
def test_other_numbers_are_refused(numbers: tuple[str, str, str], why: str) -> None:
    assert why in refused(evm(*numbers).text)


def test_what_is_shown_of_a_text_is_bounded_and_printable() -> None:
    assert shown("a" * 200) == "a" * 200
    assert shown("a" * 201) == "a" * 200
    assert shown("a\nb\x1b\u202ec") == "a?b??c"


def test_what_is_no_number_is_refused() -> None:
    for text in ("x", "1_0", "+1", "\u0661", ""):
        assert "a number of the IMA list is not valid" in refused(
            evm("0", "0", "0").text[:-1] + text
        )


@pytest.mark.parametrize("template", ["ima-sig", "ima-buf"])
def test_hex_has_one_writing(template: str) -> None:
    digest = hashlib.sha256(b"\xab\xcd").hexdigest()
    one = line("/x", digest, template=template, more="abcd")
    assert parse_entry(one.text).extra == b"\xab\xcd"
    for other in ("ABCD", "abcD", "xx", "abc"):
        assert "is not hex" in refused(one.text[:-4] + other)


def test_a_buffer_has_a_hash_of_a_bank() -> None:
    digest = hashlib.md5(b"\xab").hexdigest()
    one = line("k", digest, template="ima-buf", more="ab", prefix="md5")
    assert "has an unknown hash algorithm: md5" in refused(one.text)
    other = line("k", GOOD, template="ima-buf", more="ab")
    assert "does not have the digest that its line gives" in refused(other.text)


def test_empty_fields_at_the_end_may_be_cut_off() -> None:
    one = line("/x", template="ima-sig", more="")
    assert parse_entry(one.text.rstrip()).data == one.data
    data = field(b"sha256:\0" + bytes.fromhex(GOOD)) + field(b"/x\0") + 3 * field(b"")
    text = f"10 {hashlib.sha1(data).hexdigest()} ima-modsig sha256:{GOOD} /x"
    assert parse_entry(text).data == data
    assert "does not have the fields of the template ima-modsig" in refused(text + "    ")


def test_a_signature_beside_the_file_has_its_own_digest() -> None:
    digest = bytes.fromhex(GOOD)
    data = field(b"sha256:\0" + digest) + field(b"/x\0") + field(b"\3\2")
    data += field(b"sha1:\0" + digest[:20]) + field(b"\x30\x82")
    text = f"10 {hashlib.sha1(data).hexdigest()} ima-modsig sha256:{GOOD} /x 0302 "
    entry = parse_entry(f"{text}sha1:{digest[:20].hex()} 3082")
    assert (entry.data, entry.extra) == (data, b"\3\2")
