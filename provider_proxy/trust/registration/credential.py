"""A registrar's challenge: the blob that it sends, and the tag that answers it.

Pure. The blob is untrusted: it is cut into the two structures that TPM2_ActivateCredential takes, and
the TPM judges them. The key inside never leaves this host; only an HMAC under it does, over the agent
id alone. So two registrars must never share an id: one could relay the other's challenge to this host.
Source: tpm2-tools' credential file, as Keylime's registrar writes it; Keylime's agent for the tag.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from provider_proxy.errors import EvidenceFormatError
from provider_proxy.evidence.tpm_reader import Reader

MAGIC = 0xBADCC0DE
VERSION = 1
MAX_ID_OBJECT_BYTES = 132  # two TPM2B_DIGEST of 64 bytes (TPM 2.0 Part 2, section 12.4.3)
MAX_SECRET_BYTES = 512  # an RSA-4096 EK
MAX_KEY_BYTES = 64  # the largest digest; Keylime's has 32
MAX_BLOB_BYTES = 8 + 2 + MAX_ID_OBJECT_BYTES + 2 + MAX_SECRET_BYTES


def parse_challenge(blob: bytes) -> tuple[bytes, bytes]:
    """Cut a challenge into TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET, sizes included.

    Does not check: that they are for these keys; only the TPM can tell.

    Raises:
        EvidenceFormatError: not such a blob, or a part is longer than any TPM accepts.
    """
    read = Reader(blob, "the challenge")
    if read.uint(4) != MAGIC or read.uint(4) != VERSION:
        raise EvidenceFormatError("the challenge does not begin with 0xbadcc0de, version 1")
    parts = []
    for limit in (MAX_ID_OBJECT_BYTES, MAX_SECRET_BYTES):
        part = read.sized(limit)
        if not part:
            raise EvidenceFormatError("the challenge has an empty part")
        parts.append(len(part).to_bytes(2, "big") + part)
    read.end()
    credential, secret = parts
    inner = Reader(credential[2:], "the challenge's TPMS_ID_OBJECT")
    inner.sized(MAX_KEY_BYTES)  # integrityHMAC; what follows is encrypted
    if not inner.left:
        raise EvidenceFormatError("the challenge's TPMS_ID_OBJECT does not hold an identity")
    return credential, secret


def auth_tag(key: bytes, agent_id: str) -> str:
    """The answer to a challenge: HMAC-SHA384 in hex, keyed with the *base64 text* of the key.

    Args:
        key: what TPM2_ActivateCredential gave.
    """
    return hmac.new(base64.b64encode(key), agent_id.encode("utf-8"), hashlib.sha384).hexdigest()
