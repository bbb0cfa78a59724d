"""The tenant's check of a host's vTPM CA: its key is in the host's TPM, and it signed this certificate.

The CA's certificate carries a TPM2_Certify of its key by the host's AK. A tenant that trusts that AK can
thus trust the CA without another source; one that puts the certificate into Keylime's `tpm_cert_store`
unchecked trusts the sender. A certificate only says how the vTPM was made: on that host a process of
the swtpm user asked for it. Only the link says that the EK is in the VM's vTPM, and where the VM runs
now.
No clock is read: CA and vTPM certificates never expire, as the TCG writes it (99991231235959Z).
Sources: TCG EK Credential Profile 2.5, section 3; TPM 2.0 Library Part 2, 10.12.3 (TPMS_CERTIFY_INFO).
"""

from __future__ import annotations

import hmac
import uuid
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, NameOID, ObjectIdentifier

from provider_proxy.errors import (
    EkCertificateError,
    EvidenceFormatError,
    LinkError,
    SignatureError,
    UntrustedCaError,
)
from provider_proxy.evidence import attestation, der, tpm_keys
from provider_proxy.evidence.model import AkName, AttestationKey, HashAlg
from provider_proxy.evidence.tpm_keys import PublicKey
from provider_proxy.evidence.tpm_reader import Reader
from provider_proxy.evidence.vtpm_link import spki_digest

Kind = Literal["ek", "platform"]

MAX_CA_BYTES = 4096  # ours have 800
MAX_CERTIFICATE_BYTES = 2048  # what swtpm_setup writes into NV
TPM_ST_ATTEST_CERTIFY = 0x8017
MAX_TPM2B_BYTES = 128
LAST_YEAR = 9999  # RFC 5280, section 4.1.2.5: no well-defined expiration
CA_QUALIFYING = sha256(b"provider-proxy/vtpm-ca/1").digest()
"""What TPM2_Certify is taken over: says what the statement is for. 32 bytes."""

OID_CERTIFY = ObjectIdentifier("2.23.133.20.1")
OID_EKU: dict[Kind, ObjectIdentifier] = {
    "ek": ObjectIdentifier("2.23.133.8.1"),
    "platform": ObjectIdentifier("2.23.133.8.2"),
}
OID_SPECIFICATION = "2.23.133.2.16"
OID_DIRECTORY_ATTRIBUTES = ObjectIdentifier("2.5.29.9")
SAN_OIDS: dict[Kind, tuple[ObjectIdentifier, ...]] = {
    # tpmManufacturer, tpmModel, tpmVersion
    "ek": tuple(ObjectIdentifier(f"2.23.133.2.{n}") for n in (1, 2, 3)),
    # platformManufacturerStr, platformModel, platformVersion
    "platform": tuple(ObjectIdentifier(f"2.23.133.5.1.{n}") for n in (1, 4, 5)),
}
EXTENSIONS: dict[Kind, frozenset[ObjectIdentifier]] = {
    "ek": frozenset(
        (
            ExtensionOID.KEY_USAGE,
            ExtensionOID.BASIC_CONSTRAINTS,
            ExtensionOID.EXTENDED_KEY_USAGE,
            ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
            ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
            OID_DIRECTORY_ATTRIBUTES,
        )
    )
}
EXTENSIONS["platform"] = EXTENSIONS["ek"] - {OID_DIRECTORY_ATTRIBUTES}

CA_MUST_HAVE = {
    "fixedTPM": tpm_keys.FIXED_TPM,
    "fixedParent": tpm_keys.FIXED_PARENT,
    "sensitiveDataOrigin": tpm_keys.SENSITIVE_DATA_ORIGIN,
    "sign": tpm_keys.SIGN,
}


def key_usage(*, cert_sign: bool = False, key: PublicKey | None = None) -> x509.KeyUsage:
    """The KeyUsage of a CA, or of an EK: an RSA one decrypts, an EC one agrees."""
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=isinstance(key, rsa.RSAPublicKey),
        data_encipherment=False,
        key_agreement=isinstance(key, ec.EllipticCurvePublicKey),
        key_cert_sign=cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmCa:
    """A host's CA whose key was proven to be in the host's TPM. Made by `check_ca_certificate`.

    Attributes:
        name: the CA key's TPM name, as the AK certified it.
    """

    certificate: x509.Certificate
    public_key: ec.EllipticCurvePublicKey
    name: AkName

    @property
    def pem(self) -> bytes:
        """For Keylime's `tpm_cert_store`."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def subject(self) -> str:
        """RFC 4514, for people."""
        return self.certificate.subject.rfc4514_string({NameOID.SERIAL_NUMBER: "serialNumber"})


def check_ca_certificate(data: bytes, ak: AttestationKey) -> VtpmCa:
    """Check a CA's certificate under a trusted AK.

    Args:
        data: DER, untrusted.

    Raises:
        UntrustedCaError: not a certificate of the profile, or its key is not one that this AK certified,
            fixed in the AK's TPM and made for signing.
    """
    with _Refusing(UntrustedCaError, "the CA's certificate") as read:
        cert = read.certificate(data, MAX_CA_BYTES)
        key = cert.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise UntrustedCaError("the CA's key is not a P-256 key")
        public = _check_certified(cert, ak)
        if spki_digest(key) != spki_digest(public.public_key):
            raise UntrustedCaError("the CA's certificate is about another key than was certified")
        read.signed_by(cert, cert)
        read.endless(cert)
        read.extension(cert, x509.BasicConstraints(ca=True, path_length=0), critical=True)
        read.extension(cert, key_usage(cert_sign=True), critical=True)
        read.extension(cert, x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        return VtpmCa(certificate=cert, public_key=key, name=public.name)


def _check_certified(cert: x509.Certificate, ak: AttestationKey) -> tpm_keys.TpmPublic:
    """The key that the certificate's TPM2_Certify is about, its attributes checked."""
    extension = cert.extensions.get_extension_for_oid(OID_CERTIFY).value
    assert isinstance(extension, x509.UnrecognizedExtension)
    attest, signature, area = der.parse_sequence(
        extension.value, (der.OCTET_STRING,) * 3, "the CA's TPM2_Certify"
    )
    if len(area) > tpm_keys.MAX_PUBLIC_BYTES:
        raise UntrustedCaError("the CA key's public area is too long")
    public = tpm_keys.parse_public(len(area).to_bytes(2, "big") + area)
    name, qualifying = parse_certify(attest)
    if not hmac.compare_digest(name, public.name):
        raise UntrustedCaError("the AK has certified another key")
    if not hmac.compare_digest(qualifying, CA_QUALIFYING):
        raise UntrustedCaError("the AK has certified the key for another purpose")
    try:
        attestation.check_signature(attest, attestation.parse_signature(signature), ak)
    except SignatureError as exc:
        raise UntrustedCaError("the trusted AK has not certified the CA's key") from exc
    missing = [what for what, bit in CA_MUST_HAVE.items() if not public.attributes & bit]
    if missing:
        raise UntrustedCaError("the CA's key is not " + ", not ".join(missing))
    if public.attributes & (tpm_keys.DECRYPT | tpm_keys.RESTRICTED):
        raise UntrustedCaError("the CA's key may decrypt, or is an attestation key")
    scheme = (public.scheme, public.scheme_hash)
    if scheme != (tpm_keys.TPM_ALG_ECDSA, HashAlg.SHA256):
        raise UntrustedCaError("the CA's key does not sign with ECDSA and SHA-256")
    return public


def parse_certify(data: bytes) -> tuple[bytes, bytes]:
    """Read a TPMS_ATTEST of TPM2_Certify.

    Returns:
        The certified key's name, and the qualifyingData.

    Raises:
        EvidenceFormatError: any other structure.
    """
    if len(data) > attestation.MAX_ATTEST_BYTES:
        raise EvidenceFormatError("TPMS_ATTEST is too long")
    read = Reader(data, "TPMS_ATTEST")
    if (read.uint(4), read.uint(2)) != (attestation.TPM_GENERATED, TPM_ST_ATTEST_CERTIFY):
        raise EvidenceFormatError("the signed bytes are not a TPM2_Certify (magic or type)")
    read.sized(MAX_TPM2B_BYTES)  # qualifiedSigner
    qualifying = read.sized(MAX_TPM2B_BYTES)
    read.take(8 + 4 + 4 + 1 + 8)  # clockInfo, firmwareVersion
    name = read.sized(MAX_TPM2B_BYTES)
    read.sized(MAX_TPM2B_BYTES)  # qualifiedName: of the hierarchy
    read.end()
    return name, qualifying


def check_vtpm_certificate(
    data: bytes, ca: VtpmCa, *, key: PublicKey, vm: uuid.UUID, kind: Kind = "ek"
) -> x509.Certificate:
    """Check an EK certificate, or a platform certificate, of a vTPM.

    Args:
        data: DER, untrusted.
        ca: the host's, checked.
        key: the EK, as the tenant's registrar activated it.
        vm: the VM that was ordered.

    Raises:
        EkCertificateError: of another CA, about another key or VM, or not as the TCG's profile says.
    """
    with _Refusing(EkCertificateError, "the certificate") as read:
        cert = read.certificate(data, MAX_CERTIFICATE_BYTES)
        read.signed_by(cert, ca.certificate)
        certified = cert.public_key()
        if not isinstance(certified, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise EkCertificateError("the certificate is about a key of another kind")
        if spki_digest(certified) != spki_digest(key):
            raise EkCertificateError("the certificate is about another EK")
        names = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if len(names) != 1 or str(names[0].value).rpartition(":")[2].lower() != str(vm):
            raise EkCertificateError("the certificate is about another VM")
        read.endless(cert)
        if {extension.oid for extension in cert.extensions} != EXTENSIONS[kind]:
            raise EkCertificateError("the certificate does not have the profile's extensions")
        read.extension(cert, x509.BasicConstraints(ca=False, path_length=None), critical=True)
        read.extension(cert, key_usage(key=key), critical=True)
        read.extension(cert, x509.ExtendedKeyUsage([OID_EKU[kind]]), critical=False)
        own = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
        read.extension(cert, issuer, critical=False)
        _check_alternative_name(cert, kind)
        return cert


def _check_alternative_name(cert: x509.Certificate, kind: Kind) -> None:
    found = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    names = list(found.value)
    if not found.critical or len(names) != 1 or not isinstance(names[0], x509.DirectoryName):
        raise EkCertificateError(
            "the certificate's alternative name is not one critical directoryName"
        )
    rdns = [[attribute.oid for attribute in rdn] for rdn in names[0].value.rdns]
    if rdns != [[oid] for oid in SAN_OIDS[kind]]:
        raise EkCertificateError("the certificate does not name manufacturer, model and version")


class _Refusing:
    """Turns everything that reading hostile X.509 may raise into one class of refusal."""

    def __init__(self, error: type[LinkError], what: str) -> None:
        self._error = error
        self._what = what

    def __enter__(self) -> _Refusing:
        return self

    def __exit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
        if isinstance(
            exc,
            ValueError
            | TypeError
            | EvidenceFormatError
            | SignatureError
            | UnsupportedAlgorithm
            | x509.ExtensionNotFound
            | x509.DuplicateExtension
            | x509.UnsupportedGeneralNameType
            | x509.InvalidVersion,
        ):
            raise self._error(f"{self._what} does not follow the profile: {exc}") from exc

    def certificate(self, data: bytes, limit: int) -> x509.Certificate:
        if len(data) > limit:
            raise self._error(f"{self._what} is longer than {limit} bytes")
        return x509.load_der_x509_certificate(data)

    def signed_by(self, cert: x509.Certificate, issuer: x509.Certificate) -> None:
        if not isinstance(cert.signature_hash_algorithm, hashes.SHA256):
            raise self._error(f"{self._what} is not signed with SHA-256")
        try:
            cert.verify_directly_issued_by(issuer)
        except (InvalidSignature, ValueError, TypeError) as exc:
            raise self._error(f"{self._what} was not signed by the host's CA") from exc

    def endless(self, cert: x509.Certificate) -> None:
        end = cert.not_valid_after_utc
        if (end.year, end.month, end.day, end.hour) != (LAST_YEAR, 12, 31, 23):
            raise self._error(
                f"{self._what} has an expiry date; the profile demands none (99991231235959Z)"
            )

    def extension(
        self, cert: x509.Certificate, wanted: x509.ExtensionType, *, critical: bool
    ) -> None:
        found = cert.extensions.get_extension_for_oid(wanted.oid)
        if found.value != wanted or found.critical != critical:
            raise self._error(f"{self._what} does not have the profile's {wanted.oid._name}")
