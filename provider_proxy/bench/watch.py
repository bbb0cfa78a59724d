"""`bench watch`: how many hosts a watcher on one core can watch, how punctually, and how soon it reports.

The watcher is the real command, bound to one core; the hosts are `bench.fakes` on another, over loopback
without TLS. Punctuality is measured by the fakes: the time between two questions of one connection
against the interval. A PCR of some hosts is changed in the middle, and the watcher's own line on stdout
says when it was noticed.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provider_proxy.bench.process import STOP_LIMIT_S, Vitals
from provider_proxy.errors import HostError
from provider_proxy.trust.pins import PinStore

HOSTS = 2000
FLIPPED_HOSTS = 20
INTERVAL_S = 10.0
WARM_UP_S = 2 * INTERVAL_S + 2  # connections, then the spreading of the second round
MEASURED_S = 2.5 * INTERVAL_S
DETECTION_S = INTERVAL_S + 5.0
FULL_SHARE = 0.6  # of the core, for the second stage: what is left is for bursts
MAX_ERROR_MS = 500.0
FILES_RESERVE = 200  # open files beside the connections
MIN_GROWTH = 1.2  # a second stage that is hardly larger shows nothing

Say = Callable[[str], None]


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure 2,000 hosts, then as many as the CPU figure promises; returns the figures.

    Raises:
        HostError: fewer than two cores, or the watcher did not hold the hosts.
    """
    del seed  # only nonces are random here
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise HostError("bench watch needs two cores: one is the watcher's")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        say(f"{HOSTS} hosts every {INTERVAL_S:g} s")
        first = _stage(HOSTS, cores, say)
        share = float(first["cpu_share"])
        many = min(int(HOSTS * FULL_SHARE / share), hard - FILES_RESERVE) // 100 * 100
        held = HOSTS if first["interval_error_p99_ms"] < MAX_ERROR_MS else 0
        second: dict[str, Any] = {}
        if held and many >= MIN_GROWTH * HOSTS:
            say(f"{many} hosts every {INTERVAL_S:g} s")
            try:
                second = _stage(many, cores, say)
            except HostError as exc:
                second = {"not_held": str(exc)}
            if second.get("interval_error_p99_ms", MAX_ERROR_MS) < MAX_ERROR_MS:
                held = many
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return {
        "hosts_per_core_at_10s": held,
        **first,
        "interval_s": INTERVAL_S,
        "hosts": HOSTS,
        **({"more": {"hosts": many, **second}} if second else {}),
    }


def _stage(hosts: int, cores: list[int], say: Say) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        fakes = Fakes(cores[1])
        try:
            config = _write_config(Path(name), fakes, hosts)
            watcher = Watched(config, cores[0])
            try:
                return _measure(fakes, watcher, hosts, say)
            finally:
                watcher.stop()
        finally:
            fakes.stop()


def _measure(fakes: Fakes, watcher: Watched, hosts: int, say: Say) -> dict[str, Any]:
    time.sleep(WARM_UP_S)
    trusted = watcher.seen("TRUSTED")
    if len(trusted) < hosts:
        raise HostError(f"only {len(trusted)} of {hosts} hosts are trusted after two rounds")
    before = fakes.ask("take")
    cpu_s, begin = watcher.cpu_s(), time.monotonic()
    time.sleep(MEASURED_S)
    cpu_s, wall_s = watcher.cpu_s() - cpu_s, time.monotonic() - begin
    groups = fakes.ask("take")
    gaps = [gap for group in groups for gap in group["gaps_s"]]
    errors_ms = sorted(abs(gap - INTERVAL_S) * 1000 for gap in gaps)
    checks = sum(group["checks"] for group in groups)
    say(f"{FLIPPED_HOSTS} of {hosts} hosts change a PCR")
    flipped_at = fakes.ask("flip")["at"]
    deadline = time.monotonic() + DETECTION_S
    while len(watcher.seen("INVALID_QUOTE")) < FLIPPED_HOSTS:
        if time.monotonic() > deadline:
            raise HostError("a changed PCR was not reported")
        time.sleep(0.05)
    told = watcher.seen("INVALID_QUOTE").values()
    connections = sum(group["connections"] for group in groups)
    return {
        "interval_error_p99_ms": round(errors_ms[int(len(errors_ms) * 0.99)], 1),
        "interval_error_max_ms": round(errors_ms[-1], 1),
        "detection_s": round(max(told) - flipped_at, 2),
        "detection_n": len(told),
        "cpu_us_per_check": round(cpu_s / checks * 1e6, 1),
        "cpu_share": round(cpu_s / wall_s, 3),
        "checks": checks,
        "gaps": len(gaps),
        "lost": len(watcher.seen("FAILED")) + max(0, connections - hosts),
        "rss_mb": watcher.peak_rss_mb(),
        "unmeasured_checks": sum(group["checks"] for group in before),
    }


def _write_config(directory: Path, fakes: Fakes, hosts: int) -> Path:
    pins = PinStore(directory / "pins")
    for place, ak in enumerate(fakes.about["aks"]):
        pins.pin(f"group-{place}", base64.b64decode(ak))
    (directory / "policy.json").write_text(json.dumps({"0": [fakes.about["good"]]}))
    lines = [
        f"state_dir = {json.dumps(str(directory / 'state'))}",
        f"pins = {json.dumps(str(directory / 'pins'))}",
        "[defaults]",
        f"interval_s = {INTERVAL_S}",
        "jitter = 0.0",
        "insecure_plaintext = true",
        'tpm_policy = "policy.json"',
    ]
    for number in range(hosts):
        place = int(number < FLIPPED_HOSTS)
        lines += [
            f"[hosts.h{number}]",
            'provider_ip = "127.0.0.1"',
            f"provider_port = {fakes.about['ports'][place]}",
            f'pin = "group-{place}"',
        ]
    path = directory / "watch.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


class Fakes:
    """The running fakes. `about` is what they said at their start."""

    def __init__(self, core: int | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "provider_proxy.bench.fakes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if core is not None:
            os.sched_setaffinity(self._process.pid, {core})
        self.about: Any = self._line()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HostError("the fake proxies ended: see their error above")
        return json.loads(line)

    def ask(self, word: str) -> Any:
        """Tell them something; what they answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._line()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class Watched(Vitals):
    """The running watcher, its lines read by a thread as they come."""

    def __init__(self, config: Path, core: int | None) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "provider_proxy", "--log-level", "warning"),
                *("watch", "--config", str(config)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        if core is not None:
            os.sched_setaffinity(self._process.pid, {core})
        super().__init__(self._process.pid)
        self._seen: dict[str, dict[str, float]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            report = json.loads(line)
            self._seen.setdefault(report["state"], {})[report["host"]] = time.monotonic()

    def seen(self, state: str) -> dict[str, float]:
        """Hosts that were reported in a state, and when."""
        return dict(self._seen.get(state, {}))

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
