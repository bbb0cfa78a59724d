"""Certificates as they are: what chips carry is read, what was signed is what is verified.

Each kind is made here, with a CA's signature over the odd bytes; OpenSSL reads and verifies all of them,
and what we read of the canonical copy is what OpenSSL reads of the original.
"""

from __future__ import annotations

from pathlib import Path

import odd_certificates as odd
import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st
from openssl_helpers import check_same_as_openssl, openssl_verifies
from soft_ek import NOW, Authority, ek_certificate, rsa_ek

from provider_proxy.errors import EvidenceFormatError, UntrustedEkError
from provider_proxy.evidence import der
from provider_proxy.trust.ek_anchors import Anchors, Found
from provider_proxy.trust.ek_certificate import (
    check_signature,
    cut_certificate,
    parse_certificate,
)
from provider_proxy.trust.ek_chain import check_chain

EC_CA = Authority("ec maker")
RSA_CA = Authority("rsa maker", key=rsa_ek(1))
EK = rsa_ek()
PLAIN = {EC_CA.text: ek_certificate(EC_CA, EK), RSA_CA.text: ek_certificate(RSA_CA, EK)}
ODD = {
    f"{name}, {authority.text}": (odd.edited(PLAIN[authority.text], edit, authority.key), authority)
    for kinds, authorities in (
        (odd.ODD_ANY, (EC_CA, RSA_CA)),
        (odd.ODD_EC, (EC_CA,)),
        (odd.ODD_RSA, (RSA_CA,)),
    )
    for name, edit in kinds.items()
    for authority in authorities
}
# `cryptography` 50 reads these itself; what it refuses is read from a copy.
READ_AS_THEY_ARE = ("long serial", "no NULL with RSA")


def anchors(*authorities: Authority) -> Anchors:
    return Anchors(Found(certificate=parse_certificate(each.der())) for each in authorities)


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_certificate_is_read_and_its_signature_holds(kind: str) -> None:
    data, authority = ODD[kind]
    read = parse_certificate(data)
    assert read.is_repaired is not any(each in kind for each in READ_AS_THEY_ARE)
    assert read.tbs in data
    check_signature(read, parse_certificate(authority.der()))
    with pytest.raises(UntrustedEkError, match="signature"):
        check_signature(read, parse_certificate(Authority(authority.text, key=rsa_ek(2)).der()))
    verdict = check_chain(data, EK.public_key(), anchors(EC_CA, RSA_CA), NOW)
    assert verdict.anchor.certificate.der == authority.der()


@pytest.mark.real
@pytest.mark.parametrize("kind", ODD)
def test_what_is_read_is_what_openssl_reads(kind: str, tmp_path: Path) -> None:
    data, authority = ODD[kind]
    if "half a key identifier" not in kind:  # which is left out, for nobody reads it
        check_same_as_openssl(data)
    assert openssl_verifies(data, authority.pem(), tmp_path)


@pytest.mark.parametrize("kind", [name for name in ODD if name.endswith(EC_CA.text)])
def test_a_changed_byte_of_an_odd_certificate_is_noticed(kind: str) -> None:
    """The copy is read; the signature is over the original, each byte of it."""
    data, _ = ODD[kind]
    known = anchors(EC_CA)
    end = len(parse_certificate(data).tbs) + data.index(parse_certificate(data).tbs)
    for position in range(0, end, 3):
        changed = bytearray(data)
        changed[position] ^= 0x11
        with pytest.raises(UntrustedEkError):
            check_chain(bytes(changed), EK.public_key(), known, NOW)


# --- around the certificate -------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [b"\xff" * 600, b"\0" * 600, b"\0", b"behind it"])
@pytest.mark.parametrize("has_header", [False, True])
def test_padding_and_the_tcg_s_header(padding: bytes, has_header: bool) -> None:
    plain = PLAIN[EC_CA.text]
    header = b"\x10\x01\x00" + (len(plain) + 2).to_bytes(2, "big") + b"\x10\x02"
    data = (header if has_header else b"") + plain + padding
    assert cut_certificate(data) == plain
    assert parse_certificate(data) == parse_certificate(plain)
    check_chain(data, EK.public_key(), anchors(EC_CA), NOW)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no certificate was written"),
        (bytes(1600), "no certificate was written"),
        (b"\xff" * 1600, "no certificate was written"),
        (b"\x10\x01\x00\x00\x02\x10\x02", "no certificate was written"),
        (b"\x10\x01\x00\xff\xff\x10\x02\x30\x82\xff\xff", "ends after the last byte"),
        (b"garbage", "begins with 67617262"),
        (b"\x30", "no element"),
        (b"\x30\x80\0\0", "has an unknown form"),
        (b"\x30\x00", "three parts"),
        (b"\x30\x82\x50\x00" + bytes(0x5000), "longer than 16384 bytes"),
        (b"\x30\x0a" + b"\x30\x00\x30\x00\x03\x04\0abc"[:10], "fields"),
    ],
)
def test_what_is_no_certificate_says_why(data: bytes, why: str) -> None:
    with pytest.raises(EvidenceFormatError, match=why):
        parse_certificate(data)


def test_the_parser_s_reason_is_kept() -> None:
    def no_seconds(certificate: odd.Certificate) -> None:
        certificate.field(4).parts[0] = odd.Node(0x17, b"2001010000Z")

    data = odd.edited(PLAIN[EC_CA.text], no_seconds, EC_CA.key)
    with pytest.raises(EvidenceFormatError, match="Validity::not_before"):
        parse_certificate(data)


@pytest.mark.parametrize(
    ("family", "why"), [(b"1.2", "a TPM 1.2 certificate"), (b"2.0", "RSAES-OAEP")]
)
def test_keys_of_tpm_1_2_say_so(family: bytes, why: str) -> None:
    def oaep(certificate: odd.Certificate) -> None:
        algorithm = certificate.field(6).parts[0]
        algorithm.value = [odd.Node(der.OID, der.encode_oid("1.2.840.113549.1.1.7")[2:])]
        level = odd.Node(odd.INTEGER, b"\2")
        facts = odd.Node(odd.SEQUENCE, [odd.Node(odd.UTF8, family), level, level])
        specification = odd.Node(
            odd.SEQUENCE,
            [odd.Node(der.OID, der.encode_oid("2.23.133.2.16")[2:]), odd.Node(odd.SET, [facts])],
        )
        value = odd.Node(odd.SEQUENCE, [specification]).encode()
        oid = odd.Node(der.OID, der.encode_oid("2.5.29.9")[2:])
        certificate.extensions.append(
            odd.Node(odd.SEQUENCE, [oid, odd.Node(odd.OCTET_STRING, value)])
        )

    with pytest.raises(EvidenceFormatError, match=why):
        parse_certificate(odd.edited(PLAIN[EC_CA.text], oaep, EC_CA.key))


# --- edits of what is not signed, and of what must not be there twice -------------------------------


def test_another_algorithm_outside_than_inside() -> None:
    certificate = odd.Certificate(PLAIN[EC_CA.text])
    certificate.algorithm.parts[0].value = der.encode_oid("1.2.840.10045.4.3.3")[2:]
    with pytest.raises(EvidenceFormatError, match="name different signature algorithms"):
        parse_certificate(certificate.encode())
    certificate = odd.Certificate(PLAIN[EC_CA.text])
    certificate.algorithm.parts.append(odd.Node(odd.NULL, b""))
    with pytest.raises(EvidenceFormatError, match="name different signature algorithms"):
        parse_certificate(certificate.encode())


def test_a_signature_with_unused_bits() -> None:
    certificate = odd.Certificate(PLAIN[EC_CA.text])
    certificate.signature.value = b"\1" + certificate.signature.data[1:]
    with pytest.raises(EvidenceFormatError, match="whole number of bytes"):
        parse_certificate(certificate.encode())


def test_elements_behind_the_signature() -> None:
    certificate = odd.Certificate(PLAIN[EC_CA.text])
    parts = [certificate.tbs, certificate.algorithm, certificate.signature, odd.Node(odd.NULL, b"")]
    with pytest.raises(EvidenceFormatError, match="three parts"):
        parse_certificate(odd.Node(odd.SEQUENCE, parts).encode())


@pytest.mark.parametrize("also_odd", [False, True])
@pytest.mark.parametrize("oid", [odd.SAN, odd.BASIC_CONSTRAINTS, odd.EXTENDED_KEY_USAGE])
def test_an_extension_that_is_there_twice(oid: bytes, also_odd: bool) -> None:
    def twice(certificate: odd.Certificate) -> None:
        certificate.extensions.append(certificate.extension(oid))
        if also_odd:
            odd.unordered_subject(certificate)

    with pytest.raises(EvidenceFormatError, match="Duplicate"):
        parse_certificate(odd.edited(PLAIN[EC_CA.text], twice, EC_CA.key))


def test_what_nobody_reads_is_left_out_only_where_it_is_not_critical() -> None:
    """No certificate is refused for an extension that changes nothing; a critical one has to be read."""

    def critical(certificate: odd.Certificate) -> None:
        odd.half_key_identifier(certificate)
        certificate.extensions[-1].parts.insert(1, odd.Node(odd.BOOLEAN, b"\xff"))

    def twice(certificate: odd.Certificate) -> None:
        odd.half_key_identifier(certificate)
        odd.half_key_identifier(certificate)

    def marked(certificate: odd.Certificate) -> None:
        odd.half_key_identifier(certificate)
        oid = odd.Node(der.OID, der.encode_oid("2.23.133.20.1")[2:])
        certificate.extensions.append(
            odd.Node(odd.SEQUENCE, [oid, odd.Node(odd.OCTET_STRING, b"\x30\0")])
        )

    for edit in (critical, twice):
        with pytest.raises(EvidenceFormatError):
            parse_certificate(odd.edited(PLAIN[EC_CA.text], edit, EC_CA.key))
    read = parse_certificate(odd.edited(PLAIN[EC_CA.text], marked, EC_CA.key))
    oids = [extension.oid.dotted_string for extension in read.parsed.extensions]
    assert "2.23.133.20.1" in oids
    assert "2.5.29.35" not in oids


def test_an_odd_critical_extension_stays_critical() -> None:
    """Only a FALSE is dropped: what is not known and critical is refused however it is written."""

    def unknown(certificate: odd.Certificate) -> None:
        oid = odd.Node(der.OID, der.encode_oid("1.2.3.4")[2:])
        value = odd.Node(odd.OCTET_STRING, b"\5\0")
        certificate.extensions.append(odd.Node(odd.SEQUENCE, [oid, odd.Node(1, b"\1"), value]))

    data = odd.edited(PLAIN[EC_CA.text], unknown, EC_CA.key)
    with pytest.raises(UntrustedEkError, match=r"critical extension 1\.2\.3\.4"):
        check_chain(data, EK.public_key(), anchors(EC_CA), NOW)


def test_ca_true_in_ber_is_no_ek() -> None:
    def ca(certificate: odd.Certificate) -> None:
        value = odd.Node(odd.SEQUENCE, [odd.Node(odd.BOOLEAN, b"\1")]).encode()
        certificate.extension(odd.BASIC_CONSTRAINTS).parts[-1].value = value

    data = odd.edited(PLAIN[EC_CA.text], ca, EC_CA.key)
    with pytest.raises(UntrustedEkError, match="is a CA certificate"):
        check_chain(data, EK.public_key(), anchors(EC_CA), NOW)


# --- whatever comes in ------------------------------------------------------------------------------

SEEDS = [*PLAIN.values(), *(data for data, _ in ODD.values())]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_bytes_that_were_changed_end_in_a_certificate_or_a_reason(
    seed: bytes, data: st.DataObject
) -> None:
    changed = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(changed) - 1))
        if data.draw(st.booleans()):
            changed[position] = data.draw(st.integers(0, 255))
        else:
            del changed[position : position + data.draw(st.integers(1, 8))]
    try:
        read = parse_certificate(bytes(changed))
    except EvidenceFormatError:
        return
    assert isinstance(read.parsed, x509.Certificate)
    assert read.tbs in bytes(changed)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_end_in_a_reason(data: bytes) -> None:
    for blob in (data, der.encode(der.SEQUENCE, data)):
        with pytest.raises(EvidenceFormatError):
            parse_certificate(blob)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60))
def test_elements_nested_in_each_other_end_in_a_reason(depths: list[int]) -> None:
    blob = b"\5\0"
    for depth in depths:
        blob = der.encode((0x30, 0x31, 0xA0, 0xA3, 0x30, 0x30)[depth], blob)
    whole = der.encode(der.SEQUENCE, blob, b"\x30\0", b"\3\1\0")
    with pytest.raises(EvidenceFormatError):
        parse_certificate(whole)
