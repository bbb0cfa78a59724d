"""The hooks' door and the keeper behind it: who may say what, what is read back when, and how little a
hostile peer, file or process can do."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
import trio.testing
from tpm_helpers import sample
from vtpm_helpers import (
    OTHER_VM,
    VM,
    Libvirt,
    certificate_request,
    certify,
    ecc_key,
    event,
    make_libvirt,
    rsa_key,
)

from provider_proxy.cli import main as cli
from provider_proxy.common.streams import SocketStream
from provider_proxy.errors import HostError, VtpmError
from provider_proxy.host.api.admin import AdminDoor
from provider_proxy.host.config.tables import Vtpm
from provider_proxy.host.http import messages, server
from provider_proxy.host.http.listeners import open_listeners
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.vtpm import hook_server as door_module
from provider_proxy.host.vtpm import readback, running
from provider_proxy.host.vtpm import service as keeper_module
from provider_proxy.host.vtpm.claims import entry_values
from provider_proxy.host.vtpm.entries import CONFIRMED, Ek, Entry, ek_of
from provider_proxy.host.vtpm.hook_server import CONNECTIONS_A_USER, LINE_LIMIT_S, HookDoor
from provider_proxy.host.vtpm.messages import MAX_LINE_BYTES, VmEvent, parse_message
from provider_proxy.host.vtpm.open_service import share_socket
from provider_proxy.host.vtpm.readback import EncryptedError, copy_state
from provider_proxy.host.vtpm.registry import Registry
from provider_proxy.host.vtpm.requests import CertificateRequest
from provider_proxy.host.vtpm.running import running_vms
from provider_proxy.host.vtpm.service import CONFIRM_AFTER_S, WATCH_S, Keeper

ME = os.geteuid()
SWTPM_USER = 12345


# --- messages ---------------------------------------------------------------------------------------


def test_a_request_of_each_kind_of_key() -> None:
    for key in (rsa_key(), rsa_key(0, 3072), ecc_key(), ecc_key(0, "secp256r1")):
        message = parse_message(certify(key))
        assert message == certificate_request(key)
    assert parse_message(event("started")) == VmEvent(vm=VM, name="web", event="started")


def changed(line: bytes, **values: Any) -> bytes:
    return json.dumps(json.loads(line) | values).encode()


GOOD = {"type": "ecc", "curve": "secp384r1", "x": "1", "y": "2"}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{}",
        b'{"version": 1, "version": 1}',
        changed(event("started"), version=2),
        changed(event("started"), op="stop"),
        changed(event("started"), event="start"),
        changed(event("started"), vm=str(VM).upper()),
        changed(event("started"), vm="../../etc"),
        changed(event("started"), more=1),
        changed(event("started"), name="x" * 600),
        changed(certify(ecc_key()), kind="iak"),
        changed(certify(ecc_key()), vmid="web"),
        changed(certify(ecc_key()), vmid=f"\n:{VM}"),
        changed(certify(ecc_key()), model="a\nb"),
        changed(certify(ecc_key()), manufacturer="Acme"),
        changed(certify(ecc_key()), spec_level=-1),
        changed(certify(ecc_key()), spec_revision=2**32),
        changed(certify(ecc_key()), key=GOOD),  # off the curve
        changed(certify(ecc_key()), key=GOOD | {"curve": "secp521r1"}),
        changed(certify(ecc_key()), key=GOOD | {"x": "f" * 97}),
        changed(certify(ecc_key()), key=GOOD | {"x": "0x1"}),
        changed(certify(ecc_key()), key={"type": "rsa", "modulus": "ff" * 128}),
        changed(certify(ecc_key()), key={"type": "rsa", "modulus": "ff" * 9999}),
        changed(certify(ecc_key()), key={"type": "dsa"}),
    ],
)
def test_messages_that_are_none(line: bytes) -> None:
    with pytest.raises(VtpmError):
        parse_message(line)


# --- the door ---------------------------------------------------------------------------------------


class Heard:
    """A handler that writes down what it hears."""

    def __init__(self) -> None:
        self.events: list[VmEvent] = []
        self.requests: list[CertificateRequest] = []
        self.certificate: bytes | None = None
        self.delay_s = 0.0
        self.bug: Exception | None = None

    async def certify(self, request: CertificateRequest) -> bytes | None:
        await trio.sleep(self.delay_s)
        if self.bug is not None:
            raise self.bug
        self.requests.append(request)
        return self.certificate

    async def happened(self, event: VmEvent) -> None:
        self.events.append(event)


class AtDoor:
    """A door whose peers are whoever the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard = Heard()
        self.seen: list[tuple[str, str]] = []
        self.uid = 0
        self.door = HookDoor(
            self.heard, uid=SWTPM_USER, observe=lambda *what: self.seen.append(what)
        )
        monkeypatch.setattr(door_module, "peer_uid", lambda stream: self.uid)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[trio.SocketStream]:
        ours, theirs = socket.socketpair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.door.serve, SocketStream(theirs))
            async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
                yield stream

    async def ask(self, line: bytes, *, uid: int = 0) -> dict[str, Any]:
        self.uid = uid
        async with self.connected() as stream:
            try:
                await stream.send_all(line)
                answer = b"".join([part async for part in stream])
            except trio.BrokenResourceError:  # closed on what we sent
                answer = b""
        values: dict[str, Any] = json.loads(answer) if answer else {}
        return values


@pytest.fixture
def at_door(monkeypatch: pytest.MonkeyPatch) -> AtDoor:
    return AtDoor(monkeypatch)


@pytest.mark.parametrize("uid", [0, SWTPM_USER])
async def test_root_and_the_swtpm_user_register(at_door: AtDoor, uid: int) -> None:
    assert await at_door.ask(certify(ecc_key()), uid=uid) == {"ok": True}
    assert at_door.heard.requests == [certificate_request(ecc_key())]
    at_door.heard.certificate = b"\1\2"
    assert (await at_door.ask(certify(ecc_key()), uid=uid))["certificate"] == "AQI="


async def test_events_are_root_s_alone(at_door: AtDoor) -> None:
    answer = await at_door.ask(event("started"), uid=SWTPM_USER)
    assert (answer["ok"], at_door.heard.events) == (False, [])
    assert "root alone" in answer["error"]
    assert await at_door.ask(event("started")) == {"ok": True}
    assert len(at_door.heard.events) == 1


async def test_nobody_else_comes_in(at_door: AtDoor) -> None:
    assert await at_door.ask(certify(ecc_key()), uid=1000) == {}
    assert at_door.heard.requests == []
    assert at_door.seen == [("connect", "refused")]


@pytest.mark.parametrize("line", [b"x" * (MAX_LINE_BYTES + 100), b"no newline"])
async def test_lines_have_an_end(
    at_door: AtDoor, autojump_clock: trio.testing.MockClock, line: bytes
) -> None:
    begin = trio.current_time()
    assert await at_door.ask(line) == {}
    assert trio.current_time() - begin <= LINE_LIMIT_S
    assert at_door.seen[0] in (("connect", "no line"), ("connect", "gone"))


async def test_a_peer_that_says_nothing_is_left(
    at_door: AtDoor, autojump_clock: trio.testing.MockClock
) -> None:
    async with at_door.connected() as stream:
        begin = trio.current_time()
        assert await stream.receive_some() == b""
        assert trio.current_time() - begin == pytest.approx(LINE_LIMIT_S)


async def test_what_takes_too_long_is_an_answer(
    at_door: AtDoor, autojump_clock: trio.testing.MockClock
) -> None:
    at_door.heard.delay_s = 1000
    answer = await at_door.ask(certify(ecc_key()))
    assert "no answer within 18 s" in answer["error"]


async def test_a_bug_that_one_hook_meets_ends_neither_the_door_nor_the_daemon(
    at_door: AtDoor, caplog: pytest.LogCaptureFixture
) -> None:
    at_door.heard.bug = ValueError("nobody thought of this")
    assert await at_door.ask(certify(ecc_key())) == {}
    assert at_door.seen == [("connect", "bug")]
    assert "nobody thought of this" in caplog.text
    at_door.heard.bug = None
    assert await at_door.ask(certify(ecc_key())) == {"ok": True}


async def test_one_user_does_not_crowd_out_the_other(at_door: AtDoor) -> None:
    at_door.uid = SWTPM_USER
    async with trio.open_nursery() as nursery:

        async def hold() -> None:
            async with at_door.connected():
                await trio.sleep_forever()

        for _ in range(CONNECTIONS_A_USER):
            nursery.start_soon(hold)
        await trio.testing.wait_all_tasks_blocked()
        assert await at_door.ask(certify(ecc_key()), uid=SWTPM_USER) == {}
        assert ("connect", "too many") in at_door.seen
        assert await at_door.ask(event("started")) == {"ok": True}
        nursery.cancel_scope.cancel()


# --- the keeper -------------------------------------------------------------------------------------


class Reader:
    """Stands in for `read_eks`: what each vTPM holds, or why it cannot be read."""

    def __init__(self) -> None:
        self.holds: dict[uuid.UUID, tuple[Ek, ...] | Exception] = {}
        self.reads: list[tuple[float, uuid.UUID]] = []
        self.at_once = 0
        self.most_at_once = 0

    async def __call__(
        self, state_root: Path, vm: uuid.UUID, *, uid: int, work: Path, limit_s: float
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


class Kept:
    """A keeper over a registry of its own; threads run inline, so that the clock may jump."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.libvirt = make_libvirt(folder / "libvirt")
        self.registry = Registry(folder / "vtpm.sqlite", max_vms=10)
        self.metrics = Metrics()
        self.reader = Reader()
        self.issued: list[CertificateRequest] = []
        self.settings = Vtpm(
            enabled=True, state_root=self.libvirt.state_root, run_root=self.libvirt.run_root
        )
        self.running: set[uuid.UUID] = set()
        monkeypatch.setattr(trio.to_thread, "run_sync", self._inline)
        monkeypatch.setattr(keeper_module, "running_vms", lambda *_: frozenset(self.running))
        self.keeper = self.make()

    @staticmethod
    async def _inline(function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    def make(self, issuer: Any = None) -> Keeper:
        self.keeper = Keeper(
            self.settings,
            self.registry,
            self.metrics,
            uid=ME,
            work=self.libvirt.root,
            issuer=issuer,
            read_eks=self.reader,
        )
        return self.keeper

    def entry(self, vm: uuid.UUID = VM) -> Entry:
        found = self.registry.get(vm)
        assert found is not None
        return found

    async def tell(self, what: str, vm: uuid.UUID = VM) -> None:
        if what == "started":
            self.running.add(vm)
        await self.keeper.happened(VmEvent(vm=vm, name="web", event=what))

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        await self.keeper.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.keeper.run, ())
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(tmp_path, monkeypatch)


def eks(number: int = 0) -> tuple[Ek, ...]:
    return (ek_of(ecc_key(number)),)


async def test_a_vm_s_first_start(autojump_clock: trio.testing.MockClock, kept: Kept) -> None:
    kept.reader.holds[VM] = eks()
    async with kept.at_work():
        await kept.tell("prepare")
        assert await kept.keeper.certify(certificate_request(ecc_key())) is None
        assert kept.keeper.listed()[0]["state"] == "claimed"
        await kept.tell("started")
        await trio.sleep(1)
        assert kept.entry().state == CONFIRMED
        assert sample(kept.metrics, "vtpm_vms", {"state": "confirmed"}) == 1
        await kept.tell("stopped")
        assert sample(kept.metrics, "vtpm_vms", {"state": "stopped"}) == 1
    assert sample(kept.metrics, "vtpm_confirmations_total", {"outcome": "confirmed"}) == 1


async def test_an_ek_that_nobody_has_stays_claimed_until_corrected(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    """Any process of the swtpm user may register: what the vTPM holds counts."""
    kept.reader.holds[VM] = eks(1)
    async with kept.at_work():
        await kept.keeper.certify(certificate_request(ecc_key()))
        await kept.tell("started")
        await trio.sleep(1)
    assert (kept.entry().eks, kept.entry().issuer) == (eks(1), "unknown")


async def test_encrypted_state_stays_claimed_and_is_read_once(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    kept.reader.holds[VM] = EncryptedError("the vTPM's state is encrypted")
    async with kept.at_work():
        await kept.keeper.certify(certificate_request(ecc_key()))
        await kept.tell("started")
        await trio.sleep(1000)
    assert len(kept.reader.reads) == 1
    assert kept.entry().state == "claimed"
    assert kept.entry().eks == eks()


async def test_what_cannot_be_read_is_tried_some_times(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    """A vTPM that comes in from another host has its EK only when the migration is over."""
    async with kept.at_work():
        await kept.tell("migrate")
        await kept.tell("started")
        await trio.sleep(5)
        kept.reader.holds[VM] = eks()
        await trio.sleep(10)
        assert (kept.entry().state, kept.entry().migrated) == (CONFIRMED, True)
        await kept.keeper.certify(certificate_request(ecc_key(1), vm=OTHER_VM))
        await kept.tell("started", OTHER_VM)
        before = len(kept.reader.reads)
        await trio.sleep(10_000)
        assert len(kept.reader.reads) - before == len(CONFIRM_AFTER_S)


async def test_a_migration_may_take_hours(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    async with kept.at_work():
        await kept.tell("migrate")
        await kept.tell("started")
        await trio.sleep(20_000)
        assert len(kept.reader.reads) < 20_000 / CONFIRM_AFTER_S[-1] + len(CONFIRM_AFTER_S)
        kept.reader.holds[VM] = eks()
        await trio.sleep(CONFIRM_AFTER_S[-1] + 1)
        assert kept.entry().state == CONFIRMED
        before = len(kept.reader.reads)
        await trio.sleep(10_000)
        assert len(kept.reader.reads) == before


async def test_one_at_a_time(autojump_clock: trio.testing.MockClock, kept: Kept) -> None:
    vms = [uuid.UUID(int=number) for number in range(1, 9)]
    async with kept.at_work():
        for vm in vms:
            await kept.tell("started", vm)
        await trio.sleep(1000)
    assert kept.reader.most_at_once == 1
    assert {vm for _, vm in kept.reader.reads} == set(vms)


async def test_a_copy_is_an_error_in_the_log(
    autojump_clock: trio.testing.MockClock, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    kept.reader.holds = {VM: eks(), OTHER_VM: eks()}
    async with kept.at_work():
        await kept.tell("started")
        await trio.sleep(1)
        await kept.tell("started", OTHER_VM)
        await trio.sleep(1)
    assert kept.entry(OTHER_VM).eks == ()
    assert kept.entry().state == CONFIRMED
    assert any("copy" in record.getMessage() for record in caplog.records)
    assert sample(kept.metrics, "vtpm_confirmations_total", {"outcome": "clone"}) == 1


async def test_a_vm_whose_end_nobody_told_ends_all_the_same(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    async with kept.at_work():
        await kept.tell("started")
        await trio.sleep(WATCH_S * 2)
        assert kept.entry().running
        kept.running.clear()
        await trio.sleep(WATCH_S * 1.5)
        assert not kept.entry().running


async def test_watching_starts_nothing(autojump_clock: trio.testing.MockClock, kept: Kept) -> None:
    """A process can call itself anything; that a VM runs is root's word."""
    async with kept.at_work():
        await kept.keeper.certify(certificate_request(ecc_key()))
        kept.running.add(VM)
        await trio.sleep(WATCH_S * 3)
        assert not kept.entry().running


async def test_a_start_of_the_daemon_sees_what_runs(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    await kept.keeper.certify(certificate_request(ecc_key()))
    kept.running.add(VM)
    kept.reader.holds[VM] = eks()
    async with kept.at_work():
        await trio.sleep(1)
        assert (kept.entry().running, kept.entry().state) == (True, CONFIRMED)


async def test_a_new_vtpm_after_a_stop_that_nobody_told(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    await kept.keeper.certify(certificate_request(ecc_key()))
    await kept.tell("started")
    with pytest.raises(VtpmError, match="runs, with another EK"):
        await kept.keeper.certify(certificate_request(ecc_key(1)))
    kept.running.clear()
    await kept.keeper.certify(certificate_request(ecc_key(1)))
    assert (kept.entry().eks, kept.entry().generation) == (eks(1), 2)


async def test_a_vm_that_is_undefined_is_forgotten(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    await kept.keeper.certify(certificate_request(ecc_key()))
    kept.registry._now = lambda: 1e11  # much later
    async with kept.at_work():
        (kept.libvirt.state_root / str(VM)).mkdir()
        await trio.sleep(WATCH_S * 2)
        assert kept.registry.get(VM) is not None
        (kept.libvirt.state_root / str(VM)).rmdir()
        await trio.sleep(WATCH_S * 2)
        assert kept.registry.get(VM) is None


async def test_a_folder_that_is_not_mounted_forgets_nobody(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    await kept.keeper.certify(certificate_request(ecc_key()))
    kept.registry._now = lambda: 1e11
    kept.libvirt.state_root.rmdir()
    async with kept.at_work():
        await trio.sleep(WATCH_S * 2)
    assert kept.registry.get(VM) is not None


async def test_trouble_with_the_disk_ends_nothing(
    autojump_clock: trio.testing.MockClock, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise HostError("the disk is full")

    async with kept.at_work():
        monkeypatch.setattr(kept.registry, "prune", full)
        await trio.sleep(WATCH_S * 3)


async def test_an_issuer_certifies_what_is_registered(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    class Signing:
        length = 2048

        async def issue(self, request: CertificateRequest) -> bytes:
            assert kept.registry.get(request.vm) is not None  # registered first
            kept.issued.append(request)
            return bytes(self.length)

    signing = Signing()
    keeper = kept.make(signing)
    assert await keeper.certify(certificate_request(ecc_key())) == bytes(2048)
    await kept.tell("started")
    with pytest.raises(VtpmError):
        await keeper.certify(certificate_request(ecc_key(1)))
    assert len(kept.issued) == 1
    signing.length = 2049
    with pytest.raises(HostError, match="longer than 2048"):
        await keeper.certify(certificate_request(ecc_key()))


# --- hostile files ----------------------------------------------------------------------------------


@pytest.fixture
def libvirt(tmp_path: Path) -> Libvirt:
    made = make_libvirt(tmp_path / "libvirt")
    made.state(VM).mkdir(parents=True)
    (made.state(VM) / readback.STATE_FILE).write_bytes(STATE)
    return made


STATE = b"\2\1\0\x0a\0\0\0\0\0\x64" + bytes(90)


def copied(libvirt: Libvirt, uid: int = ME) -> bytes:
    folder = copy_state(libvirt.state_root, VM, uid, libvirt.root)
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
        await readback.read_eks(libvirt.state_root, VM, uid=ME, work=libvirt.root, limit_s=5)
    assert not list(libvirt.root.glob(readback.COPY_PREFIX + "*"))


def test_encrypted_state_is_seen_as_such(libvirt: Libvirt) -> None:
    (libvirt.state(VM) / readback.STATE_FILE).write_bytes(STATE[:5] + b"\1" + STATE[6:])
    with pytest.raises(EncryptedError):
        copied(libvirt)


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
    with pytest.raises(VtpmError, match="not a plain file of the swtpm user"):
        copied(libvirt, uid=ME + 1)


# --- what runs --------------------------------------------------------------------------------------


def pid_file(libvirt: Libvirt, text: str, name: str = "1-web-swtpm.pid") -> Path:
    path = libvirt.run_root / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("x", "no number"),
        ("-1", "no number"),
        ("99999999999999999999", "too long"),
        ("4194304", "nobody"),
        (str(os.getpid()), "not a swtpm"),
        ("1", "not a swtpm"),
    ],
)
def test_pid_files_that_say_nothing(libvirt: Libvirt, text: str, why: str) -> None:
    pid_file(libvirt, text)
    assert running_vms(libvirt.run_root, libvirt.state_root, ME) == frozenset(), why


@pytest.mark.parametrize(
    ("program", "folder", "uid", "runs"),
    [
        ("/usr/bin/swtpm", "{vm}/tpm2", ME, True),
        ("/usr/bin/swtpm", "{vm}/tpm2,mode=0600", ME, True),
        ("/usr/bin/swtpm", "{vm}/tpm2x", ME, False),
        ("/usr/bin/swtpm", "{vm}/tpm2", ME + 1, False),  # another user's
        ("/usr/bin/qemu", "{vm}/tpm2", ME, False),
    ],
)
def test_the_process_must_be_that_vm_s_swtpm(
    libvirt: Libvirt, program: str, folder: str, uid: int, runs: bool
) -> None:
    words = ["-c", "import sys; print(1, flush=True); sys.stdin.read()", "--tpmstate"]
    words.append(f"dir={libvirt.state_root}/{folder.format(vm=VM)}")
    with subprocess.Popen(
        [program, *words],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        pid_file(libvirt, f"{process.pid}\n")
        found = running_vms(libvirt.run_root, libvirt.state_root, uid)
        process.stdin.close()
    assert found == ({VM} if runs else set())
    assert running_vms(libvirt.run_root, libvirt.state_root, ME) == frozenset()  # it has ended


def test_links_and_pipes_among_pid_files(libvirt: Libvirt) -> None:
    (libvirt.run_root / "a.pid").symlink_to("/etc/hostname")
    os.mkfifo(libvirt.run_root / "b.pid")
    (libvirt.run_root / "c.pid").mkdir()
    assert running_vms(libvirt.run_root, libvirt.state_root, ME) == frozenset()


def test_where_libvirt_never_ran_nothing_runs(tmp_path: Path) -> None:
    assert running_vms(tmp_path / "none", tmp_path, ME) == frozenset()


def test_a_hidden_process_is_an_error(
    libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ProtectProc=invisible would have every VM stopped."""

    def not_yours(pid: int, number: int) -> None:
        raise PermissionError

    pid_file(libvirt, "12345")
    monkeypatch.setattr(running, "PROC", tmp_path / "proc")
    monkeypatch.setattr(os, "kill", not_yours)
    with pytest.raises(HostError, match="ProtectProc"):
        running_vms(libvirt.run_root, libvirt.state_root, ME)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("what", ["pid file", "process"])
def test_that_nothing_can_be_opened_does_not_say_that_nothing_runs(
    libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch, code: int, what: str
) -> None:
    """Else a flood of connections would end the links of all VMs."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    pid_file(libvirt, str(os.getpid()))
    owner: object = os if what == "pid file" else Path
    monkeypatch.setattr(owner, "open", refused)
    with pytest.raises(HostError):
        running_vms(libvirt.run_root, libvirt.state_root, ME)


# --- the socket and the command ---------------------------------------------------------------------


def test_the_socket_is_the_swtpm_user_s_or_the_kernel_s_word_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = pwd.getpwuid(ME).pw_name
    settings = Vtpm(socket=tmp_path / "s", swtpm_user=name)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(settings.socket))
        share_socket(settings)
        assert settings.socket.stat().st_mode & 0o777 == 0o660

        def refused(*_: object) -> None:
            raise PermissionError(1, "no")

        monkeypatch.setattr(os, "chown", refused)
        share_socket(settings)
        assert settings.socket.stat().st_mode & 0o777 == 0o666
    with pytest.raises(HostError, match=r"vtpm\.socket"):
        share_socket(Vtpm(socket=tmp_path / "none", swtpm_user=name))
    with pytest.raises(HostError, match=r"no user 'nosuchuser'"):
        share_socket(Vtpm(socket=settings.socket, swtpm_user="nosuchuser"))


def entry_values_of(vm: uuid.UUID, **values: Any) -> dict[str, object]:
    return entry_values(Entry(vm=vm, **values))


@pytest.mark.parametrize("with_json", [False, True])
async def test_vms_shows_the_registry(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, with_json: bool
) -> None:
    listed = [
        entry_values_of(VM, name="web", eks=eks(), running=True, generation=2, registered_at=1),
        entry_values_of(OTHER_VM, name="in", running=True, migrated=True),
        entry_values_of(uuid.UUID(int=3), name="[bold]off", eks=eks(1)),
    ]
    door = server.Door(
        AdminDoor(Metrics(), lambda: None, dict, vms=lambda: listed), observe=observe
    )
    path = tmp_path / "admin"
    async with trio.open_nursery() as nursery:
        (listener,) = open_listeners("a test", [f"unix:{path}"], None)
        nursery.start_soon(listener.serve, door.serve)
        words = ["vms", f"unix:{path}", *(["--json"] if with_json else [])]
        code = await trio.to_thread.run_sync(cli.run, words)
        nursery.cancel_scope.cancel()
    out = capsys.readouterr().out
    assert code == 0
    if with_json:
        assert json.loads(out.splitlines()[-1]) == {"enabled": True, "vms": listed}
    else:
        for text in ("web", "claimed", "no EK", "migrated", "stopped", "[bold]off"):
            assert text in out


def observe(_status: int, _reason: str) -> None:
    """Nobody counts here."""


async def test_vms_of_a_daemon_that_keeps_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    door = AdminDoor(Metrics(), lambda: None, dict)
    request = messages.Request(
        method="GET",
        path="/vms",
        query="",
        peer=messages.Peer(name="", is_gone=lambda: False, limit=lambda _: None),
    )
    body = json.loads(b"".join((await door(request)).body))
    assert body["results"] == {"enabled": False, "vms": []}


@pytest.mark.parametrize(
    ("admin", "code", "message"),
    [
        ("unix:/nonexistent/admin", 3, "no daemon answers at unix:/nonexistent/admin"),
        ("nonsense", 2, "ADMIN must be"),
    ],
)
def test_vms_without_a_daemon(
    capsys: pytest.CaptureFixture[str], admin: str, code: int, message: str
) -> None:
    assert cli.run(["vms", admin]) == code
    assert message in capsys.readouterr().err
