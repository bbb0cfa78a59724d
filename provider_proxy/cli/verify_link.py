"""`provider-proxy verify-link`: does this VM, with this EK, run on that host now?

`files` judges saved evidence, with `--vtpm-quote` both quotes of a deep one. Uses no network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from provider_proxy.cli import arguments
from provider_proxy.cli.verify import (
    add_judging_arguments,
    add_link_arguments,
    link_line,
    link_of,
    link_values,
    load_judging,
    load_policy,
)
from provider_proxy.errors import UsageError
from provider_proxy.evidence.deep_quote import deep_verify
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.policy import AllOf
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import Verifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    saved = actions.add_parser("files", help="verify saved evidence, offline")
    add_judging_arguments(saved)
    add_link_arguments(saved, required=True)
    saved.add_argument(
        "--vtpm-quote",
        type=Path,
        metavar="FILE",
        help="deep quote: the vTPM's own quote, a Keylime string; the host's quote must come after it",
    )
    saved.add_argument("--vtpm-nonce", metavar="TEXT", help="the nonce in the vTPM's quote")
    saved.add_argument(
        "--vak", type=Path, metavar="FILE", help="the vTPM's AK: TPM2B_PUBLIC, raw or base64"
    )
    state = saved.add_mutually_exclusive_group()
    state.add_argument(
        "--vtpm-policy", type=Path, metavar="FILE", help="allowed PCR values of the vTPM"
    )
    state.add_argument(
        "--insecure-any-vtpm-state",
        action="store_true",
        help="accept any values of the vTPM's PCRs",
    )
    saved.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Judge.

    Raises:
        VerificationError: refused; the class says why.
        UsageError, HostError: a file or an option is wrong or missing.
    """
    judging = load_judging(args)
    link = link_of(args)
    assert link is not None  # both options are required
    deep = (args.vtpm_quote, args.vtpm_nonce, args.vak)
    if all(part is None for part in deep):
        if args.vtpm_policy is not None or args.insecure_any_vtpm_state:
            raise UsageError("--vtpm-quote is missing")
        quote = Verifier(AllOf((judging.policy, link)), max_age_s=args.max_age).verify(
            judging.evidence, judging.challenge, judging.host, judging.history, now_s=judging.age_s
        )
        return _show(link_values(link, quote), as_json=args.json)
    if any(part is None for part in deep):
        raise UsageError("--vtpm-quote, --vtpm-nonce and --vak belong together")
    if args.vtpm_policy is None and not args.insecure_any_vtpm_state:
        raise UsageError("--vtpm-quote needs --vtpm-policy (or --insecure-any-vtpm-state)")
    verified = deep_verify(
        judging.evidence,
        judging.challenge,
        judging.host,
        judging.history,
        nonce=args.vtpm_nonce.encode("utf-8"),
        vtpm_quote=arguments.read_quote(args.vtpm_quote),
        vak=parse_ak(arguments.read_public(args.vak)),
        vtpm_policy=load_policy(
            args.vtpm_policy,
            any_state=args.insecure_any_vtpm_state,
            bank=HashAlg.SHA256,
            of="vTPM",
        ),
        host_policy=judging.policy,
        link=link,
        now_s=judging.age_s,
        max_age_s=args.max_age,
    )
    values = link_values(link, verified.host)
    values["vtpm_pcrs"] = {str(pcr): value.hex() for pcr, value in verified.vtpm.pcrs.items()}
    return _show(values, as_json=args.json)


def _show(values: Mapping[str, object], host: str = "the host", *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"linked": True, **values}))
        return 0
    print(link_line(values, host))
    if "vtpm_pcrs" in values:
        print("  deep: the host's quote came after the vTPM's")
    return 0
