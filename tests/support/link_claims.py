"""EKs of a vTPM and the claims of a link, made by hand."""

from __future__ import annotations

import json
from typing import Any

from evidence_factory import VM, ec_key

from provider_proxy import ek_digest
from provider_proxy.evidence.tpm_writer import encode_public

EK_ATTRIBUTES = 0x000300B2  # an EK's of the TCG's template: restricted, decrypt
EK = encode_public(ec_key("ek").public_key(), EK_ATTRIBUTES)
OTHER_EK = encode_public(ec_key("other ek").public_key(), EK_ATTRIBUTES)
CLAIMS: dict[str, Any] = {
    "vm": str(VM),
    "eks": [{"alg": "p256", "spki_sha256": ek_digest(EK).hex()}],
    "running": True,
    "confirmed": False,
    "issuer": "delegate",
    "migrated": False,
    "generation": 1,
    "registered_at": 1_790_000_000,
}


def claims_bytes(**changes: object) -> bytes:
    return json.dumps(CLAIMS | changes).encode()
