"""IMA lists for tests, made from the kernel's own rules with hashlib and struct: none of our code."""

from __future__ import annotations

import datetime
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding

from provider_proxy.evidence.model import HashAlg

GOOD = hashlib.sha256(b"good").hexdigest()
BAD = hashlib.sha256(b"bad").hexdigest()
HASH_NUMBERS = {"sha1": 2, "sha256": 4, "sha384": 5, "sha512": 6, "sha224": 7, "md5": 1}
_HASHES = {
    "sha1": hashes.SHA1(),
    "sha224": hashes.SHA224(),
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
    "md5": hashes.MD5(),
}

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Line:
    """A measurement, as text and as what is hashed."""

    text: str
    data: bytes
    violation: bool = False


def field(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def line(
    path: str | bytes = "/usr/bin/true",
    digest: str = GOOD,
    *,
    template: str = "ima-ng",
    more: str | None = None,
    violation: bool = False,
    shown: str | None = None,
    prefix: str = "sha256",
    hashed: str = "sha1",
    pcr: int = 10,
) -> Line:
    """One line.

    Args:
        more: a signature or a buffer, in hex.
        shown: the name as the text has it, where that is not what is hashed.
        hashed: the template hash's algorithm.
    """
    name = path if isinstance(path, bytes) else path.encode()
    value = bytes(len(digest) // 2).hex() if violation else digest
    if template == "ima":
        data = bytes.fromhex(value) + name.ljust(256, b"\0")
        text_of = value
    else:
        data = field(f"{prefix}:".encode() + b"\0" + bytes.fromhex(value)) + field(name + b"\0")
        text_of = f"{prefix}:{value}"
    if more is not None:
        data += field(bytes.fromhex(more))
    template_hash = hashlib.new(hashed, data).hexdigest()
    if violation:
        template_hash = bytes(len(template_hash) // 2).hex()
    text = f"{pcr:2} {template_hash} {template} {text_of} "
    text += shown if shown is not None else name.decode("utf-8", "backslashreplace")
    if more is not None:
        text += f" {more}"
    return Line(text, data, violation)


def extended(lines: Sequence[Line], algorithm: str = "sha256") -> bytes:
    """PCR 10 behind some lines; those of other PCRs are left out."""
    value = bytes(hashlib.new(algorithm).digest_size)
    for one in lines:
        if not one.text.startswith("10 "):
            continue
        new = b"\xff" * len(value) if one.violation else hashlib.new(algorithm, one.data).digest()
        value = hashlib.new(algorithm, value + new).digest()
    return value


def text(lines: Sequence[Line]) -> str:
    return "".join(one.text + "\n" for one in lines)


def key_id(key: PrivateKey) -> bytes:
    """The last four bytes of what a certificate has as its subject key identifier."""
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest[-4:]


def certificate(key: PrivateKey | None = None) -> tuple[PrivateKey, bytes]:
    """A key and its certificate, DER, as the kernel loads it into a keyring."""
    made = key or rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "files of a distribution")])
    begin = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(made.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(made.public_key()), False)
        .sign(made, hashes.SHA256())
    )
    return made, signed.public_bytes(Encoding.DER)


def signature(
    key: PrivateKey,
    digest: str,
    algorithm: str = "sha256",
    *,
    kind: int = 3,
    version: int = 2,
    id_: bytes | None = None,
) -> str:
    """A file's signature as `security.ima` has it, in hex."""
    prehashed = Prehashed(_HASHES[algorithm])
    if isinstance(key, rsa.RSAPrivateKey):
        value = key.sign(bytes.fromhex(digest), padding.PKCS1v15(), prehashed)
    else:
        value = key.sign(bytes.fromhex(digest), ec.ECDSA(prehashed))
    head = struct.pack(">BBB", kind, version, HASH_NUMBERS[algorithm]) + (id_ or key_id(key))
    return (head + struct.pack(">H", len(value)) + value).hex()


BUFFER = hashlib.sha256(b"\x00\xff").hexdigest()


def pcr10(lines: Sequence[Line], bank: HashAlg = HashAlg.SHA256) -> bytes:
    return extended(lines, bank.label)


HOST = [
    line("boot_aggregate"),
    line("/usr/lib/systemd/systemd"),
    line("/usr/bin/bash", template="ima-sig", more="030204deadbeef"),
    line("/usr/bin/env", template="ima-sig", more=""),
    line("/var/log/wtmp", violation=True),
    line(".builtin_trusted_keys", BUFFER, template="ima-buf", more="00ff"),
    line("/usr/bin/ls", template="ima-ngv2", prefix="ima:sha256"),
    *(line(f"/opt/{n}", hashlib.sha256(b"%d" % n).hexdigest()) for n in range(600)),
]
