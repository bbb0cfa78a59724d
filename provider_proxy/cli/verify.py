"""`provider-proxy verify`: judge saved evidence. No TPM, no network, `cryptography` alone.

Nonce, mask, bank and time come from the tenant's own request file. No record is kept of used
nonces: each run judges the pair of files that it is given. Where the evidence carries claims
about a VM, `--vm` and `--ek` say what the tenant wants of its link.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from provider_proxy.cli import arguments
from provider_proxy.common.files import read_file
from provider_proxy.errors import UsageError
from provider_proxy.evidence.logs.judge import AnswerLogs
from provider_proxy.evidence.model import (
    AttestationKey,
    Evidence,
    HashAlg,
    TrustedHost,
    VerifiedQuote,
)
from provider_proxy.evidence.policy import AllOf, Policy, UnsafeAcceptAny, parse_tpm_policy
from provider_proxy.evidence.request_file import MAX_BYTES, parse_request
from provider_proxy.evidence.strict_json import parse_own_json
from provider_proxy.evidence.verify import Challenge, HostHistory, MemoryHistory, Verifier
from provider_proxy.evidence.vtpm_link import ISSUERS, STATES, VtpmLink, ek_digest, parse_claims
from provider_proxy.evidence.wire import MAX_EVIDENCE_WITH_LOGS_BYTES, parse_evidence
from provider_proxy.tenant.policies import LogRules, unguarded_files

MAX_POLICY_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_judging_arguments(parser)
    add_link_arguments(parser, required=False)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def add_judging_arguments(parser: argparse.ArgumentParser) -> None:
    """The evidence, the question, whom to trust and what to accept."""
    parser.add_argument("evidence", type=Path, metavar="EVIDENCE", help="the proxy's answer")
    parser.add_argument(
        "--request",
        type=Path,
        required=True,
        metavar="FILE",
        help="the request file that `fetch` wrote",
    )
    key = parser.add_mutually_exclusive_group(required=True)
    key.add_argument(
        "--ak-tpm",
        type=Path,
        metavar="FILE",
        help="the trusted AK: TPM2B_PUBLIC, raw or base64, from your registrar",
    )
    key.add_argument(
        "--insecure-ak-pem",
        type=Path,
        metavar="FILE",
        help="a PEM instead; nothing then proves that a TPM holds the key",
    )
    key.add_argument(
        "--pinned",
        metavar="HOST",
        help="the AK that is pinned for this host, and its clock's history",
    )
    arguments.add_pins_argument(parser)
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument(
        "--tpm-policy",
        type=Path,
        metavar="FILE",
        help='allowed PCR values, Keylime\'s JSON: {"0": ["hex", …]}',
    )
    policy.add_argument(
        "--insecure-any-state",
        action="store_true",
        help="accept any PCR values; this proves only that the host's TPM answered",
    )
    arguments.add_log_arguments(parser)
    parser.add_argument(
        "--ima-list",
        type=Path,
        metavar="FILE",
        help="the host's whole IMA list, if the evidence holds only a part of it",
    )
    parser.add_argument(
        "--ima", action="store_true", help="the IMA list must lead to PCR 10, whatever it holds"
    )
    arguments.add_boot_arguments(parser)
    arguments.add_max_age_argument(parser)


def add_link_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Which VM, and which EK of its vTPM, must be linked."""
    parser.add_argument(
        "--vm",
        metavar="UUID",
        required=required,
        help="UUID of the VM that must run on the host; with --ek",
    )
    parser.add_argument(
        "--ek",
        type=Path,
        metavar="FILE",
        required=required,
        help="the VM's EK, which your registrar activated: TPM2B_PUBLIC, raw or base64",
    )
    parser.add_argument(
        "--least",
        choices=STATES,
        default=STATES[0],
        help="the least that the host must know about the EK; confirmed: read from the VM's vTPM",
    )
    parser.add_argument(
        "--ek-issuer",
        choices=ISSUERS,
        help="who must have certified the EK on the host",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """What the options of `add_judging_arguments` name, read.

    Attributes:
        policy: of PCRs and logs.
        logs: the part of it that is about logs; None where nothing is demanded of them.
        age_s: of the nonce when the evidence was there.
    """

    evidence: Evidence
    challenge: Challenge
    host: TrustedHost
    history: HostHistory
    policy: Policy
    logs: AnswerLogs | None
    age_s: float


def load_judging(args: argparse.Namespace) -> Judging:
    """Read the files.

    Raises:
        UsageError, HostError, VerificationError: a file is missing, or not what it should be.
    """
    rules = arguments.log_rules(args)
    if (
        args.tpm_policy is None
        and not args.insecure_any_state
        and rules == LogRules(violations=rules.violations)
    ):
        raise UsageError(
            "name a policy: --tpm-policy, --runtime-policy, --ima, --boot-policy or --uefi-pcrs "
            "(or --insecure-any-state)"
        )
    record = parse_request(read_file(args.request, MAX_BYTES))
    body = read_file(args.evidence, MAX_EVIDENCE_WITH_LOGS_BYTES)
    evidence = parse_evidence(body)
    pinned = arguments.load_pin(args)
    host = pinned.host if pinned else TrustedHost(ak=_load_ak(args))
    history = pinned or MemoryHistory()
    history.open(record.request.nonce)
    # A request made without the pin noted no baseline: it is held against all that was accepted.
    baseline = record.baseline if record.pinned else history.newest()
    policy, logs = _load_policies(args, rules, record.request.bank, evidence)
    return Judging(
        evidence=evidence,
        challenge=Challenge(request=record.request, made_at_s=0.0, baseline=baseline),
        host=host,
        history=history,
        policy=policy,
        logs=logs,
        age_s=record.age_s(body, time.time()),
    )


def _load_policies(
    args: argparse.Namespace, rules: LogRules, bank: HashAlg, evidence: Evidence
) -> tuple[Policy, AnswerLogs | None]:
    demanded = unguarded_files().logs(rules, bank).policy
    if args.ima_list is not None and not demanded.wants_ima:
        raise UsageError("--ima-list needs --ima or --runtime-policy")
    found = arguments.with_ima_list(evidence.logs, args.ima_list)
    logs = AnswerLogs(demanded, found) if demanded.needed_mask else None
    if args.tpm_policy is None and not args.insecure_any_state:
        assert logs is not None  # these rules demand something
        return logs, logs
    policy = load_policy(args.tpm_policy, any_state=args.insecure_any_state, bank=bank)
    return (policy if logs is None else AllOf((policy, logs))), logs


def link_of(args: argparse.Namespace) -> VtpmLink | None:
    """The link that the options demand; None where they demand none.

    Raises:
        UsageError: half of it, or not a UUID.
    """
    if args.vm is None and args.ek is None and args.least == STATES[0] and args.ek_issuer is None:
        return None
    if args.vm is None or args.ek is None:
        raise UsageError("--vm and --ek belong together")
    try:
        vm = uuid.UUID(args.vm)
    except ValueError:
        raise UsageError("--vm must be a UUID") from None
    return VtpmLink(
        vm=vm,
        ek=ek_digest(arguments.read_public(args.ek)),
        least=args.least,
        issuer=args.ek_issuer,
    )


def run(args: argparse.Namespace) -> int:
    """Verify; prints the requested PCRs, and the link where one was demanded.

    Raises:
        VerificationError: refused; the class and message say by which check.
        UsageError: a file is not what it should be.
        HostError: a file cannot be read.
    """
    judging = load_judging(args)
    link = link_of(args)
    policy = judging.policy if link is None else AllOf((judging.policy, link))
    quote = Verifier(policy, max_age_s=args.max_age).verify(
        judging.evidence, judging.challenge, judging.host, judging.history, now_s=judging.age_s
    )
    if quote.claims is not None and link is None:
        print("warning: the claims about the VM were not judged: no --vm and --ek", file=sys.stderr)
    _show(quote, link, judging.logs, as_json=args.json)
    return 0


def _load_ak(args: argparse.Namespace) -> AttestationKey:
    if args.insecure_ak_pem is not None:
        print("warning: --insecure-ak-pem: any software key passes for an AK", file=sys.stderr)
    return arguments.load_ak(args.ak_tpm, args.insecure_ak_pem)


def load_policy(path: Path | None, *, any_state: bool, bank: HashAlg, of: str = "host") -> Policy:
    """The policy of a file, or the one that accepts anything, with a warning.

    Args:
        of: whose state it judges, for the warning.

    Raises:
        UsageError: the file holds no policy.
    """
    if any_state or path is None:
        assert any_state  # argparse, or the reader of the hosts' file, demands one of the two
        option = "--insecure-any-state" if of == "host" else "--insecure-any-vtpm-state"
        print(f"warning: {option}: any state of the {of} passes", file=sys.stderr)
        return UnsafeAcceptAny()
    values = parse_own_json(read_file(path, MAX_POLICY_BYTES), f"the policy {path}")
    return parse_tpm_policy(values, bank=bank)


def link_values(link: VtpmLink, quote: VerifiedQuote) -> dict[str, object]:
    """An accepted link as a JSON object."""
    claims = parse_claims(quote.claims)
    return {
        "vm": str(claims.vm),
        "ek": link.ek.hex(),
        "state": claims.state,
        "issuer": claims.issuer,
        "migrated": claims.migrated,
        "generation": claims.generation,
    }


def link_line(values: Mapping[str, object], host: str = "the host") -> str:
    """The same for people."""
    state = (
        values["state"] if values["state"] == "confirmed" else f"{values['state']}, not confirmed"
    )
    came = ", migrated here" if values["migrated"] else ""
    return f"linked: VM {values['vm']} runs on {host} with the EK {values['ek']} ({state}{came})"


def _show(
    quote: VerifiedQuote, link: VtpmLink | None, logs: AnswerLogs | None, *, as_json: bool
) -> None:
    values: dict[str, object] = {
        "verified": True,
        "bank": quote.bank.label,
        "pcrs": {str(pcr): digest.hex() for pcr, digest in quote.pcrs.items()},
        "reset_count": quote.clock.reset_count,
        "restart_count": quote.clock.restart_count,
        "clock_ms": quote.clock.clock_ms,
        "clock_safe": quote.clock_safe,
        "was_reset": quote.was_reset,
        "ak_name": quote.ak_name.hex(),
    }
    if link is not None:
        values["link"] = link_values(link, quote)
    if logs is not None:
        values["logs"] = {"violations": logs.violations, "other_lines": logs.other_lines}
    if as_json:
        print(json.dumps(values))
        return
    print(f"verified: signed by AK {quote.ak_name.hex() or '(a PEM)'}")
    for pcr, digest in quote.pcrs.items():
        print(f"  PCR {pcr:2} {quote.bank.label} {digest.hex()}")
    print(
        f"  TPM clock {quote.clock.clock_ms} ms, resets {quote.clock.reset_count}, "
        f"restarts {quote.clock.restart_count}"
    )
    if quote.was_reset:
        print("  the host has rebooted since it was last verified")
    if logs is not None:
        print(
            f"  its logs lead to these PCRs and are as demanded; IMA violations: {logs.violations}"
        )
    if link is not None:
        print(f"  {link_line(link_values(link, quote))}")
