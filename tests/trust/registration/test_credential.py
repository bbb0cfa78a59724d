"""A registrar's challenge is cut strictly, and answered as Keylime's agents do."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from challenges import encode_challenge
from hypothesis import given
from hypothesis import strategies as st

from provider_proxy.errors import EvidenceFormatError
from provider_proxy.trust.registration.credential import (
    MAX_BLOB_BYTES,
    MAX_ID_OBJECT_BYTES,
    MAX_SECRET_BYTES,
    auth_tag,
    parse_challenge,
)


def sized(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


HEAD = bytes.fromhex("badcc0de00000001")
ID_OBJECT = sized(sized(b"h" * 32) + b"e" * 34)
SECRET = sized(b"s" * 256)
GOOD = HEAD + ID_OBJECT + SECRET


def test_a_challenge_is_cut_into_its_two_structures() -> None:
    assert len(GOOD) == 8 + 2 + 68 + 2 + 256 == 336  # as Keylime's for an RSA-2048 EK
    assert parse_challenge(GOOD) == (ID_OBJECT, SECRET)
    assert encode_challenge(ID_OBJECT, SECRET) == GOOD


def test_the_largest_challenge() -> None:
    credential = sized(sized(b"h" * 64) + b"e" * (MAX_ID_OBJECT_BYTES - 66))
    blob = HEAD + credential + sized(b"s" * MAX_SECRET_BYTES)
    assert len(blob) == MAX_BLOB_BYTES
    assert parse_challenge(blob)[0] == credential


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        GOOD[:-1],
        GOOD + b"\0",
        b"\0" + GOOD[1:],
        HEAD[:4] + b"\0\0\0\2" + GOOD[8:],
        HEAD + sized(b"") + SECRET,
        HEAD + ID_OBJECT + sized(b""),
        HEAD + sized(sized(b"h" * 32)) + SECRET,
        HEAD + sized(sized(b"h" * 65) + b"e" * 34) + SECRET,
        HEAD + sized(b"\xff\xff" + b"e" * 34) + SECRET,
        HEAD + sized(sized(b"h" * 64) + b"e" * 67) + SECRET,
        HEAD + ID_OBJECT + sized(b"s" * 513),
    ],
)
def test_what_is_no_challenge_is_refused(blob: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        parse_challenge(blob)


@given(st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    for blob in (data, HEAD + data):
        try:
            parts = parse_challenge(blob)
        except EvidenceFormatError:
            continue
        assert encode_challenge(*parts) == blob


def test_the_tag_is_keylimes() -> None:
    key = bytes(range(32))
    text = base64.b64encode(key)  # the key's text, not its bytes
    wanted = hmac.new(text, b"agent-1", hashlib.sha384).hexdigest()
    assert auth_tag(key, "agent-1") == wanted
    assert auth_tag(key, "agent-2") != wanted
