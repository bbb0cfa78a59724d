"""A real libvirt for `make test-libvirt`: libvirtd by hand, with this project's hooks where it looks.

For root, in a mount namespace of its own, where libvirt's folders are a test's: nothing of this machine's
libvirt is touched. Domains are of type qemu, so that no KVM is needed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import LIMIT_S, get, until_answered, wait_until
from vtpm_helpers import EKHOOK, VMHOOK, running_helper, setup_config

OPT_IN = [
    pytest.mark.real,
    pytest.mark.skipif("TEST_LIBVIRT" not in os.environ, reason="opt-in: make test-libvirt"),
]
VIRSH_S = 120.0
QEMU_USER = "libvirt-qemu"
OWN = ("/etc/libvirt", "/etc/provider-proxy", "/run/libvirt", "/var/lib/libvirt", "/var/log/swtpm")
QEMU_CONF = (
    'security_driver = "none"\nstdio_handler = "file"\ncgroup_controllers = []\nnamespaces = []\n'
)
CONNECTION = ("virsh", "-q", "-c", "qemu:///system")


def virsh(*words: str | Path) -> str:
    """What it prints."""
    done = subprocess.run(
        [*CONNECTION, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=VIRSH_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def run(*words: str | Path) -> str:
    """The same, off trio's thread."""
    return await trio.to_thread.run_sync(lambda: virsh(*words))


class LibvirtHost:
    """libvirt's folders, and the hooks in them.

    Attributes:
        folder: the test's own, with a short path; everybody may read it.
        socket: the hooks', of the daemon.
        lines: a folder where QEMU may make sockets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for path in map(Path, OWN):
            source = folder / path.relative_to("/")
            source.mkdir(parents=True)
            path.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", source, path], check=True)
        Path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF)
        hooks = Path("/etc/libvirt/hooks/qemu.d")
        hooks.mkdir(parents=True)
        shutil.copy(VMHOOK, hooks / "provider-proxy")
        ekhook = Path("/etc/provider-proxy") / EKHOOK.name
        shutil.copy(EKHOOK, ekhook)
        localca = folder / "localca"
        localca.mkdir()
        shutil.chown(localca, "tss")
        config = localca / "localca.conf"
        config.write_text(
            f"statedir = {localca}\nsigningkey = {localca}/key.pem\n"
            f"issuercert = {localca}/cert.pem\ncertserial = {localca}/serial\n"
        )
        options = folder / "options"
        options.write_text(
            "--platform-manufacturer Acme\n--platform-version 1\n--platform-model Q\n"
        )
        self.socket = folder / "sock" / "hooks"
        self.socket.parent.mkdir()
        hook_config = Path("/etc/provider-proxy/vtpm-hook.toml")
        self.marks = folder / "marks"
        hook_config.write_text(
            f'socket = "{self.socket}"\nlocalca_config = "{config}"\nlimit_s = 60\n'
            f'marks = "{self.marks}"\n'
        )
        self._xdg = folder / "xdg"
        self._xdg.mkdir()
        setup_config(self._xdg, tool=ekhook, tool_config=hook_config, options=options)
        self.lines = folder / "lines"
        self.lines.mkdir()
        shutil.chown(self.lines, QEMU_USER)
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
        shutil.chown("/var/log/swtpm", "tss")

    def toml(self, tenants: str, *, listen: str, vtpm: str = "") -> str:
        """The daemon's configuration.

        Args:
            tenants: their tables, and others.
            listen: keys of `[listen]`.
            vtpm: more keys of `[vtpm]`.
        """
        return (
            f'state_dir = "{self.folder}/state"\n[listen]\n{listen}'
            f'[admin]\naddress = "unix:{self.folder}/admin"\n[tpm]\ntcti = "embedded"\n'
            f'[vtpm]\nenabled = true\nsocket = "{self.socket}"\n'
            f'helper = "{self.folder}/helper"\n{vtpm}{tenants}'
        )

    @contextmanager
    def libvirtd(self) -> Iterator[None]:
        """It runs; its domains outlive it."""
        with (self.folder / "libvirtd.log").open("ab") as log:
            process = subprocess.Popen(
                ["libvirtd"],
                env={**os.environ, "XDG_CONFIG_HOME": str(self._xdg), "HOME": "/root"},
                stdout=log,
                stderr=log,
                process_group=0,
            )
        try:
            wait_until(_answers, "libvirtd")
            yield
        finally:
            process.terminate()
            process.wait(LIMIT_S)

    @contextmanager
    def helper(self) -> Iterator[subprocess.Popen[bytes]]:
        """provider-proxy-vtpm runs, as root."""
        with running_helper(
            self.folder / "helper",
            status_root=Path("/run/libvirt/qemu"),
            marks=self.marks,
            work=self.folder / "work",
            swtpm_user="tss",
        ) as process:
            yield process

    async def listed(self) -> dict[uuid.UUID, dict[str, Any]]:
        """The registry, by VM."""
        results = (await get(f"unix:{self.folder}/admin", "/vms")).results()
        vms = results["vms"]
        assert isinstance(vms, list)
        return {uuid.UUID(vm["vm"]): vm for vm in vms}

    async def until_confirmed(self, vm: uuid.UUID) -> dict[str, Any]:
        """The VM's entry, once it runs and its vTPM was read."""

        async def confirmed() -> bool:
            entry = (await self.listed()).get(vm, {})
            return bool(entry.get("confirmed") and entry.get("running"))

        await until_answered(confirmed, "the confirmation")
        return (await self.listed())[vm]


@contextmanager
def libvirt_host() -> Iterator[LibvirtHost]:
    """A host whose domains are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="pp-"))  # a unix socket's path is short
    folder.chmod(0o755)
    try:
        yield LibvirtHost(folder)
    finally:
        for path in Path("/run/libvirt/qemu").glob("*.pid"):  # of a test that failed
            os.kill(int(path.read_text()), signal.SIGKILL)
        for own in OWN:
            subprocess.run(["umount", own], check=False, capture_output=True)
        shutil.rmtree(folder)


def _answers() -> bool:
    """True once libvirtd answers."""
    done = subprocess.run(
        [*CONNECTION, "list", "--all"], capture_output=True, timeout=LIMIT_S, check=False
    )
    return done.returncode == 0
