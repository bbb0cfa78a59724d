"""The bridge's own keys: software keys, and what is made from them once.

Keylime needs from an agent an AK that signs quotes, an EK with a certificate that opens the registrar's
credential, a key for payloads (NK), and a TLS certificate. A TPM's restricted AK refuses to sign a quote
that it did not take, so these are software keys, in one file that only its owner can read. The AK's name
shows that it is a bridge's (`tpm_keys.BRIDGE_POLICY`). The CA that certifies the EK signs only that
certificate, and its key is never stored; nor is NK's, so no payload can be opened here.
Source: TCG EK Credential Profile 2.5 (certificate); TPM 2.0 Part 1, section 24 (credentials).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import ssl
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.x509.oid import NameOID, ObjectIdentifier

from provider_proxy.common.files import is_there, read_secret, write_private
from provider_proxy.common.tls import TlsFiles, server_context, show_pem
from provider_proxy.errors import EvidenceFormatError, HostError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.tpm_keys import BRIDGE_POLICY, SIGN, USER_WITH_AUTH
from provider_proxy.evidence.tpm_reader import Reader
from provider_proxy.evidence.tpm_writer import encode_ek, encode_public

MAX_KEYS_BYTES = 32 * 1024  # about 9 kB
RSA_BITS = 2048  # what Keylime's tenant and registrar accept by default
NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280, 4.1.2.5: no date to expire at
BACKDATED = timedelta(minutes=5)  # for clocks that are behind this one
TPM_MANUFACTURER, TPM_MODEL, TPM_VERSION = "2.23.133.2.1", "2.23.133.2.2", "2.23.133.2.3"
EK_PURPOSE = "2.23.133.8.1"
KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
_PEM_RE = re.compile(
    rb"-----BEGIN ([A-Z ]{1,30})-----\n[A-Za-z0-9+/=\n]{1,6000}\n-----END \1-----\n"
)
_PARTS = (
    *(b"PRIVATE KEY", b"CERTIFICATE"),  # TLS, first: OpenSSL reads the first of each
    *(b"PRIVATE KEY", b"PRIVATE KEY", b"CERTIFICATE", b"CERTIFICATE", b"PUBLIC KEY"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeKeys:
    """One set for all hosts of a bridge.

    Attributes:
        ak_public, ek_public: TPM2B_PUBLIC.
        ak_name: TPMT name of the AK, and its qualified name in quotes.
        ek_cert: DER.
        ek_ca: PEM, for the tenant's `tpm_cert_store`.
        nk_pem: PEM text of the public key for payloads, whose private part is not kept.
        tls_cert: PEM text.
        tls_pem: private key and certificate of TLS, PEM. Secret.
    """

    ak: rsa.RSAPrivateKey
    ek: rsa.RSAPrivateKey
    ak_public: bytes
    ek_public: bytes
    ak_name: bytes
    ek_cert: bytes
    ek_ca: bytes
    nk_pem: str
    tls_cert: str
    tls_pem: bytes

    def sign(self, data: bytes) -> bytes:
        """RSASSA with SHA-256."""
        return self.ak.sign(data, padding.PKCS1v15(), hashes.SHA256())

    async def activate_credential(self, credential: bytes, secret: bytes) -> bytes:
        """The secret that a registrar wrapped for these keys; `TpmIdentity` of `trust.registration`.

        Args:
            credential: TPM2B_ID_OBJECT, untrusted.
            secret: TPM2B_ENCRYPTED_SECRET, untrusted.

        Raises:
            EvidenceFormatError: it is not for these keys.
        """
        return activate(self.ek, self.ak_name, credential, secret)

    @property
    def identity(self) -> BridgeKeys:
        """The keys, as `trust.registration` needs them."""
        return self

    def server_context(self, client_ca: Path) -> ssl.SSLContext:
        """TLS for the agents' ports: a client needs a certificate of `client_ca`.

        Raises:
            HostError: that file cannot be used.
        """
        context = server_context(TlsFiles(ca=client_ca, names=("bridge.client_ca", "", "")))
        context.num_tickets = 0  # Keylime's verifier never uses one
        show_pem(context, self.tls_pem)
        return context


def activate(ek: rsa.RSAPrivateKey, ak_name: bytes, credential: bytes, secret: bytes) -> bytes:
    """TPM2_ActivateCredential for a software EK of template L-1.

    Raises:
        EvidenceFormatError: it is not for these keys.
    """
    wrong = EvidenceFormatError("the challenge is not for these keys")
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=b"IDENTITY\0")
    try:
        seed = ek.decrypt(secret[2:], oaep)
    except ValueError as exc:
        raise wrong from exc
    read = Reader(credential[2:], "the challenge")
    tag = read.sized(64)
    encrypted = read.take(read.left)
    expected = hmac.digest(_kdfa(seed, b"INTEGRITY", b"", 256), encrypted + ak_name, "sha256")
    if not hmac.compare_digest(tag, expected):
        raise wrong
    cipher = Cipher(algorithms.AES(_kdfa(seed, b"STORAGE", ak_name, 128)), CFB(bytes(16)))
    plain = Reader(cipher.decryptor().update(encrypted), "the challenge")
    return plain.sized(64)


def _kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa with SHA-256, one block (TPM 2.0 Part 1, section 11.4.10.2)."""
    text = struct.pack(">I", 1) + label + b"\0" + context + struct.pack(">I", bits)
    return hmac.digest(key, text, "sha256")[: bits // 8]


def make_keys(ip: str) -> bytes:
    """A new set, as the text of its file.

    Args:
        ip: at which the agents answer; goes into the TLS certificate.
    """
    tls = ec.generate_private_key(ec.SECP256R1())  # half the cost of an RSA handshake
    ak, ek, nk, ca = (rsa.generate_private_key(65537, RSA_BITS) for _ in range(4))
    # Keylime finds a CA by its name: two bridges of a tenant must not use the same name.
    mark = x509.SubjectKeyIdentifier.from_public_key(ca.public_key()).digest.hex()[:16]
    label = f"provider-proxy bridge EK CA {mark}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)])
    ca_cert = _certificate(
        subject=name, issuer=name, key=ca.public_key(), signer=ca, usage="key_cert_sign"
    )
    ek_cert = _certificate(
        subject=x509.Name([]),
        issuer=name,
        key=ek.public_key(),
        signer=ca,
        usage="key_encipherment",
        extensions=(
            (x509.SubjectAlternativeName([x509.DirectoryName(_tpm_names())]), True),
            (x509.ExtendedKeyUsage([ObjectIdentifier(EK_PURPOSE)]), False),
        ),
    )
    bridge = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "provider-proxy bridge")])
    tls_cert = _certificate(
        subject=bridge,
        issuer=bridge,
        key=tls.public_key(),
        signer=tls,
        usage="digital_signature",
        extensions=(
            (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(ip))]), False),
        ),
    )
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    return b"".join(
        (
            *(_private(tls), tls_cert.public_bytes(PEM)),
            *(_private(ak), _private(ek)),
            *(ek_cert.public_bytes(PEM), ca_cert.public_bytes(PEM)),
            nk.public_key().public_bytes(PEM, public),
        )
    )


def _private(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _tpm_names() -> x509.Name:
    """Of the EK certificate: a maker that no TPM has, and the model "provider-proxy bridge"."""
    return x509.Name(
        [
            x509.NameAttribute(ObjectIdentifier(TPM_MANUFACTURER), "id:00000000"),
            x509.NameAttribute(ObjectIdentifier(TPM_MODEL), "provider-proxy bridge, no TPM"),
            x509.NameAttribute(ObjectIdentifier(TPM_VERSION), "id:00000001"),
        ]
    )


def _certificate(
    *,
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    signer: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    usage: str,
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = (),
) -> x509.Certificate:
    uses = dict.fromkeys(KEY_USAGES, False)
    is_ca = usage == "key_cert_sign"
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - BACKDATED)
        .not_valid_after(NEVER)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), True)
        .add_extension(x509.KeyUsage(**(uses | {usage: True})), True)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA256())


def load_keys(path: Path, *, make_for: str | None) -> BridgeKeys:
    """The keys in a file.

    Args:
        make_for: the agents' IP address: if the file is missing, new keys are written to it; None for
            a file that must be there, a systemd credential for example.

    Raises:
        HostError: the file is missing, damaged, or others can read it.
    """
    if make_for is not None and not is_there(path):
        write_private(path, make_keys(make_for))
    return parse_keys(read_secret("bridge.keys", path, limit=MAX_KEYS_BYTES) + b"\n", path)


def parse_keys(data: bytes, path: Path) -> BridgeKeys:
    """Read what `make_keys` writes.

    Raises:
        HostError: anything else; the message names the file.
    """
    found = list(_PEM_RE.finditer(data))
    try:
        if tuple(match[1] for match in found) != _PARTS:
            raise ValueError("it does not have the expected parts")
        tls, tls_cert, ak_pem, ek_pem, ek_cert, ek_ca, nk = (match[0] for match in found)
        ak, ek = (serialization.load_pem_private_key(pem, None) for pem in (ak_pem, ek_pem))
        certificate = x509.load_pem_x509_certificate(ek_cert)
        if not isinstance(ak, rsa.RSAPrivateKey) or not isinstance(ek, rsa.RSAPrivateKey):
            raise ValueError("AK and EK must be RSA keys")  # noqa: TRY004  # of the file
        if certificate.public_key() != ek.public_key():
            raise ValueError("the certificate is for another EK")
        serialization.load_pem_public_key(nk)
    except ValueError as exc:
        raise HostError(
            f"bridge.keys: {path} is damaged ({exc}); restore it, or remove it to make new keys: "
            "the agents then get new ids, and your verifier must add them again"
        ) from exc
    ak_public = encode_public(ak.public_key(), SIGN | USER_WITH_AUTH, BRIDGE_POLICY)
    return BridgeKeys(
        ak=ak,
        ek=ek,
        ak_public=ak_public,
        ek_public=encode_ek(ek.public_key()),
        ak_name=HashAlg.SHA256.to_bytes(2, "big") + hashlib.sha256(ak_public[2:]).digest(),
        ek_cert=certificate.public_bytes(DER),
        ek_ca=ek_ca,
        nk_pem=nk.decode("ascii"),
        tls_cert=tls_cert.decode("ascii"),
        tls_pem=tls + tls_cert,
    )
