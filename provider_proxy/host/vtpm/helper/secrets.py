"""Asks provider-proxy-vtpm-secret, which is root, for the passphrase of an encrypted state: a descriptor.

The passphrase is in a pipe that goes on to swtpm as it is; nobody reads it here, and nothing keeps it.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from provider_proxy.errors import VtpmError

LIMIT_S = 25.0  # two questions to libvirt of 10 s each
MAX_REASON_BYTES = 200


class NoSecretError(VtpmError):
    """libvirt does not give the secret, or nobody asks it; the text says why."""


@contextmanager
def passphrase_fd(path: Path | None, secret: uuid.UUID) -> Iterator[int]:
    """A pipe that holds the passphrase; closed in the end. Blocks for as long as libvirt takes.

    Args:
        path: of the socket; None where no secret is asked for.

    Raises:
        NoSecretError: it is not given.
    """
    if path is None:
        raise NoSecretError("secrets are not asked for")
    fds: list[int] = []
    said = b""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(LIMIT_S)
            sock.connect(str(path))
            sock.sendall(f"{secret}\n".encode("ascii"))
            said, fds, _, _ = socket.recv_fds(sock, MAX_REASON_BYTES, 1)
    except OSError as exc:
        for fd in fds:
            os.close(fd)
        raise NoSecretError(f"provider-proxy-vtpm-secret does not answer: {exc}") from exc
    if said != b"+" or not fds:
        for fd in fds:
            os.close(fd)
        reason = "".join(
            c if c.isprintable() else "?" for c in said.decode("ascii", "replace").strip()
        )
        raise NoSecretError(f"its secret is not given: {reason or 'no reason'}")
    try:
        yield fds[0]
    finally:
        os.close(fds[0])
