"""libvirt's status file of a domain, `/run/libvirt/qemu/NAME.xml`, as a value.

libvirtd, which is root, writes it at each change of the domain's state. Pure: bytes in, `Domain` out.
Does not check: the file's owner, and whether its process lives.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from provider_proxy.errors import VtpmError
from provider_proxy.host.vtpm.entries import Origin

# libvirt's first running states of a domain that began here, and of one that came in. Before that, both
# are in ("paused", "migration"): a restored domain is loaded into its QEMU like a migration.
BEGAN_HERE: Final = frozenset(
    {("running", "booted"), ("running", "restored"), ("running", "from snapshot")}
)
CAME_IN: Final = frozenset(
    {("running", "migrated"), ("running", "postcopy"), ("running", "postcopy-failed")}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlace:
    """Where swtpm keeps a vTPM's state, according to libvirt.

    Attributes:
        path: a directory with `tpm2-00.permall`, or the state itself; None for libvirt's default.
        is_file: the path is a file or volume with the state in swtpm's linear format.
    """

    path: Path | None = None
    is_file: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A domain with a vTPM, as libvirt sees it.

    Attributes:
        pid: of its QEMU.
        state, reason: libvirt's terms, "running" and "booted" for example.
        place: of the vTPM's state.
        secret: UUID of libvirt's secret that encrypts the state; None where it is not encrypted.
    """

    vm: uuid.UUID
    name: str
    pid: int
    state: str
    reason: str
    place: StatePlace
    secret: uuid.UUID | None

    @property
    def runs(self) -> bool:
        """Whether the guest is here and nowhere else: it executes, or a person has paused it.

        A domain that waits for an incoming migration, or was stopped by an outgoing one, does not run.
        """
        return self.state == "running" or (self.state, self.reason) == ("paused", "user")

    @property
    def origin(self) -> Origin:
        """Where the domain began, as far as its first running state shows."""
        if (self.state, self.reason) in BEGAN_HERE:
            return "here"
        return "elsewhere" if (self.state, self.reason) in CAME_IN else "unknown"


def parse_status(data: bytes) -> Domain | None:
    """Read a status file; None where the domain has no vTPM or no process yet.

    Args:
        data: the whole file, which root wrote.

    Raises:
        VtpmError: it is not a status file.
    """
    try:
        root = ElementTree.fromstring(data)  # noqa: S314  # root's own file
    except (ElementTree.ParseError, ValueError) as exc:
        raise VtpmError(f"libvirt's status file cannot be read: {exc}") from exc
    domain = root.find("domain")
    if root.tag != "domstatus" or domain is None:
        raise VtpmError("libvirt's status file holds no domain")
    backend = next(
        (
            found
            for found in domain.iterfind("./devices/tpm/backend[@type='emulator']")
            if found.get("version", "2.0") == "2.0"
        ),
        None,
    )
    pid = root.get("pid", "")
    if backend is None or not pid.isascii() or not pid.isdecimal() or not 1 < int(pid) < 2**31:
        return None
    try:
        vm = uuid.UUID((domain.findtext("uuid") or "").strip())
        secret = backend.find("encryption")
        secret_uuid = None if secret is None else uuid.UUID(secret.get("secret", ""))
    except ValueError as exc:
        raise VtpmError("libvirt's status file has a UUID that cannot be read") from exc
    return Domain(
        vm=vm,
        name=domain.findtext("name") or "",
        pid=int(pid),
        state=root.get("state", ""),
        reason=root.get("reason", ""),
        place=_place_of(backend),
        secret=secret_uuid,
    )


def _place_of(backend: ElementTree.Element) -> StatePlace:
    """The state's place; libvirt 10.10 and later can set it: formatdomain.html, "TPM device"."""
    source = backend.find("source")
    path = "" if source is None else source.get("path", "")
    if source is None or not path.startswith("/"):
        return StatePlace()
    return StatePlace(path=Path(path), is_file=source.get("type") == "file")
