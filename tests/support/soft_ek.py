"""A software EK, its certificate from a vendor made here, and credential activation computed without a
TPM: what a host can do that has none, and what passes a registrar all the same.

Source of the credential's protection: TPM 2.0 Library Part 1, section 24 (and KDFa, 11.4.10.2).
"""

from __future__ import annotations

import base64
import hmac as hmac_module
import json
import secrets
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256, sha384

from cryptography import x509
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier

from provider_proxy.evidence.tpm_writer import encode_ek
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.ek_chain import EK_PURPOSE

MAGIC = struct.pack(">II", 0xBADCC0DE, 1)  # tpm2-tools' header of a credential
FOREVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
START = datetime(2020, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 6, 1, tzinfo=UTC)
OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=b"IDENTITY\0")
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@cache
def rsa_ek(number: int = 0) -> rsa.RSAPrivateKey:
    """An RSA-2048 key; made once a run, for making one is slow."""
    return rsa.generate_private_key(65537, 2048)


# --- certificates -----------------------------------------------------------------------------------


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def tpm_san() -> x509.SubjectAlternativeName:
    """Manufacturer, model and version as a directory name, as in every EK certificate."""
    values = {"2.23.133.2.1": "id:49465800", "2.23.133.2.2": "SLB", "2.23.133.2.3": "id:13"}
    attributes = [x509.NameAttribute(ObjectIdentifier(k), v) for k, v in values.items()]
    return x509.SubjectAlternativeName([x509.DirectoryName(x509.Name(attributes))])


@dataclass
class Authority:
    """A CA and its key; `parent` None for a root."""

    text: str
    parent: Authority | None = None
    pathlen: int | None = None
    key: Key = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    is_ca: bool | None = True
    may_sign: bool | None = True
    ends: datetime = datetime(2049, 1, 1, tzinfo=UTC)
    starts: datetime = START
    purposes: tuple[ObjectIdentifier, ...] = ()
    critical: tuple[x509.ExtensionType, ...] = ()
    others: tuple[x509.ExtensionType, ...] = ()
    subject: x509.Name | None = None

    def __post_init__(self) -> None:
        self.subject = self.subject or name(self.text)
        builder = _builder(self.subject, self.key, self.starts, self.ends)
        if self.is_ca is not None:
            pathlen = self.pathlen if self.is_ca else None
            constraints = x509.BasicConstraints(ca=self.is_ca, path_length=pathlen)
            builder = builder.add_extension(constraints, critical=True)
        if self.may_sign is not None:
            usage = key_usage(key_cert_sign=self.may_sign, crl_sign=True)
            builder = builder.add_extension(usage, critical=True)
        if self.purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.purposes), critical=False)
        for extension in self.critical:
            builder = builder.add_extension(extension, critical=True)
        for extension in self.others:
            builder = builder.add_extension(extension, critical=False)
        issuer = self.parent or self
        assert issuer.subject is not None
        self.certificate = builder.issuer_name(issuer.subject).sign(issuer.key, hashes.SHA256())

    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


def key_usage(**bits: bool) -> x509.KeyUsage:
    names = [
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    ]
    return x509.KeyUsage(**{bit: bits.get(bit, False) for bit in names})


def _builder(
    subject: x509.Name, key: Key, starts: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts.replace(tzinfo=None))
        .not_valid_after(ends.replace(tzinfo=None))
    )


def ek_certificate(
    authority: Authority,
    key: Key,
    *,
    purposes: tuple[ObjectIdentifier, ...] = (EK_PURPOSE,),
    is_ca: bool = False,
    usage: x509.KeyUsage | None = None,
    starts: datetime = START,
    ends: datetime = FOREVER,
    critical: tuple[x509.ExtensionType, ...] = (),
    digest: hashes.SHA224 | hashes.SHA256 | hashes.SHA384 | None = None,
    san: x509.SubjectAlternativeName | None = None,
) -> bytes:
    """DER of an EK certificate as vendors make them: empty subject, critical SAN, no end."""
    builder = _builder(x509.Name([]), key, starts, ends)
    builder = builder.issuer_name(authority.certificate.subject)
    builder = builder.add_extension(
        x509.BasicConstraints(ca=is_ca, path_length=None), critical=True
    )
    builder = builder.add_extension(san or tpm_san(), critical=True)
    default = {"key_encipherment" if isinstance(key, rsa.RSAPrivateKey) else "key_agreement": True}
    builder = builder.add_extension(usage or key_usage(**default), critical=True)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    for extension in critical:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(authority.key, digest or hashes.SHA256()).public_bytes(Encoding.DER)


# --- credential activation --------------------------------------------------------------------------


def kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa with SHA-256 and one block."""
    text = struct.pack(">I", 1) + label + b"\0" + context + struct.pack(">I", bits)
    return hmac_module.new(key, text, sha256).digest()[: bits // 8]


def tpm2b(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def make_credential(ek: rsa.RSAPublicKey, ak_name: bytes, secret: bytes) -> bytes:
    """What a registrar does: a blob that only the EK's holder opens."""
    seed = secrets.token_bytes(32)
    cipher = Cipher(algorithms.AES(kdfa(seed, b"STORAGE", ak_name, 128)), CFB(bytes(16)))
    encrypted = cipher.encryptor().update(tpm2b(secret))
    integrity = kdfa(seed, b"INTEGRITY", b"", 256)
    tag = hmac_module.new(integrity, encrypted + ak_name, sha256).digest()
    return MAGIC + tpm2b(tpm2b(tag) + encrypted) + tpm2b(ek.encrypt(seed, OAEP))


def activate(ek: rsa.RSAPrivateKey, ak_name: bytes, blob: bytes) -> bytes:
    """TPM2_ActivateCredential without a TPM: with the EK in software one can name any AK."""
    assert blob.startswith(MAGIC)
    size = struct.unpack_from(">H", blob, 8)[0]
    credential, encrypted_seed = blob[10 : 10 + size], blob[12 + size :]
    seed = ek.decrypt(encrypted_seed, OAEP)
    tag_size = struct.unpack_from(">H", credential)[0]
    tag, encrypted = credential[2 : 2 + tag_size], credential[2 + tag_size :]
    integrity = kdfa(seed, b"INTEGRITY", b"", 256)
    assert tag == hmac_module.new(integrity, encrypted + ak_name, sha256).digest()
    cipher = Cipher(algorithms.AES(kdfa(seed, b"STORAGE", ak_name, 128)), CFB(bytes(16)))
    return cipher.decryptor().update(encrypted)[2:]


def auth_tag(secret: bytes, agent_id: str) -> str:
    key = base64.b64encode(secret)
    return hmac_module.new(key, agent_id.encode(), sha384).hexdigest()


# --- a host -----------------------------------------------------------------------------------------


@dataclass
class SoftHost:
    """A host whose EK is in software."""

    tpm: SoftTpm = field(default_factory=SoftTpm)
    ek: rsa.RSAPrivateKey = field(default_factory=rsa_ek)
    ek_cert: bytes | None = None
    ak_public: bytes = b""
    ak_name: bytes = b""

    def __post_init__(self) -> None:
        self.ak_public = self.ak_public or self.tpm.ak_public
        area = self.ak_public[2:]
        self.ak_name = b"\x00\x0b" + sha256(area).digest()
        self.ek_public = encode_ek(self.ek.public_key())

    def body(self) -> bytes:
        """What an agent posts."""
        values = {
            "ek_tpm": base64.b64encode(self.ek_public).decode(),
            "ekcert": None if self.ek_cert is None else base64.b64encode(self.ek_cert).decode(),
            "aik_tpm": base64.b64encode(self.ak_public).decode(),
            "mtls_cert": None,
            "ip": "127.0.0.1",
            "port": 9002,
        }
        return json.dumps(values).encode()

    def answer(self, blob: bytes, agent_id: str) -> str:
        """The auth_tag for a registrar's challenge."""
        return auth_tag(activate(self.ek, self.ak_name, blob), agent_id)


DAY = timedelta(days=1)
