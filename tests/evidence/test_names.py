"""Names are compared by value: RFC 5280, section 7.1. Two spellings of a name are one name."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID, ObjectIdentifier

from provider_proxy.evidence.names import comparable

CN, ORG = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME


def name(*rdns: tuple[tuple[ObjectIdentifier, str], ...]) -> x509.Name:
    return x509.Name(
        [
            x509.RelativeDistinguishedName(x509.NameAttribute(oid, text) for oid, text in rdn)
            for rdn in rdns
        ]
    )


@pytest.mark.parametrize(
    "other",
    [
        "STM TPM ECC Root CA 01",
        "stm tpm ecc ROOT ca 01",
        "  STM  TPM ECC\tRoot CA 01 ",
        "STM\u00a0TPM ECC Root CA 01",
        "STM TPM ECC Root\u00ad CA 01",
        "\uff33\uff34\uff2d TPM ECC Root CA 01",
    ],
)
def test_spellings_of_one_name(other: str) -> None:
    assert comparable(name(((CN, other),))) == comparable(name(((CN, "STM TPM ECC Root CA 01"),)))


def test_types_of_strings_do_not_matter() -> None:
    kinds = (_ASN1Type.UTF8String, _ASN1Type.PrintableString, _ASN1Type.BMPString)
    made = {comparable(x509.Name([x509.NameAttribute(CN, "a", kind)])) for kind in kinds}
    assert len(made) == 1


def test_the_order_within_an_rdn_does_not_matter_and_that_of_rdns_does() -> None:
    assert comparable(name(((CN, "a"), (ORG, "b")))) == comparable(name(((ORG, "b"), (CN, "a"))))
    assert comparable(name(((CN, "a"),), ((ORG, "b"),))) != comparable(
        name(((ORG, "b"),), ((CN, "a"),))
    )
    assert comparable(name(((CN, "a"),), ((ORG, "b"),))) != comparable(
        name(((CN, "a"), (ORG, "b")))
    )


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("a b", "ab"), ("\xe4", "a")])
def test_other_names(one: str, other: str) -> None:
    first = x509.Name([x509.NameAttribute(CN, one)])
    second = x509.Name([x509.NameAttribute(CN, other)])
    assert comparable(first) != comparable(second)
    assert comparable(name(((CN, "x"),))) != comparable(name(((ORG, "x"),)))


def test_bits_are_compared_as_they_are() -> None:
    oid = NameOID.X500_UNIQUE_IDENTIFIER
    made = [
        x509.Name([x509.NameAttribute(oid, value, _ASN1Type.BitString)]) for value in (b"\1", b"\2")
    ]
    assert comparable(made[0]) != comparable(made[1])
    assert comparable(x509.Name([])) == ()
