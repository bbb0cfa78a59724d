"""`bench contention`: 22 clients that use one TPM at the same moment.

Three ways: each quote on its own through the daemon (`max_leaves = 1`); tpm2-tools in 22 processes on the
same bare TPM; and the daemon as it is. On chips of 100 and of 810 ms a quote, with P-256 and RSA-2048.
A process of tpm2-tools that finds no free session tries again. The TPM is bare here (without the kernel's
resource manager), so that happens often.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from provider_proxy.bench import load
from provider_proxy.bench.process import Target, config_text
from provider_proxy.errors import HostError
from provider_proxy.host.tpm import chip, keys
from provider_proxy.host.tpm.ek import find_or_make_ek
from provider_proxy.host.tpm.embedded import EmbeddedTpm
from provider_proxy.testing.broker import Broker
from provider_proxy.testing.disturb import delay_quotes

CLIENTS = 22
CHIPS_MS = (100, 810)
LIMIT_S = 120.0
RETRY_S = 0.05
EK_HANDLE = 0x81010001
AK_HANDLE = 0x81000100

Say = Callable[[str], None]


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns a table of figures per chip.

    Raises:
        HostError: tpm2-tools are not installed.
    """
    if shutil.which("tpm2_quote") is None:
        raise HostError("bench contention needs tpm2_quote: apt install tpm2-tools")
    figures: dict[str, object] = {"clients": CLIENTS}
    for kind in ("ecc", "rsa"):
        for delay_ms in CHIPS_MS:
            name = f"{delay_ms}ms_{kind}"
            with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as directory:
                figures[name] = _chip(Path(directory), kind, delay_ms, seed, say)
    return figures


def _chip(directory: Path, kind: str, delay_ms: int, seed: int, say: Say) -> dict[str, object]:
    say(f"{delay_ms} ms, {kind}: one by one")
    single = _daemon(directory, "single", kind, delay_ms, seed, max_leaves=1)
    say(f"{delay_ms} ms, {kind}: through the proxy")
    shared = _daemon(directory, "shared", kind, delay_ms, seed, max_leaves=1024)
    say(f"{delay_ms} ms, {kind}: tpm2-tools in {CLIENTS} processes")
    times, failed = _tools(directory, kind, delay_ms)
    return {
        "one_by_one_p99_ms": round(max(single), 1),
        "tools_p99_ms": round(max(times), 1),
        "proxy_p99_ms": round(max(shared), 1),
        "tools_failed_tries": failed,
        "ratio_vs_one_by_one": round(max(single) / max(shared), 1),
    }


def _daemon(
    directory: Path, name: str, kind: str, delay_ms: int, seed: int, *, max_leaves: int
) -> list[float]:
    """Latencies of 22 tenants at once; 22 have no 99th percentile but their slowest."""
    config = config_text(directory / name, max_duty=1, max_leaves=max_leaves, ak_algorithm=kind)
    with Target(directory, name, config, "--quote-delay-ms", str(delay_ms)) as target:
        got = asyncio.run(
            load.at_once(target.host, target.port, tenants=CLIENTS, limit_s=LIMIT_S, seed=seed)
        )
        verified = load.verify_all(got, load.trusted_host(target.host, target.port))
    if verified != CLIENTS:
        raise HostError(f"{CLIENTS - verified} of {CLIENTS} tenants got no quote")
    return got.latencies_ms()


def _tools(directory: Path, kind: str, delay_ms: int) -> tuple[list[float], int]:
    """Latencies of 22 processes of tpm2_quote, each until it has its quote; and failed tries."""
    auth = secrets.token_hex(8)
    embedded = EmbeddedTpm(directory / "tools")
    embedded.start()
    try:
        with Broker(embedded.tcti) as broker:
            context = chip.open_context(broker.tcti)
            try:
                ek = find_or_make_ek(context, EK_HANDLE, keys.Auths())
                keys.find_or_make_ak(
                    context, AK_HANDLE, kind, ek, keys.Auths(), lambda is_new: auth.encode()
                )
            finally:
                chip.close_context(context)
            broker.plan = delay_quotes(delay_ms / 1000)
            clients = [_Tool(broker.tcti, auth) for _ in range(CLIENTS)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
    finally:
        embedded.stop()
    return [client.took_ms for client in clients], sum(client.failed for client in clients)


class _Tool(threading.Thread):
    """Runs tpm2_quote until it succeeds."""

    def __init__(self, tcti: str, auth: str) -> None:
        super().__init__()
        self._auth = auth
        self._environment = {**os.environ, "TPM2TOOLS_TCTI": tcti, "TSS2_LOG": "all+none"}
        self.took_ms = 0.0
        self.failed = 0

    def run(self) -> None:
        begin = time.monotonic()
        command = ["tpm2_quote", "-Q", "-c", hex(AK_HANDLE), "-p", "file:-", "-l", "sha256:0,1,2"]
        command += ["-q", secrets.token_hex(16)]
        while time.monotonic() < begin + LIMIT_S:
            done = subprocess.run(
                command,
                env=self._environment,
                input=self._auth.encode(),
                capture_output=True,
                check=False,
                timeout=LIMIT_S,
            )
            if done.returncode == 0:
                break
            self.failed += 1
            time.sleep(RETRY_S)
        self.took_ms = (time.monotonic() - begin) * 1000
