"""The package on a host of its own: a guest with a TPM-CRB, the kernel's /dev/tpmrm0, IMA and systemd.

    python tests/system/test_kvm.py PACKAGE

Installs the package, lets the socket start the daemon at the first question from outside, verifies,
replays the IMA list to the signed PCR 10, looks at what the unit's sandbox does, kills and halts the
daemon, reboots, verifies again, updates the kernel while policies are in force, tries how the kernel
gives a long IMA list, upgrades, purges. Prints a line for each thing that holds.

With RECORD=FOLDER in the environment, what was fetched before and after the update of the kernel is left
there: tests/vectors/kernel_update has such a record.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).with_name("kvm")))

import ima  # beside this file
import kernel_update
import machine
from machine import need, ok

BASE = Path("build/kvm/two-kernels.tar")
PROGRAM = Path(sys.executable).with_name("provider-proxy")
CONFIG = """
[listen]
tls_cert = "/etc/provider-proxy/tls.crt"
tls_key = "credential:secret_tls.key"
client_ca = "/etc/provider-proxy/ca.crt"
[admin]
address = "unix:/run/provider-proxy/admin"
[tpm]
tcti = "device:/dev/tpmrm0"
[tenant_defaults]
accept_unlisted = false
[tenants.outside]
identities = ["spiffe://provider-proxy/tenant/outside"]
pcr_allow = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
"""
SOCKET = "[Socket]\nListenStream=\nListenStream=0.0.0.0:8890\n"
ADMIN = (
    "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/provider-proxy/admin'); "
    "s.sendall(b'GET /readyz HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n'); "
    "print(s.recv(4096).decode().split('\\r\\n')[0])"
)
WATCHDOG_LIMIT_S = 60.0  # WatchdogSec is 30 s
RETURN_LIMIT_S = 120.0
T = TypeVar("T")
UNIT = "provider-proxy.service"


class Tenant:
    """A tenant outside the guest, by the commands of a checkout."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self._url = f"https://localhost:{port}"
        self._tls = ["--ca", "pki/ca.crt", "--cert", "pki/tenants/outside.crt"]
        self._tls += ["--key", "pki/tenants/outside.key"]

    def run(self, *words: str) -> dict[str, Any]:
        """Run a command; its JSON."""
        done = subprocess.run(
            [str(PROGRAM), "--log-level", "warning", *words, "--json"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        if done.returncode:
            raise machine.GuestError(f"{words[0]} gave {done.returncode}: {done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def pin(self) -> str:
        """Trust the proxy's word on its AK, as a test may; its name."""
        self.run("identity", self._url, *self._tls, "--save-ak", "ak.b64")
        pinned = self.run("pin", "add", "guest", "--ak-tpm", "ak.b64", "--pins", "pins")
        return str(pinned["ak_name"])

    def fetch(self, pcrs: str, *more: str) -> None:
        """Ask."""
        self.run("fetch", self._url, *self._tls, "--pcrs", pcrs, "--timeout-ms", "60000", *more)

    def fetch_all(self, name: str) -> None:
        """Ask for all PCRs and both logs, and keep what came in a folder of this name."""
        again(lambda: self.fetch(kernel_update.PCRS, "--pinned", "guest", "--pins", "pins"))
        kept = self.folder / name
        kept.mkdir()
        for file in ("evidence.json", "request.json"):
            shutil.copy(self.folder / file, kept)
        shutil.copy(self.folder / "ak.b64", kept)

    def attest(self, pcrs: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ask, and verify against the pin: what was verified, and what came."""
        pin = ["--pinned", "guest", "--pins", "pins"]
        self.fetch(pcrs, *pin)
        words = ["verify", "evidence.json", "--request", "request.json", "--insecure-any-state"]
        verified = self.run(*words, *pin)
        evidence = json.loads((self.folder / "evidence.json").read_bytes())
        return verified, evidence["results"]


def main() -> int:
    """Run all; the exit code says whether everything held."""
    package = Path(sys.argv[1]).resolve()
    depends = subprocess.run(
        ["dpkg-deb", "-f", str(package), "Depends"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [re.split(r"[ |]", part.strip())[0] for part in depends.split(",")]
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line
    )
    if not BASE.exists():
        BASE.parent.mkdir(parents=True, exist_ok=True)
        names += machine.kernels()
        machine.make_base(BASE.with_suffix(".part"), release["VERSION_CODENAME"], names)
        BASE.with_suffix(".part").rename(BASE)
    with tempfile.TemporaryDirectory(prefix="kvm-") as name, socket.socket() as sock:
        folder = Path(name)
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        sock.close()
        tenant = Tenant(folder, port)
        tenant.run("pki", "init", "pki", "--host", "localhost")
        tenant.run("pki", "tenant", "pki", "outside")
        disk(package, folder)
        guest = machine.Guest(folder, port)
        begin = time.monotonic()
        try:
            guest.start()
            ok(
                f"booted in {time.monotonic() - begin:.0f} s: {guest.sh('uname -sr; cat /proc/cmdline')}"
            )
            live(guest, tenant)
        except machine.GuestError as exc:
            print(f"FAILED: {exc}", file=sys.stderr)
            console = guest.sh(f"journalctl -b -u {UNIT} --no-pager | tail -30", check=False)
            print(console, file=sys.stderr)
            return 1
        finally:
            guest.stop()
    return 0


def disk(package: Path, folder: Path) -> None:
    """The guest's disk: package, certificates, configuration wait in /root."""
    pki = folder / "pki"
    machine.make_disk(
        BASE,
        folder,
        {
            "root/package.deb": package.read_bytes(),
            "root/config.toml": CONFIG.encode(),
            "root/socket.conf": SOCKET.encode(),
            "root/tls.crt": (pki / "server.crt").read_bytes(),
            "root/tls.key": (pki / "server.key").read_bytes(),
            "root/ca.crt": (pki / "ca.crt").read_bytes(),
            "root/securityfs.py": Path(__file__)
            .with_name("kvm")
            .joinpath("securityfs.py")
            .read_bytes(),
        },
    )


def live(guest: machine.Guest, tenant: Tenant) -> None:
    """The package's life in the guest."""
    install(guest)
    name = again(tenant.pin)
    ok(f"the first question, from outside, started the daemon; AK {name}")
    look(guest)
    before = attest(tenant)
    time.sleep(1.5)  # a status is told once a second at most
    status = show(guest, "StatusText")
    need(re.fullmatch(r"batch \d+: 1 leaf in \d+ ms; 0 waiting", status), f"status: {status}")
    guest.sh(f"systemctl reload {UNIT}")
    ok("reloaded")
    restarts(guest, tenant)
    embedded(guest, tenant)
    guest.reboot()
    ok("rebooted")
    need(show(guest, "ActiveState") == "inactive", "nobody has asked: the daemon sleeps")
    after = again(lambda: attest(tenant))
    need(after["was_reset"], "the reset is reported to the tenant")
    need(after["ak_name"] == before["ak_name"] == name, "the AK is the same")
    kernel_update.show(guest, tenant.folder, tenant.fetch_all)
    read_securityfs(guest)
    end(guest, tenant)


def install(guest: machine.Guest) -> None:
    """Install, configure, open the socket."""
    guest.sh("apt-get install -y -qq --no-install-recommends /root/package.deb", limit_s=300)
    ok("installed " + guest.sh("dpkg-query -W -f '${Version}' provider-proxy"))
    guest.sh(
        "cd /root && cp config.toml /etc/provider-proxy/provider-proxy.toml && "
        "cp tls.crt ca.crt /etc/provider-proxy/ && "
        "install -m 600 tls.key /etc/provider-proxy/secrets/tls.key && "
        "mkdir -p /etc/systemd/system/provider-proxy.socket.d && "
        "cp socket.conf /etc/systemd/system/provider-proxy.socket.d/ && "
        "systemctl daemon-reload && systemctl enable -q --now provider-proxy.socket"
    )
    need(show(guest, "ActiveState") == "inactive", "the socket listens, the daemon does not run")


def look(guest: machine.Guest) -> None:
    """What the unit's sandbox is."""
    need(show(guest, "ActiveState") == "active", "active after READY=1")
    ok(guest.sh(f"systemd-analyze security --no-pager --threshold=13 {UNIT} | tail -1"))
    ok(guest.sh("stat -c '%n %A %U:%G' /dev/tpmrm0"))
    logs = "/sys/kernel/security/integrity/ima/ascii_runtime_measurements"
    ok(guest.sh(f"stat -c '%n %A %U:%G' {logs} /sys/kernel/security/tpm0/binary* 2>&1 || true"))
    ok(
        guest.sh(
            "grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/$(pgrep -of 'proxy serve')/status"
        )
    )
    ok(guest.sh("stat -c '%n %A %U:%G' /run/credentials/provider-proxy.service/*"))
    need("200" in guest.sh(f'python3 -c "{ADMIN}"'), "/readyz answers on the unix socket")


def attest(tenant: Tenant) -> dict[str, Any]:
    """Verify from outside; replay the IMA list to the PCR 10 that was signed."""
    verified, results = tenant.attest("0,7,10")
    pcr10 = bytes.fromhex(verified["pcrs"]["10"])
    found = ima.matching_prefix(results["ima_measurement_list"], pcr10)
    need(found, "verified, and the IMA list leads to the signed PCR 10")
    assert found is not None
    uefi = results.get("mb_measurement_list")
    firmware = "no firmware log" if uefi is None else f"a firmware log of {len(uefi)} characters"
    ok(f"{found[0]} of {found[1]} entries, {firmware}; PCR 0 {verified['pcrs']['0'][:16]}…")
    return verified


def restarts(guest: machine.Guest, tenant: Tenant) -> None:
    """A daemon that is killed, and one that stands still."""
    pid = show(guest, "MainPID")
    guest.sh(f"kill -KILL {pid}")
    again(lambda: tenant.attest("0"))
    need(show(guest, "MainPID") != pid, "killed: systemd started another")
    pid = show(guest, "MainPID")
    guest.sh(f"kill -STOP {pid}")
    begin = time.monotonic()
    while show(guest, "MainPID") in (pid, "0"):
        if time.monotonic() - begin > WATCHDOG_LIMIT_S:
            raise machine.GuestError("the watchdog did nothing")
        time.sleep(1)
    ok(f"halted: the watchdog saw it, a new one after {time.monotonic() - begin:.0f} s")
    again(lambda: tenant.attest("0"))


def again(ask: Callable[[], T]) -> T:
    """Ask until there is an answer: a start takes longer than a client waits for a connection, where
    every instruction is emulated."""
    begin = time.monotonic()
    while True:
        try:
            return ask()
        except machine.GuestError:
            if time.monotonic() - begin > RETURN_LIMIT_S:
                raise
            time.sleep(1)


def embedded(guest: machine.Guest, tenant: Tenant) -> None:
    """A swtpm as the daemon's child, under the same sandbox; then the chip again."""
    config = "/etc/provider-proxy/provider-proxy.toml"
    guest.sh(
        f"cp {config} /root/kept && sed -i -e 's#device:/dev/tpmrm0#embedded#' "
        f"""-e '1i state_dir = "/var/lib/provider-proxy/trial"' {config} && systemctl restart {UNIT}"""
    )
    ok(f"the embedded swtpm, in the sandbox: {guest.sh('ps -C swtpm -o user=,args= | cut -c1-60')}")
    again(lambda: tenant.fetch("0,7"))  # without the pin: another TPM, another AK
    time.sleep(1.5)
    status = show(guest, "StatusText")
    need(status.startswith("batch 1: 1 leaf"), f"and it quotes: {status}")
    guest.sh(f"cp /root/kept {config} && systemctl restart {UNIT}")


def read_securityfs(guest: machine.Guest) -> None:
    """What the kernel does with a reader of a long list: why the daemon keeps the file open."""
    found = json.loads(guest.sh("python3 /root/securityfs.py", limit_s=600))
    ok("securityfs: {lines} lines, {bytes} bytes of IMA list on {kernel}".format_map(found))
    for asked, reading in found["whole"].items():
        ok(
            f"securityfs: whole, by read({asked}): {reading['reads']} reads of at most "
            f"{reading['largest']} bytes, {reading['s']:.2f} s"
        )
    ok(
        "securityfs: {new} new lines: {kept_s:.3f} s where the file was kept open, {again_s:.3f} s where "
        "it is opened again and read, {seek_s:.3f} s where it is opened again and sought".format_map(
            found
        )
    )
    need(
        found["kept_lines"] == found["new"],
        "a file that was kept open gives the new lines, no others",
    )
    need(found["kept_s"] < found["again_s"], "and costs less than a file that is opened again")


def end(guest: machine.Guest, tenant: Tenant) -> None:
    """Upgrade while it serves, and purge."""
    pid = show(guest, "MainPID")
    guest.sh(
        "cd /root && dpkg-deb -R package.deb next && sed -i 's/^Version: .*/&+next/' next/DEBIAN/control"
        " && dpkg-deb -b next next.deb && dpkg -i next.deb",
        limit_s=300,
    )
    need(show(guest, "MainPID") not in (pid, "0"), "upgraded: the daemon was restarted")
    again(lambda: tenant.attest("0"))
    need("active" in guest.sh("systemctl is-active provider-proxy.socket"), "the socket went on")
    guest.sh("apt-get purge -y -qq provider-proxy")
    left = guest.sh(
        "ls -d /etc/provider-proxy /var/lib/provider-proxy /run/provider-proxy", check=False
    )
    need(left.count("No such file") == 3, "purged: configuration and state are gone")
    need(not guest.sh("pgrep -f 'proxy serve' || true"), "nothing runs any more")


def show(guest: machine.Guest, what: str) -> str:
    """A property of the unit."""
    return guest.sh(f"systemctl show -P {what} {UNIT}")


if __name__ == "__main__":
    sys.exit(main())
