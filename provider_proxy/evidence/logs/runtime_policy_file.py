"""Reads Keylime's runtime policies: JSON, alone or in a signed envelope (DSSE).

A policy is accepted as a whole or refused as a whole: without a part of it, the verdict would differ
from Keylime's. Each refusal says what to do instead.
Sources: Keylime 7.14.3, `ima/ima.py` (RUNTIME_POLICY_SCHEMA), `ima/file_signatures.py`, `dsse/`; DSSE.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from provider_proxy.errors import LogError, UsageError
from provider_proxy.evidence.logs.ima_keys import MAX_KEYS, NO_KEYS, KeySet, key_of_spki
from provider_proxy.evidence.logs.ima_line import shown
from provider_proxy.evidence.logs.runtime_policy import DigestLists, RuntimePolicy
from provider_proxy.evidence.strict_json import parse_own_json

MAX_SIGNATURES = 64  # of an envelope
PARTS = (
    *("meta", "release", "digests", "excludes", "keyrings", "ima", "ima-buf"),
    "verification-keys",
)
_LOG_HASHES = ("sha1", "sha256", "sha384", "sha512")
_IMA_PARTS = ("ignored_keyrings", "log_hash_alg", "dm_policy")
_DIGEST_RE = re.compile(r"[0-9a-f]{40,128}", re.ASCII)
_OLD_FORMS = {
    "hashes": "an allowlist of an older Keylime: make a runtime policy of it with "
    "`keylime_convert_runtime_policy --allowlist FILE --output_file POLICY`",
    "rules": "a policy of device-mapper rules: dm_policy is not judged here, nor by Keylime 7.14",
}


def parse_runtime_policy(data: bytes, *, key: bytes | None = None) -> RuntimePolicy:
    """Read a runtime policy.

    Args:
        key: PEM, a public key or certificate on an elliptic curve; the policy must then be in an
            envelope that it has signed. None accepts only unsigned policies.

    Raises:
        UsageError: not such a policy, not signed by this key, or it demands what is not judged here.
    """
    values = parse_own_json(data, "the runtime policy")
    if "payload" in values:
        if key is None:
            raise UsageError("the runtime policy is signed: give the key that has signed it")
        values = parse_own_json(_signed_payload(values, key), "the signed runtime policy")
    elif key is not None:
        raise UsageError("a key is given for the runtime policy, and the policy is not signed")
    return _policy_of(values)


def _policy_of(values: Mapping[str, object]) -> RuntimePolicy:
    for part in values:
        if part not in PARTS:
            hint = _OLD_FORMS.get(part, "this version does not know it, so it cannot be judged")
            raise UsageError(f"the runtime policy has {shown(part)}: {hint}")
    options = values.get("ima") or {}
    if not isinstance(options, dict):
        raise UsageError("the runtime policy's ima is not an object")
    for option in options:
        if option not in _IMA_PARTS:
            raise UsageError(
                f"the runtime policy has ima.{shown(option)}: this version does not know it, so it "
                "cannot be judged"
            )
    if options.get("dm_policy"):
        raise UsageError(
            "the runtime policy has ima.dm_policy: device-mapper rules are not judged here (nor by "
            "Keylime 7.14): set it to null, and list what dm_* lines may say under ima-buf"
        )
    if options.get("log_hash_alg") not in (None, *_LOG_HASHES):
        raise UsageError(
            f"the runtime policy's ima.log_hash_alg must be one of {', '.join(_LOG_HASHES)}"
        )
    return RuntimePolicy(
        digests=_digest_lists(values.get("digests"), "digests"),
        excludes=pattern_of(_texts(values.get("excludes"), "excludes")),
        keyrings=_digest_lists(values.get("keyrings"), "keyrings"),
        buffers=_digest_lists(values.get("ima-buf"), "ima-buf"),
        ignored_keyrings=frozenset(_texts(options.get("ignored_keyrings"), "ignored_keyrings")),
        keys=_keys(values.get("verification-keys")),
    )


def _texts(values: object, what: str) -> list[str]:
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise UsageError(f"the runtime policy's {what} is not a list of strings")
    return values


def pattern_of(excludes: list[str]) -> re.Pattern[str] | None:
    """One pattern of all, joined as Keylime joins them; None without patterns. Raises: UsageError."""
    if not excludes:
        return None
    for text in excludes:
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as exc:
            raise UsageError(f"the runtime policy's exclude {shown(text)!r}: {exc}") from exc
    try:
        return re.compile("(" + ")|(".join(excludes) + ")")
    except (re.error, RecursionError, OverflowError) as exc:
        raise UsageError(f"the runtime policy's excludes cannot be joined: {exc}") from exc


def _digest_lists(values: object, what: str) -> DigestLists:
    found: dict[str, frozenset[str]] = {}
    if values is None:
        return found
    if not isinstance(values, dict):
        raise UsageError(f"the runtime policy's {what} is not an object")
    for name, digests in values.items():
        if not isinstance(digests, list) or not all(isinstance(d, str) for d in digests):
            raise UsageError(
                f"the runtime policy's {what} of {shown(name)} is not a list of hex digests"
            )
        for digest in digests:
            if _DIGEST_RE.fullmatch(digest) is None:
                raise UsageError(
                    f"the runtime policy's {what} of {shown(name)} has {shown(digest)!r}, which is "
                    "not a digest in lower-case hex"
                )
        found[name] = frozenset(digests)
    return found


def _keys(text: object) -> KeySet:
    """`verification-keys`: JSON in a text, {"keyids": [number], "pubkeys": [base64 of DER]}."""
    if text is None or text == "":
        return NO_KEYS
    what = "the runtime policy's verification-keys"
    if not isinstance(text, str):
        raise UsageError(f"{what} is not a string that holds JSON")
    values = parse_own_json(text, what)
    ids, keys = values.get("keyids"), values.get("pubkeys")
    if not isinstance(ids, list) or not isinstance(keys, list):
        raise UsageError(f"{what} does not have keyids and pubkeys")
    if not all(type(number) is int and 0 <= number < 1 << 32 for number in ids):
        raise UsageError(f"{what} has a key id that is not a number of 32 bits")
    if len(keys) > MAX_KEYS:
        raise UsageError(f"{what} has more than {MAX_KEYS} keys")
    found = []
    for place, key in enumerate(keys):
        try:
            spki = base64.b64decode(key, validate=True) if isinstance(key, str) else b""
            found.append(key_of_spki(spki, ids[place] if place < len(ids) else None))
        except (binascii.Error, ValueError, LogError) as exc:
            raise UsageError(f"{what}, key {place}: {exc}") from exc
    return frozenset(found)


def _signed_payload(envelope: Mapping[str, object], pem: bytes) -> bytes:
    """The payload of an envelope that a key has signed (DSSE, ECDSA with SHA-256).

    Raises:
        UsageError: the key has not signed it, or this is not such an envelope.
    """
    key = _signer(pem)
    kind, signatures = envelope.get("payloadType"), envelope.get("signatures")
    if not isinstance(kind, str) or not isinstance(signatures, list):
        raise UsageError("the runtime policy's envelope lacks payloadType or signatures")
    if len(signatures) > MAX_SIGNATURES:
        raise UsageError(f"the runtime policy's envelope has more than {MAX_SIGNATURES} signatures")
    payload = _base64(envelope.get("payload"))
    kind_bytes = kind.encode("utf-8", "surrogatepass")
    signed = b"DSSEv1 %d %b %d %b" % (len(kind_bytes), kind_bytes, len(payload), payload)
    for signature in signatures:
        value = _base64(signature.get("sig") if isinstance(signature, dict) else None)
        try:
            key.verify(value, signed, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            continue
        return payload
    raise UsageError("the runtime policy is not signed by the key that was given for it")


def _signer(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        if b"CERTIFICATE" in pem:
            key: object = x509.load_pem_x509_certificate(pem).public_key()
        else:
            key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise UsageError("the runtime policy's key is not a public key in PEM") from exc
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError("the runtime policy's key is not on an elliptic curve")
    return key


def _base64(text: object) -> bytes:
    """Standard base64, or the alphabet of URLs: an envelope may have either."""
    if isinstance(text, str) and text.isascii():
        for alphabet in (b"+/", b"-_"):
            try:
                return base64.b64decode(text, alphabet, validate=True)
            except (binascii.Error, ValueError):
                continue
    raise UsageError("the runtime policy's envelope has a field that is not base64")
