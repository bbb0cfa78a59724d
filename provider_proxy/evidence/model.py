"""The values that travel between the modules: frozen, checked once when made, without behaviour.

Nothing here reads untrusted bytes: `wire` and `attestation` do that and build these values.
Every class checks its own invariants in `__post_init__`, so that a value that exists is a valid one.
"""

from __future__ import annotations

import enum
import hashlib
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NewType, Protocol

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from provider_proxy.errors import EvidenceFormatError, ParameterError

Nonce = NewType("Nonce", bytes)
"""A tenant's nonce: its ASCII characters, see `parse_nonce`."""
PcrMask = NewType("PcrMask", int)
"""Bit n stands for PCR n; non-zero, PCRs 0 to 23."""
LeafHash = NewType("LeafHash", bytes)
"""32 bytes: SHA-256(0x00 || leaf input)."""
RootHash = NewType("RootHash", bytes)
"""32 bytes: the root of a batch's Merkle tree."""
AkName = NewType("AkName", bytes)
"""A TPM object name: u16 hash algorithm, then the digest of the public area."""

MIN_NONCE_CHARS = 16
MAX_NONCE_CHARS = 64  # what Keylime's agents take; also bounds the u8 length in the leaf
NONCE_RE = re.compile(r"[A-Za-z0-9._~-]{16,64}", re.ASCII)
PCR_COUNT = 24  # PC Client TPMs have PCRs 0 to 23
ALL_PCRS = (1 << PCR_COUNT) - 1
MASK_RE = re.compile(r"0x[0-9a-fA-F]{1,8}", re.ASCII)
SALT_BYTES = 16
HASH_BYTES = 32
_HASH_LENGTH = frozenset((HASH_BYTES,))
IMA_MASK = 1 << 10  # the PCR that brings the IMA list
BOOT_MASK = 0xFBFF  # PCRs 0 to 9 and 11 to 15 bring the firmware's: Keylime's policies read them
MAX_TREE_SIZE = 1 << 20  # far above any batch (max_leaves is at most 65,536); bounds the path to 20
MAX_CLAIMS_BYTES = 16 * 1024  # a VM has a handful of EKs; one claim is about 500 bytes


class Hash(Protocol):
    """A hash object of hashlib."""

    def digest(self) -> bytes: ...

    def hexdigest(self) -> str: ...


class HashAlg(enum.IntEnum):
    """A PCR bank or digest algorithm, by its TPM_ALG_ID (TPM 2.0 Part 2, table 9)."""

    SHA1 = 0x0004
    SHA256 = 0x000B
    SHA384 = 0x000C
    SHA512 = 0x000D

    @property
    def label(self) -> str:
        """Keylime's name of it, "sha256" for example."""
        return self.name.lower()

    @property
    def digest_bytes(self) -> int:
        return _DIGEST_BYTES[self]

    @property
    def hasher(self) -> Callable[[bytes], Hash]:
        """hashlib's own, for loops in which each call counts."""
        return _HASHERS[self]

    def digest(self, data: bytes) -> bytes:
        return _HASHERS[self](data).digest()

    @classmethod
    def from_label(cls, label: str) -> HashAlg:
        """Raises: KeyError where the label is unknown."""
        return _BY_LABEL[label]


_DIGEST_BYTES = {HashAlg.SHA1: 20, HashAlg.SHA256: 32, HashAlg.SHA384: 48, HashAlg.SHA512: 64}
_HASHERS: Mapping[HashAlg, Callable[[bytes], Hash]] = {
    HashAlg.SHA1: hashlib.sha1,
    HashAlg.SHA256: hashlib.sha256,
    HashAlg.SHA384: hashlib.sha384,
    HashAlg.SHA512: hashlib.sha512,
}
_BY_LABEL = {alg.label: alg for alg in HashAlg}


def parse_nonce(text: str) -> Nonce:
    """Check a nonce as a tenant writes it.

    Raises:
        ParameterError: not 16 to 64 characters of `[A-Za-z0-9._~-]`.
    """
    if not NONCE_RE.fullmatch(text):
        raise ParameterError("nonce", "must be 16 to 64 characters of A-Z a-z 0-9 . _ ~ -")
    return Nonce(text.encode("ascii"))


def parse_mask(text: str) -> PcrMask:
    """Check a PCR mask as a tenant writes it: `0x` and hex digits.

    Without `0x` it is refused: of Keylime's two agents one reads `10` as hex, the other as decimal.

    Raises:
        ParameterError: no 0x, zero, or a bit above PCR 23.
    """
    if not MASK_RE.fullmatch(text):
        raise ParameterError("mask", "must be 0x and one to eight hex digits")
    return check_mask(int(text, 16))


def check_mask(value: int) -> PcrMask:
    """Raises: ParameterError where no bit, or a bit above PCR 23, is set."""
    if value <= 0 or value > ALL_PCRS:
        raise ParameterError("mask", "must name at least one PCR, and only PCRs 0 to 23")
    return PcrMask(value)


def parse_bank(text: str) -> HashAlg:
    """Raises: ParameterError where the bank is unknown."""
    try:
        return HashAlg.from_label(text)
    except KeyError:
        raise ParameterError("bank", "must be one of " + ", ".join(_BY_LABEL)) from None


def pcrs_of(mask: int) -> tuple[int, ...]:
    """The PCR numbers in a mask, ascending."""
    return tuple(pcr for pcr in range(PCR_COUNT) if mask >> pcr & 1)


def mask_of(pcrs: Iterable[int]) -> int:
    """The mask of some PCR numbers; 0 for none."""
    mask = 0
    for pcr in pcrs:
        mask |= 1 << pcr
    return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteRequest:
    """What one tenant asks: the part that goes into the leaf, and how to serve it.

    Attributes:
        vm: whose link to the host is asked for; None for no VM.
        ima_ml_entry: first entry of the IMA list that is wanted, from 0.
        timeout_ms: how long the tenant is ready to wait.
        logs: False where the answer must not bring a log, whatever the mask.
    """

    nonce: Nonce
    mask: PcrMask
    bank: HashAlg = HashAlg.SHA256
    vm: uuid.UUID | None = None
    ima_ml_entry: int = 0
    timeout_ms: int | None = None
    logs: bool = True

    @property
    def wants_ima(self) -> bool:
        """True where the answer may bring the IMA list."""
        return self.logs and bool(self.mask & IMA_MASK)

    @property
    def wants_boot_log(self) -> bool:
        """True where the answer may bring the firmware's log."""
        return self.logs and bool(self.mask & BOOT_MASK)

    def __post_init__(self) -> None:
        if not MIN_NONCE_CHARS <= len(self.nonce) <= MAX_NONCE_CHARS:
            raise ParameterError("nonce", "must be 16 to 64 bytes")
        check_mask(self.mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """The tenant that asks, as the server identified it.

    Attributes:
        name: tells tenants apart; requests of one name take turns with those of others.
        pcr_allow: mask of the PCRs that this tenant may see.
        rate, burst: requests a second, and how many may come at once.
        max_inflight: requests that may wait at once.
        vms: VMs that it may ask about.
    """

    name: str
    pcr_allow: int
    rate: float = math.inf
    burst: float = math.inf
    max_inflight: float = math.inf
    vms: frozenset[uuid.UUID] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class InclusionProof:
    """Where a leaf stands in a batch's tree.

    Attributes:
        path: sibling hashes from the leaf upwards, 32 bytes each.
        salt: 16 bytes that the proxy drew for this leaf alone.
    """

    leaf_index: int
    tree_size: int
    path: tuple[bytes, ...]
    salt: bytes

    def __post_init__(self) -> None:
        if not 1 <= self.tree_size <= MAX_TREE_SIZE:
            raise EvidenceFormatError(f"tree_size is not in 1..{MAX_TREE_SIZE}")
        if not 0 <= self.leaf_index < self.tree_size:
            raise EvidenceFormatError("leaf_index is outside the tree")
        if len(self.salt) != SALT_BYTES:
            raise EvidenceFormatError(f"the salt is not {SALT_BYTES} bytes")
        if not _HASH_LENGTH.issuperset(map(len, self.path)):
            raise EvidenceFormatError(f"a path entry is not {HASH_BYTES} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class PcrValues:
    """PCR values of one bank, as they are *claimed*: nothing here is signed.

    Attributes:
        values: (PCR number, digest), ascending.
    """

    bank: HashAlg
    values: tuple[tuple[int, bytes], ...]

    def __post_init__(self) -> None:
        numbers = [pcr for pcr, _ in self.values]
        if numbers != sorted(set(numbers)) or any(not 0 <= n < PCR_COUNT for n in numbers):
            raise EvidenceFormatError("PCR numbers are not ascending within 0 to 23")
        if any(len(digest) != self.bank.digest_bytes for _, digest in self.values):
            raise EvidenceFormatError("a PCR value does not have the length of its bank's digest")

    @property
    def mask(self) -> int:
        return mask_of(pcr for pcr, _ in self.values)

    def concatenated(self) -> bytes:
        """What TPM2_Quote hashes: the values in ascending order (TPM 2.0 Part 3, section 18.4)."""
        return b"".join(digest for _, digest in self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """One TPM2_Quote: TPMS_ATTEST and TPMT_SIGNATURE as the TPM wrote them, and the values read."""

    attest: bytes
    signature: bytes
    pcrs: PcrValues


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLogs:
    """The host's unsigned logs; only a replay to a signed PCR gives them meaning.

    Attributes:
        ima: text of the IMA list from entry `ima_entry` on; None where not sent.
        uefi: the firmware's event log; None where not sent.
        ima_missing, uefi_missing: why the host says that it has no such log: "absent", for example.
    """

    ima: str | None = None
    ima_entry: int = 0
    uefi: bytes | None = None
    ima_missing: str | None = None
    uefi_missing: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds that a request waited for its batch, and that the quote took; unsigned."""

    queued_ms: float
    quote_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A proxy's answer, parsed and bounded. Nothing in it is trusted before `Verifier.verify`.

    Attributes:
        claims: the exact bytes that were hashed into the leaf; None where the reply has none.
        hash_alg, enc_alg, sign_alg, mask, bank, ak_name: labels; the verifier compares them with
            what was signed and takes nothing from them.
    """

    quote: Quote
    proof: InclusionProof
    bank: HashAlg
    mask: PcrMask
    ak_name: AkName
    hash_alg: HashAlg
    enc_alg: str
    sign_alg: str
    claims: bytes | None = None
    boottime: int | None = None
    logs: HostLogs = field(default_factory=HostLogs)
    timing: Timing | None = None


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ClockState:
    """The TPM's own time, in the order in which states are compared.

    Attributes:
        reset_count: TPM resets (reboots of the host).
        restart_count: TPM restarts and resumes since then.
        clock_ms: milliseconds that the TPM has been powered.
    """

    reset_count: int
    restart_count: int
    clock_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationKey:
    """A public AK that signatures are checked with. Made by `attestation.parse_ak`.

    Attributes:
        name: the TPM's name of the key; empty where only a PEM was given (unsafe).
        signature_hash: the one digest algorithm that its signatures may use.
        sign_alg: "ecdsa" or "rsassa".
    """

    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
    name: AkName
    sign_alg: str
    signature_hash: HashAlg

    @property
    def enc_alg(self) -> str:
        """Keylime's name of the key's kind: "ecc" or "rsa"."""
        return "rsa" if isinstance(self.public_key, rsa.RSAPublicKey) else "ecc"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedHost:
    """A host that a tenant trusts: by its AK, and by nothing else."""

    ak: AttestationKey
    label: str = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedQuote:
    """What the TPM signed for this request. Only `Verifier.verify` and, of a vTPM, `deep` make one.

    Attributes:
        pcrs: the *requested* PCRs and their values in the requested bank.
        clock: the TPM's counters; `clock_safe` is False where the TPM lost power uncleanly.
        was_reset: True where the host rebooted since the last state that was accepted.
        claims: the link's claims, parsed; None where no VM was asked for.
    """

    bank: HashAlg
    pcrs: Mapping[int, bytes]
    clock: ClockState
    clock_safe: bool
    firmware_version: int
    was_reset: bool
    ak_name: AkName
    claims: Mapping[str, object] | None
