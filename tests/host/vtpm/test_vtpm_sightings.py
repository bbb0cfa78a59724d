"""The line between provider-proxy-vtpm and the daemon: what each may say, what each makes of anything
else, and what counts when one of them is away, slow or false."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from vtpm_helpers import OTHER_VM, VM, ek_of_number, sighting

from provider_proxy.errors import HostError, VtpmError
from provider_proxy.host.vtpm.entries import Ek
from provider_proxy.host.vtpm.follower import RETRY_S, Follower
from provider_proxy.host.vtpm.helper import serve as serve_module
from provider_proxy.host.vtpm.helper.serve import (
    MAX_CONNECTIONS,
    QUESTION_LIMIT_S,
    Server,
    open_socket,
    uid_of,
)
from provider_proxy.host.vtpm.sightings import (
    HEARTBEAT_S,
    LEASE_S,
    MAX_LINE_BYTES,
    MAX_QUESTION_BYTES,
    Alive,
    Gone,
    Holds,
    Sighting,
    Window,
    encode_question,
    encode_word,
    parse_question,
    parse_window,
    parse_word,
)

ME = os.geteuid()
EKS = (ek_of_number(0),)
BOTH = (ek_of_number(0), Ek(alg="rsa2048", spki_sha256="00" * 32))


# --- lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["watch", VM])
def test_questions(question: uuid.UUID) -> None:
    assert parse_question(encode_question(question)) == question


@pytest.mark.parametrize(
    "word",
    [
        Alive(),
        Gone(vm=VM),
        sighting(),
        sighting(runs=False, origin="unknown"),
        sighting(eks=BOTH, origin="elsewhere"),
        sighting(reading="encrypted"),
        sighting(reading="failed"),
    ],
)
def test_words(word: Sighting) -> None:
    line = encode_word(word)
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert parse_word(line) == word


def test_windows() -> None:
    for window in (
        Window(open=True, holds=Holds(reading="read", eks=EKS)),
        Window(open=False, holds=Holds()),
    ):
        assert parse_window(encode_word(window)) == window


def test_the_longest_line_fits_its_bound() -> None:
    word = Sighting(
        vm=VM,
        name="\U0001f600" * 600,
        run="f" * 96,
        runs=True,
        origin="elsewhere",
        holds=Holds(reading="failed", why="\U0001f600" * 600),
    )
    line = encode_word(word)
    assert len(line) <= MAX_LINE_BYTES
    assert len(encode_question(VM)) <= MAX_QUESTION_BYTES
    assert parse_word(line).vm == VM  # type: ignore[union-attr]


def test_what_a_terminal_would_obey_is_shown_as_a_question_mark() -> None:
    line = encode_word(sighting()).replace(b'"web"', b'"a\\u001b[2J\\nb"')
    word = parse_word(line)
    assert isinstance(word, Sighting)
    assert word.name == "a?[2J?b"


def changed(word: Sighting | Window | Gone, **values: object) -> bytes:
    return json.dumps(json.loads(encode_word(word)) | values).encode()


EK = {"alg": "p384", "spki_sha256": "00" * 32, "spire": ""}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{}",
        b'{"alive": 1}',
        b'{"alive": true, "more": 1}',
        b'{"gone": "x"}',
        b'{"gone": "x", "gone": "y"}',
        b"x" * (MAX_LINE_BYTES + 1),
        changed(sighting(), vm=str(VM).upper()),
        changed(sighting(), vm="../../etc"),
        changed(sighting(), runs=1),
        changed(sighting(), runs="true"),
        changed(sighting(), run=""),
        changed(sighting(), run="../x"),
        changed(sighting(), origin="somewhere"),
        changed(sighting(), reading="maybe"),
        changed(sighting(), reading="read"),  # and no EK
        changed(sighting(), eks=[EK]),  # unread
        changed(sighting(eks=EKS), eks=[EK, EK]),  # two of one family
        changed(sighting(eks=EKS), eks=[EK | {"alg": "dsa"}]),
        changed(sighting(eks=EKS), eks=[EK | {"spki_sha256": "00" * 31}]),
        changed(sighting(eks=EKS), eks=[EK | {"spki_sha256": "AB" * 32}]),
        changed(sighting(eks=EKS), eks=[EK | {"more": 1}]),
        changed(sighting(eks=EKS), eks=[EK | {"spire": "../x"}]),
        changed(sighting(eks=EKS), eks=[EK] * 5),
        changed(sighting(eks=EKS), eks="x"),
        changed(sighting(), name="x" * 513),
        changed(sighting(), confirmed=True),
    ],
)
def test_words_that_are_refused(line: bytes) -> None:
    with pytest.raises(VtpmError):
        parse_word(line)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b'{"version": 1, "op": "read", "vm": "x"}',
        b'{"version": 2, "op": "watch"}',
        b'{"version": 1, "op": "watch", "vm": "x"}',
        b'{"version": 1, "op": "check"}',
        b'{"version": 1, "op": "check", "vm": "/etc/shadow"}',
        b'{"version": 1, "op": "check", "vm": ["x"]}',
        encode_question(VM)[:-2] + b', "path": "/etc/shadow"}',
        b"x" * (MAX_QUESTION_BYTES + 1),
    ],
)
def test_questions_that_are_refused(line: bytes) -> None:
    with pytest.raises(VtpmError):
        parse_question(line)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_edit_of_a_line_is_read_or_refused(data: st.DataObject) -> None:
    """Nothing but a value of the right form, or `VtpmError`, comes of any bytes."""
    lines = [encode_question(VM), encode_word(sighting(eks=BOTH)), encode_word(Gone(vm=VM))]
    line = bytearray(data.draw(st.sampled_from(lines)))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(line) - 1))
        line[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        line = line or bytearray(b"x")
    parsers: tuple[Callable[[bytes], object], ...] = (parse_question, parse_word, parse_window)
    for parse in parsers:
        try:
            found = parse(bytes(line))
        except VtpmError:
            continue
        if isinstance(found, Sighting):
            assert bool(found.holds.eks) == (found.holds.reading == "read")
            assert len(found.holds.eks) <= 2


KEYS = (
    *("vm", "run", "runs", "origin", "reading", "eks", "why", "name"),
    *("alive", "gone", "open", "op", "version"),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_json_is_read_or_refused(value: object) -> None:
    line = json.dumps(value).encode()
    parsers: tuple[Callable[[bytes], object], ...] = (parse_question, parse_word, parse_window)
    for parse in parsers:
        try:
            parse(line)
        except VtpmError:
            continue


# --- the helper's socket ------------------------------------------------------------------------------


class Seen:
    """Stands in for the eyes."""

    def __init__(self) -> None:
        self.seen: dict[uuid.UUID, Sighting] = {}
        self._event = trio.Event()
        self.window = Window(open=True, holds=Holds(reading="read", eks=EKS))
        self.delay_s = 0.0

    async def changed(self) -> None:
        await self._event.wait()

    def put(self, *sightings: Sighting) -> None:
        self.seen = {word.vm: word for word in sightings}
        self._event.set()
        self._event = trio.Event()

    async def check(self, vm: uuid.UUID) -> Window:
        await trio.sleep(self.delay_s)
        if vm == OTHER_VM:
            raise HostError("cannot look")
        return self.window


class AtHelper:
    """A helper's server whose peer is the user that the test names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen = Seen()
        self.uid = 7
        self.server = Server(self.seen, {7})  # type: ignore[arg-type]
        monkeypatch.setattr(serve_module, "peer_uid", lambda stream: self.uid)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[trio.SocketStream]:
        ours, theirs = socket.socketpair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                self.server.serve, trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
            )
            async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
                yield stream

    async def ask(self, line: bytes) -> bytes:
        async with self.connected() as stream:
            try:
                await stream.send_all(line)
                return b"".join([part async for part in stream])
            except trio.BrokenResourceError:
                return b""


@pytest.fixture
def at_helper(monkeypatch: pytest.MonkeyPatch) -> AtHelper:
    return AtHelper(monkeypatch)


async def words_of(stream: trio.SocketStream, count: int) -> list[object]:
    data = b""
    while data.count(b"\n") < count:
        part = await stream.receive_some()
        assert part
        data += part
    return [parse_word(line) for line in data.splitlines()]


async def test_who_watches_hears_every_change_and_a_heartbeat(
    at_helper: AtHelper, autojump_clock: trio.testing.MockClock
) -> None:
    first, second = sighting(), sighting(vm=OTHER_VM, run="b/2/2", eks=EKS)
    at_helper.seen.put(first)
    async with at_helper.connected() as stream:
        await stream.send_all(encode_question("watch"))
        assert await words_of(stream, 2) == [first, Alive()]
        at_helper.seen.put(first, second)
        assert await words_of(stream, 2) == [second, Alive()]
        at_helper.seen.put(second)
        assert await words_of(stream, 2) == [Gone(vm=VM), Alive()]
        begin = trio.current_time()
        for _ in range(3):
            assert await words_of(stream, 1) == [Alive()]
        assert trio.current_time() - begin <= 3 * HEARTBEAT_S


async def test_a_check_is_one_line(at_helper: AtHelper) -> None:
    assert parse_window(await at_helper.ask(encode_question(VM))) == at_helper.seen.window
    assert await at_helper.ask(encode_question(OTHER_VM)) == b""


async def test_a_check_that_takes_too_long_is_a_closed_window(
    at_helper: AtHelper, autojump_clock: trio.testing.MockClock
) -> None:
    at_helper.seen.delay_s = 1000
    window = parse_window(await at_helper.ask(encode_question(VM)))
    assert (window.open, window.holds.why) == (False, "reading it took too long")


async def test_nobody_else_is_answered(at_helper: AtHelper) -> None:
    at_helper.uid = 8
    assert await at_helper.ask(encode_question(VM)) == b""


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"no newline", b"x" * (MAX_QUESTION_BYTES + 9), b'{"op": "read"}\n']
)
async def test_what_is_no_question_is_hung_up_on(
    at_helper: AtHelper, autojump_clock: trio.testing.MockClock, line: bytes
) -> None:
    begin = trio.current_time()
    assert await at_helper.ask(line) == b""
    assert trio.current_time() - begin <= QUESTION_LIMIT_S
    assert at_helper.server._open == 0


async def test_connections_have_a_number(at_helper: AtHelper) -> None:
    async with trio.open_nursery() as nursery:

        async def hold() -> None:
            async with at_helper.connected():
                await trio.sleep_forever()

        for _ in range(MAX_CONNECTIONS):
            nursery.start_soon(hold)
        await trio.testing.wait_all_tasks_blocked()
        assert await at_helper.ask(encode_question(VM)) == b""
        nursery.cancel_scope.cancel()
    assert at_helper.server._open == 0
    assert await at_helper.ask(encode_question(VM)) != b""


async def test_a_daemon_that_is_gone_is_let_go(at_helper: AtHelper) -> None:
    async with at_helper.connected() as stream:
        await stream.send_all(encode_question("watch"))
        await stream.receive_some()
    await trio.testing.wait_all_tasks_blocked()
    assert at_helper.server._open == 0


def test_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(2):  # one that was left behind makes way
        open_socket(path).close()
    assert path.stat().st_mode & 0o777 == 0o660
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot listen"):
        open_socket(tmp_path / "file")
    with pytest.raises(HostError, match="--socket is not given"):
        open_socket(None)
    with pytest.raises(HostError, match="--daemon-user: the user 'nosuchuser' does not exist"):
        uid_of("nosuchuser", "--daemon-user")


# --- the daemon's end ---------------------------------------------------------------------------------


class Following:
    """A follower of a socket of the test's."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "helper"
        self.taken: list[Sighting | Gone] = []
        self.follower = Follower(self.path, self.take, max_vms=3)

    async def take(self, word: Sighting | Gone) -> None:
        await trio.lowlevel.checkpoint()
        self.taken.append(word)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[trio.abc.ReceiveChannel[trio.SocketStream]]:
        """The helper's ends of the connections that the follower makes, questions not yet read."""
        send, receive = trio.open_memory_channel[trio.SocketStream](9)

        async def accept(stream: trio.SocketStream) -> None:
            await send.send(stream)
            await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            sock = trio.socket.socket(socket.AF_UNIX)
            await sock.bind(str(self.path))
            sock.listen()
            nursery.start_soon(trio.serve_listeners, accept, [trio.SocketListener(sock)])
            nursery.start_soon(self.follower.run)
            with trio.fail_after(20):
                yield receive
            nursery.cancel_scope.cancel()

    async def settle(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not condition():  # noqa: ASYNC110  # another task's doing
                await trio.sleep(0.01)


@pytest.fixture
def following(tmp_path: Path) -> Following:
    return Following(tmp_path)


async def say(stream: trio.SocketStream, *words: Sighting | Gone | Alive) -> None:
    await stream.send_all(b"".join(map(encode_word, words)))


async def test_what_is_said_counts_from_the_first_heartbeat_on(following: Following) -> None:
    follower = following.follower
    async with following.at_work() as streams:
        stream = await streams.receive()
        assert parse_question(await stream.receive_some()) == "watch"
        await say(stream, sighting())
        await following.settle(lambda: following.taken == [sighting()])
        assert (follower.current(VM), follower.is_up) == (None, False)
        await say(stream, Alive())
        await following.settle(lambda: follower.current(VM) == sighting())
        assert follower.is_up
        await say(stream, Gone(vm=VM))
        await following.settle(lambda: following.taken[-1] == Gone(vm=VM))
        assert follower.current(VM) is None


@pytest.mark.parametrize("end", [b"", b"nonsense\n", b"x" * (MAX_LINE_BYTES + 2)])
async def test_nothing_counts_once_the_helper_is_away_or_false(
    following: Following, end: bytes
) -> None:
    follower = following.follower
    async with following.at_work() as streams:
        stream = await streams.receive()
        await say(stream, sighting(), Alive())
        await following.settle(lambda: follower.current(VM) is not None)
        if end:
            await stream.send_all(end)
        else:
            await stream.aclose()
        await following.settle(lambda: not follower.is_up)
        assert follower.current(VM) is None
        await following.settle(lambda: following.taken[-1:] == [Gone(vm=VM)])
        again = await streams.receive()  # it asks again
        await say(again, sighting(eks=EKS), Alive())
        await following.settle(lambda: follower.current(VM) is not None)


async def test_a_helper_that_falls_silent_counts_for_its_lease(
    following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock alone, whatever the connection is."""
    follower = following.follower
    async with following.at_work() as streams:
        stream = await streams.receive()
        await say(stream, sighting(), Alive())
        await following.settle(lambda: follower.current(VM) is not None)
        now = trio.current_time()
        monkeypatch.setattr(trio, "current_time", lambda: now + LEASE_S + 0.1)
        assert follower.current(VM) is None
        monkeypatch.undo()


async def test_no_more_vms_than_the_registry_holds(following: Following) -> None:
    async with following.at_work() as streams:
        stream = await streams.receive()
        vms = [uuid.UUID(int=number) for number in range(5)]
        await say(stream, *(sighting(vm=vm, run=f"b/{vm.int}/1") for vm in vms), Alive())
        await following.settle(lambda: following.follower.is_up)
        assert len(following.follower.sightings()) == 3


async def test_without_a_helper_there_is_an_error_that_names_it(
    following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(following.follower.run)
        await trio.sleep(3 * RETRY_S)
        nursery.cancel_scope.cancel()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # and not again and again
    assert f"cannot connect to {following.path}" in said[0]
    with pytest.raises(HostError, match=r"is provider-proxy-vtpm\.service running"):
        await following.follower.check(VM)


@pytest.mark.parametrize("answer", [b"", b"nonsense\n", encode_word(Alive())])
async def test_a_check_without_an_answer_is_the_host_s_trouble(
    following: Following, answer: bytes
) -> None:
    async with following.at_work() as streams:

        async def reply() -> None:
            async for stream in streams:
                if parse_question(await stream.receive_some()) != "watch":
                    await stream.send_all(answer)
                    await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reply)
            with pytest.raises(HostError, match=r"vtpm\.helper"):
                await following.follower.check(VM)
            nursery.cancel_scope.cancel()
