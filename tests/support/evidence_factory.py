"""Evidence for the tests and the vectors: fixed keys, seeded salts, the same bytes at every run.

Leaf, tree, proof, qualifying data, PCR blob and JSON are written here a second time, from the text of
the format and RFC 9162 with `hashlib` and `struct` alone. Neither `provider_proxy.evidence.inclusion` nor
`wire` nor merklelib has a part in it, so that what the package accepts is judged by another pen.
The keys are public: anybody may derive them again from their labels. Nobody may trust them.
"""

from __future__ import annotations

import base64
import json
import random
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from provider_proxy.evidence.model import (
    ClockState,
    HashAlg,
    InclusionProof,
    Nonce,
    PcrMask,
    PcrValues,
    Quote,
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
    pcrs_of,
)
from provider_proxy.evidence.policy import Policy, UnsafeAcceptAny
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.tpm_writer import encode_attest
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier
from provider_proxy.testing.soft_tpm import SoftTpm

# The first primes of 1024 bits after SHA-256 expanded from "provider-proxy/test-key/p" and ".../q".
RSA_P = int(
    "f9d7f8fac2836f5f0ef39d6dc74abb32a3fa77648db7e484b94f69d1b55c1f2e32dbbaad60214e3f61b0f3b5b5433b2c"
    "94c97951c51feb92842cd2197a4138fdee1af2f749e0445ea8c1114d969c310adcaf6cc8c00eceb3283c8c6cc44bd55b"
    "81b3c6a38ab326d6e7846c82997644654e5b8a0667ffef2a0b643434f5b33917",
    16,
)
RSA_Q = int(
    "c82aac272b872affc7b17e67cbd73e2177eafbcc9de4b40c4ff5d3b6bd1754f75cfeeea0c729fe6944b4e846ac2c3e21"
    "5a03ecd86f976099b18cc52214d451ecb7ccd9bb418dd22c87cd98b74356f17986a49920264a17be5cc62878aae57e12"
    "15dfe2af3c238f218543c28c543ca224947cf5a92fc35c9b4ba832977ac8a0ad",
    16,
)

CLOCK = ClockState(reset_count=7, restart_count=2, clock_ms=123_456_789)
PCRS = {0: b"firmware", 1: b"settings", 4: b"loader", 7: b"secure boot", 10: b"ima", 23: b"last"}
MASK = 0x83  # PCRs 0, 1, 7
VM = uuid.UUID("0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b")
OTHER_VM = uuid.UUID("6f1d2c3b-4a5e-4c7d-8e9f-0a1b2c3d4e5f")
QUOTE_MS = 188.25
_CRYPTO_HASH = {HashAlg.SHA256: hashes.SHA256(), HashAlg.SHA384: hashes.SHA384()}


@cache
def ec_key(label: str = "ak") -> ec.EllipticCurvePrivateKey:
    """The P-256 test key of a label."""
    secret = int.from_bytes(sha256(b"provider-proxy/test-key/" + label.encode()).digest(), "big")
    return ec.derive_private_key(secret, ec.SECP256R1())


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    """The RSA-2048 test key."""
    e = 65537
    d = pow(e, -1, (RSA_P - 1) * (RSA_Q - 1))
    return rsa.RSAPrivateNumbers(
        p=RSA_P,
        q=RSA_Q,
        d=d,
        dmp1=rsa.rsa_crt_dmp1(d, RSA_P),
        dmq1=rsa.rsa_crt_dmq1(d, RSA_Q),
        iqmp=rsa.rsa_crt_iqmp(RSA_P, RSA_Q),
        public_numbers=rsa.RSAPublicNumbers(e, RSA_P * RSA_Q),
    ).private_key()


def tpm2b(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


class FixedTpm(SoftTpm):
    """A `SoftTpm` that signs the same bytes with the same signature and whose clock stands still.

    Args:
        key: a P-256 or RSA-2048 private key.
        hash_alg: of the signing scheme; SHA-384 with the RSA key only.
    """

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
        *,
        hash_alg: HashAlg = HashAlg.SHA256,
        clock: ClockState = CLOCK,
    ) -> None:
        self.key = key or ec_key()
        self.hash_alg = hash_alg
        super().__init__(key=self.key, pcrs=PCRS, clock=clock)
        if hash_alg is not HashAlg.SHA256:
            sha256_scheme, own_scheme = (
                struct.pack(">HH", 0x14, 0x0B),
                struct.pack(">HH", 0x14, hash_alg),
            )
            self.ak_public = self.ak_public.replace(sha256_scheme, own_scheme, 1)
            self.ak = parse_ak(self.ak_public)

    def attest(self, qualifying: bytes, bank: HashAlg, mask: int, /, **other: Any) -> bytes:
        """A TPMS_ATTEST as this TPM would write it; `other` replaces fields of `encode_attest`."""
        values = b"".join(digest for _, digest in self.read(bank, mask).values)
        fields: dict[str, Any] = {
            "qualifying": qualifying,
            "clock": self.clock,
            "bank": bank,
            "mask": mask,
            "pcr_digest": self.hash_alg.digest(values),
        }
        return encode_attest(**(fields | other))

    def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        attest = self.attest(qualifying, bank, mask)
        return Quote(attest=attest, signature=self.sign(attest), pcrs=self.read(bank, mask))

    def sign(self, data: bytes) -> bytes:
        digest = _CRYPTO_HASH[self.hash_alg]
        if isinstance(self.key, rsa.RSAPrivateKey):
            value = self.key.sign(data, padding.PKCS1v15(), digest)
            return struct.pack(">HH", 0x14, self.hash_alg) + tpm2b(value)
        der = self.key.sign(data, ec.ECDSA(digest, deterministic_signing=True))
        return ecdsa_signature(*decode_dss_signature(der))


def ecdsa_signature(r: int, s: int, *, hash_alg: int = HashAlg.SHA256, length: int = 32) -> bytes:
    """A TPMT_SIGNATURE of these two numbers."""
    return struct.pack(">HH", 0x18, hash_alg) + b"".join(
        tpm2b(number.to_bytes(length, "big")) for number in (r, s)
    )


def request_number(
    number: int,
    *,
    mask: int = MASK,
    bank: HashAlg = HashAlg.SHA256,
    vm: uuid.UUID | None = None,
) -> QuoteRequest:
    """A request with a nonce that only its number decides."""
    digest = sha256(b"nonce %d" % number).digest()
    nonce = base64.urlsafe_b64encode(digest)[:32]
    return QuoteRequest(nonce=Nonce(nonce), mask=PcrMask(mask), bank=bank, vm=vm)


def claims_about(vm: uuid.UUID = VM) -> bytes:
    return json.dumps(
        {"vm": str(vm), "host": "11111111-2222-4333-8444-555555555555", "ek": ["000b" + "ab" * 32]},
        separators=(",", ":"),
    ).encode()


def leaf_bytes(request: QuoteRequest, salt: bytes, claims: bytes | None) -> bytes:
    """leaf_input of evidence format 1."""
    return b"".join(
        (
            b"provider-proxy/leaf/1\x00",
            salt,
            bytes([len(request.nonce)]),
            request.nonce,
            struct.pack(">IH", request.mask, request.bank),
            sha256(claims or b"").digest(),
        )
    )


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """MTH of RFC 9162, section 2.1.1, as it stands there."""
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return sha256(b"\x01" + tree_root(leaves[:half]) + tree_root(leaves[half:])).digest()


def tree_path(index: int, leaves: Sequence[bytes]) -> tuple[bytes, ...]:
    """PATH of RFC 9162, section 2.1.3.1, as it stands there."""
    if len(leaves) == 1:
        return ()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    if index < half:
        return (*tree_path(index, leaves[:half]), tree_root(leaves[half:]))
    return (*tree_path(index - half, leaves[half:]), tree_root(leaves[:half]))


def qualifying(root: bytes, size: int) -> bytes:
    """qualifyingData of evidence format 1."""
    bound = sha256(b"provider-proxy/root/1\x00" + struct.pack(">Q", size) + root).digest()
    return base64.b32encode(bound[:20]).lower()


def pcr_blob(pcrs: PcrValues) -> bytes:
    """What `tpm2_quote -o` writes on a little-endian machine."""
    selection = struct.pack("<HB", pcrs.bank, 3) + pcrs.mask.to_bytes(3, "little") + bytes(2)
    blob = struct.pack("<I", 1) + selection + bytes(8 * 15)
    digests = [value for _, value in pcrs.values]
    lists = [digests[at : at + 8] for at in range(0, len(digests), 8)]
    blob += struct.pack("<I", len(lists))
    for entries in lists:
        blob += struct.pack("<I", len(entries))
        for at in range(8):
            value = entries[at] if at < len(entries) else b""
            blob += struct.pack("<H64s", len(value), value)
    return blob


def quote_text(attest: bytes, signature: bytes, blob: bytes) -> str:
    return "r" + ":".join(base64.b64encode(part).decode() for part in (attest, signature, blob))


def envelope(results: Mapping[str, object]) -> bytes:
    return json.dumps(
        {"code": 200, "status": "Success", "results": results}, separators=(",", ":")
    ).encode()


@dataclass(frozen=True, kw_only=True)
class SealedBatch:
    """A batch of one TPM, sealed with salts, padding and order that only `seed` decides.

    Attributes:
        claims: for each request the reply's claims; None for no claim anywhere.
        extra_mask: PCRs that are quoted although nobody in this batch asked for them.
    """

    tpm: FixedTpm
    requests: tuple[QuoteRequest, ...]
    claims: tuple[bytes | None, ...] | None = None
    extra_mask: int = 0
    seed: int = 1

    @cached_property
    def salts(self) -> tuple[bytes, ...]:
        rng = random.Random(f"salts {self.seed}")
        return tuple(rng.randbytes(16) for _ in self.requests)

    @property
    def size(self) -> int:
        return 1 << max(1, (len(self.requests) - 1).bit_length())

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The leaf index of each request."""
        order = list(range(self.size))
        random.Random(f"order {self.seed}").shuffle(order)
        return tuple(order[: len(self.requests)])

    @cached_property
    def leaves(self) -> tuple[bytes, ...]:
        rng = random.Random(f"padding {self.seed}")
        leaves = [rng.randbytes(32) for _ in range(self.size)]
        for number, request in enumerate(self.requests):
            leaves[self.places[number]] = leaf_bytes(
                request, self.salts[number], self.claims_of(number)
            )
        return tuple(leaves)

    @cached_property
    def root(self) -> bytes:
        return tree_root(self.leaves)

    @property
    def qualifying(self) -> bytes:
        return qualifying(self.root, self.size)

    @property
    def bank(self) -> HashAlg:
        return self.requests[0].bank

    @property
    def mask(self) -> int:
        mask = self.extra_mask
        for request in self.requests:
            mask |= request.mask
        return mask

    @cached_property
    def quote(self) -> Quote:
        return self.tpm.quote(self.qualifying, self.bank, self.mask)

    def claims_of(self, number: int) -> bytes | None:
        return self.claims[number] if self.claims is not None else None

    def proof(self, number: int) -> InclusionProof:
        index = self.places[number]
        return InclusionProof(
            leaf_index=index,
            tree_size=self.size,
            path=tree_path(index, self.leaves),
            salt=self.salts[number],
        )

    def results(self, number: int, *, quote: str | None = None) -> dict[str, Any]:
        """The `results` of one request's answer, to be changed at will."""
        own, proof = self.quote, self.proof(number)
        results: dict[str, Any] = {
            "format": 1,
            "quote": quote or quote_text(own.attest, own.signature, pcr_blob(own.pcrs)),
            "bank": own.pcrs.bank.label,
            "hash_alg": self.tpm.hash_alg.label,
            "enc_alg": "ecc" if self.tpm.ak.sign_alg == "ecdsa" else "rsa",
            "sign_alg": self.tpm.ak.sign_alg,
            "mask": f"{own.pcrs.mask:#x}",
            "ak_name": self.tpm.ak.name.hex(),
            "merkle": {
                "leaf_index": proof.leaf_index,
                "tree_size": proof.tree_size,
                "path": [node.hex() for node in proof.path],
                "salt": proof.salt.hex(),
            },
            "timing": {"queued_ms": 0.0, "quote_ms": QUOTE_MS},
        }
        claims = self.claims_of(number)
        if claims is not None:
            results["claims"] = base64.b64encode(claims).decode()
        return results

    def body(self, number: int) -> bytes:
        """One request's answer."""
        return envelope(self.results(number))


def seal(
    tpm: FixedTpm | None = None,
    count: int = 8,
    *,
    mask: int = MASK,
    bank: HashAlg = HashAlg.SHA256,
    extra_mask: int = 0,
    seed: int = 1,
) -> SealedBatch:
    """A batch of `count` alike requests without claims."""
    return SealedBatch(
        tpm=tpm or FixedTpm(),
        requests=tuple(
            request_number(seed * 10_000 + n, mask=mask, bank=bank) for n in range(count)
        ),
        extra_mask=extra_mask,
        seed=seed,
    )


def seal_with_claims(tpm: FixedTpm | None = None, *, claims: bytes | None = None) -> SealedBatch:
    """A batch of three; only number 1 asked for claims about `VM`, and got these."""
    requests = (
        request_number(20_000),
        request_number(20_001, vm=VM),
        request_number(20_002),
    )
    answer = claims_about() if claims is None else claims
    return SealedBatch(
        tpm=tpm or FixedTpm(), requests=requests, claims=(None, answer, None), seed=2
    )


def challenge_of(
    request: QuoteRequest, *, baseline: ClockState | None = None
) -> tuple[Challenge, MemoryHistory]:
    """What a tenant has that asked this just now, at second 0 of its clock."""
    history = MemoryHistory(baseline)
    history.open(request.nonce)
    return Challenge(request=request, made_at_s=0.0, baseline=baseline), history


def judge(
    body: bytes,
    request: QuoteRequest,
    ak_public: bytes,
    *,
    policy: Policy | None = None,
    baseline: ClockState | None = None,
    age_s: float = 0.5,
) -> VerifiedQuote:
    """A tenant's verdict, its AK included. Raises: VerificationError."""
    challenge, history = challenge_of(request, baseline=baseline)
    verifier = Verifier(policy or UnsafeAcceptAny(), max_age_s=60.0)
    host = TrustedHost(ak=parse_ak(ak_public))
    return verifier.verify(body, challenge, host, history, now_s=age_s)


def expected_pcrs(tpm: SoftTpm, request: QuoteRequest) -> dict[int, bytes]:
    """What a tenant must get to see: its own PCRs and no others."""
    values = dict(tpm.read(request.bank, request.mask).values)
    assert set(values) == set(pcrs_of(request.mask))
    return values
