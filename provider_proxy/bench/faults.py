"""`bench faults`: what a chip that misbehaves costs.

Two daemons on slowed-down swtpms, asked in turns: at one of them 5 % of all TPM commands are answered by
a transient code. Then a daemon on a TPM whose every session another client holds.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from provider_proxy.bench import load
from provider_proxy.bench.process import Target, config_text
from provider_proxy.host.tpm import chip
from provider_proxy.host.tpm.embedded import EmbeddedTpm
from provider_proxy.testing.broker import Broker
from provider_proxy.testing.faulty import exhaust_sessions

DELAY_MS = 50.0
FAULT_SHARE = 0.05
TENANTS = 200
ROUNDS = 5
ROUND_S = 3.0
WARM_UP_S = 0.5
EXHAUSTED_TENANTS = 50
EXHAUSTED_LIMIT_S = 35.0

Say = Callable[[str], None]


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns the figures."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        directory = Path(name)
        figures = _throughput(directory, seed, say)
        say("every session held by another client")
        return {**figures, **_exhausted(directory, seed)}


def _throughput(directory: Path, seed: int, say: Say) -> dict[str, object]:
    slow = ("--quote-delay-ms", str(DELAY_MS))
    faulty = (*slow, "--fault-share", str(FAULT_SHARE), "--seed", str(seed))
    rates: dict[str, list[float]] = {"faulty": [], "clean": []}
    counts = {"asked": 0, "verified": 0, "refused": 0, "lost": 0, "hung": 0}
    with (
        Target(directory, "clean", config_text(directory / "a", max_duty=1), *slow) as clean,
        Target(directory, "faulty", config_text(directory / "b", max_duty=1), *faulty) as broken,
    ):
        for turn in range(ROUNDS):
            for name, target in (("faulty", broken), ("clean", clean)):
                say(f"{name}, round {turn + 1} of {ROUNDS}")
                got = asyncio.run(
                    load.closed_loop(
                        target.host,
                        target.port,
                        tenants=TENANTS,
                        seconds=ROUND_S + WARM_UP_S,
                        seed=seed + 10_000 * turn,
                    )
                )
                begin = min(reply.sent_s for reply in got.replies) + WARM_UP_S
                rates[name].append(got.within(begin, begin + ROUND_S) / ROUND_S)
                verified = load.verify_all(got, load.trusted_host(target.host, target.port))
                if name == "faulty":
                    counts["asked"] += len(got.replies) + got.lost + got.hung
                    counts["verified"] += verified
                    counts["refused"] += got.refused
                    counts["lost"] += got.lost
                    counts["hung"] += got.hung
    ratios = [a / b for a, b in zip(rates["faulty"], rates["clean"], strict=True)]
    return {
        "throughput_ratio": round(statistics.median(ratios), 3),
        "throughput_ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "faulty_per_s": round(statistics.median(rates["faulty"]), 1),
        "clean_per_s": round(statistics.median(rates["clean"]), 1),
        **counts,
    }


def _exhausted(directory: Path, seed: int) -> dict[str, object]:
    embedded = EmbeddedTpm(directory / "shared")
    embedded.start()
    try:
        with Broker(embedded.tcti) as broker:
            config = config_text(directory / "c", tcti=broker.tcti)
            with Target(directory, "exhausted", config) as target:
                exhausting = chip.open_context(broker.tcti)
                try:
                    held = exhaust_sessions(exhausting)
                    got = asyncio.run(
                        load.at_once(
                            target.host,
                            target.port,
                            tenants=EXHAUSTED_TENANTS,
                            limit_s=EXHAUSTED_LIMIT_S,
                            seed=seed,
                        )
                    )
                    served = load.verify_all(got, load.trusted_host(target.host, target.port))
                finally:
                    chip.close_context(exhausting)
    finally:
        embedded.stop()
    return {
        "exhausted_sessions_held": held,
        "exhausted_asked": EXHAUSTED_TENANTS,
        "exhausted_served": served,
    }
