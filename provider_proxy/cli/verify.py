"""`provider-proxy verify`: judge saved evidence. No TPM, no network, `cryptography` alone.

Nonce, mask, bank and time come from the tenant's own request file. Offline nothing remembers which
nonces were spent: each run judges the pair of files that it is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from provider_proxy.cli import files
from provider_proxy.errors import EvidenceFormatError, UsageError
from provider_proxy.files import read_file
from provider_proxy.model import AttestationKey, HashAlg, TrustedHost, VerifiedQuote
from provider_proxy.policy import Policy, UnsafeAcceptAny, parse_tpm_policy
from provider_proxy.request_file import MAX_BYTES, parse_request
from provider_proxy.verify import DEFAULT_MAX_AGE_S, Challenge, MemoryHistory, Verifier
from provider_proxy.wire import MAX_EVIDENCE_WITH_LOGS_BYTES, parse_json_object

MAX_POLICY_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("evidence", type=Path, metavar="EVIDENCE", help="the proxy's answer")
    parser.add_argument(
        "--request", type=Path, required=True, metavar="FILE", help="your own request file"
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
        help="a PEM instead; nothing then says that a TPM holds the key",
    )
    key.add_argument(
        "--pinned", metavar="HOST", help="the AK that is pinned for this host, and its clock"
    )
    files.add_pins_argument(parser)
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument(
        "--tpm-policy",
        type=Path,
        metavar="FILE",
        help='allowed PCR values, Keylime\'s JSON: {"0": ["hex", …]}',
    )
    policy.add_argument(
        "--insecure-any-state",
        action="store_true",
        help="accept whatever the PCRs hold; proves only that the host's TPM answered",
    )
    parser.add_argument(
        "--max-age",
        type=float,
        default=DEFAULT_MAX_AGE_S,
        metavar="SECONDS",
        help=f"how old the nonce may be when answered (default: {DEFAULT_MAX_AGE_S:g})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Verify; prints the requested PCRs.

    Raises:
        VerificationError: refused; the class and message say by which check.
        UsageError: a file is not what it should be.
        HostError: a file cannot be read.
    """
    record = parse_request(read_file(args.request, MAX_BYTES))
    body = read_file(args.evidence, MAX_EVIDENCE_WITH_LOGS_BYTES)
    pinned = files.load_pin(args)
    host = pinned.host if pinned else TrustedHost(ak=_load_ak(args))
    history = pinned or MemoryHistory()
    history.open(record.request.nonce)
    # A request made without the pin noted no baseline: it is held against all that was accepted.
    baseline = record.baseline if record.pinned else history.newest()
    challenge = Challenge(request=record.request, made_at_s=0.0, baseline=baseline)
    quote = Verifier(_policy(args, record.request.bank), max_age_s=args.max_age).verify(
        body,
        challenge,
        host,
        history,
        now_s=record.age_s(body, time.time()),
    )
    _show(quote, as_json=args.json)
    return 0


def _load_ak(args: argparse.Namespace) -> AttestationKey:
    if args.insecure_ak_pem is not None:
        print("warning: --insecure-ak-pem: any software key passes for an AK", file=sys.stderr)
    return files.load_ak(args.ak_tpm, args.insecure_ak_pem)


def _policy(args: argparse.Namespace, bank: HashAlg) -> Policy:
    if args.insecure_any_state:
        print("warning: --insecure-any-state: every state of the host passes", file=sys.stderr)
        return UnsafeAcceptAny()
    try:
        values = parse_json_object(read_file(args.tpm_policy, MAX_POLICY_BYTES), "the policy")
    except EvidenceFormatError as exc:
        raise UsageError(f"{args.tpm_policy}: {exc}") from exc
    return parse_tpm_policy(values, bank=bank)


def _show(quote: VerifiedQuote, *, as_json: bool) -> None:
    values = {
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
