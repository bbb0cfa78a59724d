"""The host's logs: which request gets which part of which file."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from helpers import logs_in

from provider_proxy.evidence.model import HostLogs, Nonce, PcrMask, QuoteRequest
from provider_proxy.host.logs import ima_list, parts
from provider_proxy.host.logs.files import MAX_UEFI_BYTES, HostLogFiles

IMA = 1 << 10
BOOT = 1 << 0
NEITHER = 1 << 16 | 1 << 23
LINES = [f"10 {n:040x} ima-ng sha256:{n:064x} /usr/bin/{n}\n" for n in range(20)]
UEFI = b"Spec ID Event03\x00" + bytes(range(256))


def ask(mask: int, number: int = 0) -> QuoteRequest:
    return QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(mask), ima_ml_entry=number)


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
    (part,) = await files.read((ask(mask, entry),))
    return logs_in(part)


async def test_each_request_gets_what_its_mask_asks_for(ima: Path, uefi: Path) -> None:
    files = HostLogFiles(ima, uefi)
    text = "".join(LINES)
    masks = (NEITHER, IMA, BOOT, IMA | BOOT, IMA | NEITHER, 0xFFFFFF)
    assert tuple(map(logs_in, await files.read(tuple(ask(mask) for mask in masks)))) == (
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
    read = [logs_in(part) for part in await HostLogFiles(ima, uefi).read(requests)]
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
    monkeypatch.setattr(parts, "MAX_IMA_BYTES", 3 * len(json.dumps(LINES[10])[1:-1]) + room)
    logs = await read_one(HostLogFiles(ima, uefi), IMA, 10)
    assert logs == HostLogs(ima="".join(LINES[10 : 10 + lines]), ima_entry=10)


async def test_the_limit_is_of_what_is_sent(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JSON a name may be six times as long as in the list."""
    put(ima, "".join(f"10 {n:040x} {'é' * 50}\n" for n in range(100)).encode())
    monkeypatch.setattr(parts, "MAX_IMA_BYTES", 4000)
    logs = await read_one(HostLogFiles(ima, uefi), IMA)
    assert logs is not None
    assert 3000 < len(json.dumps(logs.ima)) <= 4000 + len('""')


async def test_no_log_where_none_is_wanted(ima: Path, uefi: Path) -> None:
    files = HostLogFiles(ima, uefi)
    without = replace(ask(IMA | BOOT), logs=False)
    read = await files.read((without, ask(IMA)))
    assert tuple(map(logs_in, read)) == (None, HostLogs(ima="".join(LINES)))
    ima.unlink()
    uefi.unlink()
    assert await files.read((without,)) == (None,)  # and nothing is read


async def test_a_tenant_reaches_the_end_of_a_long_list(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry by entry, each answer within the limit; no line is cut, lost or sent twice."""
    lines = [f"10 {n:040x} {'x' * (n % 7)}\n" for n in range(100)]
    put(ima, "".join(lines).encode())
    monkeypatch.setattr(parts, "MAX_IMA_BYTES", 1000)
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


async def test_a_list_above_the_limit_is_said_to_be_one(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A list that was cut would accuse an honest host."""
    monkeypatch.setattr(ima_list, "MAX_LIST_BYTES", 1000)
    files = HostLogFiles(ima, uefi)
    for _ in range(3):
        assert await read_one(files, IMA) == HostLogs(ima_missing="too long")
    assert "longer than the daemon keeps" in caplog.text
    assert caplog.text.count("longer than the daemon keeps") == 1
    put(ima, LINES[1].encode())
    assert await read_one(files, IMA) == HostLogs(ima=LINES[1])


async def test_an_event_log_above_the_limit_is_said_to_be_one(ima: Path, uefi: Path) -> None:
    put(uefi, bytes(MAX_UEFI_BYTES))
    assert await read_one(HostLogFiles(ima, uefi), BOOT) == HostLogs(uefi=bytes(MAX_UEFI_BYTES))
    put(uefi, bytes(MAX_UEFI_BYTES + 1))
    assert await read_one(HostLogFiles(ima, uefi), BOOT) == HostLogs(uefi_missing="too long")


# --- a list that grows, and others in its place -----------------------------------------------------


def entry(number: int, name: str = "/x") -> str:
    return f"10 {number:040x} ima-ng sha256:{number:064x} {name}\n"


BOOT_LINE = entry(0, "boot_aggregate")


async def test_what_is_known_is_not_read_again(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [BOOT_LINE, *(entry(n) for n in range(1, 5000))]
    put(ima, "".join(lines).encode())
    files = HostLogFiles(ima, uefi)
    await read_one(files, IMA)
    read = []
    real = os.read

    def counting(fd: int, size: int) -> bytes:
        data = real(fd, size)
        read.append(len(data))
        return data

    monkeypatch.setattr("provider_proxy.host.logs.follow.os.read", counting)
    with ima.open("a") as file:
        file.write(entry(5000))
    logs = await read_one(files, IMA, 5000)
    assert logs == HostLogs(ima=entry(5000), ima_entry=5000)
    assert sum(read) < 6000, "the beginning, and what is new"


@pytest.mark.parametrize("number", [0, 1, 699, 700, 701, 1023, 1024, 4998, 4999, 5000])
async def test_any_entry_of_a_long_list(ima: Path, uefi: Path, number: int) -> None:
    lines = [BOOT_LINE, *(entry(n, "/" + "x" * (n * 7 % 300)) for n in range(1, 5000))]
    put(ima, "".join(lines).encode())
    logs = await read_one(HostLogFiles(ima, uefi), IMA, number)
    assert logs == HostLogs(ima="".join(lines[number:]), ima_entry=number)


async def test_lines_that_are_longer_than_the_marks_are_apart(ima: Path, uefi: Path) -> None:
    lines = [entry(n, "/" + "x" * 200_000) for n in range(12)]
    put(ima, "".join(lines).encode())
    files = HostLogFiles(ima, uefi)
    for number in range(12):
        logs = await read_one(files, IMA, number)
        assert logs == HostLogs(ima="".join(lines[number:]), ima_entry=number)


async def test_half_a_line_waits_for_its_end(ima: Path, uefi: Path) -> None:
    put(ima, (BOOT_LINE + "10 ab").encode())
    files = HostLogFiles(ima, uefi)
    assert await read_one(files, IMA) == HostLogs(ima=BOOT_LINE)
    with ima.open("a") as file:
        file.write("cd\n")
    assert await read_one(files, IMA, 1) == HostLogs(ima="10 abcd\n", ima_entry=1)


@pytest.mark.parametrize("how", ["shorter", "as long", "longer", "replaced", "empty", "same head"])
async def test_another_list_is_read_from_its_beginning(ima: Path, uefi: Path, how: str) -> None:
    old = [BOOT_LINE, *(entry(n) for n in range(1, 100))]
    put(ima, "".join(old).encode())
    files = HostLogFiles(ima, uefi)
    await read_one(files, IMA)
    other = [entry(1000, "boot_aggregate"), *(entry(n + 1000) for n in range(1, 100))]
    new = {
        "shorter": other[:50],
        "as long": other,
        "longer": [*other, entry(5)],
        "replaced": other,
        "empty": [],
        "same head": [*old[:40], *other[40:], entry(5)],
    }[how]
    if how == "replaced":
        ima.rename(ima.with_suffix(".old"))
    put(ima, "".join(new).encode())
    assert await read_one(files, IMA) == HostLogs(ima="".join(new))
    with ima.open("a") as file:
        file.write(entry(7))
    assert await read_one(files, IMA, len(new)) == HostLogs(ima=entry(7), ima_entry=len(new))


async def test_a_list_that_lost_its_beginning_comes_from_the_copy(
    ima: Path, uefi: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [BOOT_LINE, *(entry(n) for n in range(1, 100))]
    put(ima, "".join(lines).encode())
    files = HostLogFiles(ima, uefi)
    await read_one(files, IMA)
    more = [entry(n) for n in range(100, 120)]
    for count in (10, 20):
        put(ima, "".join([*lines[30:], *more[:count]]).encode())
        assert await read_one(files, IMA) == HostLogs(ima="".join([*lines, *more[:count]]))
    assert "lost its first entries" in caplog.text


async def test_a_list_without_its_beginning_is_said_to_be_one(
    ima: Path, uefi: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(ima, (entry(5) + entry(6)).encode())
    await read_one(HostLogFiles(ima, uefi), IMA)
    assert "does not begin with boot_aggregate" in caplog.text
    again = [entry(5), entry(7)]  # begins within the copy, and goes on otherwise
    files = HostLogFiles(ima, uefi)
    put(ima, (BOOT_LINE + entry(5) + entry(6)).encode())
    await read_one(files, IMA)
    put(ima, "".join(again).encode())
    assert await read_one(files, IMA) == HostLogs(ima="".join(again))


async def test_a_part_ends_before_an_entry(
    ima: Path, uefi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant cannot read half of a name that has line feeds in it."""
    lines = [BOOT_LINE, entry(1), entry(2, "/a\nb\nc"), entry(3)]
    put(ima, "".join(lines).encode())
    files = HostLogFiles(ima, uefi)
    whole = len(json.dumps("".join(lines[:3]))) - 2
    for size in (whole - 3, whole - 1, whole, whole + 1):
        monkeypatch.setattr(parts, "MAX_IMA_BYTES", size)
        logs = await read_one(files, IMA)
        assert logs == HostLogs(ima="".join(lines[: 3 if size >= whole else 2]))


async def test_one_reading_serves_all_who_wait(ima: Path, uefi: Path) -> None:
    files = HostLogFiles(ima, uefi)
    begun = []
    real = files._list.read_on

    def counting() -> None:
        begun.append(1)
        time.sleep(0.05)
        real()

    files._list.read_on = counting  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(read_one, files, IMA)
    assert 1 <= len(begun) <= 2


# --- missing files ----------------------------------------------------------------------------------


async def test_missing_files_are_not_sent_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = HostLogFiles(tmp_path / "no-ima", tmp_path / "no-uefi")
    for _ in range(3):
        both, neither = await files.read((ask(IMA | BOOT), ask(NEITHER)))
        assert logs_in(both) == HostLogs(ima_missing="absent", uefi_missing="absent")
        assert neither is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    said = sorted(record.getMessage() for record in caplog.records)
    assert "no-ima" in said[0]
    assert "no-uefi" in said[1]


async def test_one_missing_file_leaves_the_other(ima: Path, uefi: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert await read_one(HostLogFiles(none, uefi), IMA | BOOT) == HostLogs(
        uefi=UEFI, ima_missing="absent"
    )
    assert await read_one(HostLogFiles(ima, none), IMA | BOOT) == HostLogs(
        ima="".join(LINES), uefi_missing="absent"
    )


async def test_a_file_that_comes_is_sent_and_one_that_goes_again_is_said_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {"uefi": (BOOT, UEFI), "ima": (IMA, "".join(LINES).encode())}
    files = HostLogFiles(tmp_path / "ima", tmp_path / "uefi")
    for name, (mask, data) in paths.items():
        caplog.clear()
        gone = HostLogs(uefi_missing="absent") if mask == BOOT else HostLogs(ima_missing="absent")
        here = HostLogs(uefi=UEFI) if mask == BOOT else HostLogs(ima="".join(LINES))
        assert await read_one(files, mask) == gone
        (tmp_path / name).write_bytes(data)
        assert await read_one(files, mask) == here
        (tmp_path / name).unlink()
        assert await read_one(files, mask) == gone
        assert caplog.text.count("cannot read") == 2


async def test_what_nobody_asks_for_is_not_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = HostLogFiles(tmp_path / "no-ima", tmp_path / "no-uefi")
    assert await read_one(files, NEITHER) is None
    assert caplog.records == []


async def test_a_directory_in_place_of_a_log(tmp_path: Path) -> None:
    assert await read_one(HostLogFiles(tmp_path, tmp_path), IMA | BOOT) == HostLogs(
        ima_missing="unreadable", uefi_missing="unreadable"
    )


async def test_empty_files(tmp_path: Path) -> None:
    for name in ("ima", "uefi"):
        (tmp_path / name).touch()
    files = HostLogFiles(tmp_path / "ima", tmp_path / "uefi")
    assert await read_one(files, IMA | BOOT) == HostLogs(ima="", uefi=b"")
