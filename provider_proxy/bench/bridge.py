"""`bench bridge`: how many polls of Keylime a bridge on one core answers, and what hanging hosts cost.

The bridge is the real command, bound to one core; around it on another: a real daemon over a swtpm, and
`keylime_load`, which polls as Keylime's verifier does, with a connection and mutual TLS for each poll.
`polls_per_s` is polls per second of the bridge's CPU, so that it does not include the cost of the load.
`alone_polls_per_s` is by the clock, with the load on the other core: software proxies, and P-256 clients.
It is below what the bridge can do where `bridge_busy` is below 1.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from provider_proxy.bench import own_time
from provider_proxy.bench.keylime_load import (
    CLIENT,
    QUOTE_INTERVAL_S,
    Verifier,
    hanging,
    make_clients,
    registrar,
)
from provider_proxy.bench.process import TICKS_PER_S, Target, config_text
from provider_proxy.bench.soft_host import SoftHost
from provider_proxy.errors import HostError
from provider_proxy.tenant.bridge.keys import BridgeKeys, load_keys
from provider_proxy.tenant.bridge.quoting import agent_id_of
from provider_proxy.trust.pins import PinStore

HOSTS = 500
BURST_S = 8.0
BURSTS = 5
PACE_SHARE = 0.8  # of what was possible; the rest is for bursts, as in operation
PACE_S = 30.0
LATE_S = 0.5  # a quarter of Keylime's interval
HANGING = 12
GOOD = 8
GAP_S = 40.0
READY_LIMIT_S = 120.0

Say = Callable[[str], None]


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns the figures.

    Raises:
        HostError: fewer than two cores, no swtpm, or the bridge did not start.
    """
    del seed  # only nonces are random here
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise HostError("bench bridge needs two cores: one is the bridge's")
    say("verify, sign and encode, without a socket")
    own_ms = own_time.measure()
    os.sched_setaffinity(0, set(cores[1:]))
    try:
        with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
            figures = asyncio.run(_measure(Path(name), cores[0], say))
    finally:
        os.sched_setaffinity(0, set(cores))
    return {**figures, **own_ms}


async def _measure(directory: Path, core: int, say: Say) -> dict[str, object]:
    ca, context, light = make_clients(directory)
    daemon = config_text(directory / "daemon", window_ms=1, max_duty=1.0)
    with Target(directory, "daemon", daemon) as target:
        site = await _Site.make(directory, target, ca)
        say(f"{HOSTS} hosts")
        async with site.bridge([target.port] * HOSTS, core) as bridge:
            verifier = Verifier(context)
            # Each host once, so that its connection to its proxy is there.
            await asyncio.gather(*(verifier.poll(port) for port in bridge.ports))
            rates, walls = [], []
            for _ in range(BURSTS):
                rate, wall = await _burst(verifier, bridge)
                rates.append(rate)
                walls.append(wall)
            # What both sides reach on this machine now, which may be less than the bridge's core can do.
            hosts = min(HOSTS, int(PACE_SHARE * statistics.median(walls) * QUOTE_INTERVAL_S))
            say(f"{hosts} hosts every {QUOTE_INTERVAL_S:g} s")
            late, polls = await _pace(context, bridge.ports[:hosts])
            rss = bridge.peak_rss_mb()
        alone = await _alone(site, light, core, say)
        say(f"{GOOD} hosts beside {HANGING} that hang")
        async with hanging() as nowhere:
            ports = [target.port] * GOOD + [nowhere] * HANGING
            async with site.bridge(ports, core) as bridge:
                good, bad = bridge.ports[:GOOD], bridge.ports[GOOD:]
                quiet = await _gaps(context, good, [])
                beside = await _gaps(context, good, bad)
    return {
        "polls_per_s": round(statistics.median(rates), 1),
        "polls_per_s_spread": [round(min(rates), 1), round(max(rates), 1)],
        "wall_polls_per_s": round(statistics.median(walls), 1),
        "failed_polls": sum(verifier.failed.values()),
        "hosts_carried": int(statistics.median(rates) * QUOTE_INTERVAL_S),
        "hosts_paced": hosts,
        "late_share": round(late / polls, 4),
        "rss_mb": round(rss, 1),
        "rss_hosts": HOSTS,
        "good_host_gap_ratio": round(statistics.mean(beside) / statistics.mean(quiet), 3),
        "good_host_gap_p99_ratio": round(_p99(beside) / _p99(quiet), 3),
        "hanging_hosts": HANGING,
        **alone,
    }


async def _alone(site: _Site, context: ssl.SSLContext, core: int, say: Say) -> Mapping[str, object]:
    """By the clock, with as little load beside the bridge as possible."""
    host = SoftHost()
    PinStore(site.directory / "pins").pin("light", host.tpm.ak_public)
    say(f"{HOSTS} hosts of software")
    async with host.serve() as port, site.bridge([port] * HOSTS, core, pin="light") as bridge:
        verifier = Verifier(context)
        await asyncio.gather(*(verifier.poll(each) for each in bridge.ports))
        walls, busy = [], []
        for _ in range(BURSTS):
            cpu_s, began = bridge.cpu_s(), time.monotonic()
            _, wall = await _burst(verifier, bridge)
            walls.append(wall)
            busy.append((bridge.cpu_s() - cpu_s) / (time.monotonic() - began))
        hosts = min(HOSTS, int(PACE_SHARE * statistics.median(walls) * QUOTE_INTERVAL_S))
        say(f"{hosts} hosts of software every {QUOTE_INTERVAL_S:g} s")
        late, polls = await _pace(context, bridge.ports[:hosts])
    return {
        "alone_polls_per_s": round(statistics.median(walls), 1),
        "alone_polls_per_s_spread": [round(min(walls), 1), round(max(walls), 1)],
        "bridge_busy": round(statistics.median(busy), 2),
        "alone_failed_polls": sum(verifier.failed.values()),
        "alone_hosts_paced": hosts,
        "alone_late_share": round(late / polls, 4),
    }


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


async def _burst(verifier: Verifier, bridge: _Bridge) -> tuple[float, float]:
    """As many polls as its connections allow, per second of the bridge's CPU and per second of time."""
    polls, cpu_s, began = len(verifier.took_s), bridge.cpu_s(), time.monotonic()
    end = began + BURST_S

    async def one(offset: int) -> None:
        place = offset
        while time.monotonic() < end:
            await verifier.poll(bridge.ports[place % len(bridge.ports)])
            place += 1

    step = len(bridge.ports) // 10
    await asyncio.gather(*(one(number * step) for number in range(10)))
    done = len(verifier.took_s) - polls
    return done / (bridge.cpu_s() - cpu_s), done / (time.monotonic() - began)


async def _watched(context: ssl.SSLContext, ports: Sequence[int], seconds: float) -> Verifier:
    """A verifier that watched these agents for so long."""
    verifier = Verifier(context)
    step = QUOTE_INTERVAL_S / len(ports)
    tasks = [
        asyncio.create_task(verifier.watch(port, number * step))
        for number, port in enumerate(ports)
    ]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return verifier


async def _pace(context: ssl.SSLContext, ports: Sequence[int]) -> tuple[int, int]:
    verifier = await _watched(context, ports, PACE_S)
    late = sum(took > LATE_S for took in verifier.took_s) + sum(verifier.failed.values())
    return late, len(verifier.took_s) + sum(verifier.failed.values())


async def _gaps(context: ssl.SSLContext, good: Sequence[int], bad: Sequence[int]) -> list[float]:
    """The times between two good answers of each good host."""
    verifier = await _watched(context, [*good, *bad], GAP_S)
    found = []
    for port in good:
        times = verifier.seen[port]
        found += [after - before for before, after in itertools.pairwise(times)]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bridge:
    """A running bridge."""

    ports: Sequence[int]
    pid: int

    def cpu_s(self) -> float:
        """User and system time so far, all threads, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def peak_rss_mb(self) -> float:
        """Largest resident size so far, in MB (10^6 bytes)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise HostError("the kernel does not report VmHWM")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """What all bridges of a run share."""

    directory: Path
    keys: BridgeKeys
    client_ca: Path

    @classmethod
    async def make(cls, directory: Path, target: Target, client_ca: Path) -> _Site:
        url = f"http://{target.host}:{target.port}/verifier/identity"
        identity = json.loads(await asyncio.to_thread(_get, url))["results"]
        PinStore(directory / "pins").pin("host", base64.b64decode(identity["ak_tpm"]))
        keys = load_keys(directory / "keys.pem", make_for="127.0.0.1")
        return cls(directory=directory, keys=keys, client_ca=client_ca)

    @asynccontextmanager
    async def bridge(
        self, proxies: Sequence[int], core: int, *, pin: str = "host"
    ) -> AsyncIterator[_Bridge]:
        """A bridge on a core of its own; proxies are the ports of the hosts' proxies."""
        names = [f"h{number}" for number in range(len(proxies))]
        first = _free_range(len(names) + 1)
        ports = range(first, first + len(names))
        ids = {
            agent_id_of(self.keys.ek_public, name): port
            for name, port in zip(names, ports, strict=True)
        }
        async with AsyncExitStack() as stack:
            registry = await stack.enter_async_context(registrar(self.keys, ids))
            config = self._config(names, proxies, first, registry, pin)
            process = subprocess.Popen(  # noqa: ASYNC220  # takes a millisecond
                [
                    *(sys.executable, "-m", "provider_proxy", "--log-level", "warning"),
                    *("bridge", "run", "--config", str(config)),
                ],
                stdin=subprocess.DEVNULL,
            )
            try:
                os.sched_setaffinity(process.pid, {core})
                await _until_ready(process, first + len(names))
                yield _Bridge(ports=ports, pid=process.pid)
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(process.wait, 20)
                process.kill()
                process.wait()

    def _config(
        self, names: Sequence[str], proxies: Sequence[int], first: int, registry: int, pin: str
    ) -> Path:
        state = tempfile.mkdtemp(dir=self.directory)
        values: dict[str, Mapping[str, object]] = {
            "bridge": {
                "registrar": "mine",
                "client_ca": str(self.client_ca),
                "keys": str(self.directory / "keys.pem"),
                "first_port": first,
                "admin": f"127.0.0.1:{first + len(names)}",
            },
            "registrars.mine": {
                "url": f"http://127.0.0.1:{registry}",
                "cert": str(self.directory / CLIENT),  # so that it reads before it registers
                "key": str(self.directory / CLIENT),
                "insecure_no_ek": True,
            },
            "defaults": {"insecure_plaintext": True},
        }
        values |= {
            f"hosts.{name}": {"provider_ip": "127.0.0.1", "provider_port": port, "pin": pin}
            for name, port in zip(names, proxies, strict=True)
        }
        lines = [
            f"state_dir = {json.dumps(state)}",
            f"pins = {json.dumps(str(self.directory / 'pins'))}",
        ]
        for table, keys in values.items():
            lines.append(f"[{table}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        path = Path(state) / "bridge.toml"
        path.write_text("\n".join(lines) + "\n")
        return path


def _free_range(count: int) -> int:
    """The first of so many free ports below the ephemeral ones."""
    for first in range(20_000, 32_000 - count, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise HostError(f"no {count} free ports below 32000")


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body


async def _until_ready(process: subprocess.Popen[bytes], admin: int) -> None:
    end = time.monotonic() + READY_LIMIT_S
    while True:
        with contextlib.suppress(OSError):
            await asyncio.to_thread(_get, f"http://127.0.0.1:{admin}/readyz")
            return
        if process.poll() is not None or time.monotonic() > end:
            raise HostError("the bridge did not start: see its log above")
        await asyncio.sleep(0.2)
