"""The two hooks as swtpm_setup and libvirt run them: recorded command lines, a daemon that is there,
away, slow or false, and what ends in whose log."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT_S
from vtpm_helpers import EKHOOK, VM, VMHOOK, ecc_key, ek_argument, key_fields, rsa_key

from provider_proxy.host.vtpm.helper.status import StatePlace
from provider_proxy.host.vtpm.helper.window import Mark, read_mark
from provider_proxy.host.vtpm.messages import parse_message
from provider_proxy.host.vtpm.requests import CertificateRequest, EkPublicKey

pytestmark = pytest.mark.real

# What swtpm_setup runs, but for the key (recorded with swtpm 0.7.1, or read in the sources of others).
SPEC = (
    *("--tpm-spec-family", "2.0", "--tpm-spec-level", "0", "--tpm-spec-revision", "164"),
    *("--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm"),
    *("--tpm-version", "id:20191023", "--tpm2"),
)
VMID = ("--vmid", f"web:{VM}")


class Daemon:
    """A stand-in at the hooks' socket: remembers lines, answers as it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[bytes] = []
        self.answers: list[bytes | None] = []  # None: hang up; the last one goes on for ever
        self.delay_s = 0.0
        self._sock = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Daemon:
        self._sock.bind(str(self.path))
        self._sock.listen()
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._sock.accept()
                with peer, contextlib.suppress(OSError):
                    self.lines.append(peer.makefile("rb").readline())
                    time.sleep(self.delay_s)
                    answer = self.answers[0] if self.answers else b'{"ok": true}\n'
                    if len(self.answers) > 1:
                        del self.answers[0]
                    if answer is not None:
                        peer.sendall(answer)

    def message(self) -> CertificateRequest:
        """The one line, as the real daemon reads it."""
        (line,) = self.lines
        return parse_message(line)


class Host:
    """The files around ekhook: its configuration, a swtpm_localca that writes down its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certs = folder / "certs"
        self.certs.mkdir()
        self.argv = folder / "argv.json"
        self.socket = folder / "s"
        self.config = folder / "hook.toml"
        localca = folder / "localca"
        localca.write_text(
            "#!/usr/bin/python3 -IS\nimport json, sys\n"
            f"open({str(self.argv)!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
        )
        localca.chmod(0o755)
        self.localca = localca
        self.configure()

    def configure(self, more: str = "") -> None:
        self.config.write_text(
            f'socket = "{self.socket}"\nlocalca = "{self.localca}"\n'
            f'localca_config = "/etc/swtpm-localca.conf"\n{more}'
        )

    def delegated(self) -> list[str] | None:
        """The arguments of swtpm_localca; None where it did not run."""
        if not self.argv.exists():
            return None
        found: list[str] = json.loads(self.argv.read_text())
        return found

    def arguments(self, ek: str, *more: str, kind: str = "ek") -> list[str]:
        return [
            *("--type", kind, "--ek", ek, "--dir", str(self.certs), *VMID, *SPEC),
            *("--configfile", str(self.config), *more),
        ]

    def run(
        self, arguments: Sequence[str], *, hook: Path = EKHOOK
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(hook), *arguments],
            env={"HOME": "/root", "PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def daemon(host: Host) -> Iterator[Daemon]:
    with Daemon(host.socket) as made:
        yield made


# --- recorded command lines -------------------------------------------------------------------------

KEYS: dict[str, Callable[[], EkPublicKey]] = {
    "rsa2048": lambda: rsa_key(),
    "rsa3072": lambda: rsa_key(0, 3072),
    "p384": lambda: ecc_key(),
    "p256": lambda: ecc_key(0, "secp256r1"),
}
NEW = ("--key", "00", "--tpm-whatever", "x", "--quiet")  # of a swtpm_setup to come


@pytest.mark.parametrize(
    ("key", "kind", "more"),
    [*((key, "ek", ()) for key in KEYS), ("rsa2048", "platform", ()), ("p384", "ek", NEW)],
)
def test_recorded_command_lines(
    host: Host, daemon: Daemon, key: str, kind: str, more: tuple[str, ...]
) -> None:
    arguments = host.arguments(ek_argument(KEYS[key]()), *more, kind=kind)
    done = host.run(arguments)
    assert (done.returncode, done.stderr) == (0, "")
    message = daemon.message()
    assert isinstance(message, CertificateRequest)
    assert (message.vm, message.vmid, message.kind) == (VM, f"web:{VM}", kind)
    assert key_fields(message.public_key) == key_fields(KEYS[key]())
    assert (message.spec_family, message.spec_level, message.spec_revision) == ("2.0", 0, 164)
    assert (message.manufacturer, message.model) == ("id:00001014", "swtpm")
    assert message.version == "id:20191023"
    place = arguments.index(str(host.config))
    arguments[place] = "/etc/swtpm-localca.conf"  # ours is not swtpm_localca's
    assert host.delegated() == arguments


PARENT = (
    "import subprocess, sys\n"
    "sys.exit(subprocess.run(sys.argv[sys.argv.index('--') + 1:], timeout=60).returncode)"
)


@pytest.mark.parametrize("there", ["nothing", "an older one", "a link", "a fifo"])
def test_swtpm_localca_s_certificate_is_kept_beside_the_state(
    host: Host, daemon: Daemon, tmp_path: Path, there: str
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    kept, victim = state / "ek-rsa2048.crt", tmp_path / "victim"
    if there == "an older one":
        kept.write_bytes(b"older and longer than the new one")
    elif there == "a link":
        kept.symlink_to(victim)
    elif there == "a fifo":
        os.mkfifo(kept)
    with host.localca.open("a") as program:
        program.write(f"open({str(host.certs / 'ek.cert')!r}, 'wb').write(b'certificate')\n")
    arguments = [str(EKHOOK), *host.arguments(ek_argument(rsa_key()))]
    setup = [sys.executable, "-c", PARENT, "--tpm-state", f"dir://{state}", "--", *arguments]
    done = subprocess.run(setup, timeout=LIMIT_S, check=False)
    assert done.returncode == 0
    assert host.delegated() is not None
    if there in ("nothing", "an older one"):
        assert kept.read_bytes() == b"certificate"
    assert not victim.exists()


def test_swtpm_localca_s_failure_is_the_hook_s(host: Host, daemon: Daemon) -> None:
    with host.localca.open("a") as program:
        program.write("print('no serial', file=sys.stderr); sys.exit(7)\n")
    done = host.run(host.arguments(ek_argument(rsa_key())))
    assert (done.returncode, done.stderr) == (7, "no serial\n")


@pytest.mark.parametrize(
    "name", ["web", "a:b:c", "--quiet", f"x:{VM}:y", "web 1", "größe"], ids=str
)
def test_names_of_vms(host: Host, daemon: Daemon, name: str) -> None:
    arguments = host.arguments(ek_argument(ecc_key()))
    arguments[arguments.index(VMID[1])] = f"{name}:{VM}"
    done = host.run(arguments)
    assert (done.returncode, done.stderr) == (0, "")
    message = daemon.message()
    assert isinstance(message, CertificateRequest)
    assert (message.vm, message.vmid) == (VM, f"{name}:{VM}")


@pytest.mark.parametrize(
    ("change", "curve"),
    [
        (lambda ek: ek.replace(",id=secp384r1", ""), "secp384r1"),  # swtpm 0.3
        (
            lambda ek: (
                ek.upper()
                .replace("X=", "x=")
                .replace("Y=", "y=")
                .replace("ID=SECP384R1", "id=secp384r1")
            ),
            "secp384r1",
        ),
        (lambda ek: ",".join(reversed(ek.split(","))), "secp384r1"),
    ],
)
def test_forms_of_a_point(
    host: Host, daemon: Daemon, change: Callable[[str], str], curve: str
) -> None:
    assert host.run(host.arguments(change(ek_argument(ecc_key())))).returncode == 0
    message = daemon.message()
    assert isinstance(message, CertificateRequest)
    assert key_fields(message.public_key)["curve"] == curve


@pytest.mark.parametrize("kind", ["iak", "idevid"])
def test_what_is_no_ek_goes_straight_to_localca(host: Host, daemon: Daemon, kind: str) -> None:
    arguments = host.arguments(ek_argument(ecc_key()), "--key", "00", kind=kind)
    assert host.run(arguments).returncode == 0
    assert daemon.lines == []
    assert host.delegated() is not None


def test_localca_s_own_configuration_stays(host: Host, daemon: Daemon) -> None:
    """create_certs_tool_config need not be ours: then ours is at its usual place."""
    hook = host.folder / "hook"
    text = EKHOOK.read_text()
    usual = 'CONFIG = "/etc/provider-proxy/vtpm-hook.toml"'
    assert usual in text
    hook.write_text(text.replace(usual, f'CONFIG = "{host.config}"'))
    hook.chmod(0o755)
    arguments = host.arguments(ek_argument(ecc_key()))
    arguments[arguments.index(str(host.config))] = "/etc/other-localca.conf"
    done = host.run(arguments, hook=hook)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(daemon.lines) == 1
    assert host.delegated() == arguments


# --- what goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("--ek", "xyz", "neither an RSA modulus nor an EC point"),
        ("--ek", "x=12,x=13,y=14", "neither an RSA modulus nor an EC point"),
        ("--ek", "x=12,y=14,id=brainpool", "an unsupported curve: brainpool"),
        ("--vmid", "web", "--vmid does not end with the UUID"),
        ("--vmid", f"{VM}x", "--vmid does not end with the UUID"),
        ("--tpm-spec-level", "-1", "--tpm-spec-level is not a number"),
    ],
)
def test_command_lines_that_say_nothing(
    host: Host, daemon: Daemon, place: str, value: str, message: str
) -> None:
    arguments = host.arguments(ek_argument(ecc_key()))
    arguments[arguments.index(place) + 1] = value
    done = host.run(arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("provider-proxy-ekhook: VM ")
    assert (daemon.lines, host.delegated()) == ([], None)


def test_a_daemon_that_is_away_fails_the_start(host: Host) -> None:
    host.configure("limit_s = 0.6\n")
    begin = time.monotonic()
    done = host.run(host.arguments(ek_argument(ecc_key())))
    assert time.monotonic() - begin < 5
    assert done.returncode == 1
    assert f"VM web:{VM} gets no EK certificate: provider-proxy did not answer" in done.stderr
    assert "vtpm.enabled" in done.stderr
    assert host.delegated() is None


def test_a_daemon_that_is_away_delays_nothing_where_it_shall_not(host: Host) -> None:
    host.configure('on_error = "delegate"\n')
    done = host.run(host.arguments(ek_argument(ecc_key())))
    assert done.returncode == 0
    assert "continuing, because on_error is delegate" in done.stderr
    assert host.delegated() is not None


def test_a_daemon_that_comes_back_is_waited_for(host: Host) -> None:
    done: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(
        target=lambda: done.append(host.run(host.arguments(ek_argument(ecc_key()))))
    )
    thread.start()
    time.sleep(0.4)
    with Daemon(host.socket) as daemon:
        daemon.answers = [None, b'{"ok": true}\n']  # killed once more, while it works on it
        thread.join(LIMIT_S)
    assert done[0].returncode == 0
    assert len(daemon.lines) == 2
    assert daemon.lines[0] == daemon.lines[1]


def test_a_daemon_that_hangs_is_left(host: Host, daemon: Daemon) -> None:
    host.configure("limit_s = 0.5\n")
    daemon.delay_s = 3.0
    begin = time.monotonic()
    done = host.run(host.arguments(ek_argument(ecc_key())))
    assert done.returncode == 1
    assert time.monotonic() - begin < 2.5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            b'{"ok": false, "error": "this VM runs, with another EK"}\n',
            "refused the EK: this VM runs",
        ),
        (b'{"ok": false, "error": "\\u001b[2J"}\n', "refused the EK: ?[2J"),
        (b"nonsense\n", "cannot be read"),
        (b"[]\n", "cannot be read"),
        (b'{"ok": true, "certificate": 5}\n', "cannot be read"),
        (b'{"ok": true, "certificate": "&&"}\n', "cannot be read"),
        (b'{"ok": true, "certificate": ""}\n', "must have 1 to 2048 bytes"),
        (b"x" * 9000, "too long"),
        (
            json.dumps({"ok": True, "certificate": base64.b64encode(bytes(2049)).decode()}).encode()
            + b"\n",
            "must have 1 to 2048 bytes",
        ),
    ],
)
def test_answers_that_are_none(host: Host, daemon: Daemon, answer: bytes, message: str) -> None:
    daemon.answers = [answer]
    done = host.run(host.arguments(ek_argument(ecc_key())))
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(host.certs.iterdir()) == []
    host.configure('on_error = "delegate"\n')
    assert host.run(host.arguments(ek_argument(ecc_key()))).returncode == 0
    assert host.delegated() is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("socket = 5", "socket must be a string"),
        ('on_error = "ignore"', 'on_error must be "fail" or "delegate"'),
        ("limit_s = 0", "limit_s must be above 0"),
        ("limit_s = 1000", "at most 120"),
        ("limit_s = true", "limit_s must be a number"),
        ("no toml", "hook.toml: "),
        ("window_ms = 5", "window_ms is not a key"),
    ],
)
def test_configurations_that_are_refused(
    host: Host, daemon: Daemon, text: str, message: str
) -> None:
    host.config.write_text(text + "\n")
    done = host.run(host.arguments(ek_argument(ecc_key())))
    assert done.returncode == 1
    assert message in done.stderr
    assert daemon.lines == []


def test_a_configuration_that_is_missing_is_named(host: Host) -> None:
    host.config.unlink()
    done = host.run(host.arguments(ek_argument(ecc_key())))
    assert (done.returncode, str(host.config) in done.stderr) == (1, True)


def test_a_localca_that_is_missing_is_named(host: Host, daemon: Daemon) -> None:
    host.localca.unlink()
    done = host.run(host.arguments(ek_argument(ecc_key())))
    assert done.returncode == 1
    assert f"cannot run {host.localca}" in done.stderr


# --- the host's own certificate ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("ek", "ek.cert"), ("platform", "platform.cert")])
def test_the_daemon_s_certificate_is_written(
    host: Host, daemon: Daemon, kind: str, name: str
) -> None:
    certificate = os.urandom(2048)
    encoded = base64.b64encode(certificate).decode()
    daemon.answers = [json.dumps({"ok": True, "certificate": encoded}).encode() + b"\n"]
    (host.certs / name).write_bytes(b"an older and longer one" * 200)  # of the RSA key before
    done = host.run(host.arguments(ek_argument(rsa_key()), kind=kind))
    assert (done.returncode, done.stderr) == (0, "")
    assert (host.certs / name).read_bytes() == certificate
    assert host.delegated() is None


def test_no_link_is_written_through(host: Host, daemon: Daemon, tmp_path: Path) -> None:
    daemon.answers = [b'{"ok": true, "certificate": "AAAA"}\n']
    target = tmp_path / "target"
    (host.certs / "ek.cert").symlink_to(target)
    done = host.run(host.arguments(ek_argument(rsa_key())))
    assert (done.returncode, target.exists()) == (1, False)


# --- how they stand alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [EKHOOK, VMHOOK], ids=lambda path: path.name)
def test_the_hooks_need_nothing_but_python(hook: Path) -> None:
    text = hook.read_text()
    assert text.startswith("#!/usr/bin/python3 -IS\n")
    assert "provider_proxy" not in text  # no import of ours
    assert stat.S_IMODE(hook.stat().st_mode) & 0o555 == 0o555


def test_the_environment_changes_nothing(host: Host, daemon: Daemon) -> None:
    """libvirtd's environment is not ours: a PYTHONPATH in it must not run code as the swtpm user."""
    (host.folder / "json.py").write_text("raise SystemExit(77)\n")
    copy = host.folder / "rewritten"
    shutil.copy(EKHOOK, copy)
    copy.write_text(copy.read_text().replace("#!/usr/bin/python3 -IS", "#!/usr/bin/python3"))
    done = subprocess.run(
        [str(copy), *host.arguments(ek_argument(ecc_key()))],
        env={"PYTHONPATH": str(host.folder), "PYTHONINSPECT": "1", "HOME": "/root"},
        cwd=host.folder,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(daemon.lines) == 1


# --- libvirt's hook ---------------------------------------------------------------------------------

XML = """<domain type='kvm' id='1'>
  <name>web</name>
  <metadata><app:uuid xmlns:app="urn:x">no</app:uuid><uuid>also not</uuid></metadata>
  <uuid>{vm}</uuid>
  <devices>{tpm}</devices>
</domain>
"""
SECRET = uuid.UUID("aaaaaaaa-0000-4000-8000-00000000000a")


def tpm(inside: str = "", *, kind: str = "emulator", version: str = "2.0") -> str:
    backend = f"<backend type='{kind}' version='{version}'>{inside}</backend>"
    return f"<tpm model='tpm-crb'>{backend}</tpm>"


class VmHook:
    """libvirt's hook as root runs it, with folders of the test's."""

    def __init__(self, folder: Path) -> None:
        self.marks = folder / "marks"
        self.state_root = folder / "swtpm"
        self.config = folder / "vm-hook.toml"
        self.config.write_text(f'marks = "{self.marks}"\nstate_root = "{self.state_root}"\n')

    def run(
        self,
        operation: str,
        sub: str = "begin",
        *,
        xml: str | None = None,
        stdin: Any = None,
        config: Path | None = None,
    ) -> None:
        """Run it; it says nothing, and is good, whatever it meets."""
        words = [str(VMHOOK), "web", operation, sub, "-", str(config or self.config)]
        data = (XML.format(vm=VM, tpm=tpm()) if xml is None else xml).encode()
        given: dict[str, Any] = {"stdin": stdin} if stdin is not None else {"input": data}
        begin = time.monotonic()
        done = subprocess.run(
            words, **given, capture_output=True, timeout=LIMIT_S, env={}, check=False
        )
        assert time.monotonic() - begin < LIMIT_S / 2  # 0.9 s, and what a busy machine takes
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def mark(self) -> Mark | None:
        return read_mark(self.marks, VM, owner=os.geteuid())


@pytest.fixture
def vmhook(tmp_path: Path) -> VmHook:
    return VmHook(tmp_path)


@pytest.mark.parametrize(
    ("operation", "sub"),
    [("start", "begin"), ("started", "begin"), ("stopped", "end"), ("release", "end")],
)
def test_the_window_is_open_from_prepare_to_start(vmhook: VmHook, operation: str, sub: str) -> None:
    assert vmhook.mark() is None
    vmhook.run("prepare")
    assert vmhook.mark() == Mark(place=StatePlace(), secret=None)
    assert [path.name for path in vmhook.marks.iterdir()] == [str(VM)]
    for other in ("migrate", "reconnect", "attach", "restore"):
        vmhook.run(other)
        assert vmhook.mark() is not None
    vmhook.run(operation, sub)
    assert vmhook.mark() is None
    vmhook.run(operation, sub)  # once more, as libvirt does


def test_a_vm_that_has_a_vtpm_opens_no_window(vmhook: VmHook) -> None:
    """Its folder is root's, and lies in root's: no process of the swtpm user can take it away."""
    vmhook.run("prepare")
    (vmhook.state_root / str(VM) / "tpm2").mkdir(parents=True)
    vmhook.run("prepare")
    assert vmhook.mark() is None


def test_a_migration_s_beginning_alone_marks_nothing(vmhook: VmHook) -> None:
    vmhook.run("migrate")
    assert vmhook.mark() is None


@pytest.mark.parametrize("kind", ["dir", "file"])
def test_a_place_and_a_secret_of_libvirt_s(vmhook: VmHook, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "elsewhere"
    inside = f"<encryption secret='{SECRET}'/><source type='{kind}' path='{path}'/>"
    xml = XML.format(vm=VM, tpm=tpm(inside))
    vmhook.run("prepare", xml=xml)
    made = Mark(place=StatePlace(path=path, is_file=kind == "file"), secret=SECRET)
    assert vmhook.mark() == made
    if kind == "dir":
        path.mkdir()
    else:
        path.touch()
    vmhook.run("prepare", xml=xml)
    assert vmhook.mark() == made  # empty: nothing was made yet
    (path / "tpm2-00.permall" if kind == "dir" else path).write_text("x")
    vmhook.run("prepare", xml=xml)
    assert vmhook.mark() is None


@pytest.mark.parametrize(
    "xml",
    [
        XML.format(vm=VM, tpm=""),
        XML.format(vm=VM, tpm=tpm(kind="passthrough")),
        XML.format(vm=VM, tpm=tpm(version="1.2")),
        XML.format(vm="../../etc/passwd", tpm=tpm()),
        XML.format(vm="", tpm=tpm()),
        "no XML",
        "",
    ],
)
def test_what_opens_no_window(vmhook: VmHook, xml: str) -> None:
    vmhook.run("prepare", xml=xml)
    assert not vmhook.marks.exists() or list(vmhook.marks.iterdir()) == []


def test_libvirt_never_waits_and_never_hears(vmhook: VmHook) -> None:
    """An stdin that never ends, a folder that cannot be made, an invalid configuration."""
    read, write = os.pipe()
    try:
        vmhook.run("prepare", stdin=read)
    finally:
        os.close(read)
        os.close(write)
    bad = vmhook.config.with_name("bad.toml")
    bad.write_text("no toml")
    vmhook.run("prepare", config=bad)
    bad.write_text(f'marks = "{bad}/marks"\n')
    vmhook.run("prepare", config=bad)
    usage = subprocess.run([str(VMHOOK)], capture_output=True, check=False, timeout=LIMIT_S)
    assert (usage.returncode, usage.stdout, usage.stderr) == (0, b"", b"")


def test_both_hooks_have_one_configuration(host: Host, daemon: Daemon) -> None:
    host.configure('marks = "/run/elsewhere"\nstate_root = "/srv/swtpm"\n')
    assert host.run(host.arguments(ek_argument(ecc_key()))).returncode == 0
