"""Of two keys in one file none is taken: the other may have been meant."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.errors import UntrustedAkError
from provider_proxy.evidence.pem import one_part
from provider_proxy.evidence.tpm_keys import insecure_ak_from_pem


def make_pem() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("pem", [b"", b"no PEM", b"# a comment\n" + make_pem(), make_pem() + b"\n"])
def test_one_part_or_none(pem: bytes) -> None:
    assert one_part(pem) is pem


@pytest.mark.parametrize("behind", [make_pem(), b"-----BEGIN CERTIFICATE-----\nMII"])
def test_a_second_part_is_refused(behind: bytes) -> None:
    with pytest.raises(ValueError, match="2 PEM parts"):
        one_part(make_pem() + behind)
    with pytest.raises(UntrustedAkError, match="2 PEM parts"):
        insecure_ak_from_pem(make_pem() + behind)
