"""The tenant's own record of a question: nonce, mask and time come from it and from nowhere else."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from provider_proxy.errors import UsageError
from provider_proxy.evidence.model import ClockState, HashAlg, Nonce, PcrMask, QuoteRequest
from provider_proxy.evidence.request_file import RequestRecord, encode_request, parse_request

REQUEST = QuoteRequest(
    nonce=Nonce(b"AZaz09._~-AZaz09"),
    mask=PcrMask(0x83),
    bank=HashAlg.SHA384,
    vm=uuid.UUID("0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b"),
    ima_ml_entry=12,
)
ASKED = RequestRecord(request=REQUEST, made_at_s=1_700_000_000.25, url="https://host:8890")
BODY = b"evidence"
BASELINE = ClockState(
    reset_count=(1 << 32) - 1, restart_count=(1 << 32) - 1, clock_ms=(1 << 64) - 1
)
ANSWERED = replace(ASKED, answered_after_s=0.125, evidence_sha256=sha256(BODY).digest())


def values_of(record: RequestRecord) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(encode_request(record))
    return values


@pytest.mark.parametrize(
    "record",
    [
        ASKED,
        ANSWERED,
        replace(ASKED, request=replace(REQUEST, vm=None, bank=HashAlg.SHA1), url=""),
        replace(ANSWERED, made_at_s=0.0, answered_after_s=0.0),
        replace(ASKED, pinned=True, baseline=BASELINE),
        replace(ASKED, pinned=True),
        replace(
            ANSWERED, pinned=True, baseline=ClockState(reset_count=0, restart_count=0, clock_ms=0)
        ),
    ],
)
def test_a_record_comes_back(record: RequestRecord) -> None:
    assert parse_request(encode_request(record)) == record


def test_a_record_says_its_format_and_is_for_people_too() -> None:
    text = encode_request(ASKED).decode()
    assert text.startswith('{\n  "format": "provider-proxy/request/1",\n')
    assert text.endswith("}\n")
    assert '"nonce": "AZaz09._~-AZaz09"' in text


def test_the_largest_record_comes_back() -> None:
    largest = replace(
        ANSWERED,
        request=replace(REQUEST, ima_ml_entry=1 << 31),
        url="u" * 2048,
        pinned=True,
        baseline=BASELINE,
    )
    assert parse_request(encode_request(largest)) == largest


def test_a_file_has_a_limit() -> None:
    data = encode_request(ASKED)
    assert parse_request(data.ljust(16_384)) == ASKED
    with pytest.raises(UsageError, match="too large"):
        parse_request(data.ljust(16_385))


def test_how_long_the_proxy_might_take_is_not_kept() -> None:
    # It is not a part of the leaf, and no check uses it afterwards.
    asked = replace(ASKED, request=replace(REQUEST, timeout_ms=500))
    assert parse_request(encode_request(asked)) == ASKED


def test_before_an_answer_the_age_is_by_the_wall_clock() -> None:
    assert ASKED.age_s(BODY, ASKED.made_at_s + 5.0) == 5.0
    assert ASKED.age_s(b"any", ASKED.made_at_s - 5.0) == -5.0  # the verifier refuses it


def test_after_an_answer_the_age_is_the_recorded_one() -> None:
    assert ANSWERED.age_s(BODY, ASKED.made_at_s + 1e6) == 0.125


def test_other_evidence_does_not_borrow_the_age() -> None:
    for other in (b"", b"Evidence", BODY + b"\n"):
        with pytest.raises(UsageError, match="not the answer"):
            ANSWERED.age_s(other, ASKED.made_at_s)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "provider-proxy/request/2"),
        ("format", 1),
        ("nonce", "short"),
        ("nonce", "n" * 65),
        ("nonce", "n" * 15 + "\n"),
        ("nonce", None),
        ("mask", "0x0"),
        ("mask", "0x1000000"),
        ("mask", "83"),
        ("mask", 131),
        ("bank", "md5"),
        ("bank", None),
        ("vm", "me"),
        ("vm", 5),
        ("vm", ""),
        ("vm", False),
        ("vm", "0" * 37),
        ("ima_ml_entry", -1),
        ("ima_ml_entry", (1 << 31) + 1),
        ("ima_ml_entry", 1.0),
        ("ima_ml_entry", None),
        ("made_at", "now"),
        ("made_at", -1.0),
        ("made_at", True),
        ("made_at", 1e300),
        ("url", None),
        ("url", "u" * 2049),
        ("answered_after_s", -0.1),
        ("answered_after_s", None),
        ("answered_after_s", "0"),
        ("baseline", []),
        ("baseline", {}),
        ("baseline", {"reset_count": 1, "restart_count": 1}),
        ("baseline", {"reset_count": 1 << 32, "restart_count": 1, "clock_ms": 1}),
        ("baseline", {"reset_count": 1, "restart_count": 1 << 32, "clock_ms": 1}),
        ("baseline", {"reset_count": 1, "restart_count": 1, "clock_ms": 1 << 64}),
        ("baseline", {"reset_count": -1, "restart_count": 1, "clock_ms": 1}),
        ("baseline", {"reset_count": 1, "restart_count": 1.0, "clock_ms": 1}),
        ("evidence_sha256", None),
        ("evidence_sha256", ""),
        ("evidence_sha256", "00" * 33),
        ("evidence_sha256", "zz" * 32),
    ],
)
def test_a_damaged_field_is_a_usage_error(key: str, value: object) -> None:
    with pytest.raises(UsageError):
        parse_request(json.dumps(values_of(ANSWERED) | {key: value}).encode())


@pytest.mark.parametrize(
    "key", ["format", "nonce", "mask", "bank", "ima_ml_entry", "made_at", "url", "evidence_sha256"]
)
def test_a_missing_field_is_a_usage_error(key: str) -> None:
    values = values_of(ANSWERED)
    del values[key]
    with pytest.raises(UsageError):
        parse_request(json.dumps(values).encode())


def test_a_hash_of_another_length_matches_no_evidence() -> None:
    short = values_of(ANSWERED) | {"evidence_sha256": sha256(BODY).hexdigest()[:32]}
    with pytest.raises(UsageError, match="not the answer"):
        parse_request(json.dumps(short).encode()).age_s(BODY, 0.0)


def test_without_the_answers_time_its_hash_counts_for_nothing() -> None:
    values = values_of(ANSWERED)
    del values["answered_after_s"]
    assert parse_request(json.dumps(values).encode()) == ASKED


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"\xff", id="no UTF-8"),
        pytest.param(b"[" * 10_000, id="deep"),
        pytest.param(encode_request(ASKED)[:-3], id="cut short"),
        pytest.param(encode_request(ASKED) * 2, id="twice"),
        pytest.param(
            encode_request(ASKED).replace(b'"bank"', b'"mask": "0x1", "bank"'), id="two masks"
        ),
    ],
)
def test_other_files_are_usage_errors(data: bytes) -> None:
    with pytest.raises(UsageError):
        parse_request(data)
