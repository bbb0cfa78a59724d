"""`provider-proxy vtpm-ca`: get a host's vTPM CA, once the host's trusted AK has certified its key.

What `fetch` writes may go into Keylime's `tpm_cert_store`: the CA's key was proven to be in the TPM of
the host whose AK you trust. `check` judges files, offline: the CA, and a vTPM's certificate by it.
"""

from __future__ import annotations

import argparse
import asyncio
import binascii
import json
import uuid
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from provider_proxy.cli import arguments, http
from provider_proxy.common.files import read_file, write_private
from provider_proxy.errors import UsageError
from provider_proxy.evidence.model import AttestationKey
from provider_proxy.evidence.pem import one_part
from provider_proxy.evidence.tpm_keys import parse_public
from provider_proxy.evidence.vtpm_ca import VtpmCa, check_ca_certificate, check_vtpm_certificate
from provider_proxy.tenant.client import ProxyClient

MAX_FILE_BYTES = 64 * 1024
PEM_MODE = 0o644  # a certificate is not secret, and Keylime runs as another user


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="get the CA's certificate, check it, save it")
    arguments.add_tls_arguments(fetch)
    fetch.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file for the certificate, PEM, in Keylime's tpm_cert_store",
    )
    fetch.set_defaults(act=_fetch)
    check = actions.add_parser("check", help="check saved certificates, offline")
    check.add_argument("ca", type=Path, metavar="CA", help="the CA's certificate, PEM or DER")
    check.add_argument(
        "--ek-cert",
        type=Path,
        metavar="FILE",
        help="a vTPM's certificate, PEM or DER; with --ek and --vm",
    )
    check.add_argument(
        "--ek", type=Path, metavar="FILE", help="its EK: TPM2B_PUBLIC, from your registrar"
    )
    check.add_argument("--vm", metavar="UUID", help="the VM that you ordered")
    check.add_argument(
        "--kind",
        choices=("ek", "platform"),
        default="ek",
        help="what the certificate is (default: ek)",
    )
    check.set_defaults(act=_check)
    for action in (fetch, check):
        key = action.add_mutually_exclusive_group(required=True)
        key.add_argument(
            "--ak-tpm",
            type=Path,
            metavar="FILE",
            help="the host's trusted AK: TPM2B_PUBLIC, raw or base64, from your registrar",
        )
        key.add_argument("--pinned", metavar="HOST", help="the AK that is pinned for this host")
        arguments.add_pins_argument(action)
        action.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        UntrustedCaError, EkCertificateError: refused.
        ReplyError: the proxy gave no certificate.
        UsageError, HostError: a file or an option is wrong or missing.
    """
    code: int = args.act(args)
    return code


def _ak(args: argparse.Namespace) -> AttestationKey:
    pinned = arguments.load_pin(args)
    return pinned.host.ak if pinned else arguments.load_ak(args.ak_tpm, None)


def _fetch(args: argparse.Namespace) -> int:
    ak = _ak(args)
    ca = check_ca_certificate(asyncio.run(_get(args)), ak)
    write_private(args.out, ca.pem)
    args.out.chmod(PEM_MODE)
    _show(args, ca, {"out": str(args.out)})
    return 0


async def _get(args: argparse.Namespace) -> bytes:
    async with http.make_client(args) as client:
        return await ProxyClient(client, args.url).vtpm_ca()


def _check(args: argparse.Namespace) -> int:
    ca = check_ca_certificate(_read_certificate(args.ca), _ak(args))
    given = (args.ek_cert, args.ek, args.vm)
    values: dict[str, str] = {}
    if any(part is not None for part in given):
        if any(part is None for part in given):
            raise UsageError("--ek-cert, --ek and --vm belong together")
        try:
            vm = uuid.UUID(args.vm)
        except ValueError:
            raise UsageError("--vm must be a UUID") from None
        check_vtpm_certificate(
            _read_certificate(args.ek_cert),
            ca,
            key=parse_public(arguments.read_public(args.ek)).public_key,
            vm=vm,
            kind=args.kind,
        )
        values["vm"] = str(vm)
    _show(args, ca, values)
    return 0


def _read_certificate(path: Path) -> bytes:
    """DER of a file with one certificate, PEM or DER. What the DER holds, the check judges."""
    data = read_file(path, MAX_FILE_BYTES)
    if not data.lstrip().startswith(b"-----BEGIN"):
        return data
    try:
        return x509.load_pem_x509_certificate(one_part(data)).public_bytes(Encoding.DER)
    except (ValueError, binascii.Error) as exc:
        raise UsageError(f"{path} holds no certificate: {exc}") from exc


def _show(args: argparse.Namespace, ca: VtpmCa, more: dict[str, str]) -> None:
    values = {"verified": True, "ca": ca.subject, "key_name": ca.name.hex(), **more}
    if args.json:
        print(json.dumps(values))
        return
    print(f"verified: {ca.subject}")
    print(f"  its key {ca.name.hex()} is in the TPM of the trusted AK")
    if "vm" in more:
        print(f"  the certificate was signed by it, for this EK and VM {more['vm']}")
    if "out" in more:
        print(f"  written to {more['out']}")
