"""The audit log: what its records prove, what is never in it, and a file that fails in every way."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import math
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import FakeQuoter, run_here
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from package_modules import CRYPTOGRAPHY, brought_by
from places import DOCS

from provider_proxy.errors import EvidenceFormatError, HostError, QuoteError, SelfCheckError
from provider_proxy.evidence import inclusion
from provider_proxy.evidence.model import (
    AkName,
    HashAlg,
    InclusionProof,
    Nonce,
    PcrMask,
    QuoteRequest,
    Tenant,
)
from provider_proxy.evidence.wire import EvidenceEncoder, parse_evidence
from provider_proxy.host.audit import file as audit_file
from provider_proxy.host.audit import records as audit
from provider_proxy.host.audit.file import AuditLog, read_records
from provider_proxy.host.audit.records import (
    AuditRecord,
    encode_record,
    leaf_hash_of,
    parse_record,
    prove,
    records_of,
    request_hash,
)
from provider_proxy.host.batching.batch import Answer, Batch, Waiter, build_batch_tree, check_batch
from provider_proxy.testing.soft_tpm import SoftTpm

NOW = 1_767_225_600.1234
VM = uuid.UUID("0ddba11c-0ffe-4bad-8bad-00000c0ffee0")
CLAIMS = json.dumps({"vm": str(VM)}).encode("ascii")
NONCES = tuple(Nonce(b"Kv3-secret-nonce-of-tenant-%d" % n) for n in range(5))
MASKS = (0x1, 0x83, 0x80, 0x1, 0x3)


def waiter(nonce: Nonce, mask: int = 1, *, vm: bool = False, tenant: str = "t") -> Waiter:
    request = QuoteRequest(nonce=nonce, mask=PcrMask(mask), vm=VM if vm else None)
    return Waiter(
        request=request,
        tenant=Tenant(name=tenant, pcr_allow=0xFFFFFF),
        key=(request.bank, 0, 0xFFFFFF),
        arrived=0.0,
        deadline=9.0,
        is_gone=None,
        claims=CLAIMS if vm else None,
    )


def five_waiters() -> list[Waiter]:
    """The last one asks about its VM."""
    return [
        waiter(nonce, mask, vm=n == 4, tenant=f"tenant-{n}")
        for n, (nonce, mask) in enumerate(zip(NONCES, MASKS, strict=True))
    ]


async def quoted(quoter: FakeQuoter, waiters: list[Waiter], number: int = 7) -> Batch:
    """A batch as the batcher's steps leave it, answered."""
    batch = Batch(number, HashAlg.SHA256, waiters, 0.0, 0.0)
    root = build_batch_tree(batch)
    qualifying = inclusion.qualifying_data(root, batch.size)
    batch.quote = await quoter.quote(qualifying, batch.bank, batch.mask)
    check_batch(batch, batch.quote, quoter.ak)
    return batch


def quote_now(tpm: SoftTpm, waiters: list[Waiter], number: int = 7) -> Batch:
    """The same without trio."""
    batch = Batch(number, HashAlg.SHA256, waiters, 0.0, 0.0)
    root = build_batch_tree(batch)
    batch.quote = tpm.quote(inclusion.qualifying_data(root, batch.size), batch.bank, batch.mask)
    check_batch(batch, batch.quote, tpm.ak)
    return batch


def records_from(tpm: SoftTpm, batch: Batch) -> tuple[AuditRecord, ...]:
    return records_of(batch, ak_name=tpm.ak.name, time=NOW)


def body_of(tpm: SoftTpm, batch: Batch, place: int) -> bytes:
    """The reply that a waiter of the batch got."""
    assert batch.quote is not None
    encoder = EvidenceEncoder(
        batch.quote,
        ak_name=tpm.ak.name,
        hash_alg=tpm.ak.signature_hash,
        enc_alg=tpm.ak.enc_alg,
        sign_alg=tpm.ak.sign_alg,
        quote_ms=1.0,
    )
    answer = Answer(
        encoder=encoder,
        proof=batch.proofs[place],
        claims=batch.waiters[place].claims,
        logs=None,
        queued_s=0.0,
    )
    return b"".join(answer.body())


class Scene:
    """A finished batch of five, its records, and a log that holds them."""

    def __init__(self) -> None:
        self.tpm = SoftTpm()
        self.batch = quote_now(self.tpm, five_waiters())
        self.records = records_from(self.tpm, self.batch)
        self.lines = [encode_record(record) for record in self.records]

    def body(self, place: int) -> bytes:
        return body_of(self.tpm, self.batch, place)


SCENE = Scene()
WITH_VM = 4


def spellings(nonce: bytes) -> tuple[bytes, ...]:
    """The nonce as it is, in hex, and in base64 at each of three alignments."""
    found = [nonce, nonce.hex().encode(), nonce.hex().upper().encode()]
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + nonce)
        inner = text[4:-4]  # the ends depend on what stands beside it
        found += [inner, inner.translate(bytes.maketrans(b"+/", b"-_"))]
    return tuple(found)


def assert_no_nonce(data: bytes | str) -> None:
    text = data.encode() if isinstance(data, str) else data
    assert text
    for nonce in NONCES:
        for spelling in spellings(nonce):
            assert spelling not in text


def collect(path: Path) -> tuple[list[AuditRecord], list[tuple[str, int, str]]]:
    """What a log holds, and what is damaged in it."""
    damage: list[tuple[str, int, str]] = []
    records = list(
        read_records(path, lambda name, line, why: damage.append((name.name, line, why)))
    )
    return records, damage


# --- records and proofs -----------------------------------------------------------------------------


async def test_each_record_of_a_batch_proves_its_own_request() -> None:
    quoter = FakeQuoter()
    batch = await quoted(quoter, five_waiters())
    records = records_from(quoter.tpm, batch)
    for place, own in enumerate(batch.waiters):
        request = own.request
        proof = prove(
            records,
            request.nonce,
            mask=request.mask,
            bank=request.bank,
            vm=request.vm,
            claims=own.claims or b"",
            evidence=parse_evidence(body_of(quoter.tpm, batch, place)),
        )
        assert proof is not None
        assert proof.problem is None
        assert proof.record is records[place]
        assert proof.qualifying == quoter.quotes[0][0]  # what the TPM was given
    assert len({record.batch for record in records}) == 1
    assert [record.tenant for record in records] == [f"tenant-{n}" for n in range(5)]
    assert {record.outcome for record in records} == {"ok"}
    assert {record.time for record in records} == {1_767_225_600.123}
    assert {record.ak_name for record in records} == {quoter.ak.name}


@pytest.mark.parametrize("place", range(5))
def test_the_nonce_alone_finds_its_record(place: int) -> None:
    proof = prove(SCENE.records, NONCES[place], vm=VM if place == WITH_VM else None)
    assert proof is not None
    assert proof.problem is None
    assert proof.record is SCENE.records[place]


def test_another_nonce_is_not_in_the_log() -> None:
    assert prove(SCENE.records, Nonce(b"somebody-else's-nonce")) is None
    assert prove((), NONCES[0]) is None


def test_a_request_of_another_mask_or_bank_is_not_in_the_log() -> None:
    assert prove(SCENE.records, NONCES[0], mask=PcrMask(3)) is None
    assert prove(SCENE.records, NONCES[0], bank=HashAlg.SHA1) is None


def test_the_vm_is_part_of_the_request() -> None:
    for vm in (None, uuid.UUID(int=1)):
        proof = prove(SCENE.records, NONCES[WITH_VM], vm=vm)
        assert proof is not None
        assert proof.problem is not None
        assert "request_hash" in proof.problem


def test_other_claims_do_not_hold() -> None:
    proof = prove(SCENE.records, NONCES[WITH_VM], vm=VM, claims=CLAIMS + b" ")
    assert proof is not None
    assert proof.problem is not None
    assert "claims" in proof.problem


def test_request_hash_is_its_formula() -> None:
    """Spelt out: a tenant may compute it with any tool."""
    text = str(VM).encode("ascii")
    head = b"provider-proxy/audit-request/1\0" + bytes([len(NONCES[0])]) + NONCES[0]
    head += bytes([0, 0, 0, 0x83]) + bytes([0, 0x0B])
    plain, with_vm = sha256(head + b"\0").digest(), sha256(head + b"\x24" + text).digest()
    assert request_hash(NONCES[0], 0x83, HashAlg.SHA256, None) == plain
    assert request_hash(NONCES[0], 0x83, HashAlg.SHA256, VM) == with_vm


@given(
    st.binary(min_size=16, max_size=16),
    st.binary(max_size=64),
    st.sampled_from(HashAlg),
    st.binary(max_size=99),
)
def test_a_leaf_by_the_digest_of_its_claims_is_the_leaf(
    salt: bytes, nonce: bytes, bank: HashAlg, claims: bytes
) -> None:
    whole = inclusion.leaf_input(
        salt=salt, nonce=Nonce(nonce), mask=PcrMask(0x83), bank=bank, claims=claims
    )
    assert inclusion.leaf_hash(whole) == leaf_hash_of(
        salt=salt,
        nonce=Nonce(nonce),
        mask=PcrMask(0x83),
        bank=bank,
        claims_sha256=sha256(claims).digest(),
    )


def flip(hex_text: str) -> str:
    return ("1" if hex_text[0] == "0" else "0") + hex_text[1:]


MUTATIONS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "request_hash": ("request_hash", flip, "request_hash"),
    "leaf_hash": ("leaf_hash", flip, "leaf_hash"),
    "salt": ("salt", flip, "leaf_hash"),
    "mask": ("mask", lambda _: "0x82", "mask or bank"),
    "bank": ("bank", lambda _: "sha384", "mask or bank"),
    "claims_sha256": ("claims_sha256", flip, "claims_sha256"),
    "root": ("root", flip, "does not lead"),
    "leaf_index": ("leaf_index", lambda index: index ^ 1, "does not lead"),
    "tree_size": ("tree_size", lambda size: size * 2, "shorter"),
    "tree_size, no power of two": ("tree_size", lambda size: size + 1, "power of two"),
    "path": ("path", lambda path: [flip(path[0]), *path[1:]], "does not lead"),
    "path, order": ("path", lambda path: path[::-1], "does not lead"),
    "path, shorter": ("path", lambda path: path[:-1], "shorter"),
    "path, longer": ("path", lambda path: [*path, path[0]], "longer"),
    "ak_name": ("ak_name", flip, "another AK"),
    "outcome": ("outcome", lambda _: "QuoteError", ""),
}
UNBOUND = {"time": 1.0, "tenant": "other", "batch": "other-1"}


def mutated(line: bytes, key: str, change: Callable[[Any], object]) -> bytes:
    values = json.loads(line)
    before = values[key]
    values[key] = change(before)
    assert values[key] != before
    return json.dumps(values).encode() + b"\n"


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_changed_field_is_detected(name: str) -> None:
    key, change, told = MUTATIONS[name]
    line = mutated(SCENE.lines[WITH_VM], key, change)
    if key == "outcome":  # a proof beside an error: no record at all
        with pytest.raises(EvidenceFormatError):
            parse_record(line)
        return
    proof = prove(
        [parse_record(line)],
        NONCES[WITH_VM],
        mask=PcrMask(MASKS[WITH_VM]),
        bank=HashAlg.SHA256,
        vm=VM,
        claims=CLAIMS,
        evidence=parse_evidence(SCENE.body(WITH_VM)),
    )
    assert proof is not None
    assert proof.problem is not None
    assert told in proof.problem


@pytest.mark.parametrize("name", [n for n in MUTATIONS if n not in ("ak_name", "outcome")])
def test_no_changed_field_is_proven_from_the_nonce_alone(name: str) -> None:
    key, change, _ = MUTATIONS[name]
    record = parse_record(mutated(SCENE.lines[0], key, change))
    proof = prove([record], NONCES[0])
    assert proof is None or proof.problem is not None


def test_every_field_is_either_bound_or_known_to_be_not() -> None:
    bound = {key for key, _, _ in MUTATIONS.values()}
    assert {*bound, *UNBOUND, "format"} == set(json.loads(SCENE.lines[0]))


@pytest.mark.parametrize("key", UNBOUND)
def test_what_nothing_binds_is_the_provider_s_word(key: str) -> None:
    # docs/audit.md says so; this fails when it is bound one day, and the document must change.
    record = parse_record(mutated(SCENE.lines[0], key, lambda _: UNBOUND[key]))
    proof = prove([record], NONCES[0], evidence=parse_evidence(SCENE.body(0)))
    assert proof is not None
    assert proof.problem is None


def test_a_consistent_record_over_another_root_is_not_the_evidence_s() -> None:
    """A provider can make up a tree at any time; that a TPM signed its root it cannot."""
    tpm = SCENE.tpm
    forged = records_from(tpm, quote_now(tpm, [waiter(NONCES[0])]))
    assert (proof := prove(forged, NONCES[0])) is not None
    assert proof.problem is None
    proof = prove(forged, NONCES[0], evidence=parse_evidence(SCENE.body(0)))
    assert proof is not None
    assert proof.problem == "the quote is not over the recorded root"


def test_of_two_records_of_one_nonce_the_one_that_holds_is_given() -> None:
    again = records_from(SCENE.tpm, quote_now(SCENE.tpm, [waiter(NONCES[0])], number=8))
    refused = quote_failed(NONCES[0])
    for records in ((*refused, *SCENE.records), (*SCENE.records, *refused)):
        assert (proof := prove(records, NONCES[0])) is not None
        assert proof.record is SCENE.records[0]
    # With the evidence at hand it is the record of that reply, whatever else was asked.
    for records in ((*again, *SCENE.records), (*SCENE.records, *again)):
        proof = prove(records, NONCES[0], evidence=parse_evidence(SCENE.body(0)))
        assert proof is not None
        assert proof.problem is None
        assert proof.record is SCENE.records[0]


def quote_failed(nonce: Nonce) -> tuple[AuditRecord, ...]:
    batch = Batch(3, HashAlg.SHA256, [waiter(nonce)], 0.0, 0.0)
    build_batch_tree(batch)
    batch.refuse(QuoteError("the TPM gave no quote"))
    return records_from(SCENE.tpm, batch)


def test_a_failed_batch_is_recorded_without_a_proof() -> None:
    (record,) = quote_failed(NONCES[0])
    assert record.outcome == "QuoteError"
    assert record.leaf is None
    keys = set(json.loads(encode_record(record)))
    assert not keys & {"root", "tree_size", "leaf_index", "leaf_hash", "salt", "path"}
    proof = prove([record], NONCES[0])
    assert proof is not None
    assert proof.problem == "the request ended with QuoteError"
    assert proof.qualifying == b""
    assert prove([record], NONCES[1]) is None


@pytest.mark.parametrize("key", ["root", "tree_size", "leaf_index", "leaf_hash", "salt", "path"])
def test_an_error_with_a_part_of_a_proof_is_no_record(key: str) -> None:
    values = json.loads(encode_record(quote_failed(NONCES[0])[0]))
    parse_record(json.dumps(values).encode())
    values[key] = json.loads(SCENE.lines[0])[key]
    with pytest.raises(EvidenceFormatError):
        parse_record(json.dumps(values).encode())


def test_a_batch_that_failed_its_own_check_leaves_no_proof() -> None:
    batch = quote_now(SCENE.tpm, [waiter(NONCES[0])])
    batch.refuse(SelfCheckError("no"))
    (record,) = records_from(SCENE.tpm, batch)
    assert (record.outcome, record.leaf) == ("SelfCheckError", None)


def test_an_unfinished_batch_has_no_records() -> None:
    batch = Batch(3, HashAlg.SHA256, [waiter(NONCES[0])], 0.0, 0.0)
    build_batch_tree(batch)
    with pytest.raises(ValueError, match="not finished"):
        records_from(SCENE.tpm, batch)


def test_a_tenant_s_name_of_any_kind_is_recorded() -> None:
    for name in ("", "\ud800", 'a"b\\c\n\x1b[2J', "é" * 400, "\U0001f600" * 400):
        batch = quote_now(SCENE.tpm, [waiter(NONCES[0], tenant=name)])
        (record,) = records_from(SCENE.tpm, batch)
        line = encode_record(record)
        assert line.count(b"\n") == 1
        assert len(line) <= audit.MAX_LINE_BYTES
        assert parse_record(line) == record
        assert record.tenant == name[: audit.MAX_TENANT_CHARS]


def test_the_largest_record_fits_a_line() -> None:
    (record,) = records_from(
        SCENE.tpm, quote_now(SCENE.tpm, [waiter(NONCES[0], tenant="\U0001f600" * 256)])
    )
    assert record.leaf is not None
    largest = dataclasses.replace(
        record,
        time=audit.MAX_TIME_S - 0.001,
        batch="x" * 96,
        ak_name=AkName(bytes(66)),
        mask=PcrMask(0xFFFFFF),
        leaf=dataclasses.replace(
            record.leaf,
            proof=InclusionProof(
                leaf_index=(1 << 20) - 1,
                tree_size=1 << 20,
                path=(bytes(32),) * 20,
                salt=bytes(16),
            ),
        ),
    )
    line = encode_record(largest)
    assert 5000 < len(line) <= audit.MAX_LINE_BYTES
    assert parse_record(line) == largest


@pytest.mark.parametrize(
    "change",
    [
        {"time": audit.MAX_TIME_S},
        {"time": -1.0},
        {"tenant": "x" * 257},
        {"request_hash": bytes(31)},
        {"batch": "a b"},
        {"batch": ""},
        {"outcome": "x\x1b"},
        {"outcome": "QuoteError"},
        {"leaf": None},
        {"ak_name": AkName(bytes(67))},
    ],
)
def test_a_record_that_exists_is_a_valid_one(change: dict[str, Any]) -> None:
    with pytest.raises(EvidenceFormatError):
        dataclasses.replace(SCENE.records[0], **change)


def test_a_leaf_has_hashes_of_their_length() -> None:
    leaf = SCENE.records[0].leaf
    assert leaf is not None
    changes: tuple[dict[str, Any], ...] = (
        {"root": bytes(33)},
        {"leaf_hash": bytes(31)},
        {"claims_sha256": b""},
    )
    for change in changes:
        with pytest.raises(EvidenceFormatError):
            dataclasses.replace(leaf, **change)


# --- what is never in it ----------------------------------------------------------------------------


async def test_no_nonce_is_written_or_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "audit.jsonl"
    failed = tuple(record for nonce in NONCES for record in quote_failed(nonce))
    for log in (AuditLog(path), AuditLog(None), AuditLog(tmp_path / "gone" / "audit.jsonl")):
        await log.write(SCENE.records)
        await log.write(failed)
    path.write_bytes(path.read_bytes() + b"torn")
    assert len(collect(path)[0]) == 10
    list(read_records(path))  # warns
    assert_no_nonce(path.read_bytes())
    assert f"skipping {path}:11: " in caplog.text
    assert "records are lost" in caplog.text
    assert_no_nonce(caplog.text)
    for record in SCENE.records:
        assert_no_nonce(repr(record))


def test_the_search_for_nonces_finds_them() -> None:
    shifted = base64.b64encode(b"x" + NONCES[2] + b"yz")
    for data in (NONCES[0], NONCES[1].hex(), shifted, base64.urlsafe_b64encode(NONCES[3])):
        with pytest.raises(AssertionError):
            assert_no_nonce(data)


async def test_claims_and_vm_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    await AuditLog(path).write(SCENE.records)
    data = path.read_bytes()
    assert str(VM).encode() not in data
    assert VM.hex.encode() not in data
    assert CLAIMS not in data
    assert base64.b64encode(CLAIMS) not in data


# --- the writer -------------------------------------------------------------------------------------


def of_time(number: int) -> AuditRecord:
    """Records that tell themselves apart, all of one length."""
    return dataclasses.replace(SCENE.records[0], time=1000.0 + number)


def numbers(records: Sequence[AuditRecord]) -> list[int]:
    return [int(record.time) - 1000 for record in records]


LINE = len(encode_record(of_time(0)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_file_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    before = os.umask(0)
    try:
        await AuditLog(path).write(SCENE.records)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert collect(path) == (list(SCENE.records), [])


async def test_no_records_try_the_file(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    await log.write(())
    assert (tmp_path / "audit.jsonl").read_bytes() == b""
    assert log.failures == 0
    log = AuditLog(tmp_path / "gone" / "audit.jsonl")
    await log.write(())
    assert log.failures == 1


async def test_without_a_file_records_go_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = AuditLog(None)
    await log.write(SCENE.records)
    assert {(r.name, r.levelname) for r in caplog.records} == {("provider_proxy.audit", "INFO")}
    lines = [record.getMessage() for record in caplog.records]
    assert [parse_record(line.encode()) for line in lines] == list(SCENE.records)
    assert not any("\n" in line for line in lines)


async def test_a_file_is_rotated_exactly_when_it_would_be_too_large(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=3 * LINE, keep=2)
    for number in range(3):
        await log.write([of_time(number)])
    assert path.stat().st_size == 3 * LINE  # to the byte
    assert names(tmp_path) == ["audit.jsonl"]
    await log.write([of_time(3)])
    assert path.stat().st_size == LINE
    assert (tmp_path / "audit.jsonl.1").stat().st_size == 3 * LINE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for number in range(4, 10):
        await log.write([of_time(number)])
    assert names(tmp_path) == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    records, damage = collect(path)
    assert numbers(records) == list(range(3, 10))  # the first file was dropped, in order
    assert not damage


async def test_a_byte_less_rotates_earlier(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=3 * LINE - 1, keep=2)
    for number in range(3):
        await log.write([of_time(number)])
    assert path.stat().st_size == LINE
    assert (tmp_path / "audit.jsonl.1").stat().st_size == 2 * LINE


async def test_a_batch_is_never_divided(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=1, keep=3)
    for first in (0, 3, 6):
        await log.write([of_time(first + n) for n in range(3)])
    for name, first in (("audit.jsonl", 6), ("audit.jsonl.1", 3), ("audit.jsonl.2", 0)):
        lines = (tmp_path / name).read_bytes().splitlines()
        assert numbers([parse_record(line) for line in lines]) == [first, first + 1, first + 2]


async def test_a_gap_in_the_numbers_costs_no_file(tmp_path: Path) -> None:
    """A crash within a rotation leaves one."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=1, keep=3)
    for number in range(4):
        await log.write([of_time(number)])
    (tmp_path / "audit.jsonl.1").unlink()
    await log.write([of_time(4)])
    assert numbers(collect(path)[0]) == [0, 1, 3, 4]


async def test_a_smaller_keep_drops_what_is_older_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=1, keep=5)
    for number in range(6):
        await log.write([of_time(number)])
    others = [tmp_path / f"audit.jsonl.{end}" for end in ("20260101", "2.gz", "1x", "x")]
    for other in others:
        other.write_bytes(b"not ours")
    await AuditLog(path, max_bytes=1, keep=2).write([of_time(6)])
    assert numbers(collect(path)[0]) == [4, 5, 6]
    assert all(other.read_bytes() == b"not ours" for other in others)
    assert len(names(tmp_path)) == 3 + len(others)


@pytest.mark.parametrize(
    "change", [{"max_bytes": 0}, {"keep": 0}, {"keep": audit_file.MAX_KEEP + 1}]
)
async def test_impossible_settings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        AuditLog(tmp_path / "audit.jsonl", **change)


async def test_tasks_that_write_at_once_keep_their_lines_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=20 * LINE, keep=50)

    async def write(first: int) -> None:
        for n in range(10):
            await log.write([of_time(first + 3 * n + m) for m in range(3)])

    async with trio.open_nursery() as nursery:
        for task in range(10):
            nursery.start_soon(write, 100 * task)
    records, damage = collect(path)
    assert not damage
    assert log.failures == 0
    found = numbers(records)
    assert sorted(found) == [100 * task + n for task in range(10) for n in range(30)]
    for at in range(0, len(found), 3):  # and batches stay together
        assert found[at : at + 3] == [found[at], found[at] + 1, found[at] + 2]
    assert len(names(tmp_path)) > 10


async def test_two_programs_that_write_at_once_keep_their_lines_whole(tmp_path: Path) -> None:
    """At a restart the old daemon may still drain while the new one begins."""
    path = tmp_path / "audit.jsonl"

    async def write(log: AuditLog, first: int) -> None:
        for n in range(30):
            await log.write([of_time(first + n)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, AuditLog(path), 0)
        nursery.start_soon(write, AuditLog(path), 100)
    records, damage = collect(path)
    assert not damage
    assert sorted(numbers(records)) == [*range(30), *range(100, 130)]


async def test_the_event_loop_goes_on_while_the_disk_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    at_work = threading.Event()

    def slow(fd: int, data: bytes) -> int:
        at_work.set()
        time.sleep(0.2)
        return write(fd, data)

    monkeypatch.setattr("os.write", slow)
    ticks = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(AuditLog(tmp_path / "audit.jsonl").write, SCENE.records)
        while not at_work.is_set():  # noqa: ASYNC110
            await trio.sleep(0.001)
        while nursery.child_tasks:
            await trio.sleep(0.01)
            ticks += 1
    assert ticks > 5


async def test_a_write_is_not_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with trio.CancelScope() as scope:
        scope.cancel()
        await AuditLog(path).write(SCENE.records)
    assert collect(path) == (list(SCENE.records), [])


async def test_a_worker_of_the_caller_s_runs_the_append(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    threads = []

    async def inline(function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        threads.append(threading.current_thread())
        return function(*args)

    path = tmp_path / "audit.jsonl"
    await AuditLog(path, in_worker=inline).write(SCENE.records)
    assert threads == [threading.main_thread()]
    assert collect(path) == (list(SCENE.records), [])


# --- files that fail --------------------------------------------------------------------------------


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
async def test_a_full_disk_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(Path("/dev/full"))
    for _ in range(3):
        await log.write(SCENE.records)
    assert log.failures == 3
    assert levels(caplog) == ["ERROR"]
    assert "No space left" in caplog.text


async def test_a_directory_that_vanished_and_came_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "folder" / "audit.jsonl"
    path.parent.mkdir()
    log = AuditLog(path)
    await log.write([of_time(0)])
    path.unlink()
    path.parent.rmdir()
    for number in (1, 2):
        await log.write([of_time(number)])
    assert log.failures == 2
    path.parent.mkdir()
    for number in (3, 4):
        await log.write([of_time(number)])
    assert numbers(collect(path)[0]) == [3, 4]
    assert log.failures == 2
    assert levels(caplog) == ["ERROR", "WARNING"]
    assert "2 batches are missing from it" in caplog.text
    path.unlink()
    path.mkdir()  # a second streak is told again
    await log.write([of_time(5)])
    assert levels(caplog) == ["ERROR", "WARNING", "ERROR"]


async def test_a_rotation_that_fails_is_a_failure_like_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=1, keep=1)
    await log.write([of_time(0)])
    (tmp_path / "audit.jsonl.1").mkdir()  # a file does not replace it
    await log.write([of_time(1)])
    assert log.failures == 1
    (tmp_path / "audit.jsonl.1").rmdir()
    await log.write([of_time(2)])
    assert numbers(collect(path)[0]) == [0, 2]


async def test_a_log_that_was_moved_is_begun_anew(tmp_path: Path) -> None:
    """As logrotate does it, without a signal."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    await log.write([of_time(0)])
    path.rename(tmp_path / "moved")
    await log.write([of_time(1)])
    path.unlink()
    await log.write([of_time(2)])
    os.truncate(path, 0)  # logrotate's copytruncate
    await log.write([of_time(3)])
    assert numbers(collect(tmp_path / "moved")[0]) == [0]
    assert numbers(collect(path)[0]) == [3]
    assert path.stat().st_size == LINE


@contextmanager
def disk_full_after(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[None]:
    """The disk takes so many bytes, in small pieces, then no more."""
    write, left = os.write, count

    def limited(fd: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(28, "No space left on device")
        done = write(fd, data[: min(left, 100)])
        left -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr("os.write", limited)
        yield


@pytest.mark.parametrize("spare", [1, 99, 100, LINE - 1])
async def test_a_line_torn_by_a_full_disk_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    await log.write([of_time(0)])
    with disk_full_after(monkeypatch, LINE + spare):
        await log.write([of_time(1), of_time(2), of_time(3)])
    assert log.failures == 1
    assert path.stat().st_size == 2 * LINE + spare
    await log.write([of_time(4)])
    records, damage = collect(path)
    if spare == LINE - 1:  # all but the line feed was written: nothing is lost
        assert (numbers(records), damage) == ([0, 1, 2, 4], [])
        return
    assert numbers(records) == [0, 1, 4]
    assert [(name, line) for name, line, _ in damage] == [("audit.jsonl", 3)]


async def test_a_write_in_small_pieces_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    with disk_full_after(monkeypatch, 1 << 20):
        await AuditLog(path).write(SCENE.records)
    assert collect(path) == (list(SCENE.records), [])


async def test_a_torn_line_is_repaired_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(encode_record(of_time(0)) + encode_record(of_time(1))[:-30])
    assert numbers(collect(path)[0]) == [0]
    await AuditLog(path).write([of_time(2)])
    records, damage = collect(path)
    assert numbers(records) == [0, 2]
    assert [(name, line) for name, line, _ in damage] == [("audit.jsonl", 2)]
    assert b"\n\n" not in path.read_bytes()


async def test_the_repair_counts_for_the_size(tmp_path: Path) -> None:
    for torn, rotated in ((LINE, True), (LINE - 1, False)):
        path = tmp_path / f"{torn}.jsonl"
        path.write_bytes(b"x" * torn)
        await AuditLog(path, max_bytes=2 * LINE).write([of_time(0)])
        assert (tmp_path / f"{torn}.jsonl.1").exists() is rotated
        assert path.stat().st_size == (LINE if rotated else 2 * LINE)
        assert numbers(collect(path)[0]) == [0]


async def test_a_disk_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = os.write
    comes_back = threading.Event()

    def hanging(fd: int, data: bytes) -> int:
        comes_back.wait(20)
        return write(fd, data)

    monkeypatch.setattr(audit_file, "WRITE_LIMIT_S", 0.05)
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    with monkeypatch.context() as patch:
        patch.setattr("os.write", hanging)
        begin = time.monotonic()
        await log.write([of_time(0)])
        first_s = time.monotonic() - begin
        for number in range(1, 100):
            await log.write([of_time(number)])  # at once, without threads that pile up
        assert first_s < 5
        assert time.monotonic() - begin - first_s < 0.05 * 50
        with trio.testing.assert_checkpoints():
            await log.write([of_time(100)])
        assert log.failures == 101
        assert levels(caplog) == ["ERROR"]
        comes_back.set()
        with trio.fail_after(10):
            while not path.exists() or path.stat().st_size < LINE:  # noqa: ASYNC110
                await trio.sleep(0.001)
    monkeypatch.setattr(audit_file, "WRITE_LIMIT_S", 10.0)
    with trio.fail_after(10):
        while numbers(collect(path)[0])[-1] != 200:  # the thread may not be quite back
            await log.write([of_time(200)])
    failures = log.failures
    async with trio.open_nursery() as nursery:  # and they wait for each other again
        for _ in range(9):
            nursery.start_soon(log.write, [of_time(300)])
    assert log.failures == failures
    assert numbers(collect(path)[0]) == [0, 200, *[300] * 9]
    assert levels(caplog) == ["ERROR", "WARNING"]


# --- the reader, over hostile bytes -----------------------------------------------------------------


def test_no_log_is_an_error_of_the_host_s(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        list(read_records(tmp_path / "audit.jsonl"))
    with pytest.raises(HostError, match="cannot read"):
        list(read_records(tmp_path))


def test_older_files_alone_are_a_log(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl.1").write_bytes(SCENE.lines[0])
    assert collect(tmp_path / "audit.jsonl") == ([SCENE.records[0]], [])


def test_a_rotation_while_reading_hides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in range(4):
        file = path if number == 3 else tmp_path / f"audit.jsonl.{3 - number}"
        file.write_bytes(encode_record(of_time(number)))
    reader = read_records(path)
    seen = [next(reader)]
    for number in (3, 2, 1):
        (tmp_path / f"audit.jsonl.{number}").rename(tmp_path / f"audit.jsonl.{number + 1}")
    path.rename(tmp_path / "audit.jsonl.1")
    path.write_bytes(encode_record(of_time(4)))
    assert numbers([*seen, *reader]) == [0, 1, 2, 3]


def test_a_rotation_while_opening_hides_nothing_and_gives_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, older = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    path.write_bytes(encode_record(of_time(1)))
    older.write_bytes(encode_record(of_time(0)))
    opening = Path.open
    opened = []

    def rotating(self: Path, *args: Any, **more: Any) -> Any:
        file = opening(self, *args, **more)
        opened.append(self)
        if len(opened) == 1:
            older.rename(tmp_path / "audit.jsonl.2")
            path.rename(older)
        return file

    monkeypatch.setattr(Path, "open", rotating)
    assert numbers(list(read_records(path))) == [0, 1]


def test_damage_is_told_by_file_and_line_and_not_by_content(tmp_path: Path) -> None:
    good = SCENE.lines[0]
    lines = [good, b"secret\n", good, b"\n", b'{"a":1,"a":2}\n', b"\xff\n", good[:-20]]
    (tmp_path / "audit.jsonl.1").write_bytes(b"".join(lines))
    (tmp_path / "audit.jsonl").write_bytes(b"[]\n" + good)
    records, damage = collect(tmp_path / "audit.jsonl")
    assert len(records) == 3
    places = [(name, line) for name, line, _ in damage]
    assert places == [("audit.jsonl.1", n) for n in (2, 4, 5, 6, 7)] + [("audit.jsonl", 1)]
    assert not any("secret" in why for _, _, why in damage)


def test_a_line_too_long_is_one_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    good = SCENE.lines[0]
    limit = audit.MAX_LINE_BYTES
    for size in (limit, limit + 1, 2 * limit, 2 * limit + 1, 2 * limit + 2, 9 * limit):
        path.write_bytes(b"x" * (size - 1) + b"\n" + good)
        records, damage = collect(path)
        assert len(records) == 1, size
        assert [line for _, line, _ in damage] == [1]
        assert ("longer" in damage[0][2]) is (size > limit)
    padded = good[:-2] + b" " * (limit - len(good)) + b"}\n"
    for line, count in ((padded, 1), (padded[:-2] + b" }\n", 0)):
        path.write_bytes(line)
        assert len(collect(path)[0]) == count


def test_reading_is_bounded_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # a hole: a file system after a crash
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + SCENE.lines[0])
    asked = []

    class Watched:
        def __init__(self, file: Any) -> None:
            self.file = file

        def readline(self, limit: int) -> bytes:
            asked.append(limit)
            data: bytes = self.file.readline(limit)
            return data

    with path.open("rb") as source:
        source.seek((1 << 30) - 10 * audit.MAX_LINE_BYTES)
        lines = list(audit_file._lines(Watched(source)))  # type: ignore[arg-type]
    assert len(lines) == 2
    assert max(asked) <= audit.MAX_LINE_BYTES + 1
    assert max(map(len, lines)) <= audit.MAX_LINE_BYTES + 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.binary(max_size=200) | st.sampled_from(SCENE.lines), max_size=6))
@example([b"[" * 8000])
@example([b'{"a":' * 1500])
@example([b"9" * 8000 + b"\n"])
@example([b'{"format":"provider-proxy/audit/1","time":' + b"9" * 5000 + b"}\n"])
@example([b"\n\n\r\n\0\n"])
def test_any_bytes_are_records_or_skipped(tmp_path: Path, parts: list[bytes]) -> None:
    path = tmp_path / "audit.jsonl"
    data = b"".join(parts)
    path.write_bytes(data)
    records, damage = collect(path)
    assert len(records) + len(damage) == data.count(b"\n") + (data[-1:] not in (b"", b"\n"))
    for record in records:
        assert parse_record(encode_record(record)) == record
        prove([record], NONCES[0])


@settings(deadline=None)
@given(st.sampled_from(sorted(json.loads(SCENE.lines[0]))), JSON, st.booleans())
@example("mask", "0x0", False)
@example("bank", "md5", False)
@example("time", math.inf, False)
@example("ak_name", "", False)
def test_any_value_in_a_field_is_read_or_refused(key: str, value: object, drop: bool) -> None:
    values = json.loads(SCENE.lines[WITH_VM])
    del values[key]
    if not drop:
        values[key] = value
    line = json.dumps(values).encode()
    try:
        record = parse_record(line)
    except EvidenceFormatError:
        return
    assert parse_record(encode_record(record)) == record
    assert key in ("time", "tenant", "batch", "ak_name", "leaf_index", "tree_size", "path")


@settings(deadline=None)
@given(st.data())
def test_a_flipped_bit_is_refused_or_not_proven(data: st.DataObject) -> None:
    line = bytearray(SCENE.lines[0])
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        record = parse_record(bytes(line))
    except EvidenceFormatError:
        return
    proof = prove([record], NONCES[0], evidence=parse_evidence(SCENE.body(0)))
    if proof is not None and proof.problem is None:
        # Nothing that is bound differs: hex in capitals, or a field that nothing binds.
        changed = {
            field.name
            for field in dataclasses.fields(record)
            if getattr(record, field.name) != getattr(SCENE.records[0], field.name)
        }
        assert changed <= set(UNBOUND)


def test_unknown_keys_are_ignored_and_unknown_formats_refused() -> None:
    values = json.loads(SCENE.lines[0])
    assert parse_record(json.dumps({**values, "host": "x"}).encode()) == SCENE.records[0]
    for other in ("provider-proxy/audit/2", "", 1, None):
        with pytest.raises(EvidenceFormatError):
            parse_record(json.dumps({**values, "format": other}).encode())


# --- the command ------------------------------------------------------------------------------------


class Folder:
    """A directory with a log, a reply, and the command run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "audit.jsonl"
        (path / "audit.jsonl.1").write_bytes(b"".join(SCENE.lines[:2]))
        self.log.write_bytes(b"".join(SCENE.lines[2:]))
        for place in range(5):
            (path / f"evidence-{place}.json").write_bytes(SCENE.body(place))

    def run(self, *words: str) -> tuple[int, str, str]:
        done = run_here("audit", *words, "--log", "audit.jsonl", cwd=self.path)
        assert_no_nonce(done.stdout + done.stderr + " ")
        return done.returncode, done.stdout, done.stderr

    def run_json(self, *words: str) -> tuple[int, dict[str, Any]]:
        code, out, _ = self.run(*words, "--json")
        values: dict[str, Any] = json.loads(out.splitlines()[-1])
        return code, values

    def prove(self, place: int, *words: str) -> tuple[int, dict[str, Any]]:
        return self.run_json("prove", "--nonce", NONCES[place].decode(), *words)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize("place", range(4))
def test_the_command_proves_with_exit_0(folder: Folder, place: int) -> None:
    code, values = folder.prove(place)
    leaf = SCENE.records[place].leaf
    assert leaf is not None
    assert code == 0
    assert values["found"] is values["proven"] is True
    assert values["problem"] is None
    assert values["evidence_checked"] is False
    assert values["record"]["batch"] == SCENE.records[place].batch
    assert values["record"]["root"] == leaf.root.hex()
    assert values["damaged_lines"] == 0


def test_batches_are_named_at_random() -> None:
    """Numbers would tell a tenant, by two records of its own, how many batches others had in between."""
    batches = [records_from(SCENE.tpm, SCENE.batch)[0].batch for _ in range(64)]
    assert len(set(batches)) == 64
    assert all(re.fullmatch("[0-9a-f]{24}", name) for name in batches)
    bits = [int(name, 16) >> place & 1 for name in batches for place in range(96)]
    assert 0.4 < sum(bits) / len(bits) < 0.6  # no time, count or padding in it


def test_the_command_proves_in_words(folder: Folder) -> None:
    leaf = SCENE.records[0].leaf
    assert leaf is not None
    code, out, _ = folder.run("prove", "--nonce", NONCES[0].decode())
    assert code == 0
    assert out.startswith(
        f"in batch {SCENE.records[0].batch} under root {leaf.root.hex()} "
        f"at index {leaf.proof.leaf_index} of 8\n"
    )
    assert "only the evidence can show" in out


def test_the_command_proves_a_request_with_a_vm_and_its_evidence(folder: Folder) -> None:
    words = ("--mask", "0x3", "--bank", "sha256", "--vm", str(VM))
    code, values = folder.prove(WITH_VM, *words, "--evidence", f"evidence-{WITH_VM}.json")
    assert (code, values["proven"], values["evidence_checked"]) == (0, True, True)
    code, values = folder.prove(WITH_VM)  # without the VM's name
    assert (code, values["found"], values["proven"]) == (1, True, False)


def test_the_command_finds_nothing_with_exit_1(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    other = ("prove", "--nonce", "another-nonce-0123")
    code, values = folder.run_json(*other)
    assert code == 1
    assert values["found"] is values["proven"] is False
    assert values["record"] is None
    with folder.log.open("ab") as file:
        file.write(b"damage\n")
    code, out, _ = folder.run(*other)
    assert (code, out) == (1, "not in this log (skipped 1 damaged lines)\n")
    assert "skipping audit.jsonl:4" in caplog.text


def test_the_command_refuses_a_changed_record_with_exit_1(folder: Folder) -> None:
    folder.log.write_bytes(mutated(SCENE.lines[2], "root", flip))
    code, values = folder.prove(2)
    assert (code, values["found"], values["proven"]) == (1, True, False)
    assert "the record is not consistent" in values["problem"]
    code, out, _ = folder.run("prove", "--nonce", NONCES[2].decode())
    assert code == 1
    assert out.startswith("recorded, but not proven: the record is not consistent: the path")


def test_the_command_refuses_evidence_over_another_root_with_exit_1(folder: Folder) -> None:
    other = quote_now(SCENE.tpm, [waiter(NONCES[0])])
    (folder.path / "other.json").write_bytes(body_of(SCENE.tpm, other, 0))
    code, values = folder.prove(0, "--evidence", "other.json")
    assert (code, values["found"], values["proven"]) == (1, True, False)
    assert values["problem"] == "the quote is not over the recorded root"
    code, values = folder.prove(0, "--evidence", f"evidence-{WITH_VM}.json")  # other claims
    assert code == 1
    (folder.path / "broken.json").write_bytes(b"{}")
    code, _, err = folder.run("prove", "--nonce", NONCES[0].decode(), "--evidence", "broken.json")
    assert code == 1
    assert "EvidenceFormatError" in err


def test_the_command_tells_a_failed_request(folder: Folder) -> None:
    folder.log.write_bytes(encode_record(quote_failed(NONCES[0])[0]))
    (folder.path / "audit.jsonl.1").unlink()
    code, values = folder.prove(0)
    assert (code, values["found"], values["proven"]) == (1, True, False)
    assert values["problem"] == "the request ended with QuoteError"
    assert values["qualifying"] is None


@pytest.mark.parametrize(
    "words",
    [
        ("prove", "--nonce", "short"),
        ("prove", "--nonce", "n" * 16, "--mask", "3"),
        ("prove", "--nonce", "n" * 16, "--bank", "md5"),
        ("prove", "--nonce", "n" * 16, "--vm", "x"),
        ("prove",),
        ("show", "--last", "0"),
        ("show", "--last", "x"),
        ("show", "--last", "9" * 5000),
        (),
    ],
)
def test_wrong_arguments_give_exit_2(folder: Folder, words: tuple[str, ...]) -> None:
    assert folder.run(*words)[0] == 2


def test_a_missing_file_gives_exit_3(folder: Folder) -> None:
    nonce = ("prove", "--nonce", NONCES[0].decode())
    assert folder.run(*nonce, "--evidence", "none.json")[0] == 3
    folder.log.unlink()
    (folder.path / "audit.jsonl.1").unlink()
    assert folder.run(*nonce)[0] == 3
    assert folder.run("show")[0] == 3


def test_show_selects(folder: Folder) -> None:
    code, values = folder.run_json("show")
    assert code == 0
    assert [record["tenant"] for record in values["records"]] == [f"tenant-{n}" for n in range(5)]
    assert values["records"][0] == json.loads(SCENE.lines[0])
    for words, expected in (
        (("--last", "2"), ["tenant-3", "tenant-4"]),
        (("--tenant", "tenant-1"), ["tenant-1"]),
        (("--tenant", "tenant-1", "--last", "9"), ["tenant-1"]),
        (("--tenant", "nobody"), []),
    ):
        code, values = folder.run_json("show", *words)
        assert code == 0
        assert [record["tenant"] for record in values["records"]] == expected


def test_show_in_words_is_a_line_a_record(folder: Folder) -> None:
    code, out, _ = folder.run("show", "--last", "1")
    leaf = SCENE.records[WITH_VM].leaf
    assert leaf is not None
    assert code == 0
    assert out.split() == [
        "2026-01-01T00:00:00.123+00:00",
        '"tenant-4"',
        SCENE.records[WITH_VM].batch,
        f"{leaf.proof.leaf_index}/8",
        "0x3",
        "sha256",
        "ok",
        SCENE.records[WITH_VM].request_hash.hex(),
    ]


def test_show_counts_damage_and_goes_on(folder: Folder) -> None:
    with folder.log.open("ab") as file:
        file.write(b"damage\n" + SCENE.lines[0])
    code, values = folder.run_json("show")
    assert (code, len(values["records"]), values["damaged_lines"]) == (0, 6, 1)


def test_what_a_log_holds_does_not_reach_the_terminal_raw(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    hostile = dataclasses.replace(SCENE.records[2], tenant="\x1b[2J\ud800\u202e\n")
    folder.log.write_bytes(encode_record(hostile) + b"\x1b[2J\n")
    for words in (("show",), ("show", "--json"), ("prove", "--nonce", NONCES[2].decode())):
        code, out, err = folder.run(*words)
        assert code == 0
        assert set(out + err + caplog.text) <= {"\n", *map(chr, range(32, 127))}


def test_the_command_needs_cryptography_alone() -> None:
    assert brought_by("provider_proxy.cli.audit") <= {"provider_proxy"} | CRYPTOGRAPHY


# --- the document -----------------------------------------------------------------------------------

DOCUMENT = (DOCS / "audit.md").read_text(encoding="utf-8")


def test_every_key_of_a_record_is_documented() -> None:
    assert re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE) == list(json.loads(SCENE.lines[0]))


def test_documented_limits_are_the_code_s() -> None:
    assert f"at most {audit.MAX_LINE_BYTES} bytes" in DOCUMENT
    assert f"cut to {audit.MAX_TENANT_CHARS} characters" in DOCUMENT
    assert f"({audit_file.DEFAULT_MAX_BYTES >> 20} MiB by default)" in DOCUMENT
    assert audit_file.DEFAULT_KEEP == 8
    assert f"{audit_file.MAX_KEEP} at the most" in DOCUMENT
    assert f"`FILE.{audit_file.MAX_KEEP}`" in DOCUMENT
    assert f"given {audit_file.WRITE_LIMIT_S:g} s" in DOCUMENT
    assert audit.REQUEST_LABEL == b"provider-proxy/audit-request/1\0"
    assert f'"{audit.REQUEST_LABEL[:-1].decode()}" || 0x00' in DOCUMENT


def test_what_the_command_says_is_documented(folder: Folder) -> None:
    _, proven = folder.prove(0)
    shown = folder.run_json("show")[1]
    for key in {*proven, *shown}:
        assert f"`{key}`" in DOCUMENT
    broken = mutated(SCENE.lines[2], "root", flip)
    folder.log.write_bytes(broken + encode_record(quote_failed(NONCES[3])[0]))
    (folder.path / "other.json").write_bytes(
        body_of(SCENE.tpm, quote_now(SCENE.tpm, [waiter(NONCES[0])]), 0)
    )
    for words, row in (
        ((NONCES[0],), "in batch … under root … at index … | 0 | `true` | `true` |"),
        ((NONCES[0], "--evidence", "other.json"), "root | 1 | `true` | `false` |"),
        ((NONCES[2],), "is not consistent | 1 | `true` | `false` |"),
        ((NONCES[3],), "the request ended with an error | 1 | `true` | `false` |"),
        ((b"n" * 16,), "not in this log | 1 | `false` | `false` |"),
    ):
        nonce, *more = (word.decode() if isinstance(word, bytes) else word for word in words)
        code, out, _ = folder.run("prove", "--nonce", nonce, *more)
        (said,) = (line for line in DOCUMENT.splitlines() if line.endswith(row))
        assert f"| {code} |" in said
        for part in said.split("|")[1].replace("an error", "QuoteError").split("…"):
            assert part.strip() in out


async def test_each_loss_is_told(tmp_path: Path) -> None:
    losses: list[None] = []
    log = AuditLog(tmp_path / "none" / "audit.log", on_loss=lambda: losses.append(None))
    await log.write([])
    await log.write([])
    assert len(losses) == log.failures == 2
