"""Starts what is measured as a process of its own, and reads the kernel's figures of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from provider_proxy.errors import HostError
from provider_proxy.host.config.load import EMBEDDED

STOP_LIMIT_S = 15.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Vitals:
    """What the kernel says of a process that runs."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")

    def cpu_s(self) -> float:
        """User and system time so far, all threads, in seconds."""
        stat = (self._proc / "stat").read_text()
        fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def peak_rss_mb(self) -> float:
        """Largest resident size so far, in MB (10^6 bytes)."""
        return self._status_mb("VmHWM")

    def rss_mb(self) -> float:
        """Resident size now, in MB (10^6 bytes)."""
        return self._status_mb("VmRSS")

    def open_files(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(self._proc / "fd"))

    def threads(self) -> int:
        """How many threads it has."""
        return len(os.listdir(self._proc / "task"))

    def _status_mb(self, name: str) -> float:
        for line in (self._proc / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
        raise HostError(f"the kernel does not report {name}")


class Target(Vitals):
    """A running `bench.target`.

    Attributes:
        host, port: where it answers.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        config: str,
        *arguments: str,
        module: str = "provider_proxy.bench.target",
    ) -> None:
        path = directory / f"{name}.toml"
        path.write_text(config)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(path), *arguments],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        super().__init__(self._process.pid)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise HostError("the daemon to be measured did not start: see its log above")
        host, _, port = json.loads(line)["address"].rpartition(":")
        self.host: str = host
        self.port = int(port)

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def config_text(
    state_dir: Path,
    *,
    window_ms: float = 50,
    max_leaves: int = 1024,
    max_duty: float = 0.5,
    max_queue: int = 8192,
    tcti: str = EMBEDDED,
    ak_algorithm: str = "ecc",
) -> str:
    """A configuration for a daemon on loopback, with an embedded TPM by default."""
    return f"""
state_dir = {json.dumps(str(state_dir))}
[listen]
address = "127.0.0.1:0"
insecure_plaintext = true
[tpm]
tcti = {json.dumps(tcti)}
ak_algorithm = {json.dumps(ak_algorithm)}
max_duty = {max_duty}
[limits]
max_connections_per_address = 5000
max_queue = {max_queue}
[tenant_defaults]
rate = 1000
burst = 1000
max_inflight = 100000
[batch]
window_ms = {window_ms}
max_leaves = {max_leaves}
[logs]
ima = "/nonexistent"
uefi = "/nonexistent"
"""
