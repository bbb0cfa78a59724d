"""The tenant's store of TPM makers' CAs, read from files: usable files are used, others reported.

A store is a PEM bundle, a directory with directories below it, or several of either. In a directory the
files `*.pem`, `*.crt`, `*.cer` and `*.der` are read, and those below a directory `virtual` are for
virtual TPMs. A file that cannot be used does not affect the others. Only a file that marks CAs as virtual
must be readable: otherwise the store is refused, because it is not known which CAs it marks.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from provider_proxy.common.files import read_trusted
from provider_proxy.errors import EvidenceFormatError, HostError, UsageError
from provider_proxy.trust.ek_anchors import Anchors, Found
from provider_proxy.trust.ek_certificate import TpmCertificate, cut_certificate, parse_certificate
from provider_proxy.trust.ek_chain import why_no_ca

MAX_FILE_BYTES = 32 * 1024 * 1024  # a bundle of 10,000 CAs has 15 MB
MAX_STORE_BYTES = 64 * 1024 * 1024
MAX_FILES = 20_000
MAX_CERTIFICATES = 20_000  # all makers together have some hundreds
MAX_DEPTH = 8  # directories below each other
SUFFIXES = frozenset((".pem", ".crt", ".cer", ".der"))
VIRTUAL_DIRECTORY = "virtual"
# A block is bounded: a missing end must not cause a search through the rest of a large file.
PEM_RE = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----(.{0,100000}?)-----END \1-----", re.DOTALL)
PEM_BEGIN = b"-----BEGIN "
CERTIFICATE_LABELS = (b"CERTIFICATE", b"X509 CERTIFICATE")
NOT_CERTIFICATES = {
    b"TRUSTED CERTIFICATE": "a TRUSTED CERTIFICATE: its trust settings are not read; "
    "openssl x509 -in FILE makes a plain one",
    b"X509 CRL": "a CRL",
    b"PKCS7": "PKCS #7: openssl pkcs7 -print_certs makes PEM certificates of it",
    b"CMS": "CMS",
    b"CERTIFICATE REQUEST": "a request for a certificate",
    b"PUBLIC KEY": "a public key",
}
PKCS7_OID = bytes.fromhex("06092a864886f70d0107")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A part of a store that is not used.

    Attributes:
        source: the file; with its number where it is one of several in it.
    """

    source: str
    why: str


@dataclass(frozen=True, slots=True)
class LoadedStore:
    """What a store holds.

    Attributes:
        state: changes when a file does.
    """

    anchors: Anchors
    skipped: tuple[Skipped, ...]
    state: object


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    is_marked: bool
    status: os.stat_result | None


def load_store(paths: Sequence[Path]) -> LoadedStore:
    """Read a store.

    Raises:
        HostError: a directory cannot be read, or everybody can write it.
        UsageError: there is no CA in it, a mark `virtual` cannot be read, or it is too large.
    """
    files, skipped = _find(paths)
    found: list[Found] = []
    left = MAX_STORE_BYTES
    for file in files:
        bad: list[Skipped] = []
        try:
            data = read_trusted(file.path, min(left, MAX_FILE_BYTES))
        except (HostError, UsageError) as exc:
            bad.append(Skipped(str(file.path), str(exc).removeprefix(f"cannot read {file.path}: ")))
        else:
            left -= len(data)
            for source, certificate in _certificates(data, str(file.path), bad):
                found.append(
                    Found(certificate=certificate, source=source, is_marked=file.is_marked)
                )
        if bad and file.is_marked:
            raise UsageError(
                f"{bad[0].source}, which marks a CA as virtual, cannot be used: {bad[0].why}"
            )
        skipped += bad
        if left <= 0 or len(found) > MAX_CERTIFICATES:
            raise UsageError(
                f"the store of TPM makers' CAs has more than {MAX_CERTIFICATES} certificates or "
                f"{MAX_STORE_BYTES >> 20} MiB"
            )
    if not found:
        raise UsageError(_nothing_in(paths, skipped))
    return LoadedStore(Anchors(found), tuple(skipped), _state_of(files))


def state_of(paths: Sequence[Path]) -> object:
    """Changes whenever a file of the store changes, unless its times are set back.

    Raises:
        HostError, UsageError: as `load_store`.
    """
    return _state_of(_find(paths)[0])


def _nothing_in(paths: Sequence[Path], skipped: Sequence[Skipped]) -> str:
    where = ", ".join(map(str, paths))
    text = f"{where} has no CA certificate that can be used (*.pem, *.crt, *.cer, *.der)"
    if skipped:
        text += f"; {skipped[0].source}: {skipped[0].why}"
    return text


def _state_of(files: Sequence[_File]) -> object:
    return [
        (str(file.path), now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_mode)
        if (now := file.status) is not None
        else str(file.path)
        for file in files
    ]


def read_certificates(data: bytes) -> tuple[bytes, ...]:
    """The certificates in some bytes, not yet trusted: PEM blocks, or DER one after the other.

    Args:
        data: untrusted: a file, or what NV indices hold.
    """
    if PEM_BEGIN in data:
        blocks = _blocks(data, "", [])
        return tuple(block for _, block in blocks)
    found: list[bytes] = []
    while data:
        try:
            cut = cut_certificate(data)
        except EvidenceFormatError:
            # What cannot be cut is reported by the reader, where it comes first.
            return tuple(found) or (data,)
        found.append(cut)
        data = data[data.index(cut) + len(cut) :]
    return tuple(found)


# --- files --------------------------------------------------------------------------------------------


def _find(paths: Sequence[Path]) -> tuple[list[_File], list[Skipped]]:
    files: list[_File] = []
    skipped: list[Skipped] = []
    seen: set[tuple[int, int]] = set()
    for path in paths:
        try:
            status = path.stat()
        except OSError as exc:
            raise HostError(f"cannot read the CAs in {path}: {exc.strerror}") from exc
        if stat.S_ISDIR(status.st_mode):
            _walk(path, files, skipped, seen, is_marked=path.name == VIRTUAL_DIRECTORY, depth=0)
        else:
            files.append(_File(path, path.parent.name == VIRTUAL_DIRECTORY, status))
    return files, skipped


def _walk(
    directory: Path,
    files: list[_File],
    skipped: list[Skipped],
    seen: set[tuple[int, int]],
    *,
    is_marked: bool,
    depth: int,
) -> None:
    """Collect the files of a directory and of those below it; links are followed, cycles are not."""
    try:
        status = directory.stat()
        if status.st_mode & stat.S_IWOTH:
            raise HostError(f"{directory}: everybody can write it: chmod o-w {directory}")
        entries = sorted(directory.iterdir())
    except OSError as exc:
        raise HostError(f"cannot read the CAs in {directory}: {exc.strerror}") from exc
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    if depth > MAX_DEPTH:
        raise UsageError(f"{directory} is nested more than {MAX_DEPTH} directories deep")
    for entry in entries:
        try:
            mode: os.stat_result | None = entry.stat()
        except OSError:
            mode = None  # a dangling link, for example
        if mode is not None and stat.S_ISDIR(mode.st_mode):
            marked = is_marked or entry.name == VIRTUAL_DIRECTORY
            _walk(entry, files, skipped, seen, is_marked=marked, depth=depth + 1)
        elif entry.suffix.lower() in SUFFIXES:
            files.append(_File(entry, is_marked, mode))
        if len(files) > MAX_FILES:
            raise UsageError(f"{directory}: the store has more than {MAX_FILES} files")


# --- what is in a file ----------------------------------------------------------------------------------


def _certificates(
    data: bytes, source: str, skipped: list[Skipped]
) -> Iterator[tuple[str, TpmCertificate]]:
    """The CAs of a file and their places in it; anything else is added to `skipped`."""
    for where, block in _blocks(data, source, skipped):
        try:
            certificate = parse_certificate(block)
            why = why_no_ca(certificate)
        except EvidenceFormatError as exc:
            why = _what_it_is(block) or str(exc)
        if why is not None:
            skipped.append(Skipped(where, why))
        else:
            yield where, certificate


def _blocks(data: bytes, source: str, skipped: list[Skipped]) -> Iterator[tuple[str, bytes]]:
    """The DER blobs of a file, PEM or DER, each with a name for people."""
    if not data.strip():
        skipped.append(Skipped(source, "it is empty"))
        return
    if PEM_BEGIN not in data:
        yield source, data
        return
    blocks = list(PEM_RE.finditer(data))
    for number, block in enumerate(blocks):
        where = source if len(blocks) == 1 else f"{source} ({number + 1})"
        label, text = block.groups()
        if label not in CERTIFICATE_LABELS:
            kind = "a private key" if label.endswith(b"PRIVATE KEY") else label.decode("ascii")
            skipped.append(Skipped(where, f"it is {NOT_CERTIFICATES.get(label, kind)}"))
            continue
        try:
            yield where, base64.b64decode(b"".join(text.split()), validate=True)
        except binascii.Error:
            skipped.append(Skipped(where, "its PEM block is not base64"))
    if data.count(PEM_BEGIN) > len(blocks):
        skipped.append(
            Skipped(source, "a PEM block in it has no end: is the file still being copied?")
        )


def _what_it_is(block: bytes) -> str | None:
    """What a blob is that is not a certificate; None where that is not known."""
    if PKCS7_OID in block[:32]:
        return f"it is {NOT_CERTIFICATES[b'PKCS7']}"
    try:
        x509.load_der_x509_crl(block)
    except ValueError:
        return None
    return "it is a CRL"
