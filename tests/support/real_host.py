"""A host on loopback that runs files and reboots: a daemon over a swtpm, an IMA list, a boot log."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from hashlib import sha1, sha256
from pathlib import Path

from boot_log import boot_events
from event_log_helpers import header, new
from helpers import free_port
from tpm_helpers import Swtpm, daemon_over, plain_config, tool

from provider_proxy.host.config.tables import Config, Listen, Logs, TenantRules
from provider_proxy.testing.broker import Broker

LOG_ALGORITHMS = {0x04: 20, 0x0B: 32}
File = tuple[str, bytes]


def ima_entry(path: str, content: bytes) -> tuple[str, bytes]:
    """A line of an ima-ng list, and what the kernel extends PCR 10's SHA-256 bank with."""
    digest = b"sha256:\0" + sha256(content).digest()
    name = path.encode() + b"\0"
    template = struct.pack("<I", len(digest)) + digest + struct.pack("<I", len(name)) + name
    line = f"10 {sha1(template).hexdigest()} ima-ng sha256:{sha256(content).hexdigest()} {path}\n"
    return line, sha256(template).digest()


class RealHost:
    """One host. Its port stays over reboots.

    Attributes:
        tcti: of its chip, for tools.
        grub: the boot loader of the next boot; other bytes are another one.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.chip = Swtpm(folder / "tpm")
        self.tcti = ""
        self.grub = b"grub"

    @property
    def rules(self) -> dict[str, object]:
        """What the watcher's file says of it."""
        return {
            "provider_ip": "127.0.0.1",
            "provider_port": self.port,
            "insecure_plaintext": True,
        }

    @contextmanager
    def power(self) -> Iterator[None]:
        """The chip is on; the firmware has measured itself, and the kernel's list is empty."""
        self.chip.start()
        try:
            with Broker(self.chip.tcti) as broker:
                self.tcti = broker.tcti
                (self.folder / "ima").write_text("")
                log = header(LOG_ALGORITHMS)
                events = boot_events(self.grub)
                for pcr, kind, data, measured in events:
                    log += new(pcr, kind, data, LOG_ALGORITHMS, measured=measured)
                self.extend(*((pcr, sha256(measured).digest()) for pcr, _, _, measured in events))
                (self.folder / "uefi").write_bytes(log)
                yield
        finally:
            self.chip.stop()

    def extend(self, *digests: tuple[int, bytes]) -> None:
        """Extend PCRs of the SHA-256 bank, one after the other."""
        words = [f"{pcr}:sha256={digest.hex()}" for pcr, digest in digests]
        tool(self.tcti, "tpm2_pcrextend", *words)

    def run(self, *files: File) -> None:
        """The kernel measures files."""
        for path, content in files:
            line, digest = ima_entry(path, content)
            with (self.folder / "ima").open("a") as lines:
                lines.write(line)
            self.extend((10, digest))

    def config(self) -> Config:
        made = plain_config(self.folder / "state", self.tcti)
        return replace(
            made,
            listen=Listen(address=(f"127.0.0.1:{self.port}",), insecure_plaintext=True),
            logs=Logs(ima=self.folder / "ima", uefi=self.folder / "uefi"),
            tenant_defaults=TenantRules(pcr_allow=0xFFFFFF, rate=1000.0, burst=1000),
        )

    @asynccontextmanager
    async def up(self, files: Sequence[File] = ()) -> AsyncIterator[None]:
        """From power on to power off, the daemon in between."""
        with self.power():
            self.run(*files)
            async with daemon_over(self.config()):
                yield

    def close(self) -> None:
        self.chip.close()


def pcr_0() -> str:
    """What PCR 0 holds after the firmware, in hex."""
    value = bytes(32)
    for pcr, _, _, measured in boot_events():
        if pcr == 0:
            value = sha256(value + sha256(measured).digest()).digest()
    return value.hex()
