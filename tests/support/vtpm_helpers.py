"""What the tests of the link share: keys, hooks' messages, recorded command lines, libvirt's folders, and
swtpm_setup as libvirt runs it."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from helpers import LIMIT_S, wait_until
from places import HOOKS

from provider_proxy.host.vtpm.entries import Ek, Origin, ek_of
from provider_proxy.host.vtpm.requests import CertificateRequest, EkPublicKey
from provider_proxy.host.vtpm.sightings import Holds, Reading, Sighting

EKHOOK = HOOKS / "provider-proxy-ekhook"
VMHOOK = HOOKS / "provider-proxy-vmhook"
SECRETHOOK = HOOKS / "provider-proxy-vtpm-secret"
VM = uuid.UUID("8a1f0e5c-3f0b-4f6e-9a51-3d1c7a1e0001")
OTHER_VM = uuid.UUID("8a1f0e5c-3f0b-4f6e-9a51-3d1c7a1e0002")


def rsa_key(number: int = 0, bits: int = 2048) -> rsa.RSAPublicKey:
    """Different keys for different numbers."""
    return _rsa_key(number, bits)


def ecc_key(number: int = 0, curve: str = "secp384r1") -> ec.EllipticCurvePublicKey:
    return _ecc_key(number, curve)


@cache
def _rsa_key(_number: int, bits: int) -> rsa.RSAPublicKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits).public_key()


@cache
def _ecc_key(_number: int, curve: str) -> ec.EllipticCurvePublicKey:
    curves: dict[str, ec.EllipticCurve] = {
        "secp256r1": ec.SECP256R1(),
        "secp384r1": ec.SECP384R1(),
    }
    return ec.generate_private_key(curves[curve]).public_key()


def certificate_request(
    key: EkPublicKey, *, vm: uuid.UUID = VM, name: str = "web", kind: str = "ek"
) -> CertificateRequest:
    return CertificateRequest(
        kind="ek" if kind == "ek" else "platform",
        public_key=key,
        vm=vm,
        vmid=f"{name}:{vm}",
        spec_family="2.0",
        spec_level=0,
        spec_revision=164,
        manufacturer="id:00001014",
        model="swtpm",
        version="id:20191023",
    )


def key_fields(key: EkPublicKey) -> dict[str, str]:
    """A key as the hook's message has it."""
    if isinstance(key, rsa.RSAPublicKey):
        return {"type": "rsa", "modulus": f"{key.public_numbers().n:x}"}
    numbers = key.public_numbers()
    chars = key.key_size // 4
    return {
        "type": "ecc",
        "curve": key.curve.name,
        "x": f"{numbers.x:0{chars}x}",
        "y": f"{numbers.y:0{chars}x}",
    }


def ek_argument(key: EkPublicKey) -> str:
    """A key as swtpm_setup writes it behind --ek."""
    fields = key_fields(key)
    if fields["type"] == "rsa":
        return fields["modulus"]
    return f"x={fields['x']},y={fields['y']},id={fields['curve']}"


def certify(key: EkPublicKey, *, vm: uuid.UUID = VM, name: str = "web", **more: Any) -> bytes:
    """The line of provider-proxy-ekhook."""
    values = {
        "version": 1,
        "op": "certify",
        "kind": "ek",
        "key": key_fields(key),
        "vmid": f"{name}:{vm}",
        "spec_family": "2.0",
        "spec_level": 0,
        "spec_revision": 164,
        "manufacturer": "id:00001014",
        "model": "swtpm",
        "tpm_version": "id:20191023",
    } | more
    return json.dumps(values).encode() + b"\n"


def ek_of_number(number: int = 0) -> Ek:
    """Different ECC EKs for different numbers."""
    return ek_of(ecc_key(number))


def sighting(
    *,
    vm: uuid.UUID = VM,
    run: str = "b/1/1",
    runs: bool = True,
    origin: Origin = "here",
    eks: Sequence[Ek] = (),
    reading: Reading | None = None,
) -> Sighting:
    """What provider-proxy-vtpm says of a VM."""
    reading = reading or ("read" if eks else "unread")
    return Sighting(
        vm=vm,
        name="web",
        run=run,
        runs=runs,
        origin=origin,
        holds=Holds(reading=reading, eks=tuple(sorted(eks, key=lambda ek: ek.alg))),
    )


def ask(path: Path, line: bytes, *, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """One exchange at the hooks' socket; empty where the daemon only hangs up."""
    if launcher:
        program = (
            "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n"
            "s.sendall(sys.stdin.buffer.read())\nsys.stdout.write(s.makefile().read())"
        )
        done = subprocess.run(
            [*launcher, "/usr/bin/python3", "-IS", "-c", program, str(path)],
            input=line,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        answer = done.stdout
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(LIMIT_S)
            sock.connect(str(path))
            sock.sendall(line)
            answer = sock.makefile("rb").read()
    values: dict[str, Any] = json.loads(answer) if answer else {}
    return values


# --- libvirt's side ---------------------------------------------------------------------------------


QEMU = """
import fcntl, os, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(str(os.getpid()))
file.flush()
print("ready", flush=True)
sys.stdin.read()
"""


def status_xml(
    state: str, reason: str, pid: int, *, vm: uuid.UUID = VM, name: str = "web", backend: str = ""
) -> bytes:
    """libvirt's status file of a domain, as libvirt 9.0 writes it, without what nobody here reads."""
    return (
        "<!--\nWARNING: THIS IS AN AUTO-GENERATED FILE.\n-->\n\n"
        f"<domstatus state='{state}' reason='{reason}' pid='{pid}'>\n"
        "  <monitor path='/var/lib/libvirt/qemu/domain-1-web/monitor.sock' type='unix'/>\n"
        f"  <domain type='kvm' id='1'>\n    <name>{name}</name>\n    <uuid>{vm}</uuid>\n"
        "    <metadata><app:uuid xmlns:app='urn:x'>no</app:uuid></metadata>\n    <devices>\n"
        "      <tpm model='tpm-crb'>\n        <backend type='emulator' version='2.0'>"
        f"{backend}</backend>\n        <alias name='tpm0'/>\n      </tpm>\n    </devices>\n"
        "  </domain>\n</domstatus>\n"
    ).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Libvirt:
    """The folders that libvirt has, and what it does with them; run by the user who runs the tests."""

    root: Path

    @property
    def state_root(self) -> Path:
        return self.root / "swtpm"

    @property
    def status_root(self) -> Path:
        return self.root / "qemu"

    @property
    def marks(self) -> Path:
        return self.root / "marks"

    def say(
        self,
        state: str,
        reason: str,
        pid: int,
        *,
        vm: uuid.UUID = VM,
        name: str = "web",
        backend: str = "",
    ) -> Path:
        """libvirtd writes the domain's status file."""
        path = self.status_root / f"{name}.xml"
        part = path.with_suffix(".xml.new")
        part.write_bytes(status_xml(state, reason, pid, vm=vm, name=name, backend=backend))
        part.chmod(0o600)
        part.replace(path)
        return path

    @contextmanager
    def qemu(
        self, vm: uuid.UUID = VM, *, name: str = "web", state: str = "running booted"
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process that holds the lock on its pid file, as a QEMU under libvirt does, and its status."""
        pid_file = self.status_root / f"{name}.pid"
        process = subprocess.Popen(
            [sys.executable, "-c", QEMU, str(pid_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            word, _, reason = state.partition(" ")
            self.say(word, reason, process.pid, vm=vm, name=name)
            yield process
        finally:
            process.kill()
            process.communicate()
            for path in (pid_file, self.status_root / f"{name}.xml"):
                path.unlink(missing_ok=True)

    def state(self, vm: uuid.UUID) -> Path:
        return self.state_root / str(vm) / "tpm2"

    def make_vtpm(
        self,
        vm: uuid.UUID,
        config: Path,
        *,
        name: str = "web",
        user: str | None = None,
        more: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """swtpm_setup as libvirt calls it, but for --config."""
        self.state(vm).mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            [
                *as_user(user),
                *("swtpm_setup", "--config", str(config), "--tpm2"),
                *("--tpm-state", str(self.state(vm))),
                *("--vmid", f"{name}:{vm}"),
                *("--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram"),
                *("--not-overwrite", *more),
            ],
            env={**os.environ, "HOME": "/root"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )

    @contextmanager
    def running(
        self,
        vm: uuid.UUID,
        *,
        name: str = "web",
        user: str | None = None,
        state: str = "running booted",
    ) -> Iterator[str]:
        """The VM's QEMU, as far as anybody sees it, and its swtpm as libvirt runs it; its TCTI."""
        path = self.root / "run" / f"{str(vm)[-4:]}.sock"
        pid_file = self.root / "run" / f"1-{name}-{str(vm)[-4:]}-swtpm.pid"
        control = Path(f"{path}.ctrl")
        process = subprocess.Popen(
            [
                *as_user(user),
                *("swtpm", "socket", "--ctrl", f"type=unixio,path={control},mode=0600"),
                *("--server", f"type=unixio,path={path}", "--tpm2"),
                *("--tpmstate", f"dir={self.state(vm)},mode=0600"),
                *("--flags", "not-need-init,startup-clear", "--pid", f"file={pid_file}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: control.exists() and path.exists(), "the VM's swtpm")
            with self.qemu(vm, name=name, state=state):
                yield f"swtpm:path={path}"
        finally:
            process.kill()
            process.wait()


@contextmanager
def running_helper(
    socket_path: Path,
    *,
    status_root: Path,
    marks: Path,
    work: Path,
    swtpm_user: str,
    state_root: Path | None = None,
    launcher: Sequence[str] = (),
    more: Sequence[str] = (),
    log: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """provider-proxy-vtpm as a process; it answers the user who runs the tests."""
    work.mkdir(exist_ok=True)
    words = [*launcher, sys.executable, "-m", "provider_proxy", "vtpm-helper"]
    words += ["--socket", str(socket_path), "--status-root", str(status_root)]
    words += ["--marks", str(marks), "--work", str(work)]
    words += ["--swtpm-user", swtpm_user, "--daemon-user", pwd.getpwuid(os.getuid()).pw_name]
    words += more
    if state_root is not None:
        words += ["--state-root", str(state_root)]
    log = log or socket_path.with_suffix(".log")
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, process_group=0)
    try:
        wait_until(lambda: socket_path.exists() or process.poll() is not None, "the helper")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        socket_path.unlink(missing_ok=True)


def as_user(user: str | None) -> tuple[str, ...]:
    """What runs a command as another user."""
    return ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups") if user else ()


def make_libvirt(root: Path) -> Libvirt:
    made = Libvirt(root=root)
    for folder in (made.state_root, made.status_root, made.marks, root / "run"):
        folder.mkdir(parents=True)
    return made


def vtpm_toml(libvirt: Libvirt, *, user: str, tables: str = "", more: str = "") -> str:
    """The tables of a daemon that keeps the link."""
    return (
        f'[vtpm]\nenabled = true\nsocket = "{libvirt.root}/hooks"\nswtpm_user = "{user}"\n'
        f'helper = "{libvirt.root}/helper"\nstate_root = "{libvirt.state_root}"\n{more}{tables}'
    )


def setup_config(folder: Path, *, tool: Path, tool_config: Path, options: Path) -> Path:
    """A swtpm_setup.conf."""
    path = folder / "swtpm_setup.conf"
    path.write_text(
        f"create_certs_tool= {tool}\ncreate_certs_tool_config = {tool_config}\n"
        f"create_certs_tool_options = {options}\nactive_pcr_banks = sha256\n"
    )
    return path
