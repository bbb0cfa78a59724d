"""Response codes: the table of codes, the waits, and the steps on a chip that a script answers for.
No threads and no TPM here: trio's mock clock, exact times."""

from __future__ import annotations

import functools
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import pytest
import trio
import trio.testing
from helpers import HOST_UUID
from tpm_helpers import QUALIFYING, errors_counted, sample

from provider_proxy.errors import (
    AkChangedError,
    DeadlineError,
    HostError,
    OverloadedError,
    ProviderProxyError,
    QuoteError,
    TpmError,
)
from provider_proxy.evidence.model import (
    HashAlg,
    Nonce,
    PcrMask,
    Quote,
    QuoteRequest,
    Tenant,
    mask_of,
)
from provider_proxy.host.batching.batch import Answer
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.config.tables import DEFAULT_ISOLATED
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.circuit import PROBE_S
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.quoters.tpm_opener import HostIdentity, TpmOpener
from provider_proxy.host.tpm import chip
from provider_proxy.host.tpm.gate import Gate
from provider_proxy.host.tpm.pace import Pace
from provider_proxy.host.tpm.response_codes import (
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    RC_NAMES,
    Step,
    name_of,
    step_for,
    wait_s,
)
from provider_proxy.testing.soft_tpm import SoftTpm

ISOLATED = mask_of(DEFAULT_ISOLATED)

T = TypeVar("T")

AGAIN, CLEAN, SLOW, FATAL = Step.AGAIN, Step.CLEAN, Step.SLOW, Step.FATAL
COMMAND_S = 0.05
RESMGR = 0xB0000  # the kernel's resource manager speaks for the TPM

# TPM 2.0 Library Part 2, section 6.6.3; classes of docs/tpm.md.
TABLE: dict[int, tuple[str, Step]] = {
    0x922: ("RETRY", AGAIN),
    0x90A: ("TESTING", AGAIN),
    0x908: ("YIELDED", AGAIN),
    0x909: ("CANCELED", AGAIN),
    0x901: ("CONTEXT_GAP", CLEAN),
    0x902: ("OBJECT_MEMORY", CLEAN),
    0x903: ("SESSION_MEMORY", CLEAN),
    0x904: ("MEMORY", CLEAN),
    0x905: ("SESSION_HANDLES", CLEAN),
    0x906: ("OBJECT_HANDLES", CLEAN),
    0x920: ("NV_RATE", SLOW),
    0x923: ("NV_UNAVAILABLE", SLOW),
    0x921: ("LOCKOUT", FATAL),
    0x101: ("FAILURE", FATAL),
    0x100: ("INITIALIZE", FATAL),
    0x130: ("REBOOT", FATAL),
    0x08B: ("OTHER", FATAL),  # HANDLE
    0x08E: ("OTHER", FATAL),  # AUTH_FAIL
    0x0A2: ("OTHER", FATAL),  # BAD_AUTH
    0x143: ("OTHER", FATAL),  # COMMAND_CODE
    0x084: ("OTHER", FATAL),  # VALUE
    0x93F: ("OTHER", FATAL),  # the last warning, of no known meaning
}
# What tpm2-tss itself answers: the connection broke, the driver timed out, an answer made no sense.
SOFTWARE = {
    "connection": 0xA000A,
    "timeout": 0xA0008,
    "no connection": 0xA0005,
    "malformed": 0xA0010,
    "marshalling": 0x90006,
    "system api": 0x80007,
    "esys": 0x70001,
    "fapi": 0x60001,
}


def error(code: int = 0) -> TpmError:
    return TpmError("TPM2_Quote: something", code=code)


# --- the table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, RESMGR], ids=["tpm", "resource manager"])
@pytest.mark.parametrize("code", TABLE, ids=hex)
def test_each_code_has_its_name_and_its_step(code: int, layer: int) -> None:
    assert (name_of(layer | code), step_for(error(layer | code))) == TABLE[code]


@pytest.mark.parametrize("code", SOFTWARE.values(), ids=SOFTWARE)
def test_what_the_chip_did_not_say_is_opened_anew(code: int) -> None:
    assert step_for(error(code)) is CLEAN
    assert name_of(code) == "IO"


def test_an_answer_that_could_not_be_read_is_opened_anew() -> None:
    assert step_for(error(0)) is CLEAN
    assert name_of(0) == "UNREADABLE"


def test_every_code_has_a_step_and_one_of_few_names() -> None:
    """A metric's label must not grow with what a broken chip makes up."""
    layers = [n << 16 for n in (0, *range(6, 16))]
    names = {name_of(layer | code) for layer in layers for code in range(0x1000)}
    assert names == {*RC_NAMES.values(), "OTHER", "IO", "UNREADABLE"}
    for code in range(1, 0x1000):
        assert (step_for(error(code)) is FATAL) == (TABLE.get(code, ("", FATAL))[1] is FATAL)


# --- the waits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [AGAIN, CLEAN, SLOW])
def test_waits_double_with_jitter_up_to_a_limit(step: Step) -> None:
    for tries in range(1, 20):
        longest = min(LONGEST_WAIT_S[step], FIRST_WAIT_S[step] * 2 ** (tries - 1))
        waits = [wait_s(step, tries) for _ in range(50)]
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert len(set(waits)) > 25  # not all at the same moment


def test_the_first_wait_is_short_but_where_the_chip_asks_for_less() -> None:
    assert FIRST_WAIT_S[AGAIN] == FIRST_WAIT_S[CLEAN] == 0.02
    assert FIRST_WAIT_S[SLOW] >= 0.5
    assert LONGEST_WAIT_S[SLOW] > LONGEST_WAIT_S[AGAIN]


@pytest.mark.parametrize("step", [AGAIN, CLEAN, SLOW])
@pytest.mark.parametrize("tries", [64, 1024, 1025, 100_000])
def test_a_wait_stays_a_wait_after_any_number_of_tries(step: Step, tries: int) -> None:
    assert LONGEST_WAIT_S[step] / 2 <= wait_s(step, tries) <= LONGEST_WAIT_S[step]


# --- the climb --------------------------------------------------------------------------------------


class InlineGate:
    """A `Gate` without threads: a command takes `COMMAND_S` of trio's clock."""

    in_flight_since: float | None = None
    duty = 0.0

    def __init__(self) -> None:
        self.pace = Pace(1.0)
        self.pace.expected_s = COMMAND_S
        self._one = trio.Lock()
        self.learnt = 0

    async def ready(self) -> None:
        async with self._one:
            pass

    async def run(
        self, command: Callable[[], T], *, learn: bool = False, gives_way: bool = False
    ) -> T:
        async with self._one:
            await trio.sleep(COMMAND_S)
            result = command()
            self.learnt += learn
            return result

    async def close(self) -> None:
        await self._one.acquire()


class FakeChip:
    """An open connection of a `ScriptedTpm`."""

    def __init__(self, tpm: ScriptedTpm) -> None:
        self._tpm = tpm
        self.closed = False

    def activate_credential(self, credential: bytes, secret: bytes) -> bytes:
        self._tpm.command("activate")
        return b"secret"

    def close(self) -> None:
        self.closed = True


class ScriptedTpm:
    """A `TpmOpener` and what is behind it: commands fail as a test says, and are noted with their time.

    Attributes:
        errors: raised by the next commands, first to last.
        always: raised by every command, where set.
        reopening: raised by the next attempts to open again.
    """

    def __init__(self) -> None:
        self.soft = SoftTpm()
        self.ak = self.soft.ak
        self.identity = HostIdentity(
            ak_public=self.soft.ak_public,
            ek_public=b"",
            ek_cert=None,
            host_uuid=HOST_UUID,
            software=True,
        )
        self.errors: list[TpmError] = []
        self.always: TpmError | None = None
        self.reopening: list[HostError] = []
        self.reopening_always: HostError | None = None
        self.noted: list[tuple[str, float]] = []
        self.current = FakeChip(self)

    def command(self, name: str) -> None:
        self.noted.append((name, trio.current_time()))
        if self.errors:
            raise self.errors.pop(0)
        if self.always is not None:
            raise self.always

    def reopen(self) -> chip.Chip:
        assert self.current.closed, "two connections at once"
        self.noted.append(("reopen", trio.current_time()))
        if self.reopening:
            raise self.reopening.pop(0)
        if self.reopening_always is not None:
            raise self.reopening_always
        self.current = FakeChip(self)
        return cast(chip.Chip, self.current)

    def quote(self, opened: FakeChip, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        assert opened is self.current
        assert not opened.closed
        self.command("quote")
        return self.soft.quote(qualifying, bank, mask)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.noted]

    def times(self, name: str) -> list[float]:
        return [when for noted, when in self.noted if noted == name]


class Bench:
    """A quoter over a scripted TPM; a test that uses it takes the mock clock too."""

    def __init__(self) -> None:
        self.tpm = ScriptedTpm()
        self.gate = InlineGate()
        self.metrics = Metrics()
        self.quoter = EsysQuoter(
            cast(TpmOpener, self.tpm),
            cast(chip.Chip, self.tpm.current),
            cast(Gate, self.gate),
            self.metrics,
        )

    async def quote(self) -> Quote:
        return await self.quoter.quote(QUALIFYING, HashAlg.SHA256, 1)

    @property
    def counted(self) -> dict[tuple[str, str], int]:
        return errors_counted(self.metrics)

    def circuit_is_open(self) -> bool:
        is_open = self.quoter.state.trouble is not None
        assert sample(self.metrics, "tpm_circuit_open") == is_open
        return is_open


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.quoter.run)
        await trio.testing.wait_all_tasks_blocked()
        yield made
        nursery.cancel_scope.cancel()


def codes_of(step: Step) -> list[int]:
    return [code for code, (_, its) in TABLE.items() if its is step]


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("code", codes_of(AGAIN), ids=hex)
async def test_the_same_command_again(
    autojump_clock: trio.testing.MockClock, bench: Bench, code: int, times: int
) -> None:
    bench.tpm.errors = [error(code)] * times
    await bench.quote()
    assert bench.tpm.names == ["quote"] * (times + 1)
    assert bench.counted == {(TABLE[code][0], "again"): times}
    assert not bench.circuit_is_open()
    check_waits(bench, AGAIN)


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("code", [0, *codes_of(CLEAN), *SOFTWARE.values()], ids=hex)
async def test_open_anew_and_again(
    autojump_clock: trio.testing.MockClock, bench: Bench, code: int, times: int
) -> None:
    bench.tpm.errors = [error(code)] * times
    await bench.quote()
    assert bench.tpm.names == ["quote", *["reopen", "quote"] * times]
    assert bench.counted == {(name_of(code), "clean"): times}
    assert not bench.circuit_is_open()
    check_waits(bench, CLEAN)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("code", codes_of(SLOW), ids=hex)
async def test_again_and_slower(
    autojump_clock: trio.testing.MockClock, bench: Bench, code: int, times: int
) -> None:
    bench.tpm.errors = [error(code)] * times
    await bench.quote()
    assert bench.tpm.names == ["quote"] * (times + 1)
    assert bench.counted == {(TABLE[code][0], "slow"): times}
    check_waits(bench, SLOW)


def check_waits(bench: Bench, step: Step) -> None:
    """Between two tries lies the step's wait, during which the gate is free."""
    begins = bench.tpm.times("quote")
    for number, (one, following) in enumerate(itertools.pairwise(begins)):
        longest = min(LONGEST_WAIT_S[step], FIRST_WAIT_S[step] * 2**number)
        assert longest / 2 - 1e-6 <= following - one - COMMAND_S <= longest + 1e-6


async def test_one_climb_takes_every_kind_of_step(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    bench.tpm.errors = [error(code) for code in (0x922, 0x903, 0x920, 0xA000A, 0x90A)]
    await bench.quote()
    assert bench.tpm.names == [
        *("quote", "quote", "reopen", "quote", "quote", "reopen", "quote", "quote")
    ]
    assert bench.counted == {
        ("RETRY", "again"): 1,
        ("SESSION_MEMORY", "clean"): 1,
        ("NV_RATE", "slow"): 1,
        ("IO", "clean"): 1,
        ("TESTING", "again"): 1,
    }


async def test_only_a_first_try_is_learnt_from(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    """The time of a quote that had to open the connection first is not a quote's."""
    bench.tpm.errors = [error(0xA000A)]
    await bench.quote()
    assert bench.gate.learnt == 0
    await bench.quote()
    assert bench.gate.learnt == 1


@pytest.mark.parametrize("code", codes_of(FATAL), ids=hex)
async def test_fatal_fails_at_once_and_opens_the_circuit(
    autojump_clock: trio.testing.MockClock, bench: Bench, code: int
) -> None:
    bench.tpm.errors = [error(code)]
    with pytest.raises(QuoteError) as caught:
        await bench.quote()
    assert caught.value.retry_after_s is not None
    assert bench.tpm.names == ["quote"]  # no retry
    assert bench.counted == {(TABLE[code][0], "fatal"): 1}
    assert bench.circuit_is_open()


async def test_an_open_circuit_keeps_everybody_from_the_chip(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    bench.tpm.always = error(0x101)
    with pytest.raises(QuoteError):
        await bench.quote()
    asked = len(bench.tpm.noted)
    begin = trio.current_time()
    for _ in range(100):
        with pytest.raises(QuoteError) as caught:
            await bench.quote()
        assert caught.value.retry_after_s is not None
        with pytest.raises(QuoteError):
            await bench.quoter.activate_credential(b"", b"")
        await bench.quoter.ready()
    assert trio.current_time() == begin
    assert len(bench.tpm.noted) == asked


async def test_half_open_a_probe_at_a_time_until_one_succeeds(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    """And nobody else is let in meanwhile."""
    bench.tpm.always = error(0x101)
    with pytest.raises(QuoteError):
        await bench.quote()
    begin = trio.current_time()
    while trio.current_time() < begin + 10:
        with pytest.raises(QuoteError):
            await bench.quote()
        await trio.sleep(0.01)
        assert bench.circuit_is_open()
    probes = bench.tpm.times("reopen")
    assert 8 <= len(probes) <= 10
    assert all(b - a >= PROBE_S for a, b in itertools.pairwise(probes))
    bench.tpm.always = None
    await trio.sleep(PROBE_S + 2 * COMMAND_S)
    assert not bench.circuit_is_open()
    assert bench.tpm.names[-2:] == ["reopen", "quote"]  # the probe quotes before it is believed
    await bench.quote()
    assert bench.tpm.names[-1] == "quote"


async def test_a_probe_that_opens_but_does_not_quote_does_not_close_the_circuit(
    autojump_clock: trio.testing.MockClock,
    bench: Bench,
) -> None:
    bench.tpm.errors = [error(0x101), error(0x922), error(0xA000A), error(0x921)]
    with pytest.raises(QuoteError):
        await bench.quote()
    for _ in range(3):
        await trio.sleep(PROBE_S + 2 * COMMAND_S)
        assert bench.circuit_is_open()
    await trio.sleep(PROBE_S + 2 * COMMAND_S)
    assert not bench.circuit_is_open()


async def test_the_circuit_opens_and_closes_again_and_again(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    for _ in range(5):
        bench.tpm.errors = [error(0x101)]
        with pytest.raises(QuoteError):
            await bench.quote()
        assert bench.circuit_is_open()
        await trio.sleep(PROBE_S + 2 * COMMAND_S)
        assert not bench.circuit_is_open()
        await bench.quote()


async def test_who_waits_on_the_ladder_learns_of_an_open_circuit(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    """One climbs slowly; another meets a fatal code; the first does not go on."""
    bench.tpm.errors = [error(0x920), error(0x101)]
    failed: list[float] = []
    begin = trio.current_time()

    async def climb() -> None:
        with pytest.raises(QuoteError):
            await bench.quote()
        failed.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(climb)
        await trio.sleep(COMMAND_S + 0.001)
        with pytest.raises(QuoteError):
            await bench.quote()
    assert bench.tpm.names == ["quote", "quote"]
    assert failed[0] - begin <= LONGEST_WAIT_S[SLOW]


async def test_a_credential_that_is_refused_does_not_open_the_circuit(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    """Any registrar may send one."""
    for code in (0x084, 0x09F, 0x0A2):
        bench.tpm.errors = [error(code)]
        with pytest.raises(QuoteError):
            await bench.quoter.activate_credential(b"", b"")
        assert not bench.circuit_is_open()
    bench.tpm.errors = [error(0x903), error(0x922)]
    assert await bench.quoter.activate_credential(b"", b"") == b"secret"
    await bench.quote()


# --- opening again ----------------------------------------------------------------------------------


async def test_a_tpm_that_cannot_be_opened_opens_the_circuit(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    bench.tpm.errors = [error(0xA000A)]
    bench.tpm.reopening_always = TpmError("cannot open the TPM: nobody there", code=0xA000A)
    with pytest.raises(QuoteError):
        await bench.quote()
    assert bench.circuit_is_open()
    await trio.sleep(10)
    assert bench.circuit_is_open()
    bench.tpm.reopening_always = None
    await trio.sleep(PROBE_S + 2 * COMMAND_S)
    assert not bench.circuit_is_open()
    await bench.quote()


@pytest.mark.parametrize("code", [0x922, 0x902, 0x904, 0x923], ids=hex)
async def test_a_code_that_passes_while_the_tpm_is_opened_anew_is_climbed_too(
    autojump_clock: trio.testing.MockClock, bench: Bench, code: int
) -> None:
    """ReadPublic meets the same busy chip as the quote did: no reason to refuse anybody."""
    bench.tpm.errors = [error(0x902)]
    bench.tpm.reopening = [TpmError("looking at handle 0x81010001: something", code=code)] * 3
    await bench.quote()
    assert not bench.circuit_is_open()
    assert bench.counted[TABLE[code]] >= 3 if False else True
    name, step = TABLE[code]
    expected = 4 if (name, step) == ("OBJECT_MEMORY", CLEAN) else 3
    assert bench.counted[name, step.value] == expected


async def test_another_ak_is_not_served_and_said_loudly(
    autojump_clock: trio.testing.MockClock, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.tpm.errors = [error(0xA000A)]
    bench.tpm.reopening_always = AkChangedError("the AK was 000baa and now is 000bbb")
    with pytest.raises(QuoteError) as caught:
        await bench.quote()
    assert "000bbb" not in str(caught.value)  # no business of the tenants
    assert bench.circuit_is_open()
    for _ in range(3):  # at once, and at every probe
        assert {r.levelname for r in caplog.records if "000bbb" in r.message} == {"CRITICAL"}
        caplog.clear()
        await trio.sleep(PROBE_S + 2 * COMMAND_S)
        assert bench.circuit_is_open()
    assert bench.tpm.names.count("quote") == 1
    bench.tpm.reopening_always = None  # the right chip is back
    await trio.sleep(PROBE_S + 2 * COMMAND_S)
    assert not bench.circuit_is_open()


# --- inside the deadline of waiting requests --------------------------------------------------------


@pytest.mark.parametrize("deadline_s", [0.2, 3.0, 30.0])
@pytest.mark.parametrize(
    "code", [0, 0xA000A, *codes_of(AGAIN), *codes_of(CLEAN), *codes_of(SLOW)], ids=hex
)
async def test_a_climb_ends_with_its_callers_deadline(
    autojump_clock: trio.testing.MockClock, bench: Bench, code: int, deadline_s: float
) -> None:
    bench.tpm.always = error(code)
    begin = trio.current_time()
    with trio.move_on_after(deadline_s) as scope:
        await bench.quote()
    assert scope.cancelled_caught
    assert trio.current_time() - begin == pytest.approx(deadline_s, abs=1e-6)
    asked = len(bench.tpm.noted)
    (counted,) = bench.counted.values()
    assert counted == len(bench.tpm.times("quote"))
    await trio.sleep(60)
    assert len(bench.tpm.noted) == asked  # nobody goes on for who has gone
    bench.tpm.always = None
    await bench.quote()


async def test_a_chip_that_is_busy_for_ten_minutes_is_waited_for(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    """As long as a caller has patience: that is the longest `timeout_ms`."""
    bench.tpm.always = error(0x922)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.quote)
        await trio.sleep(600)
        bench.tpm.always = None
        with trio.fail_after(1):
            while nursery.child_tasks:  # noqa: ASYNC110
                await trio.sleep(0.1)
    assert len(bench.tpm.times("quote")) > 1024


async def inline(function: Callable[..., Any], *args: Any) -> Any:
    """Instead of a worker thread, which the mock clock does not see."""
    await trio.lowlevel.checkpoint()
    return function(*args)


class Tenants:
    """Submit requests and note what came, and when."""

    def __init__(self, batcher: Batcher, nursery: trio.Nursery) -> None:
        self._batcher = batcher
        self._nursery = nursery
        self.answers: dict[str, Answer | ProviderProxyError] = {}
        self.times: dict[str, float] = {}

    async def _ask(self, name: str, timeout_s: float, mask: int) -> None:
        nonce = Nonce(f"nonce-{name}".ljust(16, "0").encode())
        request = QuoteRequest(nonce=nonce, mask=PcrMask(mask))
        try:
            self.answers[name] = await self._batcher.submit(
                request, Tenant(name=name, pcr_allow=0xFFFFFF), timeout_s=timeout_s
            )
        except ProviderProxyError as exc:
            self.answers[name] = exc
        self.times[name] = trio.current_time()

    def ask(self, names: Iterable[str], timeout_s: float, mask: int = 1) -> None:
        for name in names:
            self._nursery.start_soon(functools.partial(self._ask, name, timeout_s, mask))


@asynccontextmanager
async def batching(bench: Bench) -> AsyncIterator[Tenants]:
    batcher = Batcher(
        bench.quoter,
        BatchSettings(isolate_mask=ISOLATED, window_s=0.05),
        bench.metrics,
        in_worker=inline,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batcher.run)
        yield Tenants(batcher, nursery)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("code", [0xA000A, 0x922, 0x902, 0x920], ids=hex)
async def test_a_batch_ends_with_its_last_deadline(
    autojump_clock: trio.testing.MockClock, bench: Bench, code: int
) -> None:
    bench.tpm.always = error(code)
    async with batching(bench) as tenants:
        tenants.ask("ab", timeout_s=5)
        await trio.sleep(4.99)
        assert not tenants.answers
        await trio.sleep(0.02)
        assert [type(answer) for answer in tenants.answers.values()] == [DeadlineError] * 2
        bench.tpm.always = None
        tenants.ask("cd", timeout_s=5)  # the next batch has a chip that is well
        await trio.sleep(1)
        assert isinstance(tenants.answers["c"], Answer)
        assert isinstance(tenants.answers["d"], Answer)


async def test_a_fatal_code_reaches_a_whole_batch_at_once_and_the_next_ones(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    bench.tpm.always = error(0x101)
    async with batching(bench) as tenants:
        begin = trio.current_time()
        tenants.ask("abc", timeout_s=30)
        await trio.sleep(0.2)
        tenants.ask("de", timeout_s=30)
        await trio.sleep(0.001)
        for name in "abcde":
            refused = tenants.answers[name]
            assert isinstance(refused, QuoteError)
            assert refused.status == 503
            assert refused.retry_after_s is not None
            assert refused.retry_after_s >= 1
        assert tenants.times["a"] - begin < 0.2
        bench.tpm.always = None
        await trio.sleep(PROBE_S + 2 * COMMAND_S)
        tenants.ask("f", timeout_s=30)
        await trio.sleep(0.2)
        assert isinstance(tenants.answers["f"], Answer)


# --- what was learnt is told ------------------------------------------------------------------------


@pytest.mark.parametrize("quote_s", [0.3, 2.0])
@pytest.mark.parametrize("lines", [1, 3])
async def test_estimate_and_retry_after_follow_the_learnt_time(
    autojump_clock: trio.testing.MockClock, bench: Bench, quote_s: float, lines: int
) -> None:
    """A quote and its rest for each line that waits; spread, so that not all come back at once."""
    bench.gate.pace = Pace(0.25)  # rests three times as long as it quotes
    bench.gate.pace.expected_s = quote_s
    turn_s = 4 * quote_s
    async with batching(bench) as tenants:
        for number in range(lines):
            tenants.ask(f"{number}", timeout_s=1000, mask=1 << (10 + number))  # a line each
        await trio.sleep(0.01)
        estimate = 0.05 + quote_s + lines * turn_s
        names = [f"x{number}" for number in range(20)]
        tenants.ask(names, timeout_s=estimate - 0.01)
        await trio.sleep(0.01)
        waits = []
        for name in names:
            refused = tenants.answers[name]
            assert isinstance(refused, OverloadedError)
            assert f"about {estimate:.1f} s" in str(refused)
            assert refused.retry_after_s is not None
            waits.append(refused.retry_after_s)
        due = max(1.0, lines * turn_s)
        assert all(due <= wait <= 1.5 * due for wait in waits)
        assert max(waits) - min(waits) > due / 10
        tenants.ask("y", timeout_s=estimate + 0.01)
        await trio.sleep(0.01)
        assert "y" not in tenants.answers  # it has a place
