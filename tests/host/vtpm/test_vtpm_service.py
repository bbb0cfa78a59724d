"""The EK hook's server and the vTPM service behind it: who may say what and when, and how little a
hostile peer or process can do."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from tpm_helpers import sample
from vtpm_helpers import OTHER_VM, VM, certificate_request, certify, ecc_key, rsa_key, sighting

from provider_proxy.cli import main as cli
from provider_proxy.common.few_lines import FewLines
from provider_proxy.common.streams import SocketStream
from provider_proxy.errors import HostError, NotFoundError, VtpmError
from provider_proxy.evidence.model import Nonce, PcrMask, QuoteRequest, Tenant
from provider_proxy.host.api.admin import AdminApi
from provider_proxy.host.config.chip_tables import Vtpm
from provider_proxy.host.http import messages, server
from provider_proxy.host.http.listeners import open_listeners
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.vtpm import hook_server as door_module
from provider_proxy.host.vtpm.claims import entry_values
from provider_proxy.host.vtpm.entries import CONFIRMED, Ek, Entry, ek_of
from provider_proxy.host.vtpm.follower import Follower
from provider_proxy.host.vtpm.hook_server import CONNECTIONS_A_USER, LINE_LIMIT_S, HookServer
from provider_proxy.host.vtpm.messages import MAX_LINE_BYTES, parse_message
from provider_proxy.host.vtpm.open_service import share_socket
from provider_proxy.host.vtpm.registry import Registry
from provider_proxy.host.vtpm.requests import CertificateRequest
from provider_proxy.host.vtpm.service import PRUNE_S, VtpmService
from provider_proxy.host.vtpm.sightings import LEASE_S, Gone, Holds, Sighting, Window

ME = os.geteuid()
SWTPM_USER = 12345


# --- messages ---------------------------------------------------------------------------------------


def test_a_request_of_each_kind_of_key() -> None:
    for key in (rsa_key(), rsa_key(0, 3072), ecc_key(), ecc_key(0, "secp256r1")):
        message = parse_message(certify(key))
        assert message == certificate_request(key)


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
        changed(certify(ecc_key()), version=2),
        changed(certify(ecc_key()), op="event"),
        changed(certify(ecc_key()), more=1),
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


# --- the server -------------------------------------------------------------------------------------


class Heard:
    """A handler that writes down what it hears."""

    def __init__(self) -> None:
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


class AtDoor:
    """A server whose peers are the users that the test names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard = Heard()
        self.seen: list[tuple[str, str]] = []
        self.uid = 0
        self.server = HookServer(
            self.heard, uid=SWTPM_USER, observe=lambda *what: self.seen.append(what)
        )
        monkeypatch.setattr(door_module, "peer_uid", lambda stream: self.uid)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[trio.SocketStream]:
        ours, theirs = socket.socketpair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.server.serve, SocketStream(theirs))
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
        assert await at_door.ask(certify(ecc_key())) == {"ok": True}
        nursery.cancel_scope.cancel()


# --- the vTPM service -------------------------------------------------------------------------------


class Helper:
    """Stands in for provider-proxy-vtpm at the other end of the vTPM service's follower."""

    def __init__(self) -> None:
        self.window = Window(open=True, holds=Holds(reading="read", eks=eks()))

    async def check(self, vm: uuid.UUID) -> Window:
        await trio.lowlevel.checkpoint()
        return self.window


class Kept:
    """A vTPM service over a registry of its own; threads run inline, so that the clock may jump."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state_root = folder / "swtpm"
        self.state_root.mkdir()
        self.registry = Registry(folder / "vtpm.sqlite", max_vms=10)
        self.metrics = Metrics()
        self.helper = Helper()
        self.issued: list[CertificateRequest] = []
        self.settings = Vtpm(enabled=True, state_root=self.state_root, helper=folder / "helper")
        monkeypatch.setattr(trio.to_thread, "run_sync", self._inline)
        monkeypatch.setattr(Follower, "check", lambda _, vm: self.helper.check(vm))
        self.vtpm_service = self.make()

    @staticmethod
    async def _inline(function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    def make(self, issuer: Any = None) -> VtpmService:
        self.vtpm_service = VtpmService(
            self.settings, self.registry, self.metrics, uid=ME, issuer=issuer
        )
        return self.vtpm_service

    def entry(self, vm: uuid.UUID = VM) -> Entry:
        found = self.registry.get(vm)
        assert found is not None
        return found

    async def hear(self, *words: Sighting | Gone) -> None:
        """The follower's words, as it would take them."""
        follower = self.vtpm_service.follower
        for word in words:
            if isinstance(word, Sighting):
                follower._sightings[word.vm] = word
            else:
                follower._sightings.pop(word.vm, None)
            follower._counts_until = trio.current_time() + LEASE_S
            await self.vtpm_service.take(word)

    def claims(self, vm: uuid.UUID = VM) -> dict[str, Any] | None:
        """What a tenant of both VMs is told."""
        tenant = Tenant(name="acme", pcr_allow=1, vms=frozenset((VM, OTHER_VM)))
        question = QuoteRequest(nonce=Nonce(b"n" * 16), mask=PcrMask(1), vm=vm)
        try:
            found: dict[str, Any] = json.loads(self.vtpm_service.claims(tenant, question))
        except NotFoundError:
            return None
        return found


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    made = Kept(tmp_path, monkeypatch)
    yield made
    made.registry.close()


def eks(number: int = 0) -> tuple[Ek, ...]:
    return (ek_of(ecc_key(number)),)


async def test_a_vm_s_life(autojump_clock: trio.testing.MockClock, kept: Kept) -> None:
    assert await kept.vtpm_service.certify(certificate_request(ecc_key())) is None
    assert kept.vtpm_service.listed()[0]["state"] == "registered"
    assert kept.claims() is None
    await kept.hear(sighting(runs=False))
    assert kept.claims() is None
    await kept.hear(sighting())
    claims = kept.claims()
    assert claims is not None
    assert (claims["state"], claims["confirmed"]) == ("registered", False)
    await kept.hear(sighting(eks=eks()))
    assert kept.entry().state == CONFIRMED
    claims = kept.claims()
    assert claims is not None
    assert (claims["state"], claims["confirmed"], claims["issuer"]) == (
        "confirmed",
        True,
        "delegate",
    )
    assert sample(kept.metrics, "vtpm_vms", {"state": "confirmed"}) == 1
    await kept.hear(sighting(runs=False, eks=eks()))  # it leaves
    assert kept.claims() is None
    await kept.hear(sighting(eks=eks()))  # the migration was given up
    assert kept.claims() == claims
    await kept.hear(Gone(vm=VM))
    assert kept.claims() is None
    assert sample(kept.metrics, "vtpm_vms", {"state": "stopped"}) == 1
    assert sample(kept.metrics, "vtpm_confirmations_total", {"outcome": "confirmed"}) == 1


async def test_claims_end_with_the_heartbeat(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    await kept.hear(sighting(eks=eks()))
    await trio.sleep(LEASE_S - 0.1)
    assert kept.claims() is not None
    await trio.sleep(0.2)
    assert kept.claims() is None


async def test_claims_are_of_the_life_of_the_vm_that_they_are_about(
    autojump_clock: trio.testing.MockClock, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the sight of a new life and the registry's next word nothing is claimed."""
    await kept.hear(sighting(eks=eks()))
    follower = kept.vtpm_service.follower
    follower._sightings[VM] = sighting(run="b/2/2", origin="elsewhere")
    assert kept.claims() is None
    await kept.hear(sighting(run="b/2/2", origin="elsewhere"))
    assert kept.claims() is None  # it has come in: no EK is known
    await kept.hear(sighting(run="b/2/2", origin="elsewhere", eks=eks(1)))
    claims = kept.claims()
    assert claims is not None
    assert (claims["eks"][0]["spki_sha256"], claims["migrated"]) == (eks(1)[0].spki_sha256, True)


async def test_an_ek_that_nobody_has_is_corrected(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    """Any process of the swtpm user may speak in root's window: what the vTPM holds counts."""
    await kept.vtpm_service.certify(certificate_request(ecc_key()))
    await kept.hear(sighting(), sighting(eks=eks(1)))
    assert (kept.entry().eks, kept.entry().issuer) == (eks(1), "unknown")
    assert sample(kept.metrics, "vtpm_confirmations_total", {"outcome": "corrected"}) == 1


async def test_encrypted_state_stays_registered(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    kept.helper.window = Window(open=True, holds=Holds(reading="encrypted"))
    await kept.vtpm_service.certify(certificate_request(ecc_key()))
    await kept.hear(sighting(reading="encrypted"))
    assert (kept.entry().state, kept.entry().eks) == ("registered", eks())
    claims = kept.claims()
    assert claims is not None
    assert (claims["state"], claims["confirmed"]) == ("registered", False)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(open=False, holds=Holds()), "being made now"),
        (
            Window(open=False, holds=Holds(reading="read", eks=(ek_of(ecc_key()),))),
            "being made now",
        ),
        (Window(open=True, holds=Holds(reading="failed", why="no EK yet")), "no EK yet"),
        (Window(open=True, holds=Holds()), "cannot be read"),
        (Window(open=True, holds=Holds(reading="read", eks=(ek_of(ecc_key(1)),))), "this EK"),
    ],
)
async def test_what_is_not_registered(
    autojump_clock: trio.testing.MockClock, kept: Kept, window: Window, message: str
) -> None:
    """Outside root's window, or against what the state holds; and the CA is never asked."""

    class Signing:
        async def issue(self, request: CertificateRequest) -> bytes:
            raise AssertionError("it was asked")

    kept.helper.window = window
    vtpm_service = kept.make(Signing())
    with pytest.raises(VtpmError, match=message):
        await vtpm_service.certify(certificate_request(ecc_key()))
    assert kept.registry.all() == ()


async def test_a_running_vm_gets_no_other_ek_even_in_a_window(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    await kept.hear(sighting(eks=eks(1)))
    with pytest.raises(VtpmError, match="is running"):
        await kept.vtpm_service.certify(certificate_request(ecc_key()))
    assert kept.entry().eks == eks(1)


async def test_a_copy_is_an_error_in_the_log_until_the_other_is_gone(
    autojump_clock: trio.testing.MockClock, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    await kept.hear(sighting(eks=eks()), sighting(vm=OTHER_VM, run="b/2/2", eks=eks()))
    assert kept.entry(OTHER_VM).eks == ()
    assert kept.entry().state == CONFIRMED
    assert kept.claims(OTHER_VM) is None
    assert any("copy" in record.getMessage() for record in caplog.records)
    assert sample(kept.metrics, "vtpm_confirmations_total", {"outcome": "clone"}) == 1
    await kept.hear(Gone(vm=VM))
    assert kept.entry(OTHER_VM).eks == eks()
    assert kept.claims(OTHER_VM) is not None


async def test_after_a_start_nothing_runs_until_it_is_said(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    await kept.hear(sighting(eks=eks()))
    again = kept.make()
    await again.start()
    assert not kept.entry().running
    assert kept.claims() is None


async def test_a_vm_that_is_undefined_is_forgotten(
    autojump_clock: trio.testing.MockClock, kept: Kept
) -> None:
    await kept.vtpm_service.certify(certificate_request(ecc_key()))
    kept.registry._now = lambda: 1e11  # much later
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.vtpm_service._prune)
        (kept.state_root / str(VM)).mkdir()
        await trio.sleep(PRUNE_S * 2)
        assert kept.registry.get(VM) is not None
        (kept.state_root / str(VM)).rmdir()
        kept.state_root.rename(kept.state_root.with_name("away"))  # an unmounted one says nothing
        await trio.sleep(PRUNE_S * 2)
        assert kept.registry.get(VM) is not None
        kept.state_root.mkdir()
        await trio.sleep(PRUNE_S * 2)
        assert kept.registry.get(VM) is None
        nursery.cancel_scope.cancel()


async def test_trouble_with_the_disk_ends_nothing(
    autojump_clock: trio.testing.MockClock, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise HostError("the disk is full")

    monkeypatch.setattr(kept.registry, "prune", full)
    monkeypatch.setattr(kept.registry, "saw", full)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.vtpm_service._prune)
        await trio.sleep(PRUNE_S * 3)
        await kept.hear(sighting(eks=eks()))
        assert kept.claims() is None
        nursery.cancel_scope.cancel()


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
    vtpm_service = kept.make(signing)
    assert await vtpm_service.certify(certificate_request(ecc_key())) == bytes(2048)
    assert len(kept.issued) == 1
    signing.length = 2049
    with pytest.raises(HostError, match="more than 2048"):
        await vtpm_service.certify(certificate_request(ecc_key()))


def test_hooks_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [60.0]
    monkeypatch.setattr(door_module, "FewLines", partial(FewLines, now=lambda: now[0]))
    server = HookServer(None, uid=ME, observe=lambda *_: None)  # type: ignore[arg-type]
    for _ in range(500):
        server._warn("%s refused: %s", "certify", "no")
    assert len(caplog.records) == 20
    now[0] = 120.0
    server._warn("%s refused: %s", "certify", "no")
    assert caplog.messages[20:] == ["hooks: certify refused: no (480 more were not written)"]


# --- the socket and the command ---------------------------------------------------------------------


@pytest.mark.skipif(ME != 0, reason="takes other users' places")
@pytest.mark.parametrize(("user", "comes_in"), [("daemon", True), ("bin", False)])
def test_the_socket_is_the_swtpm_user_s(user: str, comes_in: bool) -> None:
    folder = Path(tempfile.mkdtemp())  # where others may come, unlike tmp_path
    folder.chmod(0o755)
    settings = Vtpm(socket=folder / "s", swtpm_user="daemon")
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(settings.socket))
            sock.listen()
            settings.socket.chmod(0o600)
            share_socket(settings)
            code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
            ids = pwd.getpwnam(user)
            done = subprocess.run(
                ["/usr/bin/python3", "-c", code, str(settings.socket)],
                user=ids.pw_uid,
                group=ids.pw_gid,
                extra_groups=[pwd.getpwnam("daemon").pw_gid],  # its group alone does not count
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode == 0) is comes_in, done.stderr
            assert comes_in or "PermissionError" in done.stderr
    finally:
        shutil.rmtree(folder)


def test_without_acls_the_socket_is_its_group_s_or_the_kernel_s_word_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "setxattr", without)
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
        assert "open to every user" in caplog.text
        monkeypatch.undo()
    with pytest.raises(HostError, match=r"vtpm\.socket"):
        share_socket(Vtpm(socket=tmp_path / "none", swtpm_user=name))
    with pytest.raises(HostError, match=r"the user 'nosuchuser' does not exist"):
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
    http_server = server.HttpServer(
        AdminApi(Metrics(), lambda: None, dict, vms=lambda: listed), observe=observe
    )
    path = tmp_path / "admin"
    async with trio.open_nursery() as nursery:
        (listener,) = open_listeners("a test", [f"unix:{path}"], None)
        nursery.start_soon(listener.serve, http_server.serve)
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
    server = AdminApi(Metrics(), lambda: None, dict)
    request = messages.Request(
        method="GET",
        path="/vms",
        query="",
        peer=messages.Peer(name="", is_gone=lambda: False, limit=lambda _: None),
    )
    body = json.loads(b"".join((await server(request)).body))
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
