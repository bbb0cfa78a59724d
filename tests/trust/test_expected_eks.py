"""An inventory of EKs: what is read, what is refused whole, and that it vouches for its hosts alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from soft_ek import rsa_ek

from provider_proxy.errors import HostError, PinChangedError, UntrustedEkError, UsageError
from provider_proxy.evidence.vtpm_link import spki_digest
from provider_proxy.trust import expected_eks
from provider_proxy.trust.expected_eks import (
    FILE,
    ExpectedEks,
    demand_ek,
    parse_digest,
    parse_inventory,
)

A, B = bytes(range(32)), bytes(range(1, 33))


def test_what_an_inventory_looks_like() -> None:
    text = (
        "\ufeff# our machines\n\n"
        f"host-1 {A.hex()}\n"
        f"host-2,{B.hex().upper()}  # new\n"
        f"host-3;\t{A.hex(':')}\r\n"
        f"host-1 {A.hex()}\n"
    )
    assert parse_inventory(text.encode(), "f") == {"host-1": A, "host-2": B, "host-3": A}
    assert parse_inventory(b"", "f") == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"host {A.hex()}\nhost {B.hex()}", "line 2: host is listed twice"),
        ("host", "line 1: it must be a host and a SHA-256"),
        (f"host {A.hex()} more", "line 1: it must be a host and a SHA-256"),
        (f"host {A.hex()[:-2]}", "line 1: .* is not a SHA-256"),
        (f"host {A.hex()[:-1]}g", "line 1: .* is not a SHA-256"),
        (f"../host {A.hex()}", "line 1: .* is not a host's label"),
        ("h\xf6st\udcff", "is not UTF-8 text"),
    ],
)
def test_what_is_none(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_inventory(text.encode("utf-8", "surrogateescape"), "f")


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected_eks, "MAX_HOSTS", 1)
    with pytest.raises(UsageError, match="more than 1 hosts"):
        parse_inventory(f"a {A.hex()}\nb {A.hex()}\n".encode(), "f")


def test_it_is_kept_and_changed_on_purpose_only(tmp_path: Path) -> None:
    known = ExpectedEks(tmp_path)
    assert known.of("a") is None
    assert known.add({"a": A}) == 1
    other = ExpectedEks(tmp_path)  # of another process
    assert other.of("a") == A
    assert other.add({"b": B, "a": A}) == 2
    assert known.of("b") == B
    with pytest.raises(PinChangedError, match="another EK for a; nothing was changed"):
        known.add({"c": B, "a": B})
    assert known.of("c") is None
    assert known.add({"a": B}, replace=True) == 2
    assert other.of("a") == B
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_damaged_or_open_inventory_vouches_for_nobody(tmp_path: Path) -> None:
    known = ExpectedEks(tmp_path)
    known.add({"a": A})
    (tmp_path / FILE).chmod(0o666)
    os.utime(tmp_path / FILE)
    with pytest.raises(HostError, match="everybody can write it"):
        known.of("a")
    (tmp_path / FILE).chmod(0o600)
    (tmp_path / FILE).write_text("a\n")
    for _ in range(2):
        with pytest.raises(HostError, match=r"the inventory of EKs is damaged.*line 1"):
            known.of("a")


def test_the_digest_is_of_the_public_key() -> None:
    key = rsa_ek().public_key()
    demand_ek(key, spki_digest(key), "host")
    with pytest.raises(
        UntrustedEkError, match=rf"host has another EK \({spki_digest(key).hex()}\)"
    ):
        demand_ek(key, A, "host")
    assert parse_digest(A.hex()) == A
