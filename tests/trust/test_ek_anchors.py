"""Anchors have one purpose: nothing that vouches for virtual TPMs vouches for a host, however it is put.

Behind each case is a software TPM: a key in a file, with a certificate as its maker would give it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, ObjectIdentifier
from soft_ek import NOW, Authority, ek_certificate, rsa_ek

from provider_proxy.errors import UntrustedEkError
from provider_proxy.evidence.vtpm_ca import OID_CERTIFY
from provider_proxy.trust.ek_anchors import Anchors, Found, Purpose
from provider_proxy.trust.ek_certificate import parse_certificate
from provider_proxy.trust.ek_chain import Verdict, check_chain

SOFTWARE_EK = rsa_ek()
HARDWARE = Authority("maker of chips")
HOST_CA_MARK = x509.UnrecognizedExtension(OID_CERTIFY, b"\x30\x00")


def tpm_san(manufacturer: str, model: str) -> x509.SubjectAlternativeName:
    values = {"2.23.133.2.1": manufacturer, "2.23.133.2.2": model, "2.23.133.2.3": "id:13"}
    attributes = [x509.NameAttribute(ObjectIdentifier(k), v) for k, v in values.items()]
    return x509.SubjectAlternativeName([x509.DirectoryName(x509.Name(attributes))])


def judge(
    authority: Authority,
    *,
    store: Sequence[Authority] = (),
    marked: Sequence[Authority] = (),
    helpers: Sequence[Authority] = (),
    san: x509.SubjectAlternativeName | None = None,
    insecure_virtual: bool = False,
) -> Verdict:
    found = [Found(certificate=parse_certificate(each.der())) for each in store]
    found += [Found(certificate=parse_certificate(each.der()), is_marked=True) for each in marked]
    return check_chain(
        ek_certificate(authority, SOFTWARE_EK, san=san),
        SOFTWARE_EK.public_key(),
        Anchors(found),
        NOW,
        helpers=[each.der() for each in helpers],
        insecure_virtual=insecure_virtual,
    )


def check_virtual(authority: Authority, why: str, **options: Sequence[Authority]) -> None:
    """Refused as a host's, and accepted where a person says that virtual TPMs may pass."""
    with pytest.raises(UntrustedEkError, match=why):
        judge(authority, **options)  # type: ignore[arg-type]
    judge(authority, insecure_virtual=True, **options)  # type: ignore[arg-type]


def test_a_hardware_anchor_says_so() -> None:
    verdict = judge(HARDWARE, store=(HARDWARE,))
    assert verdict.anchor.purpose is Purpose.HARDWARE
    assert verdict.anchor.why_virtual is None


@pytest.mark.parametrize("is_critical", [False, True])
def test_a_host_s_vtpm_ca_vouches_for_no_host(is_critical: bool) -> None:
    critical, others = ((HOST_CA_MARK,), ()) if is_critical else ((), (HOST_CA_MARK,))
    host_ca = Authority("looks like a chip's", critical=critical, others=others)
    with pytest.raises(UntrustedEkError, match=r"virtual TPMs: it carries 2\.23\.133\.20\.1"):
        judge(host_ca, store=(HARDWARE, host_ca))
    below = Authority("below", host_ca)
    with pytest.raises(UntrustedEkError, match=r"virtual"):
        judge(below, store=(host_ca, below))
    with pytest.raises(UntrustedEkError, match=r"virtual"):
        judge(below, store=(host_ca,), helpers=(below,))
    # A helper with the mark, under a genuine anchor.
    helper = Authority("helper", HARDWARE, critical=critical, others=others)
    with pytest.raises(UntrustedEkError, match=r"it carries 2\.23\.133\.20\.1"):
        judge(helper, store=(HARDWARE,), helpers=(helper,))


@pytest.mark.parametrize(
    "text",
    [
        "swtpm-localca",
        "swtpm-localca-rootca",
        "Aliyun TPM EKMF CA",
        "Global Virtual TPM CA - 03",
        "tpm_ek_v1_cloud_host-signer-0-2021",
        "EK/AK CA Root",
        "Example vTPM CA",
        "VMware EK CA",
        "NitroTPM Root",
    ],
)
def test_known_makers_of_virtual_tpms(text: str) -> None:
    authority = Authority(text)
    check_virtual(authority, "virtual TPMs", store=(HARDWARE, authority))


def test_the_test_keys_of_ibm_s_software_tpm() -> None:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "EK CA"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "IBM"),
        ]
    )
    ca = Authority("EK CA", subject=name)
    check_virtual(ca, "virtual TPMs", store=(ca,))


def test_what_the_tenant_marks_is_virtual_under_any_certificate_of_its_key() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    marked = Authority("plain name", key=key)
    check_virtual(marked, "the store marks it as virtual", marked=(marked,))
    check_virtual(marked, "the store marks it as virtual", store=(marked,), marked=(marked,))
    renewed = Authority("plain name", key=key, ends=NOW.replace(year=2048))
    renamed = Authority("another name", key=key)
    cross = Authority("plain name", HARDWARE, key=key)
    for other in (renewed, renamed, cross):
        check_virtual(other, "for virtual TPMs", store=(HARDWARE, other), marked=(marked,))
        with pytest.raises(UntrustedEkError, match="for virtual TPMs"):
            judge(other, store=(HARDWARE,), marked=(marked,), helpers=(other,))


def test_a_mark_holds_for_what_the_key_signed_under_another_name() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    marked, renamed = Authority("plain name", key=key), Authority("another name", key=key)
    below = Authority("below", renamed)
    check_virtual(below, "a CA for virtual TPMs", store=(renamed, below), marked=(marked,))


def test_what_is_below_a_virtual_ca_is_virtual_and_what_is_beside_it_is_not() -> None:
    root = Authority("root of a cloud")
    issuing = Authority("issuing of a cloud", root)
    last = Authority("last of a cloud", issuing)
    options = {"store": (HARDWARE, issuing, last), "marked": (root,)}
    for authority in (issuing, last):
        check_virtual(authority, "a CA for virtual TPMs has issued it", **options)
    # One that has only the name of its issuer in common.
    stranger = Authority("issuing of a cloud", Authority("root of a cloud"))
    judge(stranger, store=(stranger,), marked=(root,))
    judge(HARDWARE, store=(HARDWARE, issuing, last), marked=(root,))


@pytest.mark.parametrize(
    ("manufacturer", "model"),
    [
        ("id:00001014", "swtpm"),
        ("id:00001014", "ST33HTPH"),
        ("id:49465800", "swtpm"),
        ("id:474F4F47", "vTPM"),
        ("id:49424D00", "SW TPM"),
        ("id:564D5700", "VMware TPM"),
        ("id:4D534654", "xCG fTPM"),
        ("ID:414d5a4e", "NitroTPM"),
    ],
)
def test_a_certificate_that_names_a_software_tpm_is_no_host_s(
    manufacturer: str, model: str
) -> None:
    """Even under a CA that is trusted for hardware."""
    san = tpm_san(manufacturer, model)
    with pytest.raises(UntrustedEkError, match="is that of a virtual TPM"):
        judge(HARDWARE, store=(HARDWARE,), san=san)
    judge(HARDWARE, store=(HARDWARE,), san=san, insecure_virtual=True)


@pytest.mark.parametrize(
    ("manufacturer", "model", "maker"),
    [
        ("id:49465800", "SLB9672", "Infineon"),
        ("id:494E5443", "TGL", "Intel"),
        ("id:414D4400", "AMD", "AMD"),
        ("id:4E544300", "NPCT75x", "Nuvoton"),
        ("id:53544D20", "ST33HTPHAHE0", "STMicroelectronics"),
        ("id:4D534654", "Pluton", "Microsoft"),
        ("id:57454300", "WPCT", "57454300"),
    ],
)
def test_makers_of_chips(manufacturer: str, model: str, maker: str) -> None:
    assert judge(HARDWARE, store=(HARDWARE,), san=tpm_san(manufacturer, model)).maker == maker


def test_which_anchors_keep_a_chip_alive() -> None:
    issuing = Authority("issuing", HARDWARE)
    found = [Found(certificate=parse_certificate(each.der())) for each in (HARDWARE, issuing)]
    anchors = Anchors([*found, *found])
    assert len(anchors) == 2
    root, below = anchors.all
    assert anchors.below(root) == (below,)
    assert anchors.below(below) == ()
    assert [left.certificate for left in anchors.without([root.sha256]).all] == [below.certificate]
