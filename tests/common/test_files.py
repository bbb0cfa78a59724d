"""Missing is one thing, closed to us another."""

from __future__ import annotations

from pathlib import Path

import pytest

from provider_proxy.common.files import is_there
from provider_proxy.common.settings.values import read_identities
from provider_proxy.errors import ConfigError, HostError, UsageError
from provider_proxy.trust.pins import PinStore


def test_what_cannot_be_looked_at_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: a traceback, or "is not pinned", which is false."""
    assert is_there(tmp_path)
    assert not is_there(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"^cannot look at .*: Not a directory"):
        is_there(tmp_path / "file" / "pin.json")
    pins = PinStore(tmp_path / "file")
    for ask in (pins.load, pins.has):
        with pytest.raises(HostError, match="cannot look at"):
            ask("h")
    with pytest.raises(UsageError, match="h is not pinned"):
        PinStore(tmp_path).load("h")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dns:Acme.example", '"dns:Acme.example" has capitals: write "dns:acme.example"'),
        ("DNS:acme", 'has capitals: write "dns:acme"'),
        (
            "sha256:" + "AA:" * 31 + "AA",
            f'has colons or capitals in its hex: write "sha256:{"aa" * 32}"',
        ),
        ("sha256:abc", "kind must be: the certificate's SHA-256, 64 hex digits"),
        ("acme", "does not begin with one of spiffe:, dns:"),
    ],
)
def test_an_identity_says_which_rule_it_breaks(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_identities("tenants.a.identities", ["uid:0", text])
    assert str(caught.value).startswith("tenants.a.identities must be identities: ")
    assert words in str(caught.value)
