"""Run by `make wheel` in a fresh environment that holds the wheel and `cryptography` alone.

The vectors must verify, or fail, as they say; and the command must verify a saved answer. No pytest:
a tenant has none either.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import sysconfig
import tempfile
from hashlib import sha256
from pathlib import Path

import provider_proxy
from provider_proxy import errors
from provider_proxy.evidence import request_file
from provider_proxy.evidence.model import QuoteRequest, parse_bank, parse_mask, parse_nonce

VECTORS = Path(__file__).parents[1] / "vectors"


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
    print(f"wheel {installed.parent}: verify works with nothing but cryptography")
    return 0


if __name__ == "__main__":
    sys.exit(main())
