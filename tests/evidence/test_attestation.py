"""TPMS_ATTEST, TPMT_SIGNATURE and the PCR digest; the vectors have their fields one by one."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from evidence_factory import CLOCK, MASK, FixedTpm, ec_key, rsa_key, tpm2b

from provider_proxy.errors import (
    EvidenceFormatError,
    NotAQuoteError,
    PcrDigestError,
    PcrSelectionError,
    SignatureError,
)
from provider_proxy.evidence.attestation import (
    MAX_ATTEST_BYTES,
    check_pcrs,
    check_signature,
    parse_attest,
    parse_signature,
)
from provider_proxy.evidence.model import HashAlg, PcrValues
from provider_proxy.testing.soft_tpm import SoftTpm

EXTRA = b"abcdefghijklmnopqrstuvwxyz234567"
TPMS = [
    pytest.param(FixedTpm(), id="ecdsa"),
    pytest.param(FixedTpm(rsa_key()), id="rsassa"),
    pytest.param(FixedTpm(rsa_key(), hash_alg=HashAlg.SHA384), id="rsassa-sha384"),
]


def test_attest_is_read_field_by_field() -> None:
    tpm = FixedTpm()
    attest = parse_attest(tpm.attest(EXTRA, HashAlg.SHA384, 0x800081, safe=0))
    values = b"".join(value for _, value in tpm.read(HashAlg.SHA384, 0x800081).values)
    assert attest.extra_data == EXTRA
    assert attest.clock == CLOCK
    assert not attest.clock_safe
    assert attest.firmware_version == 0x20191023_00163636
    assert attest.bank is HashAlg.SHA384
    assert attest.mask == 0x800081  # PCR 23 in the third byte's highest bit
    assert attest.pcr_digest == HashAlg.SHA256.digest(values)


def test_no_prefix_of_an_attest_is_an_attest() -> None:
    attest = FixedTpm().attest(EXTRA, HashAlg.SHA256, MASK)
    for length in range(len(attest)):
        with pytest.raises((EvidenceFormatError, NotAQuoteError)):
            parse_attest(attest[:length])


def test_an_attest_has_a_limit() -> None:
    # Everything at its largest still fits; the limit stands before the reader, not behind it.
    largest = FixedTpm().attest(bytes(128), HashAlg.SHA512, 0xFFFFFF, pcr_digest=bytes(128))
    assert len(largest) < MAX_ATTEST_BYTES
    parse_attest(largest)
    with pytest.raises(NotAQuoteError):
        parse_attest(bytes(512))
    with pytest.raises(EvidenceFormatError, match="too long"):
        parse_attest(bytes(513))


def test_a_part_of_an_attest_has_a_limit() -> None:
    for field in ("qualifying", "pcr_digest"):
        parts = {"qualifying": EXTRA, field: bytes(128)}
        extra = parts.pop("qualifying")
        parse_attest(FixedTpm().attest(extra, HashAlg.SHA256, MASK, **parts))
        parts = {"qualifying": EXTRA, field: bytes(129)}
        extra = parts.pop("qualifying")
        with pytest.raises(EvidenceFormatError, match="129"):
            parse_attest(FixedTpm().attest(extra, HashAlg.SHA256, MASK, **parts))


def test_no_prefix_of_a_signature_is_a_signature() -> None:
    for tpm in (FixedTpm(), FixedTpm(rsa_key())):
        signature = tpm.sign(b"attest")
        for length in range(len(signature)):
            with pytest.raises((EvidenceFormatError, SignatureError)):
                parse_signature(signature[:length])


def test_a_signature_has_a_limit() -> None:
    with pytest.raises(SignatureError):
        parse_signature(bytes(1024))
    with pytest.raises(EvidenceFormatError, match="too long"):
        parse_signature(bytes(1025))
    rsa_head = b"\x00\x14\x00\x0b"
    assert parse_signature(rsa_head + tpm2b(bytes(512))).value == bytes(512)
    with pytest.raises(EvidenceFormatError, match="513"):
        parse_signature(rsa_head + tpm2b(bytes(513)))


@pytest.mark.parametrize("tpm", TPMS)
def test_own_signature_is_accepted_and_no_other_text(tpm: FixedTpm) -> None:
    signature = parse_signature(tpm.sign(b"attest"))
    check_signature(b"attest", signature, tpm.ak)
    for text in (b"", b"attes", b"attest\0", b"Attest"):
        with pytest.raises(SignatureError):
            check_signature(text, signature, tpm.ak)


@pytest.mark.parametrize("tpm", TPMS)
def test_another_key_is_refused(tpm: FixedTpm) -> None:
    other = FixedTpm(ec_key("another ak"))
    with pytest.raises(SignatureError):
        check_signature(b"attest", parse_signature(other.sign(b"attest")), tpm.ak)


@pytest.mark.parametrize("tpm", TPMS)
def test_scheme_and_hash_are_the_aks_not_the_signatures(tpm: FixedTpm) -> None:
    # The signature is good; only the key says something else of itself.
    signature = parse_signature(tpm.sign(b"attest"))
    for change in (
        {"signature_hash": HashAlg.SHA512},
        {"sign_alg": "rsassa" if tpm.ak.sign_alg == "ecdsa" else "ecdsa"},
    ):
        ak = dataclasses.replace(tpm.ak, **change)
        with pytest.raises(SignatureError, match="scheme or hash"):
            check_signature(b"attest", signature, ak)


def test_a_new_software_tpm_signs_what_we_read() -> None:
    for key in (None, rsa_key(), ec.generate_private_key(ec.SECP256R1())):
        tpm = SoftTpm(key=key, pcrs={0: b"firmware"})
        quote = tpm.quote(EXTRA, HashAlg.SHA256, 0x3)
        check_signature(quote.attest, parse_signature(quote.signature), tpm.ak)
        attest = parse_attest(quote.attest)
        check_pcrs(attest, quote.pcrs, tpm.ak.signature_hash)
        later = parse_attest(tpm.quote(EXTRA, HashAlg.SHA256, 0x3).attest)
        assert later.clock > attest.clock


@pytest.mark.parametrize("bank", list(HashAlg))
@pytest.mark.parametrize("tpm", TPMS)
def test_pcrs_of_any_bank_are_digested_by_the_schemes_hash(tpm: FixedTpm, bank: HashAlg) -> None:
    quote = tpm.quote(EXTRA, bank, 0xFFFFFF)
    attest = parse_attest(quote.attest)
    check_pcrs(attest, quote.pcrs, tpm.hash_alg)
    other = HashAlg.SHA384 if tpm.hash_alg is HashAlg.SHA256 else HashAlg.SHA256
    with pytest.raises(PcrDigestError):
        check_pcrs(attest, quote.pcrs, other)


def test_every_pcr_counts() -> None:
    quote = FixedTpm().quote(EXTRA, HashAlg.SHA256, 0xFFFFFF)
    attest, values = parse_attest(quote.attest), quote.pcrs.values
    for pcr, value in values:
        changed = (*values[:pcr], (pcr, bytes([value[0] ^ 1]) + value[1:]), *values[pcr + 1 :])
        with pytest.raises(PcrDigestError):
            check_pcrs(attest, PcrValues(bank=HashAlg.SHA256, values=changed), HashAlg.SHA256)


def test_values_under_other_numbers_are_another_selection() -> None:
    quote = FixedTpm().quote(EXTRA, HashAlg.SHA256, MASK)
    attest, (first, second, third) = parse_attest(quote.attest), quote.pcrs.values
    for values in (
        (first, second),
        (first, second, (8, third[1])),
        (first, second, third, (8, bytes(32))),
        (),
    ):
        with pytest.raises(PcrSelectionError):
            check_pcrs(attest, PcrValues(bank=HashAlg.SHA256, values=values), HashAlg.SHA256)


@pytest.mark.parametrize(
    "values",
    [
        ((1, 32), (0, 32)),
        ((0, 32), (0, 32)),
        ((24, 32),),
        ((-1, 32),),
        ((0, 31),),
        ((0, 32), (1, 33)),
        ((0, 0),),
    ],
)
def test_values_that_no_bank_has_cannot_be_made(values: tuple[tuple[int, int], ...]) -> None:
    digests = tuple((pcr, bytes(length)) for pcr, length in values)
    with pytest.raises(EvidenceFormatError):
        PcrValues(bank=HashAlg.SHA256, values=digests)


def test_signed_bytes_of_another_kind_are_no_quote() -> None:
    # A restricted key signs these too: TPM2_Certify, _GetTime, _NV_Certify, session audits.
    for kind in (0x8014, 0x8015, 0x8016, 0x8017, 0x8019, 0x801A, 0x801C, 0):
        with pytest.raises(NotAQuoteError, match="type"):
            parse_attest(FixedTpm().attest(EXTRA, HashAlg.SHA256, MASK, kind=kind))
    for magic in (0, 0xFF544346, 0x474354FF):
        with pytest.raises(NotAQuoteError, match="magic"):
            parse_attest(FixedTpm().attest(EXTRA, HashAlg.SHA256, MASK, magic=magic))
    with pytest.raises(NotAQuoteError):
        parse_attest(tpm2b(FixedTpm().attest(EXTRA, HashAlg.SHA256, MASK)))
