"""The systemd units as systemd's own tools see them: no complaint, a bound on the exposure, users and
files as they should be. What runs under them is tried where systemd runs: `make test-kvm`."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import DOCS, PACKAGING, SYSTEMD

from provider_proxy.cli import main as cli
from provider_proxy.host.pki import CA_KEY, CRL_DAYS
from provider_proxy.tenant.watch.tables import WatchConfig

pytestmark = pytest.mark.real

SERVICE = SYSTEMD / "provider-proxy.service"
HELPER = SYSTEMD / "provider-proxy-vtpm.service"
BRIDGE = SYSTEMD / "provider-proxy-bridge.service"
SECRET = SYSTEMD / "provider-proxy-vtpm-secret.service"
CRL = SYSTEMD / "provider-proxy-crl.service"
WATCH = SYSTEMD / "provider-proxy-watch@.service"
MAX_WATCH_EXPOSURE = 10  # tenths; hosts and a database on the network make up what is left
MAX_CRL_EXPOSURE = 8  # tenths
MAX_HELPER_EXPOSURE = 9  # tenths; what it may read, and a look at all processes
MAX_BRIDGE_EXPOSURE = 10  # tenths; the network is what is left
MAX_EXPOSURE = 13  # tenths; a TPM, tenants outside and unix sockets' users make up what is left
LIMIT_S = 60


def tool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """Copies whose program exists on this machine."""
    copies = []
    for path in sorted(SYSTEMD.glob("provider-proxy*.*")):
        copies.append(tmp_path / path.name)
        text = re.sub(
            r"/usr/bin/(?:provider-proxy[a-z-]*|systemctl)", sys.executable, path.read_text()
        )
        copies[-1].write_text(text)
    names = ("provider-proxy", "provider-proxy-vtpm", "provider-proxy-vtpm-secret")
    made = [tmp_path / f"{name}.{kind}" for name in names for kind in ("service", "socket")]
    made += [tmp_path / f"provider-proxy-crl.{kind}" for kind in ("service", "timer")]
    made.append(tmp_path / "provider-proxy-watch@.service")
    made.append(tmp_path / BRIDGE.name)
    assert sorted(made) == sorted(copies)
    return made


def test_systemd_has_no_complaint(units: list[Path]) -> None:
    done = tool("systemd-analyze", "verify", "--man=no", *units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def exposures(service: Path) -> dict[str, float]:
    """What systemd finds fault with, and how much."""
    done = tool("systemd-analyze", "security", "--offline=true", "--json=short", service)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return {row["json_field"]: float(row["exposure"]) for row in rows if row["exposure"]}


def test_exposure_is_within_its_bound(units: list[Path]) -> None:
    words = ("systemd-analyze", "security", "--offline=true", "--no-pager")
    bound = f"--threshold={MAX_EXPOSURE}"
    done = tool(*words, bound, units[0])
    assert done.returncode == 0, done.stdout
    assert tool(*words, f"--threshold={MAX_EXPOSURE - 1}", units[0]).returncode != 0


def test_what_is_left_of_the_exposure_is_what_the_daemon_is_for(units: list[Path]) -> None:
    assert set(exposures(units[0])) == {
        "RootDirectoryOrRootImage",  # the TPM's libraries are the host's
        "PrivateDevices",  # would hide the TPM
        "DeviceAllow",
        "RestrictAddressFamilies_AF_UNIX",  # notification, admin, hooks
        "RestrictAddressFamilies_AF_INET_INET6",  # tenants, registrars
        "PrivateNetwork",
        "IPAddressDeny",
        "PrivateUsers",  # would hide who a unix socket's user is
    }


def test_the_helper_s_exposure_is_within_its_bound(units: list[Path]) -> None:
    words = ("systemd-analyze", "security", "--offline=true", "--no-pager")
    done = tool(*words, f"--threshold={MAX_HELPER_EXPOSURE}", units[2])
    assert done.returncode == 0, done.stdout
    assert set(exposures(units[2])) == {
        "CapabilityBoundingSet_CAP_DAC_FOWNER_IPC_OWNER",  # CAP_DAC_READ_SEARCH: what it is for
        "AmbientCapabilities",
        "SystemCallFilter_privileged",  # capset, by which swtpm loses the capability
        "RestrictAddressFamilies_AF_UNIX",  # the daemon's questions
        "ProtectProc",  # would hide QEMU
        "ProcSubset",  # would hide /proc/locks
        "PrivateUsers",  # would take the capability away
        "DeviceAllow",  # ProtectClock's
    }


def test_the_bridge_s_exposure_is_the_network(units: list[Path]) -> None:
    words = ("systemd-analyze", "security", "--offline=true", "--no-pager")
    done = tool(*words, f"--threshold={MAX_BRIDGE_EXPOSURE}", units[-1])
    assert done.returncode == 0, done.stdout
    assert set(exposures(units[-1])) == {
        "RootDirectoryOrRootImage",  # Python and the packages are the machine's
        "RestrictAddressFamilies_AF_INET_INET6",  # hosts, verifier, registrar
        "PrivateNetwork",
        "IPAddressDeny",
        "DeviceAllow",  # ProtectClock's
    }


def test_the_daemon_has_no_capability_and_the_helper_one() -> None:
    """And no page tells anybody to give it one."""
    rights = "CapabilityBoundingSet=CAP_DAC_READ_SEARCH\nAmbientCapabilities=CAP_DAC_READ_SEARCH\n"
    assert "CapabilityBoundingSet=\nAmbientCapabilities=\n" in SERVICE.read_text()
    assert rights in HELPER.read_text()
    for page in DOCS.rglob("*.md"):
        assert "AmbientCapabilities=CAP" not in page.read_text(), page


@pytest.mark.parametrize("unit", [SERVICE, HELPER, SECRET, CRL, WATCH, BRIDGE])
def test_every_hardening_group_says_what_it_breaks(unit: Path) -> None:
    groups = re.split(r"^# --- ", unit.read_text(), flags=re.MULTILINE)[1:]
    assert len(groups) >= 5
    for group in groups:
        comment = re.match(r"(?:.*\n#)*.*\n", group)
        assert comment is not None
        assert "Breaks:" in comment[0]


def test_the_crl_s_exposure_is_within_its_bound(units: list[Path]) -> None:
    words = ("systemd-analyze", "security", "--offline=true", "--no-pager")
    done = tool(*words, f"--threshold={MAX_CRL_EXPOSURE}", units[6])
    assert done.returncode == 0, done.stdout
    assert set(exposures(units[6])) == {
        "RootDirectoryOrRootImage",
        "UserOrDynamicUser",  # the CA's folder is root's
        "PrivateUsers",  # the group of /etc/provider-proxy would be nobody's
        "DeviceAllow",  # ProtectClock's
    }


def test_the_watcher_s_exposure_is_within_its_bound(units: list[Path]) -> None:
    words = ("systemd-analyze", "security", "--offline=true", "--no-pager")
    done = tool(*words, f"--threshold={MAX_WATCH_EXPOSURE}", units[-2])
    assert done.returncode == 0, done.stdout
    assert set(exposures(units[-2])) == {
        "RootDirectoryOrRootImage",
        "RestrictAddressFamilies_AF_UNIX",  # a database on this machine
        "RestrictAddressFamilies_AF_INET_INET6",  # hosts' proxies, database, webhook
        "PrivateNetwork",
        "IPAddressDeny",
        "DeviceAllow",  # ProtectClock's
    }


def test_the_watcher_s_command_is_one_that_there_is() -> None:
    """With the file that an instance's name leads to, and the folder that files have by default."""
    text = WATCH.read_text()
    start = re.search(r"^ExecStart=/usr/bin/provider-proxy (.*)$", text, re.MULTILINE)
    assert start is not None
    args = cli.build_parser().parse_args(start[1].replace("%i", "rack7").split())
    assert (args.command, str(args.config)) == ("watch", "/etc/provider-proxy-watch/rack7.toml")
    assert f"StateDirectory={WatchConfig().state_dir.name}\n" in text
    assert f"RestartPreventExitStatus={cli.EXIT_USAGE}\n" in text


def test_what_the_units_name_is_packaged() -> None:
    """The Debian package and the bundle install every unit, and take it away."""
    rules = (PACKAGING / "debian/rules").read_text()
    for unit in SYSTEMD.glob("provider-proxy*.*"):
        assert f"cp systemd/{unit.name} " in rules
    install = (PACKAGING / "bundle/install.sh").read_text()
    kinds = {unit.suffix for unit in SYSTEMD.glob("provider-proxy*.*")}
    assert {f'"$here"/systemd/*{kind}' for kind in kinds} == set(
        re.findall(r'"\$here"/systemd/\*\.\w+', install)
    )
    uninstall = (PACKAGING / "bundle/uninstall.sh").read_text()
    assert "*@.service) systemctl stop" in uninstall


def test_the_timer_leaves_time_for_runs_that_fail() -> None:
    """Weekly, for a list of 30 days; and the unit's command is one that there is."""
    timer = (SYSTEMD / "provider-proxy-crl.timer").read_text()
    assert "OnCalendar=weekly\n" in timer
    assert "Persistent=true\n" in timer
    assert CRL_DAYS >= 4 * 7
    start = re.search(r"^ExecStart=/usr/bin/provider-proxy (.*)$", CRL.read_text(), re.MULTILINE)
    assert start is not None
    args = cli.build_parser().parse_args(start[1].split())
    assert (args.command, args.action) == ("pki", "crl")
    assert f"ReadWritePaths={args.out.parent}\n" in CRL.read_text()
    assert f"ConditionPathExists={args.directory / CA_KEY}\n" in CRL.read_text()


def test_user_and_group_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/sysusers.d"
    folder.mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    shutil.copy(SYSTEMD / "sysusers.d/provider-proxy.conf", folder)
    done = tool("systemd-sysusers", f"--root={tmp_path}")
    assert done.returncode == 0, done.stderr
    users = entries(tmp_path / "etc/passwd")
    for name in ("provider-proxy", "provider-proxy-bridge"):
        assert users[name][-2:] == [f"/var/lib/{name}", "/usr/sbin/nologin"]
    assert entries(tmp_path / "etc/group")["tss"][-1] == "provider-proxy"


def entries(path: Path) -> dict[str, list[str]]:
    """The lines of passwd(5) or group(5), by name."""
    return {line.split(":")[0]: line.split(":") for line in path.read_text().splitlines()}


def test_the_logs_become_the_group_s_and_the_secrets_root_s(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files away takes root")
    for folder in ("usr/lib/tmpfiles.d", "etc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    groups = "root:x:0:\nprovider-proxy:x:4321:\nprovider-proxy-bridge:x:4322:\n"
    (tmp_path / "etc/group").write_text(groups)
    logs = [
        tmp_path / "sys/kernel/security" / name
        for name in (
            "integrity/ima/ascii_runtime_measurements",
            "integrity/ima/ascii_runtime_measurements_sha256",
            "tpm0/binary_bios_measurements",
        )
    ]
    for path in logs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o400)
    other = tmp_path / "sys/kernel/security/integrity/ima/policy"
    other.touch(mode=0o600)
    shutil.copy(SYSTEMD / "tmpfiles.d/provider-proxy.conf", tmp_path / "usr/lib/tmpfiles.d")
    done = tool("systemd-tmpfiles", f"--root={tmp_path}", "--create", "provider-proxy.conf")
    assert done.returncode == 0, done.stderr
    for path in logs:
        assert stat.S_IMODE(path.stat().st_mode) == 0o440
        assert (path.stat().st_uid, path.stat().st_gid) == (0, 4321)
    assert stat.S_IMODE(other.stat().st_mode) == 0o600
    secrets = (tmp_path / "etc/provider-proxy/secrets").stat()
    assert (stat.S_IMODE(secrets.st_mode), secrets.st_uid, secrets.st_gid) == (0o700, 0, 0)
    config = (tmp_path / "etc/provider-proxy").stat()
    assert (stat.S_IMODE(config.st_mode), config.st_gid) == (0o750, 4321)
    bridge = (tmp_path / "etc/provider-proxy-bridge").stat()
    assert (stat.S_IMODE(bridge.st_mode), bridge.st_gid) == (0o750, 4322)
