"""provider-proxy-vtpm's eyes: what counts as a VM that runs, which state files are read and when, and how
little QEMU's user, the swtpm user and a hostile file can do about it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
import trio.lowlevel
import trio.testing
from vtpm_helpers import OTHER_VM, VM, Libvirt, ek_of_number, make_libvirt, status_xml

from provider_proxy.errors import HostError, VtpmError
from provider_proxy.host.vtpm.entries import Ek
from provider_proxy.host.vtpm.helper import eyes as eyes_module
from provider_proxy.host.vtpm.helper import readback
from provider_proxy.host.vtpm.helper.eyes import LOOK_S, REREAD_S, RETRY_S, Eyes
from provider_proxy.host.vtpm.helper.presence import Presence, Present
from provider_proxy.host.vtpm.helper.readback import EncryptedError, StateSource
from provider_proxy.host.vtpm.helper.status import Domain, StatePlace, parse_status
from provider_proxy.host.vtpm.helper.window import MAX_AGE_S, Mark, read_mark
from provider_proxy.host.vtpm.sightings import Holds, Window

ME = os.geteuid()
SECRET = uuid.UUID("aaaaaaaa-0000-4000-8000-00000000000a")


# --- libvirt's status files ---------------------------------------------------------------------------


def test_a_status_file() -> None:
    assert parse_status(status_xml("running", "booted", 251)) == Domain(
        vm=VM,
        name="web",
        pid=251,
        state="running",
        reason="booted",
        place=StatePlace(),
        secret=None,
    )


@pytest.mark.parametrize(
    ("state", "reason", "runs", "origin"),
    [
        ("running", "booted", True, "here"),
        ("running", "restored", True, "here"),
        ("running", "migrated", True, "elsewhere"),
        ("running", "postcopy", True, "elsewhere"),
        ("running", "unpaused", True, "unknown"),
        ("running", "migration canceled", True, "unknown"),
        ("paused", "user", True, "unknown"),
        ("paused", "migration", False, "unknown"),
        ("paused", "starting up", False, "unknown"),
        ("paused", "postcopy", False, "unknown"),
        ("paused", "save", False, "unknown"),
        ("shutoff", "destroyed", False, "unknown"),
        ("running ", "booted", False, "unknown"),
        ("", "", False, "unknown"),
    ],
)
def test_what_runs_and_where_it_began(state: str, reason: str, runs: bool, origin: str) -> None:
    domain = parse_status(status_xml(state, reason, 251))
    assert domain is not None
    assert (domain.runs, domain.origin) == (runs, origin)


@pytest.mark.parametrize(
    ("backend", "place", "secret"),
    [
        (f"<encryption secret='{SECRET}'/>", StatePlace(), SECRET),
        ("<source type='dir' path='/srv/vtpm/a'/>", StatePlace(path=Path("/srv/vtpm/a")), None),
        (
            "<source type='file' path='/srv/a.state'/>",
            StatePlace(path=Path("/srv/a.state"), is_file=True),
            None,
        ),
        ("<source type='dir' path='relative'/>", StatePlace(), None),
    ],
)
def test_where_the_state_is(backend: str, place: StatePlace, secret: uuid.UUID | None) -> None:
    domain = parse_status(status_xml("running", "booted", 251, backend=backend))
    assert domain is not None
    assert (domain.place, domain.secret) == (place, secret)


@pytest.mark.parametrize(
    "change",
    [
        (b"type='emulator'", b"type='passthrough'"),
        (b"version='2.0'", b"version='1.2'"),
        (b"pid='251'", b""),
        (b"pid='251'", b"pid='1'"),
        (b"pid='251'", b"pid='-1'"),
        (b"pid='251'", b"pid='99999999999'"),
    ],
)
def test_domains_that_are_none_of_ours(change: tuple[bytes, bytes]) -> None:
    assert parse_status(status_xml("running", "booted", 251).replace(*change)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no XML",
        b"<domain/>",
        b"<domstatus pid='7'/>",
        status_xml("running", "booted", 251).replace(b"</domain>", b""),
        status_xml("running", "booted", 251).replace(str(VM).encode(), b"../../etc"),
        status_xml("running", "booted", 251, backend="<encryption secret='x'/>"),
        b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
        + b"".join(b'<!ENTITY %c "%s">' % (98 + i, (b"&%c;" % (97 + i)) * 10) for i in range(9))
        + b"]><domstatus pid='7'><domain><uuid>&j;</uuid></domain></domstatus>",
    ],
)
def test_files_that_are_no_status(data: bytes) -> None:
    with pytest.raises(VtpmError):
        parse_status(data)


# --- who is here --------------------------------------------------------------------------------------


@pytest.fixture
def libvirt(tmp_path: Path) -> Libvirt:
    made = make_libvirt(tmp_path / "libvirt")
    made.state(VM).mkdir(parents=True)
    (made.state(VM) / readback.STATE_FILE).write_bytes(STATE)
    return made


@pytest.fixture
def presence(libvirt: Libvirt) -> Iterator[Presence]:
    made = Presence(libvirt.status_root, owner=ME)
    yield made
    made.close()


def runs(presence: Presence, vm: uuid.UUID = VM) -> bool:
    found = presence.look().get(vm)
    return found is not None and found.domain.runs


def test_a_vm_runs_while_its_status_says_so_and_its_qemu_lives(
    libvirt: Libvirt, presence: Presence
) -> None:
    assert presence.look() == {}
    with libvirt.qemu() as process:
        found = presence.look()[VM]
        assert (found.domain.runs, found.origin) == (True, "here")
        libvirt.say("paused", "migration", process.pid)
        assert not runs(presence)
        libvirt.say("running", "migration canceled", process.pid)
        again = presence.look()[VM]
        assert (again.domain.runs, again.run, again.origin) == (True, found.run, "here")
        process.kill()
        process.wait()
        assert presence.look() == {}  # libvirtd, which may be away, has not said so yet
    with libvirt.qemu():
        assert presence.look()[VM].run != found.run


def test_where_a_life_began_is_what_its_first_running_state_says(
    libvirt: Libvirt, presence: Presence
) -> None:
    for reason, origin in (
        ("migrated", "elsewhere"),
        ("restored", "here"),
        ("unpaused", "unknown"),
    ):
        with libvirt.qemu(state="paused migration") as process:
            assert presence.look()[VM].origin == "unknown"
            libvirt.say("running", reason, process.pid)
            assert presence.look()[VM].origin == origin
            libvirt.say("running", "unpaused", process.pid)
            assert presence.look()[VM].origin == origin


def test_the_end_of_a_qemu_is_told_at_once(libvirt: Libvirt, presence: Presence) -> None:
    with libvirt.qemu() as process:
        assert runs(presence)
        process.kill()
        process.wait()

        async def wait() -> None:
            with trio.fail_after(5):
                await trio.lowlevel.wait_readable(presence.ends_fd())

        trio.run(wait)


def _link(libvirt: Libvirt, path: Path) -> None:
    path.rename(libvirt.root / "elsewhere")
    path.symlink_to(libvirt.root / "elsewhere")


def _hard(libvirt: Libvirt, path: Path) -> None:
    (libvirt.root / "elsewhere").hardlink_to(path)


def _pipe_for(libvirt: Libvirt, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _renamed(libvirt: Libvirt, path: Path) -> None:
    path.rename(path.with_name("other.xml"))


def _twice(libvirt: Libvirt, path: Path) -> None:
    data = path.read_bytes().replace(b"<name>web</name>", b"<name>again</name>")
    path.with_name("again.xml").write_bytes(data)
    shutil.copy(path.with_suffix(".pid"), path.with_name("again.pid"))


@pytest.mark.parametrize("spoil", [_link, _hard, _pipe_for, _renamed, _twice, Path.unlink])
def test_status_files_that_do_not_count(
    libvirt: Libvirt, presence: Presence, spoil: Callable[..., None]
) -> None:
    """What a QEMU that broke out could do in a folder of its own: libvirt 12 gives it that folder."""
    with libvirt.qemu(), libvirt.qemu(OTHER_VM, name="fine"):
        path = libvirt.status_root / "web.xml"
        if spoil is Path.unlink:
            path.unlink()
        else:
            spoil(libvirt, path)
        assert VM not in presence.look()
        assert runs(presence, OTHER_VM)  # and the others are none the worse for it


def test_an_older_status_that_is_put_back_does_not_count(
    libvirt: Libvirt, presence: Presence
) -> None:
    with libvirt.qemu() as process:
        assert runs(presence)
        path = libvirt.status_root / "web.xml"
        path.rename(path.with_suffix(".kept"))
        libvirt.say("paused", "migration", process.pid)
        assert not runs(presence)
        path.with_suffix(".kept").rename(path)
        assert VM not in presence.look()
        libvirt.say("running", "migration canceled", process.pid)
        assert runs(presence)


def test_other_users_files_do_not_count(libvirt: Libvirt) -> None:
    presence = Presence(libvirt.status_root, owner=ME + 1)
    with libvirt.qemu():
        assert presence.look() == {}
    presence.close()


def test_the_lock_must_be_that_process_s(libvirt: Libvirt, presence: Presence) -> None:
    with libvirt.qemu(), libvirt.qemu(OTHER_VM, name="other") as other:
        libvirt.say("running", "booted", other.pid)  # a status that names another's process
        assert VM not in presence.look()
        libvirt.say("running", "booted", os.getpid())
        assert VM not in presence.look()
        (libvirt.status_root / "web.pid").unlink()
        assert VM not in presence.look()
        assert runs(presence, OTHER_VM)


def test_a_number_that_another_process_got_while_it_was_pinned_is_not_held_on_to(
    libvirt: Libvirt, presence: Presence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock was there when the look began, and has gone with its QEMU before pidfd_open."""
    with libvirt.qemu():
        once = [presence._holders()]
        monkeypatch.setattr(presence, "_holders", lambda: once.pop() if once else {})
        assert presence.look() == {}
        assert presence._pins == {}
        monkeypatch.undo()
        assert runs(presence)


def test_files_of_others_do_not_fill_the_log(
    libvirt: Libvirt, presence: Presence, caplog: pytest.LogCaptureFixture
) -> None:
    """In libvirt 12.8 the folder is of QEMU's user, who may write what it likes, as often."""
    for number in range(100):
        (libvirt.status_root / "x.xml").write_text("<x/>" + " " * number)
        presence.look()
    assert len(caplog.records) == 20


async def test_a_folder_that_changes_all_the_time_is_looked_at_now_and_then(
    autojump_clock: trio.testing.MockClock, seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    monkeypatch.setattr(seeing.eyes, "look", lambda: looks.append(trio.current_time()))

    async def always(_fd: int) -> None:
        await trio.sleep(0.001)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", always)
    with trio.move_on_after(3):
        await seeing.eyes.run()
    assert 50 < len(looks) <= 3 / eyes_module.GAP_S + 2


def test_a_lock_of_another_kind_is_none(libvirt: Libvirt, presence: Presence) -> None:
    path = libvirt.status_root / "web.pid"
    path.touch()
    libvirt.say("running", "booted", os.getpid())
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert VM not in presence.look()
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert runs(presence)


def test_a_folder_that_was_removed_is_an_error(libvirt: Libvirt, presence: Presence) -> None:
    """Else libvirt's new one would never be seen."""
    libvirt.status_root.rmdir()
    libvirt.status_root.mkdir()
    with pytest.raises(HostError, match="was removed"):
        presence.look()
    with pytest.raises(HostError, match="cannot read"):
        Presence(libvirt.root / "none")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_that_nothing_can_be_opened_does_not_say_that_nothing_runs(
    libvirt: Libvirt, presence: Presence, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    with libvirt.qemu():
        monkeypatch.setattr(os, "open", refused)
        with pytest.raises(HostError, match="cannot see which VMs run"):
            presence.look()


# --- root's window ------------------------------------------------------------------------------------


def mark(libvirt: Libvirt, **values: Any) -> Path:
    path = libvirt.marks / str(VM)
    at_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    good = {"version": 1, "at_s": at_s, "kind": "", "path": "", "secret": ""}
    path.write_text(json.dumps(good | values))
    return path


def test_marks(libvirt: Libvirt) -> None:
    assert read_mark(libvirt.marks, VM, owner=ME) is None
    path = mark(libvirt)
    assert read_mark(libvirt.marks, VM, owner=ME) == Mark(place=StatePlace(), secret=None)
    assert read_mark(libvirt.marks, VM, owner=ME + 1) is None
    mark(libvirt, kind="file", path="/srv/a", secret=str(SECRET))
    assert read_mark(libvirt.marks, VM, owner=ME) == Mark(
        place=StatePlace(path=Path("/srv/a"), is_file=True), secret=SECRET
    )
    path.rename(libvirt.root / "elsewhere")
    path.symlink_to(libvirt.root / "elsewhere")
    with pytest.raises(HostError):
        read_mark(libvirt.marks, VM, owner=ME)


@pytest.mark.parametrize(
    "values",
    [
        {"version": 2},
        {"at_s": time.clock_gettime(time.CLOCK_BOOTTIME) - MAX_AGE_S - 1},
        {"at_s": time.clock_gettime(time.CLOCK_BOOTTIME) + 1e6},  # of another boot
        {"at_s": None},
        {"secret": "x"},
        {"path": 7},
    ],
)
def test_marks_that_do_not_count(libvirt: Libvirt, values: dict[str, object]) -> None:
    mark(libvirt, **values)
    assert read_mark(libvirt.marks, VM, owner=ME) is None


# --- looking and reading ------------------------------------------------------------------------------


class Source:
    """Stands in for the states: what each vTPM holds, or why it cannot be read."""

    def __init__(self) -> None:
        self.holds: dict[uuid.UUID, tuple[Ek, ...] | Exception] = {}
        self.stamps: dict[uuid.UUID, int] = {}
        self.reads: list[tuple[float, uuid.UUID]] = []
        self.at_once = 0
        self.most_at_once = 0

    def stamp(self, vm: uuid.UUID, place: StatePlace) -> tuple[int, int, int, int]:
        return (0, 0, 0, self.stamps.get(vm, 0))

    async def read_eks(
        self, vm: uuid.UUID, place: StatePlace, secret: uuid.UUID | None = None
    ) -> tuple[Ek, ...]:
        self.reads.append((trio.current_time(), vm))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await trio.sleep(0.1)
        self.at_once -= 1
        found = self.holds.get(vm, VtpmError("the vTPM has no EK yet"))
        if isinstance(found, Exception):
            raise found
        return found


class Looked:
    """Stands in for the presence: who is here, as the test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.open(folder, os.O_RDONLY)
        self.ends, self.end = os.pipe()
        self.here: dict[uuid.UUID, Present] = {}
        self.trouble: Exception | None = None

    def ends_fd(self) -> int:
        return self.ends

    def look(self) -> dict[uuid.UUID, Present]:
        if self.trouble is not None:
            raise self.trouble
        return dict(self.here)

    def put(
        self,
        vm: uuid.UUID = VM,
        *,
        run: str = "b/1/1",
        state: str = "running booted",
        backend: str = "",
    ) -> None:
        word, _, reason = state.partition(" ")
        domain = parse_status(status_xml(word, reason, 7, vm=vm, backend=backend))
        assert domain is not None
        self.here[vm] = Present(domain=domain, run=run, origin=domain.origin)


class Seeing:
    """Eyes at work, over stand-ins; the clock may jump."""

    def __init__(self, folder: Path) -> None:
        self.looked = Looked(folder)
        self.source = Source()
        self.marks: dict[uuid.UUID, Mark] = {}
        self.eyes = Eyes(self.looked, self.source, self.marks.get)

    def holds(self, vm: uuid.UUID = VM) -> Holds:
        return self.eyes.seen[vm].holds

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """The loop without its signals and descriptors, which no jumping clock goes with."""

        async def look() -> None:
            while True:
                self.eyes.look()
                await trio.sleep(LOOK_S)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.eyes._read_all)
            nursery.start_soon(look)
            await trio.lowlevel.checkpoint()
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
def seeing(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> Iterator[Seeing]:
    made = Seeing(tmp_path)
    yield made
    for fd in (made.looked.folder, made.looked.ends, made.looked.end):
        os.close(fd)


RSA_LIKE, ECC_LIKE = ek_of_number(0), ek_of_number(1)


async def test_a_vtpm_is_read_once_the_vm_runs_and_not_before(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.source.holds[VM] = (RSA_LIKE,)
    seeing.looked.put(state="paused migration")
    async with seeing.at_work():
        await trio.sleep(1000)
        assert (seeing.source.reads, seeing.holds().reading) == ([], "unread")
        seeing.looked.put(state="running migrated")
        await trio.sleep(LOOK_S + 0.2)
        assert seeing.holds() == Holds(reading="read", eks=(RSA_LIKE,))
        await trio.sleep(1000)
        assert len(seeing.source.reads) == 1


async def test_a_new_life_is_read_again(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.source.holds[VM] = (RSA_LIKE,)
    seeing.looked.put()
    async with seeing.at_work():
        await trio.sleep(1)
        seeing.looked.put(run="b/2/2", state="paused migration")
        await trio.sleep(LOOK_S + 0.1)
        assert seeing.holds() == Holds()  # nothing of an earlier life is said of this one
        seeing.source.holds[VM] = (ECC_LIKE,)
        seeing.looked.put(run="b/2/2", state="running migrated")
        await trio.sleep(LOOK_S + 0.2)
        assert seeing.holds().eks == (ECC_LIKE,)


async def test_a_state_that_was_written_is_read_again_but_not_all_the_time(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.source.holds[VM] = (RSA_LIKE,)
    seeing.looked.put()
    async with seeing.at_work():
        await trio.sleep(REREAD_S + 1)
        assert len(seeing.source.reads) == 1
        seeing.source.stamps[VM] = 1
        seeing.source.holds[VM] = (ECC_LIKE,)
        await trio.sleep(LOOK_S + 0.2)
        assert seeing.holds().eks == (ECC_LIKE,)
        before = len(seeing.source.reads)
        for number in range(100):  # a guest that has its vTPM written all the time
            seeing.source.stamps[VM] = 2 + number
            await trio.sleep(1)
        assert 100 / REREAD_S - 2 <= len(seeing.source.reads) - before <= 100 / REREAD_S + 1


async def test_what_cannot_be_read_is_tried_later_and_later(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.looked.put()
    async with seeing.at_work():
        await trio.sleep(5)
        assert seeing.holds().reading == "failed"
        seeing.source.holds[VM] = (RSA_LIKE,)
        await trio.sleep(20)
        assert seeing.holds().reading == "read"
        seeing.source.holds[OTHER_VM] = VtpmError("no EK")
        seeing.looked.put(OTHER_VM, run="b/2/2")
        before = len(seeing.source.reads)
        await trio.sleep(20_000)
        assert len(seeing.source.reads) - before <= 20_000 / RETRY_S[-1] + len(RETRY_S)


async def test_encrypted_state_is_read_once(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.source.holds[VM] = EncryptedError("the vTPM's state is encrypted")
    seeing.looked.put()
    async with seeing.at_work():
        await trio.sleep(1000)
    assert (len(seeing.source.reads), seeing.holds().reading) == (1, "encrypted")


async def test_a_secret_may_be_given_later(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.source.holds[VM] = EncryptedError("libvirt does not have it")
    seeing.looked.put(backend=f"<encryption secret='{SECRET}'/>")
    async with seeing.at_work():
        await trio.sleep(5)
        assert seeing.holds().reading == "encrypted"
        seeing.source.holds[VM] = (RSA_LIKE,)
        await trio.sleep(20)
        assert seeing.holds().reading == "read"


async def test_the_host_s_own_trouble_says_nothing_about_a_vtpm_for_a_while(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.source.holds[VM] = (RSA_LIKE,)
    seeing.looked.put()
    async with seeing.at_work():
        await trio.sleep(REREAD_S + 1)
        seeing.source.holds[VM] = HostError("no more processes")
        seeing.source.stamps[VM] = 1
        await trio.sleep(3)
        assert seeing.holds().eks == (RSA_LIKE,)
        await trio.sleep(1000)
        assert seeing.holds().reading == "failed"


async def test_one_at_a_time(autojump_clock: trio.testing.MockClock, seeing: Seeing) -> None:
    for number in range(5):
        vm = uuid.UUID(int=number)
        seeing.source.holds[vm] = (RSA_LIKE,)
        seeing.looked.put(vm, run=f"b/{number}/1")
    async with seeing.at_work():
        await trio.sleep(2)
    assert (len(seeing.source.reads), seeing.source.most_at_once) == (5, 1)


async def test_what_is_read_of_a_life_that_has_ended_is_dropped(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.source.holds[VM] = (RSA_LIKE,)
    seeing.looked.put()
    async with seeing.at_work():
        seeing.looked.put(run="b/2/2", state="paused migration")
        seeing.eyes.look()  # while the first life's state is being read
        await trio.sleep(1)
        assert seeing.holds() == Holds()
        seeing.looked.here.clear()
        await trio.sleep(LOOK_S + 0.1)
        assert seeing.eyes.seen == {}


async def test_the_window(autojump_clock: trio.testing.MockClock, seeing: Seeing) -> None:
    seeing.source.holds[VM] = (RSA_LIKE,)
    closed = Window(open=False, holds=Holds())
    assert await seeing.eyes.check(VM) == closed
    seeing.marks[VM] = Mark(place=StatePlace(), secret=None)
    made = await seeing.eyes.check(VM)
    assert made == Window(open=True, holds=Holds(reading="read", eks=(RSA_LIKE,)))
    seeing.looked.put(state="paused starting up")  # a QEMU of it is there
    assert await seeing.eyes.check(VM) == closed


async def test_a_window_that_closes_while_the_state_is_read_is_closed(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    seeing.source.holds[VM] = (RSA_LIKE,)
    seeing.marks[VM] = Mark(place=StatePlace(), secret=None)
    async with trio.open_nursery() as nursery:

        async def close() -> None:
            await trio.sleep(0.05)
            del seeing.marks[VM]

        nursery.start_soon(close)
        assert not (await seeing.eyes.check(VM)).open


async def test_eyes_that_cannot_look_end(
    autojump_clock: trio.testing.MockClock, seeing: Seeing
) -> None:
    """The service manager starts the helper again; the daemon claims nothing meanwhile."""
    seeing.looked.trouble = HostError("cannot see what runs")
    with pytest.raises(HostError):
        await seeing.eyes.check(VM)


def test_a_change_is_seen_at_once(libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of it: nobody waits for the look of each second."""
    monkeypatch.setattr(eyes_module, "LOOK_S", 1e6)
    presence = Presence(libvirt.status_root, owner=ME)
    eyes = Eyes(presence, Source(), lambda _: None)

    async def main() -> None:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(eyes.run)
                with libvirt.qemu() as process:
                    while VM not in eyes.seen or not eyes.seen[VM].runs:
                        await eyes.changed()
                    libvirt.say("paused", "migration", process.pid)
                    while eyes.seen[VM].runs:
                        await eyes.changed()
                    libvirt.say("running", "migration canceled", process.pid)
                    while not eyes.seen[VM].runs:
                        await eyes.changed()
                    process.kill()
                    while VM in eyes.seen:
                        await eyes.changed()
                nursery.cancel_scope.cancel()

    trio.run(main)
    presence.close()


# --- hostile state files --------------------------------------------------------------------------------


STATE = b"\2\1\0\x0a\0\0\0\0\0\x64" + bytes(90)


def source_of(libvirt: Libvirt, uid: int = ME) -> StateSource:
    return StateSource(root=libvirt.state_root, uid=uid, work=libvirt.root, limit_s=5)


def copied(libvirt: Libvirt, uid: int = ME) -> bytes:
    folder, is_secret = source_of(libvirt, uid).copy(VM, StatePlace())
    assert not is_secret
    data = (folder / readback.STATE_FILE).read_bytes()
    assert folder.stat().st_mode & 0o777 == 0o700
    readback.remove_copies(libvirt.root)
    assert not folder.exists()
    return data


def test_a_plain_state_file_is_copied(libvirt: Libvirt) -> None:
    assert copied(libvirt) == STATE


def test_a_copy_that_fails_leaves_no_secrets_behind(
    libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> NoReturn:
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(HostError, match="No space"):
        copied(libvirt)
    assert not list(libvirt.root.glob(readback.COPY_PREFIX + "*"))


async def test_no_more_files_is_the_hosts_trouble(
    libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refused)
    with pytest.raises(HostError, match="Too many open files"):
        await source_of(libvirt).read_eks(VM, StatePlace())
    assert not list(libvirt.root.glob(readback.COPY_PREFIX + "*"))


async def test_encrypted_state_is_seen_as_such(libvirt: Libvirt) -> None:
    (libvirt.state(VM) / readback.STATE_FILE).write_bytes(STATE[:5] + b"\1" + STATE[6:])
    source = source_of(libvirt)
    assert source.copy(VM, StatePlace())[1]
    with pytest.raises(EncryptedError):
        await source.read_eks(VM, StatePlace())
    with pytest.raises(EncryptedError, match="secrets are not requested"):
        await source.read_eks(VM, StatePlace(), SECRET)
    readback.remove_copies(libvirt.root)


def _elsewhere(libvirt: Libvirt) -> Path:
    """Another VM's state."""
    path = libvirt.state(OTHER_VM) / readback.STATE_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(STATE)
    return path


def _link_file(libvirt: Libvirt, path: Path) -> None:
    path.unlink()
    path.symlink_to(_elsewhere(libvirt))


def _hard_link(libvirt: Libvirt, path: Path) -> None:
    path.unlink()
    path.hardlink_to(_elsewhere(libvirt))


def _link_folder(libvirt: Libvirt, path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.symlink_to(_elsewhere(libvirt).parent)


def _link_vm(libvirt: Libvirt, path: Path) -> None:
    shutil.rmtree(path.parent.parent)
    path.parent.parent.symlink_to(_elsewhere(libvirt).parent.parent)


def _pipe(libvirt: Libvirt, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil",
    [
        _link_file,
        _hard_link,
        _link_folder,
        _link_vm,
        _pipe,
        lambda _, path: path.write_bytes(b""),
        lambda _, path: path.write_bytes(bytes(readback.MAX_STATE_BYTES + 1)),
        lambda _, path: path.unlink(),
        lambda _, path: (path.unlink(), path.mkdir()),
    ],
    ids=["link", "hard link", "folder", "VM's folder", "pipe", "empty", "large", "none", "dir"],
)
def test_state_files_that_are_not_read(
    libvirt: Libvirt, spoil: Callable[[Libvirt, Path], None]
) -> None:
    spoil(libvirt, libvirt.state(VM) / readback.STATE_FILE)
    with pytest.raises(VtpmError):
        copied(libvirt)
    assert not list(libvirt.root.glob(readback.COPY_PREFIX + "*"))


def test_another_user_s_file_is_not_read(libvirt: Libvirt) -> None:
    with pytest.raises(VtpmError, match="not a regular file owned by the swtpm user"):
        copied(libvirt, uid=ME + 1)


def test_a_place_of_libvirt_s_own_choice(libvirt: Libvirt) -> None:
    """`<source type="dir">`, and a state_root that is a link of root's."""
    elsewhere = libvirt.root / "elsewhere"
    shutil.move(libvirt.state(VM), elsewhere)
    source = source_of(libvirt)
    with pytest.raises(VtpmError):
        source.copy(VM, StatePlace())
    folder, _ = source.copy(VM, StatePlace(path=elsewhere))
    assert (folder / readback.STATE_FILE).read_bytes() == STATE
    libvirt.state_root.rename(libvirt.root / "real")
    libvirt.state_root.symlink_to(libvirt.root / "real")
    shutil.move(elsewhere, libvirt.state(VM))
    assert copied(libvirt) == STATE


def linear(flags: int = 0) -> bytes:
    """A state in swtpm's linear format."""
    header = readback.LINEAR_HEADER.pack(readback.LINEAR_MAGIC, 1, 0, 256, 256, len(STATE))
    state = bytearray(STATE)
    state[4:6] = struct.pack(">H", flags)
    return header.ljust(256, b"\0") + bytes(state) + bytes(4096)


def test_a_state_in_one_file(libvirt: Libvirt) -> None:
    path = libvirt.root / "volume"
    path.write_bytes(linear())
    place = StatePlace(path=path, is_file=True)
    source = source_of(libvirt)
    assert (source.copy(VM, place)[0] / readback.LINEAR_FILE).read_bytes() == linear()
    link = libvirt.root / "link"
    link.symlink_to(path)
    if ME == 0:  # root's link, as LVM makes them
        assert source.copy(VM, StatePlace(path=link, is_file=True))
    path.write_bytes(linear(readback.FLAG_ENCRYPTED))
    assert source.copy(VM, place)[1]
    for data in (b"", bytes(4096), STATE, linear()[:20], linear()[:256]):
        path.write_bytes(data)
        with pytest.raises(VtpmError):
            source.copy(VM, place)
