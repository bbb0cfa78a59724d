"""A small CA for the provider: certificates of the server and of tenants, and their revocation.

For a first set-up and for tests; a provider that has a CA keeps using it. Keys are P-256, not
encrypted, readable by their owner only. Files are written under temporary names and then linked to their
final names, which fails if a name exists: no file is ever overwritten, and a step makes all its files or
none. Only the CRL is replaced, atomically, by one process at a time. `now` is a parameter.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from provider_proxy.common.crl import read_crls
from provider_proxy.common.tls import TlsFiles, load_certificates, load_pair
from provider_proxy.errors import HostError, UsageError

CA_CERT, CA_KEY, CRL = "ca.crt", "ca.key", "crl.pem"
CA_DAYS = 3650
CRL_DAYS = 30
SKEW = timedelta(minutes=5)  # a clock that is slow by less than this accepts a new certificate
KEY_SUFFIX = ".key"  # of files that only their owner may read

Key = ec.EllipticCurvePrivateKey
Crl = x509.CertificateRevocationList


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A certificate and its private key: the CA, the server, or a tenant."""

    certificate: x509.Certificate
    key: Key

    def key_pem(self) -> bytes:
        """The private key, not encrypted."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pem(signed: x509.Certificate | Crl) -> bytes:
    """PEM, as the files hold it."""
    return signed.public_bytes(Encoding.PEM)


def crl_number(crl: Crl) -> int:
    """Its number, which rises with each CRL. Raises: x509.ExtensionNotFound."""
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def is_revoked(crl: Crl, certificate: x509.Certificate) -> bool:
    """True where the CRL lists its serial number. Does not check: that both are of the same CA."""
    return crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None


def new_authority(now: datetime) -> Holder:
    """A CA for `CA_DAYS`; it signs certificates and CRLs, and no other CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Each CA has a name of its own, so that two that are trusted at once are not confused.
    name = _common_name(f"provider-proxy CA {_key_id(key).digest.hex()[:8]}")
    builder = _builder(name, name, key, now, now + timedelta(days=CA_DAYS), is_ca=True)
    return Holder(certificate=builder.sign(key, SHA256()), key=key)


def issue(
    ca: Holder,
    common_name: str,
    names: Iterable[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
    *,
    days: int,
    now: datetime,
) -> Holder:
    """Make a key, and certify it.

    Args:
        common_name: for people; 64 characters at most.
        names: the holder's identities or addresses; only these are compared.
        purpose: an extended key usage.

    Raises:
        UsageError: `days` is out of range, or goes beyond the CA's own end.
    """
    if not 1 <= days <= CA_DAYS:
        raise UsageError(f"--days must be in 1..{CA_DAYS}")
    not_after = (now + timedelta(days=days)).replace(microsecond=0)
    end = ca.certificate.not_valid_after_utc
    if not_after > end:
        raise UsageError(
            f"--days: the certificate must not outlive the CA, which expires on {end:%Y-%m-%d}"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _common_name(common_name)
    builder = (
        _builder(subject, ca.certificate.subject, key, now, not_after, is_ca=False)
        .add_extension(x509.SubjectAlternativeName(dict.fromkeys(names)), critical=False)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_issuer_id(ca), critical=False)
    )
    return Holder(certificate=builder.sign(ca.key, SHA256()), key=key)


def sign_crl(
    ca: Holder, number: int, revoked: Iterable[x509.RevokedCertificate], now: datetime
) -> Crl:
    """A CRL that is valid for `CRL_DAYS` from now."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.certificate.subject)
        .last_update(now - SKEW)
        .next_update(now + timedelta(days=CRL_DAYS))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_issuer_id(ca), critical=False)
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(ca.key, SHA256())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: Key,
    now: datetime,
    not_after: datetime,
    *,
    is_ca: bool,
) -> x509.CertificateBuilder:
    # digitalSignature; four that nobody needs; keyCertSign and cRLSign; two of key agreement
    usage = x509.KeyUsage(not is_ca, False, False, False, False, is_ca, is_ca, False, False)
    constraints = x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())  # 159 random bits
        .not_valid_before(now - SKEW)
        .not_valid_after(not_after)
        .add_extension(constraints, critical=True)
        .add_extension(usage, critical=True)
        .add_extension(_key_id(key), critical=False)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_id(key: Key) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _issuer_id(ca: Holder) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())


def load_certificate(path: Path) -> x509.Certificate:
    """A file's first certificate; those of its CAs may follow it. Raises: HostError."""
    return load_certificates("the certificate", path)[0]


def load_authority(directory: Path) -> Holder:
    """The CA with its key. Raises: HostError."""
    path = directory / CA_KEY
    names = ("", "the certificate of the CA", "the key of the CA")
    certificate, key = load_pair(TlsFiles(cert=directory / CA_CERT, key=path, names=names))
    if not isinstance(key, Key):
        raise HostError(f"the key of the CA: {path} is not a P-256 key, as pki makes them")
    return Holder(certificate=certificate, key=key)


def load_crl(directory: Path, ca: x509.Certificate) -> Crl:
    """The CRL, signed by this CA. Raises: HostError. Does not check: its dates."""
    path = directory / CRL
    lists = read_crls("the CRL", path, (ca,))
    if len(lists) > 1:
        raise HostError(f"the CRL: {path} holds {len(lists)} CRLs, must hold one")
    crl = lists[0][0]
    try:
        crl_number(crl)
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise HostError(f"the CRL: {path} has no CRL number") from exc
    if crl.issuer != ca.subject:
        raise HostError(f"the CRL: {path} was not issued by the CA in {CA_CERT}")
    return crl


def update_crl(directory: Path, revoke: x509.Certificate | None, *, now: datetime) -> Crl:
    """Sign the CRL again, with one more certificate; one that is already on it is not added again.

    Args:
        revoke: of this CA; None to keep the entries, for another `CRL_DAYS`.

    Raises:
        HostError: no CA, or the CRL is missing, damaged or another CA's. No new CRL is started then:
            revoked certificates would be valid again.
    """
    ca = load_authority(directory)
    with _writing(directory), _locked(directory), contextlib.ExitStack() as parts:
        old = load_crl(directory, ca.certificate)
        entries = list(old)
        if revoke is not None:
            if is_revoked(old, revoke):
                return old
            entry = x509.RevokedCertificateBuilder().serial_number(revoke.serial_number)
            entries.append(entry.revocation_date(now).build())
        crl = sign_crl(ca, crl_number(old) + 1, entries, now)
        _write_part(parts, directory / CRL, pem(crl)).replace(directory / CRL)
        _sync(directory)
    return crl


def create(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make all of these files in a directory, or none; keys are readable by their owner only.

    Raises:
        UsageError: one exists already.
        HostError: the directory is accessible to others, or cannot be written.
    """
    with _writing(directory), contextlib.ExitStack() as undo, contextlib.ExitStack() as parts:
        _make_directory(directory, undo)
        staged = {
            directory / name: _write_part(parts, directory / name, data)
            for name, data in files.items()
        }
        for path, part in staged.items():
            try:
                os.link(part, path)
            except FileExistsError as exc:
                raise UsageError(f"{path} exists already; nothing was made") from exc
            undo.callback(path.unlink)
        _sync(directory)
        undo.pop_all()


def _make_directory(directory: Path, undo: contextlib.ExitStack) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True)
        undo.callback(_remove_if_empty, directory)
    except FileExistsError:
        mode = directory.stat().st_mode
        if not stat.S_ISDIR(mode) or mode & 0o077:
            raise HostError(f"{directory} must be a directory with mode 0700") from None


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # another process has put files into it
        directory.rmdir()


def _write_part(parts: contextlib.ExitStack, path: Path, data: bytes) -> Path:
    """Write a temporary file beside `path`; `parts` removes it."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    mode = 0o600 if path.suffix == KEY_SUFFIX else 0o644
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    parts.callback(part.unlink, missing_ok=True)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return part


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise HostError(f"cannot write in {directory}: {exc.strerror}") from exc


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process that holds it."""
    fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
