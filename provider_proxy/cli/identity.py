"""`provider-proxy identity`: show what a proxy says about its host's keys, without a signature."""

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
from provider_proxy.errors import EvidenceFormatError, VerificationError
from provider_proxy.evidence.tpm_keys import parse_ak, parse_public
from provider_proxy.evidence.vtpm_link import spki_digest
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.identity import ClaimedIdentity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    arguments.add_tls_arguments(parser)
    parser.add_argument(
        "--save-ak",
        type=Path,
        metavar="FILE",
        help="write the AK (TPM2B_PUBLIC, base64) for `verify --ak-tpm`",
    )
    parser.add_argument(
        "--save-ek",
        type=Path,
        metavar="FILE",
        help="write the EK's certificate and its chain, PEM, for `pin add --ek-cert` and `ek-ca check`",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Ask, check the AK's attributes, show.

    Raises:
        ReplyError: the proxy gave no identity.
        UntrustedAkError: the key that it gives is not an AK.
    """
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with http.make_client(args) as client:
        identity = await ProxyClient(client, args.url).identity()
    ak = parse_ak(identity.ak_public)
    text = base64.b64encode(identity.ak_public).decode("ascii")
    print(
        "this is what the proxy claims: compare ak_name with your registrar's record before "
        "you trust it",
        file=sys.stderr,
    )
    if args.save_ak is not None:
        write_private(args.save_ak, text.encode("ascii") + b"\n")
    if args.save_ek is not None:
        if identity.ek_cert is None:
            raise VerificationError("the proxy has no EK certificate: there is nothing to save")
        write_private(args.save_ek, b"".join(map(_pem, (identity.ek_cert, *identity.ek_chain))))
    values: dict[str, object] = {
        "ak_name": ak.name.hex(),
        "sign_alg": ak.sign_alg,
        "host_uuid": identity.host_uuid,
        "software": identity.software,
        "ek_cert": identity.ek_cert is not None,
        "ek_chain": len(identity.ek_chain),
        "ek_sha256": _ek_sha256(identity.ek_public),
    }
    registrations = [dataclasses.asdict(each) for each in identity.registrations]
    if args.json:
        print(json.dumps({**values, "registrations": registrations}))
        return 0
    for name, value in {**values, **_in_words(identity)}.items():
        print(f"{name:10} {value}")
    for each in identity.registrations:
        print(f"registration {each.agent_id} at {each.registrar}: {each.state}")
    return 0


def _in_words(identity: ClaimedIdentity) -> dict[str, str]:
    """What yes, no and none mean, and what to do about them."""
    return {
        "software": "yes: it is not a hardware TPM and proves nothing"
        if identity.software
        else "no",
        "ek_cert": "yes: see ek-check"
        if identity.ek_cert is not None
        else "none: the chip has no certificate. Compare ek_sha256 by another way, then pin it: "
        "pin add --ek-sha256",
        "ek_chain": f"{len(identity.ek_chain)} CAs with it",
        "ek_sha256": _ek_sha256(identity.ek_public) or "the EK cannot be read",
    }


def _ek_sha256(ek_public: bytes) -> str | None:
    """For `pin add --ek-sha256`, once you have compared it; None where the EK cannot be read."""
    try:
        return spki_digest(parse_public(ek_public).public_key).hex()
    except EvidenceFormatError:
        return None


def _pem(certificate: bytes) -> bytes:
    text = base64.encodebytes(certificate)
    return b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"
