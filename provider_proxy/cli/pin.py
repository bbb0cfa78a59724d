"""`provider-proxy pin`: which AK is trusted for which host."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from provider_proxy.cli.files import read_public
from provider_proxy.pins import PinStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="trust an AK for a host")
    add.add_argument("label", metavar="HOST", help="your name of the host")
    add.add_argument(
        "--ak-tpm",
        type=Path,
        required=True,
        metavar="FILE",
        help="its AK: TPM2B_PUBLIC, raw or base64, from your registrar",
    )
    add.add_argument(
        "--anew", action="store_true", help="replace another AK; you know why it changed"
    )
    show = actions.add_parser("list", help="show the pinned hosts")
    remove = actions.add_parser("remove", help="forget a host")
    remove.add_argument("label", metavar="HOST", help="your name of the host")
    for action, act in ((add, _add), (show, _list), (remove, _remove)):
        action.add_argument(
            "--pins", type=Path, required=True, metavar="DIR", help="directory of the pins"
        )
        action.add_argument("--json", action="store_true", help="one JSON object as the last line")
        action.set_defaults(act=act)


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        PinChangedError: another AK is pinned for this host.
        UntrustedAkError: the file holds no attestation key.
        UsageError, HostError: a label or a file is wrong.
    """
    code: int = args.act(args)
    return code


def _add(args: argparse.Namespace) -> int:
    pinned = PinStore(args.pins).pin(args.label, read_public(args.ak_tpm), anew=args.anew)
    name = pinned.host.ak.name.hex()
    print(
        json.dumps({"host": args.label, "ak_name": name}) if args.json else f"{args.label} {name}"
    )
    return 0


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
                "reset_count": newest.reset_count if newest else None,
                "clock_ms": newest.clock_ms if newest else None,
            }
        )
    if args.json:
        print(json.dumps({"hosts": hosts}))
    else:
        for host in hosts:
            print("  ".join(f"{value}" for value in host.values()))
    return 0


def _remove(args: argparse.Namespace) -> int:
    PinStore(args.pins).remove(args.label)
    if args.json:
        print(json.dumps({"host": args.label}))
    return 0
