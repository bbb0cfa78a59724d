"""A guest with a TPM-CRB: Debian from this machine's own apt sources, QEMU, a swtpm, a root shell.

Root is needed to make the disk. The TPM is a swtpm outside the guest, which the guest sees as a chip:
its kernel has /dev/tpmrm0 and measures into it from the firmware on.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

# QEMU's accelerators. The emulator is the same everywhere; "kvm" is faster where the host's KVM is whole,
# which a host that is a guest itself often has not.
ACCEL = os.environ.get("ACCEL", "tcg")
OVMF = Path("/usr/share/OVMF")
DISK = "3G"
BOOT_LIMIT_S = 600.0  # emulated, on a busy machine; mostly half a minute
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "iproute2", "procps", "util-linux"),
    *("linux-image-cloud-amd64", "swtpm", "tpm2-tools"),
)
NETWORK = "[Match]\nName=en*\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n"
SHELL = """[Unit]
Description=The test's shell
After=multi-user.target
[Service]
ExecStart=/bin/bash -c 'echo @@READY@@; exec /bin/bash --norc --noediting'
StandardInput=tty-force
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS1
Environment=HOME=/root TERM=dumb PS1= PS2= LC_ALL=C.UTF-8
Restart=always
[Install]
WantedBy=multi-user.target
"""


class GuestError(Exception):
    """The guest did not do what it should."""


def ok(what: str) -> None:
    """Say that something holds."""
    print(f"ok: {what}", flush=True)


def need(condition: object, what: str) -> None:
    """Raises: GuestError where something does not hold."""
    if not condition:
        raise GuestError(what)
    ok(what)


def kernels() -> list[str]:
    """The packages of the newest two kernels in this machine's apt sources; one where they have one."""
    versions = said("apt-cache", "madison", "linux-image-cloud-amd64").splitlines()
    found: list[str] = []
    for line in versions:  # the newest first
        version = line.split("|")[1].strip()
        record = said("apt-cache", "show", f"linux-image-cloud-amd64={version}")
        (package,) = re.findall(r"^Depends:.*?(linux-image-\S+)", record, re.MULTILINE)[:1]
        if package not in found:
            found.append(package)
    return found[:2]


def make_base(tar: Path, suite: str, packages: Sequence[str]) -> None:
    """A Debian of these packages, by this machine's apt sources; kept for the next time."""
    folder = Path("/etc/apt/sources.list.d")
    sources = [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list"))]
    sources += sorted(folder.glob("*.sources"))
    run(
        *("mmdebstrap", "--quiet", "--variant=minbase", "--format=tar"),
        "--include=" + ",".join(sorted({*PACKAGES, *packages})),
        *(suite, tar),
        *(path for path in sources if path.exists()),
    )


def make_disk(tar: Path, folder: Path, files: dict[str, bytes]) -> None:
    """A disk with a Debian and some files, and its kernels and their initrds beside it."""
    root = folder / "root"
    root.mkdir()
    run("tar", "xf", tar, "-C", root)
    units = "etc/systemd/system"
    wanted = {
        **files,
        f"{units}/test-shell.service": SHELL.encode(),
        "etc/systemd/network/10-test.network": NETWORK.encode(),
        "etc/fstab": b"/dev/vda / ext4 rw 0 1\n",
        "etc/hostname": b"guest\n",
    }
    for name, data in wanted.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    run("systemctl", f"--root={root}", "enable", "test-shell.service", "systemd-networkd.service")
    for name in ("vmlinuz", "initrd.img"):
        for found in (root / "boot").glob(f"{name}-*"):
            shutil.copy(found, folder)
    run("mke2fs", "-q", "-t", "ext4", "-d", root, folder / "disk.img", DISK)
    shutil.rmtree(root)


def run(*words: str | Path) -> None:
    """Run a program. Raises: GuestError."""
    said(*words)


def said(*words: str | Path) -> str:
    """What a program writes. Raises: GuestError."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"{words[0]}: {done.stderr[-2000:] or done.stdout[-2000:]}")
    return done.stdout


class Guest:
    """A running guest.

    Args:
        folder: has disk, kernels and initrds; a short path, for sockets.
        port: of 127.0.0.1, which leads to the guest's 8890.

    Attributes:
        kernels: the releases that it has, the oldest first.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._processes: list[subprocess.Popen[bytes]] = []
        self._shell: socket.socket | None = None
        self.kernels = sorted(
            (path.name.removeprefix("vmlinuz-") for path in folder.glob("vmlinuz-*")),
            key=lambda release: [int(number) for number in re.findall(r"\d+", release)],
        )
        self._kernel = self.kernels[0]

    def start(self) -> None:
        """Power on; returns when its shell answers."""
        folder = self._folder
        (folder / "tpm").mkdir(exist_ok=True)
        self._spawn(
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}/tpm"),
            *("--ctrl", f"type=unixio,path={folder}/tpm.sock"),
        )
        firmware: list[str] = []
        if (OVMF / "OVMF_CODE_4M.fd").exists():  # with it there is a firmware's event log
            shutil.copy(OVMF / "OVMF_VARS_4M.fd", folder / "vars.fd")
            flash = "if=pflash,format=raw,file="
            firmware += ["-drive", f"{flash}{OVMF}/OVMF_CODE_4M.fd,readonly=on"]
            firmware += ["-drive", f"{flash}{folder}/vars.fd"]
        self._wait_for(folder / "tpm.sock")
        self._spawn(
            *("qemu-system-x86_64", "-machine", f"q35,accel={ACCEL}", "-cpu", "max"),
            *("-m", "1024", "-smp", "2"),
            *("-display", "none", "-nodefaults", "-no-reboot", *firmware),
            *("-serial", f"file:{folder}/console.log"),
            *("-serial", f"unix:{folder}/shell.sock,server=on,wait=off"),
            *("-drive", f"if=virtio,format=raw,file={folder}/disk.img"),
            *("-netdev", f"user,id=n,hostfwd=tcp:127.0.0.1:{self._port}-10.0.2.15:8890"),
            *("-device", "virtio-net-pci,netdev=n,romfile="),
            *("-chardev", f"socket,id=c,path={folder}/tpm.sock"),
            *("-tpmdev", "emulator,id=t,chardev=c", "-device", "tpm-crb,tpmdev=t"),
            *("-kernel", f"{folder}/vmlinuz-{self._kernel}"),
            *("-initrd", f"{folder}/initrd.img-{self._kernel}"),
            *("-append", "root=/dev/vda rw console=ttyS0 ima_policy=tcb quiet"),
        )
        self._wait_for(folder / "shell.sock")
        self._shell = socket.socket(socket.AF_UNIX)
        self._shell.connect(f"{folder}/shell.sock")
        self.until_up()

    def until_up(self) -> None:
        """Wait until its shell speaks; text sent before would fill a terminal without a reader."""
        try:
            self._read_until(re.compile("@@READY@@"), BOOT_LIMIT_S)
        except GuestError as exc:
            console = (self._folder / "console.log").read_text(errors="replace")
            raise GuestError(f"the guest does not come up: {console[-2000:]}") from exc
        self.sh("systemctl is-system-running --wait || true", limit_s=BOOT_LIMIT_S)

    def sh(self, script: str, *, limit_s: float = 120.0, check: bool = True) -> str:
        """Run a script as root; its output.

        Raises:
            GuestError: it failed, or took too long.
        """
        assert self._shell is not None
        self._drop_input()
        mark = f"{time.monotonic_ns():x}"
        coded = base64.b64encode(script.encode()).decode()
        line = f"echo '@@''{mark}'; echo {coded} | base64 -d | bash 2>&1; echo '@@'\"{mark} $?@\"\n"
        assert len(line) < 4000, "a terminal's line is no longer"
        self._shell.settimeout(limit_s)
        self._shell.sendall(line.encode())
        found = self._read_until(
            re.compile(rf"@@{mark}\r?\n(.*)@@{mark} (\d+)@", re.DOTALL), limit_s
        )
        output = found[1].replace("\r\n", "\n")
        if check and found[2] != "0":
            raise GuestError(f"{script!r} gave {found[2]}: {output}")
        return output.strip()

    def _drop_input(self) -> None:
        assert self._shell is not None
        self._shell.settimeout(0.05)
        try:
            while self._shell.recv(65536):
                pass
        except TimeoutError:
            return

    def _read_until(self, pattern: re.Pattern[str], limit_s: float) -> re.Match[str]:
        assert self._shell is not None
        data, deadline = b"", time.monotonic() + limit_s
        while (left := deadline - time.monotonic()) > 0:
            self._shell.settimeout(left)
            try:
                data += self._shell.recv(65536)
            except TimeoutError:
                break
            if self._processes[-1].poll() is not None:
                break
            if (match := pattern.search(data.decode(errors="replace"))) is not None:
                return match
        raise GuestError(f"no answer in {limit_s:g} s: {data[-500:]!r}")

    def reboot(self, kernel: str | None = None) -> None:
        """In order, then power off and on: the firmware's warm start hangs in the emulator. Returns when
        the shell answers again; the TPM has been reset, and kept its state.

        Args:
            kernel: one of `kernels`; None for the one that it ran.
        """
        self.sh("systemd-run -q --on-active=1 systemctl reboot")
        try:
            self._processes[-1].wait(BOOT_LIMIT_S)
        except subprocess.TimeoutExpired as exc:
            raise GuestError("the guest does not go down") from exc
        self.stop()
        self._kernel = kernel or self._kernel
        for name in ("tpm.sock", "shell.sock"):
            (self._folder / name).unlink(missing_ok=True)
        self.start()

    def stop(self) -> None:
        """Power off, by pulling the plug where the guest still runs."""
        if self._shell is not None:
            self._shell.close()
        while self._processes:
            process = self._processes.pop()
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _spawn(self, *words: str) -> None:
        log = (self._folder / f"{words[0]}.log").open("wb")
        self._processes.append(
            subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        )
        log.close()

    def _wait_for(self, path: Path) -> None:
        for _ in range(200):
            if path.is_socket():
                return
            if self._processes[-1].poll() is not None:
                break
            time.sleep(0.05)
        log = next(self._folder.glob("qemu*.log"), None) or self._folder / "swtpm.log"
        raise GuestError(f"no {path.name}: {log.read_text()}")
