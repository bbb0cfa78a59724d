"""`provider-proxy audit`: what an audit log says, and what it proves about a nonce. No TPM, no network.

Needs `cryptography` alone, so that a tenant can prove with an extract of the provider's log. What a
log holds is shown escaped: it is untrusted text.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from provider_proxy.common.files import read_file
from provider_proxy.errors import ParameterError
from provider_proxy.evidence.model import parse_bank, parse_mask, parse_nonce
from provider_proxy.evidence.wire import MAX_EVIDENCE_WITH_LOGS_BYTES, parse_evidence
from provider_proxy.host.audit.file import read_records
from provider_proxy.host.audit.file import warn_of_damage as warn
from provider_proxy.host.audit.records import AuditRecord, Proof, prove, record_values

EXIT_NOT_PROVEN = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    proof = actions.add_parser("prove", help="prove that a nonce is in a batch of the log")
    proof.add_argument(
        "--nonce", required=True, metavar="TEXT", help="the nonce, as it was sent to the proxy"
    )
    proof.add_argument("--mask", metavar="MASK", help="the requested mask, 0x and hex digits")
    proof.add_argument("--bank", metavar="BANK", help="the requested bank")
    proof.add_argument("--vm", metavar="UUID", help="the VM that the request named, if any")
    proof.add_argument(
        "--evidence",
        type=Path,
        metavar="FILE",
        help="the saved reply; its quote must sign the recorded root",
    )
    show = actions.add_parser("show", help="show the records")
    show.add_argument("--tenant", metavar="NAME", help="show only records of this tenant")
    show.add_argument("--last", type=_count, metavar="N", help="show only the newest N records")
    for action, act in ((proof, _prove), (show, _show)):
        action.add_argument(
            "--log",
            type=Path,
            required=True,
            metavar="FILE",
            help="the log; FILE.1, FILE.2 and so on are read with it",
        )
        action.add_argument("--json", action="store_true", help="one JSON object as the last line")
        action.set_defaults(act=act)


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        ParameterError: nonce, mask, bank or UUID is not valid.
        EvidenceFormatError: the evidence file holds no evidence.
        HostError: a file cannot be read.
    """
    code: int = args.act(args)
    return code


class _Damage:
    """Warns of each line that is not a record, and counts them."""

    count = 0

    def __call__(self, path: Path, number: int, problem: str) -> None:
        self.count += 1
        warn(path, number, problem)


def _prove(args: argparse.Namespace) -> int:
    nonce = parse_nonce(args.nonce)
    evidence = None
    if args.evidence is not None:
        evidence = parse_evidence(read_file(args.evidence, MAX_EVIDENCE_WITH_LOGS_BYTES))
    damage = _Damage()
    proof = prove(
        read_records(args.log, damage),
        nonce,
        mask=parse_mask(args.mask) if args.mask is not None else None,
        bank=parse_bank(args.bank) if args.bank is not None else None,
        vm=_parse_vm(args.vm) if args.vm is not None else None,
        claims=(evidence.claims or b"") if evidence is not None else None,
        evidence=evidence,
    )
    proven = proof is not None and proof.problem is None
    if args.json:
        values = {
            "found": proof is not None,
            "proven": proven,
            "problem": proof.problem if proof else None,
            "evidence_checked": proven and evidence is not None,
            "qualifying": proof.qualifying.decode("ascii") or None if proof else None,
            "record": record_values(proof.record) if proof else None,
            "damaged_lines": damage.count,
        }
        print(json.dumps(values))
    else:
        print("\n".join(_in_words(proof, damage.count, with_evidence=evidence is not None)))
    return 0 if proven else EXIT_NOT_PROVEN


def _in_words(proof: Proof | None, damaged: int, *, with_evidence: bool) -> list[str]:
    if proof is None:
        skipped = f" (skipped {damaged} damaged lines)" if damaged else ""
        return [f"not in this log{skipped}"]
    record, leaf = proof.record, proof.record.leaf
    if proof.problem is not None or leaf is None:
        return [f"recorded, but not proven: {proof.problem}", f"  {_line(record)}"]
    lines = [
        f"in batch {record.batch} under root {leaf.root.hex()} at index {leaf.proof.leaf_index} "
        f"of {leaf.proof.tree_size}",
        f"  {_line(record)}",
        f"  a quote over this root has the qualifying data {proof.qualifying.decode('ascii')}",
    ]
    if with_evidence:
        lines.append("  the evidence's quote has it; `verify` checks that the AK signed it")
    else:
        lines.append("  only the evidence can show that a TPM signed such a quote")
    return lines


def _show(args: argparse.Namespace) -> int:
    damage = _Damage()
    records: Iterator[AuditRecord] = (
        record
        for record in read_records(args.log, damage)
        if args.tenant is None or record.tenant == args.tenant
    )
    if args.last is not None:
        records = iter(collections.deque(records, maxlen=args.last))
    if args.json:
        values = [record_values(record) for record in records]
        print(json.dumps({"records": values, "damaged_lines": damage.count}))
    else:
        for record in records:
            print(_line(record))
    return 0


def _line(record: AuditRecord) -> str:
    """A record for people: one line, nothing in it that a terminal would act upon."""
    time = datetime.fromtimestamp(record.time, tz=UTC).isoformat(timespec="milliseconds")
    place = "-"
    if record.leaf is not None:
        place = f"{record.leaf.proof.leaf_index}/{record.leaf.proof.tree_size}"
    return (
        f"{time}  {json.dumps(record.tenant)}  {record.batch}  {place}  "
        f"{record.mask:#x} {record.bank.label}  {record.outcome}  {record.request_hash.hex()}"
    )


def _parse_vm(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise ParameterError("vm", "must be a UUID") from None


def _count(text: str) -> int:
    """For argparse, which names the option when this raises. Raises: ValueError."""
    if not 1 <= int(text) <= sys.maxsize:
        raise argparse.ArgumentTypeError("must be a number, 1 or more")
    return int(text)
