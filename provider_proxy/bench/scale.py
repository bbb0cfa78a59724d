"""`bench scale`: ten thousand tenants that wait at once, twice, on fresh connections; a front's cores.

The bound of the waiting is the batching rule's own: the batches that so many need, one after the other,
and the bare server's cost for each. HAProxy ends the tenants' TLS where it is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from provider_proxy.bench import connections, load
from provider_proxy.bench.overload import make_certificates, tls_config
from provider_proxy.bench.process import Target, config_text
from provider_proxy.bench.quotes import quantile
from provider_proxy.errors import HostError

TENANTS = 10_000
FEW = 100
FEW_ROUNDS = 20
DELAY_MS = 100.0
MAX_LEAVES = 1024
MAX_DUTY = 0.5
WINDOW_MS = 50.0
BODY_BYTES = 2400
LIMIT_S = 120.0
FRONT_ROUNDS = 3
FRONT_EACH = 100
START_S = 10.0

Say = Callable[[str], None]


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns the figures."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        directory = Path(name)
        return {**_waiting(directory, seed, say), **_front(directory, say)}


def _waiting(directory: Path, seed: int, say: Say) -> dict[str, object]:
    config = config_text(
        directory / "scale", window_ms=WINDOW_MS, max_leaves=MAX_LEAVES, max_duty=MAX_DUTY
    )
    config = config.replace(
        "max_connections_per_address = 5000\nmax_queue = 8192",
        f"max_connections = {2 * TENANTS}\nmax_connections_per_address = {2 * TENANTS}\n"
        f"max_queue = {2 * TENANTS}\ndefault_timeout_ms = 60000",
    )
    slow = ("--quote-delay-ms", str(DELAY_MS))
    with (
        Target(directory, "scale", config, *slow) as target,
        Target(directory, "bare", "", "--baseline", str(BODY_BYTES)) as bare,
    ):
        host = load.trusted_host(target.host, target.port)
        say(f"{FEW} at once, {FEW_ROUNDS} times")
        few = [_burst(target, FEW, seed + n) for n in range(FEW_ROUNDS)]
        bursts = []
        for number in range(2):
            say(f"{TENANTS} at once, burst {number + 1}")
            bursts.append(_burst(target, TENANTS, seed + 1000 + number))
        say("the bare server")
        bare_s, _ = _burst(bare, TENANTS, seed)
        say("verifying")
        verified = sum(load.verify_all(got, host) for _, got in (*few, *bursts))
        rss_mb = target.peak_rss_mb()
    few_us = statistics.median(cost for cost, _ in few) * 1e6
    cost_s, last = bursts[1]
    latencies = last.latencies_ms()
    turn_ms = DELAY_MS / MAX_DUTY
    bound_ms = math.ceil(TENANTS / MAX_LEAVES) * turn_ms + WINDOW_MS + TENANTS * bare_s * 1000
    return {
        "waiting_10000_p99_ms": round(quantile(latencies, 0.99), 1),
        "waiting_10000_bound_ms": round(bound_ms, 1),
        "waiting_10000_first_p99_ms": round(quantile(bursts[0][1].latencies_ms(), 0.99), 1),
        "waiting_10000_answered": len(latencies),
        "waiting_10000_refused": last.refused,
        "waiting_10000_lost": last.lost + last.hung,
        "cost_us_at_100": round(few_us, 1),
        "cost_us_at_10000": round(cost_s * 1e6, 1),
        "cost_us_bare": round(bare_s * 1e6, 1),
        "cost_flatness": round(cost_s * 1e6 / few_us, 2),
        "rss_mb": round(rss_mb, 1),
        "verified": verified,
    }


def _burst(target: Target, tenants: int, seed: int) -> tuple[float, load.Load]:
    """CPU seconds a request, its connection included, and what came."""
    begin = target.cpu_s()
    got = asyncio.run(
        load.at_once(target.host, target.port, tenants=tenants, limit_s=LIMIT_S, seed=seed)
    )
    return (target.cpu_s() - begin) / max(1, len(got.replies)), got


def _front(directory: Path, say: Say) -> dict[str, object]:
    """New connections a second through HAProxy, against the daemon's own TLS, in turns."""
    program = shutil.which("haproxy")
    if program is None:
        say("HAProxy is not installed")
        return {"front_cores_ratio": None}
    make_certificates(directory, 1)
    socket_path = directory / "front.sock"
    config = tls_config(directory, "front", max_duty=1.0).replace(
        "[listen]\n",
        f'[listen]\nfront = "unix:{socket_path}"\nfront_peers = ["uid:{os.geteuid()}"]\n',
    )
    rates: dict[str, list[float]] = {"front": [], "own": []}
    used: dict[str, list[float]] = {"front": [], "own": []}
    with (
        Target(directory, "fronted", config) as target,
        _haproxy(program, directory, socket_path) as port,
    ):
        for turn in range(FRONT_ROUNDS):
            say(f"new connections by HAProxy and by the daemon, round {turn + 1}")
            for name, at in (("front", port), ("own", target.port)):
                begin_s = target.cpu_s()
                rates[name].append(connections.connect("127.0.0.1", at, directory, FRONT_EACH))
                count = connections.CLIENTS * FRONT_EACH
                used[name].append((target.cpu_s() - begin_s) * 1000 / count)
    ratios = [a / b for a, b in zip(rates["front"], rates["own"], strict=True)]
    return {
        "front_cores_ratio": round(statistics.median(ratios), 2),
        "front_cores_ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "front_per_s": round(statistics.median(rates["front"]), 1),
        "own_tls_per_s": round(statistics.median(rates["own"]), 1),
        "front_daemon_cpu_ms": round(statistics.median(used["front"]), 2),
        "own_tls_daemon_cpu_ms": round(statistics.median(used["own"]), 2),
    }


@contextlib.contextmanager
def _haproxy(program: str, directory: Path, front: Path) -> Iterator[int]:
    """HAProxy as docs/fronts.md has it; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    pem = directory / "haproxy.pem"
    pem.touch(mode=0o600)
    pem.write_bytes(
        (directory / "server.crt").read_bytes() + (directory / "server.key").read_bytes()
    )
    path = directory / "haproxy.cfg"
    path.write_text(f"""
global
    nbthread {os.cpu_count()}
defaults
    mode http
    timeout client 80s
    timeout connect 2s
    timeout server 65s
    retries 0
frontend tenants
    bind 127.0.0.1:{port} ssl crt {pem} ca-file {directory / "ca.crt"} verify required
    http-request del-header Client-Cert
    http-request set-header Client-Cert :%[ssl_c_der,base64]:
    default_backend daemon
backend daemon
    http-reuse safe
    server local unix@{front}
""")
    process = subprocess.Popen([program, "-db", "-q", "-f", str(path)], stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise HostError("HAProxy did not start: see its log above")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()
