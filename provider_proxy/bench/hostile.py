"""`bench hostile`: what attackers of the servers, and hostile hosts of a watcher, cost all others.

The daemon is the real one with mutual TLS, the watcher the real command; attackers, good tenants and
hosts are processes of their own, bounded in number and time. Latencies are compared within one run,
quiet against attacked. Memory is what the kernel says of the process, from a number of connections on
that has filled all caches.
"""

from __future__ import annotations

import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from provider_proxy.bench.attackers import WORK_LIMIT_S
from provider_proxy.bench.overload import make_certificates, tls_config
from provider_proxy.bench.process import Target
from provider_proxy.bench.watch import Fakes, Watched
from provider_proxy.errors import HostError
from provider_proxy.trust.pins import PinStore

WARM_CONNECTIONS = 2_000
CONNECTIONS = 100_000
AT_ONCE = 200
WARM_REQUESTS = 1_000
REQUESTS = 20_000
TENANTS = 4
QUIET_S = 20.0
QUOTE_MS = 50.0
GOOD_HOSTS = 20
GOOD_INTERVAL_S = 1.0
SILENT_HOSTS = 2_000
HOSTILE_HOSTS = 50
HOSTILE_KINDS = ("flood", "stall", "bomb", "drip", "trickle", "crumbs", "interim")
OTHERS_INTERVAL_S = 10.0
ROUND_LIMIT_S = 15.0
WATCH_QUIET_S = 10.0
WATCH_WARM_S = 25.0
WATCH_S = 40.0
LAST_LIMIT_S = 60.0  # for the last connections of a client whose time is over
SLACK_S = 2.0  # of what a report takes to get out, on a busy machine

Say = Callable[[str], None]


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure the daemon, then the watcher; returns the figures.

    Raises:
        HostError: one of them did not start, or ended.
    """
    del seed  # only nonces are random here
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        figures = _daemon(Path(name), say)
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        return figures | _watcher(Path(name), say)


# --- the daemon -------------------------------------------------------------------------------------


def _daemon(directory: Path, say: Say) -> dict[str, object]:
    make_certificates(directory, TENANTS)
    config = tls_config(directory, "state", max_duty=1.0)
    with Target(directory, "daemon", config, "--quote-delay-ms", str(QUOTE_MS)) as target:
        where = (target.host, str(target.port))
        tls = ("--ca", str(directory / "ca.crt"))
        pems = [str(directory / f"tenant{number}.pem") for number in range(TENANTS)]
        named = [word for pem in pems for word in ("--pem", pem)]
        say("good tenants alone")
        quiet = _start("poll", *where, str(QUIET_S), *tls, *named).result()
        say(f"{WARM_CONNECTIONS} connections that close")
        _start("close", *where, str(WARM_CONNECTIONS)).result()
        before = _settled(target)
        files, threads = target.open_files(), target.threads()
        say(f"{CONNECTIONS - WARM_CONNECTIONS} connections that close, {AT_ONCE} at a time")
        attack = _start(
            "close", *where, str(CONNECTIONS - WARM_CONNECTIONS), "--at-once", str(AT_ONCE)
        )
        beside = _start("poll", *where, str(QUIET_S), *tls, *named).result()
        attacked = attack.result()
        after = _settled(target)
        say(f"{REQUESTS} requests by mutual TLS, a connection each")
        _start("request", *where, str(WARM_REQUESTS), *tls, "--pem", pems[0]).result()
        before_mtls = _settled(target)
        asked = _start("request", *where, str(REQUESTS), *tls, "--pem", pems[0]).result()
        after_mtls = _settled(target)
        calm, busy = _p99(quiet["latencies_ms"]), _p99(beside["latencies_ms"])
        return {
            "rss_growth_mb": round(after - before, 1),
            "rss_growth_mtls_mb": round(after_mtls - before_mtls, 1),
            "good_tenant_p99_ratio": round(busy / calm, 2),
            "attack_per_s": round(attacked["connections"] / attacked["seconds"]),
            "good_tenant_p99_quiet_ms": round(calm, 1),
            "good_tenant_p99_attacked_ms": round(busy, 1),
            "good_tenant_p50_ratio": round(
                statistics.median(beside["latencies_ms"])
                / statistics.median(quiet["latencies_ms"]),
                2,
            ),
            "good_tenant_answers": len(beside["latencies_ms"]),
            "good_tenant_errors": quiet["errors"] + beside["errors"],
            "connections": WARM_CONNECTIONS + attacked["connections"],
            "mtls_requests": asked["requests"],
            "mtls_failed": asked["failed"],
            "mtls_per_s": round(asked["requests"] / asked["seconds"]),
            "rss_mb": round(after_mtls, 1),
            "open_files_growth": target.open_files() - files,
            "threads_growth": target.threads() - threads,
        }


def _settled(target: Target) -> float:
    """The resident size once its connections are gone and a collection is over."""
    time.sleep(3.0)
    return target.rss_mb()


def _p99(values: list[float]) -> float:
    if not values:
        raise HostError("no good tenant was served")
    return sorted(values)[int(len(values) * 0.99)]


class _Client:
    """A running process of `bench.attackers`."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "provider_proxy.bench.attackers", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    def result(self) -> Any:
        """What it did, when it is done.

        Raises:
            HostError: it failed, or does not end.
        """
        try:
            out, _ = self._process.communicate(timeout=WORK_LIMIT_S + LAST_LIMIT_S)
        except subprocess.TimeoutExpired as exc:
            self._process.kill()
            self._process.communicate()
            raise HostError("a client of the benchmark did not end") from exc
        if self._process.returncode:
            raise HostError("a client of the benchmark ended; see its error above")
        return json.loads(out)


def _start(*words: str) -> _Client:
    return _Client(words)


# --- the watcher ------------------------------------------------------------------------------------


@contextmanager
def hostile_hosts() -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """The process of the hostile hosts, and what it said at its start: `ports` by kind, and an `ak`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "provider_proxy.bench.hostile_hosts"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise HostError("the hostile hosts did not start; see their error above")
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def _watcher(directory: Path, say: Say) -> dict[str, object]:
    fakes = Fakes(None)
    try:
        say(f"{GOOD_HOSTS} good hosts alone")
        calm = Watched(write_config(directory, fakes, None), None)
        try:
            time.sleep(WATCH_QUIET_S)
            fakes.ask("take")
            time.sleep(WATCH_QUIET_S)
            quiet_ms = _errors_ms(fakes)
        finally:
            calm.stop()
        quiet = {"good_host_interval_error_p99_quiet_ms": round(_p99(quiet_ms), 1)}
        with hostile_hosts() as (process, about):
            watcher = Watched(write_config(directory, fakes, about), None)
            try:
                return _measure(fakes, watcher, process, say) | quiet
            finally:
                watcher.stop()
    finally:
        fakes.stop()


def _measure(
    fakes: Fakes, watcher: Watched, process: subprocess.Popen[str], say: Say
) -> dict[str, object]:
    say(f"{GOOD_HOSTS} good hosts beside {SILENT_HOSTS} silent and {HOSTILE_HOSTS} hostile ones")
    time.sleep(WATCH_WARM_S)
    if "trickling" not in watcher.seen("TRUSTED"):
        raise HostError("the host that will trickle was not trusted before that")
    fakes.ask("take")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("turn\n")
    process.stdin.flush()
    turned_at = json.loads(process.stdout.readline())["at"]
    time.sleep(WATCH_S)
    errors_ms = _errors_ms(fakes)
    told = [watcher.seen(state).get("trickling") for state in ("FAILED", "INVALID_QUOTE")]
    detected = min((at - turned_at for at in told if at is not None), default=None)
    bound_s = OTHERS_INTERVAL_S + ROUND_LIMIT_S
    return {
        "good_host_interval_error_p99_ms": round(_p99(errors_ms), 1),
        "good_host_interval_error_max_ms": round(max(errors_ms), 1),
        "good_host_checks": len(errors_ms),
        "good_host_checks_due": round(GOOD_HOSTS * WATCH_S / GOOD_INTERVAL_S),
        "good_hosts_lost": len([h for h in watcher.seen("FAILED") if h.startswith("good")]),
        "watch_rss_mb": watcher.peak_rss_mb(),
        "detection_bound_held": detected is not None and detected <= bound_s + SLACK_S,
        "detection_s": None if detected is None else round(detected, 1),
        "detection_bound_s": bound_s,
        "silent_hosts": SILENT_HOSTS,
        "hostile_hosts": HOSTILE_HOSTS,
    }


def _errors_ms(fakes: Fakes) -> list[float]:
    """By how much the time between two questions to a good host differs from its interval."""
    gaps = [gap for group in fakes.ask("take") for gap in group["gaps_s"]]
    return [abs(gap - GOOD_INTERVAL_S) * 1000 for gap in gaps]


def write_config(
    directory: Path,
    fakes: Fakes,
    about: Any,
    *,
    good_hosts: int = GOOD_HOSTS,
    silent_hosts: int = SILENT_HOSTS,
    hostile: int = HOSTILE_HOSTS,
    others_interval_s: float = OTHERS_INTERVAL_S,
    defaults: str = "",
) -> Path:
    """A configuration of `watch`. Call it without the hostile hosts first: the good ones are pinned then.

    Args:
        about: what the hostile hosts said at their start; None for good hosts alone.
        defaults: more lines of the table.
    """
    pins = PinStore(directory / "pins")
    if about is None:
        pins.pin("good", base64.b64decode(fakes.about["aks"][0]))
    else:
        pins.pin("hostile", base64.b64decode(about["ak"]))
    (directory / "policy.json").write_text(json.dumps({"0": [fakes.about["good"]]}))
    lines = [
        f"state_dir = {json.dumps(str(directory / 'state'))}",
        f"pins = {json.dumps(str(directory / 'pins'))}",
        "[defaults]",
        "jitter = 0.0",
        "insecure_plaintext = true",
        defaults,
    ]

    def host(name: str, port: int, provider: str, more: str) -> None:
        lines.append(f'[hosts.{name}]\nprovider_ip = "127.0.0.1"\nprovider_port = {port}')
        lines.append(f'provider = "{provider}"\n{more}')

    good = f'pin = "good"\ntpm_policy = "policy.json"\ninterval_s = {GOOD_INTERVAL_S}'
    for number in range(good_hosts):
        host(f"good{number}", fakes.about["ports"][0], "good", good)
    path = directory / "watch.toml"
    if about is None:
        path.write_text("\n".join(lines) + "\n")
        return path
    silent = f'pin = "good"\ntpm_policy = "policy.json"\ninterval_s = {others_interval_s}'
    for number in range(silent_hosts):
        host(f"silent{number}", about["ports"]["silent"], "silent", silent)
    bad = f'pin = "hostile"\nima = true\ninterval_s = {others_interval_s}\n'
    for number in range(hostile):
        kind = HOSTILE_KINDS[number % len(HOSTILE_KINDS)]
        host(f"{kind}{number}", about["ports"][kind], "hostile", bad)
    trickling = f"{bad}timeout_s = 2.0\nretry_interval_s = 0.1\nround_limit_s = {ROUND_LIMIT_S}"
    host("trickling", about["ports"]["trickle"], "hostile", trickling)
    path.write_text("\n".join(lines) + "\n")
    return path
