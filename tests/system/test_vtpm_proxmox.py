"""A Proxmox host, played: qemu-server's calls, the real swtpm_setup, swtpm and hook. No Proxmox runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import LIMIT_S, get, serving, until_answered, wait_until
from vtpm_helpers import EKHOOK, OTHER_VM, QEMU, VM, running_helper, setup_config

pytestmark = pytest.mark.real
if os.geteuid() != 0 or shutil.which("swtpm_setup") is None:
    pytest.skip("needs root and swtpm-tools", allow_module_level=True)


class Proxmox:
    """qemu-server's folders and what it does with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "qemu-server"
        self.conf = folder / "pve"
        self.images = folder / "images"
        self.marks = folder / "marks"
        for path in (self.run, self.conf, self.images, folder / "state"):
            path.mkdir()
        config = folder / "vtpm-hook.toml"
        config.write_text(
            f'socket = "{folder}/hooks"\nmarks = "{self.marks}"\nproxmox = "{self.conf}"\n'
            'localca = "/usr/bin/swtpm_localca"\n'
            f'localca_config = "{folder}/localca.conf"\n'
        )
        ca = folder / "ca"
        ca.mkdir()
        (folder / "localca.conf").write_text(
            f"statedir = {ca}\nsigningkey = {ca}/key.pem\nissuercert = {ca}/cert.pem\n"
            f"certserial = {ca}/serial\n"
        )
        (folder / "options").write_text(
            "--platform-manufacturer Proxmox\n--platform-version 9\n--platform-model QEMU\n"
        )
        hook = folder / EKHOOK.name
        shutil.copy(EKHOOK, hook)
        self.setup = setup_config(folder, tool=hook, tool_config=config, options=folder / "options")

    def volume(self, vmid: int) -> Path:
        return self.images / f"vm-{vmid}-disk-1.raw"

    def define(self, vmid: int, vm: uuid.UUID, *, more: str = "") -> None:
        volume = self.volume(vmid)
        if not volume.exists():
            with volume.open("wb") as file:
                file.truncate(4 * 1024 * 1024)
        (self.conf / f"{vmid}.conf").write_text(
            f"# tpmstate0: none:vm-1-disk-9\nname: web\nsmbios1: uuid={vm}\n"
            f"tpmstate0: local-lvm:vm-{vmid}-disk-1.raw,size=4M,version=v2.0\n{more}"
            f"\n[snapshot]\nsmbios1: uuid={OTHER_VM}\n"
        )

    def swtpm_setup(self, vmid: int) -> subprocess.CompletedProcess[str]:
        """At every start but of an incoming VM; without --vmid."""
        return subprocess.run(
            [
                *("swtpm_setup", "--tpmstate", f"file://{self.volume(vmid)}", "--createek"),
                *("--create-ek-cert", "--create-platform-cert", "--lock-nvram"),
                *("--config", self.setup, "--runas", "0", "--not-overwrite", "--tpm2", "--ecc"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @contextmanager
    def swtpm(self, vmid: int) -> Iterator[None]:
        pid_file = self.run / f"{vmid}.swtpm.pid"
        control = self.run / f"{vmid}.swtpm"
        process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpmstate"),
                f"backend-uri=file://{self.volume(vmid)},mode=0600",
                *("--ctrl", f"type=unixio,path={control},mode=0600"),
                *("--pid", f"file={pid_file}", "--terminate", "--tpm2"),
            ],
        )
        try:
            wait_until(control.exists, "the VM's swtpm")
            yield
        finally:
            process.kill()
            process.wait()
            pid_file.unlink(missing_ok=True)

    @contextmanager
    def qemu(self, vmid: int, vm: uuid.UUID, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process with the arguments and the lock of a QEMU."""
        path = self.run / f"{vmid}.pid"
        words: Sequence[str | Path] = (
            *(sys.executable, "-c", QEMU, path, "-id", str(vmid), "-name", "web,debug-threads=on"),
            *("-smbios", f"type=1,uuid={vm}", "-tpmdev", "emulator,id=tpmdev,chardev=tpmchar"),
            *more,
        )
        pipe = subprocess.PIPE
        process = subprocess.Popen(list(map(str, words)), stdin=pipe, stdout=pipe)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()
            process.communicate()
            path.unlink(missing_ok=True)

    def toml(self) -> str:
        return (
            f'state_dir = "{self.folder}/state"\n[listen]\naddress = "unix:{self.folder}/tenants"\n'
            f'insecure_plaintext = true\n[admin]\naddress = "unix:{self.folder}/admin"\n'
            '[tpm]\ntcti = "embedded"\n'
            f'[vtpm]\nenabled = true\nsocket = "{self.folder}/hooks"\nswtpm_user = "root"\n'
            f'helper = "{self.folder}/helper"\nstate_root = "{self.folder}/none"\n'
        )

    async def listed(self, vm: uuid.UUID = VM) -> dict[str, Any]:
        vms = (await get(f"unix:{self.folder}/admin", "/vms")).results()["vms"]
        assert isinstance(vms, list)
        return next((entry for entry in vms if entry["vm"] == str(vm)), {})

    async def until(self, *, running: bool, state: str | None = None) -> dict[str, Any]:
        async def so() -> bool:
            entry = await self.listed()
            return entry.get("running") is running and state in (None, entry.get("state"))

        await until_answered(so, f"running={running} state={state}")
        return await self.listed()


@pytest.fixture
def proxmox() -> Iterator[Proxmox]:
    folder = Path(tempfile.mkdtemp(prefix="pp-"))
    folder.chmod(0o755)
    yield Proxmox(folder)
    shutil.rmtree(folder)


@contextmanager
def helper(proxmox: Proxmox) -> Iterator[None]:
    with running_helper(
        proxmox.folder / "helper",
        status_root=proxmox.run,
        marks=proxmox.marks,
        work=proxmox.folder / "work",
        swtpm_user="root",
        more=("--platform", "proxmox"),
    ):
        yield


async def test_a_vm_s_life(proxmox: Proxmox) -> None:
    async with serving(proxmox.folder, proxmox.toml()):
        with helper(proxmox):
            proxmox.define(100, VM)
            made = await trio.to_thread.run_sync(proxmox.swtpm_setup, 100)
            assert made.returncode == 0, made.stdout + made.stderr
            entry = await proxmox.listed()
            assert (entry["state"], entry["name"], entry["running"]) == ("registered", "web", False)
            assert list(proxmox.marks.iterdir()) == []
            with proxmox.swtpm(100):
                with proxmox.qemu(100, VM) as process:
                    entry = await proxmox.until(running=True, state="confirmed")
                    assert {ek["alg"] for ek in entry["eks"]} == {"rsa2048", "p384"}
                    assert (entry["issuer"], entry["migrated"]) == ("delegate", False)
                    process.kill()
                    process.wait(LIMIT_S)
                    await proxmox.until(running=False)
            again = await trio.to_thread.run_sync(proxmox.swtpm_setup, 100)  # its next start
            assert again.returncode == 0, again.stdout + again.stderr
            with proxmox.swtpm(100), proxmox.qemu(100, VM):
                now = await proxmox.until(running=True, state="confirmed")
                assert (now["eks"], now["generation"]) == (entry["eks"], 1)


async def test_what_waits_for_a_migration_has_no_claims(proxmox: Proxmox) -> None:
    async with serving(proxmox.folder, proxmox.toml()):
        with helper(proxmox):
            proxmox.define(100, VM)
            assert (await trio.to_thread.run_sync(proxmox.swtpm_setup, 100)).returncode == 0
            with proxmox.swtpm(100), proxmox.qemu(100, VM, "-incoming", "unix:/x"):
                await trio.sleep(2)
                assert (await proxmox.listed())["running"] is False


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda p: (p.conf / "100.conf").unlink(), "100.conf: No such file"),
        (lambda p: p.define(100, VM, more="tpmstate0: x:vm-100-disk-7\n"), "tpmstate0 is not"),
        (lambda p: (p.conf / "100.conf").write_text("tpmstate0: a:vm-100-disk-1.raw\n"), "no uuid"),
    ],
)
async def test_a_vm_that_cannot_be_found_does_not_start(
    proxmox: Proxmox, spoil: Any, why: str
) -> None:
    """In words, and nothing is registered."""
    proxmox.define(100, VM)
    spoil(proxmox)
    async with serving(proxmox.folder, proxmox.toml()):
        with helper(proxmox):
            made = await trio.to_thread.run_sync(proxmox.swtpm_setup, 100)
            assert made.returncode != 0
            assert why in made.stdout + made.stderr
            assert await proxmox.listed() == {}


def test_a_real_qemu_locks_its_pid_file(tmp_path: Path) -> None:
    """What presence rests on."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("needs qemu-system-x86")
    path = tmp_path / "100.pid"
    words = [program, "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    with subprocess.Popen([*words, "-pidfile", str(path)]) as process:
        try:
            wait_until(lambda: path.exists() and path.read_text().strip() != "", "the pid file")
            locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
            inode = str(path.stat().st_ino)
            held = [words for words in locks if words[5].rpartition(":")[2] == inode]
            assert [(w[1], w[3], w[4]) for w in held] == [("POSIX", "WRITE", str(process.pid))]
        finally:
            process.kill()
