"""Gets the passphrase of an encrypted state, as a descriptor, from provider-proxy-vtpm-secret (root).

The passphrase is in a pipe that is passed on to swtpm; this process neither reads nor stores it.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from provider_proxy.errors import VtpmError

LIMIT_S = 25.0  # two calls to libvirt of 10 s each
MAX_REASON_BYTES = 200


class NoSecretError(VtpmError):
    """libvirt does not give the secret, or it cannot be asked; the text says why."""


@contextmanager
def passphrase_fd(path: Path | None, secret: uuid.UUID) -> Iterator[int]:
    """A pipe that holds the passphrase; closed at the end. Blocks for as long as libvirt takes.

    Args:
        path: of the socket; None where no secrets are requested.

    Raises:
        NoSecretError: the passphrase is not available.
    """
    if path is None:
        raise NoSecretError(
            "secrets are not requested (provider-proxy-vtpm runs without --secrets)"
        )
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
        raise NoSecretError(f"libvirt's secret is not available: {reason or 'no reason given'}")
    try:
        yield fds[0]
    finally:
        os.close(fds[0])
