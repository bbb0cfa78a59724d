"""`provider-proxy fetch`: ask a proxy with a fresh nonce; save the question and the answer.

The request file is written before the question is sent: it is the tenant's own record of nonce,
mask and time, on which `verify` relies. Nothing is judged here.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import time
import uuid
from hashlib import sha256
from pathlib import Path

from provider_proxy.cli import arguments, http
from provider_proxy.common.files import write_private
from provider_proxy.errors import UsageError
from provider_proxy.evidence.deep_quote import deep_nonce
from provider_proxy.evidence.model import parse_bank
from provider_proxy.evidence.request_file import RequestRecord, encode_request
from provider_proxy.evidence.verify import Challenge, MemoryHistory, new_challenge
from provider_proxy.tenant.client import ProxyClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_tls_arguments(parser)
    arguments.add_pcr_arguments(parser, required=True)
    parser.add_argument("--bank", default="sha256", help="PCR bank (default: sha256)")
    parser.add_argument("--vm", metavar="UUID", help="ask for the link of this VM to the host")
    parser.add_argument(
        "--vtpm-quote",
        type=Path,
        metavar="FILE",
        help="deep quote: derive the nonce from this quote of the VM's vTPM; with --vm",
    )
    parser.add_argument(
        "--vtpm-nonce",
        metavar="TEXT",
        help="the nonce in the vTPM's quote; with --vtpm-quote",
    )
    arguments.add_timeout_argument(parser)
    parser.add_argument(
        "--evidence",
        type=Path,
        default=Path("evidence.json"),
        metavar="FILE",
        help="file for the answer (default: evidence.json)",
    )
    parser.add_argument(
        "--request",
        type=Path,
        default=Path("request.json"),
        metavar="FILE",
        help="file for the request (default: request.json)",
    )
    parser.add_argument(
        "--pinned",
        metavar="HOST",
        help="record the TPM clock of this pinned host in the request file",
    )
    arguments.add_pins_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Ask once.

    Raises:
        ReplyError: the proxy gave no evidence.
        HostError: a file cannot be written.
        UsageError, ParameterError: an option is wrong.
    """
    return asyncio.run(_run(args))


def _deepened(args: argparse.Namespace, challenge: Challenge) -> Challenge:
    """The challenge with the nonce that `--vtpm-quote` asks for."""
    if args.vtpm_quote is None and args.vtpm_nonce is None:
        return challenge
    if args.vtpm_quote is None or args.vtpm_nonce is None or args.vm is None:
        raise UsageError("--vtpm-quote, --vtpm-nonce and --vm belong together")
    nonce = deep_nonce(args.vtpm_nonce.encode("utf-8"), arguments.read_quote(args.vtpm_quote))
    return dataclasses.replace(
        challenge, request=dataclasses.replace(challenge.request, nonce=nonce)
    )


async def _run(args: argparse.Namespace) -> int:
    mask = arguments.parse_pcrs(args)
    try:
        vm = uuid.UUID(args.vm) if args.vm is not None else None
    except ValueError:
        raise UsageError("--vm must be a UUID") from None
    timeout_ms = arguments.parse_timeout_ms(args)
    pinned = arguments.load_pin(args)
    made_at_s = time.time()
    begin = time.monotonic()
    challenge = new_challenge(
        mask=mask,
        now_s=begin,
        history=pinned or MemoryHistory(),
        bank=parse_bank(args.bank),
        vm=vm,
        timeout_ms=timeout_ms,
    )
    challenge = _deepened(args, challenge)
    record = RequestRecord(
        request=challenge.request,
        made_at_s=made_at_s,
        url=args.url,
        pinned=pinned is not None,
        baseline=challenge.baseline,
    )
    async with http.make_client(args) as client:
        write_private(args.request, encode_request(record))
        body = await ProxyClient(client, args.url).fetch(challenge.request)
    record = dataclasses.replace(
        record,
        answered_after_s=time.monotonic() - begin,
        evidence_sha256=sha256(body).digest(),
    )
    write_private(args.evidence, body)
    write_private(args.request, encode_request(record))
    if args.json:
        print(json.dumps({"evidence": str(args.evidence), "request": str(args.request)}))
    else:
        print(f"evidence in {args.evidence}, request in {args.request}; not verified yet")
    return 0
