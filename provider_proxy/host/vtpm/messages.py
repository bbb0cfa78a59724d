"""Messages between provider-proxy-ekhook and the daemon: one line of JSON each way, parsed strictly.

The bytes come from processes of other users: every field has a form and a bound, and unknown keys
are refused. Uses neither sockets nor the registry.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Mapping

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from provider_proxy.errors import EvidenceFormatError, VtpmError
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.host.vtpm.requests import MAX_VMID_CHARS, CertificateRequest, EkPublicKey

VERSION = 1
MAX_LINE_BYTES = 8 * 1024  # an RSA-4096 modulus in hex, a VM's name, and room
MAX_WORD_CHARS = 64
MAX_NUMBER = 2**32 - 1
MAX_ERROR_CHARS = 500
RSA_EXPONENT = 65537  # swtpm_setup passes the modulus only; its EKs always have this exponent
RSA_BITS = (2048, 3072, 4096)
CURVES: Mapping[str, ec.EllipticCurve] = {"secp256r1": ec.SECP256R1(), "secp384r1": ec.SECP384R1()}
_HEX_RE = re.compile(r"[0-9a-f]{1,1024}")
_COMMON = frozenset({"version", "op"})
_CERTIFY = frozenset(
    {
        *("kind", "key", "vmid", "spec_family", "spec_level", "spec_revision"),
        *("manufacturer", "model", "tpm_version"),
    }
)


def parse_message(line: bytes) -> CertificateRequest:
    """Read a hook's line.

    Raises:
        VtpmError: it is not such a message.
    """
    try:
        values = parse_json_object(line, "message")
        fields = Fields(values, "message")
        if fields.integer("version", 100) != VERSION:
            raise VtpmError(
                f"the message is not of version {VERSION}; use the hook of this release"
            )
        op = fields.text("op", MAX_WORD_CHARS)
        if op == "certify":
            _only(values, _COMMON | _CERTIFY)
            return _certificate_request(fields)
    except EvidenceFormatError as exc:
        raise VtpmError(str(exc)) from exc
    raise VtpmError('message.op is not "certify"')


def _only(values: Mapping[str, object], known: frozenset[str]) -> None:
    if not set(values) <= known:
        raise VtpmError("the message has an unknown key")


def _certificate_request(fields: Fields) -> CertificateRequest:
    kind = fields.text("kind", MAX_WORD_CHARS)
    if kind not in ("ek", "platform"):
        raise VtpmError('message.kind is neither "ek" nor "platform"')
    vmid = fields.text("vmid", MAX_VMID_CHARS)
    try:
        return CertificateRequest(
            kind="ek" if kind == "ek" else "platform",
            public_key=_public_key(fields.fields("key")),
            vm=_vm(vmid.rpartition(":")[2].lower()),
            vmid=vmid,
            spec_family=fields.text("spec_family", MAX_WORD_CHARS),
            spec_level=fields.integer("spec_level", MAX_NUMBER),
            spec_revision=fields.integer("spec_revision", MAX_NUMBER),
            manufacturer=fields.text("manufacturer", MAX_WORD_CHARS),
            model=fields.text("model", MAX_WORD_CHARS),
            version=fields.text("tpm_version", MAX_WORD_CHARS),
        )
    except ValueError as exc:
        raise VtpmError(f"message: {exc}") from exc


def _vm(text: str) -> uuid.UUID:
    try:
        value = uuid.UUID(text)
    except ValueError:
        raise VtpmError("the VM's UUID is not a valid UUID") from None
    if str(value) != text:
        raise VtpmError("the VM's UUID is not in lower case with hyphens")
    return value


def _public_key(fields: Fields) -> EkPublicKey:
    kind = fields.text("type", MAX_WORD_CHARS)
    try:
        if kind == "rsa":
            modulus = _integer(fields, "modulus")
            if modulus.bit_length() not in RSA_BITS:
                raise VtpmError("the EK's modulus must have 2048, 3072 or 4096 bits")
            return rsa.RSAPublicNumbers(RSA_EXPONENT, modulus).public_key()
        if kind == "ecc":
            curve = CURVES.get(fields.text("curve", MAX_WORD_CHARS))
            if curve is None:
                raise VtpmError("the EK's curve is neither P-256 nor P-384")
            x, y = _integer(fields, "x"), _integer(fields, "y")
            if max(x.bit_length(), y.bit_length()) > curve.key_size:
                raise VtpmError("the EK's point is too long for its curve")
            key = ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
            numbers = key.public_numbers()
            if (numbers.x, numbers.y) != (x, y):  # reduced by the library: two names for one key
                raise VtpmError("a coordinate of the EK is not reduced modulo the field's prime")
            return key
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise VtpmError("the EK is not a valid public key") from exc
    raise VtpmError("the EK is neither RSA nor ECC")


def _integer(fields: Fields, key: str) -> int:
    text = fields.text(key, 1024)
    if not _HEX_RE.fullmatch(text):
        raise VtpmError(f"the EK's {key} is not hex")
    return int(text, 16)


def encode_good(certificate: bytes | None = None) -> bytes:
    """The EK was registered; with a certificate where the hook is to write one."""
    values: dict[str, object] = {"ok": True}
    if certificate is not None:
        values["certificate"] = base64.b64encode(certificate).decode("ascii")
    return json.dumps(values).encode("ascii") + b"\n"


def encode_error(text: str) -> bytes:
    """The EK was not registered; the text is for libvirt's log."""
    return json.dumps({"ok": False, "error": text[:MAX_ERROR_CHARS]}).encode("ascii") + b"\n"
