"""An update of the kernel while policies are in force: no false alarm, and no hole.

The golden host is booted with the old kernel and with the new one, a policy of each kind is made of each
boot, and the two are merged. Other boots of both kernels must then be good by the merged policies, the
other kernel's must be refused by those of one, and a program that neither had must be refused by all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from machine import Guest, need, ok

PROGRAM = Path(sys.executable).with_name("provider-proxy")
PCRS = "0,1,2,3,4,5,6,7,9,10"
UEFI_PCRS = (
    "0,1,2,3,4,5,6,7,9"  # the firmware measures the kernel into PCR 4, the kernel its initrd into 9
)
# What a host writes itself, and reads at its next boot.
EXCLUDED = ("/var/", "/tmp/", "/run/", "/root/", "/etc/machine-id$", "/etc/[.]#", "/dev/shm/")
RELEASE = "read -r release </proc/sys/kernel/osrelease; echo $release"  # starts no program
STRANGE = "/usr/local/bin/strange"

Run = Callable[..., tuple[int, str]]
"""Runs one of our commands in a folder; its exit code, and what it said on stderr."""


def show(guest: Guest, folder: Path, fetch: Callable[[str], None]) -> None:
    """Update, and judge.

    Args:
        folder: where `fetch` leaves evidence, in a folder of the name that it is given.
    """
    if len(guest.kernels) < 2:
        ok("skipped: the package sources have one kernel, and an update needs two")
        return
    old, new = guest.kernels
    for name, kernel in (("old", old), ("new", new), ("old-again", old), ("new-again", new)):
        guest.reboot(kernel)
        fetch(name)
        ok(f"fetched {name}: {guest.sh(RELEASE)}")
    guest.sh(f"cp /bin/true {STRANGE} && {STRANGE}")
    fetch("strange")
    if "RECORD" in os.environ:
        for name in ("old", "new", "old-again", "new-again", "strange"):
            shutil.copytree(folder / name, Path(os.environ["RECORD"]) / name)
    judge(folder, run)


def judge(folder: Path, run: Run) -> None:
    """Make policies of `old` and `new`, merge them, and judge all that was fetched by each."""
    for name in ("old", "new"):
        command(
            folder,
            run,
            "policy",
            "make",
            *of(name),
            *policies(name),
            *excludes(),
            "--uefi-pcrs",
            UEFI_PCRS,
        )
    for kind in ("boot", "runtime"):
        parts = [f"old.{kind}.json", f"new.{kind}.json"]
        command(folder, run, "policy", "merge", *parts, "--out", f"both.{kind}.json")
    for policy, good in (
        ("old", {"old", "old-again"}),
        ("new", {"new", "new-again"}),
        ("both", {"old", "old-again", "new", "new-again"}),
    ):
        for name in ("old", "new", "old-again", "new-again", "strange"):
            words = ["verify", f"{name}/evidence.json", "--request", f"{name}/request.json"]
            words += ["--ak-tpm", f"{name}/ak.b64", *policies(policy), "--uefi-pcrs", UEFI_PCRS]
            words += ["--ima-violations", "count"]
            code, said = run(folder, *words)
            why = "good" if code == 0 else said.strip().splitlines()[-1]
            if policy == "both" and name == "strange":
                need("is not in the runtime policy" in said, "a program that neither had is named")
            need(code == (0 if name in good else 1), f"policies {policy}, host {name}: {why}")


def of(name: str) -> list[str]:
    """The options of `policy make` that name a golden host."""
    return [
        *("--evidence", f"{name}/evidence.json", "--request", f"{name}/request.json"),
        *("--ak-tpm", f"{name}/ak.b64"),
    ]


def policies(name: str) -> list[str]:
    """The options that name its policies."""
    return ["--boot-policy", f"{name}.boot.json", "--runtime-policy", f"{name}.runtime.json"]


def excludes() -> list[str]:
    """The options of `policy make` that leave out what differs at each boot."""
    return [word for pattern in EXCLUDED for word in ("--exclude", pattern)]


def command(folder: Path, run: Run, *words: str) -> None:
    """Run a command that must be good. Raises: GuestError."""
    code, said = run(folder, *words)
    need(code == 0, f"{' '.join(words[:2])}: {said.strip() or 'good'}")


def run(folder: Path, *words: str) -> tuple[int, str]:
    """Run one of our commands; its exit code, and what it said."""
    done = subprocess.run(
        [str(PROGRAM), "--log-level", "warning", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return done.returncode, done.stderr
