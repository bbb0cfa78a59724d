"""`provider-proxy identity`: what a proxy says of its host's keys. Unsigned, and said so."""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import json
import sys
from pathlib import Path

from provider_proxy.cli import arguments, http
from provider_proxy.common.files import write_private
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.tenant.client import ProxyClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_tls_arguments(parser)
    parser.add_argument(
        "--save-ak",
        type=Path,
        metavar="FILE",
        help="write the AK (TPM2B_PUBLIC, base64) for `verify --ak-tpm`",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Ask, check the AK's attributes, show.

    Raises:
        ReplyError: the proxy gave no identity.
        UntrustedAkError: what it calls its AK is none.
    """
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with http.make_client(args) as client:
        identity = await ProxyClient(client, args.url).identity()
    ak = parse_ak(identity.ak_public)
    text = base64.b64encode(identity.ak_public).decode("ascii")
    print(
        "this is the proxy's own word: compare ak_name with your registrar's record before you "
        "trust it",
        file=sys.stderr,
    )
    if args.save_ak is not None:
        write_private(args.save_ak, text.encode("ascii") + b"\n")
    values: dict[str, object] = {
        "ak_name": ak.name.hex(),
        "sign_alg": ak.sign_alg,
        "host_uuid": identity.host_uuid,
        "software": identity.software,
        "ek_cert": identity.ek_cert is not None,
    }
    registrations = [dataclasses.asdict(each) for each in identity.registrations]
    if args.json:
        print(json.dumps({**values, "registrations": registrations}))
        return 0
    for name, value in values.items():
        print(f"{name:10} {value}")
    for each in identity.registrations:
        print(f"registration {each.agent_id} at {each.registrar}: {each.state}")
    return 0
