"""stdout and stderr that are full, closed or read by nobody: a documented exit code and no traceback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import command
from places import TESTS
from verify_files import VERIFY, Files

from provider_proxy.cli.main import SUBCOMMANDS

LIMIT_S = 120
STATES = ("full", "closed", "gone")
GOOD, REFUSED, USAGE, ENVIRONMENT = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    words: str
    code: int
    said: str


def run_all(lines: list[str], *states: str, folder: Path) -> list[Seen]:
    """Run commands whose streams are as `states` say, each in a process of its own."""
    done = subprocess.run(
        [sys.executable, TESTS / "support/forked_commands.py", folder, *states],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    found = [Seen(**json.loads(line)) for line in done.stdout.splitlines()]
    assert [seen.words for seen in found] == lines
    return found


@pytest.mark.parametrize("state", STATES)
def test_no_command_takes_lost_output_for_success(state: str, tmp_path: Path) -> None:
    lines = ["--help", "--version", *(f"{name} --help" for name in SUBCOMMANDS)]
    for seen in run_all(lines, f"stdout={state}", folder=tmp_path):
        assert seen.code == ENVIRONMENT, seen
        assert "Traceback" not in seen.said
        assert ("could not be written" in seen.said) == (state != "gone"), seen


@pytest.mark.parametrize("state", STATES)
def test_a_lost_message_leaves_the_exit_code(state: str, tmp_path: Path) -> None:
    lines = [f"{name} --no-such-option" for name in SUBCOMMANDS]
    for seen in run_all(lines, f"stderr={state}", folder=tmp_path):
        assert (seen.code, seen.said) == (USAGE, ""), seen
    for seen in run_all(["--help"], f"stderr={state}", folder=tmp_path):
        assert seen.code == GOOD
        assert "usage: provider-proxy" in seen.said


@pytest.mark.parametrize("state", STATES)
def test_real_results_and_real_refusals(state: str, tmp_path: Path) -> None:
    """Commands that print by print(), by rich, as JSON; a refusal says 1 whatever stderr is."""
    files = Files(tmp_path)
    config = files.folder / "c.toml"
    config.write_text('[listen]\ninsecure_plaintext = true\n[tpm]\ntcti = "embedded"\n')
    good = [
        VERIFY,
        f"{VERIFY} --json",
        f"check-config --config {config}",
        f"check-config --config {config} --json",
        "plan --tenants 10 --quote-ms 100",
        "plan --tenants 10 --quote-ms 100 --json",
        f"pki init pki-{state} --host localhost",
    ]
    refused = VERIFY.replace("policy.json", "other.json")
    files.put("other.json", json.dumps({"16": ["00" * 32]}).encode())
    for seen in run_all(good, f"stdout={state}", folder=files.folder):
        assert seen.code == ENVIRONMENT, seen
        assert "Traceback" not in seen.said, seen
    for seen in run_all([refused], f"stdout={state}", folder=files.folder):
        assert seen.code == REFUSED, seen  # it had nothing for stdout
    (seen,) = run_all([refused], f"stderr={state}", folder=files.folder)
    assert (seen.code, seen.said) == (REFUSED, "")
    (seen,) = run_all([VERIFY], f"stderr={state}", folder=files.folder)
    assert seen.code == GOOD
    (seen,) = run_all([refused], f"stderr={state}", f"stdout={state}", folder=files.folder)
    assert seen.code == REFUSED


@pytest.mark.parametrize("unbuffered", [True, False])
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", "2>&- >/dev/full", "<&- >&- 2>&-"])
def test_an_interpreter_that_starts_so(redirect: str, unbuffered: bool, tmp_path: Path) -> None:
    line = f"{shlex.join(map(str, command('plan', '--help')))} {redirect}"
    done = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, **({"PYTHONUNBUFFERED": "1"} if unbuffered else {})},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == ENVIRONMENT
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_nothing_opened_gets_a_closed_descriptor_s_number(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from provider_proxy.cli.streams import Streams\n"
        "Streams()\n"
        "number = os.open('/dev/null', os.O_RDONLY)\n"
        f"os.write(os.open({str(tmp_path / 'number')!r}, os.O_CREAT | os.O_WRONLY), b'%d' % number)\n"
    )
    line = shlex.join([sys.executable, "-c", code]) + " <&- >&- 2>&-"
    subprocess.run(["bash", "-c", line], timeout=LIMIT_S, check=True)
    assert int((tmp_path / "number").read_text()) > 2


def test_text_that_the_locale_cannot_write_is_escaped_not_lost() -> None:
    code = (
        "import sys\n"
        "from provider_proxy.cli.streams import Streams\n"
        "streams = Streams()\n"
        "print('a … b')\n"
        "streams.flush()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert done.stdout == b"a \\u2026 b\n"


def test_a_full_non_blocking_pipe_is_waited_for() -> None:
    """A shell or an editor may have made the descriptor that we share non-blocking."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    code = (
        "from provider_proxy.cli.streams import Streams\n"
        "streams = Streams()\n"
        "print('x' * 300_000)\n"
        "streams.flush()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=write) as process:
        os.close(write)
        got = 0
        while data := os.read(read, 4096):
            got += len(data)
        os.close(read)
        assert process.wait(LIMIT_S) == 0
    assert got == 300_001
