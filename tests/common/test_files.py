"""Missing is one thing, closed to us another."""

from __future__ import annotations

from pathlib import Path

import pytest

from provider_proxy.common.files import FileLock, files_in, is_there, make_private_folder
from provider_proxy.common.settings.values import read_identities
from provider_proxy.errors import ConfigError, HostError, UsageError
from provider_proxy.trust.ek_store import EkStore
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


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path) -> None:
    """Before, glob() gave nothing: pins, certificates of tenants and CAs were passed over."""
    (tmp_path / "b.json").touch()
    (tmp_path / "a.json").touch()
    (tmp_path / "a.txt").touch()
    assert [path.name for path in files_in(tmp_path, ".json")] == ["a.json", "b.json"]
    assert files_in(tmp_path / "none", ".json") == []
    no_folder = tmp_path / "a.txt"
    with pytest.raises(HostError, match=f"^cannot read {no_folder}: Not a directory"):
        files_in(no_folder, ".json")
    with pytest.raises(HostError, match="Not a directory"):
        PinStore(no_folder).labels()
    with pytest.raises(HostError, match=r"^cannot read the CAs in .*: Not a directory"):
        EkStore(no_folder / "ca.pem")
    with pytest.raises(HostError, match="Not a directory"):
        FileLock(no_folder / "lock").take()
    with pytest.raises(HostError, match="Not a directory"):
        make_private_folder(no_folder / "below")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dns:Acme.example", '"dns:Acme.example" has capitals: write "dns:acme.example"'),
        ("DNS:acme", 'has capitals: write "dns:acme"'),
        (
            "sha256:" + "AA:" * 31 + "AA",
            f'has colons or capitals in its hex: write "sha256:{"aa" * 32}"',
        ),
        ("sha256:abc", "of that kind, which is the certificate's SHA-256, 64 hex digits"),
        ("acme", "does not begin with one of spiffe:, dns:"),
    ],
)
def test_an_identity_says_which_rule_it_breaks(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_identities("tenants.a.identities", ["uid:0", text])
    assert str(caught.value).startswith("tenants.a.identities must be identities: ")
    assert words in str(caught.value)
