"""A guest that boots, for `make test-libvirt`: its files, its domain, and the tenant's line to its agent.

Debian's cloud kernel with an initramfs of busybox, tpm2-tools and their libraries, made of this
machine's files and what the Makefile unpacked into `.guest`. The line is a serial port; every wait ends.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

import trio
from challenges import encode_challenge
from places import ROOT, SYSTEM

from provider_proxy.errors import TpmError
from provider_proxy.trust.registration.round import FORMAT_ONE

NV_RSA, NV_ECC = "0x01c00002", "0x01c00016"
EK_RSA, EK_ECC = "0x81010001", "0x81010016"
READY = "agent: ready"
PARTS = ROOT / ".guest"
KERNEL = PARTS / "vmlinuz"
INIT = SYSTEM / "guest/init"
MEASURED_PCR = 8
BOOT_S = (
    240.0  # some 10 s on two idle cores without KVM; two guests at once on a busy machine take more
)
ANSWER_S = 120.0  # making a key takes some seconds there
MAX_ANSWER_BYTES = 64 * 1024
TCTI = "libtss2-tcti-device.so.0"  # tpm2-tools opens it by name
TOOLS = (
    *("activatecredential", "createak", "evictcontrol", "flushcontext", "nvread"),
    *("pcrextend", "policysecret", "quote", "readpublic", "startauthsession"),
)


def libraries(program: Path) -> set[Path]:
    """The files that the loader would take for a program or a library."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    words = (word for line in said.splitlines() for word in line.split())
    return {Path(word) for word in words if word.startswith("/")}


def make_initramfs(path: Path) -> None:
    """Not compressed: that would cost the guest more than it saves."""
    tpm2 = Path(shutil.which("tpm2") or "/usr/bin/tpm2")
    root = path.with_suffix(".d")
    for name in ("bin", "dev", "lib", "lib64", "proc", "run", "sys"):
        (root / name).mkdir(parents=True)
    shutil.copy(INIT, root / "init")
    shutil.copy(PARTS / "busybox", root / "bin/busybox")
    shutil.copy(tpm2, root / "bin/tpm2")
    for tool in TOOLS:
        (root / f"bin/tpm2_{tool}").symlink_to("tpm2")
    applets = subprocess.run(
        [PARTS / "busybox", "--list"], capture_output=True, text=True, check=True
    )
    for applet in applets.stdout.split():
        if not (root / "bin" / applet).exists():
            (root / "bin" / applet).symlink_to("busybox")
    (tcti,) = {lib.parent / TCTI for lib in libraries(tpm2) if lib.name.startswith("libtss2-esys")}
    for library in {tcti} | libraries(tpm2) | libraries(tcti):
        folder = "lib64" if library.name.startswith("ld-linux") else "lib"
        shutil.copy(library, root / folder)
    names = "\n".join(str(found.relative_to(root)) for found in sorted(root.rglob("*")))
    with path.open("wb") as archive:
        subprocess.run(
            [PARTS / "busybox", "cpio", "-o", "-H", "newc"],
            cwd=root,
            input=names.encode(),
            stdout=archive,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )
    shutil.rmtree(root)


def make_boot_files(folder: Path) -> None:
    """What `Guest` boots. A copy of the kernel too: libvirt gives what a domain names to QEMU's user."""
    shutil.copy(KERNEL, folder / "vmlinuz")
    make_initramfs(folder / "initramfs")


def measured() -> str:
    """What PCR 8 of a guest that has just booted holds, hex: its init, extended once."""
    init = hashlib.sha256(INIT.read_bytes()).digest()
    return hashlib.sha256(bytes(32) + init).hexdigest()


class RefusedByGuest(TpmError):
    """The guest's tools failed; `code` is its TPM's, where they say one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What is registered of a VM: `registration.Keys`."""

    ak_public: bytes
    ek_public: bytes
    ek_cert: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A VM and the tenant's line to the agent in it.

    Attributes:
        folder: with what it boots, and where QEMU makes sockets and writes.
    """

    name: str
    vm: uuid.UUID
    folder: Path

    @property
    def _console(self) -> Path:
        return self.folder / f"{self.name}.console"

    @property
    def _line(self) -> Path:
        return self.folder / f"{self.name}.line"

    @property
    def domain(self) -> str:
        """For `virsh define`. Without ACPI the guest does not find its TPM."""
        return f"""<domain type='qemu'>
  <name>{self.name}</name><uuid>{self.vm}</uuid><memory unit='MiB'>160</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{self.folder}/vmlinuz</kernel><initrd>{self.folder}/initramfs</initrd>
    <cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <serial type='file'><source path='{self._console}'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{self._line}'/><target port='1'/></serial>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
  </devices>
</domain>
"""

    async def until_up(self) -> None:
        """Wait until the agent reads its line; after a restore it does so at once, and says nothing."""
        with trio.move_on_after(BOOT_S):
            while READY not in self._said():  # noqa: ASYNC110  # another machine's
                await trio.sleep(0.1)
            return
        raise AssertionError(f"{self.name} has not come up in {BOOT_S:g} s: {self._said()[-2000:]}")

    def _said(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    async def clock(self) -> tuple[str, str]:
        """Seconds since it booted, by its own clock; the id of that boot."""
        seconds, boot = (await self.ask("up")).decode().split()
        return seconds, boot

    async def ask(self, word: str, argument: str = "") -> bytes:
        """One line to the agent, one back.

        Raises:
            RefusedByGuest: the agent's tools failed.
        """
        answer = b""
        with trio.fail_after(ANSWER_S):
            async with await trio.open_unix_socket(self._line) as line:
                await line.send_all(f"{word} {argument}\n".encode("ascii"))
                while not answer.endswith(b"\n"):
                    data = await line.receive_some(4096)
                    assert data, f"{self.name} has hung up after {answer!r}"
                    answer += data
                    assert len(answer) < MAX_ANSWER_BYTES
        how, _, text = answer.decode("ascii").partition(" ")
        said = base64.b64decode(text, validate=False)
        if how != "ok":
            words = said.decode(errors="replace")
            codes = re.findall(r"\(0x([0-9A-Fa-f]+)\) - tpm:", words)
            code = int(codes[-1], 16) if codes else 0
            if code & FORMAT_ONE:
                code &= 0xBF  # without the parameter's number
            last = words.strip().splitlines()[-2:]
            raise RefusedByGuest(f"{self.name}: {word}: {' '.join(last)}", code=code)
        return said

    async def activate(self, credential: bytes, secret: bytes) -> bytes:
        """TPM2_ActivateCredential of vAK and EK, in the guest."""
        blob = base64.b64encode(encode_challenge(credential, secret)).decode()
        return await self.ask("activate", blob)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestTpm:
    """`registration.TpmIdentity` of a guest, with keys that need not be its own."""

    guest: Guest
    identity: Keys

    async def activate_credential(self, credential: bytes, secret: bytes) -> bytes:
        return await self.guest.activate(credential, secret)
