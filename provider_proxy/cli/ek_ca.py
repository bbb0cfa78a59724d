"""`provider-proxy ek-ca`: show a store of TPM makers' CAs, and check one chip's certificate against it.

Needs only files: no chip, no registrar, no network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from provider_proxy.cli.arguments import read_public
from provider_proxy.common.files import read_file
from provider_proxy.errors import EvidenceFormatError, HostError, UntrustedEkError, UsageError
from provider_proxy.evidence.tpm_keys import PublicKey, parse_public
from provider_proxy.trust.ek_anchors import Anchor, Anchors, Purpose
from provider_proxy.trust.ek_certificate import (
    TpmCertificate,
    parse_certificate,
)
from provider_proxy.trust.ek_chain import Verdict, check_chain, weakness_of
from provider_proxy.trust.ek_files import LoadedStore, load_store, read_certificates
from provider_proxy.trust.ek_makers import chip_facts, maker_of_chip

EXIT_GOOD, EXIT_REFUSED = 0, 1
SOON = timedelta(days=180)  # time to look for a maker's new CA
MAX_ALSO = 20  # other anchors that are named
MAX_CHAIN_FILE_BYTES = 256 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show", help="list the CAs in a store, and the files in it that are not used"
    )
    show.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="the store: directories, PEM bundles or certificates",
    )
    show.set_defaults(act=_show)
    check = actions.add_parser("check", help="check one EK certificate against a store")
    check.add_argument(
        "--cert", type=Path, required=True, metavar="FILE", help="the EK certificate, PEM or DER"
    )
    check.add_argument(
        "--ek-ca",
        type=Path,
        action="append",
        required=True,
        metavar="PATH",
        help="the store; may be repeated",
    )
    check.add_argument(
        "--chain",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="intermediate CAs, PEM or DER, not trusted by themselves; may be repeated",
    )
    check.add_argument(
        "--ek-tpm",
        type=Path,
        metavar="FILE",
        help="the EK that the certificate must be for: TPM2B_PUBLIC, raw or base64",
    )
    check.add_argument(
        "--insecure-virtual-ek", action="store_true", help="also accept virtual TPMs"
    )
    check.set_defaults(act=_check)
    for action in (show, check):
        action.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        HostError: a file cannot be read, or the store has no CA.
    """
    code: int = args.act(args, datetime.now(UTC))
    return code


def _load(paths: Sequence[Path]) -> LoadedStore:
    """A store that cannot be used is an error of the environment, as a missing file is."""
    try:
        return load_store(paths)
    except UsageError as exc:
        raise HostError(str(exc)) from exc


# --- show ---------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace, now: datetime) -> int:
    store = _load(args.paths)
    listed = sorted(store.anchors.all, key=lambda a: (a.maker, a.purpose.value, a.certificate.name))
    if args.json:
        print(json.dumps(_store_values(store, listed, now)))
        return EXIT_GOOD
    maker = ""
    for anchor in listed:
        if anchor.maker != maker:
            maker = anchor.maker
            print(f"{maker}")
        values = _anchor_values(anchor, store.anchors, now)
        print(f"  {anchor.certificate.name}")
        print(
            f"    {values['purpose']}, {values['kind']}, {values['key']}, until {values['until']}, "
            f"SHA-256 {anchor.sha256[:16]}…"
        )
        for note in _notes(anchor, store.anchors, now):
            print(f"    {note}")
    for skipped in store.skipped:
        print(f"not used: {skipped.source}: {skipped.why}")
    counts = Counter(anchor.purpose for anchor in listed)
    print(
        f"{counts[Purpose.HARDWARE]} anchors for hardware TPMs, {counts[Purpose.VIRTUAL]} for virtual "
        f"ones, {len(store.skipped)} files or parts of files not used"
    )
    return EXIT_GOOD


def _store_values(store: LoadedStore, listed: Sequence[Anchor], now: datetime) -> dict[str, object]:
    return {
        "anchors": [
            {
                **_anchor_values(anchor, store.anchors, now),
                "notes": _notes(anchor, store.anchors, now),
            }
            for anchor in listed
        ],
        "skipped": [{"source": each.source, "why": each.why} for each in store.skipped],
    }


def _anchor_values(anchor: Anchor, anchors: Anchors, now: datetime) -> dict[str, object]:
    certificate = anchor.certificate
    is_root = certificate.subject == certificate.issuer
    return {
        "maker": anchor.maker,
        "name": certificate.name,
        "issuer": certificate.issuer_name,
        "kind": "self-signed" if is_root else "intermediate",
        "purpose": anchor.purpose.value,
        "why_virtual": anchor.why_virtual,
        "key": _key_of(certificate),
        "from": f"{certificate.parsed.not_valid_before_utc:%Y-%m-%d}",
        "until": f"{certificate.parsed.not_valid_after_utc:%Y-%m-%d}",
        "is_valid": certificate.parsed.not_valid_before_utc
        <= now
        <= certificate.parsed.not_valid_after_utc,
        "anchors_below": [below.sha256 for below in anchors.below(anchor)],
        "sha256": anchor.sha256,
        "source": anchor.source,
    }


def _notes(anchor: Anchor, anchors: Anchors, now: datetime) -> list[str]:
    notes = []
    parsed = anchor.certificate.parsed
    if anchor.why_virtual is not None:
        notes.append(f"not accepted for hosts: {anchor.why_virtual}")
    if parsed.not_valid_after_utc < now:
        notes.append("expired: chips that it certifies are refused")
    elif parsed.not_valid_after_utc < now + SOON:
        notes.append("expires soon: look for the maker's new CA")
    if parsed.not_valid_before_utc > now:
        notes.append("not valid yet: chips that it certifies are refused")
    weakness = weakness_of(anchor.certificate)
    if weakness is not None:
        notes.append(f"chips that it certifies are refused: {weakness}")
    below = anchors.below(anchor)
    if below:
        notes.append(
            f"{len(below)} CAs below it are anchors too: they stay trusted if this one is removed"
        )
    return notes


def _key_of(certificate: TpmCertificate) -> str:
    key = certificate.parsed.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA-{key.key_size}"
    return key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else "unknown key"


# --- check --------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace, now: datetime) -> int:
    store = _load(args.ek_ca)
    values: dict[str, object] = {"good": False}
    try:
        verdict = _judge(args, store, now, values)
    except UntrustedEkError as exc:
        if args.json:
            print(json.dumps({**values, "reason": str(exc)}))
        print(f"refused: {exc}", file=sys.stderr)
        for skipped in store.skipped[:MAX_ALSO]:
            print(f"not used: {skipped.source}: {skipped.why}", file=sys.stderr)
        return EXIT_REFUSED
    also = _also(args, store, now, verdict)
    values |= {
        "good": True,
        "maker": verdict.maker,
        "chain": [each.name or "the EK certificate" for each in verdict.chain],
        "anchor": {
            "name": verdict.anchor.certificate.name,
            "purpose": verdict.anchor.purpose.value,
            "sha256": verdict.anchor.sha256,
            "source": verdict.anchor.source,
        },
        "until": f"{verdict.until:%Y-%m-%d}",
        "also_under": [{"name": a.certificate.name, "sha256": a.sha256} for a in also],
    }
    if args.json:
        print(json.dumps(values))
        return EXIT_GOOD
    print(f"good: a TPM of {verdict.maker} ({_chip(verdict.chain[0])}), until {values['until']}")
    for helper in verdict.chain[1:]:
        print(f"  under {helper.name} (given with the certificate, not trusted by itself)")
    print(f"  under {verdict.anchor.certificate.name} ({verdict.anchor.source})")
    for anchor in also:
        print(f"  also good under {anchor.certificate.name} ({anchor.source})")
    return EXIT_GOOD


def _judge(
    args: argparse.Namespace, store: LoadedStore, now: datetime, values: dict[str, object]
) -> Verdict:
    """Raises: UntrustedEkError."""
    found = read_certificates(read_file(args.cert, MAX_CHAIN_FILE_BYTES))
    try:
        leaf = parse_certificate(found[0] if found else b"")
    except EvidenceFormatError as exc:
        raise UntrustedEkError(f"the EK certificate cannot be read: {exc}") from exc
    values |= {"maker": maker_of_chip(leaf), "chip": chip_facts(leaf), "issuer": leaf.issuer_name}
    key = leaf.parsed.public_key()
    if args.ek_tpm is not None:
        key = parse_public(read_public(args.ek_tpm)).public_key
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise UntrustedEkError("the EK certificate's key is neither RSA nor EC")
    return _verdict(args, store.anchors, leaf, key, now, found[1:])


def _verdict(
    args: argparse.Namespace,
    anchors: Anchors,
    leaf: TpmCertificate,
    key: PublicKey,
    now: datetime,
    beside: Sequence[bytes],
) -> Verdict:
    helpers = list(beside)
    for path in args.chain:
        helpers += read_certificates(read_file(path, MAX_CHAIN_FILE_BYTES))
    return check_chain(
        leaf.der, key, anchors, now, helpers=helpers, insecure_virtual=args.insecure_virtual_ek
    )


def _also(
    args: argparse.Namespace, store: LoadedStore, now: datetime, verdict: Verdict
) -> list[Anchor]:
    """The anchors under which the chip would be good without those before them."""
    leaf = verdict.chain[0]
    key = leaf.parsed.public_key()
    assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
    found: list[Anchor] = []
    without = {verdict.anchor.sha256}
    while len(found) < MAX_ALSO:
        try:
            again = _verdict(args, store.anchors.without(without), leaf, key, now, ())
        except UntrustedEkError:
            break
        found.append(again.anchor)
        without.add(again.anchor.sha256)
    return found


def _chip(leaf: TpmCertificate) -> str:
    facts = chip_facts(leaf)
    return " ".join(facts.values()) or "its certificate names no model"
