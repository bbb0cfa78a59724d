"""`bench logs`: what long IMA lists cost tenants that ask for them, and tenants that do not.

Two daemons over lists of 300,000 and of 1,000 lines are measured in turns: PCR 0 requests at a steady
pace, beside tenants that fetch the list from its first entry, as they do after a restart. The daemon
itself notes by how much its event loop wakes too late. A new line's cost is measured on plain files,
without a daemon.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from provider_proxy.bench import judging
from provider_proxy.bench.ima_lists import write_list
from provider_proxy.bench.process import Target, config_text
from provider_proxy.errors import HostError
from provider_proxy.evidence.model import Nonce, PcrMask, QuoteRequest
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.host.logs.follow import FollowedList
from provider_proxy.host.logs.parts import Logs, share_out

LONG, SHORT = 300_000, 1_000
MILLION = 1_000_000
TURNS = 3  # of each daemon
TURN_S = 12.0
EVERY_S = 0.05  # between a tenant's PCR 0 requests
TENANTS = 3
FETCHERS = 2
NEW_LINES = 100
ROUNDS = 40
QUOTE_MS = 20
IMA, PCR_0 = 1 << 10, 1

Say = Callable[[str], None]


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; see the module for what, and docs/sizing.md for what the figures mean."""
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as directory:
        figures = _daemons(Path(directory), say)
        figures |= _new_lines(Path(directory), say)
    return figures | judging.measure(say)


# --- the daemon -------------------------------------------------------------------------------------


def _daemons(directory: Path, say: Say) -> dict[str, object]:
    waits: dict[int, list[float]] = {LONG: [], SHORT: []}
    lags: dict[int, list[float]] = {LONG: [], SHORT: []}
    fetched, rss = 0, 0.0
    for lines in waits:
        write_list(directory / str(lines), 0, lines)
    for turn in range(TURNS):
        for lines in waits:
            say(f"{lines} lines, round {turn + 1} of {TURNS}")
            name = f"{lines}-{turn}"
            lag_file = directory / f"{name}.lag"
            config = _config(directory / name, directory / str(lines))
            options = ("--quote-delay-ms", str(QUOTE_MS), "--loop-lag", str(lag_file))
            with Target(directory, name, config, *options) as target:
                took, parts = asyncio.run(_turn(target.host, target.port))
                if lines == LONG:
                    rss, fetched = max(rss, target.peak_rss_mb()), fetched + parts
            waits[lines] += took
            lags[lines] += json.loads(lag_file.read_text())
    long, short = _p99(waits[LONG]), _p99(waits[SHORT])
    return {
        "lines": LONG,
        "parts_fetched": fetched,
        "pcr0_p99_ms_long": round(long, 1),
        "pcr0_p99_ms_short": round(short, 1),
        "pcr0_p50_ms_long": round(statistics.median(waits[LONG]), 1),
        "pcr0_p50_ms_short": round(statistics.median(waits[SHORT]), 1),
        "stall_ms_p99": round(long - short, 1),
        "loop_lag_ms_p99": round(_p99(lags[LONG]), 1),
        "loop_lag_ms_p99_short": round(_p99(lags[SHORT]), 1),
        "rss_mb": round(rss, 1),
    }


def _config(state_dir: Path, ima: Path) -> str:
    text = config_text(state_dir, window_ms=10, max_duty=1)
    return text.replace('ima = "/nonexistent"', f"ima = {json.dumps(str(ima))}").replace(
        "[tenant_defaults]", f"[tenant_defaults]\npcr_allow = {list(range(24))}"
    )


async def _turn(host: str, port: int) -> tuple[list[float], int]:
    """Latencies of the PCR 0 requests in ms, and how many parts of the list were fetched."""
    end = time.monotonic() + TURN_S
    fetchers = [asyncio.create_task(_fetch(host, port, end, n)) for n in range(FETCHERS)]
    await asyncio.sleep(1.0)  # the list is being read by now
    tenants = [asyncio.create_task(_poll(host, port, end, n)) for n in range(TENANTS)]
    took = [ms for times in await asyncio.gather(*tenants) for ms in times]
    return took, sum(await asyncio.gather(*fetchers))


async def _poll(host: str, port: int, end: float, number: int) -> list[float]:
    reader, writer = await asyncio.open_connection(host, port)
    took = []
    due = time.monotonic() + number * EVERY_S / TENANTS
    asked = 0
    while due < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        begin = time.monotonic()
        status, _ = await _get(reader, writer, _query(PCR_0, f"p{number}-{asked:020}"))
        if status == 200:
            took.append((time.monotonic() - begin) * 1000)
        asked += 1
        due = max(due + EVERY_S, time.monotonic())
    writer.close()
    return took


async def _fetch(host: str, port: int, end: float, number: int) -> int:
    """The list from its first entry, part by part, again and again."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    parts = entry = asked = 0
    while time.monotonic() < end:
        asked += 1
        status, body = await _get(reader, writer, _query(IMA, f"f{number}-{asked:020}", entry))
        if status == 429:  # so many bytes of logs a tenant
            await asyncio.sleep(0.2)
            continue
        if status != 200:
            raise HostError(f"the daemon answered {status}")
        lines = body.count(b"\\n")
        parts, entry = parts + 1, entry + lines if lines else 0
    writer.close()
    return parts


def _query(mask: int, nonce: str, entry: int = 0) -> bytes:
    request = QuoteRequest(nonce=Nonce(nonce.encode()), mask=PcrMask(mask), ima_ml_entry=entry)
    return encode_quote_query(request).encode("ascii")


async def _get(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, query: bytes
) -> tuple[int, bytes]:
    writer.write(b"GET /verifier/quote?" + query + b" HTTP/1.1\r\nHost: proxy\r\n\r\n")
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return int(head.split(b" ")[1]), await reader.readexactly(length)


def _p99(values: Sequence[float]) -> float:
    """Nearest rank."""
    if not values:
        raise HostError("nothing was measured")
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


# --- new lines ----------------------------------------------------------------------------------------


def _new_lines(directory: Path, say: Say) -> dict[str, object]:
    followed = {}
    for lines in (MILLION, SHORT):
        say(f"new lines behind {lines}")
        path = directory / f"grows-{lines}"
        write_list(path, 0, lines)
        followed[lines] = FollowedList(path, directory)
        followed[lines].read_on()
    times: dict[int, list[float]] = {lines: [] for lines in followed}
    for _ in range(ROUNDS):
        for lines, reader in followed.items():
            known = reader.list
            assert known is not None
            request = QuoteRequest(
                nonce=Nonce(b"n" * 32), mask=PcrMask(IMA), ima_ml_entry=known.lines
            )
            write_list(directory / f"grows-{lines}", known.lines, NEW_LINES)
            begin = time.perf_counter()
            reader.read_on()
            (part,) = share_out((request,), Logs(ima=reader.list))
            times[lines].append(time.perf_counter() - begin)
            if part is None or b"".join(part).count(b"\\n") != NEW_LINES:
                raise HostError("the new lines were not served")
    for reader in followed.values():
        reader.close()
    long, short = (statistics.median(times[lines]) for lines in (MILLION, SHORT))
    return {
        "new_lines_us_million": round(long * 1e6),
        "new_lines_us_thousand": round(short * 1e6),
        "new_lines_cost_ratio": round(long / short, 2),
    }
