"""What subcommands share: bounded reads, safe writes, URLs' TLS."""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import os
from pathlib import Path

from provider_proxy.attestation_key import insecure_ak_from_pem, parse_ak
from provider_proxy.errors import HostError, UsageError
from provider_proxy.model import AttestationKey

MAX_KEY_FILE_BYTES = 64 * 1024


def read_file(path: Path, limit: int) -> bytes:
    """Read a whole file.

    Raises:
        HostError: it cannot be read.
        UsageError: it is larger than `limit` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}") from exc
    if len(data) > limit:
        raise UsageError(f"{path} is larger than {limit} bytes")
    return data


def write_file(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read; whole or not at all.

    Raises:
        HostError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        part.replace(path)
    except OSError as exc:
        raise HostError(f"cannot write {path}: {exc.strerror}") from exc


def load_ak(ak_tpm: Path | None, insecure_pem: Path | None) -> AttestationKey:
    """The trusted AK of a command line.

    Args:
        ak_tpm: a TPM2B_PUBLIC, raw or base64, as registrars give it.
        insecure_pem: a PEM, whose attributes nobody has checked.

    Raises:
        UntrustedAkError, EvidenceFormatError: not an attestation key.
    """
    if ak_tpm is not None:
        data = read_file(ak_tpm, MAX_KEY_FILE_BYTES)
        with contextlib.suppress(binascii.Error):  # raw, then
            data = base64.b64decode(data.strip(), validate=True)
        return parse_ak(data)
    assert insecure_pem is not None  # argparse demands one of the two
    return insecure_ak_from_pem(read_file(insecure_pem, MAX_KEY_FILE_BYTES))


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """`URL`, and how to speak TLS with it."""
    parser.add_argument("url", metavar="URL", help="the proxy, https://host:8890 for example")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="CA of the proxy's certificate")
    parser.add_argument("--cert", type=Path, metavar="FILE", help="own certificate, PEM")
    parser.add_argument("--key", type=Path, metavar="FILE", help="its private key, PEM")
