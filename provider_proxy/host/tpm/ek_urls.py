"""Where a person can fetch the certificates of a chip's EK. Nothing here opens a connection.

Intel's and AMD's older firmware TPMs have no certificate in them: the maker's server has it, under a name
derived from the key. Other certificates name the URL of their issuer's certificate.
Source: tpm2-tools, tpm2_getekcertificate(1); RFC 5280, section 4.2.2.1.
"""

from __future__ import annotations

import base64
from hashlib import sha256

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import AuthorityInformationAccessOID

from provider_proxy.evidence.tpm_keys import PublicKey
from provider_proxy.trust.ek_certificate import TpmCertificate

INTEL, AMD = "INTC", "AMD"
INTEL_SERVER = "https://ekop.intel.com/ekcertservice/"
AMD_SERVER = "https://ftpm.amd.com/pki/aia/"
AMD_NAME_BYTES = 16
AMD_RSA, AMD_ECC = bytes.fromhex("00002222"), bytes.fromhex("00004444")


def certificate_url(manufacturer: str, key: PublicKey) -> str | None:
    """The URL of an EK's certificate at its maker; None where the maker has no such server.

    Args:
        manufacturer: the TPM's vendor code, "INTC" for example.
    """
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        modulus = numbers.n.to_bytes(key.key_size // 8, "big")
        intel = modulus + numbers.e.to_bytes(3, "big")
        amd = AMD_RSA + numbers.e.to_bytes(4, "big") + modulus
    else:
        size = (key.key_size + 7) // 8
        point = key.public_numbers()
        intel = point.x.to_bytes(size, "big") + point.y.to_bytes(size, "big")
        amd = AMD_ECC + intel
    if manufacturer == INTEL:
        name = base64.urlsafe_b64encode(sha256(intel).digest()).decode("ascii")
        return INTEL_SERVER + name.replace("=", "%3D")
    if manufacturer == AMD:
        return AMD_SERVER + sha256(amd).digest()[:AMD_NAME_BYTES].hex()
    return None


def issuer_urls(certificate: TpmCertificate) -> tuple[str, ...]:
    """The URLs of a certificate's issuer, as the certificate names them."""
    try:
        access = certificate.parsed.extensions.get_extension_for_class(
            x509.AuthorityInformationAccess
        ).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(
        entry.access_location.value
        for entry in access
        if entry.access_method == AuthorityInformationAccessOID.CA_ISSUERS
        and isinstance(entry.access_location, x509.UniformResourceIdentifier)
    )
