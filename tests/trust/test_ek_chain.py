"""EK certificates and their chains: what vendors make passes, and what is slightly off fails."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from soft_ek import DAY, FOREVER, NOW, Authority, ek_certificate, key_usage, rsa_ek

from provider_proxy.errors import UntrustedEkError
from provider_proxy.evidence.tpm_keys import PublicKey
from provider_proxy.trust import ek_chain
from provider_proxy.trust.ek_anchors import Anchors, Found
from provider_proxy.trust.ek_certificate import parse_certificate
from provider_proxy.trust.ek_chain import EK_PURPOSE, Verdict, check_chain

ROOT = Authority("vendor root")
ISSUING = Authority("vendor issuing", ROOT, pathlen=0)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa_ek()
GOOD = ek_certificate(ISSUING, RSA_KEY)


def anchors(*authorities: Authority, virtual: Sequence[Authority] = ()) -> Anchors:
    """The anchors of a store with these CAs, some of them marked as virtual."""
    return Anchors(
        Found(certificate=parse_certificate(authority.der()), is_marked=authority in virtual)
        for authority in (*authorities, *virtual)
    )


def check(
    ek_cert: bytes = GOOD,
    *authorities: Authority,
    at: datetime = NOW,
    key: PublicKey | None = None,
    helpers: Sequence[Authority] = (),
    virtual: Sequence[Authority] = (),
    insecure_virtual: bool = False,
) -> Verdict:
    return check_chain(
        ek_cert,
        key or RSA_KEY.public_key(),
        anchors(*authorities, virtual=virtual),
        at,
        helpers=[helper.der() for helper in helpers],
        insecure_virtual=insecure_virtual,
    )


def refused(ek_cert: bytes, *authorities: Authority, match: str, **options: Any) -> None:
    with pytest.raises(UntrustedEkError, match=match):
        check(ek_cert, *authorities, **options)


def name_of(verdict: Verdict) -> str:
    return verdict.anchor.certificate.name


def test_every_ca_of_the_store_is_an_anchor_and_the_first_one_ends_the_chain() -> None:
    for authorities in ((ISSUING,), (ROOT, ISSUING), (ISSUING, ROOT)):
        verdict = check(GOOD, *authorities)
        assert name_of(verdict) == "CN=vendor issuing"
        assert verdict.until == ISSUING.certificate.not_valid_after_utc
        assert verdict.maker == "Infineon"
    assert name_of(check(ek_certificate(ROOT, RSA_KEY), ROOT)) == "CN=vendor root"


def test_helpers_lead_to_an_anchor_and_are_none() -> None:
    short = Authority("short-lived", ROOT, ends=NOW + DAY)
    below = Authority("below", short)
    cert = ek_certificate(below, RSA_KEY)
    for helpers in ((short, below), (below, short)):
        verdict = check(cert, ROOT, helpers=helpers)
        assert name_of(verdict) == "CN=vendor root"
        assert len(verdict.chain) == 3
        assert verdict.until == NOW + DAY
    refused(cert, ROOT, helpers=(below,), match="no CA named 'CN=short-lived'")
    refused(
        cert,
        Authority("another"),
        helpers=(short, below, ROOT),
        match="does not lead to a trusted CA",
    )
    refused(cert, ROOT, helpers=(short, below), at=NOW + 2 * DAY, match="short-lived.* expired on")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_ec_eks_and_rsa_cas(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    root = Authority("rsa root", key=RSA_KEY)
    check(ek_certificate(root, key), root, key=key.public_key())
    check(ek_certificate(root, key, digest=hashes.SHA384()), root, key=key.public_key())


def test_an_ek_certificate_without_an_end() -> None:
    forever = Authority("forever", ends=FOREVER)
    assert check(ek_certificate(forever, RSA_KEY), forever).until.year == 9999


def test_cross_signed_cas_of_one_name_are_all_tried() -> None:
    """Two certificates for one key, the one expired; and another CA that only has the name."""
    key = ec.generate_private_key(ec.SECP256R1())
    old = Authority("twice", ROOT, key=key, ends=NOW - DAY)
    new = Authority("twice", ROOT, key=key)
    stranger = Authority("twice", ROOT)
    check(ek_certificate(new, RSA_KEY), stranger, old, new, ROOT)


def test_as_many_cas_as_are_allowed_and_one_more() -> None:
    line = [Authority("0")]
    for number in range(1, ek_chain.MAX_ISSUERS + 1):
        line.append(Authority(str(number), line[-1]))
    check(ek_certificate(line[-2], RSA_KEY), line[0], helpers=line[1:-1])
    cert = ek_certificate(line[-1], RSA_KEY)
    refused(cert, line[0], helpers=line[1:], match="longer than 8")


def test_more_helpers_than_any_chip_has() -> None:
    many = [ROOT] * (ek_chain.MAX_HELPERS + 1)
    refused(GOOD, ROOT, helpers=many, match="more than 8 certificates")
    with pytest.raises(UntrustedEkError, match="16384 bytes"):
        check_chain(GOOD, RSA_KEY.public_key(), anchors(ROOT), NOW, helpers=[bytes(20000)])
    # What cannot be read of them is left aside.
    helpers = [b"", b"garbage", ISSUING.der()]
    check_chain(GOOD, RSA_KEY.public_key(), anchors(ROOT), NOW, helpers=helpers)


def test_cas_that_sign_each_other_in_a_circle_lead_nowhere() -> None:
    a_key, b_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    a_root, b_root = Authority("a", key=a_key), Authority("b", key=b_key)
    a, b = Authority("a", b_root, key=a_key), Authority("b", a_root, key=b_key)
    refused(ek_certificate(a, RSA_KEY), ROOT, helpers=(a, b), match="does not lead to a trusted CA")


def test_many_cas_of_one_name_cost_a_bounded_time() -> None:
    crowd = [Authority("crowd", ROOT) for _ in range(ek_chain.MAX_SIGNATURE_CHECKS + 1)]
    refused(ek_certificate(Authority("crowd"), RSA_KEY), *crowd, match="too many CAs have the name")


# --- what is not an EK's certificate ----------------------------------------------------------------


def test_another_key() -> None:
    with pytest.raises(UntrustedEkError, match="another key"):
        check(key=rsa_ek(1).public_key())
    with pytest.raises(UntrustedEkError, match="another key"):
        check(key=EC_KEY.public_key())


def test_no_ca_for_it() -> None:
    refused(GOOD, ROOT, match="no CA named 'CN=vendor issuing'")
    refused(ek_certificate(Authority("vendor issuing"), RSA_KEY), ROOT, ISSUING, match="signature")


def test_a_self_signed_certificate_vouches_for_nobody() -> None:
    own = Authority("own", key=RSA_KEY)
    refused(ek_certificate(own, RSA_KEY), ROOT, ISSUING, match="no CA named")


def test_one_bit_of_the_signature() -> None:
    refused(GOOD[:-1] + bytes([GOOD[-1] ^ 1]), ROOT, ISSUING, match="signature")


@pytest.mark.parametrize(
    ("ek_cert", "why"),
    [
        (ek_certificate(ISSUING, RSA_KEY, purposes=()), "not for an EK"),
        (
            ek_certificate(ISSUING, RSA_KEY, purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)),
            "not for an EK",
        ),
        (
            ek_certificate(
                ISSUING, RSA_KEY, purposes=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)
            ),
            "not for an EK",
        ),
        (ek_certificate(ISSUING, RSA_KEY, is_ca=True), "is a CA certificate"),
        (
            ek_certificate(ISSUING, RSA_KEY, usage=key_usage(digital_signature=True)),
            "key usage that no EK has",
        ),
        (
            ek_certificate(
                ISSUING, RSA_KEY, usage=key_usage(key_encipherment=True, key_cert_sign=True)
            ),
            "key usage that no EK has",
        ),
        (ek_certificate(ISSUING, RSA_KEY, ends=NOW - DAY), "expired on 2026-05-31"),
        (ek_certificate(ISSUING, RSA_KEY, starts=NOW + DAY), "not valid before"),
        (
            ek_certificate(ISSUING, RSA_KEY, critical=(x509.InhibitAnyPolicy(0),)),
            "critical extension 2.5.29.54",
        ),
    ],
)
def test_what_is_off_in_the_certificate(ek_cert: bytes, why: str) -> None:
    refused(ek_cert, ROOT, ISSUING, match=why)


NAMES = x509.NameConstraints([x509.DNSName("example.org")], None)


@pytest.mark.parametrize(
    ("authority", "why"),
    [
        (Authority("x", ROOT, is_ca=False), "basicConstraints"),
        (Authority("x", ROOT, is_ca=None), "basicConstraints"),
        (Authority("x", ROOT, may_sign=False), "keyUsage"),
        (Authority("x", ROOT, ends=NOW - DAY), "'CN=x' expired on 2026-05-31"),
        (Authority("x", ROOT, starts=NOW + DAY), "not valid before"),
        (
            Authority("x", ROOT, purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)),
            "its purposes do not include EK certificates",
        ),
        (Authority("x", ROOT, critical=(NAMES,)), "critical extension 2.5.29.30"),
        (
            Authority("x", ISSUING),
            "'CN=vendor issuing' has more CAs below it than its pathlen allows",
        ),
        (Authority("x", ROOT, key=ec.generate_private_key(ec.SECP192R1())), "curve secp192r1"),
    ],
)
def test_what_is_off_in_a_ca(authority: Authority, why: str) -> None:
    cert = ek_certificate(authority, RSA_KEY)
    refused(cert, ROOT, ISSUING, helpers=(authority,), match=why)
    if "vendor" not in why:  # and as an anchor
        refused(cert, authority, match=why)


def test_what_is_off_in_a_root() -> None:
    expired = Authority("expired", ends=NOW - DAY)
    refused(ek_certificate(expired, RSA_KEY), expired, match="expired")
    short = Authority("short", pathlen=0)
    between = Authority("between", short)
    refused(ek_certificate(between, RSA_KEY), short, helpers=(between,), match="pathlen")


def test_cas_for_eks_may_say_so() -> None:
    for purpose in (EK_PURPOSE, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE):
        good = Authority("good", ROOT, purposes=(purpose,), may_sign=None)
        check(ek_certificate(good, RSA_KEY), ROOT, helpers=(good,))


def test_a_weak_hash_is_refused() -> None:
    cert = ek_certificate(ISSUING, RSA_KEY, digest=hashes.SHA224())
    refused(cert, ROOT, ISSUING, match="signed with SHA224, which is not accepted")


@pytest.mark.parametrize("data", [b"", b"0", b"garbage", GOOD[:-1], b"\x30" * 20000])
def test_what_is_no_certificate(data: bytes) -> None:
    refused(data, ROOT, ISSUING, match="cannot be read")


def test_any_change_of_a_byte_is_refused() -> None:
    """Each byte once: whatever parses is refused by one check or another, and nothing else escapes."""
    known = anchors(ROOT, ISSUING)
    for position in range(len(GOOD)):
        data = bytearray(GOOD)
        data[position] ^= 0x41
        with pytest.raises(UntrustedEkError):
            check_chain(bytes(data), RSA_KEY.public_key(), known, NOW)
