"""Where a person finds what a chip does not carry: addresses of the key, or named in a certificate."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID as Oids
from soft_ek import Authority

from provider_proxy.host.tpm.ek_urls import certificate_url, issuer_urls
from provider_proxy.trust.ek_certificate import parse_certificate

RSA = rsa.RSAPublicNumbers(65537, (1 << 2047) + 1).public_key()
EC = ec.derive_private_key(1, ec.SECP256R1()).public_key()


def test_makers_that_have_a_server() -> None:
    """Computed apart, by the description in tpm2_getekcertificate(1)."""
    assert certificate_url("INTC", RSA) == (
        "https://ekop.intel.com/ekcertservice/mKbCY0l78I_zCWlUd7k4etGZcOZhC_YR4eK-nrYg91I%3D"
    )
    assert certificate_url("INTC", EC) == (
        "https://ekop.intel.com/ekcertservice/2HXbfe8jIjauxzjGsLs-gBQvXQ_Y9N8k_tbu9cu1DZ8%3D"
    )
    assert (
        certificate_url("AMD", RSA)
        == "https://ftpm.amd.com/pki/aia/28d00626b9a022b1bf5dfe505b0dc965"
    )
    assert (
        certificate_url("AMD", EC)
        == "https://ftpm.amd.com/pki/aia/c219640910f33a1bab03d226c217634c"
    )
    assert certificate_url("IFX", RSA) is None


def test_the_issuer_s_address() -> None:
    access = x509.AuthorityInformationAccess(
        [
            x509.AccessDescription(
                Oids.OCSP, x509.UniformResourceIdentifier("http://ocsp.example")
            ),
            x509.AccessDescription(
                Oids.CA_ISSUERS, x509.UniformResourceIdentifier("http://pki.example/ca.crt")
            ),
            x509.AccessDescription(Oids.CA_ISSUERS, x509.DNSName("pki.example")),
        ]
    )
    with_access = parse_certificate(Authority("a", others=(access,)).der())
    assert issuer_urls(with_access) == ("http://pki.example/ca.crt",)
    assert issuer_urls(parse_certificate(Authority("a").der())) == ()
