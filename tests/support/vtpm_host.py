"""A host whose vTPMs are made by the real swtpm_setup, and a tenant that checks the link."""

from __future__ import annotations

import datetime
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from helpers import (
    LIMIT_S,
    Certs,
    command,
    get,
    until_answered,
)
from tpm_helpers import tool_bytes
from vtpm_helpers import (
    EKHOOK,
    OTHER_VM,
    VM,
    VMHOOK,
    Libvirt,
    make_libvirt,
    running_helper,
    setup_config,
    vtpm_toml,
)

SWTPM_USER = "tss"
NV_RSA, NV_ECC, NV_PLATFORM = "0x01c00002", "0x01c00016", "0x01c08000"


def _has_user() -> bool:
    try:
        pwd.getpwnam(SWTPM_USER)
    except KeyError:
        return False
    return os.geteuid() == 0 and shutil.which("swtpm_setup") is not None


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not _has_user(), reason="needs root, user tss, and swtpm-tools"),
]


@pytest.fixture(scope="module")
def localca() -> Iterator[Path]:
    """The configuration of a swtpm_localca whose CA is there already: its own, RSA-3072, takes long."""
    folder = Path(tempfile.mkdtemp(prefix="provider-proxy-ca-"))
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test-localca")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    config = folder / "localca.conf"
    config.write_text(
        f"statedir = {folder}\nsigningkey = {folder}/key.pem\nissuercert = {folder}/cert.pem\n"
        f"certserial = {folder}/serial\n"
    )
    (folder / "options").write_text(
        "--platform-manufacturer Acme\n--platform-version 2.1\n--platform-model QEMU\n"
    )
    for path in (folder, *folder.iterdir()):
        shutil.chown(path, SWTPM_USER)
    yield config
    shutil.rmtree(folder)


class Host:
    """libvirt's folders, the hooks' configuration and the commands that libvirt runs."""

    def __init__(self, folder: Path, localca: Path) -> None:
        self.folder = folder
        self.libvirt: Libvirt = make_libvirt(folder / "l")
        self.socket = self.libvirt.root / "hooks"
        shutil.chown(self.libvirt.root / "run", SWTPM_USER)
        for hook in (EKHOOK, VMHOOK):
            shutil.copy(hook, folder)
        self.config = folder / "vtpm-hook.toml"
        self.config.write_text(
            f'socket = "{self.socket}"\nlocalca_config = "{localca}"\n'
            f'marks = "{self.libvirt.marks}"\nstate_root = "{self.libvirt.state_root}"\n'
        )
        self.setup = setup_config(
            folder,
            tool=folder / EKHOOK.name,
            tool_config=self.config,
            options=localca.parent / "options",
        )
        self.state_dir = folder / "state"
        self.address = f"unix:{folder}/tenants"

    def toml(self, *, more: str = "") -> str:
        return (
            f'state_dir = "{self.state_dir}"\n'
            f'[listen]\naddress = "{self.address}"\ninsecure_plaintext = true\n'
            f'[admin]\naddress = "unix:{self.folder}/admin"\n'
            '[tpm]\ntcti = "embedded"\n[logs]\nima = "/nonexistent/a"\nuefi = "/nonexistent/b"\n'
            f'[tenants.acme]\nidentities = ["uid:0"]\nvms = ["{VM}", "{OTHER_VM}"]\n'
            + vtpm_toml(self.libvirt, user=SWTPM_USER, more=more)
        )

    def helper(
        self, launcher: Sequence[str] = ()
    ) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """provider-proxy-vtpm."""
        return running_helper(
            self.libvirt.root / "helper",
            status_root=self.libvirt.status_root,
            marks=self.libvirt.marks,
            work=self.libvirt.root / "work",
            swtpm_user=SWTPM_USER,
            state_root=self.libvirt.state_root,
            launcher=launcher,
        )

    def make_vtpm(self, vm: uuid.UUID = VM, *more: str) -> subprocess.CompletedProcess[str]:
        """What libvirt does at the first start, up to QEMU's."""
        self.event("prepare", "begin", vm)
        made = self.setup_vtpm(vm, *more)
        self.event("start", "begin", vm)
        return made

    def setup_vtpm(self, vm: uuid.UUID, *more: str) -> subprocess.CompletedProcess[str]:
        self.libvirt.state(vm).mkdir(parents=True)
        shutil.chown(self.libvirt.state(vm), SWTPM_USER, pwd.getpwnam(SWTPM_USER).pw_gid)
        return self.libvirt.make_vtpm(vm, self.setup, user=SWTPM_USER, more=more)

    def event(self, operation: str, sub: str, vm: uuid.UUID = VM) -> None:
        """libvirt runs its hook."""
        xml = (
            f"<domain><name>web</name><uuid>{vm}</uuid><devices><tpm><backend type='emulator'/>"
            "</tpm></devices></domain>"
        )
        done = subprocess.run(
            [str(self.folder / VMHOOK.name), "web", operation, sub, "-", str(self.config)],
            input=xml.encode(),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    async def listed(self) -> dict[str, dict[str, Any]]:
        """The registry, by VM."""
        results = (await get(f"unix:{self.folder}/admin", "/vms")).results()
        vms = results["vms"]
        assert isinstance(vms, list)
        return {vm["vm"]: vm for vm in vms}

    async def until_confirmed(self, vm: uuid.UUID = VM) -> dict[str, Any]:
        async def confirmed() -> bool:
            entry = (await self.listed()).get(str(vm), {})
            return bool(entry.get("confirmed") and entry.get("running"))

        await until_answered(confirmed, "the confirmation")
        return (await self.listed())[str(vm)]


@pytest.fixture
def host(localca: Path) -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="pp-"))  # a short path, that the swtpm user gets into
    folder.chmod(0o755)
    yield Host(folder, localca)
    shutil.rmtree(folder)


def certificate_in(tcti: str, index: str) -> x509.Certificate:
    """What the VM finds in its vTPM's NV memory."""
    return x509.load_der_x509_certificate(tool_bytes(tcti, "tpm2_nvread", "-C", "p", index))


async def in_thread(function: Any, *args: Any) -> Any:
    with trio.fail_after(120):
        return await trio.to_thread.run_sync(partial(function, *args))


async def until_stopped(host: Host, vm: uuid.UUID = VM) -> None:
    async def stopped() -> bool:
        return not (await host.listed())[str(vm)]["running"]

    await until_answered(stopped, "the stop")


GOOD, REFUSED = 0, 1


class TenantAt:
    """A tenant's directory, and commands that run in it."""

    def __init__(self, folder: Path, url: str, certs: Certs) -> None:
        self.folder = folder
        self.url = url
        self.tls = ("--ca", certs.ca_file, "--cert", certs.client_cert, "--key", certs.client_key)
        self.certs = certs

    async def run(self, line: str, *more: str | Path, code: int = GOOD, **environ: str) -> str:
        """A command by its words; URL stands for the proxy's address and how to reach it."""
        words: list[str | Path] = []
        for word in (*line.split(), *more):
            words += [self.url, *self.tls] if word == "URL" else [word]
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(
                command(*words),
                cwd=self.folder,
                env={**os.environ, **environ},
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
        said = done.stdout.decode()
        assert done.returncode == code, said
        return said

    def write_map(self) -> None:
        (self.folder / "map.toml").write_text(
            f'pins = "pins"\n[hosts.alpha]\nurl = "{self.url}"\nca = "{self.certs.ca_file}"\n'
            f'cert = "{self.certs.client_cert}"\nkey = "{self.certs.client_key}"\n'
            f'tpm_policy = "policy.json"\n[agents.{VM}]\nhosts = ["alpha"]\n'
            'least = "confirmed"\nek_issuer = "tpm"\n'
        )
