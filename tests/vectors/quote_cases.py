"""Vectors: TPMS_ATTEST and TPMT_SIGNATURE, field by field, with and without the AK's own signature."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from hashlib import sha256

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from evidence_factory import (
    MASK,
    FixedTpm,
    SealedBatch,
    ec_key,
    ecdsa_signature,
    qualifying,
    request_number,
    rsa_key,
    seal,
    tpm2b,
)

from provider_proxy.evidence.model import HashAlg
from vectors.cases import Base, Case, flip

FORMAT = "EvidenceFormatError"
NOT_A_QUOTE = "NotAQuoteError"
SIGNATURE = "SignatureError"
QUALIFYING = "QualifyingDataError"
SELECTION = "PcrSelectionError"
DIGEST = "PcrDigestError"
NOT_COVERED = "MaskNotCoveredError"

# Where the fields of a TPMS_ATTEST with a 34-byte name and 32 bytes of extraData begin.
TYPE, SIGNER, EXTRA, CLOCK, RESET, RESTART = 4, 6, 42, 76, 84, 88
SAFE, FIRMWARE, COUNT, BANK, SELECT, BITMAP, PCR_DIGEST, END = 92, 93, 101, 105, 107, 108, 111, 145
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def base_case() -> Base:
    """The good answer that all of these are made from."""
    base = Base(seal(FixedTpm(), 8, seed=3), 5)
    assert len(base.quote.attest) == END
    return base


def attest_cases() -> Iterator[Case]:
    base = base_case()
    yield base.case("unchanged: what the next are made from", "Batch")
    yield from _unsigned(base)
    yield from _resigned_structures(base)
    yield from _resigned_nonces(base)
    yield from _resigned_selections(base)


def signature_cases() -> Iterator[Case]:
    base = base_case()
    yield base.case("unchanged: what the next are made from", "Batch")
    yield from _signatures(base)
    yield from _rsa_signatures()


def _unsigned(base: Base) -> Iterator[Case]:
    attest = base.quote.attest
    for comment, error, changed in (
        ("magic", NOT_A_QUOTE, flip(attest, 0)),
        ("magic, last byte", NOT_A_QUOTE, flip(attest, 3)),
        ("type", NOT_A_QUOTE, flip(attest, TYPE + 1)),
        ("size of qualifiedSigner", FORMAT, flip(attest, SIGNER)),
        ("qualifiedSigner's algorithm", SIGNATURE, flip(attest, SIGNER + 3)),
        ("qualifiedSigner", SIGNATURE, flip(attest, SIGNER + 20)),
        ("size of extraData", FORMAT, flip(attest, EXTRA)),
        ("extraData", SIGNATURE, flip(attest, EXTRA + 2)),
        ("clock", SIGNATURE, flip(attest, CLOCK + 7)),
        ("clock, highest bit", SIGNATURE, flip(attest, CLOCK, 0x80)),
        ("resetCount", SIGNATURE, flip(attest, RESET + 3)),
        ("restartCount", SIGNATURE, flip(attest, RESTART + 3)),
        ("safe, yes to no", SIGNATURE, flip(attest, SAFE)),
        ("safe, yes to 3", FORMAT, flip(attest, SAFE, 2)),
        ("firmwareVersion", SIGNATURE, flip(attest, FIRMWARE + 7)),
        ("count of selections, 1 to 0", SELECTION, flip(attest, COUNT + 3)),
        ("count of selections, 1 to 2", SELECTION, flip(attest, COUNT + 3, 3)),
        ("bank, to SHA-384", SIGNATURE, flip(attest, BANK + 1, 0x0B ^ 0x0C)),
        ("bank, to an unknown one", SELECTION, flip(attest, BANK)),
        ("sizeofSelect, 3 to 2", SELECTION, flip(attest, SELECT)),
        ("bitmap", SIGNATURE, flip(attest, BITMAP)),
        ("bitmap, PCR 23", SIGNATURE, flip(attest, BITMAP + 2, 0x80)),
        ("size of pcrDigest", FORMAT, flip(attest, PCR_DIGEST + 1)),
        ("pcrDigest", SIGNATURE, flip(attest, PCR_DIGEST + 2)),
        ("pcrDigest, last bit", SIGNATURE, flip(attest, END - 1)),
        ("a byte more", FORMAT, attest + b"\0"),
        ("a byte less", FORMAT, attest[:-1]),
        ("only the magic", FORMAT, attest[:4]),
    ):
        yield base.case(
            f"TPMS_ATTEST changed after signing: {comment}",
            "Unsigned",
            error,
            body=base.requoted(attest=changed),
        )


def _resigned_structures(base: Base) -> Iterator[Case]:
    attest = base.quote.attest
    for comment, error, changed in (
        ("magic 0", NOT_A_QUOTE, bytes(4) + attest[4:]),
        ("magic little-endian", NOT_A_QUOTE, attest[3::-1] + attest[4:]),
        ("type certify", NOT_A_QUOTE, attest[:TYPE] + b"\x80\x17" + attest[SIGNER:]),
        ("type time", NOT_A_QUOTE, attest[:TYPE] + b"\x80\x19" + attest[SIGNER:]),
        ("type NV", NOT_A_QUOTE, attest[:TYPE] + b"\x80\x14" + attest[SIGNER:]),
        ("with the size of a TPM2B_ATTEST", NOT_A_QUOTE, tpm2b(attest)),
        ("a byte more", FORMAT, attest + b"\0"),
        ("safe 2", FORMAT, attest[:SAFE] + b"\2" + attest[FIRMWARE:]),
        ("over 512 bytes", FORMAT, attest + bytes(400)),
    ):
        yield base.case(f"TPMS_ATTEST: {comment}", "Resigned", error, body=base.resigned(changed))


def _resigned_nonces(base: Base) -> Iterator[Case]:
    batch = base.batch
    bound = base64.b32decode(batch.qualifying.upper())
    for comment, extra in (
        ("the tenant's raw nonce", base.request.nonce),
        ("the root itself", batch.root),
        ("the root's hex, as Keylime would take it", batch.root.hex().encode()),
        ("the 20 bytes without base32", bound),
        ("base32 in capitals", batch.qualifying.upper()),
        ("base32 with padding", batch.qualifying + b"======"),
        ("base32 and a zero byte", batch.qualifying + b"\0"),
        ("all but the last character", batch.qualifying[:-1]),
        ("nothing", b""),
        ("SHA-256 of the root without label and size", sha256(batch.root).digest()),
        ("the root with another tree size", qualifying(batch.root, 4)),
        ("the leaf as the root of a tree of one", qualifying(_leaf_hash(batch, 5), 1)),
        ("another batch's", seal(count=8, seed=9).qualifying),
    ):
        attest = batch.tpm.attest(extra, batch.bank, batch.mask)
        yield base.case(f"extraData: {comment}", "Resigned", QUALIFYING, body=base.resigned(attest))
    long = batch.tpm.attest(bytes(129), batch.bank, batch.mask)
    yield base.case("extraData of 129 bytes", "Resigned", FORMAT, body=base.resigned(long))
    # A parent as a leaf: the quote is over a true root, and half its true size.
    parent = base.batch.tpm.attest(qualifying(batch.root, 4), batch.bank, batch.mask)
    merkle = base.results["merkle"]
    half = merkle | {
        "tree_size": 4,
        "leaf_index": merkle["leaf_index"] >> 1,
        "path": merkle["path"][1:],
    }
    yield base.case(
        "quoted with half the tree's size, a parent's place offered for the leaf",
        "Resigned Inclusion",
        QUALIFYING,
        body=base.resigned(parent, merkle=half),
    )


def _leaf_hash(batch: SealedBatch, number: int) -> bytes:
    return sha256(b"\x00" + batch.leaves[batch.places[number]]).digest()


def _resigned_selections(base: Base) -> Iterator[Case]:
    tpm, extra, attest = base.batch.tpm, base.batch.qualifying, base.quote.attest
    two = attest[:COUNT] + struct.pack(">I", 2) + attest[BANK:PCR_DIGEST] * 2 + attest[PCR_DIGEST:]
    none = attest[:COUNT] + struct.pack(">I", 0) + attest[PCR_DIGEST:]
    wide = attest[:SELECT] + b"\4" + attest[BITMAP:PCR_DIGEST] + b"\0" + attest[PCR_DIGEST:]
    narrow = attest[:SELECT] + b"\1" + attest[BITMAP : BITMAP + 1] + attest[PCR_DIGEST:]
    for comment, changed in (
        ("two banks", two),
        ("no bank", none),
        ("sizeofSelect 4", wide),
        ("sizeofSelect 1", narrow),
        ("a bank SM3", tpm.attest(extra, HashAlg.SHA256, MASK, bank=0x12)),
        ("bank SHA-1 beside SHA-256 values", tpm.attest(extra, HashAlg.SHA256, MASK, bank=4)),
        ("no PCR", tpm.attest(extra, HashAlg.SHA256, 0)),
        ("a PCR less than the values", tpm.attest(extra, HashAlg.SHA256, MASK, mask=0x81)),
        ("a PCR more than the values", tpm.attest(extra, HashAlg.SHA256, MASK, mask=0x93)),
        ("PCR 8 for 7", tpm.attest(extra, HashAlg.SHA256, MASK, mask=0x103)),
    ):
        yield base.case(
            f"selection: {comment}", "Resigned Selection", SELECTION, body=base.resigned(changed)
        )
    for comment, bank, mask in (
        ("a requested PCR less", HashAlg.SHA256, 0x81),
        ("other PCRs", HashAlg.SHA256, 0x7C),
        ("all but one of 24", HashAlg.SHA256, 0xFFFFFE),
        ("the SHA-1 bank", HashAlg.SHA1, MASK),
        ("the SHA-384 bank", HashAlg.SHA384, MASK),
    ):
        # Leaf, values and labels are honest about it: the tenant asked for more, and that is all.
        honest = base.resigned(tpm.attest(extra, bank, mask), pcrs=tpm.read(bank, mask))
        yield base.case(f"quoted {comment}", "Resigned Selection", NOT_COVERED, body=honest)
    values = b"".join(value for _, value in tpm.read(HashAlg.SHA256, MASK).values)
    for comment, digest in (
        ("of other values", sha256(values[::-1]).digest()),
        ("by SHA-1", HashAlg.SHA1.digest(values)),
        ("by SHA-384", HashAlg.SHA384.digest(values)),
        ("empty", b""),
        ("a byte short", sha256(values).digest()[:-1]),
        ("the values themselves, not hashed", values[:32]),
        ("hashed twice", sha256(sha256(values).digest()).digest()),
    ):
        changed = tpm.attest(extra, HashAlg.SHA256, MASK, pcr_digest=digest)
        yield base.case(f"pcrDigest {comment}", "Resigned", DIGEST, body=base.resigned(changed))


def _signatures(base: Base) -> Iterator[Case]:
    attest, good = base.quote.attest, base.quote.signature
    r, s = int.from_bytes(good[6:38], "big"), int.from_bytes(good[40:72], "big")
    other = FixedTpm(ec_key("another ak"))
    elsewhere = seal(count=8, seed=4).quote.signature
    for comment, error, changed in (
        ("r, first bit", SIGNATURE, flip(good, 6, 0x80)),
        ("r, last bit", SIGNATURE, flip(good, 37)),
        ("s, first bit", SIGNATURE, flip(good, 40, 0x80)),
        ("s, last bit", SIGNATURE, flip(good, 71)),
        ("r and s exchanged", SIGNATURE, ecdsa_signature(s, r)),
        ("r zero", SIGNATURE, ecdsa_signature(0, s)),
        ("s zero", SIGNATURE, ecdsa_signature(r, 0)),
        ("both zero", SIGNATURE, ecdsa_signature(0, 0)),
        ("both one", SIGNATURE, ecdsa_signature(1, 1)),
        ("both the order", SIGNATURE, ecdsa_signature(P256_ORDER, P256_ORDER)),
        ("r plus the order", SIGNATURE, ecdsa_signature(r + P256_ORDER, s, length=33)),
        ("s plus the order", SIGNATURE, ecdsa_signature(r, s + P256_ORDER, length=33)),
        ("r and s of 500 bytes", SIGNATURE, ecdsa_signature((1 << 4000) - 1, 1, length=500)),
        ("r and s empty", SIGNATURE, good[:4] + bytes(4)),
        ("over another quote", SIGNATURE, elsewhere),
        ("of another key", SIGNATURE, other.sign(attest)),
        ("of an RSA key", SIGNATURE, FixedTpm(rsa_key()).sign(attest)),
        ("over the quote's SHA-256", SIGNATURE, base.batch.tpm.sign(sha256(attest).digest())),
        ("with SHA-384, and says so", SIGNATURE, ecdsa_signature(r, s, hash_alg=0x0C)),
        ("with SHA-1", SIGNATURE, ecdsa_signature(r, s, hash_alg=0x04)),
        ("with an unknown hash", SIGNATURE, ecdsa_signature(r, s, hash_alg=0x12)),
        ("scheme ECDAA", SIGNATURE, b"\x00\x1a" + good[2:]),
        ("scheme ECSCHNORR", SIGNATURE, b"\x00\x1c" + good[2:]),
        ("scheme RSAPSS", SIGNATURE, b"\x00\x16" + good[2:]),
        ("scheme HMAC", SIGNATURE, b"\x00\x05" + good[2:]),
        ("scheme null", SIGNATURE, b"\x00\x10"),
        ("scheme RSASSA over ECDSA's numbers", FORMAT, b"\x00\x14" + good[2:]),
        ("a byte more", FORMAT, good + b"\0"),
        ("a byte less", FORMAT, good[:-1]),
        ("r over 512 bytes", FORMAT, good[:4] + tpm2b(bytes(513)) + tpm2b(bytes(32))),
        ("over 1024 bytes", FORMAT, good + bytes(1024)),
    ):
        yield base.case(
            f"ECDSA signature: {comment}", "Signature", error, body=base.requoted(signature=changed)
        )
    software = base.requoted(signature=other.sign(attest), ak_name=other.ak.name.hex())
    yield base.case(
        "ECDSA signature of another key, named", "Signature Key", SIGNATURE, body=software
    )
    twin = ecdsa_signature(r, P256_ORDER - s)
    yield base.case("ECDSA's other signature", "Malleable", body=base.requoted(signature=twin))
    padded = ecdsa_signature(r, s, length=48)
    yield base.case(
        "ECDSA with zeros before r and s", "Malleable", body=base.requoted(signature=padded)
    )


def _rsa_signatures() -> Iterator[Case]:
    base = Base(seal(FixedTpm(rsa_key()), 2, seed=5), 1)
    attest, good = base.quote.attest, base.quote.signature
    key, value = rsa_key(), good[6:]
    number, modulus = int.from_bytes(value, "big"), rsa_key().public_key().public_numbers().n
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=0)  # no salt: the same every time
    sha384 = key.sign(attest, padding.PKCS1v15(), hashes.SHA384())
    yield base.case("RSA, unchanged: what the next are made from", "Batch")
    for comment, error, changed in (
        ("first bit", SIGNATURE, flip(good, 6, 0x80)),
        ("last bit", SIGNATURE, flip(good, -1)),
        ("zero", SIGNATURE, good[:6] + bytes(256)),
        ("one", SIGNATURE, good[:6] + bytes(255) + b"\1"),
        ("the modulus", SIGNATURE, good[:6] + modulus.to_bytes(256, "big")),
        ("plus the modulus", SIGNATURE, good[:4] + tpm2b((number + modulus).to_bytes(257, "big"))),
        ("a zero before it", SIGNATURE, good[:4] + tpm2b(b"\0" + value)),
        ("a byte short", SIGNATURE, good[:4] + tpm2b(value[:-1])),
        ("empty", SIGNATURE, good[:4] + bytes(2)),
        ("PSS under RSASSA's name", SIGNATURE, good[:6] + key.sign(attest, pss, hashes.SHA256())),
        ("RSAPSS's name", SIGNATURE, b"\x00\x16" + good[2:]),
        ("by SHA-384, not said", SIGNATURE, good[:6] + sha384),
        ("by SHA-384, and says so", SIGNATURE, b"\x00\x14\x00\x0c" + good[4:6] + sha384),
        ("of an EC key", SIGNATURE, FixedTpm().sign(attest)),
        ("a byte more", FORMAT, good + b"\0"),
        ("a byte less", FORMAT, good[:-1]),
    ):
        yield base.case(
            f"RSASSA signature: {comment}",
            "Signature",
            error,
            body=base.requoted(signature=changed),
        )
    wanted = Base(
        SealedBatch(tpm=FixedTpm(rsa_key()), requests=(request_number(50_000, mask=0x93),), seed=6),
        0,
    )
    tpm = wanted.batch.tpm
    narrow = tpm.attest(wanted.batch.qualifying, HashAlg.SHA256, MASK)
    yield wanted.case(
        "RSA: quoted a requested PCR less", "Resigned Selection", NOT_COVERED,
        body=wanted.resigned(narrow, pcrs=tpm.read(HashAlg.SHA256, MASK)),
    )  # fmt: skip
