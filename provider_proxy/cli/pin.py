"""`provider-proxy pin`: pin the AK that is trusted for a host."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from provider_proxy.cli.arguments import add_registrar_arguments, read_public, safe_url
from provider_proxy.common.files import read_file
from provider_proxy.errors import UsageError
from provider_proxy.evidence.tpm_keys import parse_public
from provider_proxy.trust.expected_eks import MAX_BYTES, parse_inventory
from provider_proxy.trust.pins import PinnedHost, PinStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="trust an AK for a host")
    add.add_argument("label", metavar="HOST", help="your name for the host")
    key = add.add_mutually_exclusive_group(required=True)
    key.add_argument(
        "--ak-tpm",
        type=Path,
        metavar="FILE",
        help="its AK: TPM2B_PUBLIC, raw or base64, from your registrar",
    )
    key.add_argument(
        "--registrar",
        type=safe_url,
        metavar="URL",
        help="take AK and EK from this registrar, https://…:8891, and check them",
    )
    add_registrar_arguments(add)
    add.add_argument(
        "--replace",
        action="store_true",
        help="pin this AK and EK in place of others; you know why they changed",
    )
    inventory = actions.add_parser(
        "import-eks", help="import an inventory: the digest of each host's EK"
    )
    inventory.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="a line for each host: HOST and the SHA-256 of its EK's public key, hex; - is stdin",
    )
    inventory.add_argument(
        "--replace",
        action="store_true",
        help="replace digests that differ; you know why they changed",
    )
    show = actions.add_parser("list", help="show the pinned hosts")
    remove = actions.add_parser("remove", help="remove a host's pin")
    remove.add_argument("label", metavar="HOST", help="your name for the host")
    acts = ((add, _add), (inventory, _import_eks), (show, _list), (remove, _remove))
    for action, act in acts:
        action.add_argument(
            "--pins", type=Path, required=True, metavar="DIR", help="directory of the pins"
        )
        action.add_argument("--json", action="store_true", help="one JSON object as the last line")
        action.set_defaults(act=act)


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        PinChangedError: another AK or EK is pinned for this host.
        VerificationError: the key of the file or registrar is not an attestation key, or not vouched for.
        ReplyError: the registrar gave no answer.
        UsageError, HostError: a label or a file is wrong.
    """
    code: int = args.act(args)
    return code


def _add(args: argparse.Namespace) -> int:
    store = PinStore(args.pins)
    verdict = None
    ek_by_hand = args.ek_tpm is not None
    ek_public = read_public(args.ek_tpm) if ek_by_hand else None
    if args.registrar is None:
        theirs = (
            *(args.registrar_ca, args.registrar_cert, args.registrar_key),
            *(args.registrar_tls_name, args.agent_id),
        )
        eks = (args.ek_ca, args.ek_cert, args.ek_sha256)
        if any((*theirs, *eks, args.insecure_no_ek, args.insecure_virtual_ek)):
            raise UsageError(
                "--registrar-…, --agent-id, --ek-ca, --ek-cert, --ek-sha256, --insecure-no-ek and "
                "--insecure-virtual-ek go with --registrar"
            )
        ak_public = read_public(args.ak_tpm)
    else:
        # Needs the extra "client"; the rest of this command does not.
        from provider_proxy.cli.registrar import read_record, vouched_by_hand
        from provider_proxy.trust.ek_judges import KnownEkDigest

        by_hand = vouched_by_hand(args)
        expected = store.expected.of(args.label)
        if by_hand is None and expected is not None and not args.ek_ca and not args.insecure_no_ek:
            by_hand = KnownEkDigest(expected)
        ek_by_hand = by_hand is not None
        record, verdict = read_record(args, by_hand=by_hand)
        ak_public, ek_public = record.ak_public, record.ek_public
    pinned = store.pin(
        args.label, ak_public, ek_public=ek_public, ek_by_hand=ek_by_hand, replace=args.replace
    )
    values = {"host": args.label, "ak_name": pinned.host.ak.name.hex(), "ek_name": _ek_name(pinned)}
    if verdict is not None:
        values |= {"ek_maker": verdict.maker, "ek_anchor": verdict.anchor.certificate.name}
        values |= {"ek_anchor_sha256": verdict.anchor.sha256}
    if args.json:
        print(json.dumps(values))
    else:
        print(
            args.label, values["ak_name"], *(() if pinned.ek_public is None else ("with its EK",))
        )
        if verdict is not None:
            print(f"its EK is {verdict.maker}'s, under {verdict.anchor.certificate.name}")
    return 0


def _import_eks(args: argparse.Namespace) -> int:
    is_stdin = str(args.file) == "-"
    data = sys.stdin.buffer.read(MAX_BYTES + 1) if is_stdin else read_file(args.file, MAX_BYTES)
    new = parse_inventory(data[:MAX_BYTES], "stdin" if is_stdin else str(args.file))
    if not new:
        raise UsageError(f"{args.file} names no host")
    args.pins.mkdir(mode=0o700, parents=True, exist_ok=True)
    count = PinStore(args.pins).expected.add(new, replace=args.replace)
    if args.json:
        print(json.dumps({"imported": len(new), "hosts": count}))
    else:
        print(f"{len(new)} hosts imported; the inventory names {count} now")
    return 0


def _ek_name(pinned: PinnedHost) -> str | None:
    return None if pinned.ek_public is None else parse_public(pinned.ek_public).name.hex()


def _list(args: argparse.Namespace) -> int:
    store = PinStore(args.pins)
    hosts = []
    for label in store.labels():
        pinned = store.load(label)
        newest = pinned.newest()
        hosts.append(
            {
                "host": label,
                "ak_name": pinned.host.ak.name.hex(),
                "ek_name": _ek_name(pinned),
                "reset_count": newest.reset_count if newest else None,
                "clock_ms": newest.clock_ms if newest else None,
            }
        )
    if args.json:
        print(json.dumps({"hosts": hosts}))
    else:
        for host in hosts:
            print("  ".join("-" if value is None else f"{value}" for value in host.values()))
    return 0


def _remove(args: argparse.Namespace) -> int:
    PinStore(args.pins).remove(args.label)
    if args.json:
        print(json.dumps({"host": args.label}))
    return 0
