"""provider-proxy-vtpm.service under a systemd that has booted: what it sees, and every way out of it.

A container of this machine's own files with changes in memory; nothing of the machine is touched. Needs
root and systemd-nspawn.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, SYSTEM, SYSTEMD
from vtpm_helpers import QEMU, VM, status_xml

PYTHON = "/usr/bin/python3"
APP = "/usr/lib/provider-proxy"
BOOT_S = 180
CAP_DAC_READ_SEARCH = 2  # capability.h

pytestmark = pytest.mark.real
if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
    pytest.skip("needs root and systemd-nspawn (systemd-container)", allow_module_level=True)

# In a mount namespace of its own: an overlay over all that is here, then systemd in it.
BOOT = """
set -e
mount -t tmpfs -o mode=755 tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
cp -a "$2/." "$1/root/"
rm -rf "$1/root/etc/systemd/system"/*.wants
exec timeout -k 5 "$3" systemd-nspawn -q -D "$1/root" --register=no --keep-unit --private-network \\
  --system-call-filter=open_by_handle_at \\
  --bind="$4:/out" --bind-ro="$5:/usr/lib/provider-proxy/site" \\
  --bind-ro="$6:/usr/lib/provider-proxy/src" \\
  --boot -- systemd.unit=provider-proxy-test.target </dev/null
"""


class Sandbox:
    """What the scene in the container has left."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def text(self, name: str) -> str:
        return (self.out / name).read_text()

    def ways(self, name: str) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.text(name))
        return found


def lay(tree: Path) -> None:
    """The files that the package would have brought, and the scene's."""
    app = tree / APP.lstrip("/")
    units = tree / "usr/lib/systemd/system"
    for folder in (app, app / "site", app / "src", units, tree / "usr/bin"):
        folder.mkdir(parents=True)
    for path in (SYSTEM / "units").iterdir():
        shutil.copy(path, app)
    (app / "qemu.py").write_text(QEMU.replace("sys.stdin.read()", "import time; time.sleep(600)"))
    (app / "status.xml").write_bytes(status_xml("running", "booted", 0))
    for path in SYSTEMD.glob("provider-proxy-vtpm.*"):
        shutil.copy(path, units)
    for kind in ("sysusers.d", "tmpfiles.d"):
        (tree / "usr/lib" / kind).mkdir()
        shutil.copy(SYSTEMD / kind / "provider-proxy.conf", tree / "usr/lib" / kind)
    text = (ROOT / "docs/watch.md").read_text()
    unit = text.partition("# /etc/systemd/system/provider-proxy-eks.service\n")[2].partition("```")[
        0
    ]
    (units / "provider-proxy-eks.service").write_text(unit)
    quick = units / "provider-proxy-eks.service.d/quick.conf"  # sooner than 10 s, and only once
    quick.parent.mkdir()
    quick.write_text("[Service]\nWatchdogSec=3s\nRestart=no\n")
    launcher = tree / "usr/bin/provider-proxy"
    launcher.write_text(
        f'#!/bin/sh\nPYTHONPATH={APP}/src:{APP}/site exec {PYTHON} -m provider_proxy "$@"\n'
    )
    launcher.chmod(0o755)
    (units / "provider-proxy-test.target").write_text(
        "[Unit]\nRequires=sysinit.target provider-proxy-test.service\nAfter=sysinit.target\n"
    )
    (units / "provider-proxy-test.service").write_text(
        "[Unit]\nAfter=sysinit.target systemd-journald.service\nWants=systemd-journald.service\n"
        "[Service]\nType=oneshot\nEnvironment=OUT=/out "
        f"VM={VM} PYTHON={PYTHON}\nExecStart=/bin/bash {APP}/scene.sh\n"
    )


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    folder = Path(tempfile.mkdtemp(prefix="pp-unit-"))
    folder.chmod(0o755)
    for name in ("tree", "disk", "out", "src"):
        (folder / name).mkdir()
    lay(folder / "tree")
    shutil.copytree(ROOT / "provider_proxy", folder / "src/provider_proxy")
    words = [
        *("unshare", "--mount", "--propagation", "private", "bash", "-c", BOOT, "boot"),
        *(folder / "disk", folder / "tree", str(BOOT_S), folder / "out"),
        *(sysconfig.get_path("purelib"), folder / "src"),
    ]
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=BOOT_S + 30, check=False
    )
    scene = folder / "out/scene.log"
    assert (folder / "out/done").exists(), (
        f"{done.stdout[-2000:]}\n{scene.read_text()[-4000:] if scene.exists() else 'no scene'}"
    )
    yield Sandbox(folder / "out")
    shutil.rmtree(folder)


def test_it_sees_what_runs_and_reads_its_vtpm(sandbox: Sandbox) -> None:
    assert "ActiveState=active" in sandbox.text("state"), sandbox.text("journal")
    lines = [json.loads(line) for line in sandbox.text("seen").splitlines()]
    seen = next((line for line in lines if line.get("reading") == "read"), None)
    assert seen is not None, sandbox.text("seen") + sandbox.text("journal")
    assert (seen["vm"], seen["runs"], seen["origin"]) == (str(VM), True, "here")
    assert {ek["alg"] for ek in seen["eks"]} == {"rsa2048", "p384"}
    assert sandbox.text("left").strip() in ("", ABSENT)  # no copy of a state


ABSENT = "ls: cannot access '/run/provider-proxy-vtpm': No such file or directory"


def test_it_has_one_right_and_answers_the_daemon_alone(sandbox: Sandbox) -> None:
    status = dict(line.split(":", 1) for line in sandbox.text("process").splitlines())
    values: dict[str, Any] = {key: value.split() for key, value in status.items()}
    one = f"{1 << CAP_DAC_READ_SEARCH:016x}"
    assert {name: values[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {
        name: [one] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")
    }
    assert (values["NoNewPrivs"], values["Seccomp"]) == (["1"], ["2"])
    assert "0" not in values["Uid"]
    assert len(values["Groups"]) <= 1  # its own
    assert "PermissionError" in sandbox.text("seen-by-tss")


# What CAP_DAC_READ_SEARCH alone opens without a sandbox: these ways are there to be closed.
THERE = (
    *("the secret by its path", "the secret by its handle", "/etc/shadow", "libvirt's secrets"),
    *(
        "the daemon's state",
        "root's home",
        "a namespace of users",
        "io_uring",
        "IPv4",
        "netlink",
        "memory to write and run",
    ),
)


def can_make_users() -> bool:
    made = subprocess.run(["unshare", "--user", "true"], capture_output=True, check=False)
    return made.returncode == 0


@pytest.mark.parametrize("way", THERE)
def test_the_way_is_there_without_the_sandbox(sandbox: Sandbox, way: str) -> None:
    if way == "a namespace of users" and not can_make_users():
        pytest.skip(
            "no namespace of users can be made here, in a chroot for example: user_namespaces(7)"
        )
    assert sandbox.ways("outside")[way].startswith("OPEN"), sandbox.ways("outside")[way]


def test_no_way_leads_out(sandbox: Sandbox) -> None:
    inside = sandbox.ways("inside")
    assert len(inside) >= 50
    assert {way: came for way, came in inside.items() if came.startswith("OPEN")} == {}
    assert sandbox.text("escaped") == ""
    assert inside["the secret by its handle"] == "EPERM"  # by the filter: the handle is a good one
    for way in ("reading another's memory", "writing another's memory", "io_uring"):
        assert inside[way] in ("EPERM", "EACCES"), (way, inside[way])


@pytest.mark.parametrize(
    ("end", "result"), [("stop", "success"), ("kill", "signal"), ("hang", "watchdog")]
)
def test_no_ek_is_left_whatever_ends_its_keeper(sandbox: Sandbox, end: str, result: str) -> None:
    assert sandbox.text(f"eks-before-{end}").split() == ["e" * 64]
    assert "No such file or directory" in sandbox.text(f"eks-after-{end}")
    assert sandbox.text(f"eks-result-{end}").strip() == result
