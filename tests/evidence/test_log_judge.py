"""The one judge of logs: what a policy speaks of must be there, by every way that uses it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from event_log_helpers import LOG, MEASURED, expected
from ima_helpers import GOOD, extended, line, text

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs.boot_policy import parse_boot_policy
from provider_proxy.evidence.logs.ima_judge import LineJudge, Violations
from provider_proxy.evidence.logs.judge import DEFAULT_UEFI_PCRS, AnswerLogs, LogJudge, LogPolicy
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import AkName, ClockState, HashAlg, HostLogs, VerifiedQuote

SHA256 = HashAlg.SHA256
HOST = [
    line("boot_aggregate"),
    line("/a"),
    line("/b"),
    line("/pcr11", pcr=11),
    line("/v", violation=True),
]
RUNTIME = parse_runtime_policy(
    json.dumps({"digests": {name: [GOOD] for name in ("boot_aggregate", "/a", "/b")}}).encode()
)
LOGS = HostLogs(ima=text(HOST), uefi=LOG)


def quote(pcr10: bytes | None = None, bank: HashAlg = SHA256) -> VerifiedQuote:
    pcrs = dict.fromkeys(range(24), bytes(bank.digest_bytes)) | expected(bank, 3)
    pcrs[10] = extended(HOST, bank.label) if pcr10 is None else pcr10
    return VerifiedQuote(
        bank=bank,
        pcrs=pcrs,
        clock=ClockState(reset_count=1, restart_count=0, clock_ms=1),
        clock_safe=True,
        firmware_version=1,
        was_reset=False,
        ak_name=AkName(b""),
        claims=None,
    )


def judge(policy: LogPolicy, logs: HostLogs, made: VerifiedQuote | None = None) -> str | None:
    try:
        AnswerLogs(policy, logs).check(made or quote())
    except LogError as exc:
        return str(exc)
    return None


def test_the_firmware_has_eight_pcrs() -> None:
    assert DEFAULT_UEFI_PCRS == 0xFF


COUNT = Violations.COUNT
WHOLE = LogPolicy(runtime=RUNTIME, violations=COUNT, uefi_mask=MEASURED)


def test_logs_that_are_as_wanted() -> None:
    logs = AnswerLogs(WHOLE, LOGS)
    assert logs.needed_mask == MEASURED | 1 << 10
    logs.check(quote())
    assert (logs.violations, logs.other_lines) == (1, 1)


@pytest.mark.parametrize(
    ("policy", "mask"),
    [
        (LogPolicy(), 0),
        (LogPolicy(ima=True), 1 << 10),
        (LogPolicy(runtime=RUNTIME), 1 << 10),
        (LogPolicy(uefi_mask=0x81), 0x81),
        (LogPolicy(ima=True, uefi_mask=0x81), 0x481),
    ],
)
def test_the_pcrs_to_ask_for(policy: LogPolicy, mask: int) -> None:
    assert policy.needed_mask == mask
    assert policy.wants_ima == bool(mask & 0x400)


def test_a_boot_policy_is_of_the_log_s_pcrs() -> None:
    boot = parse_boot_policy(json.dumps({"4": [GOOD], "7": [GOOD]}).encode(), bank=SHA256)
    LogPolicy(uefi_mask=0x90, boot=boot)
    with pytest.raises(UsageError, match="a PCR that the event log is not checked for"):
        LogPolicy(uefi_mask=0x10, boot=boot)


MISSING: dict[str, tuple[HostLogs, str]] = {
    "no list": (replace(LOGS, ima=None), "PCR 10 and no IMA list"),
    "no log": (replace(LOGS, uefi=None), "no firmware event log"),
    "an empty log": (replace(LOGS, uefi=b""), "ends early"),
    "an empty list": (replace(LOGS, ima=""), "does not lead to the signed PCR 10"),
    "absent": (
        replace(LOGS, ima=None, ima_missing="absent"),
        "no IMA list; the host's reason: absent",
    ),
    "too long": (
        replace(LOGS, uefi=None, uefi_missing="too long\n"),
        r"no firmware event log; the host's reason: too long\?",
    ),
    "a part": (replace(LOGS, ima=text(HOST[:2])), "only a part of the list"),
    "from another entry": (replace(LOGS, ima_entry=1), "does not begin at the entry"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_a_policy_speaks_of_must_be_there(name: str) -> None:
    logs, why = MISSING[name]
    assert re.search(why, judge(WHOLE, logs) or "")


def test_nothing_is_counted_where_no_list_is_judged() -> None:
    made = LogJudge(LogPolicy(), SHA256)
    assert (made.ima_ml_entry, made.violations, made.other_lines, made.state) == (0, 0, 0, None)
    logs = AnswerLogs(LogPolicy(), LOGS)
    assert (logs.violations, logs.other_lines) == (0, 0)


def test_a_log_that_nobody_speaks_of_may_be_missing() -> None:
    assert judge(LogPolicy(ima=True), replace(LOGS, uefi=None)) is None
    assert judge(LogPolicy(uefi_mask=MEASURED), replace(LOGS, ima=None)) is None
    assert judge(LogPolicy(), HostLogs()) is None


@pytest.mark.parametrize("policy", [LogPolicy(ima=True), replace(WHOLE, uefi_mask=0)])
@pytest.mark.parametrize("ima", ["", text(HOST), text([line("/v", violation=True)])])
def test_a_pcr_10_of_zeros_fits_to_no_list(policy: LogPolicy, ima: str) -> None:
    why = judge(policy, HostLogs(ima=ima), quote(bytes(32)))
    assert why == "PCR 10 was never extended: the host's kernel measures nothing"


def test_lines_behind_the_quote_are_not_judged() -> None:
    assert judge(WHOLE, replace(LOGS, ima=text([*HOST, line("/evil")]))) is None


def test_a_list_in_parts() -> None:
    made = LogJudge(replace(WHOLE, uefi_mask=0), SHA256)
    seen: list[Any] = []
    for start in range(0, len(HOST), 2):
        logs = HostLogs(ima=text(HOST[start : start + 2]), ima_entry=start)
        assert made.ima_ml_entry == start
        seen.append(list(made.judge(quote(), logs)))
    assert seen == [[], [], [True]]
    assert made.state is not None
    assert made.state.next_entry == len(HOST)


def test_hosts_share_what_was_judged() -> None:
    lines = LineJudge(SHA256, RUNTIME, violations=COUNT)
    for _ in range(2):
        made = LogJudge(replace(WHOLE, uefi_mask=0), SHA256, lines=lines)
        assert list(made.judge(quote(), LOGS))[-1]
    assert text(HOST[:1]).strip() in lines.usual


def test_a_quote_without_pcr_10_has_its_event_log_judged() -> None:
    made = LogJudge(WHOLE, SHA256)
    assert list(made.without_ima(quote(), LOGS)) == [True]
    with pytest.raises(LogError, match="no firmware"):
        list(made.without_ima(quote(), replace(LOGS, uefi=None)))
    assert (made.ima_ml_entry, made.violations, made.other_lines, made.state) == (0, 0, 0, None)


@pytest.mark.parametrize("bank", list(HashAlg)[:3])
def test_other_banks(bank: HashAlg) -> None:
    assert judge(WHOLE, LOGS, quote(bank=bank)) is None
