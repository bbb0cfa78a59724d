"""`provider-proxy policy`: golden hosts in, policies out, and an update without a false alarm."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from docs_helpers import fenced
from event_log_helpers import LOG, MEASURED, expected, header, new
from helpers import make_evidence, run_here
from ima_helpers import BAD, GOOD, Line, certificate, extended, line, text
from watch_helpers import b64

from provider_proxy.cli.main import build_parser
from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, PcrValues, QuoteRequest
from provider_proxy.evidence.request_file import RequestRecord, encode_request
from provider_proxy.testing.soft_tpm import SoftTpm

Done = subprocess.CompletedProcess[str]
OLD_KERNEL, NEW_KERNEL = (sha256(name).hexdigest() for name in (b"6.1.0-40", b"6.1.0-41"))
BOOT_A, BOOT_B = (sha256(name).hexdigest() for name in (b"boot a", b"boot b"))
_, KEY = certificate()
UEFI = ",".join(str(pcr) for pcr in range(8) if MEASURED >> pcr & 1)


def listed(boot: str, kernel: str) -> list[Line]:
    """What a host measures under one kernel."""
    key = sha256(KEY).hexdigest()
    return [
        line("boot_aggregate", boot),
        line(".ima", key, template="ima-buf", more=KEY.hex()),
        line("selinux-state", sha256(b"on").hexdigest(), template="ima-buf", more=b"on".hex()),
        line("/usr/bin/bash"),
        line("/lib/modules/kernel.ko", kernel),
        line("/var/log/wtmp", violation=True),
        line("/tmp/x\ny"),
    ]


OLD, NEW = listed(BOOT_A, OLD_KERNEL), listed(BOOT_B, NEW_KERNEL)


class Host(SoftTpm):
    """A host with these logs."""

    log = LOG

    def __init__(self, lines: Sequence[Line]) -> None:
        super().__init__()
        self.lines = lines

    def read(self, bank: HashAlg, mask: int) -> PcrValues:
        values = dict(super().read(bank, mask).values) | {10: extended(self.lines, bank.label)}
        values |= self.boot_pcrs(bank)
        return PcrValues(
            bank=bank, values=tuple((n, v) for n, v in sorted(values.items()) if mask >> n & 1)
        )

    def boot_pcrs(self, bank: HashAlg) -> dict[int, bytes]:
        return expected(bank, 3)

    def save(self, folder: Path, name: str, *, count: int | None = None) -> list[str]:
        """What `fetch` leaves, and the options that name it."""
        request = QuoteRequest(nonce=Nonce(b"n" * 32), mask=PcrMask(0xFF | 1 << 10))
        values = json.loads(make_evidence(self, request))
        values["results"] |= {
            "ima_measurement_list": text(self.lines[:count]),
            "ima_measurement_list_entry": 0,
            "mb_measurement_list": b64(self.log),
        }
        body = json.dumps(values).encode()
        record = RequestRecord(
            request=request,
            made_at_s=1.0,
            answered_after_s=0.5,
            evidence_sha256=sha256(body).digest(),
        )
        (folder / f"{name}.json").write_bytes(body)
        (folder / f"{name}.request").write_bytes(encode_request(record))
        (folder / f"{name}.ak").write_bytes(self.ak_public)
        return [
            *("--evidence", f"{name}.json", "--request", f"{name}.request", "--ak-tpm"),
            f"{name}.ak",
        ]


class Booted(Host):
    """One whose firmware measured into each PCR of 0 to 7."""

    log = header() + b"".join(new(pcr, 4, bytes(4)) for pcr in range(8))

    def boot_pcrs(self, bank: HashAlg) -> dict[int, bytes]:
        value = bank.digest(bytes(bank.digest_bytes) + bank.digest(bytes(4)))
        return dict.fromkeys(range(8), value)


def policy(folder: Path, *words: str, code: int = 0) -> Done:
    done = run_here("policy", *words, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def verify(folder: Path, name: str, *words: str) -> Done:
    return run_here(
        *("verify", f"{name}.json", "--request", f"{name}.request", "--ak-tpm", f"{name}.ak"),
        *words,
        cwd=folder,
    )


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_a_kernel_update_without_a_false_alarm(tmp_path: Path) -> None:
    """Old and new policy each know one kernel; merged they let both hosts pass, and no other."""
    for name, lines in (("old", OLD), ("new", NEW)):
        words = Host(lines).save(tmp_path, name)
        done = policy(
            tmp_path, "make", *words, "--runtime-policy", f"{name}.policy", "--uefi-pcrs", UEFI
        )
        assert "1 violations are not listed" in done.stderr
    policy(tmp_path, "merge", "old.policy", "new.policy", "--out", "both.policy")
    count = ("--ima-violations", "count")
    for name, good in (("old", ("old", "both")), ("new", ("new", "both"))):
        for used in ("old", "new", "both"):
            done = verify(tmp_path, name, "--runtime-policy", f"{used}.policy", *count)
            assert done.returncode == (0 if used in good else 1), done.stderr
    other = Host(listed(BOOT_A, sha256(b"rootkit").hexdigest()))
    other.save(tmp_path, "other")
    done = verify(tmp_path, "other", "--runtime-policy", "both.policy", *count)
    assert done.returncode == 1
    assert "/lib/modules/kernel.ko has the digest" in done.stderr
    assert verify(tmp_path, "old", "--runtime-policy", "both.policy").returncode == 1  # violations


def test_one_policy_of_two_golden_hosts(tmp_path: Path) -> None:
    words = Host(OLD).save(tmp_path, "old") + Host(NEW).save(tmp_path, "new")
    policy(tmp_path, "make", *words, "--runtime-policy", "r", "--exclude", "/tmp/")
    made = read(tmp_path / "r")
    assert made["digests"]["boot_aggregate"] == [BOOT_A, BOOT_B]
    assert made["digests"]["/lib/modules/kernel.ko"] == [OLD_KERNEL, NEW_KERNEL]
    assert made["keyrings"] == {".ima": [sha256(KEY).hexdigest()]}
    assert made["ima-buf"] == {"selinux-state": [sha256(b"on").hexdigest()]}
    assert made["excludes"] == ["/tmp/"]
    assert "/tmp/x\ny" not in made["digests"]
    assert "/var/log/wtmp" not in made["digests"]
    assert set(made) == {
        *("meta", "release", "digests", "excludes", "keyrings", "ima", "ima-buf"),
        "verification-keys",
    }


def test_policies_of_pcrs(tmp_path: Path) -> None:
    host = Host(OLD)
    words = host.save(tmp_path, "old")
    policy(
        tmp_path,
        *("make", *words, "--tpm-policy", "t", "--boot-policy", "b", "--uefi-pcrs", UEFI),
    )
    values = {str(pcr): [v.hex()] for pcr, v in host.read(HashAlg.SHA256, 0xFF).values}
    assert read(tmp_path / "t") == values
    boot = read(tmp_path / "b")
    assert sorted(boot) == ["0", "1", "4", "7"]
    assert boot["4"] == [sha256(b"loader").hexdigest()]
    good = ("--tpm-policy", "t", "--boot-policy", "b")
    assert verify(tmp_path, "old", *good).returncode == 0
    boot["4"] = [BAD]
    (tmp_path / "b").write_text(json.dumps(boot))
    done = verify(tmp_path, "old", *good)
    assert done.returncode == 1
    assert "PCR 4 was extended with" in done.stderr


def test_evidence_that_does_not_verify_makes_no_policy(tmp_path: Path) -> None:
    words = Host(OLD).save(tmp_path, "old")
    Host(OLD).save(tmp_path, "other")
    bad = [w if w != "old.ak" else "other.ak" for w in words]
    policy(tmp_path, "make", *bad, "--runtime-policy", "r", code=1)
    Host(OLD).save(tmp_path, "part", count=3)
    part = [w.replace("old", "part") for w in words]
    done = policy(tmp_path, "make", *part, "--runtime-policy", "r", code=1)
    assert "--ima-list" in done.stderr
    (tmp_path / "list").write_text(text(OLD))
    policy(tmp_path, "make", *part, "--ima-list", "list", "--runtime-policy", "r")
    assert "/usr/bin/bash" in read(tmp_path / "r")["digests"]
    policy(tmp_path, "make", *words, code=2)
    policy(tmp_path, "make", *words, "--request", "old.request", "--runtime-policy", "r", code=2)
    policy(tmp_path, "make", *words, "--tpm-policy", "t", "--pcrs", "10", code=2)
    policy(tmp_path, "make", *words, "--tpm-policy", "t", "--pcrs", "9", code=2)
    policy(tmp_path, "make", *words, "--boot-policy", "b", "--uefi-pcrs", "0,9", code=2)


def test_saved_evidence_with_a_part_of_the_list_is_judged_by_the_whole(tmp_path: Path) -> None:
    words = Host(OLD).save(tmp_path, "old", count=3)
    (tmp_path / "list").write_text(text([*OLD, line("/behind/the/quote")]))
    policy(tmp_path, "make", *words, "--ima-list", "list", "--runtime-policy", "r")
    rules = ("--runtime-policy", "r", "--ima-violations", "count")
    assert "give the whole list" in verify(tmp_path, "old", *rules).stderr
    assert verify(tmp_path, "old", *rules, "--ima-list", "list").returncode == 0
    (tmp_path / "list").write_text(text([*OLD[:3], line("/evil"), *OLD[3:]]))
    assert verify(tmp_path, "old", *rules, "--ima-list", "list").returncode == 1
    assert verify(tmp_path, "old", *rules, "--ima-list", "absent").returncode == 3
    done = verify(tmp_path, "old", "--insecure-any-state", "--ima-list", "list")
    assert done.returncode == 2
    assert "--ima-list needs --ima or" in done.stderr


def test_judging_a_list(tmp_path: Path) -> None:
    words = Host(OLD).save(tmp_path, "old")
    policy(tmp_path, "make", *words, "--runtime-policy", "r")
    lines = [*OLD, line("/evil"), Line("garbage", b"")]
    (tmp_path / "list").write_text(text(lines))
    done = policy(tmp_path, "judge", "--runtime-policy", "r", "list", code=1)
    said = done.stdout.splitlines()
    assert said[0].startswith("5: /var/log/wtmp was written to")
    assert said[1] == "8: /evil is not in the runtime policy"
    assert said[2].startswith("9: a line of the IMA list is not")
    assert said[3] == "3 of 9 are refused"
    done = policy(
        *(
            tmp_path,
            "judge",
            "--runtime-policy",
            "r",
            "list",
            "--json",
            "--ima-violations",
            "count",
        ),
        code=1,
    )
    values = [json.loads(one) for one in done.stdout.splitlines()]
    assert [value.get("place") for value in values] == [8, 9, None]
    assert values[0]["what"] == line("/evil").text
    assert values[-1] == {"judged": 9, "refused": 2}
    (tmp_path / "list").write_text(text(OLD))
    policy(
        tmp_path, *("judge", "--runtime-policy", "r", "list", "--ima-violations", "count"), code=0
    )
    (tmp_path / "list").write_text("")
    policy(tmp_path, "judge", "--runtime-policy", "r", "list", code=1)
    policy(tmp_path, "judge", "--runtime-policy", "missing", "list", code=3)
    policy(tmp_path, "judge", "--runtime-policy", "list", "list", code=2)
    policy(tmp_path, "judge", "list", code=2)


def test_judging_an_event_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(LOG)
    good = {"4": [sha256(b"loader").hexdigest()]}
    (tmp_path / "b").write_text(json.dumps(good))
    policy(tmp_path, "judge", "--boot-policy", "b", "log")
    (tmp_path / "b").write_text(json.dumps({"4": [BAD], "5": [BAD]}))
    done = policy(tmp_path, "judge", "--boot-policy", "b", "log", "--json", code=1)
    *refused, counted = (json.loads(one) for one in done.stdout.splitlines())
    assert [one["place"] for one in refused] == [6, None]
    assert "0x80000003" in refused[0]["what"]
    assert "PCR 5 was never extended" in refused[1]["problem"]
    assert counted["refused"] == 2
    (tmp_path / "log").write_bytes(LOG[:-3])
    policy(tmp_path, "judge", "--boot-policy", "b", "log", code=1)


def test_explaining(tmp_path: Path) -> None:
    words = Host(OLD).save(tmp_path, "old")
    policy(
        tmp_path,
        *("make", *words, "--runtime-policy", "r", "--boot-policy", "b"),
        *("--tpm-policy", "t", "--uefi-pcrs", UEFI, "--exclude", "/home/"),
    )
    done = policy(
        tmp_path, *("explain", "--runtime-policy", "r", "--boot-policy", "b", "--tpm-policy", "t")
    )
    for words_said in (
        "PCR 10 must have been extended",
        "boot PCRs may be one of 1 known states",
        "'(/home/)'",
        ".ima may be loaded",
        "selinux-state may be measured",
        "PCR 4: extended at least once, and with nothing but 1 known digests",
        f"PCR 2 must be {'00' * 32}.",
    ):
        assert words_said in done.stdout
    (tmp_path / "r").write_text(json.dumps({"digests": {"/a": [GOOD]}}))
    done = policy(tmp_path, "explain", "--runtime-policy", "r")
    assert "boot_aggregate is not listed: every host is refused" in done.stdout
    policy(tmp_path, "explain", code=2)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({"digests": {}}, {"4": [GOOD]}, "can only be merged with runtime policies"),
        ({"4": [GOOD]}, {"5": [GOOD]}, "no PCR in common"),
        ({"4": [GOOD]}, {"4": []}, "must not be extended"),
        (
            {"digests": {}, "ima": {"log_hash_alg": "sha1"}},
            {"digests": {}, "ima": {"log_hash_alg": "sha256"}},
            "log_hash_alg",
        ),
        ({"digests": {}}, {"digests": {"/a": ["x"]}}, "not a digest"),
        ({"digests": {}}, {"payload": "x"}, "signed"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], why: str
) -> None:
    for name, values in (("a", first), ("b", second)):
        (tmp_path / name).write_text(json.dumps(values))
    assert why in policy(tmp_path, "merge", "a", "b", code=2).stderr


def test_a_pcr_that_only_one_policy_names_is_said_to_be_lost(tmp_path: Path) -> None:
    for name, values in (("a", {"4": [GOOD], "7": GOOD}), ("b", {"4": [BAD]})):
        (tmp_path / name).write_text(json.dumps(values))
    done = policy(tmp_path, "merge", "a", "b")
    assert json.loads(done.stdout) == {"4": [GOOD, BAD]}
    assert "PCR 7 is not in all of the policies" in done.stderr


def test_the_page_s_commands_run(tmp_path: Path) -> None:
    """docs/policies.md as it stands, over saved evidence and the logs of it."""
    host = Booted(OLD)
    for folder, lines, name in ((tmp_path, OLD, "golden.ak"), (tmp_path / "new", NEW, "../new.ak")):
        folder.mkdir(exist_ok=True)
        host.lines = lines
        host.save(folder, "x")
        (folder / "x.json").rename(folder / "evidence.json")
        (folder / "x.request").rename(folder / "request.json")
        (folder / "x.ak").rename(folder / name)
    (tmp_path / "ima.txt").write_text(text([*OLD, line("/evil")]))
    (tmp_path / "boot.log").write_bytes(Booted.log)
    lines_of = [one for block in fenced("docs/policies.md", "sh") for one in block.splitlines()]
    asked, *ours = (shlex.split(one) for one in lines_of)
    assert build_parser("fetch").parse_args(asked[1:]).mask == "0x4ff"
    codes = []
    for words in ours:
        assert words[:2] == ["provider-proxy", "policy"]
        codes.append(run_here(*words[1:], cwd=tmp_path).returncode)
    assert codes == [0, 0, 0, 0, 1, 0]
    both = read(tmp_path / "both.json")
    assert both["digests"]["/lib/modules/kernel.ko"] == [OLD_KERNEL, NEW_KERNEL]
