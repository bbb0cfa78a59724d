"""The host's side of the link with a real libvirt and QEMU: `make test-libvirt`, as root.

It runs in a mount namespace of its own, in which libvirt's folders are a test's: nothing of this
machine's libvirt is touched. Domains are of type qemu, so that no KVM is needed; no guest boots.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import LIMIT_S, get, serving, trusted_ak, wait_until
from vtpm_helpers import EKHOOK, VMHOOK, setup_config

from provider_proxy.model import TrustedHost
from provider_proxy.policy import UnsafeAcceptAny
from provider_proxy.query import encode_quote_query
from provider_proxy.verify import MemoryHistory, Verifier, new_challenge

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("TEST_LIBVIRT" not in os.environ, reason="opt-in: make test-libvirt"),
]

VM = uuid.UUID("0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b")
NAME = "trial:1"
OWN = ("/etc/libvirt", "/etc/provider-proxy", "/run/libvirt", "/var/lib/libvirt", "/var/log/swtpm")
QEMU_CONF = (
    'security_driver = "none"\nstdio_handler = "file"\ncgroup_controllers = []\nnamespaces = []\n'
)
DOMAIN = f"""<domain type='qemu'>
  <name>{NAME}</name><uuid>{VM}</uuid><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>
</domain>
"""


def virsh(*words: str | Path, good: bool = True) -> str:
    done = subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) == good, done.stderr
    return done.stdout + done.stderr


class LibvirtHost:
    """libvirtd by hand, with this project's hooks where it looks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.domain = folder / "domain.xml"
        self.domain.write_text(DOMAIN)
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
        hook_config.write_text(
            f'socket = "{self.socket}"\nlocalca_config = "{config}"\nlimit_s = 60\n'
        )
        xdg = folder / "xdg"
        xdg.mkdir()
        setup_config(xdg, tool=ekhook, tool_config=hook_config, options=options)
        self.xdg = xdg
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
        shutil.chown("/var/log/swtpm", "tss")

    def toml(self) -> str:
        return (
            f'state_dir = "{self.folder}/state"\n'
            f'[listen]\naddress = "unix:{self.folder}/tenants"\ninsecure_plaintext = true\n'
            f'[admin]\naddress = "unix:{self.folder}/admin"\n'
            f'[tpm]\ntcti = "embedded"\n[vtpm]\nenabled = true\nsocket = "{self.socket}"\n'
            f'[tenants.acme]\nidentities = ["uid:0"]\nvms = ["{VM}"]\n'
        )

    @contextmanager
    def libvirtd(self) -> Iterator[None]:
        with (self.folder / "libvirtd.log").open("ab") as log:
            process = subprocess.Popen(
                ["libvirtd"],
                env={**os.environ, "XDG_CONFIG_HOME": str(self.xdg), "HOME": "/root"},
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

    async def vm(self) -> dict[str, Any]:
        """The one entry of the registry."""
        results = (await get(f"unix:{self.folder}/admin", "/vms")).results()
        vms = results["vms"]
        assert isinstance(vms, list)
        (found,) = vms
        assert isinstance(found, dict)
        return found

    async def claims(self) -> dict[str, Any] | None:
        """What a tenant verifies; None where there are no claims."""
        address = f"unix:{self.folder}/tenants"
        history = MemoryHistory()
        host = TrustedHost(ak=await trusted_ak(address))
        challenge = new_challenge(mask=1, vm=VM, now_s=time.monotonic(), history=history)
        reply = await get(address, f"/verifier/quote?{encode_quote_query(challenge.request)}")
        if reply.status == 404:
            return None
        quote = Verifier(UnsafeAcceptAny()).verify(
            reply.body, challenge, host, history, now_s=time.monotonic()
        )
        assert quote.claims is not None
        return dict(quote.claims)

    async def until_confirmed(self) -> dict[str, Any]:
        with trio.fail_after(LIMIT_S):
            while True:
                entry = await self.vm()
                if entry["confirmed"] and entry["running"]:
                    return entry
                await trio.sleep(0.05)


@pytest.fixture
def host() -> Iterator[LibvirtHost]:
    folder = Path("/tmp/pp-libvirt")  # a unix socket's path is short
    folder.mkdir(mode=0o755)
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
        ["virsh", "-q", "-c", "qemu:///system", "list", "--all"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode == 0


async def run(*words: str | Path, good: bool = True) -> str:
    return await trio.to_thread.run_sync(lambda: virsh(*words, good=good))


async def test_a_domain_s_life(host: LibvirtHost) -> None:
    """define, start, save, restore, kill -9 of the daemon, libvirtd's restart, destroy, a new vTPM."""
    with host.libvirtd():
        async with serving(host.folder, host.toml()) as serve:
            await run("define", host.domain)
            await run("start", NAME)
            first = await host.until_confirmed()
            assert (first["name"], first["generation"], first["migrated"]) == (NAME, 1, False)
            claims = await host.claims()
            assert claims is not None
            assert (claims["confirmed"], claims["eks"]) == (True, first["eks"])
            assert len(first["eks"]) == 2
            await run("save", NAME, host.folder / "saved")
            assert await host.claims() is None
            await run("restore", host.folder / "saved")
            assert (await host.until_confirmed())["eks"] == first["eks"]
            serve.process.kill()
        async with serving(host.folder, host.toml()):
            assert (await host.until_confirmed())["eks"] == first["eks"]
            await run("destroy", NAME)
            assert await host.claims() is None
            await run("start", NAME)
            assert (await host.until_confirmed())["generation"] == 1
            await run("destroy", NAME)
            await run("undefine", NAME)
            await run("define", host.domain)
            await run("start", NAME)
            second = await host.until_confirmed()
            assert second["generation"] == 2
            assert not {str(ek) for ek in first["eks"]} & {str(ek) for ek in second["eks"]}
    async with serving(host.folder, host.toml()):
        with host.libvirtd():
            assert (await host.until_confirmed())["eks"] == second["eks"]
            wait_until(lambda: "running" in virsh("domstate", NAME), "the domain's reconnection")
            await run("destroy", NAME)
            assert await host.claims() is None
