"""One loader of certificates and keys, for servers and clients.

A file is checked before OpenSSL gets it, so that a message names the file, what is wrong with it and
what to do: OpenSSL's own message is "PEM lib". Keys follow PostgreSQL's rule (see `files.check_private`),
and there is never a prompt for a password. Dates are read here and judged in `dates`: a certificate that
has run out is loaded, unless `demand_current` is asked.

Reads files: not for an event loop's thread where they may be on a network.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from provider_proxy.common.dates import Dated
from provider_proxy.common.files import read_file, read_private
from provider_proxy.errors import HostError, UsageError

MAX_CERT_BYTES = 8 * 1024 * 1024  # bundles of all public CAs have 250 kB
MAX_KEY_BYTES = 256 * 1024
TICKETS = 1  # a connection of TLS 1.3; each holds the client's certificate and costs 0.1 ms
KEYLOG = "SSLKEYLOGFILE"
_BLOCK_RE = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----.*?-----END \1-----", re.DOTALL)
_KEY_LABELS = (b"PRIVATE KEY", b"RSA PRIVATE KEY", b"EC PRIVATE KEY")
_ENCRYPTED = b"ENCRYPTED PRIVATE KEY"
_OTHERS = {
    b"X509 CRL": "a CRL",
    b"CERTIFICATE REQUEST": "a request for a certificate",
    b"NEW CERTIFICATE REQUEST": "a request for a certificate",
    b"PUBLIC KEY": "a public key",
    b"CERTIFICATE": "a certificate",
    b"TRUSTED CERTIFICATE": "a certificate in OpenSSL's own form (see openssl x509)",
}
_DER = b"\x30"  # a SEQUENCE; no text begins with "0" in PEM


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """The TLS files of one side of a connection, each with what messages call it.

    Attributes:
        ca: whom the other side's certificate must come from; None for the system's CAs.
        cert, key: what this side shows; both or none.
        names: of the three: ("listen.client_ca", "listen.tls_cert", "listen.tls_key").

    Raises:
        UsageError: a certificate without its key, or a key without its certificate.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    names: tuple[str, str, str]

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise UsageError(f"{self.names[1]} and {self.names[2]} belong together: set both")


class ClientTable(Protocol):
    """A table of a file that says how to talk TLS with somebody."""

    @property
    def ca(self) -> Path | None: ...

    @property
    def client_cert(self) -> Path | None: ...

    @property
    def client_key(self) -> Path | None: ...


def client_files(key: str, table: ClientTable) -> TlsFiles:
    """The files of a table, "registrars.acme" for example, by the names of their keys."""
    return TlsFiles(
        ca=table.ca,
        cert=table.client_cert,
        key=table.client_key,
        names=(f"{key}.ca", f"{key}.client_cert", f"{key}.client_key"),
    )


def load_certificates(name: str, path: Path) -> tuple[x509.Certificate, ...]:
    """All certificates of a PEM file, one at least.

    Raises:
        HostError: it holds none, or one cannot be read; the message says what the file holds.
    """
    return tuple(_certificate(name, path, block) for block in _certificate_blocks(name, path))


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS of a listener: 1.2 at least; certificates of clients are demanded where `ca` is set.

    Raises:
        HostError: a file is wrong; the message says which and why.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = TICKETS
    _show(context, files, server=True)
    if files.ca is not None:
        _trust(context, files.names[0], files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS of a client, which checks the server's name.

    Raises:
        HostError: a file is wrong; the message says which and why.
    """
    ca = None if files.ca is None else _authorities(files.names[0], files.ca)
    try:
        context = ssl.create_default_context(cadata=ca)
    except OSError as exc:
        raise _not_created(exc, files.names[0]) from exc
    _show(context, files, server=False)
    return context


def pinned_context(server_cert: bytes, files: TlsFiles) -> ssl.SSLContext:
    """TLS to a server whose certificate is known beforehand, whatever its names say.

    Args:
        server_cert: PEM.
        files: own certificate and key.

    Raises:
        HostError: a file is wrong, or `server_cert` is not a certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # this one certificate is the anchor
    try:
        pem = x509.load_pem_x509_certificate(server_cert).public_bytes(Encoding.PEM)
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ValueError, ssl.SSLError) as exc:
        raise HostError(f"the expected server certificate cannot be read: {exc}") from exc
    _show(context, files, server=False)
    return context


def dates_of(files: TlsFiles) -> Iterator[Dated]:
    """When each file's certificates end: the own one, and of the CAs the last to expire.

    Raises:
        HostError: a file cannot be read.
    """
    if files.ca is not None:
        # A bundle may hold what has run out beside what has not: the last of them counts.
        found = [_dated(files.names[0], files.ca, each) for each in _readable(files)]
        if found:
            yield max(found, key=lambda dated: dated.not_after)
    if files.cert is not None:
        # A chain is as good as its shortest part.
        chain = load_certificates(files.names[1], files.cert)
        yield min(
            (_dated(files.names[1], files.cert, each) for each in chain),
            key=lambda dated: dated.not_after,
        )


def demand_current(files: TlsFiles, now: datetime | None = None) -> None:
    """For a command that asks once: report now what either side would refuse.

    Raises:
        HostError: the own certificate, or every CA, has expired or is not valid yet.
    """
    for dated in dates_of(files):
        problem = dated.problem(now or datetime.now(UTC))
        if problem is not None:
            raise HostError(problem)


def _certificate(name: str, path: Path, block: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(block)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise HostError(f"{name}: {path} holds a certificate that cannot be read: {exc}") from exc


def _dated(name: str, path: Path, certificate: x509.Certificate) -> Dated:
    return Dated(
        name=name,
        path=path,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def _readable(files: TlsFiles) -> Iterator[x509.Certificate]:
    """The CAs that our parser takes; it is stricter than OpenSSL, and a bundle holds old ones."""
    assert files.ca is not None
    for block in _certificate_blocks(files.names[0], files.ca):
        try:
            yield x509.load_pem_x509_certificate(block)
        except ValueError:
            continue


def _authorities(name: str, path: Path) -> str:
    """The certificates of a file of CAs, as OpenSSL takes them."""
    return "\n".join(block.decode("ascii") for block in _certificate_blocks(name, path)) + "\n"


def _trust(context: ssl.SSLContext, name: str, path: Path) -> None:
    try:
        context.load_verify_locations(cadata=_authorities(name, path))
    except (ssl.SSLError, ValueError) as exc:
        raise HostError(f"{name}: {path} cannot be used: {_words(exc)}") from exc


def _show(context: ssl.SSLContext, files: TlsFiles, *, server: bool) -> None:
    """Load the own certificate and key, if there are any, after a look at them."""
    if files.cert is None or files.key is None:
        return
    _, cert_name, key_name = files.names
    blocks = _certificate_blocks(cert_name, files.cert)
    key = _key_block(key_name, files.key)
    chain = [_certificate(cert_name, files.cert, block) for block in blocks]
    _check_pair(files, chain, key)
    _check_purpose(cert_name, files.cert, chain[0], server)
    # From memory: what was looked at is what is used, and a pipe can be read but once.
    try:
        show_pem(context, b"\n".join([*blocks, key]))
    except HostError as exc:
        raise HostError(f"{cert_name}, {key_name}: {files.cert}, {files.key}: {exc}") from exc


def show_pem(context: ssl.SSLContext, pem: bytes) -> None:
    """Load an own certificate and key that are in memory, in one text.

    Raises:
        HostError: OpenSSL does not accept them.
    """
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)  # OpenSSL's interface takes paths alone
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(pem + b"\n")
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=_no_password)
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise HostError(f"OpenSSL does not accept the certificate and key: {_words(exc)}") from exc
    finally:
        os.close(fd)


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # else OpenSSL asks on the terminal, and waits


def load_pair(files: TlsFiles) -> tuple[x509.Certificate, PrivateKeyTypes]:
    """An own certificate, the first of its file, and its private key.

    Raises:
        HostError: a file is wrong; the message says which and why.
    """
    assert files.cert is not None
    assert files.key is not None
    chain = load_certificates(files.names[1], files.cert)
    return chain[0], _check_pair(files, chain, _key_block(files.names[2], files.key))


def _check_pair(files: TlsFiles, chain: Sequence[x509.Certificate], key: bytes) -> PrivateKeyTypes:
    """The private key, which is the first certificate's."""
    _, cert_name, key_name = files.names
    try:
        private = load_pem_private_key(key, password=None)
    except TypeError as exc:
        raise _encrypted(key_name, files.key) from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise HostError(f"{key_name}: {files.key} holds a key that cannot be read: {exc}") from exc
    public = _public(private.public_key())
    fits = [number for number, each in enumerate(chain) if _public(each.public_key()) == public]
    if not fits:
        raise HostError(f"{key_name}: {files.key} is not the key of the certificate {files.cert}")
    if 0 not in fits:
        raise HostError(
            f"{cert_name}: {files.cert} must begin with the certificate of {files.key}; its CAs "
            "come after it"
        )
    return private


def _key_block(name: str, path: Path) -> bytes:
    blocks = _blocks(name, path, MAX_KEY_BYTES, private=True)
    keys = [text for label, text in blocks if label in _KEY_LABELS]
    if len(keys) > 1:
        raise HostError(
            f"{name}: {path} holds {len(keys)} private keys; keep only the one that is used"
        )
    if keys:
        return keys[0]
    if any(label == _ENCRYPTED for label, _ in blocks):
        raise _encrypted(name, path)
    raise HostError(f"{name}: {path} {_instead(blocks, 'a private key')}")


def _not_created(exc: OSError, ca_name: str) -> HostError:
    """Why a client's context could not be made."""
    if isinstance(exc, ssl.SSLError):
        return HostError(f"{ca_name}: cannot be used: {_words(exc)}")
    keylog = os.environ.get(KEYLOG, "")
    return HostError(f"{KEYLOG}: cannot write {keylog}: {exc.strerror}; unset the variable")


def _certificate_blocks(name: str, path: Path) -> list[bytes]:
    blocks = _blocks(name, path, MAX_CERT_BYTES)
    found = [text for label, text in blocks if label == b"CERTIFICATE"]
    if not found or not all(text.isascii() for text in found):
        raise HostError(f"{name}: {path} {_instead(blocks, 'a certificate')}")
    return found


def _blocks(
    name: str, path: Path, limit: int, *, private: bool = False
) -> Sequence[tuple[bytes, bytes]]:
    """The label and the text of each part of a PEM file, one at least."""
    try:
        data = read_private(path, limit) if private else read_file(path, limit)
    except (HostError, UsageError) as exc:
        raise HostError(f"{name}: {exc}") from exc
    blocks = [(match[1], match[0]) for match in _BLOCK_RE.finditer(data)]
    if blocks:
        return blocks
    if not data.strip():
        raise HostError(f"{name}: {path} is empty")
    if data[:1] == _DER:
        what = "pkey" if private else "x509"
        raise HostError(
            f"{name}: {path} is DER, and must be PEM: "
            f"openssl {what} -inform der -in {path} -out {path.with_suffix('.pem')}"
        )
    raise HostError(f"{name}: {path} is not PEM: it has no complete -----BEGIN …----- part")


def _instead(blocks: Sequence[tuple[bytes, bytes]], wanted: str) -> str:
    """What a file holds instead of what it should."""
    label = blocks[0][0]
    has = "a private key" if label.endswith(b"PRIVATE KEY") else _OTHERS.get(label)
    if has is None or has == wanted:
        return f"holds no {wanted.removeprefix('a ')}"
    swapped = {has, wanted} == {"a private key", "a certificate"}
    return f"holds {has}, not {wanted}{': are the two files swapped?' if swapped else ''}"


def _encrypted(name: str, path: Path | None) -> HostError:
    return HostError(
        f"{name}: {path} is encrypted, and this program never asks for a password: decrypt it "
        f"(openssl pkey -in {path} -out …), and make it readable by its owner only"
    )


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _check_purpose(name: str, path: Path, leaf: x509.Certificate, server: bool) -> None:
    """Refuse what the other side would refuse: for example a client's certificate for a server."""
    wanted = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return  # it may be used for all, or OpenSSL says what is wrong with it
    if wanted not in usage and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in usage:
        side, purpose = ("servers", "serverAuth") if server else ("clients", "clientAuth")
        raise HostError(f"{name}: {path} is not for {side}: its extended key usage lacks {purpose}")


def _words(exc: Exception) -> str:
    """OpenSSL's reason without its file and line."""
    reason = getattr(exc, "reason", None)
    if isinstance(reason, str) and reason:
        return reason.replace("_", " ").lower()
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
