"""What one line means, and whether it is allowed: templates, names, keys, signatures, other PCRs."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from ima_helpers import (
    BAD,
    GOOD,
    Line,
    PrivateKey,
    certificate,
    extended,
    field,
    key_id,
    line,
    signature,
    text,
)

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs import ima_judge, ima_keys, runtime_policy, runtime_policy_file
from provider_proxy.evidence.logs.ima import ImaReplay, Outcome
from provider_proxy.evidence.logs.ima_judge import LineJudge, LineWalk, Violations
from provider_proxy.evidence.logs.ima_keys import NO_KEYS, file_key
from provider_proxy.evidence.logs.ima_line import MAX_LINE_CHARS, parse_entry, parse_plain
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import HashAlg

BOOT = line("boot_aggregate")
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())


def policy(**values: Any) -> bytes:
    digests = {"boot_aggregate": [GOOD], **values.pop("digests", {})}
    return json.dumps({"meta": {"version": 1}, "digests": digests, **values}).encode()


def judge(lines: Sequence[Line], policy_of: bytes | None = None, **more: Any) -> ImaReplay:
    """Replay a list to its own PCR 10. Raises: LogError where it does not fit, or is not allowed."""
    read = None if policy_of is None else parse_runtime_policy(policy_of)
    replay = ImaReplay(LineJudge(HashAlg.SHA256, read, **more))
    for _ in replay.offer(text(lines), 0, extended(lines)):
        pass
    assert replay.outcome is Outcome.MATCHED
    return replay


def problem(lines: Sequence[Line], policy_of: bytes, **more: Any) -> str | None:
    try:
        judge(lines, policy_of, **more)
    except LogError as exc:
        return str(exc)
    return None


# --- templates and kernels ------------------------------------------------------------------------


@pytest.mark.parametrize("hashed", ["sha1", "sha256", "sha384", "sha512"])
@pytest.mark.parametrize("violation", [False, True])
def test_lists_with_other_template_hashes(hashed: str, violation: bool) -> None:
    """ascii_runtime_measurements_sha256 and its like, kernel 6.10."""
    lines = [line("boot_aggregate", hashed=hashed), line("/x", hashed=hashed, violation=violation)]
    assert judge(lines).violations == violation
    wrong = lines[0].text.replace("boot_aggregate", "boot_aggregat2")
    with pytest.raises(LogError, match="does not match its template hash"):
        parse_entry(wrong)


def test_the_template_ima() -> None:
    sha1 = hashlib.sha1(b"x").hexdigest()
    lines = [line("boot_aggregate", sha1, template="ima"), line("/a b", sha1, template="ima")]
    assert problem(lines, policy(digests={"boot_aggregate": [sha1], "/a b": [sha1]})) is None
    assert "/a b is not in" in (problem(lines, policy(digests={"boot_aggregate": [sha1]})) or "")
    entry = parse_entry(lines[1].text)
    assert (entry.algorithm, entry.path) == ("sha1", "/a b")
    with pytest.raises(LogError):
        parse_entry(line("/" + "x" * 255, sha1, template="ima").text)
    with pytest.raises(LogError, match="MD5 or SHA-1"):
        parse_entry(lines[0].text.replace(sha1, GOOD))


def test_the_template_evm_sig() -> None:
    digest = bytes.fromhex(GOOD)
    data = (
        field(b"sha256:\0" + digest)
        + field(b"/x\0")
        + field(b"\5\2")
        + field(b"security.ima|security.capability\0")
        + field(b"\x21\0\0\0\x14\0\0\0")
        + field(b"\1\2\3")
        + field((1000).to_bytes(4, "little"))
        + field((0).to_bytes(4, "little"))
        + field((0o100755).to_bytes(2, "little"))
    )
    shown = (
        f"10 {hashlib.sha1(data).hexdigest()} evm-sig sha256:{GOOD} /x 0502 "
        "security.ima|security.capability 2100000014000000 010203 1000 0 33261"
    )
    assert parse_entry(shown).data == data
    assert problem([BOOT, Line(shown, data)], policy(digests={"/x": [GOOD]})) is None
    for change in (shown.replace(" 1000 ", " 4294967296 "), shown.replace("33261", "65536")):
        with pytest.raises(LogError, match="too large"):
            parse_entry(change)


def test_an_evm_signature_signs_no_file() -> None:
    """It is over a file's metadata, whatever it looks like."""
    sig = bytes.fromhex(signature(RSA, GOOD))
    data = field(b"sha256:\0" + bytes.fromhex(GOOD)) + field(b"/x\0") + field(sig) + field(b"n\0")
    data += field(b"") + field(b"") + field(bytes(4)) + field(bytes(4)) + field(bytes(2))
    shown = f"10 {hashlib.sha1(data).hexdigest()} evm-sig sha256:{GOOD} /x {sig.hex()} n   0 0 0"
    lines = [BOOT, Line(shown, data)]
    keys = policy(**{"verification-keys": verification_keys(RSA)})
    assert problem(lines, keys) == "IMA entry 1: /x is not in the runtime policy"


@pytest.mark.parametrize("template", ["ima-sig", "ima-buf", "ima-modsig"])
def test_a_line_has_the_fields_of_its_template(template: str) -> None:
    more = line("/x", template=template, more="00").text + " 00 00 00"
    with pytest.raises(LogError, match=f"does not have the fields of the template {template}"):
        parse_entry(more)


def test_names_with_spaces_where_nothing_follows() -> None:
    assert problem([BOOT, line("/a b c")], policy(digests={"/a b c": [GOOD]})) is None


def test_lines_of_other_pcrs_are_counted_and_passed_over() -> None:
    lines = [BOOT, line("/secret", pcr=11), line("/nine", pcr=9), line("/x"), line("/y", pcr=11)]
    replay = judge(lines, policy(digests={"/x": [GOOD]}))
    assert (replay.others, replay.next_entry) == (2, 4)  # the last one is behind what is proven
    hidden = [BOOT, Line(line("/evil").text.replace("10 ", "11 ", 1), b"")]
    replay = ImaReplay(LineJudge(HashAlg.SHA256))
    quoted = extended([BOOT, line("/evil")])
    for part in (text(hidden), ""):
        with pytest.raises(LogError, match="does not lead") if not part else _nothing():
            for _ in replay.offer(part, replay.next_entry, quoted):
                pass


class _nothing:  # a context as contextlib's own
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"/tmp/a\nb",
        b"/tmp/a\n",
        b"/tmp/\n\n\n",
        b"/tmp/a\n" + line("/evil", BAD).text.encode(),
        b"/tmp/\xff\nb",
        b"/tmp/\\xff\xff",
        b"/tmp/\xff\\xff",
        b"/tmp/\\xe9\xe9\\xff\xff",
        b"/tmp/\r\x1b\x85",
        b"/tmp/\xe2\x80\xa8",
        b"/tmp/\xc3",
    ],
)
@pytest.mark.parametrize("template", ["ima-ng", "ima-sig"])
def test_odd_names_are_read_as_they_were_hashed(name: bytes, template: str) -> None:
    more = None if template == "ima-ng" else ""
    if template == "ima-sig":  # the kernel hashes and shows an underscore for each space
        name = name.replace(b" ", b"_")
    lines = [BOOT, line(name, template=template, more=more), line("/last")]
    replay = judge(lines)
    assert replay.next_entry == text(lines).count("\n")
    path = name.decode("utf-8", "backslashreplace")
    allowed = policy(digests={path: [GOOD], "/last": [GOOD]})
    assert problem(lines, allowed) is None
    assert "is not in" in (problem(lines, policy(digests={"/last": [GOOD]})) or "")


def test_a_line_feed_does_not_hide_a_line() -> None:
    """What reads as a line of its own counts as one, unless the hash says that it is a name's rest."""
    lines = [BOOT, line("/tmp/a"), line("/evil", BAD)]
    assert "/evil is not in" in (problem(lines, policy(digests={"/tmp/a": [GOOD]})) or "")


@pytest.mark.parametrize("junk", ["b", "", "ima-ng", "10 00"])
def test_what_is_no_line_goes_on_no_line(junk: str) -> None:
    """Only a violation's name may go on in the next line, for nothing vouches for it."""
    lines = [BOOT, line("/a"), Line(junk, b""), line("/b")]
    replay = ImaReplay(LineJudge(HashAlg.SHA256))
    with pytest.raises(LogError):
        for _ in replay.offer(text(lines), 0, extended([BOOT, line("/a"), line("/b")])):
            pass


def test_too_many_line_feeds_are_refused() -> None:
    longest = line(b"/" + b"\n" * (ima_judge.MAX_JOINED_LINES - 1))
    judge([BOOT, longest])
    with pytest.raises(LogError, match="does not match its template hash"):
        judge([BOOT, line(b"/" + b"\n" * ima_judge.MAX_JOINED_LINES)])


def test_a_violation_s_name_may_go_on_in_the_next_line() -> None:
    lines = [BOOT, line(b"/tmp/a\nb\nc", violation=True), line("/x")]
    replay = judge(lines, policy(digests={"/x": [GOOD]}), violations=Violations.COUNT)
    assert (replay.violations, replay.next_entry) == (1, 5)
    halves = ImaReplay(LineJudge(HashAlg.SHA256))
    for part, entry, quoted in (
        (text(lines[:2]), 0, extended(lines[:2])),
        ("b\nc\n" + text(lines[2:]), 2, extended(lines)),
    ):
        for _ in halves.offer(part, entry, quoted):
            pass
        assert halves.outcome is Outcome.MATCHED
    with pytest.raises(LogError):
        judge([BOOT, line(b"/\n" + b"x\n" * 2100, violation=True), line("/x")])


@pytest.mark.parametrize("chars", [4095, 4096, 4097])
def test_what_goes_on_of_a_violation_s_name_is_bounded(chars: int) -> None:
    """Its line feeds count, and each name has a bound of its own."""
    junk = ["x" * 99] * 39 + ["x" * 95]  # and their line feeds: 3,996 characters
    junk.append("y" * (chars - 3996 - 1))
    assert sum(len(part) + 1 for part in junk) == chars
    violation = line(b"/v", violation=True)
    lines = [BOOT.text, violation.text, *junk, violation.text, *junk, line("/x").text]
    replay = ImaReplay(LineJudge(HashAlg.SHA256))
    steps = replay.offer(
        "\n".join(lines) + "\n", 0, extended([BOOT, violation, violation, line("/x")])
    )
    if chars <= 4096:
        for _ in steps:
            pass
        assert (replay.outcome, replay.violations) == (Outcome.MATCHED, 2)
    else:
        with pytest.raises(LogError, match="is not '10 <hash>"):
            list(steps)


def test_what_goes_on_after_a_restart_is_bounded_alike() -> None:
    for rest, fits in (("x" * 4095, True), ("x" * 4096, False)):
        walk = LineWalk(LineJudge(HashAlg.SHA256))
        walk.is_open = True
        if fits:
            assert walk.step([rest], 0) == (None, 1)
            continue
        with pytest.raises(LogError):
            walk.step([rest], 0)


def test_limits_are_the_documented_ones() -> None:
    assert ima_judge.MAX_JOINED_LINES == 32
    assert ima_judge.MAX_REMEMBERED_CHARS == 8_388_608
    assert ima_keys.MAX_KEYS == 1000
    assert ima_keys.MAX_KEY_BYTES == 16_384
    assert ima_keys.MAX_RSA_BITS == 8_192
    assert runtime_policy_file.MAX_SIGNATURES == 64


def test_a_key_that_is_measured_has_a_bounded_size() -> None:
    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert ima_keys.key_in_buffer(pem.ljust(16_384, b"\n")) == file_key(RSA.public_key())
    assert ima_keys.key_in_buffer(pem.ljust(16_385, b"\n")) is None


@pytest.mark.parametrize("length", [1, 3, 4, 20])
def test_a_certificate_s_own_id_names_its_key(length: int) -> None:
    """The last four bytes of its subject key identifier; a shorter one names nothing."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "files")])
    now = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, EC.public_key(), 7, now, now.replace(year=2050))
        .add_extension(x509.SubjectKeyIdentifier(bytes(range(1, length + 1))), critical=False)
        .sign(EC, hashes.SHA256())
    )
    found = ima_keys.key_in_buffer(made.public_bytes(Encoding.DER))
    assert found is not None
    expected = int.from_bytes(bytes(range(1, length + 1))[-4:], "big")
    assert found.id == (expected if length >= 4 else file_key(EC.public_key()).id)


def test_guessing_at_escapes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def count(data: bytes) -> Any:
        hashed.append(data)
        return hashlib.sha1(data)

    monkeypatch.setitem(
        __import__("provider_proxy.evidence.logs.ima_line", fromlist=["x"])._TEMPLATE_HASHES,
        40,
        count,
    )
    shown = "\\xff" * 40
    with pytest.raises(LogError):
        parse_entry(line("/x").text.replace("/x", "/" + shown))
    assert len(hashed) == 2  # as it stands, and every escape a byte
    hashed.clear()
    with pytest.raises(LogError):
        parse_entry(line("/x").text.replace("/x", "/" + "\\xff" * 6))
    assert len(hashed) == 64


# --- keys and signatures --------------------------------------------------------------------------


def spki(key: PrivateKey) -> str:
    data = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(data).decode()


def verification_keys(*keys: PrivateKey, ids: Sequence[int] = ()) -> str:
    numbers = list(ids) or [int.from_bytes(key_id(key), "big") for key in keys]
    return json.dumps({"meta": {"version": 1}, "keyids": numbers, "pubkeys": list(map(spki, keys))})


def signed(key: PrivateKey, path: str = "/bin/sh", digest: str = GOOD, **how: Any) -> Line:
    algorithm = how.get("algorithm", "sha256")
    return line(
        path, digest, template="ima-sig", more=signature(key, digest, **how), prefix=algorithm
    )


@pytest.mark.parametrize("key", [RSA, EC, ec.generate_private_key(ec.SECP384R1())])
@pytest.mark.parametrize("algorithm", ["sha1", "sha224", "sha256", "sha384", "sha512"])
def test_signed_files_are_good(key: PrivateKey, algorithm: str) -> None:
    digest = hashlib.new(algorithm, b"sh").hexdigest()
    lines = [BOOT, signed(key, digest=digest, algorithm=algorithm)]
    assert problem(lines, policy(**{"verification-keys": verification_keys(key)})) is None
    assert "no trusted key has signed it" in (problem(lines, policy()) or "")


def test_a_key_id_may_be_given_or_computed() -> None:
    other = [BOOT, signed(RSA, id_=b"\0\0\0\7")]
    named = verification_keys(RSA, ids=[7])
    assert problem(other, policy(**{"verification-keys": named})) is None
    plain = [BOOT, signed(RSA)]
    assert problem(plain, policy(**{"verification-keys": named})) is not None
    computed = json.dumps({"keyids": [], "pubkeys": [spki(RSA)]})
    assert problem(plain, policy(**{"verification-keys": computed})) is None
    zero = verification_keys(RSA, ids=[0])
    assert problem(plain, policy(**{"verification-keys": zero})) is None


BROKEN: dict[str, Line] = {
    "another file's": line("/bin/sh", BAD, template="ima-sig", more=signature(RSA, GOOD)),
    "another key's": signed(EC),
    "another key's, with this id": signed(EC, id_=key_id(RSA)),
    "a digest of another kind": line(
        "/bin/sh", GOOD, template="ima-sig", more=signature(RSA, GOOD), prefix="sha512"
    ),
    "the digest's xattr": signed(RSA, kind=4),
    "an old version": signed(RSA, version=1),
    "a new version": signed(RSA, version=3),
    "cut": line("/bin/sh", GOOD, template="ima-sig", more=signature(RSA, GOOD)[:-2]),
    "longer": line("/bin/sh", GOOD, template="ima-sig", more=signature(RSA, GOOD) + "00"),
    "a header alone": line("/bin/sh", GOOD, template="ima-sig", more="030204"),
    "none": line("/bin/sh", GOOD, template="ima-sig", more=""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_sign_a_file(name: str) -> None:
    lines = [BOOT, BROKEN[name]]
    allowed = policy(**{"verification-keys": verification_keys(RSA)})
    assert "/bin/sh is not in the runtime policy" in (problem(lines, allowed) or "")
    listed = {"/bin/sh": [GOOD, BAD]}
    assert problem(lines, policy(digests=listed)) is None  # the list may still allow it


def test_a_portable_signature_is_taken() -> None:
    lines = [BOOT, signed(RSA, kind=5)]
    assert problem(lines, policy(**{"verification-keys": verification_keys(RSA)})) is None


def buffer_of(data: bytes, name: str = ".ima") -> Line:
    return line(name, hashlib.sha256(data).hexdigest(), template="ima-buf", more=data.hex())


@pytest.mark.parametrize("key", [RSA, EC])
@pytest.mark.parametrize("form", ["certificate", "PEM", "key", "key PEM"])
def test_a_host_teaches_its_keys(key: PrivateKey, form: str) -> None:
    """With keyrings alone, too: no verification-keys are needed for it."""
    _, der = certificate(key)
    data = {
        "certificate": der,
        "PEM": b"-----BEGIN CERTIFICATE-----\n"
        + base64.encodebytes(der)
        + b"-----END CERTIFICATE-----\n",
        "key": base64.b64decode(spki(key)),
        "key PEM": key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    }[form]
    measured = buffer_of(data)
    keyrings = {".ima": [hashlib.sha256(data).hexdigest()]}
    assert problem([BOOT, measured, signed(key)], policy(keyrings=keyrings)) is None
    # A file that is measured before its key is not good.
    late = problem([BOOT, signed(key), measured], policy(keyrings=keyrings))
    assert "/bin/sh is not in" in (late or "")
    # A key that is not listed, or listed elsewhere, is refused and teaches nothing.
    for refused in (
        {},
        {"keyrings": {".ima": [BAD]}},
        {"keyrings": {".other": keyrings[".ima"]}},
        {"ima-buf": keyrings},
        {"digests": keyrings},
    ):
        assert "entry 1: .ima" in (problem([BOOT, measured, signed(key)], policy(**refused)) or "")


@pytest.mark.parametrize("ignored", ["*", ".ima"])
def test_an_ignored_keyring_teaches_nothing(ignored: str) -> None:
    _, der = certificate(RSA)
    ignoring = policy(ima={"ignored_keyrings": [ignored]})
    assert problem([BOOT, buffer_of(der)], ignoring) is None
    assert "/bin/sh" in (problem([BOOT, buffer_of(der), signed(RSA)], ignoring) or "")


def test_one_name_in_keyrings_and_in_ima_buf() -> None:
    _, der = certificate(RSA)
    key, other = buffer_of(der, "both"), buffer_of(b"\1\2", "both")
    lists = {
        "keyrings": {"both": [hashlib.sha256(der).hexdigest()]},
        "ima-buf": {"both": [hashlib.sha256(b"\1\2").hexdigest()]},
    }
    assert problem([BOOT, key, other], policy(**lists)) is None
    assert problem([BOOT, key], policy(keyrings=lists["ima-buf"])) is not None
    assert problem([BOOT, other], policy(**{"ima-buf": lists["keyrings"]})) is not None


def test_keys_of_other_kinds_are_refused() -> None:
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    data = other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    wide = policy(excludes=[".*"], ima={"ignored_keyrings": ["*"]})
    assert "neither RSA nor EC" in (problem([BOOT, buffer_of(data)], wide) or "")


def test_a_key_that_would_cost_too_much_signs_nothing() -> None:
    for bits, fits in ((8192, True), (8193, False)):
        modulus = (1 << bits - 1) + 1
        key = rsa.RSAPublicNumbers(65537, modulus).public_key()
        if fits:
            file_key(key)
        else:
            with pytest.raises(LogError, match="8,192 bits"):
                file_key(key)


def test_keys_are_the_host_s_own() -> None:
    """One judge serves many hosts: what one has loaded does not count for another, remembered or not."""
    _, der = certificate(RSA)
    read = parse_runtime_policy(policy(keyrings={".ima": [hashlib.sha256(der).hexdigest()]}))
    shared = LineJudge(HashAlg.SHA256, read)
    good = [BOOT, buffer_of(der), signed(RSA)]
    for lines, problems in ((good, 0), ([BOOT, signed(RSA)], 1), (good, 0)):
        replay = ImaReplay(shared)
        failed = 0
        try:
            for _ in replay.offer(text(lines), 0, extended(lines)):
                pass
        except LogError:
            failed = 1
        assert failed == problems


def test_what_was_judged_with_other_keys_is_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is remembered as new or as old; what rests on no key is not judged twice."""
    _, der = certificate(RSA)
    keyrings = {".ima": [hashlib.sha256(der).hexdigest()]}
    one = signed(RSA).text
    other = line("/other").text
    for limit in (1 << 20, 0):
        monkeypatch.setattr(ima_judge, "MAX_REMEMBERED_CHARS", limit)
        judge_of = LineJudge(HashAlg.SHA256, parse_runtime_policy(policy(keyrings=keyrings)))
        keys = judge_of.judge(buffer_of(der).text, NO_KEYS).keys
        assert len(keys) == 1
        for known, good in ((keys, True), (NO_KEYS, False), (keys, True), (keys, True)):
            kept = judge_of.judge(other, NO_KEYS)
            assert (judge_of.judge(one, known).problem is None) is good
            assert judge_of.judge(other, known) is kept


def test_learned_keys_go_with_the_state() -> None:
    _, der = certificate(RSA)
    read = parse_runtime_policy(policy(keyrings={".ima": [hashlib.sha256(der).hexdigest()]}))
    lines = [BOOT, buffer_of(der), signed(RSA)]
    first = ImaReplay(LineJudge(HashAlg.SHA256, read))
    for _ in first.offer(text(lines[:2]), 0, extended(lines[:2])):
        pass
    again = ImaReplay(LineJudge(HashAlg.SHA256, read), state=first.confirmed)
    assert again.next_entry == 2
    for _ in again.offer(text(lines[2:]), 2, extended(lines)):
        pass
    assert again.outcome is Outcome.MATCHED


# --- what is remembered ---------------------------------------------------------------------------


def test_lines_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ima_judge, "MAX_REMEMBERED_CHARS", 1000)
    made = LineJudge(HashAlg.SHA256)
    lines = [line(f"/{n}").text for n in range(100)]
    for one in (*lines, *lines):
        made.judge(one, NO_KEYS)
    assert len(made._young) + len(made._old) < 25
    again = made.judge(lines[-1], NO_KEYS)
    assert again is made.judge(lines[-1], NO_KEYS)


@given(
    st.sampled_from(["ima-ng", "ima-sig", "ima-buf", "ima-ngv2"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\n "), max_size=8),
    st.sampled_from([None, "", "00ff", "0302"]),
    st.sampled_from(["sha1", "sha256", "sha512", "sm3", "ima:sha256"]),
    st.integers(0, 7),
    st.binary(max_size=2),
)
def test_the_quick_reader_reads_as_the_other(
    template: str, name: str, more: str | None, prefix: str, spoil: int, junk: bytes
) -> None:
    digest = {"sha1": GOOD[:40], "sha512": GOOD * 2}.get(prefix, GOOD)
    given_ = line("/" + name, digest, template=template, more=more, prefix=prefix).text
    if spoil < 3:
        at = spoil * len(given_) // 3
        given_ = given_[:at] + junk.decode("latin-1") + given_[at + len(junk) :]
    plain = parse_plain(given_)
    if plain is None:
        return
    entry = parse_entry(given_)
    assert plain == (entry.path, entry.digest.hex(), entry.data)
    assert not entry.violation
    assert entry.pcr == 10
    assert entry.template in ("ima-ng", "ima-sig")
    assert not entry.extra


def test_the_quick_reader_takes_the_usual_lines() -> None:
    for one in (line("/usr/bin/[", prefix="sha256"), line("/x", template="ima-sig", more="")):
        assert parse_plain(one.text) is not None
    assert parse_plain(signed(RSA).text) is None


# --- policies -------------------------------------------------------------------------------------


def test_a_policy_has_a_bounded_number_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_policy_file, "MAX_KEYS", 2)
    two = policy(**{"verification-keys": verification_keys(RSA, EC)})
    assert len(parse_runtime_policy(two).keys) == 2
    three = policy(**{"verification-keys": verification_keys(RSA, EC, EC)})
    with pytest.raises(UsageError, match="more than 2 keys"):
        parse_runtime_policy(three)


def test_a_host_teaches_a_bounded_number_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_policy, "MAX_KEYS", 1)
    ders = [certificate(key)[1] for key in (RSA, EC)]
    listed = policy(keyrings={".ima": [hashlib.sha256(der).hexdigest() for der in ders]})
    again = [BOOT, buffer_of(ders[0]), buffer_of(ders[0], ".ima")]
    assert problem(again, listed) is None
    assert "more than 1 keys" in (problem([*again, buffer_of(ders[1])], listed) or "")


def test_the_longest_line() -> None:
    room = MAX_LINE_CHARS - len(line("/x", template="ima-sig", more="").text)
    for size, fits in ((room, True), (room + 2, False)):
        longest = line("/x" + "y" * (size % 2), template="ima-sig", more="00" * (size // 2)).text
        assert (len(longest) <= MAX_LINE_CHARS) == fits
        if fits:
            parse_entry(longest)
        else:
            with pytest.raises(LogError, match="too long"):
                parse_entry(longest)
    exact = line("/x" + "y" * (room % 2), template="ima-sig", more="00" * (room // 2)).text
    assert len(exact) == MAX_LINE_CHARS


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"hashes": {}}, "allowlist of an older Keylime"),
        ({"something": 1}, "does not know it"),
        ({"ima": {"dm_policy": {"version": 1}}}, "device-mapper"),
        ({"ima": {"other": 1}}, "ima.other"),
        ({"ima": {"log_hash_alg": "md5"}}, "log_hash_alg"),
        ({"excludes": ["("]}, "exclude '\\('"),
        ({"verification-keys": "[]"}, "verification-keys"),
        ({"verification-keys": 7}, "verification-keys"),
        ({"verification-keys": "{}"}, "does not have keyids and pubkeys"),
        ({"verification-keys": '{"keyids": 5, "pubkeys": []}'}, "does not have keyids and pubkeys"),
        ({"verification-keys": '{"keyids": [], "pubkeys": 5}'}, "does not have keyids and pubkeys"),
        ({"verification-keys": '{"keyids": [4294967296], "pubkeys": []}'}, "key id"),
        ({"verification-keys": '{"keyids": [-1], "pubkeys": []}'}, "key id"),
        ({"verification-keys": '{"keyids": [true], "pubkeys": []}'}, "key id"),
        ({"verification-keys": '{"keyids": [], "pubkeys": ["AAAA"]}'}, "key 0"),
        ({"verification-keys": '{"keyids": [], "pubkeys": ["?"]}'}, "key 0"),
        ({"verification-keys": '{"keyids": [], "pubkeys": [1]}'}, "key 0"),
    ],
)
def test_what_a_policy_may_not_say_is_named(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_runtime_policy(policy(**bad))


@pytest.mark.parametrize("log_hash_alg", ["sha1", "sha256", "sha384", "sha512"])
def test_a_policy_of_keylime_s_full_form(log_hash_alg: str) -> None:
    full = {
        "meta": {"version": 1, "generator": 2, "timestamp": "2026-01-01"},
        "release": 0,
        "digests": {"boot_aggregate": [GOOD]},
        "excludes": [],
        "keyrings": {},
        "ima": {"ignored_keyrings": [], "log_hash_alg": log_hash_alg, "dm_policy": None},
        "ima-buf": {},
        "verification-keys": "",
    }
    assert problem([BOOT], json.dumps(full).encode()) is None


def envelope(
    payload: bytes, key: ec.EllipticCurvePrivateKey, kind: str = "application/vnd.keylime+json"
) -> bytes:
    signed_bytes = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
    value = key.sign(signed_bytes, ec.ECDSA(hashes.SHA256()))
    values = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"keyid": "x", "sig": base64.b64encode(value).decode()}],
    }
    return json.dumps(values).encode()


def pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_an_envelope_has_a_bounded_number_of_signatures() -> None:
    values = json.loads(envelope(policy(), EC))
    good = values["signatures"]
    bad = [{"sig": "AAAA"}]
    most = json.dumps(values | {"signatures": bad * 63 + good}).encode()
    assert parse_runtime_policy(most, key=pem(EC)) == parse_runtime_policy(policy())
    more = json.dumps(values | {"signatures": bad * 64 + good}).encode()
    with pytest.raises(UsageError, match="more than 64 signatures"):
        parse_runtime_policy(more, key=pem(EC))


@pytest.mark.parametrize("odd", [5, None, ["AAAA"], "é", "AA", "A A="])
def test_an_envelope_holds_base64(odd: object) -> None:
    values = json.loads(envelope(policy(), EC))
    for changed in ({"payload": odd}, {"signatures": [{"sig": odd}]}, {"signatures": [odd]}):
        with pytest.raises(UsageError, match="not base64"):
            parse_runtime_policy(json.dumps(values | changed).encode(), key=pem(EC))


def test_excludes_that_do_not_go_together_are_refused() -> None:
    for alone in ("(?P<n>/a)", "(?P<n>/b)"):
        parse_runtime_policy(policy(excludes=[alone]))
    with pytest.raises(UsageError, match="cannot be joined"):
        parse_runtime_policy(policy(excludes=["(?P<n>/a)", "(?P<n>/b)"]))


def test_a_signed_policy_needs_its_key() -> None:
    data = envelope(policy(digests={"/x": [GOOD]}), EC)
    read = parse_runtime_policy(data, key=pem(EC))
    assert read.digests["/x"] == {GOOD}
    _, der = certificate(EC)
    cert = b"-----BEGIN CERTIFICATE-----\n%b-----END CERTIFICATE-----\n" % base64.encodebytes(der)
    assert parse_runtime_policy(data, key=cert) == read
    other = ec.generate_private_key(ec.SECP256R1())
    for bad, key, why in (
        (data, None, "give the key"),
        (data, pem(other), "not signed by the key"),
        (data, pem(RSA), "elliptic curve"),
        (data, b"?", "not a public key in PEM"),
        (policy(), pem(EC), "not signed"),
        (
            data.replace(b'"payloadType": "application', b'"payloadType": "pplication'),
            pem(EC),
            "by",
        ),
        (data.replace(b'"sig": "', b'"sig": "?'), pem(EC), "not base64"),
        (json.dumps({**json.loads(data), "signatures": {}}).encode(), pem(EC), "signatures"),
        (envelope(b"[]", EC), pem(EC), "not a JSON object"),
    ):
        with pytest.raises(UsageError, match=why):
            parse_runtime_policy(bad, key=key)


def test_a_walk_says_what_each_line_does() -> None:
    lines = [
        BOOT.text,
        line("/other", pcr=11).text,
        line(b"/a\nb", violation=True).text.split("\n")[0],
    ]
    walk = LineWalk(LineJudge(HashAlg.SHA256))
    made = [walk.step([*lines, "b"], at)[0] for at in range(4)]
    assert [None if m is None else (m.extended is None, m.violation) for m in made] == [
        (False, False),
        (True, False),
        (False, True),
        None,
    ]
