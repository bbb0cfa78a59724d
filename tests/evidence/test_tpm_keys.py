"""What may be called an AK; the vectors in ak.json have attributes, schemes and sizes one by one."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from evidence_factory import ec_key, rsa_key
from vectors import ak_cases

from provider_proxy.errors import EvidenceFormatError, UntrustedAkError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.tpm_keys import insecure_ak_from_pem, parse_ak, parse_public
from provider_proxy.evidence.tpm_writer import AK_ATTRIBUTES, encode_public

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


def pem_of(key: PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_public_is_read_field_by_field() -> None:
    public = parse_public(ak_cases.ecc_public())
    assert public.attributes == ak_cases.AK
    assert public.scheme == 0x18
    assert public.scheme_hash == HashAlg.SHA256
    assert not public.has_symmetric
    assert public.public_key == ec_key().public_key()
    assert parse_public(ak_cases.rsa_public()).public_key == rsa_key().public_key()


def test_an_endorsement_key_is_read_and_is_no_ak() -> None:
    for make in (ak_cases.ecc_public, ak_cases.rsa_public):
        ek = make(
            scheme=ak_cases.NO_SYMMETRIC,  # TPM_ALG_NULL stands for no scheme as well
            symmetric=ak_cases.AES_128_CFB,
            attributes=0x000300B2,
            policy=bytes(32),
        )
        public = parse_public(ek)
        assert public.has_symmetric
        assert public.scheme_hash == 0
        with pytest.raises(UntrustedAkError):
            parse_ak(ek)


def test_the_name_is_the_digest_of_the_public_area() -> None:
    public = ak_cases.rsa_public()
    assert parse_ak(public).name == b"\x00\x0b" + HashAlg.SHA256.digest(public[2:])
    # Attributes are part of it: a key with others has another name.
    assert (
        parse_ak(ak_cases.rsa_public(attributes=ak_cases.AK | 1 << 10)).name
        != parse_ak(public).name
    )


def test_an_error_names_all_missing_attributes() -> None:
    with pytest.raises(UntrustedAkError) as caught:
        parse_ak(ak_cases.ecc_public(attributes=0))
    for name in ("fixedTPM", "fixedParent", "sensitiveDataOrigin", "restricted", "sign"):
        assert name in str(caught.value)


def test_no_prefix_of_a_public_is_a_public() -> None:
    for public in (ak_cases.ecc_public(), ak_cases.rsa_public()):
        for length in range(len(public)):
            with pytest.raises(EvidenceFormatError):
                parse_public(public[:length])


def test_a_public_has_a_limit() -> None:
    with pytest.raises(EvidenceFormatError, match="too long"):
        parse_public(bytes(1025))
    with pytest.raises(EvidenceFormatError, match="too many"):
        parse_public(bytes(1024))


def test_a_kdf_and_a_policy_are_read_over() -> None:
    kdf1_sp800_108_sha256 = b"\x00\x22\x00\x0b"
    for public in (
        ak_cases.ecc_public(kdf=kdf1_sp800_108_sha256),
        ak_cases.ecc_public(policy=bytes(64)),
    ):
        assert parse_public(public).public_key == ec_key().public_key()


def test_the_software_tpm_writes_the_same_structure() -> None:
    assert encode_public(ec_key().public_key(), AK_ATTRIBUTES) == ak_cases.ecc_public()
    assert encode_public(rsa_key().public_key(), AK_ATTRIBUTES) == ak_cases.rsa_public()


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_pem_of_an_ec_key_is_taken_without_a_name(curve: ec.EllipticCurve) -> None:
    key = ec.derive_private_key(77, curve).public_key()
    ak = insecure_ak_from_pem(pem_of(key))
    assert ak.public_key == key
    assert ak.sign_alg == "ecdsa"
    assert ak.name == b""  # nothing says that a TPM has it, and no label can be held against it


def test_a_pem_of_an_rsa_key_is_taken_without_a_name() -> None:
    ak = insecure_ak_from_pem(pem_of(rsa_key().public_key()))
    assert ak.public_key == rsa_key().public_key()
    assert ak.sign_alg == "rsassa"
    assert ak.name == b""


@pytest.mark.parametrize(
    "pem",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\x00", id="binary"),
        pytest.param(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", id="no DER"),
        pytest.param(
            pem_of(rsa.RSAPublicNumbers(65537, (1 << 1024) - 1).public_key()), id="RSA-1024"
        ),
        pytest.param(
            pem_of(rsa.RSAPublicNumbers(65537, (1 << 2047) - 1).public_key()), id="RSA-2047"
        ),
        pytest.param(pem_of(ec.derive_private_key(7, ec.SECP256K1()).public_key()), id="secp256k1"),
        pytest.param(pem_of(ec.derive_private_key(7, ec.SECP224R1()).public_key()), id="P-224"),
        pytest.param(
            pem_of(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()),
            id="Ed25519",
        ),
        pytest.param(
            ec_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            id="a private key",
        ),
        pytest.param(ak_cases.ecc_public(), id="a TPM2B_PUBLIC"),
    ],
)
def test_other_pems_are_refused(pem: bytes) -> None:
    with pytest.raises(UntrustedAkError):
        insecure_ak_from_pem(pem)
