"""The fingerprint of a faulty library's keys: found where it is, in certificates, and nowhere else."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from soft_ek import NOW, Authority, ek_certificate, rsa_ek

from provider_proxy.errors import UntrustedEkError
from provider_proxy.trust.ek_anchors import Anchors, Found
from provider_proxy.trust.ek_certificate import parse_certificate
from provider_proxy.trust.ek_chain import check_chain
from provider_proxy.trust.roca import PRIMES, has_fingerprint

MAKER = Authority("maker")


def first_primes(count: int) -> list[int]:
    found: list[int] = []
    number = 2
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 1
    return found


def vulnerable(bits: int = 2048) -> int:
    """A modulus of the form that the library's keys have: a power of 65537 modulo M."""
    product = math.prod(first_primes(39))
    power = pow(65537, 12345, product)
    return power + product * ((1 << (bits - 1)) // product + 1)


def test_it_is_found() -> None:
    modulus = vulnerable()
    assert modulus.bit_length() == 2048
    assert has_fingerprint(modulus)
    for number in range(3):
        assert not has_fingerprint(rsa_ek(number).public_key().public_numbers().n)
    assert not has_fingerprint(vulnerable() + 2)
    assert set(PRIMES) <= set(first_primes(39))


def test_such_an_ek_is_refused_by_name() -> None:
    key = rsa.RSAPublicNumbers(65537, vulnerable()).public_key()
    holder = cast(Any, SimpleNamespace(public_key=lambda: key))
    anchors = Anchors([Found(certificate=parse_certificate(MAKER.der()))])
    with pytest.raises(UntrustedEkError, match=r"ROCA fingerprint \(CVE-2017-15361\)"):
        check_chain(ek_certificate(MAKER, holder), key, anchors, NOW)
