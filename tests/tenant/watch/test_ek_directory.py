"""The directory of EKs that are linked now: what stands in it, for how long, and what is never left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from helpers import LIMIT_S, NotifySocket, until
from soft_ek import SoftHost, rsa_ek
from vtpm_helpers import ecc_key, rsa_key

from provider_proxy.cli.keep_eks import keep, linked_eks
from provider_proxy.errors import HostError, ProviderProxyError, ReplyError, VmNotRunningError
from provider_proxy.evidence.vtpm_link import spire_name, spki_digest
from provider_proxy.tenant.watch.alive import beat
from provider_proxy.tenant.watch.config import parse_watch_config
from provider_proxy.tenant.watch.ek_directory import EkDirectory
from provider_proxy.tenant.watch.host import HostWatch
from provider_proxy.tenant.watch.states import Event
from provider_proxy.tenant.watch.watcher import Watcher

VM = "0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b"
ONE, OTHER = "1" * 64, "2" * 64


def test_names_are_those_of_spire_s_plugin() -> None:
    """`sha256sum` of `openssl rsa -RSAPublicKey_out -outform der`."""
    pem = rsa_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    words = ("openssl", "rsa", "-pubin", "-RSAPublicKey_out", "-outform", "der")
    der = subprocess.run(words, input=pem, capture_output=True, check=True).stdout
    said = subprocess.run(["sha256sum"], input=der, capture_output=True, check=True).stdout
    assert spire_name(rsa_key()) == said.split()[0].decode()
    assert spire_name(ecc_key()) == spki_digest(ecc_key()).hex()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run/eks"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_a_proof_counts_for_its_life(
    folder: Path, autojump_clock: trio.testing.MockClock
) -> None:
    directory = EkDirectory(folder)
    directory.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(directory.run)
        directory.proven("a", ONE, 10)
        await trio.sleep(9)
        assert names(folder) == {ONE}
        assert (folder / ONE).read_bytes() == b""
        directory.proven("a", ONE, 10)
        await trio.sleep(9)
        assert names(folder) == {ONE}
        await trio.sleep(1.5)
        assert names(folder) == set()
        nursery.cancel_scope.cancel()


async def test_one_host_that_proves_it_is_enough(folder: Path) -> None:
    directory = EkDirectory(folder)
    directory.open()
    directory.proven("a", ONE, 10)
    directory.proven("b", ONE, 10)
    directory.refuted("a")
    assert names(folder) == {ONE}
    directory.refuted("b")
    assert names(folder) == set()
    directory.proven("a", ONE, 10)
    directory.proven("a", OTHER, 10)  # another EK is configured for it now
    assert names(folder) == {OTHER}
    directory.close()
    assert names(folder) == set()


def test_what_a_killed_one_has_left_goes_at_the_start(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (ONE, "README", ONE.upper().replace("1", "A")):
        (folder / name).touch()
    EkDirectory(folder).open()
    assert ONE not in names(folder)
    assert "README" in names(folder)


def test_a_folder_that_others_can_change_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(HostError, match="other users can change it"):
        EkDirectory(folder).open()


def test_a_folder_that_cannot_be_written_ends_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = EkDirectory(folder, now=time.monotonic)
    directory.open()
    folder.rmdir()
    directory.proven("a", ONE, 10)
    assert "cannot write" in caplog.text
    directory.close()


async def test_a_file_that_cannot_be_removed_is_no_truth(
    folder: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    directory = EkDirectory(folder)
    directory.open()

    def unlink(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(directory.run)
        directory.proven("a", ONE, 10)
        assert directory.is_true()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            directory.refuted("a")
            assert not directory.is_true()
            await trio.sleep(5)
            assert not directory.is_true()
            assert names(folder) == {ONE}
        await trio.sleep(2)  # it is tried again
        assert names(folder) == set()
        assert directory.is_true()
        nursery.cancel_scope.cancel()


async def test_a_sweep_that_stands_still_is_no_truth(folder: Path) -> None:
    now = [0.0]
    directory = EkDirectory(folder, now=lambda: now[0])
    directory.open()
    directory.proven("a", ONE, 10)
    now[0] = 12.0
    assert directory.is_true()
    now[0] = 14.0
    assert not directory.is_true()


@pytest.fixture
async def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NotifySocket]:
    """A service manager that wants to hear each 0.1 s that all is well."""
    made = NotifySocket(tmp_path / "notify")
    await made.open()
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.path))
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    yield made
    made.sock.close()


async def test_systemd_hears_that_it_is_well_only_while_it_is(manager: NotifySocket) -> None:
    well = [True]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat, lambda: well[0])
        assert await manager.next() == "READY=1"
        with trio.fail_after(LIMIT_S):
            await manager.ping()
            await manager.ping()
        well[0] = False
        with trio.move_on_after(0.5) as scope:
            while True:
                await manager.ping()
                scope.deadline = trio.current_time() + 0.5  # one may have been on its way
        nursery.cancel_scope.cancel()
    assert await manager.next() == "STOPPING=1"


# --- in the watcher -----------------------------------------------------------------------------------


class Verdicts:
    """What the hosts' rounds end with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: ProviderProxyError | None = None
        self.hangs = False
        monkeypatch.setattr(HostWatch, "_attempt", lambda host: self._attempt())

    async def _attempt(self) -> tuple[Event, ProviderProxyError | None]:
        await trio.sleep(1e6 if self.hangs else 0)
        if self.error is None:
            return Event.GOOD, None
        return Event.REFUSED, self.error


@asynccontextmanager
async def watching(tmp_path: Path, folder: Path) -> AsyncIterator[str]:
    """A watcher of one host with a VM; the name of its EK."""
    ek = rsa_ek(3)
    (tmp_path / "ek").write_bytes(SoftHost(ek=ek).ek_public)
    host = {"provider_ip": "127.0.0.1", "insecure_plaintext": True, "insecure_any_state": True}
    host |= {"vm": VM, "vm_ek": str(tmp_path / "ek"), "interval_s": 0.1, "timeout_s": 0.3}
    tables = {"state_dir": str(tmp_path / "state"), "pins": str(tmp_path / "pins")}
    config = parse_watch_config({**tables, "ek_dir": str(folder), "hosts": {"h": host}})
    watcher = Watcher(config)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(watcher.run, None))
        yield spire_name(ek.public_key())
        os.kill(os.getpid(), signal.SIGTERM)


async def test_the_watcher_tells_systemd(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, manager: NotifySocket
) -> None:
    Verdicts(monkeypatch)
    async with watching(tmp_path, folder):
        assert await manager.next() == "READY=1"
        with trio.fail_after(LIMIT_S):
            await manager.ping()
    assert await manager.next() == "STOPPING=1"
    monkeypatch.setattr(EkDirectory, "is_true", lambda _: False)
    manager.alive = 0
    async with watching(tmp_path, folder):
        assert await manager.next() == "READY=1"
        await trio.sleep(0.3)
    assert await manager.next() == "STOPPING=1"
    assert manager.alive == 0


async def test_the_watcher_s_verdicts(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = Verdicts(monkeypatch)
    async with watching(tmp_path, folder) as name:
        await until(lambda: names(folder) == {name}, "the file")
        verdicts.error = VmNotRunningError("it left")
        await until(lambda: names(folder) == set(), "its end")
        verdicts.error = None
        await until(lambda: names(folder) == {name}, "the file, again")
        verdicts.hangs = True  # no verdict comes any more
        await until(lambda: names(folder) == set(), "its end without a verdict")
    verdicts.hangs = False
    async with watching(tmp_path, folder) as name:
        await until(lambda: names(folder) == {name}, "the file")
    assert names(folder) == set()  # nothing outlives the watcher


def test_kill_9_leaves_nothing_after_the_next_start(folder: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from provider_proxy.tenant.watch.ek_directory import EkDirectory\n"
        "d = EkDirectory(Path(sys.argv[1]), now=lambda: 0.0); d.open(); d.proven('a', '1' * 64, 9)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(folder) == {ONE}
    EkDirectory(folder).open()
    assert names(folder) == set()


# --- on the host --------------------------------------------------------------------------------------


def vm(number: int, **changes: Any) -> dict[str, Any]:
    values = {"vm": f"vm-{number}", "running": True, "confirmed": True, "spire": [f"{number:064x}"]}
    return values | changes


def test_what_a_host_s_list_says() -> None:
    vms = [vm(1), vm(2, running=False), vm(3, confirmed=False), vm(4, spire=[]), vm(5, running=1)]
    two = vm(6, spire=["a" * 64, "b" * 64, "../x"])
    found = linked_eks({"vms": [*vms, two]})
    assert found == {"vm-1/0": f"{1:064x}", "vm-6/0": "a" * 64, "vm-6/1": "b" * 64}
    for results in ({}, {"vms": None}, {"vms": [7]}, {"vms": [vm(1, spire=None)]}):
        with pytest.raises(ReplyError):
            linked_eks(results)


async def test_a_host_s_directory_follows_its_daemon(folder: Path) -> None:
    class Client:
        def __init__(self) -> None:
            self.results: dict[str, Any] | None = {"vms": [vm(1), vm(2)]}

        def get(self, path: str, limit: int) -> dict[str, Any]:
            if self.results is None:
                raise HostError("no daemon answers")
            return self.results

    client = Client()
    async with trio.open_nursery() as nursery:
        call = partial(keep, client, 1000, EkDirectory(folder), interval_s=0.05)  # type: ignore[arg-type]
        nursery.start_soon(call)
        await until(lambda: folder.exists() and len(names(folder)) == 2, "both")
        client.results = {"vms": [vm(2), vm(1, running=False)]}
        await until(lambda: names(folder) == {f"{2:064x}"}, "the one that runs")
        client.results = None  # the daemon is away: what was proven goes when its time is over
        await until(lambda: names(folder) == set(), "nothing")
        client.results = {"vms": [vm(1)]}
        await until(lambda: names(folder) == {f"{1:064x}"}, "the daemon's return")
        os.kill(os.getpid(), signal.SIGTERM)
    assert names(folder) == set()
