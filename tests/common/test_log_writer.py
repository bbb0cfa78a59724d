"""Who logs never waits: for a reader that stalls, one that has gone, a disk that is full."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio
from helpers import LIMIT_S, command, get, plain_toml, wait_until

from provider_proxy.common import log
from provider_proxy.common import log_writer as module
from provider_proxy.common.log_writer import LineWriter, write_to


def say(count: int) -> bytes:
    return b"dropped %d\n" % count


class Reader:
    """What lines are written to; stalls while `gate` is clear."""

    def __init__(self) -> None:
        self.data = b""
        self.gate = threading.Event()
        self.gate.set()
        self.error: OSError | None = None

    def write(self, data: bytes) -> None:
        assert self.gate.wait(LIMIT_S)
        if self.error is not None:
            raise self.error
        self.data += data


def test_lines_come_in_order_and_all_of_them_at_the_end() -> None:
    reader = Reader()
    writer = LineWriter(reader.write, say)
    writer.start()
    for number in range(5000):
        writer.put(b"line %d\n" % number)
    writer.close(LIMIT_S)
    assert reader.data == b"".join(b"line %d\n" % number for number in range(5000))
    assert writer.dropped == 0


def test_what_does_not_fit_is_counted_and_said() -> None:
    reader = Reader()
    reader.gate.clear()
    writer = LineWriter(reader.write, say, most_bytes=100)
    writer.start()
    for number in range(1000):
        writer.put(b"%03d456789\n" % number)  # returns at once
    reader.gate.set()
    writer.close(LIMIT_S)
    lines = reader.data.splitlines()
    assert lines[-1] == b"dropped %d" % writer.dropped
    assert len(lines) - 1 + writer.dropped == 1000
    assert 10 <= len(lines) - 1 <= 25
    assert lines[:10] == [b"%03d456789" % number for number in range(10)]


def test_the_end_waits_for_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    reader.gate.clear()
    writer = LineWriter(reader.write, say)
    writer.start()
    writer.put(b"line\n")
    writer.close(0.01)
    reader.gate.set()


def test_a_full_disk_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_MS", 1)
    reader = Reader()
    reader.error = OSError(28, "No space left on device")
    writer = LineWriter(reader.write, say)
    writer.start()
    writer.put(b"lost\n")
    wait_until(lambda: writer.dropped == 1)
    reader.error = None
    writer.put(b"after\n")
    writer.close(LIMIT_S)
    assert reader.data == b"after\ndropped 1\n"


def test_a_descriptor_that_does_not_block_is_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    data = os.urandom(1 << 20)
    thread = threading.Thread(target=write_to, args=(write, data))
    thread.start()
    got = b""
    while len(got) < len(data):
        got += os.read(read, 1 << 16)
    thread.join(LIMIT_S)
    os.close(read)
    os.close(write)
    assert got == data


def test_a_record_that_cannot_be_formatted_fails_nobody(tmp_path: Path) -> None:
    script = (
        "import logging\nfrom provider_proxy.common import log\nlog.set_up('info')\n"
        "with log.in_background():\n"
        "    logging.info('%d', 'no number')\n    logging.info('good')\n"
        "    assert log.dropped_lines() == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert b"good" in done.stderr
    assert b"Traceback" not in done.stderr


def test_without_a_log_of_ours_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    with log.in_background():
        logging.getLogger("x").warning("seen")
    assert "seen" in caplog.text
    assert log.dropped_lines() == 0


@pytest.mark.real
async def test_a_daemon_whose_log_nobody_reads_goes_on(tmp_path: Path) -> None:
    """Quotes, health and the way out, with a pipe for a log that is full."""
    config = tmp_path / "c.toml"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config.write_text(plain_toml(tmp_path, listen=f"127.0.0.1:{port}"))
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    process = await trio.lowlevel.open_process(
        command("--log-level", "debug", "serve", "--config", config), stderr=write
    )
    try:
        with trio.fail_after(10 * LIMIT_S):
            while True:
                try:
                    assert (await get(f"127.0.0.1:{port}", "/version")).status == 200
                    break
                except OSError:
                    await trio.sleep(0.05)
            for _ in range(20):
                target = f"/verifier/quote?nonce={os.urandom(16).hex()}&mask=0x1"
                assert (await get(f"127.0.0.1:{port}", target)).status == 200
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(read)
        os.close(write)
