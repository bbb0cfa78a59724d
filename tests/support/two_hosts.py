"""Two KVM hosts on one machine, for migrations: each with namespaces, libvirt's folders, a libvirtd,
hooks, a helper and a daemon of its own, and a pair of network devices between them.

For root. Domains are of type qemu and boot no guest: firmware alone is enough for a vTPM to move. What a
QEMU says at a second monitor of its own, which libvirt does not know, is the truth that claims are held
against.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from helpers import LIMIT_S, wait_until
from libvirt_helpers import QEMU_CONF, QEMU_USER
from places import ROOT
from vtpm_helpers import EKHOOK, SECRETHOOK, VMHOOK, setup_config

OWN = (
    *("/etc/libvirt", "/etc/provider-proxy", "/run/libvirt", "/var/lib/libvirt"),
    *("/var/log/libvirt", "/var/log/swtpm", "/var/cache/libvirt"),
)
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
VIRSH_S = 120.0
INIT = """
set -e
cd "$1"; shift
hostname "$NAME"
for path in "$@"; do mkdir -p "$path"; mount --bind "./$path" "$path"; done
mount --bind ./hosts /etc/hosts
ip link set lo up
echo ready
while sleep 3600; do :; done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A VM, as both hosts define it."""

    name: str
    vm: uuid.UUID
    secret: uuid.UUID | None = None

    def xml(self, folder: Path) -> str:
        encryption = "" if self.secret is None else f"<encryption secret='{self.secret}'/>"
        return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{self.name}</name><uuid>{self.vm}</uuid><memory unit='MiB'>48</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
  <devices>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'>{encryption}</backend></tpm>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{folder}/{self.name}.qmp,server=on,wait=off'/>
  </qemu:commandline>
</domain>
"""


class Host:
    """One of the two.

    Attributes:
        folder: with libvirt's folders, the daemon's state and sockets, for it alone.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.lines = Path("/run/libvirt/lines")  # the same path on both: a domain names it
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lay()
        self._namespaces = subprocess.Popen(
            [
                *("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork"),
                *("--mount-proc", "--propagation", "private", "bash", "-c", INIT, "init"),
                *(folder, *OWN),
            ],
            env={**os.environ, "NAME": f"host{name}"},
            stdout=subprocess.PIPE,
            process_group=0,
        )
        assert self._namespaces.stdout is not None
        assert self._namespaces.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{self._namespaces.pid}/task/{self._namespaces.pid}/children")
        self.init = int(children.read_text().split()[0])

    def _lay(self) -> None:
        for own in OWN:
            (self.folder / own.lstrip("/")).mkdir(parents=True)
        etc = self.folder / "etc/libvirt"
        (etc / "qemu.conf").write_text(QEMU_CONF)
        (etc / "libvirtd.conf").write_text(
            'listen_tls = 0\nlisten_tcp = 1\nauth_tcp = "none"\nauth_unix_rw = "none"\n'
            f'auth_unix_ro = "none"\nlisten_addr = "{ADDRESSES[self.name]}"\n'
            f'host_uuid = "{uuid.UUID(int=ord(self.name))}"\n'
        )
        hooks = etc / "hooks/qemu.d"
        hooks.mkdir(parents=True)
        shutil.copy(VMHOOK, hooks / "provider-proxy")
        hook_folder = self.folder / "etc/provider-proxy"
        shutil.copy(EKHOOK, hook_folder)
        config = hook_folder / "vtpm-hook.toml"
        localca = self.folder / "localca"
        localca.mkdir()
        shutil.chown(localca, "tss")
        (localca / "localca.conf").write_text(
            f"statedir = {localca}\nsigningkey = {localca}/key.pem\n"
            f"issuercert = {localca}/cert.pem\ncertserial = {localca}/serial\n"
        )
        (self.folder / "options").write_text(
            "--platform-manufacturer Acme\n--platform-version 1\n--platform-model Q\n"
        )
        config.write_text(
            f'socket = "{self.folder}/hooks"\nmarks = "{self.folder}/marks"\nlimit_s = 60\n'
            f'localca_config = "{localca}/localca.conf"\n'
        )
        (self.folder / "xdg").mkdir()
        setup_config(
            self.folder / "xdg",
            tool=Path("/etc/provider-proxy") / EKHOOK.name,
            tool_config=Path("/etc/provider-proxy/vtpm-hook.toml"),
            options=self.folder / "options",
        )
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} host{name}\n" for name, address in ADDRESSES.items())
        )
        lines = self.folder / "run/libvirt/lines"
        lines.mkdir()
        shutil.chown(lines, QEMU_USER)
        (self.folder / "work").mkdir()
        shutil.chown(self.folder / "var/log/swtpm", "tss")
        for path in (self.folder, *self.folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
        (self.folder / "daemon.toml").write_text(
            f'state_dir = "{self.folder}/state"\n'
            f'[listen]\naddress = "unix:{self.folder}/tenants"\ninsecure_plaintext = true\n'
            f'[admin]\naddress = "unix:{self.folder}/admin"\n[tpm]\ntcti = "embedded"\n'
            f'[vtpm]\nenabled = true\nsocket = "{self.folder}/hooks"\n'
            f'helper = "{self.folder}/helper"\n'
        )

    # --- processes ----------------------------------------------------------------------------------

    def enter(self, *words: str | Path) -> list[str]:
        """A command line that runs in this host."""
        inside = ("nsenter", "-t", str(self.init), "-m", "-n", "-u", "-i", "-p", "--")
        return [*inside, *map(str, words)]

    def start(self, what: str) -> None:
        """Start "libvirtd", "helper" or "daemon", and wait until it answers."""
        program: list[str | Path] = [sys.executable, "-m", "provider_proxy"]
        commands: dict[str, list[str | Path]] = {
            "libvirtd": ["libvirtd", "--listen", "-p", "/run/libvirt/own.pid"],
            "helper": [
                *program,
                "vtpm-helper",
                *("--socket", self.folder / "helper", "--marks", self.folder / "marks"),
                *("--work", self.folder / "work", "--daemon-user", "root"),
                *("--secrets", self.folder / "secrets"),
            ],
            "daemon": [*program, "serve", "--config", self.folder / "daemon.toml"],
        }
        env = {**os.environ, "XDG_CONFIG_HOME": str(self.folder / "xdg"), "HOME": "/root"}
        with (self.folder / f"{what}.log").open("ab") as log:
            self._processes[what] = subprocess.Popen(
                self.enter(*commands[what]),
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        checks = {
            "libvirtd": lambda: self.try_virsh("list").returncode == 0,
            "helper": lambda: (self.folder / "helper").exists(),
            "daemon": lambda: self.listed() is not None,
        }
        wait_until(checks[what], f"{what} of {self.name}")

    def kill(self, what: str, number: int = signal.SIGKILL) -> None:
        """End one of them; its domains live on."""
        process = self._processes.pop(what)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)
        process.wait(LIMIT_S)
        if what == "helper":
            (self.folder / "helper").unlink(missing_ok=True)

    def close(self) -> None:
        """All that runs in this host ends."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        for process in (*self._processes.values(), self._namespaces):
            process.wait(LIMIT_S)
            if process.stdout is not None:
                process.stdout.close()

    # --- libvirt ------------------------------------------------------------------------------------

    def give_secrets(self) -> None:
        """provider-proxy-vtpm-secret, again and again, as its socket starts it."""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.folder / "secrets"))
        sock.listen()
        fd = sock.fileno()
        loop = f"while :; do {SECRETHOOK} 3<&{fd}; done"
        self._processes["secrets"] = subprocess.Popen(
            self.enter("bash", "-c", loop), pass_fds=(fd,), process_group=0
        )
        sock.close()

    def secret(self, domain: Domain, *, private: bool) -> None:
        """libvirt's secret of an encrypted vTPM; the same value on both hosts."""
        path = self.folder / "secret.xml"
        path.write_text(
            f"<secret ephemeral='no' private='{'yes' if private else 'no'}'>"
            f"<uuid>{domain.secret}</uuid><usage type='vtpm'><name>{domain.name}</name></usage></secret>"
        )
        self.virsh("secret-define", path)
        value = self.folder / "value"
        value.write_text(passphrase(domain.name))
        self.virsh("secret-set-value", str(domain.secret), "--file", value, "--plain")
        value.unlink()

    def try_virsh(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.enter("virsh", "-q", "-c", "qemu:///system", *words),
            capture_output=True,
            text=True,
            timeout=VIRSH_S,
            check=False,
        )

    def virsh(self, *words: str | Path) -> str:
        done = self.try_virsh(*words)
        assert done.returncode == 0, f"{self.name}: virsh {words}: {done.stderr}"
        return done.stdout

    def define(self, domain: Domain) -> None:
        path = self.folder / f"{domain.name}.xml"
        path.write_text(domain.xml(self.lines))
        self.virsh("define", path)

    def migration(self, domain: Domain, to: Host, *more: str) -> subprocess.Popen[str]:
        """A live migration that has begun."""
        words = ("migrate", domain.name, f"qemu+tcp://host{to.name}/system", "--live", "--p2p")
        return subprocess.Popen(
            self.enter("virsh", "-q", "-c", "qemu:///system", *words, "--persistent", *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def qemu_pid(self, domain: Domain) -> int | None:
        """Its QEMU, as this machine numbers it."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                mounts = (path / "ns/mnt").readlink()
            except OSError:
                continue
            is_it = any(f"guest={domain.name}," in word.decode(errors="replace") for word in words)
            if is_it and mounts == Path(f"/proc/{self.init}/ns/mnt").readlink():
                return int(path.name)
        return None

    # --- the truth, and what is said of it ------------------------------------------------------------

    def runs(self, domain: Domain) -> bool:
        """What its QEMU says at a monitor that libvirt does not know."""
        path = self.folder / "run/libvirt/lines" / f"{domain.name}.qmp"
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(2.0)
                sock.connect(str(path))
                lines = sock.makefile("rb")
                lines.readline()
                sock.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-status"}')
                for line in lines:
                    answer = json.loads(line)
                    if "status" in answer.get("return", {}):
                        return bool(answer["return"]["status"] == "running")
        except (OSError, ValueError):
            return False
        return False

    def listed(self) -> dict[str, dict[str, Any]] | None:
        """The daemon's list, by VM; None where it does not answer."""
        connection = HTTPConnection("localhost", timeout=5)
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(5)
            connection.sock.connect(str(self.folder / "admin"))
            connection.request("GET", "/vms")
            vms = json.loads(connection.getresponse().read())["results"]["vms"]
        except (OSError, ValueError, KeyError):
            return None
        finally:
            connection.close()
        return {vm["vm"]: vm for vm in vms}

    def claim(self, domain: Domain) -> dict[str, Any] | None:
        """What a tenant of this host is told of a VM; None where it is told nothing."""
        entry = (self.listed() or {}).get(str(domain.vm))
        return entry if entry is not None and entry["running"] and entry["eks"] else None

    def eks(self, domain: Domain) -> frozenset[str] | None:
        """What a claim says."""
        entry = self.claim(domain)
        return None if entry is None else frozenset(ek["spki_sha256"] for ek in entry["eks"])

    def until_claimed(self, domain: Domain, limit_s: float = LIMIT_S) -> float:
        """Wait for claims; how long it took, in seconds."""
        begin = time.monotonic()
        while self.claim(domain) is None:
            if time.monotonic() - begin > limit_s:
                raise AssertionError(f"no claims on {self.name}: {self.log()}")
            time.sleep(0.02)
        return time.monotonic() - begin

    def until_silent(self, domain: Domain) -> None:
        wait_until(lambda: self.claim(domain) is None, f"the end of claims on {self.name}")

    def log(self) -> str:
        """The ends of all logs."""
        return "\n".join(
            f"--- {self.name}: {path.name}\n{path.read_text()[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


def passphrase(name: str) -> str:
    """Of the domain's vTPM."""
    return f"passphrase of {name}"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, with all that runs on them."""
    folder = Path(tempfile.mkdtemp(prefix="pp2-"))
    folder.chmod(0o755)
    hosts: list[Host] = []
    try:
        for name in ADDRESSES:
            (folder / name).mkdir()
            hosts.append(Host(name, folder / name))
        a, b = hosts
        _connect(a, b)
        for host in hosts:
            for what in ("libvirtd", "helper", "daemon"):
                host.start(what)
        yield a, b
    finally:
        for host in hosts:
            host.close()
        shutil.rmtree(folder, ignore_errors=True)


def _connect(a: Host, b: Host) -> None:
    peer = ("peer", "name", "eth0", "netns", f"/proc/{b.init}/ns/net")
    words = ("ip", "link", "add", "eth0", "type", "veth", *peer)
    subprocess.run(["nsenter", "-t", str(a.init), "-n", *words], check=True)
    for host in (a, b):
        for more in (
            ("addr", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            subprocess.run(["nsenter", "-t", str(host.init), "-n", "ip", *more], check=True)
