"""Encrypted vTPMs: the passphrase goes from libvirt's API to swtpm, where libvirt gives it, and nowhere
else."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import stat
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import LIMIT_S
from vtpm_helpers import SECRETHOOK, VM, Libvirt, make_libvirt

from provider_proxy.host.vtpm.helper.readback import EncryptedError, StateSource
from provider_proxy.host.vtpm.helper.secrets import NoSecretError, passphrase_fd
from provider_proxy.host.vtpm.helper.status import StatePlace

pytestmark = pytest.mark.real
if shutil.which("swtpm_setup") is None:
    pytest.skip("needs swtpm-tools", allow_module_level=True)

SECRET = uuid.UUID("aaaaaaaa-0000-4000-8000-00000000000a")
PASSPHRASE = b"a passphrase\0with any bytes\xff" * 10
# What libvirt says of secrets, as virsh shows it; what Nova's modes make of it (2026.1).
USAGE = "<usage type='vtpm'><name>x</name></usage>"
SHAREABLE = f"<secret ephemeral='no' private='no'><uuid/>{USAGE}</secret>"  # mode "host"
PRIVATE = f"<secret ephemeral='no' private='yes'><uuid/>{USAGE}</secret>"  # mode "deployment"


class Virsh:
    """Stands in for virsh: writes down how it was called, and answers as libvirt would."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "virsh"
        self.calls = folder / "calls"
        self.says(SHAREABLE)

    def says(self, xml: str | None, value: bytes = PASSPHRASE) -> None:
        """None: there is no such secret; Nova's mode "user" undefines it right after the start."""
        encoded = base64.b64encode(value).decode()
        described = "exit 1" if xml is None else f'echo "{xml}"'
        self.path.write_text(
            f'#!/bin/sh\necho "$@" >>{self.calls}\n'
            f"tr '\\0' ' ' </proc/$PPID/cmdline >>{self.calls}\n"
            f"case $4 in secret-dumpxml) {described} ;; *) echo {encoded} ;; esac\n"
        )
        self.path.chmod(0o755)


@pytest.fixture
def virsh(tmp_path: Path) -> Virsh:
    return Virsh(tmp_path)


@contextmanager
def answering(path: Path, virsh: Virsh) -> Iterator[subprocess.Popen[str]]:
    """provider-proxy-vtpm-secret as systemd starts it; its log on stderr."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        fd = sock.fileno()
        words = ["bash", "-c", f'exec "$@" 3<&{fd} {fd}<&-', "x", str(SECRETHOOK), str(virsh.path)]
        process = subprocess.Popen(words, pass_fds=(fd,), stderr=subprocess.PIPE, text=True, env={})
    try:
        yield process
    finally:
        process.kill()
        process.wait(LIMIT_S)
        assert process.stderr is not None
        process.stderr.close()
        path.unlink()


@pytest.fixture
def libvirt(tmp_path: Path) -> Libvirt:
    """With one vTPM whose state is encrypted."""
    made = make_libvirt(tmp_path / "l")
    made.state(VM).mkdir(parents=True)
    key = tmp_path / "key"
    key.write_bytes(PASSPHRASE)
    with key.open("rb") as file:
        subprocess.run(
            [
                *("swtpm_setup", "--tpm2", "--tpmstate", made.state(VM), "--createek"),
                *("--pwdfile-fd", str(file.fileno()), "--cipher", "aes-256-cbc"),
            ],
            pass_fds=(file.fileno(),),
            check=True,
            capture_output=True,
            timeout=120,
        )
    key.unlink()
    (made.root / "work").mkdir()
    return made


def source(libvirt: Libvirt, secrets: Path | None) -> StateSource:
    return StateSource(
        root=libvirt.state_root, uid=os.geteuid(), work=libvirt.root / "work", secrets=secrets
    )


async def test_an_encrypted_state_is_read_where_libvirt_gives_its_secret(
    libvirt: Libvirt, virsh: Virsh, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with answering(path, virsh):
        eks = await source(libvirt, path).read_eks(VM, StatePlace(), SECRET)
        assert {ek.alg for ek in eks} == {"rsa2048", "p384"}
        virsh.says(SHAREABLE, b"another passphrase")
        with pytest.raises(Exception, match="cannot load the vTPM's state"):
            await source(libvirt, path).read_eks(VM, StatePlace(), SECRET)
    encoded = base64.b64encode(PASSPHRASE).decode()
    said = virsh.calls.read_bytes()
    for trace in (PASSPHRASE, encoded.encode(), PASSPHRASE[:12]):
        assert trace not in said  # in nobody's arguments
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p != virsh.path]
    assert left
    for file in left:
        assert PASSPHRASE[:12] not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        (PRIVATE, "private"),
        (SHAREABLE.replace("vtpm", "ceph"), "not for a vTPM"),
        (SHAREABLE.replace(USAGE, ""), "not for a vTPM"),
        (None, "does not have the secret"),
        ("no XML", "cannot be read"),
        (SHAREABLE.replace("'no'><", "'maybe'><"), "private"),
    ],
)
async def test_what_libvirt_does_not_give_is_not_read(
    libvirt: Libvirt, virsh: Virsh, tmp_path: Path, xml: str | None, why: str
) -> None:
    virsh.says(xml)
    path = tmp_path / "s"
    with answering(path, virsh) as process:
        with pytest.raises(EncryptedError, match=why):
            await source(libvirt, path).read_eks(VM, StatePlace(), SECRET)
        process.kill()
        assert process.stderr is not None
        log = process.stderr.read()
    assert why in log
    assert "secret-get-value" not in virsh.calls.read_text()  # its value was not even asked for
    assert base64.b64encode(PASSPHRASE).decode()[:16] not in log


def test_questions_that_are_none(virsh: Virsh, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with answering(path, virsh):
        for line in (b"\n", b"x" * 100, b"../../etc/shadow\n", f"{SECRET} --plain\n".encode(), b""):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(LIMIT_S)
                sock.connect(str(path))
                sock.sendall(line)
                sock.shutdown(socket.SHUT_WR)
                said, fds, _, _ = socket.recv_fds(sock, 100, 1)
                assert (fds, said[:1] != b"+") == ([], True)
        with passphrase_fd(path, SECRET) as fd:  # and it goes on
            assert os.read(fd, 1000) == PASSPHRASE
            assert stat.S_ISFIFO(os.fstat(fd).st_mode)
    assert "shadow" not in virsh.calls.read_text()


def test_nobody_there(tmp_path: Path) -> None:
    with (
        pytest.raises(NoSecretError, match="does not answer"),
        passphrase_fd(tmp_path / "s", SECRET),
    ):
        pass


def test_it_leaves_no_core(virsh: Virsh, tmp_path: Path) -> None:
    with answering(tmp_path / "s", virsh) as process:
        with passphrase_fd(tmp_path / "s", SECRET):
            limits = Path(f"/proc/{process.pid}/limits").read_text()
        line = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert line.split()[4:6] == ["0", "0"]
        process.send_signal(signal.SIGTERM)
