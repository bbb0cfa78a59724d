"""Our judge of logs against those of others: Keylime 7.14.3 line by line, tpm2_eventlog PCR by PCR.

Each difference must be one of the table in docs/policies.md, in the direction that it says, and each row
of the table must occur. What a difference is, is told from the line's text alone, not by our reader.
"""

from __future__ import annotations

import base64
import collections
import copy
import hashlib
import json
import random
import re
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from docs_helpers import code, rows
from event_log_helpers import header as agile_header
from event_log_helpers import new as agile_event
from ima_helpers import (
    BAD,
    GOOD,
    HASH_NUMBERS,
    PrivateKey,
    certificate,
    key_id,
    line,
    signature,
)
from keylime_helpers import PYTHON
from places import ROOT, SYSTEM

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs.event_log import (
    EV_NO_ACTION,
    STARTUP_LOCALITY,
    parse_event_log,
    replay,
)
from provider_proxy.evidence.logs.ima_judge import LineJudge, LineWalk, Violations
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import HashAlg

pytestmark = pytest.mark.real

ORACLE = SYSTEM / "keylime/judge_lists.py"
STUB = SYSTEM / "keylime/stub"
SEED = 20261128
MUTATIONS = 150
CORPUS = next(
    (p / "shared/corpus" for p in ROOT.parents if (p / "shared/corpus").is_dir()), Path("/nowhere")
)
Policy = dict[str, Any]
EMPTY: Policy = {
    "meta": {"version": 1, "generator": 1},
    "release": 0,
    "digests": {},
    "excludes": [],
    "keyrings": {},
    "ima": {"ignored_keyrings": [], "log_hash_alg": "sha1", "dm_policy": None},
    "ima-buf": {},
    "verification-keys": "",
}
STRICTER, LAXER = "stricter", "laxer"
DIRECTIONS: Mapping[str, frozenset[str]] = {
    "violation": frozenset((STRICTER, LAXER)),
    "other PCR": frozenset((LAXER,)),
    "template": frozenset((LAXER,)),
    "template hash": frozenset((LAXER,)),
    "name": frozenset((LAXER,)),
    "buffer": frozenset((STRICTER,)),
    "signature": frozenset((LAXER,)),
    "trailing field": frozenset((LAXER,)),
    "digest": frozenset((STRICTER,)),
    "MD5": frozenset((STRICTER,)),
    "long name": frozenset((STRICTER,)),
}
WIDTHS = {"sha1": 40, "sha256": 64, "sha384": 96, "sha512": 128}


def kind_of(text: str, policy: Policy) -> str | None:
    """Which row of the table a line falls under, by its text."""
    words = text.split(" ")
    if words[0] != "10":
        return "other PCR"
    if len(words) < 5:
        return None
    if words[1] and not words[1].strip("0"):
        return "violation"
    if len(words[1]) != WIDTHS[policy["ima"]["log_hash_alg"]]:
        return "template hash"
    if words[2] not in ("ima", "ima-ng", "ima-sig", "ima-buf"):
        return "template"
    if re.search(r"\\x[89a-f][0-9a-f]|\n", text):
        return "name"
    if len(words[4]) > 4096:
        return "long name"
    digest = words[3].rpartition(":")[2]
    if digest != digest.lower() or "" in words[3:5] or (":" not in words[3] and words[2] != "ima"):
        return "digest"
    if words[2] in ("ima-sig", "ima-buf") and len(words) == 5:
        return "trailing field"
    if words[2] == "ima-sig" and len(words) == 6 and words[5]:
        header = bytes.fromhex(words[5])
        if len(header) < 9 or struct.unpack(">H", header[7:9])[0] != len(header) - 9:
            return "signature"
        if header[2] == HASH_NUMBERS["md5"]:
            return "MD5"
    if words[2] == "ima-buf" and len(words) == 6:
        buffer = bytes.fromhex(words[5])
        if hashlib.new(words[3].partition(":")[0], buffer).hexdigest() != digest:
            return "buffer"
    return None


# --- material -----------------------------------------------------------------------------------------

RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP384R1())


def hash_of(data: bytes, algorithm: str = "sha256") -> str:
    return hashlib.new(algorithm, data).hexdigest()


def spki(key: PrivateKey) -> str:
    made = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(made).decode()


def buffer_line(data: bytes, name: str, **more: Any) -> str:
    return line(name, hash_of(data), template="ima-buf", more=data.hex(), **more).text


def signed_line(key: PrivateKey, path: str, algorithm: str = "sha256", **how: Any) -> str:
    digest = hash_of(path.encode(), algorithm)
    made = signature(key, digest, algorithm, **how)
    return line(path, digest, template="ima-sig", more=made, prefix=algorithm).text


def material() -> list[str]:
    """Lines of every template and of every row of the table, and ones that are broken."""
    _, rsa_der = certificate(RSA)
    _, ec_der = certificate(EC)
    pem = b"-----BEGIN CERTIFICATE-----\n%b-----END CERTIFICATE-----\n" % base64.encodebytes(
        rsa_der
    )
    lines = [line("boot_aggregate").text]
    for n, algorithm in enumerate(("sha1", "sha224", "sha256", "sha384", "sha512")):
        for key, name in ((RSA, "rsa"), (EC, "ec")):
            lines.append(signed_line(key, f"/signed/before/{name}/{n}", algorithm))
    lines += [
        buffer_line(rsa_der, ".ima"),
        buffer_line(ec_der, ".secondary_trusted_keys"),
        buffer_line(pem, ".ima"),
        buffer_line(base64.b64decode(spki(EC)), ".other"),
        buffer_line(b"\1\2\3", ".ima"),
        buffer_line(b"\x30\x82\x01\x00", ".ima"),
        buffer_line(b"dm_version=4.46.0;", "dm_table_load"),
        buffer_line(b"", "selinux-state"),
        buffer_line(rsa_der, "dm_table_load"),
        buffer_line(rsa_der[:-1], ".ima"),
        line(".ima", BAD, template="ima-buf", more="00ff").text,
    ]
    for n, algorithm in enumerate(("sha1", "sha224", "sha256", "sha384", "sha512", "md5")):
        for key, name in ((RSA, "rsa"), (EC, "ec")):
            lines.append(signed_line(key, f"/signed/{name}/{n}", algorithm))
    lines += [
        signed_line(RSA, "/signed/portable", kind=5),
        signed_line(RSA, "/signed/xattr", kind=4),
        signed_line(RSA, "/signed/v1", version=1),
        signed_line(RSA, "/signed/v3", version=3, kind=6),
        signed_line(EC, "/signed/wrong/id", id_=key_id(RSA)),
        signed_line(RSA, "/signed/unknown/id", id_=b"\1\2\3\4"),
        line("/signed/other/digest", BAD, template="ima-sig", more=signature(RSA, GOOD)).text,
        line("/signed/no/signature", template="ima-sig", more="030204deadbeef").text,
        line("/signed/cut", template="ima-sig", more=signature(RSA, GOOD)[:-2]).text,
        line("/unsigned", template="ima-sig", more="").text,
        line("/unsigned/cut", template="ima-sig", more="").text.rstrip(" "),
        line("/ng").text,
        line("/ng/sha512", hash_of(b"x", "sha512"), prefix="sha512").text,
        line("/ng/sm3", prefix="sm3").text,
        line("/ng/space in it").text,
        line("/ng/\u00e9\u4e00").text,
        line(b"/ng/\xff").text,
        line("/ng/\\xff").text,
        line("/ng/" + "x" * 5000).text,
        line("/ima", hash_of(b"x", "sha1"), template="ima").text,
        line("/ima/md5", hash_of(b"x", "md5"), template="ima").text,
        line("/ngv2", template="ima-ngv2", prefix="ima:sha256").text,
        line("/sigv2", template="ima-sigv2", prefix="verity:sha256", more="").text,
        line("/violation", violation=True).text,
        line("/violation/sig", violation=True, template="ima-sig", more="").text,
        line("/violation/ima", hash_of(b"x", "sha1"), violation=True, template="ima").text,
        line("/sha256/list", hashed="sha256").text,
        line("/sha384/list", hashed="sha384").text,
        line("/sha256/violation", hashed="sha256", violation=True).text,
        line("/pcr11", pcr=11).text,
        line("/pcr9", pcr=9).text,
    ]
    plain = line("/broken").text
    lines += [
        plain.upper().replace("IMA-NG", "ima-ng").replace("SHA256", "sha256"),
        plain.replace("/broken", "/changed"),
        plain.replace(GOOD, BAD),
        plain.replace("sha256:", "sha256: "),
        plain.replace("ima-ng", "ima-xx"),
        plain + " ",
        plain.replace(GOOD, GOOD.upper()),
        "10 " + plain,
        plain.partition(" ")[2],
        line("/bare", hash_of(b"x", "sha1"), prefix="sha1").text.replace("sha1:", ""),
        "",
        "10",
        "10  ima-ng  ",
    ]
    return lines


def learned(lines: Sequence[str]) -> Policy:
    """A policy that lists what some lines say, as a person would make it from a golden host."""
    policy = copy.deepcopy(EMPTY)
    for text in lines:
        words = text.split(" ", 5)
        if len(words) < 5:
            continue
        template, (_, _, digest), name = words[2], words[3].rpartition(":"), words[4]
        if template in ("ima", "ima-ng", "ima-ngv2"):
            name = text.split(" ", 4)[4]
        if not re.fullmatch("[0-9a-f]{40,128}", digest):
            continue
        lists = ("keyrings", "ima-buf") if template == "ima-buf" else ("digests",)
        for part in lists:
            policy[part].setdefault(name, []).append(digest)
    return policy


def with_keys(policy: Policy, *keys: PrivateKey) -> Policy:
    ids = [int.from_bytes(key_id(key), "big") for key in keys]
    text = json.dumps({"meta": {"version": 1}, "keyids": ids, "pubkeys": list(map(spki, keys))})
    return policy | {"verification-keys": text}


def mutated(policy: Policy, rng: random.Random) -> Policy:
    """The same with a few things changed."""
    policy = copy.deepcopy(policy)
    for _ in range(rng.randint(1, 4)):
        part = rng.choice(("digests", "digests", "keyrings", "ima-buf"))
        names = sorted(policy[part])
        choice = rng.randrange(9)
        if choice == 0 and names:
            del policy[part][rng.choice(names)]
        elif choice == 1 and names:
            policy[part][rng.choice(names)] = [rng.choice((BAD, GOOD, GOOD[:40]))]
        elif choice == 2:
            other = rng.choice(("digests", "keyrings", "ima-buf"))
            policy[part], policy[other] = policy[other], policy[part]
        elif choice == 3:
            policy["excludes"].append(
                rng.choice(("/signed/", "/ng", ".*ima", r"\.ima$", "(?i)/NG", "x|/s", ".", "[^/]"))
            )
            try:
                re.compile("(" + ")|(".join(policy["excludes"]) + ")")
            except re.error:
                policy["excludes"].pop()
        elif choice == 4:
            policy["ima"]["ignored_keyrings"].append(rng.choice((".ima", "*", "dm_table_load")))
        elif choice == 5:
            policy["ima"]["log_hash_alg"] = rng.choice(sorted(WIDTHS))
        elif choice == 6:
            keys: list[PrivateKey] = [RSA, EC]
            policy = with_keys(policy, *rng.sample(keys, rng.randint(1, 2)))
        elif choice == 7:
            policy[part] = {}
        else:
            policy["digests"]["boot_aggregate"] = [BAD]
    return policy


def cases() -> Iterator[tuple[str, list[str], Policy, bool]]:
    lists = {"made": material()}
    for path in sorted(CORPUS.glob("ima/*.ascii")):
        text = path.read_bytes().decode("utf-8", "backslashreplace")
        lists[path.name] = [one for one in text.split("\n") if one][:300]
    rng = random.Random(SEED)  # the same cases at every run
    for name, lines in lists.items():
        full = learned(lines)
        for policy in (EMPTY, full, with_keys(full, RSA), with_keys(EMPTY, RSA, EC)):
            yield name, lines, policy, True
            yield name, lines, policy, False
        for _ in range(MUTATIONS if name == "made" else MUTATIONS // 10):
            shuffled = list(lines)
            if rng.random() < 0.3:
                rng.shuffle(shuffled)
            yield name, shuffled, mutated(full, rng), rng.random() < 0.5


# --- both judges ----------------------------------------------------------------------------------------


def ours(lines: Sequence[str], policy: Policy, tolerant: bool) -> list[bool]:
    read = parse_runtime_policy(json.dumps(policy).encode())
    choice = Violations.COUNT if tolerant else Violations.REFUSE
    walk = LineWalk(LineJudge(HashAlg.SHA256, read, violations=choice))
    verdicts = []
    for text in lines:
        walk.is_open = False  # each line for itself
        try:
            made, _ = walk.step([text], 0)
        except LogError:
            verdicts.append(False)
        else:
            verdicts.append(made is not None and made.problem is None)
    return verdicts


def keylimes(given: Sequence[tuple[str, list[str], Policy, bool]]) -> list[list[bool]]:
    asked = [{"lines": lines, "policy": p, "tolerant": t} for _, lines, p, t in given]
    done = subprocess.run(
        [PYTHON, ORACLE],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(STUB), "PATH": "/usr/bin:/bin"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [one["lines"] for one in json.loads(done.stdout)]


def test_line_by_line_the_verdict_is_keylimes(capsys: pytest.CaptureFixture[str]) -> None:
    given = list(cases())
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for (name, lines, policy, tolerant), theirs in zip(given, keylimes(given), strict=True):
        for text, we, they in zip(lines, ours(lines, policy, tolerant), theirs, strict=True):
            counts["both allow" if we and they else "both refuse" if we == they else "differ"] += 1
            if we == they:
                continue
            kind = kind_of(text, policy)
            direction = LAXER if we else STRICTER
            counts[f"{kind}: {direction}"] += 1
            if kind is None or direction not in DIRECTIONS[kind]:
                wrong.append((name, direction, kind, text[:200]))
    with capsys.disabled():
        print(f"\n{len(given)} lists against Keylime's judge, lines: {dict(counts)}")
    assert not wrong, f"{len(wrong)} lines differ for no reason: {wrong[:5]}"
    assert counts["both allow"] > 1000
    assert counts["both refuse"] > 1000


def test_keylime_converts_an_allowlist_as_the_refusal_says(tmp_path: Path) -> None:
    old = {"meta": {"version": 6}, "hashes": {"/bin/sh": [GOOD]}, "keyrings": {".ima": [BAD]}}
    (tmp_path / "FILE").write_text(json.dumps(old))
    with pytest.raises(UsageError, match="older Keylime") as refused:
        parse_runtime_policy(json.dumps(old).encode())
    program, *words = str(refused.value).split("`")[1].split()
    assert f"`{program} {' '.join(words)}`" in (ROOT / "docs/policies.md").read_text()
    done = subprocess.run(
        [PYTHON.parent / program, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(STUB), "PATH": "/usr/bin:/bin"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = parse_runtime_policy((tmp_path / "POLICY").read_bytes())
    assert made.digests == {"/bin/sh": {GOOD}}
    assert made.keyrings == {".ima": {BAD}}


def test_the_table_of_differences_is_this_one() -> None:
    found = rows("docs/policies.md", "Difference", "Here", "Keylime 7.14.3", "Why")
    assert [code(row[0]) for row in found] == list(DIRECTIONS)


@pytest.mark.parametrize("kind", [k for k in DIRECTIONS if k != "violation"])
def test_each_difference_is_there(kind: str) -> None:
    """A row of the table that Keylime no longer differs in is to be taken out."""
    lines = material()
    policy = with_keys(learned(lines), RSA, EC)
    if kind == "digest":
        policy["digests"]["/bare"] = [hash_of(b"x", "sha1")]
        policy["digests"]["/broken"] = [GOOD]
    if kind == "MD5":  # its digest is not one that a policy may list
        policy = with_keys(EMPTY, RSA, EC)
    (theirs,) = keylimes([("", lines, policy, True)])
    differ = [
        text
        for text, we, they in zip(lines, ours(lines, policy, True), theirs, strict=True)
        if we != they and kind_of(text, policy) == kind
    ]
    assert differ


# --- event logs against tpm2_eventlog ------------------------------------------------------------------


def eventlog_pcrs(path: Path) -> dict[str, dict[int, str]] | None:
    """What tpm2_eventlog replays; None where it reads no log."""
    done = subprocess.run(
        ["tpm2_eventlog", path], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode != 0:
        return None
    found: dict[str, dict[int, str]] = {}
    bank = ""
    _, _, tail = done.stdout.rpartition("\npcrs:")
    for text in tail.splitlines():
        if re.fullmatch(r"  \w+:", text):
            bank = text.strip(" :")
        elif match := re.fullmatch(r"\s+(\d+)\s*: 0x([0-9a-f]+)", text):
            found.setdefault(bank, {})[int(match[1])] = match[2]
    return found


def check_event_log(path: Path) -> int:
    """Hold a log against tpm2_eventlog; how many PCRs were compared."""
    theirs = eventlog_pcrs(path)
    try:
        events = parse_event_log(path.read_bytes())
    except LogError:
        return 0
    if theirs is None:
        return 0
    located = any(e.kind == EV_NO_ACTION and e.data.startswith(STARTUP_LOCALITY) for e in events)
    compared = 0
    for label, values in theirs.items():
        if label not in {alg.label for alg in HashAlg}:  # SM3
            continue
        bank = HashAlg.from_label(label)
        try:
            mine = replay(events, bank)
        except LogError:
            continue
        for pcr, value in values.items():
            if pcr == 0 and located:  # tpm2_eventlog 5.4 passes over StartupLocality
                continue
            if pcr in mine:
                assert mine[pcr].hex() == value, f"{path.name}: {label} PCR {pcr}"
                compared += 1
    return compared


def test_event_logs_replay_as_tpm2_eventlog_replays_them(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    compared = 0
    for number in range(20):
        body = b"".join(
            agile_event(rng.randrange(16), rng.choice((4, 5, 8)), rng.randbytes(rng.randrange(40)))
            for _ in range(rng.randrange(1, 60))
        )
        path = tmp_path / f"{number}.bin"
        path.write_bytes(agile_header() + body)
        compared += check_event_log(path)
    assert compared > 200


def test_event_logs_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    logs = sorted(CORPUS.glob("eventlog/*"))
    if not logs:
        pytest.skip("no corpus")
    counted = {path.name: check_event_log(path) for path in logs}
    with capsys.disabled():
        print(f"\n{len(logs)} event logs, {sum(counted.values())} PCRs as tpm2_eventlog says")
    assert sum(counted.values()) > 300
