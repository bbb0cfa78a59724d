"""A tenant's files for `verify`: request, evidence, AK and policy, all good."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from helpers import make_evidence, run_here

from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, QuoteRequest
from provider_proxy.evidence.request_file import RequestRecord, encode_request
from provider_proxy.testing.soft_tpm import SoftTpm

VALUE = HashAlg.SHA256.digest(b"good")
MASK = PcrMask(1 << 16)
Done = subprocess.CompletedProcess[str]
VERIFY = "verify evidence.json --request request.json --ak-tpm ak --tpm-policy policy.json"


class Files:
    """A tenant's files: request, evidence, AK, policy; all good."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tpm = SoftTpm(pcrs={16: b"good"})
        self.request = QuoteRequest(nonce=Nonce(b"nonce-0123456789"), mask=MASK)
        self.body = make_evidence(self.tpm, self.request)
        self.put("ak", base64.b64encode(self.tpm.ak_public) + b"\n")
        self.put("policy.json", json.dumps({"16": [VALUE.hex()]}).encode())
        self.put("evidence.json", self.body)
        self.record(answered_after_s=1.0, evidence_sha256=sha256(self.body).digest())

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def record(self, *, made_at_s: float | None = None, **more: Any) -> None:
        record = RequestRecord(
            request=self.request, made_at_s=time.time() if made_at_s is None else made_at_s, **more
        )
        self.put("request.json", encode_request(record))

    def verify(
        self,
        *more: str,
        key: tuple[str, ...] = ("--ak-tpm", "ak"),
        policy: tuple[str, ...] = ("--tpm-policy", "policy.json"),
        evidence: str = "evidence.json",
        request: str = "request.json",
    ) -> Done:
        words = ("verify", evidence, "--request", request, *key, *policy, *more)
        return run_here(*words, cwd=self.folder)
