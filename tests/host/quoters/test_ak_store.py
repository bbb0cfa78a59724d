"""`ak.json`: the AK's authValue and name, through every crash and mix-up that its docstring names."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from provider_proxy.common.files import write_private
from provider_proxy.errors import HostError
from provider_proxy.host.quoters.ak_store import AUTH_BYTES, AkStore

NAME = b"\x00\x0b" + bytes(range(32))
OTHER = b"\x00\x0b" + bytes(32)


def stored(folder: Path) -> dict[str, str]:
    values: dict[str, str] = json.loads((folder / "ak.json").read_text())
    return values


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_auth_is_on_disk_before_the_ak_is_made(tmp_path: Path) -> None:
    auth = AkStore(tmp_path).auth_for(is_new=True)
    assert len(auth) == AUTH_BYTES
    assert stored(tmp_path) == {"auth": auth.hex()}


def test_nothing_is_written_where_nothing_is_asked(tmp_path: Path) -> None:
    AkStore(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_each_ak_has_an_auth_of_its_own(tmp_path: Path) -> None:
    one, two = (AkStore(tmp_path / name).auth_for(is_new=True) for name in "ab")
    assert one != two


def test_a_crash_before_the_ak_is_made(tmp_path: Path) -> None:
    """The auth is there, the AK is not: it is made with this very auth."""
    auth = AkStore(tmp_path).auth_for(is_new=True)
    assert AkStore(tmp_path).auth_for(is_new=True) == auth


def test_a_crash_after_the_ak_is_made(tmp_path: Path) -> None:
    """The AK is there, its name was never stored: it is found, used, and its name learnt."""
    auth = AkStore(tmp_path).auth_for(is_new=True)
    store = AkStore(tmp_path)
    assert store.auth_for(is_new=False) == auth
    store.confirm(NAME)
    assert stored(tmp_path) == {"auth": auth.hex(), "name": NAME.hex()}


def test_a_later_start(tmp_path: Path) -> None:
    auth = AkStore(tmp_path).auth_for(is_new=True)
    AkStore(tmp_path).confirm(NAME)
    before = (tmp_path / "ak.json").read_bytes()
    store = AkStore(tmp_path)
    assert store.auth_for(is_new=False) == auth
    store.confirm(NAME)
    assert (tmp_path / "ak.json").read_bytes() == before


def test_an_ak_without_ak_json(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"tpm\.ak_handle") as caught:
        AkStore(tmp_path).auth_for(is_new=False)
    assert str(tmp_path / "ak.json") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tpm_that_was_cleared(tmp_path: Path) -> None:
    AkStore(tmp_path).auth_for(is_new=True)
    AkStore(tmp_path).confirm(NAME)
    before = (tmp_path / "ak.json").read_bytes()
    with pytest.raises(HostError, match="cleared or replaced") as caught:
        AkStore(tmp_path).auth_for(is_new=True)
    assert NAME.hex() in str(caught.value)
    assert (tmp_path / "ak.json").read_bytes() == before


def test_another_ak_than_before(tmp_path: Path) -> None:
    AkStore(tmp_path).auth_for(is_new=True)
    AkStore(tmp_path).confirm(NAME)
    before = (tmp_path / "ak.json").read_bytes()
    with pytest.raises(HostError) as caught:
        AkStore(tmp_path).confirm(OTHER)
    assert NAME.hex() in str(caught.value)
    assert OTHER.hex() in str(caught.value)
    assert (tmp_path / "ak.json").read_bytes() == before


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_reads_it(tmp_path: Path, umask: int) -> None:
    state = tmp_path / "deep" / "state"
    before = os.umask(umask)
    try:
        AkStore(state).auth_for(is_new=True)
        AkStore(state).confirm(NAME)
    finally:
        os.umask(before)
    assert mode(state / "ak.json") == 0o600
    assert mode(state) == 0o700
    assert [path.name for path in state.iterdir()] == ["ak.json"]  # no part is left


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    AkStore(tmp_path).auth_for(is_new=True)
    (tmp_path / "ak.json").chmod(0o644)
    with pytest.raises(HostError, match="must not be readable by others"):
        AkStore(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"auth": ""}',
        '{"auth": 7}',
        '{"auth": "zz"}',
        '{"auth": "abc"}',
        '{"auth": "' + "00" * 33 + '"}',
        '{"auth": "00", "auth": "00"}',
        '{"auth": "00", "name": 7}',
        '{"auth": "00", "name": null}',
    ],
)
def test_a_damaged_file_is_named_and_left(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ak.json"
    write_private(path, text.encode())
    with pytest.raises(HostError) as caught:
        AkStore(tmp_path)
    assert str(path) in str(caught.value)
    assert path.read_text() == text


def test_the_auth_is_in_no_message(tmp_path: Path) -> None:
    auth = AkStore(tmp_path).auth_for(is_new=True)
    AkStore(tmp_path).confirm(NAME)
    for refuse in (
        lambda: AkStore(tmp_path).auth_for(is_new=True),
        lambda: AkStore(tmp_path).confirm(OTHER),
    ):
        with pytest.raises(HostError) as caught:
            refuse()
        assert auth.hex() not in str(caught.value)


# --- the write itself -------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ak.json"
    write_private(path, b"old")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError, match=r"cannot write .*: No space left"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"


def test_it_reaches_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ak.json"
    write_private(path, b"old")
    seen: list[tuple[bytes, bytes]] = []
    fsync = os.fsync

    def watch(fd: int) -> None:
        target = Path(f"/proc/self/fd/{fd}")
        synced = target.read_bytes() if target.is_file() else b"directory"
        seen.append((synced, path.read_bytes()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watch)
    write_private(path, b"new")
    assert seen == [(b"new", b"old"), (b"directory", b"new")]


def part_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The name under which a file is written before it takes its place."""
    parts: list[Path] = []
    replace = Path.replace

    def watch(part: Path, target: Path) -> Path:
        parts.append(part)
        return replace(part, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", watch)
        write_private(path, b"old")
    (part,) = parts
    assert part.parent == path.parent
    return part


def test_the_rest_of_a_crashed_write_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ak.json"
    part = part_of(path, monkeypatch)
    part.write_bytes(b"half")
    part.chmod(0o666)
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o600
    assert not part.exists()


def test_a_link_planted_in_place_of_the_part_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, victim = tmp_path / "ak.json", tmp_path / "victim"
    victim.write_bytes(b"precious")
    part_of(path, monkeypatch).symlink_to(victim)
    write_private(path, b"new")
    assert victim.read_bytes() == b"precious"
    assert not path.is_symlink()


def test_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(HostError, match="Not a directory"):
        AkStore(tmp_path / "state").auth_for(is_new=True)
