"""The audit log's records: a line of JSON for each request of a finished batch, and proofs from them.

A record holds what its tenant needs, together with its nonce, to show that the request is a leaf under a
root that the TPM signed; without the nonce a record proves nothing. Records are pure values; `audit.file`
writes and reads them. A line that is read back is untrusted.

Invariants: a nonce, a VM's name, a PCR value or a claim is never written. docs/audit.md describes the
fields, and what they do not prove.
"""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from provider_proxy.errors import EvidenceFormatError, InclusionError, ParameterError
from provider_proxy.evidence import attestation, inclusion
from provider_proxy.evidence.model import (
    HASH_BYTES,
    MAX_TREE_SIZE,
    SALT_BYTES,
    AkName,
    Evidence,
    HashAlg,
    InclusionProof,
    LeafHash,
    Nonce,
    PcrMask,
    RootHash,
    parse_bank,
    parse_mask,
)
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.evidence.wire import PATH_LIMIT

if TYPE_CHECKING:
    from provider_proxy.host.batching.batch import Batch

FORMAT = "provider-proxy/audit/1"
REQUEST_LABEL = b"provider-proxy/audit-request/1\x00"
OK = "ok"
MAX_LINE_BYTES = 8192  # the longest name, fully escaped, and a path of 20 make 5.2 kB
MAX_TENANT_CHARS = 256  # names of tables have 63, those made of an identity a few more
MAX_AK_NAME_BYTES = 66  # a SHA-512 name
MAX_TIME_S = 253402300800.0  # the year 10000, where calendars end
BATCH_NAME_BYTES = 12  # among 2**40 batches two are equal with a probability of 1 in 100,000
MAX_NAME_CHARS = 96
_NAME_RE = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_NAME_CHARS}}}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedLeaf:
    """The place of a request in a quoted tree.

    Attributes:
        claims_sha256: of the reply's claims; of zero bytes if it has none.
    """

    root: RootHash
    leaf_hash: LeafHash
    claims_sha256: bytes
    proof: InclusionProof

    def __post_init__(self) -> None:
        if not len(self.root) == len(self.leaf_hash) == len(self.claims_sha256) == HASH_BYTES:
            raise EvidenceFormatError(f"root, leaf_hash or claims_sha256 is not {HASH_BYTES} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One request of a finished batch. Never the nonce.

    Attributes:
        time: seconds since the epoch.
        request_hash: see the function `request_hash`.
        batch: the same for all records of a batch; random, so that a tenant cannot tell
            from two of its own how many batches there were in between.
        ak_name: of the AK in use; empty where unknown.
        mask, bank: as the tenant asked.
        outcome: "ok", or the name of the error's class.
        leaf: present exactly if the outcome is "ok".
    """

    time: float
    tenant: str
    request_hash: bytes
    batch: str
    ak_name: AkName
    mask: PcrMask
    bank: HashAlg
    outcome: str
    leaf: RecordedLeaf | None

    def __post_init__(self) -> None:
        if not 0 <= self.time < MAX_TIME_S:
            raise EvidenceFormatError("time is not within the years 1970 to 9999")
        if len(self.tenant) > MAX_TENANT_CHARS or len(self.ak_name) > MAX_AK_NAME_BYTES:
            raise EvidenceFormatError("tenant or ak_name is too long")
        if len(self.request_hash) != HASH_BYTES:
            raise EvidenceFormatError(f"request_hash is not {HASH_BYTES} bytes")
        if not _NAME_RE.fullmatch(self.batch) or not _NAME_RE.fullmatch(self.outcome):
            raise EvidenceFormatError("batch or outcome is not a name")
        if (self.leaf is not None) != (self.outcome == OK):
            raise EvidenceFormatError('a record must have a proof exactly if its outcome is "ok"')


def request_hash(nonce: Nonce, mask: int, bank: HashAlg, vm: uuid.UUID | None) -> bytes:
    """The value by which a tenant that kept its nonce finds its record; tells others nothing.

    Does not check: that the nonce has 128 random bits. With fewer, it can be guessed from this value.

    Returns:
        SHA-256(label || u8(len nonce) || nonce || u32(mask) || u16(bank) || u8(len vm) || vm).
    """
    vm_text = str(vm).encode("ascii") if vm is not None else b""
    head = REQUEST_LABEL + len(nonce).to_bytes(1, "big") + nonce
    head += mask.to_bytes(4, "big") + bank.to_bytes(2, "big")
    return sha256(head + len(vm_text).to_bytes(1, "big") + vm_text).digest()


def leaf_hash_of(
    *, salt: bytes, nonce: Nonce, mask: PcrMask, bank: HashAlg, claims_sha256: bytes
) -> LeafHash:
    """A leaf's hash, from the digest of its claims, which is the end of the leaf input."""
    whole = inclusion.leaf_input(salt=salt, nonce=nonce, mask=mask, bank=bank)
    return inclusion.leaf_hash(whole[:-HASH_BYTES] + claims_sha256)


def records_of(batch: Batch, *, ak_name: AkName, time: float) -> tuple[AuditRecord, ...]:
    """The records of a finished batch: some 5 microseconds a waiter.

    "ok" means that the batch was quoted and checked; the tenant may have disconnected meanwhile.

    Args:
        batch: its waiters have errors, or it has its quote and proofs.
        time: seconds since the epoch.

    Raises:
        ValueError: the batch has neither failed nor been quoted.
    """
    root: RootHash | None = None
    name = secrets.token_hex(BATCH_NAME_BYTES)
    records = []
    for place, waiter in enumerate(batch.waiters):
        request, leaf = waiter.request, None
        if waiter.error is None:
            if batch.quote is None:
                raise ValueError("the batch is not finished")
            proof = batch.proofs[place]
            claims = sha256(waiter.claims or b"").digest()
            leaf_hash = leaf_hash_of(
                salt=proof.salt,
                nonce=request.nonce,
                mask=request.mask,
                bank=request.bank,
                claims_sha256=claims,
            )
            if root is None:  # the self-check has verified that all proofs lead to the same root
                root = inclusion.root_from_proof(leaf_hash, proof)
            leaf = RecordedLeaf(root=root, leaf_hash=leaf_hash, claims_sha256=claims, proof=proof)
        records.append(
            AuditRecord(
                time=round(time, 3),
                tenant=waiter.tenant.name[:MAX_TENANT_CHARS],
                request_hash=request_hash(request.nonce, request.mask, request.bank, request.vm),
                batch=name,
                ak_name=ak_name,
                mask=request.mask,
                bank=request.bank,
                outcome=OK if waiter.error is None else type(waiter.error).__name__,
                leaf=leaf,
            )
        )
    return tuple(records)


def encode_record(record: AuditRecord) -> bytes:
    """One line of a log, including its line feed; ASCII."""
    return json.dumps(record_values(record), separators=(",", ":")).encode("ascii") + b"\n"


def record_values(record: AuditRecord) -> dict[str, object]:
    """A record as a JSON object, without keys that have no value."""
    values: dict[str, object] = {
        "format": FORMAT,
        "time": record.time,
        "tenant": record.tenant,
        "request_hash": record.request_hash.hex(),
        "batch": record.batch,
        "mask": hex(record.mask),
        "bank": record.bank.label,
        "outcome": record.outcome,
    }
    if record.ak_name:
        values["ak_name"] = record.ak_name.hex()
    if record.leaf is not None:
        values |= {
            "root": record.leaf.root.hex(),
            "tree_size": record.leaf.proof.tree_size,
            "leaf_index": record.leaf.proof.leaf_index,
            "leaf_hash": record.leaf.leaf_hash.hex(),
            "salt": record.leaf.proof.salt.hex(),
            "claims_sha256": record.leaf.claims_sha256.hex(),
            "path": [sibling.hex() for sibling in record.leaf.proof.path],
        }
    return values


def parse_record(line: bytes) -> AuditRecord:
    """Read one line of a log, untrusted bytes.

    Raises:
        EvidenceFormatError: not a record of this format.
    """
    if len(line) > MAX_LINE_BYTES:
        raise EvidenceFormatError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    fields = Fields(parse_json_object(line, "the line"), "record")
    if fields.text("format", len(FORMAT)) != FORMAT:
        raise EvidenceFormatError("not an audit record in a format that this version reads")
    leaf_keys = ("root", "tree_size", "leaf_index", "leaf_hash", "salt", "claims_sha256", "path")
    has_leaf = any(key in fields for key in leaf_keys)
    try:
        mask = parse_mask(fields.text("mask", 10))
        bank = parse_bank(fields.text("bank", 16))
    except ParameterError as exc:
        raise EvidenceFormatError(f"record.{exc}") from exc
    return AuditRecord(
        time=fields.number("time"),
        tenant=fields.text("tenant", MAX_TENANT_CHARS),
        request_hash=fields.hex("request_hash", HASH_BYTES),
        batch=fields.text("batch", MAX_NAME_CHARS),
        ak_name=AkName(fields.hex("ak_name", MAX_AK_NAME_BYTES) if "ak_name" in fields else b""),
        mask=mask,
        bank=bank,
        outcome=fields.text("outcome", MAX_NAME_CHARS),
        leaf=_parse_leaf(fields) if has_leaf else None,
    )


def _parse_leaf(fields: Fields) -> RecordedLeaf:
    return RecordedLeaf(
        root=RootHash(fields.hex("root", HASH_BYTES)),
        leaf_hash=LeafHash(fields.hex("leaf_hash", HASH_BYTES)),
        claims_sha256=fields.hex("claims_sha256", HASH_BYTES),
        proof=InclusionProof(
            leaf_index=fields.integer("leaf_index", MAX_TREE_SIZE),
            tree_size=fields.integer("tree_size", MAX_TREE_SIZE),
            path=fields.hex_list("path", PATH_LIMIT, HASH_BYTES),
            salt=fields.hex("salt", SALT_BYTES),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A nonce's record, and whether it is consistent. Only `prove` makes one.

    Attributes:
        problem: None if the request is a leaf under the recorded root.
    """

    record: AuditRecord
    problem: str | None = None

    @property
    def qualifying(self) -> bytes:
        """The qualifying data of a quote over the recorded root; empty without a root."""
        leaf = self.record.leaf
        return inclusion.qualifying_data(leaf.root, leaf.proof.tree_size) if leaf else b""


def prove(
    records: Iterable[AuditRecord],
    nonce: Nonce,
    *,
    mask: PcrMask | None = None,
    bank: HashAlg | None = None,
    vm: uuid.UUID | None = None,
    claims: bytes | None = None,
    evidence: Evidence | None = None,
) -> Proof | None:
    """Find a nonce's record and check that nonce, leaf, path and root match.

    A nonce that was used twice has two records: the first consistent one is returned, or else the last.

    Args:
        mask, bank: as requested; if None, those of each record.
        vm: the VM that the request named.
        claims: the reply's exact bytes, empty if it had none; None if they are not available.
        evidence: the reply; its quote must be over the recorded root.

    Does not check: time, tenant and batch, which the leaf does not bind; signatures (`Verifier.verify`).

    Returns:
        None if no record is for this nonce.

    Raises:
        VerificationError: the evidence contains no quote.
    """
    quoted = attestation.parse_attest(evidence.quote.attest).extra_data if evidence else b""
    found = None
    for record in records:
        leaf = record.leaf
        asked = mask or record.mask, bank or record.bank
        is_named = request_hash(nonce, *asked, vm) == record.request_hash
        if leaf is None:
            if is_named:
                found = Proof(record=record, problem=f"the request ended with {record.outcome}")
            continue
        digest = leaf.claims_sha256 if claims is None else sha256(claims).digest()
        own = leaf_hash_of(
            salt=leaf.proof.salt, nonce=nonce, mask=asked[0], bank=asked[1], claims_sha256=digest
        )
        if not is_named and own != leaf.leaf_hash:
            continue
        faults = (
            (not is_named, "request_hash does not match this nonce, mask, bank and VM (or no VM)"),
            (own != leaf.leaf_hash, "leaf_hash does not match nonce, mask, bank, salt and claims"),
            (asked != (record.mask, record.bank), "mask or bank is not the requested one"),
            (digest != leaf.claims_sha256, "claims_sha256 does not match the claims"),
        )
        fault = next((text for is_wrong, text in faults if is_wrong), None) or _root_fault(leaf)
        problem = f"the record is not consistent: {fault}" if fault else None
        found = Proof(record=record, problem=problem)
        if evidence is not None and problem is None:
            if quoted != found.qualifying:
                found = Proof(record=record, problem="the quote is not over the recorded root")
            elif evidence.ak_name != record.ak_name:
                found = Proof(record=record, problem="the evidence names another AK")
        if found.problem is None:
            return found
    return found


def _root_fault(leaf: RecordedLeaf) -> str | None:
    size = leaf.proof.tree_size
    if size < 2 or size & (size - 1):
        return "tree_size is not a power of two of at least 2"
    try:
        root = inclusion.root_from_proof(leaf.leaf_hash, leaf.proof)
    except InclusionError as exc:
        return str(exc)
    return None if root == leaf.root else "the path does not lead from leaf_hash to root"
