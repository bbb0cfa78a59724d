"""The soak: the real daemon over a real swtpm, every fault there is in random order, the swtpm killed
now and then, and dozens of tenants on real sockets. Whatever happens to the chip, each request ends in
evidence that verifies or in a typed refusal; and soon after the last fault everybody is served again.

SOAK_SECONDS makes it longer, SOAK_SEED repeats the same schedule (threads keep their own time)."""

from __future__ import annotations

import os
import random
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio
from helpers import (
    LIMIT_S,
    Asker,
    Reply,
    Wire,
    children_of,
    connect,
    get_bytes,
    quote_target,
    trusted_ak,
)
from tpm_helpers import (
    CC_PCR_READ,
    CC_QUOTE,
    CC_READ_PUBLIC,
    SERVICE_BACK_S,
    Hold,
    check_refusal,
    daemon_over_context,
    is_ready,
    plain_config,
    sample,
)

from provider_proxy.errors import VerificationError
from provider_proxy.evidence.model import AttestationKey
from provider_proxy.evidence.verify import Challenge
from provider_proxy.host.metrics import Metrics
from provider_proxy.testing.disturb import Action
from provider_proxy.testing.faulty import FaultyContext

SECONDS = float(os.environ.get("SOAK_SECONDS", "8"))
RECOVERY_S = 2.0  # of which so much is left for the end
TENANTS = 36
MASKS = (0x1, 0x3, 0xFF, 0x10001, 0x800000, 0x4080, 0xFFFBFF)  # PCRs alone, isolated, all but 10
TIMEOUTS_MS = (150, 400, 1500, 4000)
GRACE_S = 5.0  # an answer comes at its deadline; a loaded machine gets this much more
KNOWN = (429, 503, 504)  # what a tenant may meet here; 502 would be evidence that we made up
HANG_UP = 0.04  # share of requests whose client does not wait
PAUSE_S = 0.1

AGAIN = (0x922, 0x90A, 0x908, 0x909)
CLEAN = (0x901, 0x902, 0x903, 0x904, 0x905, 0x906, 0xB0903)
SLOW = (0x920, 0x923)
FATAL = (0x101, 0x100, 0x921, 0x9A2, 0x18B)


# --- what happens to the chip -----------------------------------------------------------------------


class Weather:
    """A plan that a schedule arms: what happens to the next commands, whichever thread sends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[Action] = []
        self._only = 0  # a command's code; 0 for any
        self._stale = False
        self._always: Action | None = None
        self._answers: dict[tuple[int, bytes], bytes] = {}
        self.held: list[threading.Event] = []

    def __call__(self, command: int) -> Action | None:
        with self._lock:
            if self._armed and self._only in (0, command):
                action = self._armed.pop()
                if not self._stale:
                    return action
                return Action(garble=partial(self._old, command))
            if self._always is not None:
                return self._always
        return Action(garble=partial(self._remember, command))

    def _remember(self, command: int, answer: bytes) -> bytes:
        self._answers[command, pcr_digest(command, answer)] = answer
        return answer

    def _old(self, command: int, answer: bytes) -> bytes:
        """An earlier answer; to a quote one over the same PCRs, in which the nonce alone is wrong."""
        return self._answers.get((command, pcr_digest(command, answer)), answer)

    def arm(self, actions: list[Action], *, only: int = 0, stale: bool = False) -> None:
        with self._lock:
            self._armed, self._only, self._stale = list(actions), only, stale
        self.held += [action.hold for action in actions if action.hold is not None]

    @property
    def pending(self) -> int:
        """How much of what was armed has not happened yet."""
        with self._lock:
            return len(self._armed)

    def storm(self) -> None:
        """Until `clear` the chip fails every command."""
        self._always = Action(code=0x101)

    def clear(self) -> None:
        """No fault any more: hangs end, what was armed is forgotten."""
        self._always = None
        self.arm([])
        for event in self.held:
            event.set()


def pcr_digest(command: int, answer: bytes) -> bytes:
    """The end of a quote's TPM2B_ATTEST, which follows header and parameterSize; else nothing."""
    if command != CC_QUOTE:
        return b""
    end = 16 + int.from_bytes(answer[14:16], "big")
    return answer[end - 32 : end]


def cut(answer: bytes, share: float) -> bytes:
    return answer[: int(len(answer) * share)]


def flip(answer: bytes, places: list[float]) -> bytes:
    data = bytearray(answer)
    for place in places:
        data[int(place * len(data))] ^= 1 << int(place * 1e6) % 8
    return bytes(data)


def replaced(_answer: bytes, noise: bytes) -> bytes:
    return noise


def garbled(garble: Callable[[bytes], bytes]) -> Action:
    return Action(garble=garble)


KINDS: dict[str, Callable[[random.Random], list[Action]]] = {
    "delay": lambda dice: [Action(delay_s=dice.uniform(0.02, 0.3))] * dice.randint(1, 4),
    "again": lambda dice: [Action(code=dice.choice(AGAIN)) for _ in range(dice.randint(1, 12))],
    "clean": lambda dice: [Action(code=dice.choice(CLEAN)) for _ in range(dice.randint(1, 3))],
    "slow": lambda dice: [Action(code=dice.choice(SLOW))],
    "fatal": lambda dice: [Action(code=dice.choice(FATAL))],
    "short": lambda dice: [garbled(partial(cut, share=dice.random()))],
    "flipped": lambda dice: [
        garbled(partial(flip, places=[dice.random() for _ in range(dice.randint(1, 3))]))
    ],
    "noise": lambda dice: [garbled(partial(replaced, noise=dice.randbytes(99)))],
    "stale": lambda dice: [Action()] * dice.randint(1, 4),
    "drop": lambda dice: [Action(drop=True)],
    "hang": lambda dice: [Action(hold=Hold())],
    "kill": lambda dice: [],
}
DECK = (*KINDS, "delay", "again", "clean", "stale", "flipped", "drop", "kill")
TARGETS = (0, 0, CC_QUOTE, CC_QUOTE, CC_PCR_READ, CC_READ_PUBLIC)


def swtpms() -> list[int]:
    """The embedded one, when it runs."""
    found = []
    for pid in children_of(os.getpid()):
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue
        if name == "swtpm":
            found.append(pid)
    return found


@dataclass(slots=True, kw_only=True)
class Schedule:
    """All faults in random order, again and again, until the time is over; each at least once.

    Attributes:
        done: how often each kind has happened.
    """

    dice: random.Random
    weather: Weather
    metrics: Metrics
    done: Counter[str] = field(default_factory=Counter)

    async def run(self, end: float) -> None:
        while trio.current_time() < end or set(self.done) != set(KINDS):
            deck = list(DECK)
            self.dice.shuffle(deck)
            for kind in deck:
                if trio.current_time() > end and kind in self.done:
                    continue
                await self._play(kind)
        # The last one is as bad as can be, so that there is something to come back from.
        self.weather.storm()
        await self._wait(lambda: bool(sample(self.metrics, "tpm_circuit_open")), LIMIT_S)
        self._kill()
        self.weather.clear()

    def _kill(self) -> None:
        for pid in swtpms():
            os.kill(pid, signal.SIGKILL)

    async def _play(self, kind: str) -> None:
        dice, weather = self.dice, self.weather
        if dice.random() < 0.7:  # else it meets a chip that is out of order already
            await self._wait(lambda: not sample(self.metrics, "tpm_circuit_open"), 3.0)
        if kind == "kill":
            self._kill()
            self.done[kind] += 1
        else:
            actions = KINDS[kind](dice)
            only = CC_QUOTE if kind == "stale" else dice.choice(TARGETS)
            weather.arm(actions, only=only, stale=kind == "stale")
            await self._wait(lambda: not weather.pending, 0.4)
            if weather.pending == len(actions):  # such a command does not come: any, then
                weather.arm(actions, stale=kind == "stale")
                await self._wait(lambda: not weather.pending, 2.0)
            if weather.pending < len(actions):
                self.done[kind] += 1
            for action in actions:
                if action.hold is not None:
                    await trio.sleep(dice.uniform(0.05, 0.7))
                    action.hold.set()
            weather.arm([])
        await trio.sleep(dice.uniform(0.0, 0.15))

    async def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        with trio.move_on_after(seconds):
            while not condition():  # noqa: ASYNC110  # another thread's doing
                await trio.sleep(0.005)


# --- the tenants ------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Books:
    """What all tenants together met.

    Attributes:
        asked: requests that were sent; each ends in `answered` or `hung_up`.
        calm_from: when the last fault ended; None before.
        back: for each tenant, how long after that it had its first evidence.
    """

    asked: int = 0
    answered: Counter[int] = field(default_factory=Counter)
    hung_up: int = 0
    calm_from: float | None = None
    back: dict[int, float] = field(default_factory=dict)

    def text(self) -> str:
        answers = ", ".join(f"{n} x {status}" for status, n in sorted(self.answered.items()))
        return f"{self.asked} asked, {answers}, {self.hung_up} hung up"


class Tenant:
    """Asks again and again on a connection of its own, and takes nothing for granted."""

    def __init__(
        self, number: int, address: str, ak: AttestationKey, directories: Books, dice: random.Random
    ) -> None:
        self._number = number
        self._address = address
        self._asker = Asker(ak)
        self._directories = directories
        self._dice = dice

    async def run(self) -> None:
        """Until it has been served after the last fault."""
        while self._number not in self._directories.back:
            async with connect(self._address) as wire:
                if await self._converse(wire):
                    await self._part(wire)

    async def _converse(self, wire: Wire) -> bool:
        """Ask for a while on one connection; False where we hung up on the proxy."""
        for _ in range(self._dice.randint(5, 30)):
            if self._number in self._directories.back:
                break
            began_calm = self._directories.calm_from is not None
            timeout_ms = self._dice.choice(TIMEOUTS_MS)
            challenge = self._asker.challenge(self._dice.choice(MASKS), timeout_ms=timeout_ms)
            self._directories.asked += 1
            await wire.send(get_bytes(quote_target(challenge)))
            if self._dice.random() < HANG_UP:
                await trio.sleep(self._dice.uniform(0.0, 0.05))
                self._directories.hung_up += 1
                return False
            reply = await self._reply(wire, timeout_ms)
            self._judge(reply, challenge)
            if reply.status == 200 and began_calm and self._directories.calm_from is not None:
                self._directories.back[self._number] = (
                    time.monotonic() - self._directories.calm_from
                )
            await trio.sleep(self._dice.uniform(0.0, PAUSE_S))
        return True

    async def _reply(self, wire: Wire, timeout_ms: int) -> Reply:
        with trio.move_on_after(timeout_ms / 1000 + GRACE_S):
            return await wire.reply()
        raise AssertionError(f"a request with a timeout of {timeout_ms} ms hangs")

    def _judge(self, reply: Reply, challenge: Challenge) -> None:
        self._directories.answered[reply.status] += 1
        if reply.status != 200:
            check_refusal(reply, *KNOWN)
            assert not reply.closes
            return
        try:
            self._asker.verify(reply.body, challenge)
        except VerificationError as exc:
            raise AssertionError(f"evidence that does not verify: {exc!r}") from exc

    async def _part(self, wire: Wire) -> None:
        """Say that no more comes; what the proxy still sends would be an answer too many."""
        assert isinstance(wire.stream, trio.SocketStream)
        await wire.stream.send_eof()
        with trio.fail_after(GRACE_S):
            assert await wire.rest() == b"", "an answer that nobody asked for"


# --- together ---------------------------------------------------------------------------------------


@pytest.mark.real
async def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("SOAK_SEED") or secrets.randbits(32))
    with capsys.disabled():
        print(f"\nsoak: SOAK_SEED={seed} SOAK_SECONDS={SECONDS:g}", flush=True)
    directories = Books()
    try:
        done = await soak(tmp_path, seed, directories)
    except BaseException as exc:
        exc.add_note(f"SOAK_SEED={seed}: {directories.text()}")
        raise
    slowest = max(directories.back.values())
    with capsys.disabled():
        faults = ", ".join(f"{n} x {kind}" for kind, n in sorted(done.items()))
        print(f"soak: {directories.text()}; faults: {faults}; all back after {slowest:.2f} s")
    assert sum(directories.answered.values()) + directories.hung_up == directories.asked
    assert directories.answered[200] >= TENANTS
    assert directories.answered[503] > 0, "no fault was met"
    assert slowest < SERVICE_BACK_S, f"SOAK_SEED={seed}"


async def soak(folder: Path, seed: int, directories: Books) -> Counter[str]:
    """Fair weather, foul weather, fair weather; what happened to the chip."""
    weather = Weather()
    metrics: list[Metrics] = []
    config = plain_config(folder, max_duty=0.5, window_ms=5.0)
    open_context = partial(FaultyContext, plan=weather)
    with trio.fail_after(SECONDS + 3 * LIMIT_S):
        async with daemon_over_context(config, open_context, metrics=metrics) as started:
            address = started.addresses[0]
            ak = await trusted_ak(address)
            schedule = Schedule(dice=random.Random(seed), weather=weather, metrics=metrics[0])
            try:
                async with trio.open_nursery() as nursery:
                    for number in range(TENANTS):
                        dice = random.Random(f"{seed}/{number}")
                        nursery.start_soon(Tenant(number, address, ak, directories, dice).run)
                    await schedule.run(trio.current_time() + SECONDS - RECOVERY_S)
                    directories.calm_from = time.monotonic()
            finally:
                weather.clear()
            assert await is_ready(started)
            assert sample(metrics[0], "selfcheck_failures_total") == 0
            assert sample(metrics[0], "queue") == 0
    return schedule.done
