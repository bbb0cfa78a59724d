"""Certificates that nobody of this project made: ours and OpenSSL's reading and verdict, side by side.

Runs where the corpus is, see `places.find_corpus`. What is intended to differ stands in `OURS_ALONE`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from openssl_helpers import check_same_as_openssl, openssl_verifies, openssl_verifies_each
from places import NO_CORPUS, find_corpus

from provider_proxy.errors import EvidenceFormatError, UntrustedEkError
from provider_proxy.trust.ek_certificate import TpmCertificate, check_signature, parse_certificate
from provider_proxy.trust.ek_chain import check_chain
from provider_proxy.trust.ek_files import LoadedStore, load_store
from provider_proxy.trust.ek_store import utc_now

CORPUS = find_corpus()
PEM_RE = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END", re.DOTALL)
OURS_ALONE = (
    "not for an EK",  # openssl verify asks for no purpose
    "key usage that no EK has",
    "is that of a virtual TPM",
    "is for virtual TPMs",
    "bits is too weak",
    "is not accepted",  # SHA-1
    "expired",
    "is not valid before",
)
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(CORPUS is None, reason=NO_CORPUS),
]


def corpus() -> Path:
    assert CORPUS is not None
    return CORPUS


def blobs(folder: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted((corpus() / folder).rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        for number, text in enumerate(PEM_RE.findall(data)):
            yield f"{path.name} ({number})", base64.b64decode(text)
        if data.startswith((b"\x30", b"\x10\x01\x00")):
            yield path.name, data


@cache
def store() -> LoadedStore:
    return load_store([corpus() / "ca"])


def eks() -> Iterator[tuple[str, TpmCertificate]]:
    for name, data in blobs("ek"):
        try:
            yield name, parse_certificate(data)
        except EvidenceFormatError as exc:
            assert "TPM 1.2" in str(exc), (name, exc)  # noqa: PT017  # each of them says so


def pem(certificate: TpmCertificate) -> bytes:
    text = base64.encodebytes(certificate.der)
    return b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"


def test_every_ca_is_read_and_nothing_is_skipped() -> None:
    count = 0
    for _, data in blobs("ca"):
        parse_certificate(data)
        count += 1
    assert count > 200
    assert [each for each in store().skipped if not each.source.endswith(".crt")] == []
    assert len(load_store([corpus() / "ca/keylime"]).anchors) == 45  # of 51 files, some twice
    assert load_store([corpus() / "ca/keylime"]).skipped == ()


def test_what_is_read_of_a_copy_is_what_openssl_reads() -> None:
    repaired = 0
    for folder in ("ca", "ek"):
        for _, data in blobs(folder):
            try:
                read = parse_certificate(data)
            except EvidenceFormatError:
                continue
            if read.is_repaired:
                check_same_as_openssl(data)
                repaired += 1
    assert repaired > 15


def test_eks_are_accepted_where_openssl_accepts_them(tmp_path: Path) -> None:
    """With the same anchors of the same purpose; and nothing that OpenSSL refuses."""
    hardware = b"".join(pem(a.certificate) for a in store().anchors.all if a.why_virtual is None)
    accepted = []
    for name, ek in eks():
        key = ek.parsed.public_key()
        assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
        theirs = openssl_verifies(ek.der, hardware, tmp_path)
        try:
            check_chain(ek.der, key, store().anchors, utc_now())
        except UntrustedEkError as exc:
            why = str(exc)
            assert not theirs or any(ours in why for ours in OURS_ALONE), (name, why)
        else:
            assert theirs, name
            accepted.append(name)
    assert len(accepted) >= 2


def test_cas_lead_to_their_issuers_where_openssl_says_so(tmp_path: Path) -> None:
    """Each CA's own signature, under the CAs that have its issuer's name, for us and for OpenSSL."""
    weak = signed = 0
    for issuer in store().anchors.all:
        children = [
            child.certificate
            for child in store().anchors.all
            if child.certificate.issuer == issuer.certificate.subject
            # Another copy of a root is a self-signed leaf to OpenSSL.
            and child.certificate.subject != child.certificate.issuer
        ]
        if not children:
            continue
        theirs = openssl_verifies_each(
            [pem(child) for child in children], pem(issuer.certificate), tmp_path
        )
        for child, is_theirs in zip(children, theirs, strict=True):
            try:
                check_signature(child, issuer.certificate)
            except UntrustedEkError as exc:
                is_weak = "SHA1, which is not accepted" in str(exc)
                weak += is_weak
                agree = is_weak or not is_theirs
            else:
                agree = is_theirs
                signed += 1
            assert agree, child.name
    assert weak > 10  # Infineon's
    assert signed > 100


def test_the_virtual_ones_are_known(tmp_path: Path) -> None:
    virtual = {anchor.certificate.name for anchor in store().anchors.all if anchor.why_virtual}
    assert len(virtual) == 3
    assert any("Aliyun" in name for name in virtual)
