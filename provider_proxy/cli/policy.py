"""`provider-proxy policy`: write, merge and test policies for logs. No TPM and no network.

    make      from verified evidence of one or several golden hosts
    merge     old or new, for the days of an update
    judge     which lines of a list, or events of a log, a policy refuses, and why
    explain   what a policy demands, in words

`make` believes the evidence as far as `verify` does: the quote is signed by the AK that is named, and the
logs lead to its PCRs. What the golden hosts ran is what the policy allows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provider_proxy.cli import arguments
from provider_proxy.common.files import read_file
from provider_proxy.errors import HostError, LogError, UsageError
from provider_proxy.evidence.logs import policy_making
from provider_proxy.evidence.logs.boot_policy import parse_boot_policy
from provider_proxy.evidence.logs.event_log import MAX_LOG_BYTES, parse_event_log
from provider_proxy.evidence.logs.ima_judge import IMA_PCR, LineJudge, LineWalk, Violations
from provider_proxy.evidence.logs.judge import DEFAULT_UEFI_PCRS, LogJudge, LogPolicy
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import Evidence, HashAlg, TrustedHost, VerifiedQuote, parse_bank
from provider_proxy.evidence.policy import UnsafeAcceptAny, parse_tpm_policy
from provider_proxy.evidence.request_file import MAX_BYTES, parse_request
from provider_proxy.evidence.strict_json import parse_own_json
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier
from provider_proxy.evidence.wire import MAX_EVIDENCE_WITH_LOGS_BYTES, parse_evidence
from provider_proxy.tenant.policies import (
    MAX_POLICY_BYTES,
    MAX_PUBLIC_BYTES,
    MAX_RUNTIME_POLICY_BYTES,
    unguarded_files,
)

EXIT_GOOD, EXIT_REFUSED = 0, 1
BLOCK_LINES = 4096  # of a list, judged at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_make(actions.add_parser("make", help="make policies from evidence of golden hosts"))
    merged = actions.add_parser("merge", help="make a policy that accepts what any of these does")
    merged.add_argument("policies", nargs="+", type=Path, metavar="POLICY", help="of one kind")
    merged.add_argument(
        "--out", type=Path, metavar="FILE", help="file for the merged policy (default: stdout)"
    )
    merged.set_defaults(act=_merge)
    _add_judge(actions.add_parser("judge", help="show what a policy refuses in a log, and why"))
    words = actions.add_parser("explain", help="explain in words what a policy demands")
    for name, what in (
        ("--runtime-policy", "Keylime's runtime policy"),
        ("--boot-policy", "digests that may be extended into a PCR"),
        ("--tpm-policy", "allowed PCR values"),
    ):
        words.add_argument(name, type=Path, metavar="FILE", help=what)
    _add_key(words)
    _add_bank(words)
    words.set_defaults(act=_explain)


def _add_make(make: argparse.ArgumentParser) -> None:
    make.add_argument(
        "--evidence",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a golden host's answer, as `fetch` saved it; once for each host",
    )
    for name, what in (
        ("--request", "its request file, as `fetch` saved it"),
        ("--ak-tpm", "its AK: TPM2B_PUBLIC, raw or base64; if given once, it is used for all"),
    ):
        make.add_argument(
            name, type=Path, action="append", required=True, metavar="FILE", help=what
        )
    make.add_argument(
        "--ima-list",
        type=Path,
        action="append",
        metavar="FILE",
        help="the host's whole IMA list, if the answer holds only a part of it; as often as --evidence",
    )
    for name, what in (
        ("--tpm-policy", "write the PCRs' values here"),
        ("--boot-policy", "write the event log's digests here"),
        ("--runtime-policy", "write the IMA list's digests here"),
    ):
        make.add_argument(name, type=Path, metavar="FILE", help=what)
    make.add_argument(
        "--pcrs",
        metavar="0,1,7",
        help="PCRs of --tpm-policy (default: all in the evidence but 10, 16 and 23)",
    )
    arguments.add_uefi_argument(make, "PCRs of --boot-policy (default: 0 to 7)")
    make.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="regular expression of names that the runtime policy does not judge; may be repeated",
    )
    make.set_defaults(act=_make)


def _add_judge(judge: argparse.ArgumentParser) -> None:
    judge.add_argument("log", type=Path, metavar="LOG", help="an IMA list, ASCII, or an event log")
    which = judge.add_mutually_exclusive_group(required=True)
    which.add_argument("--runtime-policy", type=Path, metavar="FILE", help="judge an IMA list")
    which.add_argument("--boot-policy", type=Path, metavar="FILE", help="judge an event log")
    _add_key(judge)
    judge.add_argument(
        "--ima-violations",
        choices=[choice.value for choice in Violations],
        default=Violations.REFUSE.value,
        help="what to do with a file that was written to while IMA measured it (default: %(default)s)",
    )
    _add_bank(judge)
    judge.add_argument(
        "--json",
        action="store_true",
        help="a JSON object for each line or event that is refused, and one of counts last",
    )
    judge.set_defaults(act=_judge)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime-policy-key",
        type=Path,
        metavar="FILE",
        help="PEM public key; the runtime policy must be signed with its private key",
    )


def _add_bank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bank",
        default=HashAlg.SHA256.label,
        metavar="BANK",
        help="bank of the PCRs (default: sha256)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        VerificationError: evidence was refused.
        UsageError, HostError: a file is missing, or not what it should be.
    """
    code: int = args.act(args)
    return code


# --- make and merge -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Golden:
    """A golden host's evidence, verified. `lines` are those of its IMA list that are proven."""

    evidence: Evidence
    quote: VerifiedQuote
    lines: Sequence[str]


def _make(args: argparse.Namespace) -> int:
    wanted = (args.tpm_policy, args.boot_policy, args.runtime_policy)
    if not any(wanted):
        raise UsageError("name a policy: --tpm-policy, --boot-policy or --runtime-policy FILE")
    uefi = arguments.parse_uefi_pcrs(args) or DEFAULT_UEFI_PCRS
    policy = LogPolicy(
        ima=args.runtime_policy is not None, uefi_mask=uefi if args.boot_policy else 0
    )
    hosts = [_golden(policy, *files) for files in _per_host(args)]
    if args.tpm_policy is not None:
        mask = _tpm_mask(args, hosts)
        made = [policy_making.make_tpm_policy(host.quote, mask) for host in hosts]
        _write(args.tpm_policy, _merged(made))
    if args.boot_policy is not None:
        logs = [parse_event_log(host.evidence.logs.uefi or b"") for host in hosts]
        bank = hosts[0].quote.bank
        made = [policy_making.make_boot_policy(events, bank, uefi) for events in logs]
        _write(args.boot_policy, _merged(made))
    if args.runtime_policy is not None:
        _write(args.runtime_policy, _merged([_runtime_of(host, args.exclude) for host in hosts]))
    return EXIT_GOOD


def _per_host(args: argparse.Namespace) -> Iterator[tuple[Path, Path, Path, Path | None]]:
    count = len(args.evidence)
    aks = args.ak_tpm * count if len(args.ak_tpm) == 1 else args.ak_tpm
    lists = args.ima_list or [None] * count
    if not count == len(args.request) == len(aks) == len(lists):
        raise UsageError("give --request, --ak-tpm and --ima-list as often as --evidence")
    return zip(args.evidence, args.request, aks, lists, strict=True)


def _golden(
    policy: LogPolicy, evidence_file: Path, request_file: Path, ak: Path, ima_list: Path | None
) -> _Golden:
    record = parse_request(read_file(request_file, MAX_BYTES))
    body = read_file(evidence_file, MAX_EVIDENCE_WITH_LOGS_BYTES)
    evidence = parse_evidence(body)
    missing = policy.needed_mask & ~record.request.mask
    if missing:
        raise UsageError(
            f"{evidence_file}: these policies need PCRs that were not asked for: fetch with --mask "
            f"{policy.needed_mask | record.request.mask:#x}"
        )
    history = MemoryHistory()
    history.open(record.request.nonce)
    record.age_s(body, record.made_at_s)  # the answer is the one that the request file records
    quote = Verifier(UnsafeAcceptAny()).verify(
        evidence,
        Challenge(request=record.request, made_at_s=0.0, baseline=record.baseline),
        TrustedHost(ak=arguments.load_ak(ak, None)),
        history,
        now_s=0.0,  # a golden host's evidence is kept for long: its age says nothing here
    )
    logs = arguments.with_ima_list(evidence.logs, ima_list)
    judge = LogJudge(policy, quote.bank)
    *_, done = (False, *judge.judge(quote, logs))
    if not done:
        raise LogError(
            f"{evidence_file}: its IMA list does not lead to the signed PCR 10: where the answer holds a "
            "part of the list only, give the whole list with --ima-list"
        )
    lines = (logs.ima or "").split("\n")[: judge.ima_ml_entry]
    return _Golden(evidence=evidence, quote=quote, lines=lines)


def _tpm_mask(args: argparse.Namespace, hosts: Sequence[_Golden]) -> int:
    if args.pcrs is not None:
        mask = arguments.parse_pcr_list(args.pcrs)
        if mask >> IMA_PCR & 1:
            raise UsageError("PCR 10 changes with each new program: use a runtime policy for it")
    else:
        mask = ~policy_making.MOVING_PCRS
    for host in hosts:
        if args.pcrs is not None and any(
            mask >> pcr & 1 and pcr not in host.quote.pcrs for pcr in range(24)
        ):
            raise UsageError("--pcrs names a PCR that is not in all the evidence")
    return mask


def _runtime_of(host: _Golden, excludes: Sequence[str]) -> dict[str, Any]:
    entries = list(policy_making.entries_of(host.lines, host.quote.bank))
    violations = sum(entry.violation for entry in entries)
    if violations:
        _warn(
            f"{violations} violations are not listed: nothing vouches for them. Hosts like this one are "
            "refused unless ima_violations is count"
        )
    return policy_making.make_runtime_policy(entries, excludes)


def _merged(policies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged, lost = policy_making.merge(policies)
    for text in lost:
        _warn(text)
    return merged


def _merge(args: argparse.Namespace) -> int:
    read = []
    for path in args.policies:
        data = read_file(path, MAX_RUNTIME_POLICY_BYTES)
        values = parse_own_json(data, str(path))
        if "payload" in values:
            raise UsageError(f"{path} is signed: merge the unsigned policies, and sign the result")
        if policy_making.is_runtime(values):
            parse_runtime_policy(data)
        read.append(values)
    merged = _merged(read)
    if args.out is None:
        print(json.dumps(merged, indent=1))
    else:
        _write(args.out, merged)
    return EXIT_GOOD


def _write(path: Path, policy: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(policy, indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        raise HostError(f"cannot write {path}: {exc.strerror}") from exc


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# --- judge and explain --------------------------------------------------------------------------------


def _judge(args: argparse.Namespace) -> int:
    problems = _list_problems(args) if args.runtime_policy is not None else _log_problems(args)
    refused = seen = 0
    for count, place, problem, what in problems:
        seen = count
        if problem is None:
            continue
        refused += 1
        if args.json:
            print(json.dumps({"place": place, "problem": problem, "what": what}))
        else:
            print(f"{'-' if place is None else place}: {problem}")
    if not seen:
        print("nothing was measured: the log is empty", file=sys.stderr)
    if args.json:
        print(json.dumps({"judged": seen, "refused": refused}))
    else:
        print(f"{refused} of {seen} are refused")
    return EXIT_REFUSED if refused or not seen else EXIT_GOOD


_Problems = Iterator[tuple[int, int | None, str | None, str]]
"""How many were judged so far; then of one its place, why it is refused, and what it says."""


def _list_problems(args: argparse.Namespace) -> _Problems:
    policy = unguarded_files().runtime(args.runtime_policy, args.runtime_policy_key)
    judge = LineJudge(parse_bank(args.bank), policy, violations=Violations(args.ima_violations))
    data = read_file(args.log, arguments.MAX_LIST_BYTES)
    lines = data.decode("utf-8", "backslashreplace").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    walk, at, seen = LineWalk(judge), 0, 0
    while at < len(lines):
        problem: str | None
        try:
            made, count = walk.step(lines, at)
            problem = None if made is None else made.problem
        except LogError as exc:
            count, problem = 1, str(exc)
        seen += 1
        yield seen, at, problem, "\n".join(lines[at : at + count])
        at += count


def _log_problems(args: argparse.Namespace) -> _Problems:
    bank = parse_bank(args.bank)
    policy = unguarded_files().boot(args.boot_policy, bank)
    try:
        events = parse_event_log(read_file(args.log, MAX_LOG_BYTES))
    except LogError as exc:
        yield 1, None, str(exc), ""
        return
    for place, problem in policy.problems(events, bank):
        what = "" if place is None else f"PCR {events[place].pcr}, type {events[place].kind:#010x}"
        yield len(events), place, problem, what
    if events:
        yield len(events), None, None, ""


def _explain(args: argparse.Namespace) -> int:
    bank = parse_bank(args.bank)
    said = False
    if args.runtime_policy is not None:
        key = args.runtime_policy_key
        policy = parse_runtime_policy(
            read_file(args.runtime_policy, MAX_RUNTIME_POLICY_BYTES),
            key=None if key is None else read_file(key, MAX_PUBLIC_BYTES),
        )
        _say(policy_making.explain_runtime(policy))
        said = True
    if args.boot_policy is not None:
        boot = parse_boot_policy(read_file(args.boot_policy, MAX_POLICY_BYTES), bank=bank)
        _say(policy_making.explain_boot(boot.allowed))
        said = True
    if args.tpm_policy is not None:
        values = parse_own_json(read_file(args.tpm_policy, MAX_POLICY_BYTES), str(args.tpm_policy))
        parse_tpm_policy(values, bank=bank)
        _say(policy_making.explain_tpm(values, bank))
        said = True
    if not said:
        raise UsageError("name a policy: --runtime-policy, --boot-policy or --tpm-policy FILE")
    return EXIT_GOOD


def _say(lines: Iterator[str]) -> None:
    for line in lines:
        print(line)
