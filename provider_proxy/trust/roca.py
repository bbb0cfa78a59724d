"""The fingerprint of RSA keys that a faulty library of Infineon's made (ROCA, CVE-2017-15361).

Their primes are k·M + (65537^a mod M) with M the product of the first primes, so that the modulus is a
power of 65537 modulo each of these primes; of other moduli one in 2^27 is. Such a key can be factored.
Source: Nemec, Sys, Svenda, Klinec, Matyas: "The Return of Coppersmith's Attack" (CCS 2017), section 2.3.
"""

from __future__ import annotations

GENERATOR = 65537
PRIMES = (*(11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157),)
"""Those of the first 39 primes modulo which not all residues are powers of 65537."""


def _powers(prime: int) -> frozenset[int]:
    found, value = set(), 1
    while value not in found:
        found.add(value)
        value = value * GENERATOR % prime
    return frozenset(found)


_RESIDUES = {prime: _powers(prime) for prime in PRIMES}


def has_fingerprint(modulus: int) -> bool:
    """True where an RSA modulus has the form that the faulty library gives it."""
    return all(modulus % prime in residues for prime, residues in _RESIDUES.items())
