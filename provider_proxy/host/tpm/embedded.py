"""The embedded TPM of the demo and the tests: a swtpm that this process starts and owns.

Not a hardware TPM: root on the host can read its keys. Its state survives in the state
directory; its sockets are in a directory with a short path, because a Unix socket's path has 107 bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from provider_proxy.common.files import make_private_folder
from provider_proxy.errors import HostError

log = logging.getLogger(__name__)

START_LIMIT_S = 10.0
STOP_LIMIT_S = 5.0
POLL_S = 0.01
# Asks the kernel for SIGTERM when its parent dies, prctl(2), and runs another program. setpriv would
# do the same, but it also sets capabilities, which the unit's system call filter refuses.
WITH_PARENT = (
    "import ctypes, os, signal, sys; PR_SET_PDEATHSIG = 1; "
    "ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM)); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
CMD_GET_CAPABILITY = b"\0\0\0\1"  # swtpm_ioctls(3)


class EmbeddedTpm:
    """A running swtpm. `start` blocks for some milliseconds; call it before serving.

    Attributes:
        tcti: the tpm2-tss string that opens it.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._sockets: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.tcti = ""

    @property
    def pid(self) -> int | None:
        """The swtpm's process id while it runs."""
        return self._process.pid if self._process else None

    def ensure_running(self) -> None:
        """Start swtpm if it does not run: the first time, or after it was killed.

        Raises:
            HostError: as `start`.
        """
        if self._process is not None and not _has_ended(self._process.pid):
            return
        if self._process is not None:
            log.error("the embedded swtpm has exited; starting it again")
            self.stop()
        self.start()

    def start(self) -> None:
        """Start swtpm on the state directory and wait for its sockets.

        Raises:
            HostError: swtpm is not installed, or it exited (its state is in use, for example).
        """
        swtpm = shutil.which("swtpm")
        if swtpm is None:
            raise HostError('tpm.tcti = "embedded" needs swtpm: run `apt install swtpm`')
        try:
            make_private_folder(self._state_dir)
        except OSError as exc:
            raise HostError(f"cannot make {self._state_dir}: {exc.strerror}") from exc
        self._sockets = Path(tempfile.mkdtemp(prefix="provider-proxy-"))
        path = self._sockets / "tpm"
        log = self._sockets / "log"
        # If this process is killed, swtpm ends too and releases its state. The kernel sends the signal
        # when the *thread* that forked ends, so a thread of its own lives as long as swtpm.
        command = [sys.executable, "-I", "-S", "-c", WITH_PARENT, swtpm, "socket", "--tpm2"]
        command += [
            "--tpmstate",
            f"dir={self._state_dir}",
            "--flags",
            "not-need-init,startup-clear",
        ]
        command += ["--server", f"type=unixio,path={path}"]
        command += ["--ctrl", f"type=unixio,path={path}.ctrl", "--log", f"file={log},level=1"]
        # A process group of its own: Ctrl-C must reach only the daemon, which drains with its TPM.
        started: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        threading.Thread(target=_run, args=(command, started), daemon=True).start()
        self._process = started.get(timeout=START_LIMIT_S)
        deadline = time.monotonic() + START_LIMIT_S
        while not _answers(path.with_name("tpm.ctrl")):
            if _has_ended(self._process.pid) or time.monotonic() > deadline:
                text = ""
                with contextlib.suppress(OSError):  # it may have exited before it wrote a line
                    text = log.read_text(errors="replace").strip()
                self.stop()
                raise HostError(
                    f"swtpm did not start on {self._state_dir}: {text or 'no reason given'}"
                )
            time.sleep(POLL_S)
        self.tcti = f"swtpm:path={path}"

    def stop(self) -> None:
        """End swtpm and remove its sockets; its state stays."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None


def _answers(control: Path) -> bool:
    """True once swtpm answers on its control socket; the socket exists also if swtpm is failing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(START_LIMIT_S)
        try:
            probe.connect(str(control))
            probe.sendall(CMD_GET_CAPABILITY)
            return bool(probe.recv(64))
        except OSError:
            return False


def _has_ended(pid: int) -> bool:
    """Asks the kernel, because `poll` depends on the watching thread."""
    try:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, pid, options) is not None
    except ChildProcessError:
        return True  # the thread has collected it


def _run(command: list[str], started: queue.SimpleQueue[subprocess.Popen[bytes]]) -> None:
    """Start a program and wait until it has ended."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0
    )
    started.put(process)
    process.wait()
