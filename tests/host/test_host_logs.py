"""The host's logs: which request gets which part of which file."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from provider_proxy.evidence.model import HostLogs, Nonce, PcrMask, QuoteRequest
from provider_proxy.host import logs as hostlogs
from provider_proxy.host.logs import HostLogFiles

IMA = 1 << 10
BOOT = 1 << 0
NEITHER = 1 << 16 | 1 << 23
LINES = [f"10 {n:040x} ima-ng sha256:{n:064x} /usr/bin/{n}\n" for n in range(20)]
UEFI = b"Spec ID Event03\x00" + bytes(range(256))


def ask(mask: int, entry: int = 0) -> QuoteRequest:
    return QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(mask), ima_ml_entry=entry)


@pytest.fixture
def ima(tmp_path: Path) -> Path:
    path = tmp_path / "ima"
    path.write_text("".join(LINES))
    return path


@pytest.fixture
def uefi(tmp_path: Path) -> Path:
    path = tmp_path / "uefi"
    path.write_bytes(UEFI)
    return path


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


async def read_one(files: HostLogFiles, mask: int, entry: int = 0) -> HostLogs | None:
    (logs,) = await files.read((ask(mask, entry),))
    return logs


async def test_each_request_gets_what_its_mask_asks_for(ima: Path, uefi: Path) -> None:
    files = HostLogFiles(ima, uefi)
    text = "".join(LINES)
    masks = (NEITHER, IMA, BOOT, IMA | BOOT, IMA | NEITHER, 0xFFFFFF)
    assert await files.read(tuple(ask(mask) for mask in masks)) == (
        None,
        HostLogs(ima=text),
        HostLogs(uefi=UEFI),
        HostLogs(ima=text, uefi=UEFI),
        HostLogs(ima=text),
        HostLogs(ima=text, uefi=UEFI),
    )


@pytest.mark.parametrize("pcr", range(24))
async def test_the_pcr_that_brings_a_log(ima: Path, uefi: Path, pcr: int) -> None:
    logs = await read_one(HostLogFiles(ima, uefi), 1 << pcr)
    assert (logs is not None and logs.ima is not None) == (pcr == 10)
    assert (logs is not None and logs.uefi is not None) == (pcr < 16 and pcr != 10)


@pytest.mark.parametrize(
    ("entry", "first", "said"),
    [(0, 0, 0), (1, 1, 1), (19, 19, 19), (20, 20, 20), (21, 0, 0), (1 << 31, 0, 0)],
)
async def test_from_an_entry_on(ima: Path, uefi: Path, entry: int, first: int, said: int) -> None:
    """Beyond the end all of it comes: the host has rebooted since the tenant counted."""
    logs = await read_one(HostLogFiles(ima, uefi), IMA, entry)
    assert logs == HostLogs(ima="".join(LINES[first:]), ima_entry=said)


async def test_one_batch_with_many_entries(ima: Path, uefi: Path) -> None:
    requests = tuple(ask(IMA, entry) for entry in (5, 0, 5, 18))
    read = await HostLogFiles(ima, uefi).read(requests)
    assert [(logs.ima_entry, logs.ima) for logs in read if logs] == [
        (entry, "".join(LINES[entry:])) for entry in (5, 0, 5, 18)
    ]


async def test_the_list_as_it_is_now(ima: Path, uefi: Path) -> None:
    files = HostLogFiles(ima, uefi)
    await read_one(files, IMA)
    with ima.open("a") as file:
        file.write("10 new\n")
    assert await read_one(files, IMA, 20) == HostLogs(ima="10 new\n", ima_entry=20)


@pytest.mark.parametrize(
    "name",
    [
        "form\x0cfeed",
        "vertical\x0btab",
        "next\x85line",
        "line\u2028sep",
        "para\u2029",
        "fs\x1c",
        "cr\rx",
    ],
)
async def test_an_entry_ends_with_a_newline_and_nothing_else(
    ima: Path, uefi: Path, name: str
) -> None:
    """A file on the host may have any name; the kernel writes a line an entry, and others count so."""
    lines = [LINES[0], f"10 {1:040x} ima-ng sha256:{1:064x} /tmp/{name}\n", *LINES[2:4]]
    put(ima, "".join(lines).encode())
    logs = await read_one(HostLogFiles(ima, uefi), IMA, 2)
    assert logs == HostLogs(ima="".join(lines[2:]), ima_entry=2)


async def test_bytes_that_are_no_utf_8_are_kept_apart(ima: Path, uefi: Path) -> None:
    put(ima, b"10 a\xffb\n10 a\xfeb\n")
    logs = await read_one(HostLogFiles(ima, uefi), IMA)
    assert logs is not None
    assert logs.ima is not None
    first, second = logs.ima.splitlines()
    assert first != second


# --- bounds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "lines"), [(0, 3), (-1, 2), (1, 3)])
async def test_whole_lines_within_the_limit(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch, room: int, lines: int
) -> None:
    monkeypatch.setattr(hostlogs, "MAX_IMA_BYTES", 3 * len(json.dumps(LINES[10])[1:-1]) + room)
    logs = await read_one(HostLogFiles(ima, uefi), IMA, 10)
    assert logs == HostLogs(ima="".join(LINES[10 : 10 + lines]), ima_entry=10)


async def test_the_limit_is_of_what_is_sent(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JSON a name may be six times as long as in the list."""
    put(ima, "".join(f"10 {n:040x} {'é' * 50}\n" for n in range(100)).encode())
    monkeypatch.setattr(hostlogs, "MAX_IMA_BYTES", 4000)
    logs = await read_one(HostLogFiles(ima, uefi), IMA)
    assert logs is not None
    assert 3000 < len(json.dumps(logs.ima)) <= 4000 + len('""')


async def test_no_log_where_none_is_wanted(ima: Path, uefi: Path) -> None:
    files = HostLogFiles(ima, uefi)
    without = replace(ask(IMA | BOOT), logs=False)
    assert await files.read((without, ask(IMA))) == (None, HostLogs(ima="".join(LINES)))
    ima.unlink()
    uefi.unlink()
    assert await files.read((without,)) == (None,)  # and nothing is read


async def test_a_tenant_reaches_the_end_of_a_long_list(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry by entry, each answer within the limit; no line is cut, lost or sent twice."""
    lines = [f"10 {n:040x} {'x' * (n % 7)}\n" for n in range(100)]
    put(ima, "".join(lines).encode())
    monkeypatch.setattr(hostlogs, "MAX_IMA_BYTES", 1000)
    files = HostLogFiles(ima, uefi)
    got: list[str] = []
    for _ in range(20):
        logs = await read_one(files, IMA, len(got))
        assert logs is not None
        assert logs.ima is not None
        assert logs.ima_entry == len(got)
        if not logs.ima:
            break
        assert len(logs.ima) <= 1000
        assert logs.ima.endswith("\n")
        got += logs.ima.splitlines(keepends=True)
    assert got == lines


async def test_no_line_is_cut_where_a_huge_list_is_read_in_part(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"10 {n:040x}\n" for n in range(1000)]
    put(ima, "".join(lines).encode())
    monkeypatch.setattr(hostlogs, "MAX_IMA_BYTES", 1000)
    monkeypatch.setattr(hostlogs, "MAX_LIST_BYTES", 8000)
    files = HostLogFiles(ima, uefi)
    for entry in range(0, 1000, 10):
        logs = await read_one(files, IMA, entry)
        assert logs is not None
        assert logs.ima is not None
        at = logs.ima_entry
        count = logs.ima.count("\n")
        assert logs.ima == "".join(lines[at : at + count]), f"asked from {entry}"


# --- missing files ----------------------------------------------------------------------------------


async def test_missing_files_are_not_sent_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = HostLogFiles(tmp_path / "no-ima", tmp_path / "no-uefi")
    for _ in range(3):
        assert await files.read((ask(IMA | BOOT), ask(NEITHER))) == (None, None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    said = sorted(record.getMessage() for record in caplog.records)
    assert "no-ima" in said[0]
    assert "no-uefi" in said[1]


async def test_one_missing_file_leaves_the_other(ima: Path, uefi: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert await read_one(HostLogFiles(none, uefi), IMA | BOOT) == HostLogs(uefi=UEFI)
    assert await read_one(HostLogFiles(none, uefi), IMA) is None
    assert await read_one(HostLogFiles(ima, none), IMA | BOOT) == HostLogs(ima="".join(LINES))
    assert await read_one(HostLogFiles(ima, none), BOOT) is None


async def test_a_file_that_comes_is_sent_and_one_that_goes_again_is_said_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "uefi"
    files = HostLogFiles(tmp_path / "ima", path)
    assert await read_one(files, BOOT) is None
    path.write_bytes(UEFI)
    assert await read_one(files, BOOT) == HostLogs(uefi=UEFI)
    path.unlink()
    assert await read_one(files, BOOT) is None
    assert len(caplog.records) == 2


async def test_what_nobody_asks_for_is_not_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = HostLogFiles(tmp_path / "no-ima", tmp_path / "no-uefi")
    assert await read_one(files, NEITHER) is None
    assert caplog.records == []


async def test_a_directory_in_place_of_a_log(tmp_path: Path) -> None:
    assert await read_one(HostLogFiles(tmp_path, tmp_path), IMA | BOOT) is None


async def test_empty_files(tmp_path: Path) -> None:
    for name in ("ima", "uefi"):
        (tmp_path / name).touch()
    files = HostLogFiles(tmp_path / "ima", tmp_path / "uefi")
    assert await read_one(files, IMA | BOOT) == HostLogs(ima="", uefi=b"")
