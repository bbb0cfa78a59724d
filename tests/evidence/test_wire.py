"""JSON, quote string and PCR blob: written once, read back exactly; the vectors have the bad ones."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import replace

import pytest
from evidence_factory import (
    MASK,
    QUOTE_MS,
    FixedTpm,
    SealedBatch,
    claims_about,
    envelope,
    pcr_blob,
    rsa_key,
    seal,
    seal_with_claims,
)

from provider_proxy.errors import EvidenceFormatError
from provider_proxy.evidence import wire
from provider_proxy.evidence.model import (
    MAX_CLAIMS_BYTES,
    MAX_TREE_SIZE,
    HashAlg,
    HostLogs,
    InclusionProof,
    PcrValues,
    Quote,
    Timing,
)
from provider_proxy.evidence.strict_json import Fields, from_base64, parse_json_object
from provider_proxy.evidence.wire import (
    EvidenceEncoder,
    encode_envelope,
    encode_logs,
    encode_pcr_blob,
    encode_quote,
    parse_evidence,
    parse_pcr_blob,
    parse_quote,
)


def encoder_of(batch: SealedBatch, *, boottime: int | None = None) -> EvidenceEncoder:
    return EvidenceEncoder(
        batch.quote,
        ak_name=batch.tpm.ak.name,
        hash_alg=batch.tpm.hash_alg,
        enc_alg="ecc" if batch.tpm.ak.sign_alg == "ecdsa" else "rsa",
        sign_alg=batch.tpm.ak.sign_alg,
        quote_ms=QUOTE_MS,
        boottime=boottime,
    )


@pytest.mark.parametrize("tpm", [FixedTpm(), FixedTpm(rsa_key())], ids=["ecdsa", "rsassa"])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_encoder_writes_what_the_format_says(tpm: FixedTpm, count: int) -> None:
    batch = seal(tpm, count)
    body = b"".join(encoder_of(batch).encode(batch.proof(count - 1)))
    assert json.loads(body) == json.loads(batch.body(count - 1))


def test_encoder_and_parser_agree() -> None:
    batch = seal_with_claims()
    logs = HostLogs(ima="10 é\\\n\u2028", ima_entry=7, uefi=bytes(range(256)))
    parts = encoder_of(batch, boottime=1_700_000_000).encode(
        batch.proof(1), claims=batch.claims_of(1), logs=encode_logs(logs), queued_ms=12.3456
    )
    evidence = parse_evidence(b"".join(parts))
    assert evidence.quote == batch.quote
    assert evidence.proof == batch.proof(1)
    assert evidence.claims == claims_about()
    assert evidence.logs == logs
    assert evidence.boottime == 1_700_000_000
    assert evidence.timing == Timing(queued_ms=12.346, quote_ms=QUOTE_MS)
    assert evidence.mask == MASK
    assert evidence.bank is evidence.hash_alg is HashAlg.SHA256
    assert (evidence.enc_alg, evidence.sign_alg) == ("ecc", "ecdsa")
    assert evidence.ak_name == batch.tpm.ak.name


def test_times_are_written_to_the_microsecond() -> None:
    batch = seal()
    encoder = EvidenceEncoder(
        batch.quote,
        ak_name=batch.tpm.ak.name,
        hash_alg=HashAlg.SHA256,
        enc_alg="ecc",
        sign_alg="ecdsa",
        quote_ms=1.23456789,
    )
    body = b"".join(encoder.encode(batch.proof(0), queued_ms=1e-9))
    assert parse_evidence(body).timing == Timing(queued_ms=0.0, quote_ms=1.235)


def test_what_was_not_sent_is_none() -> None:
    evidence = parse_evidence(seal().body(0))
    assert evidence.claims is None
    assert evidence.boottime is None
    assert evidence.logs == HostLogs()
    results = seal().results(0)
    del results["timing"]
    assert parse_evidence(envelope(results)).timing is None


def test_claims_come_back_byte_for_byte() -> None:
    batch = seal()
    for claims in (b"", b" {}\n", b"\xff\x00", '{"é":1}'.encode(), bytes(MAX_CLAIMS_BYTES)):
        body = b"".join(encoder_of(batch).encode(batch.proof(0), claims=claims))
        assert parse_evidence(body).claims == claims


@pytest.mark.parametrize("size", [MAX_CLAIMS_BYTES + 1, MAX_CLAIMS_BYTES + 2, MAX_CLAIMS_BYTES + 3])
def test_claims_over_their_limit_are_refused(size: int) -> None:
    batch = seal()
    body = b"".join(encoder_of(batch).encode(batch.proof(0), claims=bytes(size)))
    with pytest.raises(EvidenceFormatError):
        parse_evidence(body)


def test_a_path_may_be_empty() -> None:
    # Trees have two leaves at least, but it is the verifier, not the reader, that refuses a lone one.
    proof = InclusionProof(leaf_index=0, tree_size=1, path=(), salt=bytes(16))
    assert parse_evidence(b"".join(encoder_of(seal()).encode(proof))).proof == proof


def test_a_batch_shares_one_log() -> None:
    batch = seal(count=2)
    encoder = encoder_of(batch)
    logs = HostLogs(ima="10 ...\n" * 1000, ima_entry=3, uefi=b"log")
    part = encode_logs(logs)
    first, second = (encoder.encode(batch.proof(n), logs=part) for n in (0, 1))
    assert first[1] is second[1]  # megabytes, for a thousand tenants
    assert first[0] != second[0]


def test_other_parts_of_a_log_are_not_mixed_up() -> None:
    batch = seal(count=2)
    encoder = encoder_of(batch)
    for logs in (
        HostLogs(ima="from 0", ima_entry=0),
        HostLogs(ima="from 1", ima_entry=1),
        HostLogs(ima="from 0", ima_entry=0, uefi=b"log"),
        HostLogs(uefi=b"log"),
        HostLogs(),
        HostLogs(ima="from 0", ima_entry=0),
    ):
        assert (
            parse_evidence(b"".join(encoder.encode(batch.proof(0), logs=encode_logs(logs)))).logs
            == logs
        )


def test_the_largest_answer_without_logs_is_within_its_limit() -> None:
    tpm = FixedTpm(rsa_key())
    pcrs = tpm.read(HashAlg.SHA512, 0xFFFFFF)
    quote = Quote(attest=bytes(512), signature=bytes(1024), pcrs=pcrs)
    batch = replace(seal(tpm), seed=2)
    batch.__dict__["quote"] = quote
    proof = InclusionProof(
        leaf_index=MAX_TREE_SIZE - 1,
        tree_size=MAX_TREE_SIZE,
        path=(bytes(32),) * 20,
        salt=bytes(16),
    )
    parts = encoder_of(batch, boottime=1 << 40).encode(proof, claims=bytes(MAX_CLAIMS_BYTES))
    body = b"".join(parts)
    assert len(body) < wire.MAX_EVIDENCE_BYTES
    assert parse_evidence(body).quote == quote


def changed(**changes: object) -> bytes:
    values = json.loads(seal().body(0))
    values["results"] |= changes
    return json.dumps(values).encode()


def test_why_a_log_is_missing_comes_back() -> None:
    logs = HostLogs(ima_missing='absent "here"', uefi_missing="too long")
    body = b"".join(encoder_of(seal()).encode(seal().proof(0), logs=encode_logs(logs)))
    assert parse_evidence(body).logs == logs


@pytest.mark.parametrize(
    ("most", "more"),
    [
        (
            {"ima_measurement_list": "", "ima_measurement_list_entry": 1 << 40},
            {"ima_measurement_list": "", "ima_measurement_list_entry": (1 << 40) + 1},
        ),
        (
            {"ima_measurement_list_missing": "a" * 200},
            {"ima_measurement_list_missing": "a" * 201},
        ),
        ({"mb_measurement_list_missing": "a" * 200}, {"mb_measurement_list_missing": "a" * 201}),
        ({"boottime": 1 << 62}, {"boottime": (1 << 62) + 1}),
    ],
)
def test_a_value_may_reach_its_limit(most: dict[str, object], more: dict[str, object]) -> None:
    parse_evidence(changed(**most))
    with pytest.raises(EvidenceFormatError):
        parse_evidence(changed(**more))


def test_limits_are_the_documented_ones() -> None:
    assert wire.MAX_EVIDENCE_BYTES == 65_536
    assert wire.MAX_EVIDENCE_WITH_LOGS_BYTES == 10_485_760
    assert wire.MAX_QUOTE_STRING == 16_384
    assert wire.PATH_LIMIT == 20
    assert MAX_CLAIMS_BYTES == 16_384
    assert MAX_TREE_SIZE == 1_048_576


def test_a_reply_over_the_limit_is_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    body = seal().body(0)
    monkeypatch.setattr(wire, "MAX_EVIDENCE_WITH_LOGS_BYTES", len(body))
    parse_evidence(body)
    with pytest.raises(EvidenceFormatError, match="too large"):
        parse_evidence(body + b" ")


def test_no_prefix_of_a_body_is_evidence() -> None:
    body = seal().body(0)
    for length in range(len(body)):
        with pytest.raises(EvidenceFormatError):
            parse_evidence(body[:length])


@pytest.mark.parametrize("bank", list(HashAlg))
def test_pcr_blob_is_tpm2_quotes_and_comes_back(bank: HashAlg) -> None:
    rng = random.Random(bank)
    masks = [1 << pcr for pcr in range(24)] + [rng.randrange(1, 1 << 24) for _ in range(50)]
    for mask in (*masks, 0xFF, 0x1FF, 0xFFFF, 0x1FFFF, 0xFFFFFF):
        numbers = [pcr for pcr in range(24) if mask >> pcr & 1]
        values = tuple((pcr, rng.randbytes(bank.digest_bytes)) for pcr in numbers)
        pcrs = PcrValues(bank=bank, values=values)
        blob = encode_pcr_blob(pcrs)
        assert blob == pcr_blob(pcrs)
        assert len(blob) == 136 + 532 * -(-len(numbers) // 8)
        assert parse_pcr_blob(blob) == pcrs


def test_any_bit_of_a_pcr_blob_is_a_value_or_refused() -> None:
    pcrs = FixedTpm().read(HashAlg.SHA256, MASK)
    blob = encode_pcr_blob(pcrs)
    read = []
    for at in range(len(blob)):
        for bit in range(8):
            changed = bytearray(blob)
            changed[at] ^= 1 << bit
            try:
                other = parse_pcr_blob(bytes(changed))
            except EvidenceFormatError:
                continue
            assert other != pcrs
            assert encode_pcr_blob(other) == changed
            read.append((at, bit))
    # Three digests of 256 bits; and no bit beside them has a second reading.
    starts = [140 + slot * 66 + 2 for slot in range(3)]
    assert read == [(at + n, bit) for at in starts for n in range(32) for bit in range(8)]


def test_quote_string_comes_back() -> None:
    quote = seal().quote
    assert parse_quote(encode_quote(quote)) == quote
    assert encode_quote(quote).startswith("r/1RDR4AY")  # as every quote of Keylime's


@pytest.mark.parametrize("text", ["", "r", "r:", "r::", "r:::", ":", "q::", "r\u00e9::", "::r"])
def test_other_quote_strings_are_refused(text: str) -> None:
    with pytest.raises(EvidenceFormatError):
        parse_quote(text)


def test_base64_has_one_writing() -> None:
    assert from_base64("", "x") == b""
    assert from_base64("AA==", "x") == b"\0"
    for text in ("AB==", "AA=", "AA", "AA===", "A A==", "AA==\n", "-_==", "AAA\u00c9", "=", "A"):
        with pytest.raises(EvidenceFormatError):
            from_base64(text, "x")


def test_json_objects_are_read() -> None:
    assert parse_json_object(b' {"a": [1, 2.5, null, {"b": "\\u00e9"}]} ', "x") == {
        "a": [1, 2.5, None, {"b": "é"}]
    }


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"[" * 200_000, id="200,000 lists open"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="100,000 objects deep"),
        pytest.param(b'{"a":' + b"9" * 100_000 + b"}", id="100,000 digits"),
        pytest.param(b'{"a":"\x00"}', id="a control character"),
        pytest.param(b'{"a":1,"a":1}', id="a key twice"),
        pytest.param(b'{"a":{"b":[{"c":1,"d":2,"c":3}]}}', id="a key twice, deep inside"),
        pytest.param(b'{"a":nan}', id="nan"),
        pytest.param(b'{"a":NaN}', id="NaN"),
        pytest.param(b'{"a":[-Infinity]}', id="-Infinity"),
        pytest.param(b"{'a':1}", id="single quotes"),
        pytest.param(b"\xff\xfe{\x00}\x00", id="UTF-16"),
        pytest.param(b'{"a":"\xed\xa0\x80"}', id="a surrogate in UTF-8"),
        pytest.param(b"{}\x00", id="a zero byte after it"),
        pytest.param(b"7", id="a number"),
        pytest.param(b"[]", id="a list"),
    ],
)
def test_other_json_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        parse_json_object(data, "x")


def test_numbers_are_bounded_and_no_booleans() -> None:
    fields = Fields({"yes": True, "minus": -1, "big": 1 << 5000, "float": 1.5, "edge": 8}, "x")
    assert fields.integer("edge", 8) == 8
    assert fields.number("edge") == 8.0
    assert fields.number("float") == 1.5
    for key in ("yes", "minus", "big", "missing"):
        with pytest.raises(EvidenceFormatError):
            fields.integer(key, 8)
        with pytest.raises(EvidenceFormatError):
            fields.number(key)
    for key, limit in (("float", 8), ("edge", 7)):
        with pytest.raises(EvidenceFormatError):
            fields.integer(key, limit)


def test_a_time_is_below_its_bound() -> None:
    most = 999_999_999_999.5
    assert Fields({"n": most}, "it").number("n") == most
    with pytest.raises(EvidenceFormatError, match="out of bounds"):
        Fields({"n": 1e12}, "it").number("n")


def test_hex_has_no_white_space() -> None:
    fields = Fields({"a": "00ff", "b": "00 ff", "c": "00\nff", "d": "0x00", "e": "0", "f": ""}, "x")
    assert fields.hex("a", 2) == b"\x00\xff"
    for key in "bcdef":
        with pytest.raises(EvidenceFormatError):
            fields.hex(key, 32)
    with pytest.raises(EvidenceFormatError):
        fields.hex("a", 1)


def test_an_envelope_is_keylimes() -> None:
    body = encode_envelope(400, "mask: is missing é", {})
    assert body == b'{"code":400,"status":"mask: is missing \\u00e9","results":{}}'


def test_a_hostile_name_of_a_field_changes_nothing() -> None:
    # Keys that mean something to Python or JavaScript are unknown keys like others.
    results = seal().results(0) | {"__class__": 1, "__proto__": {"format": 9}, "": None}
    assert parse_evidence(envelope(results)) == parse_evidence(seal().body(0))


def test_the_signature_is_read_as_bytes_not_as_json() -> None:
    # Three parts of the quote are base64 of anything; whether they mean something is for others to say.
    blob = base64.b64encode(encode_pcr_blob(FixedTpm().read(HashAlg.SHA256, 1))).decode()
    quote = parse_quote(f"r{base64.b64encode(b'no attest').decode()}:AAAA:{blob}")
    assert (quote.attest, quote.signature) == (b"no attest", b"\0\0\0")
