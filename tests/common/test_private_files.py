"""Private files and folders: nobody else's at any time, and nothing half written is left."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from provider_proxy.common.files import make_private_folder, write_private
from provider_proxy.errors import HostError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_every_folder_that_is_made_is_its_owner_s_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_private_folder(tmp_path / "state" / "tpm" / "more")
        make_private_folder(tmp_path / "state" / "tpm")  # it is there already
        write_private(tmp_path / "other" / "below" / "file", b"x")
    finally:
        os.umask(before)
    for name in ("state", "state/tpm", "state/tpm/more", "other", "other/below"):
        assert mode(tmp_path / name) == 0o700, name
    assert mode(tmp_path / "other/below/file") == 0o600


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "ak.json"
    write_private(path, b"old")

    def fail(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr(os, "fdopen", fail)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(HostError, match="No space left"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["ak.json"]
