"""What disturbs a TPM, for tests and benchmarks: plans, the faulty TCTI, the broker. They have to be
right themselves, or what they show of the proxy is worth nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from helpers import LIMIT_S, wait_until
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.TCTILdr import TCTILdr
from tpm_helpers import (
    CC_GET_CAPABILITY,
    FIRST_TRANSIENT,
    Faults,
    Hold,
    Swtpm,
    handles,
    raw_tpm,
    swtpm_at,
    take_object_slots,
    tool,
)

from provider_proxy.errors import TpmError
from provider_proxy.host.tpm.chip import close_context, open_context
from provider_proxy.host.tpm.times import ChipTimes
from provider_proxy.testing.broker import Broker
from provider_proxy.testing.disturb import (
    CC_PCR_EVENT,
    CC_PCR_EXTEND,
    CC_PCR_READ,
    CC_QUOTE,
    CHIP_QUOTE_MS,
    CHIPS,
    TRANSIENT_CODES,
    Action,
    delay_quotes,
    refusal,
    refuse_some,
    slow_down,
    together,
)
from provider_proxy.testing.faulty import FaultyContext, FaultyTcti

CC_GET_RANDOM = 0x17B
GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")
ANSWER = bytes.fromhex("8001000000140000000000080102030405060708")
IO_ERROR = 0xA000A
BAD_SEQUENCE = 0x70007

# --- plans ------------------------------------------------------------------------------------------


def test_a_slow_chip_is_slow_in_quotes_alone() -> None:
    plan = delay_quotes(0.188)
    assert plan(CC_QUOTE) == Action(delay_s=0.188)
    assert [plan(command) for command in range(0x11F, 0x1A0) if command != CC_QUOTE] == [None] * 128


def test_the_first_plan_that_has_something_to_say_says_it() -> None:
    one, two = Action(code=1), Action(code=2)
    plan = together(
        lambda command: one if command == 1 else None, lambda command: two if command < 3 else None
    )
    assert [plan(command) for command in (1, 2, 3)] == [one, two, None]
    assert together()(1) is None


def test_a_share_is_refused_the_same_way_for_the_same_seed() -> None:
    plans = [refuse_some(0.3, seed) for seed in (1, 1, 2)]
    one, same, other = ([plan(CC_QUOTE) for _ in range(2000)] for plan in plans)
    assert one == same
    assert one != other
    codes = Counter(action.code for action in one if action is not None)
    assert set(codes) == set(TRANSIENT_CODES)
    assert 500 < sum(codes.values()) < 700
    assert not any(refuse_some(0.0, 1)(CC_QUOTE) for _ in range(100))
    assert all(refuse_some(1.0, 1, (0x101,))(n) == Action(code=0x101) for n in range(100))


def test_a_refusal_is_a_tpms_answer() -> None:
    assert refusal(0x922) == bytes.fromhex("80010000000a00000922")


def test_chips_have_both_kinds_of_key() -> None:
    makers = {name.partition("-")[0] for name in CHIP_QUOTE_MS}
    assert set(CHIP_QUOTE_MS) == {f"{maker}-{kind}" for maker in makers for kind in ("rsa", "p256")}
    for maker in makers:
        assert 0 < CHIP_QUOTE_MS[f"{maker}-p256"] < CHIP_QUOTE_MS[f"{maker}-rsa"]


def test_a_vendors_chip_is_slow_in_all_commands() -> None:
    plan = slow_down(CHIPS["stm-p256"])
    assert plan(CC_QUOTE) == Action(delay_s=0.049)
    assert plan(CC_PCR_READ) == plan(CC_PCR_EXTEND) == plan(CC_GET_RANDOM) == Action(delay_s=0.006)
    assert set(CHIPS) == set(CHIP_QUOTE_MS)
    times = ChipTimes(quote_s=4, read_s=3, extend_s=2, other_s=1)
    commands = (CC_QUOTE, CC_PCR_READ, CC_PCR_EXTEND, CC_PCR_EVENT, CC_GET_RANDOM)
    actions = [slow_down(times)(command) for command in commands]
    assert [action.delay_s for action in actions if action is not None] == [4, 3, 2, 2, 1]


# --- the faulty TCTI --------------------------------------------------------------------------------


class FakeTcti:
    """The real TCTI's place: notes commands, gives one answer."""

    def __init__(self) -> None:
        self.commands: list[bytes] = []

    def transmit(self, command: bytes) -> None:
        self.commands.append(command)

    def receive(self, *, timeout: int) -> bytes:
        return ANSWER


class Bench:
    def __init__(self) -> None:
        self.inner = FakeTcti()
        self.faults = Faults()
        self.tcti = FaultyTcti(cast(TCTILdr, self.inner), self.faults)

    def run(self, *actions: Action) -> bytes:
        self.faults.next(CC_GET_RANDOM, *actions)
        self.tcti.do_transmit(GET_RANDOM)
        return self.tcti.do_receive(-1)

    def fails(self, *actions: Action) -> int:
        with pytest.raises(TSS2_Exception) as caught:
            self.run(*actions)
        return int(caught.value.rc)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_without_an_action_everything_passes(bench: Bench) -> None:
    assert bench.run() == ANSWER
    assert bench.run(Action()) == ANSWER
    assert bench.inner.commands == [GET_RANDOM] * 2
    assert bench.faults.seen == [CC_GET_RANDOM] * 2


def test_a_code_is_answered_and_the_chip_does_nothing(bench: Bench) -> None:
    assert bench.run(Action(code=0x922)) == refusal(0x922)
    assert bench.inner.commands == []
    assert bench.run() == ANSWER  # the next one is itself again
    assert bench.inner.commands == [GET_RANDOM]


def test_a_garbled_answer_is_of_the_chips_own(bench: Bench) -> None:
    assert bench.run(Action(garble=lambda answer: answer[:-1] + b"?")) == ANSWER[:-1] + b"?"
    assert bench.inner.commands == [GET_RANDOM]


def test_a_broken_connection_stays_broken(bench: Bench) -> None:
    assert bench.fails(Action(drop=True)) == IO_ERROR
    for _ in range(3):
        assert bench.fails() == IO_ERROR
    assert bench.inner.commands == []


def test_a_delay_is_before_the_answer(bench: Bench) -> None:
    begin = time.monotonic()
    assert bench.run(Action(delay_s=0.03)) == ANSWER
    assert time.monotonic() - begin >= 0.03


def test_a_hang_lasts_until_it_is_ended(bench: Bench) -> None:
    hold = Hold()
    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(bench.run(Action(hold=hold))))
    thread.start()
    try:
        wait_until(lambda: bench.inner.commands == [GET_RANDOM], "the command")
        thread.join(0.05)
        assert thread.is_alive()
        assert answers == []
    finally:
        hold.set()
        thread.join(LIMIT_S)
    assert answers == [ANSWER]


@pytest.fixture(scope="module")
def swtpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with swtpm_at(tmp_path_factory.mktemp("swtpm")) as made:
        yield made


@pytest.mark.real
def test_through_esys(swtpm: Swtpm) -> None:
    """Every kind of fault as tpm2-tss tells it, and a good answer after each."""
    faults = Faults()
    context = FaultyContext(swtpm.tcti, faults)
    try:
        assert len(context.get_random(8)) == 8
        for code in (0x101, 0x902, 0x909, 0xB0903):
            faults.next(CC_GET_RANDOM, Action(code=code))
            assert rc_of(context) == code
            assert len(context.get_random(8)) == 8
        faults.next(CC_GET_RANDOM, Action(garble=lambda answer: answer[:12] + b"\xff" * 8))
        assert bytes(context.get_random(8)) == b"\xff" * 8
        faults.next(CC_GET_RANDOM, Action(drop=True))
        assert rc_of(context) == IO_ERROR
        for _ in range(2):  # ESYS waits for an answer, now and then; from the chip comes nothing
            assert rc_of(context) in (IO_ERROR, BAD_SEQUENCE)
    finally:
        context.close()
    context = FaultyContext(swtpm.tcti, faults)  # opened again, it works
    assert len(context.get_random(8)) == 8
    context.close()


def rc_of(context: ESAPI) -> int:
    with pytest.raises(TSS2_Exception) as caught:
        context.get_random(8)
    return int(caught.value.rc)


@pytest.mark.real
def test_nobody_there_is_an_error_of_the_tpms(tmp_path: Path) -> None:
    with pytest.raises(TpmError, match="nowhere"):
        FaultyContext(f"swtpm:path={tmp_path}/nowhere", Faults())


# --- the broker -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with raw_tpm(tmp_path_factory.mktemp("raw"), Faults()) as made:
        yield made


@pytest.fixture
def broker(shared: Broker) -> Iterator[tuple[str, Faults]]:
    assert isinstance(shared.plan, Faults)
    yield shared.tcti, shared.plan
    shared.plan.clear()


@contextlib.contextmanager
def client(tcti: str) -> Iterator[socket.socket]:
    """A connection below tpm2-tss."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(tcti.removeprefix("swtpm:path="))
        yield sock


def exchange(sock: socket.socket, command: bytes = GET_RANDOM) -> bytes:
    sock.sendall(command)
    return sock.recv(4096)


def check_random(answer: bytes) -> None:
    assert answer[:12] == ANSWER[:12]
    assert len(answer) == len(ANSWER)


@pytest.mark.real
def test_several_clients_share_one_tpm(broker: tuple[str, Faults]) -> None:
    """ESYS contexts, tpm2-tools and raw ones; each gets its own answers."""
    tcti, _ = broker
    contexts = [open_context(tcti) for _ in range(3)]
    with client(tcti) as sock:
        for _ in range(3):
            assert all(len(context.get_random(8)) == 8 for context in contexts)
            check_random(exchange(sock))
    assert len(tool(tcti, "tpm2_getrandom", "--hex", "16")) == 32
    for context in contexts:
        close_context(context)


@pytest.mark.real
def test_nobody_has_a_space_of_its_own(broker: tuple[str, Faults]) -> None:
    """That is what makes it a bare TPM: one can exhaust it for all, and all see all."""
    tcti, _ = broker
    one, two = open_context(tcti), open_context(tcti)
    slots = take_object_slots(one)
    assert len(handles(two, FIRST_TRANSIENT)) == len(slots) == 3
    assert take_object_slots(two) == []
    for slot in slots:
        one.flush_context(slot)
    close_context(one)
    close_context(two)


@pytest.mark.real
def test_commands_of_many_threads_are_not_mixed_up(broker: tuple[str, Faults]) -> None:
    """Each asks for another number of bytes, and gets that number."""
    tcti, _ = broker
    wrong: list[bytes] = []

    def ask(count: int) -> None:
        command = GET_RANDOM[:-1] + bytes([count])
        with client(tcti) as sock:
            for _ in range(30):
                answer = exchange(sock, command)
                if len(answer) != 12 + count or answer[10:12] != bytes([0, count]):
                    wrong.append(answer)

    threads = [threading.Thread(target=ask, args=(count,)) for count in range(4, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert wrong == []


@pytest.mark.real
def test_a_command_may_come_in_pieces_and_two_at_once(broker: tuple[str, Faults]) -> None:
    tcti, _ = broker
    with client(tcti) as sock:
        for byte in GET_RANDOM[:-1]:
            sock.sendall(bytes([byte]))
        check_random(exchange(sock, GET_RANDOM[-1:]))
        sock.sendall(GET_RANDOM * 2)
        answers = b""
        while len(answers) < 2 * len(ANSWER):
            answers += sock.recv(4096)
    check_random(answers[: len(ANSWER)])
    check_random(answers[len(ANSWER) :])


@pytest.mark.real
def test_a_plan_is_carried_out_for_whoever_asks(broker: tuple[str, Faults]) -> None:
    tcti, faults = broker
    with client(tcti) as one, client(tcti) as two:
        faults.next(CC_GET_RANDOM, Action(code=0x101), Action(garble=lambda answer: answer[:5]))
        assert exchange(one) == refusal(0x101)
        assert exchange(two) == ANSWER[:5]
        check_random(exchange(one))
        begin = time.monotonic()
        faults.next(CC_GET_RANDOM, Action(delay_s=0.03))
        check_random(exchange(one))
        assert time.monotonic() - begin >= 0.03
        faults.next(CC_GET_RANDOM, Action(drop=True))
        assert exchange(one) == b""  # its end
        check_random(exchange(two))  # and not the other's


@pytest.mark.real
def test_a_hanging_command_holds_up_everybody(broker: tuple[str, Faults]) -> None:
    """A TPM takes one command at a time."""
    tcti, faults = broker
    hold = Hold()
    faults.next(CC_GET_RANDOM, Action(hold=hold))
    with client(tcti) as one, client(tcti) as two:
        try:
            one.sendall(GET_RANDOM)
            wait_until(lambda: faults.pending == 0, "the command")
            two.sendall(GET_RANDOM)
            two.settimeout(0.05)
            with pytest.raises(TimeoutError):
                two.recv(4096)
            two.settimeout(LIMIT_S)
        finally:
            hold.set()
        check_random(one.recv(4096))
        check_random(two.recv(4096))


@pytest.mark.real
def test_a_client_that_goes_does_no_harm(broker: tuple[str, Faults]) -> None:
    """Between two commands, within one, and before its answer."""
    tcti, faults = broker
    for sent in (b"", GET_RANDOM[:7], GET_RANDOM):
        faults.next(CC_GET_RANDOM, Action(delay_s=0.01))
        with client(tcti) as sock:
            sock.sendall(sent)
        with client(tcti) as sock:
            check_random(exchange(sock))
        faults.clear()


@pytest.mark.real
def test_a_tpm_that_dies_ends_its_clients_connections(tmp_path: Path) -> None:
    """They must see it: a device that is gone answers an error, not silence."""
    faults = Faults()
    with (
        swtpm_at(tmp_path) as tpm,
        Broker(tpm.tcti, faults) as broker,
        client(broker.tcti) as one,
        client(broker.tcti) as two,
    ):
        for sock in (one, two):
            check_random(exchange(sock))
            sock.settimeout(2.0)
        os.kill(tpm.pid, signal.SIGSTOP)
        one.sendall(GET_RANDOM)
        wait_until(lambda: len(faults.seen) == 3, "the command")
        tpm.kill()  # while it works on it
        assert ends(one)
        two.sendall(GET_RANDOM)  # when it is gone already
        assert ends(two)


def ends(sock: socket.socket) -> bool:
    try:
        return sock.recv(4096) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


@pytest.mark.real
def test_the_commands_are_what_their_names_say(broker: tuple[str, Faults]) -> None:
    """The numbers that tests put into plans, against what tpm2-tss sends."""
    tcti, faults = broker
    context = open_context(tcti)
    del faults.seen[:]
    handles(context, FIRST_TRANSIENT)
    context.get_random(4)
    close_context(context)
    assert faults.seen == [CC_GET_CAPABILITY, CC_GET_RANDOM]
