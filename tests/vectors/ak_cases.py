"""Vectors: TPM2B_PUBLIC structures that are, and are not, an attestation key."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from cryptography.hazmat.primitives.asymmetric import ec
from evidence_factory import ec_key, rsa_key, tpm2b

NOTES = {
    "Attributes": "TPMA_OBJECT: what a TPM does with the key.",
    "Encoding": "The structure itself.",
    "Scheme": "The signing scheme and its hash.",
    "Strength": "Key sizes, exponents, points.",
}
FORMAT = "EvidenceFormatError"
UNTRUSTED = "UntrustedAkError"
ATTRIBUTES = {
    "fixedTPM": 1 << 1,
    "fixedParent": 1 << 4,
    "sensitiveDataOrigin": 1 << 5,
    "restricted": 1 << 16,
    "sign": 1 << 18,
}
USER_WITH_AUTH, NO_DA, DECRYPT = 1 << 6, 1 << 10, 1 << 17
AK = sum(ATTRIBUTES.values()) | USER_WITH_AUTH
SHA1, SHA256, SHA384, SHA512, NULL, SM3 = 0x04, 0x0B, 0x0C, 0x0D, 0x10, 0x12
RSA, ECC, KEYEDHASH, SYMCIPHER = 0x01, 0x23, 0x08, 0x25
RSASSA, RSAES, RSAPSS, OAEP, ECDSA, ECDAA, SM2, ECSCHNORR = (
    0x14,
    0x15,
    0x16,
    0x17,
    0x18,
    0x1A,
    0x1B,
    0x1C,
)
NO_SYMMETRIC = struct.pack(">H", NULL)
AES_128_CFB = struct.pack(">HHH", 0x06, 128, 0x43)
P256_PRIME = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class AkCase:
    """One vector: `error` is empty where `parse_ak` must take it."""

    comment: str
    flags: tuple[str, ...]
    public: bytes
    error: str = ""


def public_area(
    *,
    kind: int,
    detail: bytes,
    name_alg: int = SHA256,
    attributes: int = AK,
    policy: bytes = b"",
    symmetric: bytes = NO_SYMMETRIC,
    scheme: bytes,
) -> bytes:
    """A TPM2B_PUBLIC of these parts."""
    head = struct.pack(">HHI", kind, name_alg, attributes) + tpm2b(policy)
    return tpm2b(head + symmetric + scheme + detail)


def rsa_public(
    modulus: int | None = None,
    *,
    bits: int = 2048,
    exponent: int = 0,
    length: int = 0,
    scheme: bytes = struct.pack(">HH", RSASSA, SHA256),
    **other: int | bytes,
) -> bytes:
    n = rsa_key().public_key().public_numbers().n if modulus is None else modulus
    unique = n.to_bytes(length or bits // 8, "big")
    detail = struct.pack(">HI", bits, exponent) + tpm2b(unique)
    return public_area(kind=RSA, scheme=scheme, detail=detail, **other)  # type: ignore[arg-type]


def ecc_public(
    point: tuple[int, int] | None = None,
    *,
    curve: int = 3,
    length: int = 32,
    kdf: bytes = NO_SYMMETRIC,
    scheme: bytes = struct.pack(">HH", ECDSA, SHA256),
    **other: int | bytes,
) -> bytes:
    if point is None:
        numbers = ec_key().public_key().public_numbers()
        point = (numbers.x, numbers.y)
    unique = b"".join(tpm2b(number.to_bytes(length, "big")) for number in point)
    detail = struct.pack(">H", curve) + kdf + unique
    return public_area(kind=ECC, scheme=scheme, detail=detail, **other)  # type: ignore[arg-type]


def _point(curve: ec.EllipticCurve) -> tuple[int, int]:
    numbers = ec.derive_private_key(0x1234567, curve).public_key().public_numbers()
    return numbers.x, numbers.y


def cases() -> Iterator[AkCase]:
    yield from _good()
    for name, make in (("RSA", rsa_public), ("ECC", ecc_public)):
        yield from _attributes(name, make)
        yield from _areas(name, make)
    yield from _schemes()
    yield from _strengths()
    yield from _structures()


def _good() -> Iterator[AkCase]:
    good = partial(AkCase, error="")
    p384, p521 = _point(ec.SECP384R1()), _point(ec.SECP521R1())
    sha384, sha512 = struct.pack(">HH", ECDSA, SHA384), struct.pack(">HH", ECDSA, SHA512)
    for comment, public in (
        ("RSA-2048", rsa_public()),
        ("RSA-3072", rsa_public((1 << 3072) - 1, bits=3072)),
        ("RSA-4096", rsa_public((1 << 4096) - 1, bits=4096)),
        ("RSA with the exponent written out", rsa_public(exponent=65537)),
        ("RSASSA with SHA-384", rsa_public(scheme=struct.pack(">HH", RSASSA, SHA384))),
        ("P-256", ecc_public()),
        ("P-384 with SHA-384", ecc_public(p384, curve=4, length=48, scheme=sha384)),
        ("P-521 with SHA-512", ecc_public(p521, curve=5, length=66, scheme=sha512)),
        ("with a policy", ecc_public(policy=bytes(range(32)))),
        ("noDA set", rsa_public(attributes=AK | NO_DA)),
        ("userWithAuth clear", rsa_public(attributes=AK & ~USER_WITH_AUTH)),
        ("name by SHA-384", ecc_public(name_alg=SHA384)),
    ):
        yield good(comment=comment, flags=("Strength",), public=public)


def _attributes(name: str, make: object) -> Iterator[AkCase]:
    assert callable(make)
    for attribute, bit in ATTRIBUTES.items():
        yield AkCase(
            comment=f"{name}: {attribute} clear",
            flags=("Attributes",),
            public=make(attributes=AK & ~bit),
            error=UNTRUSTED,
        )
    for comment, attributes in (
        ("decrypt set", AK | DECRYPT),
        ("a storage key: decrypt for sign", AK & ~ATTRIBUTES["sign"] | DECRYPT),
        ("a software key: sign alone", ATTRIBUTES["sign"] | USER_WITH_AUTH),
        (
            "imported: neither fixed nor its origin here",
            ATTRIBUTES["sign"] | ATTRIBUTES["restricted"],
        ),
        ("none", 0),
        ("all 32", (1 << 32) - 1),
    ):
        yield AkCase(
            comment=f"{name}: {comment}",
            flags=("Attributes",),
            public=make(attributes=attributes),
            error=UNTRUSTED,
        )


def _areas(name: str, make: object) -> Iterator[AkCase]:
    assert callable(make)
    for comment, error, public in (
        ("name by SHA-1", UNTRUSTED, make(name_alg=SHA1)),
        ("no name algorithm", FORMAT, make(name_alg=NULL)),
        ("name by SM3", FORMAT, make(name_alg=SM3)),
        ("wraps other keys with AES", UNTRUSTED, make(symmetric=AES_128_CFB)),
        ("a policy of 65 bytes", FORMAT, make(policy=bytes(65))),
    ):
        yield AkCase(comment=f"{name}: {comment}", flags=("Encoding",), public=public, error=error)


def _schemes() -> Iterator[AkCase]:
    def pair(scheme: int, digest: int = SHA256) -> bytes:
        return struct.pack(">HH", scheme, digest)

    null, ecdaa = struct.pack(">H", NULL), pair(ECDAA) + bytes(2)
    for comment, error, public in (
        ("RSA: no scheme", UNTRUSTED, rsa_public(scheme=null)),
        ("RSA: RSAPSS", UNTRUSTED, rsa_public(scheme=pair(RSAPSS))),
        ("RSA: OAEP", UNTRUSTED, rsa_public(scheme=pair(OAEP))),
        ("RSA: ECDSA", UNTRUSTED, rsa_public(scheme=pair(ECDSA))),
        ("RSA: SHA-1", UNTRUSTED, rsa_public(scheme=pair(RSASSA, SHA1))),
        ("RSA: no hash", UNTRUSTED, rsa_public(scheme=pair(RSASSA, NULL))),
        ("RSA: SM3", UNTRUSTED, rsa_public(scheme=pair(RSASSA, SM3))),
        ("ECC: no scheme", UNTRUSTED, ecc_public(scheme=null)),
        ("ECC: RSASSA", UNTRUSTED, ecc_public(scheme=pair(RSASSA))),
        ("ECC: ECSCHNORR", UNTRUSTED, ecc_public(scheme=pair(ECSCHNORR))),
        ("ECC: SM2", UNTRUSTED, ecc_public(scheme=pair(SM2))),
        ("ECC: ECDAA", UNTRUSTED, ecc_public(scheme=ecdaa)),
        ("ECC: SHA-1", UNTRUSTED, ecc_public(scheme=pair(ECDSA, SHA1))),
        ("ECC: SM3", UNTRUSTED, ecc_public(scheme=pair(ECDSA, SM3))),
    ):
        yield AkCase(comment=comment, flags=("Scheme",), public=public, error=error)


def _strengths() -> Iterator[AkCase]:
    x, y = _point(ec.SECP256R1())
    wide = (1 << 2048) - 1
    for comment, error, public in (
        ("RSA-1024", UNTRUSTED, rsa_public((1 << 1024) - 1, bits=1024)),
        ("RSA-2040", UNTRUSTED, rsa_public((1 << 2040) - 1, bits=2040)),
        ("2048 bits, the first zero", UNTRUSTED, rsa_public(wide >> 1)),
        ("2048 bits, 1024 of them zero", UNTRUSTED, rsa_public((1 << 1024) - 1)),
        ("keyBits above the modulus", FORMAT, rsa_public(wide, bits=3072, length=256)),
        ("keyBits below the modulus", FORMAT, rsa_public(wide, bits=1024, length=256)),
        ("keyBits no multiple of 8", FORMAT, rsa_public(wide, bits=2049, length=257)),
        ("RSA-8192", FORMAT, rsa_public((1 << 8192) - 1, bits=8192)),
        ("modulus zero", FORMAT, rsa_public(0)),
        ("modulus empty", FORMAT, rsa_public(0, bits=0)),
        ("exponent 1", FORMAT, rsa_public(wide, exponent=1)),
        ("exponent 2", FORMAT, rsa_public(wide, exponent=2)),
        ("exponent even", FORMAT, rsa_public(wide, exponent=65536)),
        ("point off its curve", FORMAT, ecc_public((x, y ^ 1))),
        ("point of zeros", FORMAT, ecc_public((0, 0))),
        ("point at infinity, empty", FORMAT, ecc_public((0, 0), length=0)),
        ("point of ones", FORMAT, ecc_public(((1 << 256) - 1, (1 << 256) - 1))),
        ("x not reduced", FORMAT, ecc_public((x + P256_PRIME, y), length=33)),
        ("P-256's point as P-384's", FORMAT, ecc_public((x, y), curve=4)),
        ("curve P-192", FORMAT, ecc_public((x, y), curve=1)),
        ("curve P-224", FORMAT, ecc_public((x, y), curve=2)),
        ("curve BN P-256", FORMAT, ecc_public((x, y), curve=0x10)),
        ("curve SM2 P-256", FORMAT, ecc_public((x, y), curve=0x20)),
        ("no curve", FORMAT, ecc_public((x, y), curve=0)),
    ):
        yield AkCase(comment=comment, flags=("Strength",), public=public, error=error)


def _structures() -> Iterator[AkCase]:
    good = ecc_public()
    rsae = struct.pack(">H", RSAES)
    pem = b"-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----\n"
    for comment, public in (
        ("empty", b""),
        ("size alone", b"\x00\x00"),
        ("without its size", good[2:]),
        ("size one too small", struct.pack(">H", len(good) - 3) + good[2:]),
        ("size one too large", struct.pack(">H", len(good) - 1) + good[2:]),
        ("a byte more", good + b"\0"),
        ("a byte more inside", tpm2b(good[2:] + b"\0")),
        ("a byte less inside", tpm2b(good[2:-1])),
        ("its size twice", tpm2b(good)),
        ("over 1024 bytes", tpm2b(bytes(1100))),
        ("a PEM", pem),
        ("RSAES, which has no hash", rsa_public(scheme=rsae)),
        ("a keyed hash", public_area(kind=KEYEDHASH, scheme=NO_SYMMETRIC, detail=bytes(34))),
        ("a symmetric cipher", public_area(kind=SYMCIPHER, scheme=NO_SYMMETRIC, detail=bytes(34))),
        ("an ECC key's structure called a symmetric cipher", good[:2] + b"\x00\x25" + good[4:]),
        ("an ECC key's structure called RSA", good[:2] + b"\x00\x01" + good[4:]),
    ):
        yield AkCase(comment=comment, flags=("Encoding",), public=public, error=FORMAT)
