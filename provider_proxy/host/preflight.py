"""Checks before a start: every file that a configuration names, and what else the daemon needs.

`check-config` shows all findings. `serve` makes those checks here that would otherwise fail only after
the chip has made a key: addresses in use, an audit log that cannot be written. Nothing is changed here.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from provider_proxy.common.addresses import is_conflict
from provider_proxy.common.files import credentials_directory, is_there, read_secret
from provider_proxy.common.findings import ERROR, WARNING, Finding, attempt, of_dates
from provider_proxy.common.tls import TlsFiles, client_context, server_context
from provider_proxy.errors import HostError
from provider_proxy.host.config.chip_tables import KEYLIME_AGENT
from provider_proxy.host.config.material import files_of, listen_crls, listen_files, read_dates
from provider_proxy.host.config.tables import Config
from provider_proxy.host.http import binding
from provider_proxy.host.tpm import device
from provider_proxy.trust.ek_store import EkStore

log = logging.getLogger(__name__)

OTHER_FILES = 128  # the TPM, the log, registrars, the operator's listener, files that are read
PROC = Path("/proc")


def find(config: Config) -> Iterator[Finding]:
    """All faults of what a configuration names. Opens files and, for a moment, ports."""
    if config.listen.tls_cert is not None:
        tls = listen_files(config.listen)
        yield from _look(_named(tls), partial(server_context, tls))
    yield from attempt(partial(listen_crls, config.listen))
    for files in files_of(config):
        yield from _look(_named(files), partial(client_context, files))
    yield from of_dates(partial(read_dates, config))
    for key in ("owner_auth_file", "endorsement_auth_file"):
        path, name = getattr(config.tpm, key), f"tpm.{key}"
        yield from _look(((name, path),), partial(read_secret, name, path))
    if config.quoter.kind == KEYLIME_AGENT:
        if config.keylime_agent.ek_ca:
            yield from attempt(partial(EkStore, *config.keylime_agent.ek_ca))
    else:
        problem = device.problem(config.tpm.tcti)
        if problem is not None:
            # A warning: often run on a machine without the TPM, or not as the daemon's user.
            yield Finding(level=WARNING, text=f"tpm.tcti: {problem}")
    yield from _state(config.state_dir)
    yield from attempt(partial(check_audit, config))
    yield from attempt(partial(check_conflicts, config))
    for key, addresses in addresses_of(config):
        for address in addresses:
            yield from _address(key, address)
    yield from _descriptors(config)


Named = Iterable[tuple[str, Path | None]]
"""Files by the keys that name them."""


def _named(files: TlsFiles) -> Named:
    return zip(files.names, (files.ca, files.cert, files.key), strict=True)


def _look(files: Named, call: Callable[[], object]) -> Iterator[Finding]:
    """A finding where a call fails; a warning where one of its files can exist only in the unit.

    systemd makes a unit's credentials when it starts the unit, and for that unit only.
    """
    for key, path in files:
        if path is not None and path.parent == credentials_directory() and not _has_credentials():
            text = f"{key}: the credential {path.name} exists only while the unit runs: not checked"
            yield Finding(level=WARNING, text=text)
            return
    yield from attempt(call)


def _has_credentials() -> bool:
    """False where the unit does not run, or where this user may not look."""
    try:
        return is_there(credentials_directory())
    except HostError:
        return False


def addresses_of(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the daemon listens on, by key."""
    yield "listen.address", config.listen.address
    yield "listen.front", config.listen.front
    yield "admin.address", config.admin.address
    if config.vtpm.enabled:
        yield "vtpm.socket", (f"unix:{config.vtpm.socket}",)


def check_start(config: Config, *, inherited: Collection[str] = ()) -> None:
    """Check what would otherwise stop a start late.

    Args:
        inherited: the keys whose sockets systemd has opened.

    Raises:
        HostError: an address is in use or not of this host, or the state directory or audit log cannot be
            written.
    """
    for closed in _state(config.state_dir):
        raise HostError(closed.text)
    check_audit(config)
    check_conflicts(config)
    finding = allow_connections(config)
    if finding is not None:
        log.warning("%s", finding.text)
    for key, addresses in addresses_of(config):
        if key not in inherited:
            binding.check_free(key, addresses)


def check_conflicts(config: Config) -> None:
    """Raises: HostError where two of our own listeners have the same address."""
    wanted = [(key, address) for key, addresses in addresses_of(config) for address in addresses]
    for (first, one), (second, other) in itertools.combinations(wanted, 2):
        if is_conflict(one, other):
            raise HostError(
                f"{second}: {other} is already used by {first}: {one}; set another port"
            )


def check_audit(config: Config) -> None:
    """Raises: HostError where the configured audit log cannot be written."""
    path = config.audit.path
    if not config.audit.enabled or path is None:
        return
    try:
        there = path.stat()
    except FileNotFoundError:
        folder = path.parent
        if not folder.is_dir():
            raise HostError(f"audit.path: the directory {folder} does not exist: make it") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise HostError(f"audit.path: this user cannot write to {folder}") from None
        return
    except OSError as exc:
        raise HostError(f"audit.path: cannot check {path}: {exc.strerror}") from exc
    if not stat.S_ISREG(there.st_mode):
        raise HostError(f"audit.path: {path} is not a regular file")
    if not os.access(path, os.R_OK | os.W_OK):
        raise HostError(f"audit.path: this user cannot write to {path}")


def _state(folder: Path) -> Iterator[Finding]:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return  # the daemon makes it
    except OSError as exc:
        yield Finding(level=ERROR, text=f"state_dir: cannot check {folder}: {exc.strerror}")
        return
    if not stat.S_ISDIR(status.st_mode):
        yield Finding(level=ERROR, text=f"state_dir: {folder} is not a directory")
    elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(
            level=ERROR,
            text=f"state_dir: {folder} is owned by uid {status.st_uid}, and this user has no access: "
            "run this command as the daemon's user",
        )


def _address(key: str, address: str) -> Iterator[Finding]:
    try:
        binding.check_free(key, (address,))
    except HostError as exc:
        words = None if address.startswith("unix:") else _holder(address)
        holder = None if words is None else " ".join(words)
        if getattr(exc.__cause__, "errno", None) != errno.EADDRINUSE:
            yield Finding(level=ERROR, text=str(exc))
        elif words is None or not _is_ours(words):
            who = "a running daemon, or another program" if holder is None else holder
            yield Finding(
                level=WARNING if holder is None else ERROR,
                text=f"{key}: {address} is in use: {who}",
            )


def _is_ours(words: Sequence[str]) -> bool:
    """Whether a command line starts this program: `provider-proxy …`, by Python or not."""
    program = [word.rpartition("/")[2] for word in words[:2]]
    return "provider-proxy" in program or tuple(words[1:3]) == ("-m", "provider_proxy")


def _holder(address: str) -> Sequence[str] | None:
    """The command line of the process that listens on a TCP port; None where it cannot be known."""
    port = int(address.rpartition(":")[2])
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # LISTEN
                inodes.add(f"socket:[{fields[9]}]")
    for process in PROC.iterdir():
        if not process.name.isdecimal():
            continue
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().split(b"\0")
                return [word.decode("utf-8", "replace") for word in words if word]
        except OSError:
            continue  # another user's, or gone
    return None


def _descriptors(config: Config) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.limits.max_connections + OTHER_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        yield Finding(
            level=WARNING,
            text=f"limits.max_connections: {config.limits.max_connections} connections need {needed} "
            f"open files, but this process may open {hard}: raise LimitNOFILE= in the unit, or allow "
            "fewer connections",
        )


def allow_connections(config: Config) -> Finding | None:
    """Raise the soft limit of open files to what the connections need; a finding where that fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.limits.max_connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return next(_descriptors(config), None)
