"""`provider-proxy demo`: many tenants at once on this machine, every answer verified.

Starts the real daemon (`provider-proxy serve`) with an embedded swtpm on loopback, in a directory that
is removed at the end, and asks through the real HTTP server. The tenants are the library's `ProxyClient`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from provider_proxy.bench.process import config_text
from provider_proxy.common.http import http_client
from provider_proxy.errors import HostError, ReplyError, UsageError, VerificationError
from provider_proxy.evidence.attestation import parse_attest
from provider_proxy.evidence.model import TrustedHost
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier, new_challenge
from provider_proxy.evidence.wire import parse_evidence
from provider_proxy.host.config.environment import PREFIX
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.testing.disturb import CHIPS

STEPS = ("connected", "answered", "verified")
MAX_TENANTS = 2000  # each is a connection of its own, here and in the daemon
START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
ANSWER_LIMIT_S = 60.0
OPEN_PCRS = 0x3FF  # PCRs 0 to 9, which share a batch
ISOLATED_SHARE = 0.05  # these tenants ask for PCR 23 too, and get a batch of their own
ISOLATED_PCR = 1 << 23
MEDIAN_CHIP_MS = 229  # RSA-2048 signature, median of 139 devices: TPMScan data set, CHES 2024


@dataclass(slots=True)
class Outcome:
    """What the tenants saw."""

    latencies_ms: list[float] = field(default_factory=list)
    quotes: Counter[bytes] = field(default_factory=Counter)
    quote_ms: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def quantile_ms(self, share: float) -> float:
        """A quantile of the latencies; 0 without answers."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--tenants",
        type=int,
        default=200,
        metavar="N",
        help="how many tenants ask at once (default: 200)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the tenants' masks (default: %(default)s)"
    )
    parser.add_argument(
        "--chip",
        choices=sorted(CHIPS),
        help="slow the swtpm down to the median speed of a vendor's chips",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 only where every answer verified.

    Raises:
        UsageError: the number of tenants is out of range.
        HostError: swtpm is missing, or the daemon did not start.
    """
    if not 1 <= args.tenants <= MAX_TENANTS:
        raise UsageError(f"--tenants must be in 1..{MAX_TENANTS}")
    console = Console(stderr=args.json)
    with tempfile.TemporaryDirectory(prefix="provider-proxy-demo-") as name:
        console.print("Starting the daemon on an embedded swtpm (software, not a hardware TPM) …")
        with _daemon(Path(name), args.chip) as url:
            outcome = trio.run(_tenants, url, args.tenants, args.seed, console)
    _show(console, outcome, args.tenants, args.chip)
    verified = len(outcome.latencies_ms)
    if args.json:
        figures = {
            "tenants": args.tenants,
            "verified": verified,
            "quotes": len(outcome.quotes),
            "p50_ms": round(outcome.quantile_ms(0.5), 1),
            "p99_ms": round(outcome.quantile_ms(0.99), 1),
        }
        print(json.dumps(figures))
    return 0 if verified == args.tenants else 1


@contextmanager
def _daemon(directory: Path, chip: str | None) -> Iterator[str]:
    """`provider-proxy serve` as a process, or the same daemon on a slowed-down swtpm; its URL."""
    config = directory / "demo.toml"
    if chip is None:
        config.write_text(config_text(directory / "state"))
        command = ["-m", "provider_proxy", "serve", "--config", str(config)]
    else:
        kind = "rsa" if chip.endswith("-rsa") else "ecc"
        config.write_text(config_text(directory / "state", ak_algorithm=kind))
        command = ["-m", "provider_proxy.bench.target", str(config), "--log-level", "info"]
        command += ["--chip", chip]
    log = directory / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={k: v for k, v in os.environ.items() if not k.startswith(PREFIX)},
            process_group=0,  # a Ctrl-C is ours; the daemon is stopped below
        )
    try:
        yield _wait_for_address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        found = re.search(r"listening on (\S+)\n", log.read_text(errors="replace"))
        if found:
            return f"http://{found[1]}"
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise HostError("the daemon did not start:\n" + log.read_text(errors="replace").strip())


async def _tenants(url: str, count: int, seed: int, console: Console) -> Outcome:
    """Connect everybody, let all ask at once, then verify every answer."""
    outcome = Outcome()
    masks = random.Random(seed)  # noqa: S311  # a demo's choice of PCRs
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = [progress.add_task(f"tenants {verb}", total=count) for verb in STEPS]
        async with AsyncExitStack() as clients:
            tenants = []
            for _ in range(count):
                # A client each, as separate tenants have; and one pool of 200 is slow.
                http = http_client(None, read_limit_s=ANSWER_LIMIT_S)
                client = ProxyClient(await clients.enter_async_context(http), url)
                tenants.append(_Tenant(client, _choose_mask(masks)))
            for bar, step in zip(bars, (_Tenant.connect, _Tenant.ask), strict=False):
                async with trio.open_nursery() as nursery:
                    for tenant in tenants:
                        nursery.start_soon(step, tenant, lambda: progress.advance(bar))  # noqa: B023
            identity = await tenants[0].client.identity()
        host = TrustedHost(ak=parse_ak(identity.ak_public))
        for tenant in tenants:
            tenant.verify(host, outcome)
            progress.advance(bars[-1])
            await trio.lowlevel.checkpoint()
    return outcome


def _choose_mask(dice: random.Random) -> int:
    mask = dice.randint(1, OPEN_PCRS)
    return mask | ISOLATED_PCR if dice.random() < ISOLATED_SHARE else mask


class _Tenant:
    """One tenant: its own nonce, its own verifier."""

    def __init__(self, client: ProxyClient, mask: int) -> None:
        self.client = client
        self._mask = mask
        self._history = MemoryHistory()
        self._challenge: Challenge | None = None
        self._body = b""
        self._answered_s = 0.0
        self._failure = ""

    async def connect(self, done: Callable[[], None]) -> None:
        """Open a connection of its own, as a tenant that polls has one open."""
        await self.client.identity()
        done()

    async def ask(self, done: Callable[[], None]) -> None:
        """Make a nonce and ask."""
        self._challenge = new_challenge(
            mask=self._mask, now_s=trio.current_time(), history=self._history
        )
        try:
            self._body = await self.client.fetch(self._challenge.request)
        except ReplyError as exc:
            self._failure = str(exc)
        self._answered_s = trio.current_time()
        done()

    def verify(self, host: TrustedHost, outcome: Outcome) -> None:
        """Judge the answer and note the outcome."""
        assert self._challenge is not None
        try:
            if self._failure:
                raise ReplyError(self._failure)
            Verifier(UnsafeAcceptAny()).verify(
                self._body, self._challenge, host, self._history, now_s=self._answered_s
            )
        except (ReplyError, VerificationError) as exc:
            outcome.failures.append(f"{type(exc).__name__}: {exc}")
            return
        evidence = parse_evidence(self._body)
        outcome.latencies_ms.append((self._answered_s - self._challenge.made_at_s) * 1000)
        outcome.quotes[parse_attest(evidence.quote.attest).extra_data] += 1
        if evidence.timing is not None:
            outcome.quote_ms.append(evidence.timing.quote_ms)


def _time(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms < 1000 else f"{ms / 1000:,.1f} s"


def _show(console: Console, outcome: Outcome, tenants: int, chip: str | None) -> None:
    """A short table of what happened."""
    verified = len(outcome.latencies_ms)
    quotes = len(outcome.quotes)
    quote_ms = sorted(outcome.quote_ms)[len(outcome.quote_ms) // 2] if outcome.quote_ms else 0.0
    sizes = ", ".join(str(size) for size in sorted(outcome.quotes.values(), reverse=True)[:8])
    table = Table(title="One TPM, many tenants", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("tenants that asked at once", str(tenants))
    table.add_row("answers verified by their tenant", str(verified))
    table.add_row("TPM quotes taken", str(quotes))
    table.add_row("tenants in each batch", sizes + (", …" if quotes > 8 else ""))
    table.add_row("latency, half of the tenants", f"{outcome.quantile_ms(0.5):,.0f} ms")
    table.add_row("latency, 99 of 100", f"{outcome.quantile_ms(0.99):,.0f} ms")
    table.add_section()
    what = f"a TPM like {chip} (swtpm, slowed down)" if chip else "this software TPM"
    table.add_row(f"a quote on {what}", f"{quote_ms:,.1f} ms")
    table.add_row(f"{tenants} quotes one by one on it", _time(tenants * quote_ms))
    if chip is None:
        table.add_row(
            f"… on a hardware TPM of {MEDIAN_CHIP_MS} ms a quote", _time(tenants * MEDIAN_CHIP_MS)
        )
        table.add_row(f"… the {quotes} quotes of this run on it", _time(quotes * MEDIAN_CHIP_MS))
    console.print(table)
    for failure in outcome.failures[:5]:
        console.print(f"[red]not verified:[/red] {failure}")
