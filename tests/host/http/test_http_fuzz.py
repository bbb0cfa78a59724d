"""The real daemon under fire: requests made from its own description, and requests mutated byte by byte.
All the while another tenant is served, with evidence that verifies.

FUZZ_SEED repeats or changes what is sent; FUZZ_CASES makes the byte-level part longer."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import trio
from helpers import (
    HOST_UUID,
    LIMIT_S,
    Asker,
    Serving,
    connect,
    get,
    get_bytes,
    quote_over,
    serving,
    trusted_ak,
)
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events

from provider_proxy.evidence.model import HashAlg
from provider_proxy.host.http import messages

pytestmark = pytest.mark.real

SEED = int(os.environ.get("FUZZ_SEED", "1"))
CASES = int(os.environ.get("FUZZ_CASES", "4000"))
EXAMPLES = 250  # of a path in schemathesis' own phase
SENDERS = 12
ANSWER_S = 20.0  # a good tenant's answer, and a fuzzed connection's end; both take milliseconds
GOOD_PAUSE_S = 0.01
REJECTED = ["400", "404", "405", "414", "431"]  # long arguments make a long target, or a long head


@dataclass(slots=True)
class Good:
    """A tenant who behaves.

    Attributes:
        served: answers that verified.
        slowest_s: of them.
    """

    served: int = 0
    slowest_s: float = 0.0

    async def run(self, address: str, asker: Asker) -> None:
        """Ask again and again over one connection; fails where an answer is late or does not verify."""
        async with connect(address) as wire:
            while True:
                begin = time.monotonic()
                with trio.fail_after(ANSWER_S):
                    await quote_over(wire, asker)
                self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
                self.served += 1
                await trio.sleep(GOOD_PAUSE_S)


def everything(folder: Path) -> str:
    """A configuration that offers all that the description says, and refuses nobody for his rate."""
    (folder / "ima").write_text("10 line one\n10 line two\n")
    (folder / "uefi").write_bytes(b"event log")
    banks = json.dumps([bank.label for bank in HashAlg])
    return (
        f'state_dir = "{folder}/s"\n'
        '[listen]\naddress = "127.0.0.1:0"\ninsecure_plaintext = true\n'
        f'[tpm]\ntcti = "embedded"\nbanks = {banks}\ninsecure_sha1_bank = true\n'
        f'[logs]\nima = "{folder}/ima"\nuefi = "{folder}/uefi"\n'
        "[batch]\nwindow_ms = 0\n[limits]\nmax_timeout_ms = 600000\n"
        '[admin]\naddress = "127.0.0.1:0"\n'
        f"[tenant_defaults]\nrate = 1e6\nburst = 1000000\npcr_allow = {list(range(24))}\n"
    )


@asynccontextmanager
async def under_fire(folder: Path) -> AsyncIterator[Serving]:
    """The daemon, and a good tenant who is served until the block ends; then all must be well still."""
    good = Good()
    async with serving(folder, everything(folder)) as serve:
        asker = Asker(await trusted_ak(serve.address))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(good.run, serve.address, asker)
            begin = time.monotonic()
            yield serve
            seconds = time.monotonic() - begin
            nursery.cancel_scope.cancel()
        assert good.served >= 20, f"{good} in {seconds:.1f} s"
        async with connect(serve.address) as wire:
            await quote_over(wire, asker)
        metrics = (await get(serve.admin, "/metrics")).body.decode()
        assert "provider_proxy_selfcheck_failures_total 0.0" in metrics
        assert 'reason="bug"' not in metrics
        assert serve.process.returncode is None
        assert "Traceback" not in serve.log
        assert await serve.stop(signal.SIGTERM) == 0, serve.log


# --- requests of the description --------------------------------------------------------------------


def settings_of(address: str) -> SchemathesisConfig:
    """Repeatable, bounded, strict about statuses; nothing is kept on disk."""
    return SchemathesisConfig.from_dict(
        {
            "seed": SEED,
            "base-url": f"http://{address}",
            "continue-on-failure": True,
            "request-timeout": ANSWER_S,
            "cache": {"enabled": False},
            "generation": {
                "deterministic": True,
                "max-examples": EXAMPLES,
                "database": "none",
                "no-shrink": True,
            },
            "phases": {"stateful": {"enabled": False}},
            "checks": {
                "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503", "504"]},
                "positive_data_acceptance": {"expected-statuses": ["200", "404", "503", "504"]},
                "negative_data_rejection": {"expected-statuses": REJECTED},
            },
        }
    )


@dataclass(slots=True)
class Outcome:
    """What schemathesis did and found."""

    replies: Counter[tuple[str, int]] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    ended: str = ""

    def add(self, event: events.EngineEvent) -> None:
        if isinstance(event, events.ScenarioFinished):
            for interaction in event.recorder.interactions.values():
                if interaction.response is None:
                    self.problems.append(f"{event.label}: no response")
                else:
                    self.replies[event.label or "", interaction.response.status_code] += 1
            for check in (c for found in event.recorder.checks.values() for c in found):
                self.checks[check.name] += 1
                if check.failure_info is not None:
                    sample = check.failure_info.code_sample
                    self.problems.append(f"{check.name}: {check.failure_info.failure}\n{sample}")
        elif isinstance(event, events.NonFatalError):
            self.problems.append(f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            self.problems.append(repr(event.exception))
        elif isinstance(event, events.EngineFinished):
            self.ended = event.stop_reason.value


def run_schemathesis(description: dict[str, Any], address: str) -> Outcome:
    schema = schemathesis.openapi.from_dict(description, config=settings_of(address))
    schema.validate()
    outcome = Outcome()
    for event in engine.from_schema(schema).execute():
        outcome.add(event)
    return outcome


async def test_the_door_is_as_described(tmp_path: Path) -> None:
    async with under_fire(tmp_path) as serve:
        description = json.loads((await get(serve.address, "/openapi.json")).body)
        outcome = await trio.to_thread.run_sync(run_schemathesis, description, serve.address)
    assert not outcome.problems, "\n\n".join(outcome.problems[:10])
    assert outcome.ended == "completed"
    for path in description["paths"]:
        there = 404 if path == "/verifier/vtpm-ca" else 200  # this host certifies no vTPMs
        assert outcome.replies[f"GET {path}", there] > 0, outcome.replies
        assert outcome.replies[f"GET {path}", 405] > 0, outcome.replies
    assert outcome.replies["GET /verifier/quote", 400] > EXAMPLES / 10
    assert outcome.replies["GET /verifier/quote", 200] > EXAMPLES / 10
    assert set(outcome.checks) >= {
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "positive_data_acceptance",
        "unsupported_method",
    }


# --- requests of mutated bytes ----------------------------------------------------------------------

QUOTE = f"/verifier/quote?nonce={'n' * 16}&mask=0x1"
VALID = (
    get_bytes(QUOTE),
    get_bytes(f"{QUOTE}&bank=sha384&ima_ml_entry=1&timeout_ms=2000"),
    get_bytes(f"/verifier/quote?nonce={'n' * 64}&mask=0xffffff", "Accept: */*", "Cookie: a=b"),
    get_bytes(f"{QUOTE}&vm={HOST_UUID}"),
    get_bytes(f"http://proxy.test{QUOTE}"),
    get_bytes("/version"),
    get_bytes("/version", version="1.0"),
    get_bytes("/verifier/identity", "Connection: close"),
    get_bytes("/openapi.json", "Connection: keep-alive"),
    get_bytes("/version", method="HEAD"),
    get_bytes("/version", "Content-Length: 4", method="POST") + b"body",
    get_bytes("/version", "Transfer-Encoding: chunked", method="POST") + b"4\r\nbody\r\n0\r\n\r\n",
)
TOKENS = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b"\r\n\r\n",
        b" ",
        b"\t",
        b":",
        b"?",
        b"&",
        b"=",
        b"%",
        b"%00",
        b"%ff",
    ),
    *(
        b"\r\nContent-Length: 5",
        b"\r\nContent-Length: 99999999999999999999",
        b"\r\nContent-Length: -1",
    ),
    *(b"\r\nTransfer-Encoding: chunked", b"\r\nTransfer-Encoding: gzip", b"\r\nHost: other"),
    *(b"\r\nExpect: 100-continue", b"\r\nConnection: Upgrade\r\nUpgrade: h2c", b"\r\n folded"),
    *(
        b"HEAD ",
        b"GET ",
        b"CONNECT ",
        b"HTTP/0.9",
        b"HTTP/2.0",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    *(
        b"\x16\x03\x01\x02\x00\x01",
        b"\xff" * 40,
        b"A" * 3000,
        b"X: y\r\n" * 2500,
        b"&nonce=" + b"m" * 16,
    ),
)
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ([A-Za-z ]+)")
BLANK_LINE = re.compile(rb"(?=\n\r?\n)")


def mutate(dice: random.Random) -> bytes:
    """One or a few requests, pipelined, with some damage; one in eight has none."""
    data = bytearray(b"".join(dice.choices(VALID, k=dice.choice((1, 1, 1, 2, 3, 8)))))
    for _ in range(dice.choice((0, 1, 1, 1, 2, 2, 4, 16))):
        at, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        match dice.randrange(8):
            case 0 | 1:
                for place in dice.choices(range(len(data)), k=dice.randint(1, 3)) if data else ():
                    data[place] ^= 1 << dice.randrange(8)
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[at:end] * dice.choice((1, 1, 2, 8))
            case 4:
                del data[at : min(end, at + 40)]
            case 5:
                other = dice.choice(VALID)
                data[at:] = other[dice.randrange(len(other)) :]
            case 6:
                data[at:at] = dice.choice(TOKENS)
            case _:
                data[at : min(end, at + 8)] = dice.randbytes(dice.randint(1, 8))
        del data[64 * 1024 :]
    return bytes(data)


def read_replies(received: bytes, sent: bytes) -> list[int]:
    """The statuses of what came back; fails where it is anything but whole, proper responses.

    Of HTTP it is read what RFC 9112 says and no more: `h11` on both sides would be one opinion."""
    statuses: list[int] = []
    closes = False
    while received:
        assert not closes, f"a response after the last one: {received!r}"
        head, blank, received = received.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        match = STATUS_LINE.fullmatch(lines[0])
        assert match is not None, f"no response: {head!r}"
        assert blank, f"half a head: {head!r}"
        status = int(match[1])
        assert match[2] == messages.REASONS[status]
        headers: dict[bytes, bytes] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b": ")
            assert colon, line
            assert name.lower() not in headers, line
            headers[name.lower()] = value
        assert headers[b"content-type"] == messages.JSON
        assert headers[b"cache-control"] == b"no-store"
        assert (status == 405) == (b"allow" in headers)
        closes = headers.get(b"connection") == b"close"
        length = int(headers[b"content-length"])
        if b"HEAD" in sent and (not received or received.startswith(b"HTTP/1.1 ")):
            length = 0
        body, received = received[:length], received[length:]
        assert len(body) == length, f"cut off: {body!r}"
        check_body(status, body)
        statuses.append(status)
    # Each head ends in a blank line, and at most one refusal follows the last of them.
    assert len(statuses) <= len(BLANK_LINE.findall(sent)) + 1
    return statuses


def check_body(status: int, body: bytes) -> None:
    if not body:
        return  # of a HEAD
    values = json.loads(body)
    if "openapi" in values and status == 200:
        return
    assert set(values) == {"code", "status", "results"}
    assert values["code"] == status
    if status != 200:
        assert set(values["results"]) <= ({"parameter"} if status == 400 else set())


KNOWN = set(messages.REASONS) - {500, 502}


@dataclass(slots=True)
class Tally:
    """How the fuzzed connections ended."""

    statuses: Counter[int] = field(default_factory=Counter)
    silent: int = 0
    reset: int = 0


async def fire(address: str, dice: random.Random, tally: Tally) -> None:
    """One connection: send, in pieces or at once; end; read what comes until the other side ends."""
    sent = mutate(dice)
    cuts = sorted(dice.randrange(len(sent) + 1) for _ in range(dice.choice((0, 0, 0, 1, 3))))
    patience_s = dice.choice((0.0, 0.0, 0.003, 0.02))
    host, _, port = address.rpartition(":")
    received = bytearray()
    hangs_up = dice.random() < 0.1
    ended = False
    try:
        with trio.fail_after(ANSWER_S):
            stream = await trio.open_tcp_stream(host, int(port))
            async with stream, trio.open_nursery() as nursery:

                async def write() -> None:
                    nonlocal ended
                    try:
                        for begin, end in zip((0, *cuts), (*cuts, len(sent)), strict=True):
                            await stream.send_all(sent[begin:end])
                            await trio.sleep(0.001 if cuts else 0)
                        await trio.sleep(patience_s)
                        if hangs_up:
                            nursery.cancel_scope.cancel()
                        else:
                            await stream.send_eof()
                    except trio.BrokenResourceError:
                        ended = True  # refused before it had all

                nursery.start_soon(write)
                async for data in stream:
                    received += data
    except* trio.BrokenResourceError:
        ended = True
    except* trio.TooSlowError:
        raise AssertionError(f"no end in {ANSWER_S} s of {sent!r}: {bytes(received)!r}") from None
    if hangs_up:
        return
    if ended:
        tally.reset += 1
        return
    statuses = read_replies(bytes(received), sent)
    assert set(statuses) <= KNOWN, f"{statuses} to {sent!r}"
    tally.statuses.update(statuses)
    tally.silent += not statuses


async def keep_firing(address: str, sender: int, tally: Tally) -> None:
    for number in range(sender, CASES, SENDERS):
        await fire(address, random.Random(f"{SEED} {number}"), tally)


async def test_mutated_requests_end_in_proper_replies(tmp_path: Path) -> None:
    tally = Tally()
    with trio.fail_after(6 * LIMIT_S):
        async with under_fire(tmp_path) as serve:
            async with trio.open_nursery() as nursery:
                for sender in range(SENDERS):
                    nursery.start_soon(partial(keep_firing, serve.address, sender, tally))
    if CASES >= 4000:  # what a run of this length always meets
        assert {200, 400, 404, 405, 501} <= set(tally.statuses), tally
        assert tally.statuses[200] > CASES / 10
    assert tally.reset <= CASES / 50, tally


# --- the judge of the replies itself ----------------------------------------------------------------

HEAD = (
    b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
    b"Content-Length: %d\r\n\r\n"
)
BODY = b'{"code":404,"status":"no such path","results":{}}'
REPLY = HEAD % len(BODY) + BODY


def test_proper_replies_are_read() -> None:
    assert read_replies(b"", b"") == []
    assert read_replies(REPLY * 2, get_bytes("/") * 2) == [404, 404]
    assert read_replies(HEAD % 9 + REPLY, get_bytes("/", method="HEAD") * 2) == [404, 404]


@pytest.mark.parametrize(
    "received",
    [
        b"HTTP/1.1",
        REPLY[:-1],
        REPLY + b"x",
        REPLY * 3,  # more than was asked for
        REPLY.replace(b"404 Not Found", b"404 Nothing"),
        REPLY.replace(b"404 Not Found", b"418 Teapot"),
        REPLY.replace(b'"code":404', b'"code":200'),
        REPLY.replace(b"{}}", b'{"a":1}}').replace(b"49", b"54"),
        REPLY.replace(b"\r\nContent-Length", b"\r\nConnection: close\r\nContent-Length") + REPLY,
    ],
)
def test_improper_replies_are_seen(received: bytes) -> None:
    with pytest.raises((AssertionError, KeyError, ValueError)):
        read_replies(received, get_bytes("/"))
