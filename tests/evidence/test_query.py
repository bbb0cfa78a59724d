"""The parameters of GET /verifier/quote, as a tenant writes and the server reads them."""

from __future__ import annotations

import uuid

import pytest

from provider_proxy.errors import ParameterError
from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, QuoteRequest
from provider_proxy.evidence.query import MAX_QUERY_CHARS, encode_quote_query, parse_quote_query

NONCE = "AZaz09._~-AZaz09"
GOOD = f"nonce={NONCE}&mask=0x83"
VM = "0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b"


def refused(query: str) -> str:
    """The parameter that a query is refused for."""
    with pytest.raises(ParameterError) as caught:
        parse_quote_query(query)
    assert caught.value.status == 400
    assert caught.value.parameter is not None
    return caught.value.parameter


def test_defaults() -> None:
    assert parse_quote_query(GOOD) == QuoteRequest(nonce=Nonce(NONCE.encode()), mask=PcrMask(0x83))


def test_everything_at_once_comes_back() -> None:
    request = QuoteRequest(
        nonce=Nonce(b"~" * 64),
        mask=PcrMask(0xFFFFFF),
        bank=HashAlg.SHA512,
        vm=uuid.UUID(VM),
        ima_ml_entry=1 << 31,
        timeout_ms=600_000,
        logs=False,
    )
    query = encode_quote_query(request)
    assert parse_quote_query(query) == request
    assert len(query) < MAX_QUERY_CHARS


@pytest.mark.parametrize("bank", list(HashAlg))
def test_every_bank_comes_back(bank: HashAlg) -> None:
    request = QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(1), bank=bank)
    assert parse_quote_query(encode_quote_query(request)) == request


def test_the_order_is_free() -> None:
    parts = [f"nonce={NONCE}", "mask=0x1", f"vm={VM}", "bank=sha384", "timeout_ms=1"]
    assert parse_quote_query("&".join(parts)) == parse_quote_query("&".join(reversed(parts)))


def test_percent_encoding_is_the_same_text() -> None:
    quoted = "".join(f"%{ord(c):02x}" for c in NONCE)
    assert parse_quote_query(f"nonce={quoted}&m%61sk=%30x83") == parse_quote_query(GOOD)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("", "nonce"),
        (f"nonce={NONCE}", "mask"),
        ("mask=0x1", "nonce"),
        (GOOD + "&mask=0x83", "mask"),
        (GOOD + "&nonce=" + NONCE, "nonce"),
        (GOOD + "&bank=sha256&bank=sha256", "bank"),
        (GOOD + "&partial=1", "partial"),
        (GOOD + "&Mask=0x1", "Mask"),
        (GOOD + "&nonce%00=1", "nonce?"),
        (GOOD + "&=1", "(empty name)"),
        (GOOD + "&" + "n" * 100 + "=1", "n" * 40),
        (GOOD + "&", "query"),
        (GOOD + "&&bank=sha256", "query"),
        (GOOD + "&bank", "query"),
        ("&" + GOOD, "query"),
        (GOOD + "&bank=%ff", "bank"),
        (GOOD + "&" + "&".join(f"vm={VM}" for _ in range(8)), "vm"),
        (GOOD + "&timeout_ms=" + "1" * 600, "query"),
        (GOOD.replace("&", ";"), "nonce"),
    ],
)
def test_ill_formed_queries_name_the_parameter(query: str, parameter: str) -> None:
    assert refused(query) == parameter


@pytest.mark.parametrize(
    "nonce",
    [
        "",
        "n" * 15,
        "n" * 65,
        "n" * 15 + "+",
        "n" * 16 + "%0A",
        "n" * 15 + "%2F",
        "n" * 15 + "%C3%A9",
    ]
    + ["n" * 15 + c for c in ":=@!* "],
)
def test_other_nonces_are_refused(nonce: str) -> None:
    assert refused(f"nonce={nonce}&mask=0x1") == "nonce"


@pytest.mark.parametrize("nonce", ["n" * 16, "n" * 64])
def test_nonces_from_16_to_64_are_taken(nonce: str) -> None:
    assert parse_quote_query(f"nonce={nonce}&mask=0x1").nonce == nonce.encode()


@pytest.mark.parametrize(
    "mask",
    [
        "",
        "0",
        "0x",
        "0x0",
        "0x000000",
        "83",
        "131",
        "0X83",
        "x83",
        "0x8_3",
        "0x+3",
        "-0x1",
        "0x1%0A",
        *("0x1000000", "0xffffffff", "0x000000001", "0x100000000", "0xg", "0x1.0", "%EF%BC%90x1"),
    ],
)
def test_other_masks_are_refused(mask: str) -> None:
    # 10 above all: one of Keylime's agents reads it as hex, the other as decimal.
    assert refused(f"nonce={NONCE}&mask={mask}") == "mask"


@pytest.mark.parametrize(
    ("mask", "value"), [("0x1", 1), ("0x00FFffFF", 0xFFFFFF), ("0x800000", 1 << 23)]
)
def test_masks_within_24_pcrs_are_taken(mask: str, value: int) -> None:
    assert parse_quote_query(f"nonce={NONCE}&mask={mask}").mask == value


@pytest.mark.parametrize(
    "bank", ["", "SHA256", "sha-256", "sm3_256", "sha3_256", "11", "sha256%20"]
)
def test_other_banks_are_refused(bank: str) -> None:
    assert refused(f"{GOOD}&bank={bank}") == "bank"


@pytest.mark.parametrize(
    "vm",
    [
        "",
        "x",
        VM.upper(),
        VM.replace("-", ""),
        "{" + VM + "}",
        "urn:uuid:" + VM,
        VM + "%20",
        VM[:-1],
        VM[:-1] + "%D9%A1",
    ],
)
def test_a_vm_has_one_writing(vm: str) -> None:
    assert refused(f"{GOOD}&vm={vm}") == "vm"


@pytest.mark.parametrize("text", ["", "no", "None", "NONE", "all", "0", "none "])
def test_logs_are_left_out_in_one_spelling(text: str) -> None:
    assert parse_quote_query(GOOD).logs
    assert not parse_quote_query(f"{GOOD}&logs=none").logs
    with pytest.raises(ParameterError) as caught:
        parse_quote_query(f"{GOOD}&logs={text}")
    assert caught.value.parameter == "logs"


@pytest.mark.parametrize(
    "number", ["", "-1", "+1", "1.0", "1e3", "0x1", "1_0", "%20 1", "%D9%A1", "%C2%B2"]
)
@pytest.mark.parametrize("name", ["ima_ml_entry", "timeout_ms"])
def test_numbers_are_plain_decimals(name: str, number: str) -> None:
    assert refused(f"{GOOD}&{name}={number}") == name


@pytest.mark.parametrize(
    ("name", "least", "most"), [("ima_ml_entry", 0, 1 << 31), ("timeout_ms", 1, 600_000)]
)
def test_numbers_have_bounds(name: str, least: int, most: int) -> None:
    for good in (least, most):
        assert getattr(parse_quote_query(f"{GOOD}&{name}={good}"), name) == good
    for bad in (most + 1, 10**11):
        assert refused(f"{GOOD}&{name}={bad}") == name
    if least:
        assert refused(f"{GOOD}&{name}={least - 1}") == name


def test_a_query_has_a_length_limit() -> None:
    assert refused("x" * 511 + "=") == "x" * 40  # 512 characters are read, and found unknown
    assert refused("x" * 512 + "=") == "query"


def test_defaults_are_not_written() -> None:
    # A proxy that knows fewer parameters still understands the plain question.
    assert encode_quote_query(parse_quote_query(GOOD)) == GOOD


@pytest.mark.parametrize("length", [0, 15, 65])
def test_a_request_with_another_nonce_cannot_be_made(length: int) -> None:
    with pytest.raises(ParameterError):
        QuoteRequest(nonce=Nonce(b"n" * length), mask=PcrMask(1))


@pytest.mark.parametrize("mask", [0, -1, 1 << 24])
def test_a_request_without_pcrs_cannot_be_made(mask: int) -> None:
    with pytest.raises(ParameterError):
        QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(mask))


def test_nothing_after_the_last_parameter_is_lost() -> None:
    # All six at once, and then one more, known or not.
    full = f"{GOOD}&bank=sha1&vm={VM}&ima_ml_entry=1&timeout_ms=5"
    assert parse_quote_query(full).timeout_ms == 5
    assert refused(full + "&bank=sha1") == "bank"
    assert refused(full + "&x=1") == "x"
    assert refused(full + "&x=1&y=1&nonce=1") == "x"


def test_an_error_shows_no_control_characters() -> None:
    with pytest.raises(ParameterError) as caught:
        parse_quote_query(GOOD + "&%1b[2J%0d%0aSet-Cookie=1")
    assert str(caught.value).isprintable()
    assert caught.value.parameter == "?[2J??Set-Cookie"


@pytest.mark.parametrize("logs", [True, False])
@pytest.mark.parametrize("pcr", range(24))
def test_which_logs_a_request_wants(pcr: int, logs: bool) -> None:
    asked = QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(1 << pcr), logs=logs)
    assert asked.wants_ima == (logs and pcr == 10)
    assert asked.wants_boot_log == (logs and pcr < 16 and pcr != 10)
