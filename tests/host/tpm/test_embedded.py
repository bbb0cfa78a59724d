"""The swtpm that the daemon starts and owns."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import LIMIT_S, is_alive, wait_until
from tpm2_pytss.constants import ESYS_TR

from provider_proxy.errors import HostError
from provider_proxy.host.tpm import embedded
from provider_proxy.host.tpm.chip import open_context
from provider_proxy.host.tpm.embedded import EmbeddedTpm

pytestmark = pytest.mark.real

PARENT = """
import sys, time
from pathlib import Path
from provider_proxy.host.tpm.embedded import EmbeddedTpm
tpm = EmbeddedTpm(Path(sys.argv[1]))
tpm.start()
print(tpm.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sockets are made; a short path of its own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def tpm(tmp_path: Path, temp: Path) -> Iterator[EmbeddedTpm]:
    made = EmbeddedTpm(tmp_path / "state")
    yield made
    made.stop()
    assert list(temp.iterdir()) == []  # whatever happened, no socket is left
    temp.rmdir()


def pid_of(tpm: EmbeddedTpm) -> int:
    assert tpm.pid is not None
    return tpm.pid


def random_of(tcti: str) -> bytes:
    """Proof that a TPM answers."""
    context = open_context(tcti)
    try:
        return bytes(context.get_random(8))
    finally:
        context.close()


def test_start_and_stop(tpm: EmbeddedTpm, tmp_path: Path, temp: Path) -> None:
    tpm.start()
    pid = pid_of(tpm)
    assert is_alive(pid)
    assert len(random_of(tpm.tcti)) == 8
    assert len(random_of(tpm.tcti)) == 8  # it outlives its first client
    tpm.stop()
    assert not is_alive(pid)
    with pytest.raises(AssertionError):
        pid_of(tpm)
    assert list(temp.iterdir()) == []
    assert (tmp_path / "state" / "tpm2-00.permall").is_file()


def test_stopping_twice_or_unstarted_is_fine(tpm: EmbeddedTpm) -> None:
    tpm.stop()
    tpm.start()
    tpm.stop()
    tpm.stop()


def test_its_state_survives(tpm: EmbeddedTpm, tmp_path: Path) -> None:
    tpm.start()
    context = open_context(tpm.tcti)
    primary = context.create_primary(None)[0]
    context.evict_control(ESYS_TR.OWNER, primary, 0x81000042)
    context.close()
    tpm.stop()
    tpm.start()
    context = open_context(tpm.tcti)
    assert context.tr_from_tpmpublic(0x81000042)
    context.close()


def test_only_the_owner_may_enter_the_state_directory(tpm: EmbeddedTpm, tmp_path: Path) -> None:
    tpm.start()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_the_socket_is_not_for_others(tpm: EmbeddedTpm, temp: Path) -> None:
    tpm.start()
    (folder,) = temp.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_long_state_path_is_fine(tmp_path: Path, temp: Path) -> None:
    """A unix socket's path has 107 bytes; the state's may have more."""
    tpm = EmbeddedTpm(tmp_path / ("x" * 120) / "state")
    tpm.start()
    try:
        assert len(random_of(tpm.tcti)) == 8
    finally:
        tpm.stop()


def test_one_state_has_one_swtpm(tpm: EmbeddedTpm, tmp_path: Path, temp: Path) -> None:
    tpm.start()
    second = EmbeddedTpm(tmp_path / "state")
    with pytest.raises(HostError, match="swtpm did not start on") as caught:
        second.start()
    assert str(tmp_path / "state") in str(caught.value)
    assert second.pid is None
    assert len(list(temp.iterdir())) == 1
    assert len(random_of(tpm.tcti)) == 8  # the first goes on


def test_damaged_state_is_refused_and_left(tpm: EmbeddedTpm, tmp_path: Path) -> None:
    tpm.start()
    tpm.stop()
    state = tmp_path / "state" / "tpm2-00.permall"
    state.write_bytes(b"damaged")
    with pytest.raises(HostError, match="swtpm did not start on"):
        tpm.start()
    assert tpm.pid is None
    assert state.read_bytes() == b"damaged"


def test_a_state_directory_that_cannot_be_made(tmp_path: Path, temp: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(HostError) as caught:
            EmbeddedTpm(path).start()
        assert str(path) in str(caught.value)
    assert list(temp.iterdir()) == []


def test_what_is_not_installed_is_named(
    tpm: EmbeddedTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(HostError, match="apt install swtpm"):
        tpm.start()
    assert not (tmp_path / "state").exists()


def test_a_swtpm_that_never_listens_is_given_up(
    tpm: EmbeddedTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "swtpm").write_text("#!/bin/sh\nsleep 60\n")
    (tools / "swtpm").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(embedded, "START_LIMIT_S", 0.1)
    monkeypatch.setattr(embedded, "STOP_LIMIT_S", 0.1)
    with pytest.raises(HostError, match="swtpm did not start"):
        tpm.start()
    assert tpm.pid is None


def test_one_that_hangs_is_killed(tpm: EmbeddedTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    tpm.start()
    pid = pid_of(tpm)
    monkeypatch.setattr(embedded, "STOP_LIMIT_S", 0.1)
    os.kill(pid, signal.SIGSTOP)
    tpm.stop()
    assert not is_alive(pid)


def test_one_that_died_is_no_trouble(tpm: EmbeddedTpm) -> None:
    tpm.start()
    os.kill(pid_of(tpm), signal.SIGKILL)
    tpm.stop()
    tpm.start()  # its state is free again
    assert len(random_of(tpm.tcti)) == 8


def test_a_ctrl_c_at_the_terminal_is_not_for_it(tpm: EmbeddedTpm) -> None:
    """The daemon drains with its TPM; the terminal signals a whole process group."""
    tpm.start()
    assert os.getpgid(pid_of(tpm)) != os.getpgid(0)


def test_it_outlives_the_thread_that_started_it(tpm: EmbeddedTpm) -> None:
    """Linux tells of a parent's death when the *thread* dies that started the child."""
    thread = threading.Thread(target=tpm.start)
    thread.start()
    thread.join(LIMIT_S)
    pid = pid_of(tpm)
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        assert is_alive(pid), "the swtpm went with the thread"
        time.sleep(0.01)
    assert len(random_of(tpm.tcti)) == 8


def test_ensure_running(tpm: EmbeddedTpm, caplog: pytest.LogCaptureFixture) -> None:
    tpm.ensure_running()
    first = pid_of(tpm)
    tpm.ensure_running()
    assert pid_of(tpm) == first
    assert caplog.records == []
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not is_alive(first))
    tpm.ensure_running()
    assert pid_of(tpm) != first
    assert len(random_of(tpm.tcti)) == 8
    assert len(caplog.records) == 1  # it is said


def test_it_goes_when_its_parent_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "state")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        parent.wait(LIMIT_S)
    wait_until(lambda: not is_alive(pid), "the swtpm's end")
