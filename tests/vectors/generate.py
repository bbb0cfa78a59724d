"""Writes the vectors of this directory: `cd tests && python -m vectors.generate`.

The same bytes at every run: keys, salts and order come from constants, signatures are RSASSA or
deterministic ECDSA (RFC 6979). `tests/test_vectors.py` holds the files against it. README.md says
which files it does not write, and where those come from.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from evidence_factory import VM, FixedTpm

from provider_proxy.evidence.model import ClockState, HashAlg
from vectors import ak_cases, link_cases, proof_cases, quote_cases, reply_cases, request_cases
from vectors.cases import NOTES, Case

FORMAT = "provider-proxy/vectors/1"
DIRECTORY = Path(__file__).parent
EVIDENCE_HEADER = (
    "Judge `evidence` (text; `evidenceBase64` where it is no UTF-8) as the answer to `request`, under",
    "the group's `ak` (base64 TPM2B_PUBLIC), `ageS` seconds after the nonce was made, with max_age_s",
    "60 and, where it is there, `baseline` as the newest state accepted before. Any policy accepts.",
)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _clock(state: ClockState) -> dict[str, int]:
    return {
        "resetCount": state.reset_count,
        "restartCount": state.restart_count,
        "clockMs": state.clock_ms,
    }


def _evidence_test(number: int, case: Case) -> dict[str, Any]:
    request = case.request
    test: dict[str, Any] = {
        "tcId": number,
        "comment": case.comment,
        "flags": list(case.flags),
        "request": {
            "nonce": request.nonce.decode("ascii"),
            "mask": hex(request.mask),
            "bank": request.bank.label,
            "vm": str(request.vm) if request.vm else None,
        },
        "ageS": case.age_s,
    }
    if case.baseline is not None:
        test["baseline"] = _clock(case.baseline)
    try:
        test["evidence"] = case.body.decode("utf-8")
    except UnicodeDecodeError:
        test["evidenceBase64"] = _base64(case.body)
    test["result"] = "invalid" if case.error else "valid"
    if case.error:
        test["error"] = case.error
    else:
        # What stands in the factory's TPM, not what some verifier made of the evidence.
        values = FixedTpm().read(request.bank, request.mask).values
        test["pcrs"] = {str(pcr): value.hex() for pcr, value in values}
    return test


def evidence_document(cases: Iterable[Case]) -> dict[str, Any]:
    """A file of evidence vectors, grouped by AK."""
    numbered = list(enumerate(cases, start=1))
    groups = [
        {"ak": _base64(ak), "tests": [_evidence_test(number, case) for number, case in tests]}
        for ak, tests in groupby(numbered, key=lambda pair: pair[1].ak)
    ]
    used = {flag for _, case in numbered for flag in case.flags}
    return {
        "format": FORMAT,
        "header": list(EVIDENCE_HEADER),
        "notes": {flag: NOTES[flag] for flag in sorted(used)},
        "numberOfTests": len(numbered),
        "testGroups": groups,
    }


def ak_document() -> dict[str, Any]:
    """The file of AK vectors."""
    tests = []
    for number, case in enumerate(ak_cases.cases(), start=1):
        test: dict[str, Any] = {
            "tcId": number,
            "comment": case.comment,
            "flags": list(case.flags),
            "public": _base64(case.public),
            "result": "invalid" if case.error else "valid",
        }
        if case.error:
            test["error"] = case.error
        else:
            name_alg = HashAlg(int.from_bytes(case.public[4:6], "big"))
            test["name"] = case.public[4:6].hex() + name_alg.digest(case.public[2:]).hex()
        tests.append(test)
    return {
        "format": FORMAT,
        "header": [
            "Read `public` (base64 TPM2B_PUBLIC) as an attestation key; `name` is its TPM name."
        ],
        "notes": ak_cases.NOTES,
        "numberOfTests": len(tests),
        "tests": tests,
    }


def link_document() -> dict[str, Any]:
    """The file of claims under a tenant's demands."""
    tests = []
    for number, case in enumerate(link_cases.link_cases(), start=1):
        test: dict[str, Any] = {
            "tcId": number,
            "comment": case.comment,
            "flags": list(case.flags),
            "wanted": case.wanted,
            "claims": case.claims.decode("ascii"),
            "result": "invalid" if case.error else "valid",
        }
        if case.error:
            test["error"] = case.error
        tests.append(test)
    return {
        "format": FORMAT,
        "header": [
            "`claims` came in evidence that is good otherwise, as the answer to a request about the VM",
            f"{VM}. Judge them under what the tenant wants: the VM that was ordered,",
            "the SHA-256 of its EK's SPKI, the least state, the issuer (null: any).",
        ],
        "notes": link_cases.LINK_NOTES,
        "numberOfTests": len(tests),
        "tests": tests,
    }


def deep_document() -> dict[str, Any]:
    """The file of deep quotes."""
    tests = []
    for number, case in enumerate(link_cases.deep_cases(), start=1):
        test: dict[str, Any] = {
            "tcId": number,
            "comment": case.comment,
            "flags": list(case.flags),
            "nonce": case.nonce.decode("ascii"),
            "vak": _base64(case.vak),
            "vtpmQuote": case.vtpm_quote,
            "hostNonce": case.host_nonce.decode("ascii"),
            "evidence": case.evidence.decode("ascii"),
            "result": "invalid" if case.error else "valid",
        }
        if case.error:
            test["error"] = case.error
        if case.cause:
            test["cause"] = case.cause
        tests.append(test)
    return {
        "format": FORMAT,
        "header": [
            "The vTPM was to quote over `nonce`; `vtpmQuote` (Keylime's string) is its answer, under",
            "`vak` (base64 TPM2B_PUBLIC); its PCRs 0 and 7 are read by the tenant's policy, which",
            f"accepts any value. Then the proxy was asked about the VM {VM}",
            "with `hostNonce` and mask 0x83; `evidence` is its answer, under `hostAk`. The tenant wants",
            "that VM with the EK `ek`.",
        ],
        "notes": link_cases.DEEP_NOTES,
        "hostAk": _base64(FixedTpm().ak_public),
        "ek": link_cases.RSA_EK,
        "numberOfTests": len(tests),
        "tests": tests,
    }


FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "valid.json": lambda: evidence_document(request_cases.valid_cases()),
    "reply_json.json": lambda: evidence_document(reply_cases.json_cases()),
    "reply_fields.json": lambda: evidence_document(reply_cases.field_cases()),
    "reply_quote.json": lambda: evidence_document(reply_cases.quote_cases()),
    "reply_proof.json": lambda: evidence_document(proof_cases.cases()),
    "attest.json": lambda: evidence_document(quote_cases.attest_cases()),
    "signature.json": lambda: evidence_document(quote_cases.signature_cases()),
    "request.json": lambda: evidence_document(request_cases.cases()),
    "ak.json": ak_document,
    "link.json": link_document,
    "deep.json": deep_document,
}


def render(name: str) -> bytes:
    """The exact bytes of one file."""
    return json.dumps(FILES[name](), indent=1).encode("ascii") + b"\n"


def main() -> None:
    for name in FILES:
        (DIRECTORY / name).write_bytes(render(name))


if __name__ == "__main__":
    main()
