"""X.509 for a host's vTPM CA: its own certificate, EK and platform certificates, before they are signed.

Builds values and signs nothing: `tbs_of` gives the bytes that the TPM is to sign, `signed` adds the
signature. So the TPM can sign asynchronously between the two, and its key need not be a private key
object of `cryptography`. No clock, no file: time and serial numbers are parameters.
Source: TCG EK Credential Profile 2.5, section 3, as swtpm_localca writes it.
"""

from __future__ import annotations

import datetime
import hashlib
import uuid
from typing import Any, Final, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from provider_proxy.evidence import der
from provider_proxy.evidence.vtpm_ca import (
    OID_CERTIFY,
    OID_DIRECTORY_ATTRIBUTES,
    OID_EKU,
    OID_SPECIFICATION,
    SAN_OIDS,
    key_usage,
)
from provider_proxy.host.vtpm.requests import CertificateRequest

SERIAL_BITS: Final = 159  # 20 octets that are positive: RFC 5280, section 4.1.2.2
WITHOUT_END: Final = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
MAX_COMMON_NAME: Final = 64  # ub-common-name, RFC 5280, appendix A.1; `cryptography` counts bytes
UUID_CHARS: Final = 36
PLATFORM: Final = ("provider-proxy", "QEMU", "1")  # manufacturer, model, version of the VM


def ca_subject(host_uuid: uuid.UUID, key: ec.EllipticCurvePublicKey) -> x509.Name:
    """A CA's name: unique for the host and for the key."""
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, f"vTPM CA of {host_uuid}"),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, hashlib.sha256(spki).hexdigest()[:32]),
        ]
    )


def ca_builder(
    key: ec.EllipticCurvePublicKey,
    *,
    host_uuid: uuid.UUID,
    not_before: datetime.datetime,
    serial: int,
    attest: bytes,
    signature: bytes,
    public_area: bytes,
) -> x509.CertificateBuilder:
    """The CA's certificate, self-issued.

    Args:
        attest, signature: TPMS_ATTEST and TPMT_SIGNATURE of TPM2_Certify by the host's AK.
        public_area: TPMT_PUBLIC of the key: TPM2B_PUBLIC without its size.
    """
    subject = ca_subject(host_uuid, key)
    statement = der.encode(
        der.SEQUENCE,
        *(der.encode(der.OCTET_STRING, part) for part in (attest, signature, public_area)),
    )
    return (
        _builder(subject, subject, not_before, serial)
        .public_key(key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.UnrecognizedExtension(OID_CERTIFY, statement), critical=False)
    )


def vtpm_builder(
    request: CertificateRequest,
    ca: x509.Certificate,
    *,
    not_before: datetime.datetime,
    serial: int,
) -> x509.CertificateBuilder:
    """An EK certificate, or a platform certificate, of a vTPM."""
    own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    values = PLATFORM
    if request.kind == "ek":
        values = (request.manufacturer, request.model, request.version)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name(request.vmid))])
    builder = (
        _builder(subject, ca.subject, not_before, serial)
        .public_key(request.public_key)
        .add_extension(x509.ExtendedKeyUsage([OID_EKU[request.kind]]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.DirectoryName(
                        x509.Name(
                            [
                                x509.NameAttribute(oid, value)
                                for oid, value in zip(SAN_OIDS[request.kind], values, strict=True)
                            ]
                        )
                    )
                ]
            ),
            critical=True,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False
        )
        .add_extension(key_usage(key=request.public_key), critical=True)
    )
    if request.kind == "ek":
        attributes = x509.UnrecognizedExtension(OID_DIRECTORY_ATTRIBUTES, _specification(request))
        builder = builder.add_extension(attributes, critical=False)
    return builder


def common_name(vmid: str) -> str:
    """A vmid, cut to the length of a common name; the UUID at its end always stays complete."""
    if len(vmid.encode("utf-8")) <= MAX_COMMON_NAME:
        return vmid
    name, _, vm = vmid.rpartition(":")
    cut = name.encode("utf-8")[: MAX_COMMON_NAME - UUID_CHARS - 1]
    return f"{cut.decode('utf-8', 'ignore')}:{vm}"


def _specification(request: CertificateRequest) -> bytes:
    """subjectDirectoryAttributes with tPMSpecification: {family, level, revision}."""
    return der.encode(
        der.SEQUENCE,
        der.encode(
            der.SEQUENCE,
            der.encode_oid(OID_SPECIFICATION),
            der.encode(
                der.SET,
                der.encode(
                    der.SEQUENCE,
                    der.encode(der.UTF8_STRING, request.spec_family.encode("utf-8")),
                    der.encode_integer(request.spec_level),
                    der.encode_integer(request.spec_revision),
                ),
            ),
        ),
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, not_before: datetime.datetime, serial: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(serial)
        .not_valid_before(not_before)
        .not_valid_after(WITHOUT_END)
    )


def tbs_of(builder: x509.CertificateBuilder) -> bytes:
    """The TBSCertificate: the bytes to sign with ECDSA and SHA-256."""
    key = _StandIn()
    builder.sign(key, hashes.SHA256())
    return key.seen


def signed(builder: x509.CertificateBuilder, signature: bytes) -> bytes:
    """The certificate, DER, with a signature over `tbs_of(builder)`.

    Args:
        signature: ECDSA-Sig-Value, DER.
    """
    return builder.sign(_StandIn(signature), hashes.SHA256()).public_bytes(Encoding.DER)


class _StandIn(ec.EllipticCurvePrivateKey):
    """Given to the builder as its private key: records the bytes to sign, returns the signature.

    The builder uses only the type of its key.
    """

    def __init__(self, signature: bytes = b"") -> None:
        self._signature = signature
        self.seen = b""

    def sign(self, data: Any, signature_algorithm: object) -> bytes:
        self.seen = bytes(data)
        return self._signature

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return _ANY_P256

    @property
    def curve(self) -> ec.EllipticCurve:
        return ec.SECP256R1()

    @property
    def key_size(self) -> int:
        return 256

    def exchange(self, algorithm: object, peer_public_key: object) -> NoReturn:
        raise NotImplementedError

    def private_numbers(self) -> NoReturn:
        raise NotImplementedError

    def private_bytes(self, encoding: object, format: object, encryption: object) -> NoReturn:
        raise NotImplementedError

    def __copy__(self) -> NoReturn:
        raise NotImplementedError

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise NotImplementedError


_ANY_P256 = ec.derive_private_key(1, ec.SECP256R1()).public_key()  # only its type is used
