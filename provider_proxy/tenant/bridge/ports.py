"""Which host's agent listens at which port: a file that outlives restarts and changes of the hosts.

A verifier keeps asking at the port that it was told, so a port is never given to another host, not even
when its host is gone: the file keeps every port that was assigned.
"""

from __future__ import annotations

import json
from pathlib import Path

from provider_proxy.common.files import is_there, read_file, write_private
from provider_proxy.errors import EvidenceFormatError, HostError
from provider_proxy.evidence.strict_json import Fields, parse_json_object

FORMAT = "provider-proxy/bridge-ports/1"
FILE_NAME = "ports.json"
MAX_FILE_BYTES = 8 * 1024 * 1024
MAX_PORT = 65535


class PortTable:
    """The file of a state directory.

    Args:
        first, last: ports that may be assigned from now on; earlier ones stay.

    Raises:
        HostError: the file is damaged.
    """

    def __init__(self, directory: Path, first: int, last: int) -> None:
        self._path = directory / FILE_NAME
        self._range = range(first, last + 1)
        self._ports: dict[str, int] = {}
        if is_there(self._path):
            self._ports = _parse(read_file(self._path, MAX_FILE_BYTES), self._path)

    def ports_of(self, names: list[str]) -> dict[str, int]:
        """A port for each host; new ones are on disk when this returns.

        Raises:
            HostError: no port is left, or the file cannot be written.
        """
        new = [name for name in names if name not in self._ports]
        if new:
            given = dict(self._ports)  # used once it is on disk
            taken = set(given.values())
            free = (port for port in self._range if port not in taken)
            for name in new:
                port = next(free, None)
                if port is None:
                    raise HostError(
                        f"no port is left for {name}: bridge.first_port to bridge.last_port has "
                        f"{len(self._range)} ports, and {self._path} has assigned {len(taken)}"
                    )
                given[name] = port
            data = {"format": FORMAT, "ports": given}
            write_private(self._path, json.dumps(data, indent=1).encode("ascii") + b"\n")
            self._ports = given
        return {name: self._ports[name] for name in names}


def _parse(data: bytes, path: Path) -> dict[str, int]:
    try:
        values = parse_json_object(data, "ports")
        if Fields(values, "file").text("format", 64) != FORMAT:
            raise EvidenceFormatError("its format is not known")
        table = values.get("ports")
        if not isinstance(table, dict):
            raise EvidenceFormatError("it has no ports")
        fields = Fields(table, "ports")
        ports = {name: fields.integer(name, MAX_PORT) for name in table}
        if 0 in ports.values():
            raise EvidenceFormatError("a host has port 0")
        if len(set(ports.values())) != len(ports):
            raise EvidenceFormatError("two hosts have the same port")
    except EvidenceFormatError as exc:
        raise HostError(
            f"{path} is damaged ({exc}); restore it: without it hosts get other ports than those "
            "that your verifier uses"
        ) from exc
    return ports
