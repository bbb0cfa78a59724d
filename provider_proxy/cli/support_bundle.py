"""`provider-proxy support-bundle`: collect diagnostic data in one archive without secrets.

Every part is text. A part that is not available holds the reason instead. Nothing is sent anywhere: the
operator looks through the archive and passes it on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import platform
import ssl
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from provider_proxy.cli import ask_admin
from provider_proxy.cli.arguments import DEFAULT_CONFIG
from provider_proxy.cli.check_config import lines_of
from provider_proxy.cli.redaction import Redactor
from provider_proxy.common.addresses import parse_url
from provider_proxy.common.files import is_there, write_private
from provider_proxy.common.settings.document import Loaded
from provider_proxy.common.version import program_version
from provider_proxy.errors import ProviderProxyError, UsageError
from provider_proxy.host.config.load import load
from provider_proxy.host.config.tables import Config

UNIT = "provider-proxy.service"
UNIT_PROPERTIES = (
    "ActiveState,SubState,Result,NRestarts,ExecMainStatus,StatusText,ActiveEnterTimestamp,"
    "MemoryCurrent,TasksCurrent,FragmentPath,DropInPaths"
)
LOG_LINES = 2000
MAX_PART_BYTES = 4 << 20
PROGRAM_LIMIT_S = 20.0
DOCTOR_LIMIT_S = 300.0  # it makes an RSA key, which takes a slow chip minutes
MAX_FILES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help=f"the daemon's configuration, TOML (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the archive, mode 0600 (default: provider-proxy-support-TIME.tar.gz in this folder)",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="the daemon's log as a file (default: the unit's last 2,000 lines in the journal)",
    )
    parser.add_argument(
        "--with-names",
        action="store_true",
        help="keep the names of tenants, registrars and VMs; otherwise they become tenant-1 and so on",
    )
    parser.add_argument(
        "--no-tpm",
        action="store_true",
        help="do not examine the TPM, which keeps it busy for some seconds",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Collect, redact and write.

    Raises:
        UsageError: the archive is there already.
        HostError: it cannot be written.
    """
    out: Path = args.out or Path(
        time.strftime("provider-proxy-support-%Y%m%dT%H%M%SZ.tar.gz", time.gmtime())
    )
    if is_there(out):
        raise UsageError(f"{out} is there already; name another file with --out")
    loaded, problem = _configuration(args.config)
    status, no_status = _status(loaded)
    redactor = None if args.with_names else _redactor(loaded, status)
    parts: dict[str, Callable[[], str]] = {
        "versions.txt": _versions,
        "configuration.txt": lambda: (
            f"not here: {problem}\n" if loaded is None else "\n".join(lines_of(loaded)) + "\n"
        ),
        "files.txt": lambda: "\n".join(_files(args.config, loaded)) + "\n",
        "unit.txt": lambda: _output("systemctl", "show", UNIT, "-p", UNIT_PROPERTIES),
        "status.json": lambda: (
            f"not here: {no_status}\n" if status is None else json.dumps(status, indent=1) + "\n"
        ),
        "log.txt": lambda: _log(args.log),
    }
    if not args.no_tpm:
        parts["doctor.json"] = lambda: _doctor(args.config)
    made, missing = _collect(parts, redactor, names_known=loaded is not None or args.with_names)
    if loaded is None:
        missing["configuration.txt"] = problem
    if status is None:
        missing["status.json"] = no_status
    write_private(out, _archive(made))
    if args.json:
        print(json.dumps({"file": str(out), "parts": sorted(made), "missing": missing}))
        return 0
    print(f"{out}: {', '.join(made)}")
    for name, why in missing.items():
        print(f"  {name} has only the reason: {why}")
    print("check its contents before you pass it on")
    return 0


def _collect(
    parts: Mapping[str, Callable[[], str]], redactor: Redactor | None, *, names_known: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Each part's text, and why some have none."""
    made, missing = {}, {}
    for name, make in parts.items():
        try:
            if name == "log.txt" and not names_known:
                raise UsageError(
                    "the configuration, which says what names to hide, cannot be read; "
                    "repair it, or give --with-names"
                )
            text = make()
        except (ProviderProxyError, OSError, subprocess.SubprocessError) as exc:
            missing[name] = str(exc)
            text = f"not here: {exc}\n"
        text = (redactor or Redactor({})).hide(text)
        made[name] = text.encode("utf-8", "replace")[-MAX_PART_BYTES:].decode("utf-8", "ignore")
    return made, missing


def _configuration(path: Path) -> tuple[Loaded[Config] | None, str]:
    try:
        return load(path), ""
    except ProviderProxyError as exc:
        return None, str(exc)


def _status(loaded: Loaded[Config] | None) -> tuple[dict[str, Any] | None, str]:
    if loaded is None or not loaded.config.admin.address:
        return None, "no configuration that names admin.address"
    try:
        return ask_admin.AdminClient(loaded.config.admin.address[0]).status(), ""
    except ProviderProxyError as exc:
        return None, str(exc)


def _redactor(loaded: Loaded[Config] | None, status: Mapping[str, Any] | None) -> Redactor:
    if loaded is None:
        return Redactor({})
    config = loaded.config
    tenants = [(name, *map(str, rules.identities)) for name, rules in config.tenants.items()]
    known = {name for group in tenants for name in group}
    listed = (status or {}).get("tenants", {}).get("listed", [])
    tenants += [(each["name"],) for each in listed if each["name"] not in known]
    registrars = [(name, parse_url(table.url).host) for name, table in config.registrars.items()]
    vms = [(str(vm),) for rules in config.tenants.values() for vm in rules.vms]
    return Redactor({"tenant": tenants, "registrar": registrars, "vm": vms})


def _versions() -> str:
    lines = [
        f"provider-proxy {program_version()}",
        f"Python {platform.python_version()} {sys.executable}",
        ssl.OPENSSL_VERSION,
        f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
    ]
    try:
        lines.append(platform.freedesktop_os_release().get("PRETTY_NAME", ""))
    except OSError as exc:
        lines.append(f"no os-release: {exc}")
    packages = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    lines += [f"  {name} {version}" for name, version in sorted(packages.items())]
    return "\n".join(lines) + "\n"


def _files(config: Path, loaded: Loaded[Config] | None) -> Iterator[str]:
    """Who owns what in the folders of configuration and state; no contents."""
    folders = [config.parent, *([] if loaded is None else [loaded.config.state_dir])]
    for folder in dict.fromkeys(folders):
        yield str(folder)
        try:
            paths = sorted(folder.rglob("*"))
        except OSError as exc:
            yield f"  {exc}"
            continue
        for path in paths[:MAX_FILES]:
            try:
                seen = path.lstat()
            except OSError as exc:
                yield f"  {path.name}: {exc.strerror}"
                continue
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seen.st_mtime))
            yield (
                f"  {stat.filemode(seen.st_mode)} {seen.st_uid}:{seen.st_gid} {seen.st_size:>10} {when} "
                f"{path.relative_to(folder)}"
            )


def _log(path: Path | None) -> str:
    if path is None:
        return _output(
            "journalctl", "-u", UNIT, "-n", str(LOG_LINES), "--no-pager", "-o", "short-iso"
        )
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_PART_BYTES))
        lines = file.read(MAX_PART_BYTES).decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-LOG_LINES:]) + "\n"


def _doctor(config: Path) -> str:
    """In a process of its own: the chip may hang."""
    program = [sys.executable, "-I", "-m", "provider_proxy", "--log-level", "error"]
    return _output(
        *program, "tpm", "doctor", "--json", "--config", str(config), limit_s=DOCTOR_LIMIT_S
    )


def _output(*words: str, limit_s: float = PROGRAM_LIMIT_S) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, stdin=subprocess.DEVNULL, timeout=limit_s, check=False
        )
    except FileNotFoundError as exc:
        raise UsageError(f"{words[0]} is not here") from exc
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip()[-2000:]
        raise UsageError(
            f"{words[0]} ended with {done.returncode}: {reason or text.strip()[-2000:]}"
        )
    return text


def _archive(parts: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in parts.items():
            data = text.encode()
            info = tarfile.TarInfo(f"provider-proxy-support/{name}")
            info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
