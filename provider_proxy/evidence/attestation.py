"""From untrusted bytes to what a TPM signed: TPMS_ATTEST, TPMT_SIGNATURE, PCR digest.

No TSS library: a tenant verifies with `cryptography` alone. This module knows no nonces or trees.
Source: TPM 2.0 Library Part 2, sections 10.12.12 (TPMS_ATTEST) and 11.3.4 (TPMT_SIGNATURE).
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from provider_proxy.errors import (
    EvidenceFormatError,
    NotAQuoteError,
    PcrDigestError,
    PcrSelectionError,
    SignatureError,
)
from provider_proxy.evidence.model import AttestationKey, ClockState, HashAlg, PcrValues, Quote
from provider_proxy.evidence.tpm_keys import MAX_KEY_PART_BYTES, SIGN_ALGS
from provider_proxy.evidence.tpm_reader import Reader

TPM_GENERATED = 0xFF544347  # "\xffTCG": a restricted key never signs foreign data that starts so
TPM_ST_ATTEST_QUOTE = 0x8018
MAX_ATTEST_BYTES = 512  # 145 in practice; a 64-byte digest and name make 250
MAX_SIGNATURE_BYTES = 1024
MAX_TPM2B_BYTES = 128
PCR_SELECT_BYTES = 3  # PCRs 0 to 23

_CRYPTO_HASH: dict[HashAlg, hashes.HashAlgorithm] = {
    HashAlg.SHA256: hashes.SHA256(),
    HashAlg.SHA384: hashes.SHA384(),
    HashAlg.SHA512: hashes.SHA512(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attest:
    """A TPMS_ATTEST of type quote, read but not yet known to be signed.

    Attributes:
        extra_data: the qualifyingData of TPM2_Quote.
        bank, mask: the one PCR selection of the quote; `mask` is 0 for an empty one.
    """

    extra_data: bytes
    clock: ClockState
    clock_safe: bool
    firmware_version: int
    bank: HashAlg
    mask: int
    pcr_digest: bytes


def parse_attest(data: bytes) -> Attest:
    """Read a TPMS_ATTEST.

    Raises:
        NotAQuoteError: magic or type are not those of a quote.
        PcrSelectionError: not exactly one bank of 24 PCRs.
        EvidenceFormatError: any other structure or size.
    """
    if len(data) > MAX_ATTEST_BYTES:
        raise EvidenceFormatError("TPMS_ATTEST is too long")
    read = Reader(data, "TPMS_ATTEST")
    if read.uint(4) != TPM_GENERATED:
        raise NotAQuoteError("the signed bytes do not come from inside a TPM (magic)")
    if read.uint(2) != TPM_ST_ATTEST_QUOTE:
        raise NotAQuoteError("the signed bytes are not a quote (type)")
    read.sized(MAX_TPM2B_BYTES)  # qualifiedSigner: depends on the hierarchy, says nothing to us
    extra_data = read.sized(MAX_TPM2B_BYTES)
    clock_ms, resets, restarts, safe = read.uint(8), read.uint(4), read.uint(4), read.uint(1)
    if safe > 1:
        raise EvidenceFormatError("TPMS_CLOCK_INFO.safe is neither 0 nor 1")
    firmware_version = read.uint(8)
    if read.uint(4) != 1:
        raise PcrSelectionError("the quote does not select exactly one PCR bank")
    bank = _known_bank(read.uint(2))
    if read.uint(1) != PCR_SELECT_BYTES:
        raise PcrSelectionError("the quote's PCR selection is not a bitmap of 24 PCRs")
    mask = int.from_bytes(read.take(PCR_SELECT_BYTES), "little")
    pcr_digest = read.sized(MAX_TPM2B_BYTES)
    read.end()
    return Attest(
        extra_data=extra_data,
        clock=ClockState(reset_count=resets, restart_count=restarts, clock_ms=clock_ms),
        clock_safe=bool(safe),
        firmware_version=firmware_version,
        bank=bank,
        mask=mask,
        pcr_digest=pcr_digest,
    )


def _known_bank(alg: int) -> HashAlg:
    try:
        return HashAlg(alg)
    except ValueError:
        raise PcrSelectionError(f"the quote is over an unknown bank {alg:#06x}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A TPMT_SIGNATURE, read but not yet checked. `value` is what `cryptography` takes."""

    sign_alg: str
    hash_alg: HashAlg
    value: bytes


def parse_signature(data: bytes) -> Signature:
    """Read a TPMT_SIGNATURE of ECDSA or RSASSA.

    Raises:
        SignatureError: another scheme, or a hash that we do not accept.
        EvidenceFormatError: any other structure or size.
    """
    if len(data) > MAX_SIGNATURE_BYTES:
        raise EvidenceFormatError("TPMT_SIGNATURE is too long")
    read = Reader(data, "TPMT_SIGNATURE")
    sign_alg = SIGN_ALGS.get(read.uint(2))
    if sign_alg is None:
        raise SignatureError("the signature is neither ECDSA nor RSASSA")
    hash_id = read.uint(2)
    if hash_id not in _CRYPTO_HASH:
        raise SignatureError("the signature's hash is not SHA-256, SHA-384 or SHA-512")
    if sign_alg == "ecdsa":
        r = int.from_bytes(read.sized(MAX_KEY_PART_BYTES), "big")
        s = int.from_bytes(read.sized(MAX_KEY_PART_BYTES), "big")
        value = encode_dss_signature(r, s)
    else:
        value = read.sized(MAX_KEY_PART_BYTES)
    read.end()
    return Signature(sign_alg=sign_alg, hash_alg=HashAlg(hash_id), value=value)


def check_signature(attest: bytes, signature: Signature, ak: AttestationKey) -> None:
    """Check that `ak` signed these bytes, with its own scheme and hash.

    Raises:
        SignatureError: it did not.
    """
    if signature.sign_alg != ak.sign_alg or signature.hash_alg != ak.signature_hash:
        raise SignatureError("the signature's scheme or hash is not the trusted AK's")
    digest = _CRYPTO_HASH[signature.hash_alg]
    try:
        if isinstance(ak.public_key, rsa.RSAPublicKey):
            ak.public_key.verify(signature.value, attest, padding.PKCS1v15(), digest)
        else:
            ak.public_key.verify(signature.value, attest, ec.ECDSA(digest))
    except InvalidSignature:
        raise SignatureError("the trusted AK did not sign this quote") from None


def check_quote(quote: Quote, ak: AttestationKey) -> Attest:
    """Check that `ak` signed this quote and that the values beside it are the signed ones.

    Does not check: what the quote is over, and that it covers what was asked for.

    Raises:
        NotAQuoteError, SignatureError, EvidenceFormatError: it is not a quote of this key's.
        PcrSelectionError, PcrDigestError: the values are not those of the quote.
    """
    attest = parse_attest(quote.attest)
    check_signature(quote.attest, parse_signature(quote.signature), ak)
    check_pcrs(attest, quote.pcrs, ak.signature_hash)
    return attest


def check_pcrs(attest: Attest, pcrs: PcrValues, signature_hash: HashAlg) -> None:
    """Check that these values, of this bank, are what the quote's digest is over.

    Raises:
        PcrSelectionError: the values claim another bank or other PCRs than were signed.
        PcrDigestError: the values are not the signed ones.
    """
    if pcrs.bank != attest.bank or pcrs.mask != attest.mask:
        raise PcrSelectionError("the PCR values claim a selection that was not signed")
    # TPM2_Quote digests with the hash of the signing scheme, whatever the bank (Part 3, 18.4).
    digest = signature_hash.digest(pcrs.concatenated())
    if not hmac.compare_digest(digest, attest.pcr_digest):
        raise PcrDigestError("the PCR values are not the ones that were signed")
