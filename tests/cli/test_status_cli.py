"""`status` and `top`: what they print, to whom they listen, and how they end."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT_S, command, run_command, run_here
from places import PACKAGE
from rich.console import Console
from status_helpers import (
    HOSTILE,
    TROUBLED,
    Site,
    address_of,
    busy,
    make_batch,
    make_board,
)

from provider_proxy import errors
from provider_proxy.cli import ask_admin, status_view
from provider_proxy.cli.status_view import REASONS
from provider_proxy.errors import QuoteError, ReplyError
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.status.recent import Recent


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


def shown(status: dict[str, Any], width: int = 110, **more: Any) -> str:
    console = Console(width=width, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(status_view.render(status, batches=10, tenants=4, width=width, **more))
    return capture.get()


# --- what it looks like -----------------------------------------------------------------------------


def test_what_an_operator_sees() -> None:
    text = shown(busy())
    assert re.match(r" READY   provider-proxy 0\.1\.0 on host 0ddba11c-\S+ up ", text)
    assert "busy 31% of the last 10 s, at most 50%" in text
    assert "a quote takes 188 ms (learnt), and the pause after it 188 ms" in text
    assert "14 waiting in 2 lines, the first for 131 ms; room for 8192" in text
    assert "50 ms, then when the chip is ready; 1024 requests at most" in text
    assert re.search(r"4060 +\d\d:\d\d:\d\d +\d+ +\d+ ms +\d+ ms +(chip ready|window over)", text)
    assert re.search(r"318 x over a limit of its own +\n +2 x a parameter was wrong", text)
    assert "and 1 more" in text
    assert text.index("globex") < text.index("acme")


def test_trouble_is_seen() -> None:
    metrics = Metrics()
    metrics.tpm_errors.labels("FAILURE", "fatal").inc(3)
    metrics.selfcheck_failures.inc()
    text = shown(busy(chip=TROUBLED, metrics=metrics, software=True), problem="no answer")
    assert text.startswith(" TROUBLE  the TPM is out of order")
    assert "the TPM is software" in text
    assert "no answer; asking again" in text
    assert "errors since the start: FAILURE 3" in text
    assert "a command has run for 6000 ms" in text
    assert "1 batches failed the self-check" in text


def test_nothing_yet() -> None:
    text = shown(make_board(Recent(monotonic=lambda: 0.0)).results())
    assert "No batches yet" in text
    assert "No tenant has asked in the last 5 minutes." in text
    assert "no request waits" in text


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_it_fits_the_terminal(width: int, live: bool) -> None:
    recent = Recent(clock=lambda: 2e9, monotonic=lambda: 0.0)
    error = QuoteError("the TPM gave no quote")
    error.__cause__ = QuoteError("TPM2_Quote: " + "a reason that has many words " * 5)
    for number in range(4050, 4060):
        recent.batch_done(make_batch(number, error=error if number == 4055 else None))
    status = make_board(recent).results()
    lines = shown(status, width, footer="q quits" if live else "").splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert re.search(r"BATCH.* LEAVES +WAIT +QUOTE +SEALED WHEN .*OUTCOME", text)
    assert re.search(r"^ ?4059 .* 3 +50 ms +188 ms +window over .*ok *$", text, re.MULTILINE)
    failed = [line for line in lines if "QuoteErr" in line]
    assert len(failed) == 1
    if live:  # a line a batch, or the picture would not fit its screen
        assert lines.index(failed[0]) + 1 == next(n for n, x in enumerate(lines) if "4054 " in x)
    assert not any("…" in line for line in lines if line not in failed)


def test_names_cannot_paint_the_terminal() -> None:
    status = busy()
    status["tenants"]["listed"] = [
        {"name": name, "answered": 1, "refused": {}}
        for name in (HOSTILE, "[bold red]x[/]", "\x9b31m", "\u202egnp")
    ]
    text = shown(status)
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "\u202e" not in text
    assert "[bold red]x[/]" in text
    assert r"\x1b[31mre" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("chip"),
        lambda s: s["chip"].update(duty="x"),
        lambda s: s["batches"][-1].pop("leaves"),
        lambda s: s["batches"][-1].update(sealed=1e300),
        lambda s: s.update(batches=5),
        lambda s: s["tenants"].update(listed=[1]),
        lambda s: s["queue"].update(waiting=None, lines=[]) or s["queue"].pop("max_queue"),
    ],
)
def test_a_strange_status_is_an_error_and_no_crash(change: Any) -> None:
    status = busy()
    change(status)
    with pytest.raises(ReplyError):
        shown(status)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"results": {}}',
        b'{"results": {"version": 2}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_what_is_no_status(body: bytes) -> None:
    with pytest.raises(ReplyError):
        ask_admin.check_status(ask_admin.parse_results(body))


# --- the commands -----------------------------------------------------------------------------------


def test_status_prints_and_says_by_its_code_whether_all_is_well(site: Site, tmp_path: Path) -> None:
    site.status = busy
    done = run_here("status", "--admin", address_of(site), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "READY" in done.stdout
    site.status = lambda: busy(chip=TROUBLED)
    done = run_here("status", "--admin", address_of(site), cwd=tmp_path)
    assert done.returncode == 3
    assert "TROUBLE  the TPM is out of order" in done.stdout


def test_status_as_json(site: Site, tmp_path: Path) -> None:
    site.status = busy
    done = run_here("status", "--admin", address_of(site), "--json", cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["version"] == 1
    assert done.returncode == 0


def test_the_configuration_names_the_listener(site: Site, tmp_path: Path) -> None:
    site.status = busy
    config = tmp_path / "c.toml"
    plain = "[listen]\ninsecure_plaintext = true\n"
    config.write_text(f'{plain}[admin]\naddress = "{address_of(site)}"\n')
    done = run_here("status", "--config", config, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    config.write_text(plain)
    done = run_here("status", "--config", config, cwd=tmp_path)
    assert done.returncode == 2
    assert "does not set admin.address" in done.stderr
    config.write_text(f'{plain}[admin]\naddress = "127.0.0.1:0"\n')
    assert run_here("status", "--config", config, cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("address", "code", "word"),
    [
        ("127.0.0.1:1", 3, "no daemon answers at 127.0.0.1:1"),
        ("unix:/nonexistent/admin", 3, "no daemon answers at unix:"),
        ("192.0.2.1:80", 2, "loopback and unix sockets only"),
        ("proxy.example:80", 2, "loopback and unix sockets only"),
        ("8895", 2, '"8895" has no port'),
        ("http://127.0.0.1:8895", 2, "is a URL"),
    ],
)
def test_addresses_that_do_not_do(address: str, code: int, word: str, tmp_path: Path) -> None:
    for name in ("status", "top"):
        # httpx's transport leaves a unix socket to the collector where nobody listens.
        run = run_command if address.startswith("unix:") else run_here
        done = run(name, "--admin", address, cwd=tmp_path)
        assert done.returncode == code
        assert word in done.stderr


def test_another_server_is_no_daemon(site: Site, tmp_path: Path) -> None:
    site.status = lambda: {"version": 99}
    done = run_here("status", "--admin", address_of(site), cwd=tmp_path)
    assert done.returncode == 3
    assert "version 99" in done.stderr
    site.status = lambda: {"version": 1, "x": "x" * (ask_admin.MAX_STATUS_BYTES + 1)}
    done = run_here("status", "--admin", address_of(site), cwd=tmp_path)
    assert (done.returncode, "sent more than" in done.stderr) == (3, True)


def test_top_on_a_pipe_prints_once(site: Site, tmp_path: Path) -> None:
    site.status = busy
    done = run_here("top", "--admin", address_of(site), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("READY") == 1
    assert "\x1b" not in done.stdout
    bad = run_here("top", "--admin", address_of(site), "--interval", "0", cwd=tmp_path)
    assert bad.returncode == 2


def test_top_streams_json(site: Site, tmp_path: Path) -> None:
    site.status = busy
    words = command("top", "--admin", address_of(site), "--json", "--interval", "0.1")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert [line["version"] for line in lines] == [1, 1, 1]
        process.stdout.close()  # as `head` does
        assert process.wait(LIMIT_S) == 3
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        env = {**os.environ, "TERM": "xterm-256color"}
        env.pop("COLUMNS", None)
        env.pop("LINES", None)
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            command(*words), stdin=slave, stdout=slave, stderr=slave, env=env, close_fds=True
        )
        self.master, self.slave = master, slave
        self.seen = ""

    def until(self, pattern: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not re.search(pattern, self.seen, re.DOTALL):
            assert time.monotonic() < deadline, self.seen[-2000:]
            self._read()

    def wait(self) -> int:
        """Its exit code. What it writes is read meanwhile: else it waits for the terminal."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen[-2000:]
            self._read()
        return self.process.returncode

    def _read(self) -> None:
        if select.select([self.master], [], [], 0.1)[0]:
            self.seen += os.read(self.master, 65536).decode("utf-8", "replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def test_top_in_a_terminal_is_live_and_ends_at_q(site: Site) -> None:
    site.status = busy
    terminal = Terminal("top", "--admin", address_of(site), "--interval", "0.1")
    try:
        terminal.until("READY.*q quits")
        site.status = lambda: busy(chip=TROUBLED)
        terminal.until("TROUBLE")
        site.status = lambda: {"version": 2}
        terminal.until("asking again")  # an answer that is not a status does not end it
        os.write(terminal.master, b"q")
        assert terminal.wait() == 0
        assert termios.tcgetattr(terminal.slave)[3] == terminal.before[3]  # echo, lines
        terminal.until(r"\x1b\[\?1049l")  # back from the other screen
    finally:
        terminal.close()


def test_top_ends_at_control_c_too(site: Site) -> None:
    site.status = busy
    terminal = Terminal("top", "--admin", address_of(site))
    try:
        terminal.until("READY")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.seen
        assert termios.tcgetattr(terminal.slave)[3] == terminal.before[3]
    finally:
        terminal.close()


def test_help_says_how_to_use_them() -> None:
    text = run_command("top", "--help").stdout
    assert "--interval" in text
    assert "--admin" in text


def test_refusals_have_the_words_of_the_page() -> None:
    page = (PACKAGE / "status.html").read_text(encoding="utf-8")
    block = re.search(r"const REASONS = \{(.*?)\};", page, re.DOTALL)
    assert block is not None
    assert dict(re.findall(r'(\w+): "([^"]+)"', block[1])) == REASONS
    assert set(REASONS) <= {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
