"""What the tests of the link share: keys, hooks' messages, recorded command lines, libvirt's folders, and
swtpm_setup as libvirt runs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
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

from provider_proxy.host.vtpm.requests import CertificateRequest, EkPublicKey

EKHOOK = HOOKS / "provider-proxy-ekhook"
VMHOOK = HOOKS / "provider-proxy-vmhook"
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


def event(name: str, *, vm: uuid.UUID = VM, **more: Any) -> bytes:
    """The line of provider-proxy-vmhook."""
    values = {"version": 1, "op": "event", "event": name, "vm": str(vm), "name": "web", **more}
    return json.dumps(values).encode() + b"\n"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Libvirt:
    """The folders that libvirt has, and what it does with them; run by whoever runs the tests."""

    root: Path

    @property
    def state_root(self) -> Path:
        return self.root / "swtpm"

    @property
    def run_root(self) -> Path:
        return self.root / "run"

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
        self, vm: uuid.UUID, *, name: str = "web", user: str | None = None
    ) -> Iterator[str]:
        """The VM's swtpm as libvirt runs it; its TCTI."""
        path = self.run_root / f"{str(vm)[-4:]}.sock"
        pid_file = self.run_root / f"1-{name}-{str(vm)[-4:]}-swtpm.pid"
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
            yield f"swtpm:path={path}"
        finally:
            process.kill()
            process.wait()


def as_user(user: str | None) -> tuple[str, ...]:
    """What runs a command as another user."""
    return ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups") if user else ()


def make_libvirt(root: Path) -> Libvirt:
    made = Libvirt(root=root)
    made.state_root.mkdir(parents=True)
    made.run_root.mkdir()
    return made


def vtpm_toml(libvirt: Libvirt, *, user: str, tables: str = "", more: str = "") -> str:
    """The tables of a daemon that keeps the link."""
    return (
        f'[vtpm]\nenabled = true\nsocket = "{libvirt.root}/hooks"\nswtpm_user = "{user}"\n'
        f'state_root = "{libvirt.state_root}"\nrun_root = "{libvirt.run_root}"\n{more}{tables}'
    )


def setup_config(folder: Path, *, tool: Path, tool_config: Path, options: Path) -> Path:
    """A swtpm_setup.conf."""
    path = folder / "swtpm_setup.conf"
    path.write_text(
        f"create_certs_tool= {tool}\ncreate_certs_tool_config = {tool_config}\n"
        f"create_certs_tool_options = {options}\nactive_pcr_banks = sha256\n"
    )
    return path
