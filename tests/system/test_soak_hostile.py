"""The hostile soak: the real daemon under attacks in random order, the real watcher among hostile hosts.

Whatever attackers do, tenants and good hosts are served; and when they have gone, memory, descriptors and
threads are what they were. SOAK_SECONDS makes it longer, SOAK_SEED repeats the order."""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from soak_helpers import ATTACKS, FEW_FILES, LIMIT_S, Daemon, GoodTenant, ask

from provider_proxy.bench import hostile
from provider_proxy.bench.process import Vitals
from provider_proxy.bench.watch import Fakes, Watched

SECONDS = float(os.environ.get("SOAK_SECONDS", "8"))
TURN_S = 0.7  # of an attack, the warm-up's and the soak's
AT_ONCE = 3  # attacks that go on side by side
GROWTH_MB = 30.0  # the bound on memory; a leak of 5 kB a connection passes it in seconds
SPARE = 2  # descriptors and threads: a worker may just be at work

GOOD, SILENT, BAD = 5, 100, 10
OTHERS_S = 1.0
WARM_S = 8.0
TOLD_S = 20.0  # of OTHERS_S and a round's 3 s, on a loaded machine


class Size(NamedTuple):
    rss_mb: float
    files: int
    threads: int


def size_of(process: Vitals) -> Size:
    return Size(process.rss_mb(), process.open_files(), process.threads())


def settled(process: Vitals, small: Callable[[Size], bool]) -> Size:
    """What a process is once it has become small, or when the time for that is over."""
    end = time.monotonic() + LIMIT_S
    while not small(size := size_of(process)) and time.monotonic() < end:
        time.sleep(0.2)
    return size


@pytest.fixture
def seed(capsys: pytest.CaptureFixture[str]) -> int:
    made = int(os.environ.get("SOAK_SEED") or secrets.randbits(32))
    with capsys.disabled():
        print(f"\nsoak: SOAK_SEED={made} SOAK_SECONDS={SECONDS:g}", flush=True)
    return made


# --- the daemon -------------------------------------------------------------------------------------


def attack(daemon: Daemon, names: list[str], seconds: float) -> None:
    """Some attacks side by side; what an attacker meets is its own affair, an error in one is not."""
    end = threading.Event()
    failed: list[BaseException] = []

    def run(name: str) -> None:
        try:
            ATTACKS[name](daemon, end)
        except BaseException as exc:  # noqa: BLE001  # handed on below
            failed.append(exc)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    end.set()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_the_daemon_is_the_same_after_all_attacks(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(seed)
    daemon = Daemon(tmp_path)
    try:
        for name in ATTACKS:
            attack(daemon, [name], TURN_S)
        began = settled(daemon, lambda size: size.files < FEW_FILES // 4)
        tenant, done = GoodTenant(daemon), Counter[str]()
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end or set(done) != set(ATTACKS):
                left = [name for name in ATTACKS if not done[name]] or list(ATTACKS)
                names = dice.sample(left, min(AT_ONCE, len(left)))
                attack(daemon, names, TURN_S)
                done.update(names)
        finally:
            tenant.stop()
        with daemon.tenant() as tls:
            assert ask(tls) == 200  # no restart, no rest
        after = settled(
            daemon,
            lambda size: (
                size.files <= began.files + SPARE and size.threads <= began.threads + SPARE
            ),
        )
        crowd = daemon.metric("tls_handshakes_total", "crowded_out")
        lost = daemon.metric("audit_lost_batches_total")
        with capsys.disabled():
            print(f"soak: {began} -> {after}; {dict(done)}; the good tenant met {dict(tenant.met)}")
        assert after.rss_mb - began.rss_mb < GROWTH_MB
        assert after.files <= began.files + SPARE
        assert after.threads <= began.threads + SPARE
        assert tenant.met[200] > 0
        assert set(tenant.met) <= {0, 200, 503}
        assert tenant.met[200] > tenant.met[0] + tenant.met[503]
        assert crowd > 0, "handshakes were not crowded"
        assert lost > 0, "the disk was not full"
        assert daemon.metric("selfcheck_failures_total") == 0
        assert daemon.status("/readyz") == daemon.status("/healthz") == 200
        assert daemon.stop() == 0
        assert b"Traceback" not in daemon.log
    finally:
        daemon.kill()


# --- the watcher ------------------------------------------------------------------------------------


def test_the_watcher_is_the_same_after_hostile_hosts(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent hosts, floods, stalls, JSON bombs, bytes that drip; and one that was good and trickles."""
    fakes = Fakes(None)
    try:
        hostile.write_config(tmp_path, fakes, None)
        with hostile.hostile_hosts() as (process, about):
            config = hostile.write_config(
                tmp_path,
                fakes,
                about,
                good_hosts=GOOD,
                silent_hosts=SILENT,
                hostile=BAD,
                others_interval_s=OTHERS_S,
                defaults="timeout_s = 0.5\nretry_interval_s = 0.2\nround_limit_s = 3.0",
            )
            watcher = Watched(config, None)
            try:
                time.sleep(WARM_S)
                assert "trickling" in watcher.seen("TRUSTED")
                began = size_of(watcher)
                fakes.ask("take")
                assert process.stdin is not None
                process.stdin.write("turn\n")
                process.stdin.flush()
                turned_at = time.monotonic()
                told = None
                while told is None and time.monotonic() < turned_at + LIMIT_S:
                    told = watcher.seen("FAILED").get("trickling")
                    time.sleep(0.1)
                time.sleep(max(0.0, turned_at + SECONDS - time.monotonic()))
                checks = fakes.ask("take")[0]["checks"]
                # Answers in flight come and go: what stays is the least of some looks.
                after = settled(watcher, lambda size: size.rss_mb - began.rss_mb < GROWTH_MB)
                with capsys.disabled():
                    print(f"soak: {began} -> {after}; {checks} checks of {GOOD} good hosts")
                assert told is not None, "a host that trickles its list stayed trusted"
                assert told - turned_at < TOLD_S
                assert checks > GOOD * SECONDS / 3  # each is asked once a second
                assert not [host for host in watcher.seen("FAILED") if host.startswith("good")]
                assert after.rss_mb - began.rss_mb < GROWTH_MB
                # A connection a host, and what the process has of its own; a leak of one a round is more.
                assert after.files < GOOD + SILENT + BAD + 50
                assert after.threads <= began.threads + SPARE
            finally:
                watcher.stop()
    finally:
        fakes.stop()
