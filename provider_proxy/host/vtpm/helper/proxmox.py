"""Which VMs with a vTPM are here on a Proxmox host: by QEMU's process, because there is no libvirt.

qemu-server, which is root, runs QEMU and swtpm as root and writes their process ids into its folder:
`VMID.pid`, which QEMU locks, and `VMID.swtpm.pid`. The two command lines tell the VM and the place of
its state. Whether a guest executes cannot be seen, with one exception: a QEMU that was started for an
incoming migration never counts, because nothing here shows when it begins to run. At the source a VM
counts until its QEMU ends, some tenths of a second after the guest runs elsewhere.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from provider_proxy.host.vtpm.helper.presence import MAX_DOMAINS, Presence
from provider_proxy.host.vtpm.helper.status import Domain, StatePlace

MAX_COMMAND_BYTES = 256 * 1024
MAX_PID_BYTES = 32
_PID_FILE_RE = re.compile(r"([1-9][0-9]{2,8})\.pid")
_SMBIOS_RE = re.compile(r"type=1(?:,[^,]*)*?,uuid=([0-9A-Fa-f-]{36})(?:,.*)?")
_STATE_RE = re.compile(r"(?:backend-uri=file|dir=|backend-uri=dir)(?:://)?(/[^,]*)(?:,.*)?")


class ProxmoxPresence(Presence):
    """Looks repeatedly at qemu-server's folder and the processes that it names."""

    def _domains(self) -> dict[uuid.UUID, Domain]:
        found: dict[uuid.UUID, Domain] = {}
        twice: set[uuid.UUID] = set()
        for name in os.listdir(self.folder)[:MAX_DOMAINS]:
            match = _PID_FILE_RE.fullmatch(name)
            domain = self._of(match[1]) if match else None
            if domain is not None:
                if domain.vm in found:
                    twice.add(domain.vm)
                found[domain.vm] = domain
        for vm in twice:
            del found[vm]
        return found

    def _of(self, vmid: str) -> Domain | None:
        """The VM with a number, from its QEMU's command line; None for a VM without a vTPM."""
        pid = self._pid_in(f"{vmid}.pid")
        words = [] if pid is None else self._command(pid)
        match = _SMBIOS_RE.fullmatch(_after(words, "-smbios"))
        if pid is None or match is None or not _after(words, "-tpmdev").startswith("emulator"):
            return None
        waits = "-incoming" in words
        return Domain(
            vm=uuid.UUID(match[1]),
            name=vmid,
            pid=pid,
            state="paused" if waits else "running",
            reason="migration" if waits else "booted",
            place=self._place(vmid),
            secret=None,
        )

    def _place(self, vmid: str) -> StatePlace:
        pid = self._pid_in(f"{vmid}.swtpm.pid")
        words = [] if pid is None else self._command(pid)
        match = _STATE_RE.fullmatch(_after(words, "--tpmstate"))
        if match is None:
            return StatePlace()  # a place without a state: nothing is read
        return StatePlace(path=Path(match[1]), is_file=match[0].startswith("backend-uri=file"))

    def _pid_in(self, name: str) -> int | None:
        """The process in a file of root's."""
        try:
            status = os.stat(name, dir_fd=self.folder, follow_symlinks=False)
            if not self._is_ours(status):
                return None
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.folder)
            with open(fd, "rb") as file:
                text = file.read(MAX_PID_BYTES).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
        return int(text) if re.fullmatch(r"[1-9][0-9]{0,9}", text) else None

    def _command(self, pid: int) -> list[str]:
        """The command line of a process of root's; empty where it is another user's, or has ended."""
        folder = self._proc / str(pid)
        try:
            if folder.stat().st_uid != self._owner:
                return []
            with (folder / "cmdline").open("rb") as file:
                data = file.read(MAX_COMMAND_BYTES)
        except (FileNotFoundError, ProcessLookupError):
            return []
        return data.decode("utf-8", "replace").split("\0")


def _after(words: list[str], option: str) -> str:
    """The value of an option; empty where it is not there."""
    place = words.index(option) + 1 if option in words else len(words)
    return words[place] if place < len(words) else ""
