"""`bench quotes`: what batching gains, and what it costs.

One run of under a minute. The daemon stands on an embedded swtpm whose TPM2_Quote takes 100 ms
longer; the one-by-one side is the same daemon with `max_leaves = 1`. Every answer is verified after
the timing.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from provider_proxy.bench import load
from provider_proxy.bench.process import Target, config_text
from provider_proxy.evidence.model import ALL_PCRS, HashAlg, Nonce, PcrMask, QuoteRequest, Tenant
from provider_proxy.host.batching.batch import Batch, Waiter, build_batch_tree
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.local_tpm import open_quoter
from provider_proxy.testing.disturb import CHIPS, Plan, delay_quotes, slow_down
from provider_proxy.testing.faulty import FaultyContext
from provider_proxy.testing.ima import extend

DELAY_MS = 100.0
WINDOW_MS = 50.0
TENANTS = 1000
SINGLES = 20  # on the one-by-one side, so that none is refused
ROUNDS = 3
BATCHED_S = 3.0
SINGLE_S = 2.0
CPU_ROUNDS = 7
CPU_S = 2.0
LONE_INTERVAL_S = 0.35  # longer than the chip's rest: a lone tenant must not wait for itself
LONE_S = 3.0
POLL_INTERVAL_S = 2.0
POLL_S = 4.0
WARM_UP_S = 0.5
BODY_BYTES = 2300  # of an answer in a batch of a thousand; measured again below
DIRECT_QUOTES = 20
COUNTED_QUOTES = 100
SLOW = ("--quote-delay-ms", str(DELAY_MS))


Say = Callable[[str], None]
"""Told what is being measured."""


def run(seed: int, say: Say, *, chip: str | None = None) -> dict[str, object]:
    """Measure everything on a vendor's chip, or on one of 100 ms; returns the figures."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        return _run(Path(name), seed, say, chip)


def run_baseline(seed: int, say: Say) -> dict[str, object]:
    """Measure only the CPU a request, against the bare server."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        directory = Path(name)
        config = config_text(directory / "batched", window_ms=WINDOW_MS, max_duty=1)
        with Target(directory, "batched", config, *SLOW) as many:
            return _cpu(directory, many, BODY_BYTES, seed, say)


def _run(directory: Path, seed: int, say: Say, chip: str | None) -> dict[str, object]:
    say("the TPM alone")
    plan = slow_down(CHIPS[chip]) if chip else delay_quotes(DELAY_MS / 1000)
    quote_ms = trio.run(_direct_quote_ms, directory / "direct", plan)
    slow = ("--chip", chip) if chip else SLOW
    batched = config_text(directory / "batched", window_ms=WINDOW_MS, max_duty=1)
    single = config_text(directory / "single", window_ms=WINDOW_MS, max_duty=1, max_leaves=1)
    default = config_text(directory / "default", window_ms=WINDOW_MS)
    with (
        Target(directory, "batched", batched, *slow) as many,
        Target(directory, "single", single, *slow) as one,
        Target(directory, "default", default, *slow) as polled,
    ):
        rates, bodies = _rates(many, one, seed, say)
        cpu = _cpu(directory, many, bodies, seed, say)
        say("a lone tenant")
        lone_ms = _latencies(polled, 1, LONE_INTERVAL_S, LONE_S, seed)
        say(f"{TENANTS} tenants polling every {POLL_INTERVAL_S:g} s")
        polling_ms = _latencies(polled, TENANTS, POLL_INTERVAL_S, POLL_S, seed + 1)
        rss_mb = many.peak_rss_mb()
    say("TPM commands a quote")
    commands = {
        "commands_per_quote": trio.run(_commands_a_quote, directory / "rest", False),
        "commands_per_quote_moving": trio.run(_commands_a_quote, directory / "moving", True),
    }
    say("the tree alone")
    tree_us = _tree_us()
    pause_ms = quote_ms * (1 / Tpm().max_duty - 1)
    lone_p50 = statistics.median(lone_ms["latencies"])
    p99 = quantile(polling_ms["latencies"], 0.99)
    return {
        **rates,
        **cpu,
        **commands,
        "merkle_share": round(tree_us / float(str(cpu["cpu_us_per_request"])), 3),
        "merkle_us_per_leaf": round(tree_us, 2),
        "lone_p50_ms": round(lone_p50, 1),
        "lone_overhead_ms": round(lone_p50 - WINDOW_MS - quote_ms, 2),
        "polling_p50_ms": round(statistics.median(polling_ms["latencies"]), 1),
        "polling_p99_ms": round(p99, 1),
        "polling_bound_ms": round(2 * quote_ms + pause_ms + WINDOW_MS + 50, 1),
        "polling_n": len(polling_ms["latencies"]),
        "rss_mb": round(rss_mb, 1),
        "window_ms": WINDOW_MS,
        "pause_ms": round(pause_ms, 1),
        "quote_ms_p50": round(quote_ms, 2),
    }


async def _direct_quote_ms(state_dir: Path, plan: Plan) -> float:
    """Median time of a quote on such a TPM, with no daemon in between."""
    times = []
    async with open_quoter(
        Tpm(tcti="embedded", max_duty=1),
        state_dir,
        Metrics(),
        open_context=lambda tcti: FaultyContext(tcti, plan),
    ) as quoter:
        for _ in range(DIRECT_QUOTES):
            begin = time.monotonic()
            await quoter.quote(secrets.token_hex(16).encode(), HashAlg.SHA256, 0x3FF)
            times.append((time.monotonic() - begin) * 1000)
    return statistics.median(times)


async def _commands_a_quote(state_dir: Path, moving: bool) -> float:
    """Commands that reach the TPM, a quote of 24 PCRs; with PCR 10 extended before each where it moves.

    The extends are not counted. The first quote reads all PCRs, and is counted with the others.
    """
    seen: list[int] = []

    def plan(command: int) -> None:
        seen.append(command)

    async with open_quoter(
        Tpm(tcti="embedded", max_duty=1),
        state_dir,
        Metrics(),
        open_context=lambda tcti: FaultyContext(tcti, plan),
    ) as quoter:
        taken = 0
        for _ in range(COUNTED_QUOTES):
            if moving:
                await quoter.on_chip(lambda opened: extend(opened.context))
            seen.clear()
            await quoter.quote(secrets.token_hex(16).encode(), HashAlg.SHA256, ALL_PCRS)
            taken += len(seen)
    return round(taken / COUNTED_QUOTES, 2)


def _rates(many: Target, one: Target, seed: int, say: Say) -> tuple[dict[str, object], int]:
    """Verified quotes a second of both sides, in turns; and an answer's size."""
    hosts = {target: load.trusted_host(target.host, target.port) for target in (many, one)}
    rates: dict[Target, list[float]] = {many: [], one: []}
    verified = refused = 0
    size = BODY_BYTES
    for turn in range(ROUNDS):
        say(f"batched and one by one, round {turn + 1} of {ROUNDS}")
        for target, tenants, seconds in ((many, TENANTS, BATCHED_S), (one, SINGLES, SINGLE_S)):
            got = asyncio.run(
                load.closed_loop(
                    target.host,
                    target.port,
                    tenants=tenants,
                    seconds=seconds + WARM_UP_S,
                    seed=seed + 10_000 * turn,
                )
            )
            begin = min(reply.sent_s for reply in got.replies) + WARM_UP_S
            rates[target].append(got.within(begin, begin + seconds) / seconds)
            verified += load.verify_all(got, hosts[target])
            refused += got.refused + got.lost
            if target is many:
                size = round(statistics.median(len(reply.body) for reply in got.replies))
    ratios = [a / b for a, b in zip(rates[many], rates[one], strict=True)]
    return {
        "speedup_vs_one_by_one": round(statistics.median(ratios), 1),
        "speedup_spread": [round(min(ratios), 1), round(max(ratios), 1)],
        "quotes_per_s": round(statistics.median(rates[many]), 1),
        "one_by_one_per_s": round(statistics.median(rates[one]), 2),
        "n": verified,
        "refused": refused,
    }, size


def _cpu(directory: Path, many: Target, size: int, seed: int, say: Say) -> dict[str, object]:
    """CPU a request of the daemon and of the bare server, in turns, plaintext both."""
    used: dict[str, list[float]] = {"daemon": [], "bare": []}
    with Target(directory, "bare", "", "--baseline", str(size)) as bare:
        host = load.trusted_host(many.host, many.port)
        both = (("daemon", many), ("bare", bare))
        for turn in range(CPU_ROUNDS):
            say(f"CPU against the bare server, round {turn + 1} of {CPU_ROUNDS}")
            for name, target in both if turn % 2 else both[::-1]:
                begin = target.cpu_s()
                got = asyncio.run(
                    load.closed_loop(
                        target.host,
                        target.port,
                        tenants=TENANTS,
                        seconds=CPU_S,
                        seed=seed + 10_000 * turn,
                    )
                )
                used[name].append((target.cpu_s() - begin) / len(got.replies) * 1e6)
                if target is many:
                    load.verify_all(got, host)
    ratios = [a / b for a, b in zip(used["daemon"], used["bare"], strict=True)]
    return {
        "cpu_ratio_vs_bare": round(statistics.median(ratios), 2),
        "cpu_ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "cpu_us_per_request": round(statistics.median(used["daemon"]), 1),
        "cpu_us_per_request_bare": round(statistics.median(used["bare"]), 1),
        "body_bytes": size,
    }


def _latencies(
    target: Target, tenants: int, interval_s: float, seconds: float, seed: int
) -> dict[str, list[float]]:
    host = load.trusted_host(target.host, target.port)
    got = asyncio.run(
        load.polling(
            target.host,
            target.port,
            tenants=tenants,
            interval_s=interval_s,
            seconds=seconds,
            seed=seed,
        )
    )
    load.verify_all(got, host)
    return {"latencies": got.latencies_ms()}


def _tree_us() -> float:
    """CPU of a batch's tree and proofs, a leaf, in microseconds."""
    tenant = Tenant(name="bench", pcr_allow=0xFFFFFF)
    times = []
    for _ in range(9):
        waiters = [
            Waiter(
                QuoteRequest(nonce=Nonce(secrets.token_hex(10).encode()), mask=PcrMask(1)),
                tenant,
                (HashAlg.SHA256, 0, tenant.pcr_allow),
                0.0,
                0.0,
                None,
            )
            for _ in range(TENANTS)
        ]
        batch = Batch(1, HashAlg.SHA256, waiters, 0.0, 0.0)
        begin = time.process_time()
        build_batch_tree(batch)
        times.append((time.process_time() - begin) / TENANTS * 1e6)
    return statistics.median(times)


def quantile(ascending: list[float], share: float) -> float:
    """A quantile of ascending values."""
    return ascending[min(len(ascending) - 1, int(len(ascending) * share))]
