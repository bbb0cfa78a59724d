"""Run by `make wheel` in a fresh environment that holds the wheel and `cryptography` alone.

The vectors of evidence and of attestation keys must verify, or fail, as they say; and the command must
verify a saved answer. No pytest: a tenant has none either.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from hashlib import sha256
from pathlib import Path
from typing import Any

import provider_proxy
from provider_proxy import errors
from provider_proxy.evidence import request_file
from provider_proxy.evidence.model import (
    ClockState,
    QuoteRequest,
    TrustedHost,
    parse_bank,
    parse_mask,
    parse_nonce,
)
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier

VECTORS = Path(__file__).parents[1] / "vectors"
EVIDENCE = (
    *("valid", "reply_json", "reply_fields", "reply_quote", "reply_proof"),
    *("attest", "signature", "request"),
)


def verdict_of(test: dict[str, Any], ak: str) -> str:
    """The name of the error that a vector of evidence ends with; "valid" without an error."""
    wanted, state = test["request"], test.get("baseline")
    request = QuoteRequest(
        nonce=parse_nonce(wanted["nonce"]),
        mask=parse_mask(wanted["mask"]),
        bank=parse_bank(wanted["bank"]),
        vm=uuid.UUID(wanted["vm"]) if wanted["vm"] else None,
    )
    baseline = state and ClockState(
        reset_count=state["resetCount"],
        restart_count=state["restartCount"],
        clock_ms=state["clockMs"],
    )
    history = MemoryHistory(baseline)
    history.open(request.nonce)
    challenge = Challenge(request=request, made_at_s=0.0, baseline=baseline)
    body = (
        test["evidence"].encode()
        if "evidence" in test
        else base64.b64decode(test["evidenceBase64"])
    )
    try:
        host = TrustedHost(ak=parse_ak(base64.b64decode(ak)))
        verifier = Verifier(UnsafeAcceptAny(), max_age_s=60.0)
        quote = verifier.verify(body, challenge, host, history, now_s=test["ageS"])
    except errors.VerificationError as exc:
        return type(exc).__name__
    assert {str(pcr): value.hex() for pcr, value in quote.pcrs.items()} == test["pcrs"], test
    return "valid"


def check_vectors() -> int:
    """Judge all vectors of evidence and of keys; how many there are."""
    count = 0
    for name in EVIDENCE:
        for group in json.loads((VECTORS / f"{name}.json").read_bytes())["testGroups"]:
            for test in group["tests"]:
                expected = "valid" if test["result"] == "valid" else test["error"]
                assert verdict_of(test, group["ak"]) == expected, test["comment"]
                count += 1
    document = json.loads((VECTORS / "ak.json").read_bytes())
    for group in document.get("testGroups", [document]):
        for test in group["tests"]:
            try:
                found = parse_ak(base64.b64decode(test["public"])).name.hex()
            except errors.VerificationError as exc:
                found = type(exc).__name__
            expected = test["name"] if test["result"] == "valid" else test["error"]
            assert found == expected, test["comment"]
            count += 1
    return count


def main() -> int:
    """Verify; the exit code says whether all went as the vectors say."""
    installed = Path(provider_proxy.__file__).resolve()
    assert installed.is_relative_to(Path(sys.prefix).resolve()), f"not the wheel: {installed}"
    document = json.loads((VECTORS / "valid.json").read_text())
    group = next(g for g in document["testGroups"] if any("vm" not in t for t in g["tests"]))
    test = next(t for t in group["tests"] if t["request"].get("vm") is None)
    command = Path(sysconfig.get_path("scripts")) / "provider-proxy"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        body = test["evidence"].encode()
        wanted = test["request"]
        record = request_file.RequestRecord(
            request=QuoteRequest(
                nonce=parse_nonce(wanted["nonce"]),
                mask=parse_mask(wanted["mask"]),
                bank=parse_bank(wanted.get("bank", "sha256")),
            ),
            made_at_s=0.0,
            answered_after_s=1.0,
            evidence_sha256=sha256(body).digest(),
        )
        (directory / "request").write_bytes(request_file.encode_request(record))
        (directory / "ak").write_bytes(base64.b64decode(group["ak"]))
        arguments: list[str] = [
            str(command),
            "verify",
            "evidence",
            "--request",
            "request",
            "--ak-tpm",
            "ak",
        ]
        arguments += ["--insecure-any-state", "--json"]
        for change, code in ((b"", 0), (b" ", 2)):
            (directory / "evidence").write_bytes(body + change)
            done = subprocess.run(arguments, cwd=directory, capture_output=True, check=False)
            assert done.returncode == code, done
    assert issubclass(errors.SignatureError, errors.VerificationError)
    count = check_vectors()
    python = sys.version.split()[0]
    print(f"Python {python}: the wheel judges {count} vectors with nothing but cryptography")
    return 0


if __name__ == "__main__":
    sys.exit(main())
