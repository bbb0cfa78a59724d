"""`bench overload`: ten times more than the chip can do, one tenant's flood, and what mutual TLS costs.

A slow chip and small batches set the capacity, so that the generator keeps up. Each ratio is of two
sides measured in turns within one run; the daemons use mutual TLS, except for plaintext.
"""

from __future__ import annotations

import asyncio
import ssl
import statistics
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from provider_proxy.bench import connections, load
from provider_proxy.bench.process import Target, config_text
from provider_proxy.bench.quotes import quantile
from provider_proxy.bench.tenant_tls import tenant_context
from provider_proxy.host import pki

DELAY_MS = 200.0
MAX_LEAVES = 20  # 100 a second at 200 ms
MAX_QUEUE = 60
OVERLOAD = 10
ROUNDS = 3
ROUND_S = 4.0
GOOD_TENANTS = 10
GOOD_INTERVAL_S = 1.0
FLOOD_CONNECTIONS = 60
FLOOD_RATE = 5
POLITE = 10
POLITE_LIMIT_S = 30.0
CPU_TENANTS = 200
CPU_S = 2.0

Say = Callable[[str], None]
Contexts = list[ssl.SSLContext]


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns the figures."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        directory = Path(name)
        contexts = make_certificates(directory, GOOD_TENANTS + 1)
        return {
            **_overload(directory, seed, say),
            **_fairness(directory, contexts, seed, say),
            **_tls_cost(directory, contexts[0], seed, say),
            **connections.measure(directory, tls_config(directory, "fresh", max_duty=1.0), say),
        }


def make_certificates(directory: Path, tenants: int) -> Contexts:
    """A CA and a server's certificate in the directory; a context for each of some tenants."""
    now = datetime.now(UTC)
    ca = pki.new_authority(now)
    server = pki.issue(
        ca, "server", [x509.DNSName("localhost")], ExtendedKeyUsageOID.SERVER_AUTH, days=1, now=now
    )
    (directory / "ca.crt").write_bytes(pki.pem(ca.certificate))
    (directory / "server.crt").write_bytes(pki.pem(server.certificate))
    (directory / "server.key").touch(mode=0o600)
    (directory / "server.key").write_bytes(server.key_pem())
    contexts = []
    for number in range(tenants):
        uri = x509.UniformResourceIdentifier(f"spiffe://bench/tenant/{number}")
        tenant = pki.issue(
            ca, f"tenant {number}", [uri], ExtendedKeyUsageOID.CLIENT_AUTH, days=1, now=now
        )
        path = directory / f"tenant{number}.pem"
        path.touch(mode=0o600)
        path.write_bytes(pki.pem(tenant.certificate) + tenant.key_pem())
        contexts.append(tenant_context(directory / "ca.crt", path))
    return contexts


def tls_config(directory: Path, name: str, **settings: float) -> str:
    """A configuration with mutual TLS, out of `make_certificates`' files."""
    return with_tls(config_text(directory / name, **settings), directory)  # type: ignore[arg-type]


def with_tls(text: str, directory: Path) -> str:
    """A plaintext configuration of `config_text` with mutual TLS instead."""
    tls = "".join(
        f'{key} = "{directory / file}"\n'
        for key, file in (
            ("tls_cert", "server.crt"),
            ("tls_key", "server.key"),
            ("client_ca", "ca.crt"),
        )
    )
    return text.replace("insecure_plaintext = true\n", tls)


def _overload(directory: Path, seed: int, say: Say) -> dict[str, object]:
    """Memory and goodput at capacity and at ten times it, refusals, and clients that come back later."""
    settings = {"max_duty": 1.0, "max_leaves": MAX_LEAVES, "max_queue": MAX_QUEUE}
    slow = ("--quote-delay-ms", str(DELAY_MS))
    capacity, goodput, refusals = [], [], []
    with (
        Target(directory, "calm", config_text(directory / "a", **settings), *slow) as calm,  # type: ignore[arg-type]
        Target(directory, "flooded", config_text(directory / "b", **settings), *slow) as flooded,  # type: ignore[arg-type]
    ):
        for turn in range(ROUNDS):
            say(f"at capacity, round {turn + 1} of {ROUNDS}")
            got = asyncio.run(
                load.closed_loop(
                    calm.host, calm.port, tenants=2 * MAX_LEAVES, seconds=ROUND_S, seed=seed + turn
                )
            )
            load.verify_all(got, load.trusted_host(calm.host, calm.port))
            capacity.append(_rate(got))
            say(f"at {OVERLOAD} times the capacity, round {turn + 1} of {ROUNDS}")
            offered = OVERLOAD * statistics.median(capacity)
            got = asyncio.run(
                load.polling(
                    flooded.host,
                    flooded.port,
                    tenants=round(offered),
                    interval_s=1.0,
                    seconds=ROUND_S,
                    seed=seed + turn,
                )
            )
            load.verify_all(got, load.trusted_host(flooded.host, flooded.port))
            goodput.append(_rate(got))
            refusals += [reply.latency_ms for reply in got.replies if reply.status != 200]
        say("clients that honour Retry-After")
        polite = asyncio.run(_polite(flooded, round(offered), seed))
        memory = flooded.peak_rss_mb() / calm.peak_rss_mb()
    return {
        "capacity": round(statistics.median(capacity), 1),
        "offered": round(offered, 1),
        "goodput_ratio": round(statistics.median(goodput) / max(capacity), 3),
        "refusal_p99_ms": round(quantile(sorted(refusals), 0.99), 1),
        "refused": len(refusals),
        "memory_ratio": round(memory, 3),
        "polite_asked": POLITE,
        "polite_served": polite,
    }


def _rate(got: load.Load) -> float:
    """Good answers a second, from the second second on."""
    begin = min(reply.sent_s for reply in got.replies) + 1
    return got.within(begin, begin + ROUND_S - 1) / (ROUND_S - 1)


async def _polite(target: Target, flood: int, seed: int) -> int:
    """How many clients that honour Retry-After are served during a flood."""
    noise = asyncio.create_task(
        load.polling(
            target.host,
            target.port,
            tenants=flood,
            interval_s=1.0,
            seconds=POLITE_LIMIT_S,
            seed=seed,
        )
    )
    await asyncio.sleep(1)
    served = await asyncio.gather(
        *(
            load.with_retry_after(target.host, target.port, seed + 77_000 + n, POLITE_LIMIT_S)
            for n in range(POLITE)
        )
    )
    noise.cancel()
    await asyncio.gather(noise, return_exceptions=True)
    return sum(served)


def _fairness(directory: Path, contexts: Contexts, seed: int, say: Say) -> dict[str, object]:
    """Latency of good tenants with and without a tenant that asks a hundred times its rate."""
    config = tls_config(directory, "fair", max_duty=1.0, max_leaves=MAX_LEAVES)
    config = config.replace(
        "rate = 1000\nburst = 1000", f"rate = {FLOOD_RATE}\nburst = {FLOOD_RATE}"
    )
    quiet: list[float] = []
    loud: list[float] = []
    asked = 0
    with Target(directory, "fair", config, "--quote-delay-ms", str(DELAY_MS)) as target:

        async def good(turn: int) -> load.Load:
            return await load.polling(
                target.host,
                target.port,
                tenants=GOOD_TENANTS,
                interval_s=GOOD_INTERVAL_S,
                seconds=ROUND_S,
                seed=seed + turn,
                contexts=contexts[1:],
            )

        async def flooded(turn: int) -> tuple[load.Load, load.Load]:
            flood = asyncio.create_task(
                load.polling(
                    target.host,
                    target.port,
                    tenants=FLOOD_CONNECTIONS,
                    interval_s=FLOOD_CONNECTIONS / (100 * FLOOD_RATE),
                    seconds=ROUND_S + 1,
                    seed=seed + 500 + turn,
                    contexts=contexts[:1],
                )
            )
            await asyncio.sleep(0.5)
            return await good(turn), await flood

        host = asyncio.run(load.tls_trusted_host(target.host, target.port, contexts[0]))
        for turn in range(2 * ROUNDS):
            say(f"fairness, round {turn + 1} of {2 * ROUNDS}")
            if turn % 2:
                got, flood = asyncio.run(flooded(turn))
                loud += got.latencies_ms()
                asked += len(flood.replies)
            else:
                got = asyncio.run(good(turn))
                quiet += got.latencies_ms()
            load.verify_all(got, host)
    quiet_p99, loud_p99 = quantile(sorted(quiet), 0.99), quantile(sorted(loud), 0.99)
    return {
        "fairness_p99_ratio": round(loud_p99 / quiet_p99, 3),
        "fairness_quiet_p99_ms": round(quiet_p99, 1),
        "fairness_flooded_p99_ms": round(loud_p99, 1),
        "fairness_n": len(quiet) + len(loud),
        "fairness_flood_per_s": round(asked / ROUNDS / (ROUND_S + 1), 1),
    }


def _tls_cost(directory: Path, context: ssl.SSLContext, seed: int, say: Say) -> dict[str, object]:
    """CPU a request with mutual TLS kept alive, in plaintext, and with a connection each time."""
    used: dict[str, list[float]] = {"mtls": [], "plain": []}
    slow = ("--quote-delay-ms", "50")
    plain_config = config_text(directory / "plain", max_duty=1)
    with (
        Target(directory, "mtls", tls_config(directory, "mtls", max_duty=1.0), *slow) as mtls,
        Target(directory, "plain", plain_config, *slow) as plain,
    ):
        for turn in range(ROUNDS):
            say(f"mutual TLS and plaintext, round {turn + 1} of {ROUNDS}")
            for name, target, contexts in (("mtls", mtls, [context]), ("plain", plain, None)):
                cpu, count = asyncio.run(_cpu_of(target, contexts, seed + turn))
                used[name].append(cpu / count * 1e6)
    ratios = [a / b for a, b in zip(used["mtls"], used["plain"], strict=True)]
    return {
        "mtls_cpu_ratio": round(statistics.median(ratios), 2),
        "mtls_cpu_ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "mtls_cpu_us": round(statistics.median(used["mtls"]), 1),
        "plain_cpu_us": round(statistics.median(used["plain"]), 1),
    }


async def _cpu_of(target: Target, contexts: Contexts | None, seed: int) -> tuple[float, int]:
    """CPU seconds and requests of a closed loop, its handshakes left out."""
    marks: list[float] = []
    got = await load.closed_loop(
        target.host,
        target.port,
        tenants=CPU_TENANTS,
        seconds=CPU_S,
        seed=seed,
        contexts=contexts,
        on_connected=lambda: marks.append(target.cpu_s()),
    )
    return target.cpu_s() - marks[0], len(got.replies)
