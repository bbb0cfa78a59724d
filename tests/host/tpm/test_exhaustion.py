"""A raw TPM that others use too, or use up: every session taken, every object slot taken, and programs
that want their share of a chip that the proxy keeps busy."""

from __future__ import annotations

import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from helpers import LIMIT_S, until
from tpm2_pytss import ESAPI
from tpm2_pytss.types import TPM2B_NAME, TPM2B_PUBLIC
from tpm2_pytss.utils import make_credential as make_credential_for
from tpm_helpers import (
    CC_ACTIVATE_CREDENTIAL,
    CC_FLUSH_CONTEXT,
    CC_PCR_READ,
    CC_POLICY_SECRET,
    CC_QUOTE,
    CC_START_AUTH_SESSION,
    FIRST_LOADED_SESSION,
    FIRST_SAVED_SESSION,
    FIRST_TRANSIENT,
    Faults,
    Hold,
    errors_counted,
    flush,
    handles,
    open_quoter,
    quote_once,
    raw_tpm,
    take_loaded_sessions,
    take_object_slots,
    take_session_handles,
    tool,
)

from provider_proxy.errors import QuoteError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.tpm.chip import close_context, open_context
from provider_proxy.testing.broker import Broker
from provider_proxy.testing.disturb import Action

pytestmark = pytest.mark.real

ALL = 0xFFFFFF
IN_USE = (FIRST_LOADED_SESSION, FIRST_SAVED_SESSION, FIRST_TRANSIENT)


class Shared:
    """A raw TPM, a quoter on it, and somebody else on it.

    Attributes:
        faults: what happens to commands of any client.
    """

    def __init__(self, broker: Broker, quoter: EsysQuoter, other: ESAPI, metrics: Metrics) -> None:
        self.tcti = broker.tcti
        self.quoter = quoter
        self.other = other
        self._metrics = metrics
        assert isinstance(broker.plan, Faults)
        self.faults = broker.plan

    def in_use(self) -> list[list[int]]:
        """Loaded sessions, saved sessions, transient objects: everybody's."""
        return [handles(self.other, first) for first in IN_USE]

    def flush_everything(self) -> None:
        for kind in self.in_use():
            for handle in kind:
                flush(self.tcti, handle)

    def counted(self) -> dict[tuple[str, str], int]:
        """The quoter's failures, by code and step."""
        return errors_counted(self._metrics)

    async def until_counted(self, code: str, step: str, count: int) -> None:
        await until(lambda: self.counted().get((code, step), 0) >= count, f"{count} times {code}")

    def credential(self, secret: bytes) -> tuple[bytes, bytes]:
        """What a registrar sends: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""
        public, _ = TPM2B_PUBLIC.unmarshal(self.quoter.identity.ek_public)
        blob, wrapped = make_credential_for(public, secret, TPM2B_NAME(self.quoter.ak.name))
        return blob.marshal(), wrapped.marshal()

    async def activate(self, secret: bytes) -> None:
        """A registration's round, which has to work."""
        with trio.fail_after(LIMIT_S):
            assert await self.quoter.activate_credential(*self.credential(secret)) == secret


@asynccontextmanager
async def shared(
    broker: Broker, state_dir: Path, *, algorithm: str = "ecc"
) -> AsyncIterator[Shared]:
    metrics = Metrics()
    other = open_context(broker.tcti)
    try:
        async with open_quoter(
            broker.tcti, state_dir, metrics=metrics, ak_algorithm=algorithm
        ) as quoter:
            made = Shared(broker, quoter, other, metrics)
            assert made.in_use() == [[], [], []]
            yield made
            made.faults.clear()
            made.flush_everything()
            assert made.in_use() == [[], [], []]
    finally:
        close_context(other)


@pytest.fixture(scope="module")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Broker, Path]]:
    """One chip for all; each test leaves it as it was. And where its AK's authValue is."""
    folder = tmp_path_factory.mktemp("chip")
    with raw_tpm(folder / "chip", Faults()) as broker:
        yield broker, folder / "s"


@pytest.fixture
async def at(chip: tuple[Broker, Path]) -> AsyncIterator[Shared]:
    async with shared(*chip) as made:
        yield made


# --- quotes -----------------------------------------------------------------------------------------


async def test_a_quote_is_two_kinds_of_command_and_leaves_nothing(at: Shared) -> None:
    """No session is started, no key loaded, nothing flushed."""
    del at.faults.seen[:]
    await quote_once(at.quoter, mask=ALL)
    assert at.faults.seen == [CC_PCR_READ] * 3 + [CC_QUOTE]
    assert at.in_use() == [[], [], []]


async def test_quotes_where_no_session_can_be_loaded(at: Shared) -> None:
    taken = take_loaded_sessions(at.other)
    assert len(taken) >= 3
    before = at.in_use()
    for _ in range(5):
        await quote_once(at.quoter, mask=ALL)
    assert at.in_use() == before
    assert at.counted() == {}


async def test_quotes_where_no_session_handle_is_left(at: Shared) -> None:
    """The "global session exhaustion": 64 sessions, of which most are put aside."""
    assert take_session_handles(at.other) >= 64 - 3
    before = at.in_use()
    assert sum(map(len, before)) >= 64
    for _ in range(5):
        await quote_once(at.quoter, mask=ALL)
    assert at.in_use() == before
    assert at.counted() == {}


async def test_a_quote_needs_one_object_slot_and_no_more(at: Shared) -> None:
    slots = take_object_slots(at.other)
    at.other.flush_context(slots.pop())
    before = at.in_use()
    await quote_once(at.quoter, mask=ALL)
    assert at.in_use() == before
    assert at.counted() == {}


async def test_a_quote_waits_for_an_object_slot(at: Shared) -> None:
    """The daemon waits, and serves as soon as one is free. No request is refused meanwhile."""
    slots = take_object_slots(at.other)
    before = at.in_use()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(quote_once, at.quoter)
        nursery.start_soon(quote_once, at.quoter)
        await at.until_counted("OBJECT_MEMORY", "clean", 4)
        assert at.quoter.state.trouble is None
        assert len(nursery.child_tasks) == 2
        assert at.in_use() == before
        at.other.flush_context(slots.pop())
    assert set(at.counted()) == {("OBJECT_MEMORY", "clean")}
    assert at.in_use()[2] == before[2][:-1]


async def test_a_quote_that_waits_for_an_object_slot_ends_with_its_deadline(at: Shared) -> None:
    slots = take_object_slots(at.other)
    with trio.move_on_after(0.3) as scope:
        await quote_once(at.quoter)
    assert scope.cancelled_caught
    assert at.quoter.state.trouble is None
    for slot in slots:
        at.other.flush_context(slot)
    await quote_once(at.quoter)
    assert at.in_use() == [[], [], []]


# --- activations ------------------------------------------------------------------------------------


async def activate_with_tools(at: Shared, folder: Path) -> None:
    """tpm2_makecredential, as a registrar or a tenant would use it; it needs no TPM."""
    secret = secrets.token_bytes(32)
    put(folder / "ek", at.quoter.identity.ek_public)
    put(folder / "secret", secret)
    tool(
        "none",
        *("tpm2_makecredential", "-Q", "-T", "none", "-u", "ek", "-s", "secret"),
        *("-n", at.quoter.ak.name.hex(), "-o", "credential"),
        cwd=folder,
    )
    file = take(folder / "credential")
    assert file[:8] == bytes.fromhex("badcc0de00000001")  # tpm2-tools' magic and version
    end = 10 + int.from_bytes(file[8:10], "big")
    for _ in range(4):  # more often than a TPM has sessions to lose
        with trio.fail_after(LIMIT_S):
            assert await at.quoter.activate_credential(file[8:end], file[end:]) == secret
    assert at.in_use() == [[], [], []]


async def test_a_credential_made_by_tpm2_tools_is_activated(at: Shared, tmp_path: Path) -> None:
    await activate_with_tools(at, tmp_path)


async def test_the_same_with_an_rsa_ak(tmp_path: Path) -> None:
    with raw_tpm(tmp_path / "chip", Faults()) as broker:
        async with shared(broker, tmp_path / "s", algorithm="rsa") as at:
            await activate_with_tools(at, tmp_path)


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def take(path: Path) -> bytes:
    return path.read_bytes()


async def test_a_credential_for_another_key_is_refused(at: Shared) -> None:
    """Its secret is wrapped for another AK, or for another EK: the chip says no, and serves on."""
    credential, wrapped = at.credential(b"secret")
    public, _ = TPM2B_PUBLIC.unmarshal(at.quoter.identity.ek_public)
    foreign, its = make_credential_for(public, b"secret", TPM2B_NAME(b"\x00\x0b" + bytes(32)))
    spoilt = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
    for blob, seed in ((foreign.marshal(), its.marshal()), (credential, spoilt), (b"", b"")):
        with trio.fail_after(LIMIT_S), pytest.raises(QuoteError):
            await at.quoter.activate_credential(blob, seed)
        assert at.in_use() == [[], [], []]
        assert at.quoter.state.trouble is None
    await quote_once(at.quoter)


async def test_an_activation_waits_for_a_session(at: Shared) -> None:
    """With backoff, beside quotes that go on, and then it gets its turn."""
    taken = take_loaded_sessions(at.other)
    before = at.in_use()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at.activate, b"the secret")
        await at.until_counted("SESSION_MEMORY", "clean", 3)
        for _ in range(5):
            await quote_once(at.quoter)
        assert nursery.child_tasks
        assert at.in_use() == before
        at.other.flush_context(taken.pop())
    assert set(at.counted()) == {("SESSION_MEMORY", "clean")}
    loaded, *rest = at.in_use()
    assert loaded == before[0][:-1]
    assert rest == before[1:]


async def test_an_activation_waits_for_a_session_handle(at: Shared) -> None:
    """All 64 are in use, 0x905, until somebody lets one go that had been put aside."""
    take_session_handles(at.other)
    _, saved, _ = before = at.in_use()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at.activate, b"the secret")
        await at.until_counted("SESSION_HANDLES", "clean", 3)
        await quote_once(at.quoter)
        assert nursery.child_tasks
        assert at.in_use() == before
        await trio.to_thread.run_sync(flush, at.tcti, saved[0])
    assert set(at.counted()) == {("SESSION_HANDLES", "clean")}
    assert at.in_use() == [before[0], saved[1:], []]


async def test_an_activation_that_gives_up_leaves_no_session(at: Shared) -> None:
    """It waits while others hold them all; its caller goes; the others go: nothing is left."""
    taken = take_loaded_sessions(at.other)
    with trio.move_on_after(0.2) as scope:
        await at.quoter.activate_credential(*at.credential(b"s"))
    assert scope.cancelled_caught
    for session in taken:
        at.other.flush_context(session)
    await quote_once(at.quoter)
    assert at.in_use() == [[], [], []]


STEPS = {
    "start": CC_START_AUTH_SESSION,
    "policy": CC_POLICY_SECRET,
    "activate": CC_ACTIVATE_CREDENTIAL,
}


@pytest.mark.parametrize("step", STEPS)
async def test_an_activation_that_is_cancelled_leaves_no_session(at: Shared, step: str) -> None:
    """Wherever it was: the chip's thread goes on and cleans up."""
    hold = Hold()
    at.faults.next(STEPS[step], Action(hold=hold))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at.quoter.activate_credential, *at.credential(b"s"))
            await until(lambda: at.faults.pending == 0, "the command")
            nursery.cancel_scope.cancel()
        assert at.quoter.state.in_flight_s > 0
    finally:
        hold.set()
    await until(lambda: at.quoter.state.in_flight_s == 0, "the thread's return")
    assert at.in_use() == [[], [], []]
    await at.activate(b"t")


@pytest.mark.parametrize("code", [0x909, 0x902, 0x101])
@pytest.mark.parametrize("step", STEPS)
async def test_an_activation_that_fails_leaves_no_session(at: Shared, step: str, code: int) -> None:
    at.faults.next(STEPS[step], Action(code=code))
    if code == 0x101:
        with pytest.raises(QuoteError):
            await at.quoter.activate_credential(*at.credential(b"s"))
    await at.activate(b"s")
    assert at.in_use() == [[], [], []]


async def test_a_chip_that_is_busy_at_the_flush_keeps_no_session_either(at: Shared) -> None:
    """The session of a failed activation is flushed when the chip takes the command."""
    at.faults.next(CC_ACTIVATE_CREDENTIAL, Action(code=0x101))
    at.faults.next(CC_FLUSH_CONTEXT, *[Action(code=0x909)] * 3)
    with trio.fail_after(LIMIT_S), pytest.raises(QuoteError):
        await at.quoter.activate_credential(*at.credential(b"s"))
    assert at.faults.pending == 0
    assert at.in_use() == [[], [], []]


async def test_an_activation_waits_for_an_object_slot(at: Shared) -> None:
    """Both keys are persistent, and on a raw TPM they still take slots while they are used."""
    slots = take_object_slots(at.other)
    before = at.in_use()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at.activate, b"s")
        await at.until_counted("OBJECT_MEMORY", "clean", 2)
        assert at.in_use() == before
        for slot in slots:
            at.other.flush_context(slot)
    assert at.in_use() == [[], [], []]


# --- others who want the chip too -------------------------------------------------------------------


@pytest.fixture
def busy(chip: tuple[Broker, Path]) -> Iterator[tuple[str, Path]]:
    """Quotes take 30 ms."""
    broker, state_dir = chip
    assert isinstance(broker.plan, Faults)
    broker.plan.always(CC_QUOTE, Action(delay_s=0.03))
    yield broker.tcti, state_dir
    broker.plan.clear()


@pytest.mark.parametrize("duty", [0.5, 1.0])
async def test_another_program_makes_progress_beside_a_saturated_proxy(
    busy: tuple[str, Path], duty: float
) -> None:
    """tpm2-tools in a loop, and quotes without a pause: each run of them ends, and so does each quote."""
    tcti, state_dir = busy
    quotes = 0
    runs = 0
    async with open_quoter(tcti, state_dir, max_duty=duty) as quoter:

        async def saturate() -> None:
            nonlocal quotes
            while True:
                await quoter.quote(b"%032d" % quotes, HashAlg.SHA256, 1)
                quotes += 1

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(saturate)
            await until(lambda: quotes > 0)
            begin = quotes
            with trio.fail_after(LIMIT_S):
                while runs < 6 or quotes - begin < 3:
                    words = (
                        ("tpm2_pcrread", "sha256:0,10")
                        if runs % 2
                        else ("tpm2_getrandom", "--hex", "8")
                    )
                    assert await trio.to_thread.run_sync(tool, tcti, *words)
                    runs += 1
            nursery.cancel_scope.cancel()
    assert runs < 60, "the proxy hardly had a turn"


async def test_the_proxy_makes_progress_beside_a_greedy_program(busy: tuple[str, Path]) -> None:
    """And the other way round: somebody who keeps the chip busy does not stop quotes."""
    tcti, state_dir = busy
    stop = threading.Event()
    rounds = 0

    def greedy() -> None:
        nonlocal rounds
        context = open_context(tcti)
        while not stop.is_set():
            context.get_random(16)
            rounds += 1
        close_context(context)

    thread = threading.Thread(target=greedy)
    async with open_quoter(tcti, state_dir) as quoter:
        thread.start()
        try:
            await until(lambda: rounds > 10)
            for _ in range(5):
                await quote_once(quoter)
        finally:
            stop.set()
            await trio.to_thread.run_sync(thread.join)
    assert rounds > 10
