"""Is an endorsement key one of a genuine TPM? Its certificate's chain, walked issuer by issuer.

The certificates in a directory of the tenant's are all that is trusted: self-signed ones are the TPM
vendors' roots, the others are intermediates and must lead to such a root. Nothing is ever fetched.
`cryptography`'s own path building is for web servers: it refuses a critical subjectAltName of a
directory name and the purpose 2.23.133.8.1, which is what EK certificates have. So the walk is here:
bounded, and whatever it does not know it refuses. Revocation is not looked at: vendors publish next to
none; take a CA out of the directory instead. Source: TCG EK Credential Profile 2.x; RFC 5280 section 6.
"""

from __future__ import annotations

import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, ObjectIdentifier

from provider_proxy.common.files import read_trusted
from provider_proxy.errors import HostError, UntrustedEkError, UsageError
from provider_proxy.evidence.tpm_keys import CURVES, MIN_RSA_BITS

EK_PURPOSE = ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate
MAX_EK_CERT_BYTES = 16 * 1024  # real ones are 1 to 2 kB
MAX_FILE_BYTES = 1024 * 1024  # a vendor's bundle is some 100 kB
MAX_FILES = 1024
MAX_CERTIFICATES = 4096  # all vendors that exist have some hundreds
MAX_ISSUERS = 5  # certificates above the EK's, the root included; vendors have two or three
MAX_SIGNATURE_CHECKS = 64  # many CAs of one name must not keep us busy
MAX_VERDICTS = 4096  # certificates that were found good and are remembered: 100 bytes each
LOOK_AGAIN_S = 5.0  # after that long at most, a CA that was taken out is no longer believed
SUFFIXES = frozenset((".pem", ".crt", ".cer", ".der"))
GOOD_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
GOOD_CURVES = frozenset(curve.name for curve in CURVES.values())
# What this module reads, or may leave unread: a policy's name changes nothing here. Another critical
# extension (a name constraint, for example) would have to be obeyed, so it is refused.
MAY_BE_CRITICAL = frozenset(
    (
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.CERTIFICATE_POLICIES,
    )
)
UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)
NOT_SIGNED = (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm)

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """An EK as a registrar recorded it, its form read, nothing of it trusted.

    Attributes:
        public: TPM2B_PUBLIC, of which `key` is the key.
        cert: DER; None where there is none.
        digest: SHA-256 of certificate and public area, what a verdict is remembered by.
    """

    public: bytes
    cert: bytes | None
    key: PublicKey
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        # TPM2B_PUBLIC begins with its own length: where the certificate starts is unambiguous.
        object.__setattr__(self, "digest", sha256(self.public + (self.cert or b"")).digest())


def check_chain(
    ek_cert: bytes, ek_key: PublicKey, authorities: Sequence[x509.Certificate], at: datetime
) -> datetime:
    """Check that an EK certificate is for this key and leads to a root among `authorities`.

    Args:
        ek_cert: DER, untrusted bytes.
        ek_key: the EK as the registrar challenged it.
        authorities: the tenant's CAs, roots and intermediates in any order.
        at: the time that all certificates must be valid at, with its zone.

    Returns:
        When the first certificate of the chain runs out.

    Raises:
        UntrustedEkError: anything else.
    """
    if len(ek_cert) > MAX_EK_CERT_BYTES:
        raise UntrustedEkError(f"the EK certificate is longer than {MAX_EK_CERT_BYTES} bytes")
    try:
        leaf = x509.load_der_x509_certificate(ek_cert)
        _check_leaf(leaf, ek_key, at)
        return _Walk(authorities, at).from_leaf(leaf)
    except UNREADABLE as exc:  # parts are parsed when they are looked at
        raise UntrustedEkError("the EK certificate cannot be read") from exc


class _Walk:
    """One search for a path to a root; remembers why it failed last."""

    def __init__(self, authorities: Sequence[x509.Certificate], at: datetime) -> None:
        self._authorities = authorities
        self._at = at
        self._checks_left = MAX_SIGNATURE_CHECKS
        self._why = ""

    def from_leaf(self, leaf: x509.Certificate) -> datetime:
        until = self._up(leaf, (), leaf.not_valid_after_utc)
        if until is None:
            issuer = leaf.issuer.rfc4514_string()[:200]
            why = self._why or f"no CA for its issuer is in the directory: {issuer!r}"
            raise UntrustedEkError(f"the EK certificate leads to no trusted root; {why}")
        return until

    def _up(
        self, child: x509.Certificate, below: tuple[x509.Certificate, ...], until: datetime
    ) -> datetime | None:
        """The earliest end of a chain from `child` to a root; None where there is none.

        Args:
            below: the CAs between `child` (left out) and the EK's certificate.
        """
        if len(below) >= MAX_ISSUERS:
            self._why = f"the chain is longer than {MAX_ISSUERS} CAs"
            return None
        for authority in self._authorities:
            if authority.subject != child.issuer:
                continue
            if not self._is_issuer(authority, child, intermediates=_not_self_issued(below)):
                continue
            ends = min(until, authority.not_valid_after_utc)
            if is_root(authority):
                return ends
            found = self._up(authority, (*below, authority), ends)
            if found is not None:
                return found
            self._why = self._why or "an intermediate's own issuer is not in the directory"
        return None

    def _is_issuer(
        self, authority: x509.Certificate, child: x509.Certificate, *, intermediates: int
    ) -> bool:
        if self._checks_left == 0:
            self._why = "the directory has too many CAs of one name"
            return False
        self._checks_left -= 1
        try:
            child.verify_directly_issued_by(authority)
        except NOT_SIGNED:
            self._why = "the signature is not that of the CA that it names"
            return False
        if not isinstance(child.signature_hash_algorithm, GOOD_HASHES):
            self._why = "a signature is over a weak hash"
            return False
        try:
            _check_authority(authority, self._at, intermediates)
        except UntrustedEkError as exc:
            self._why = str(exc)
            return False
        except UNREADABLE:
            self._why = f"{_named(authority)} cannot be read"
            return False
        return True


def _not_self_issued(below: Iterable[x509.Certificate]) -> int:
    """What pathlen counts (RFC 5280, section 6.1.4 (l))."""
    return sum(authority.subject != authority.issuer for authority in below)


def is_root(certificate: x509.Certificate) -> bool:
    """True where a certificate is signed with its own key."""
    try:
        certificate.verify_directly_issued_by(certificate)
    except NOT_SIGNED:
        return False
    return True


def _named(authority: x509.Certificate) -> str:
    return f"the CA {authority.subject.rfc4514_string()[:200]!r}"


def _check_leaf(leaf: x509.Certificate, ek_key: PublicKey, at: datetime) -> None:
    who = "the EK certificate"
    _check_common(leaf, at, who)
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey) or key != ek_key:
        raise UntrustedEkError(f"{who} is for another key than the EK")
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise UntrustedEkError(f"{who} is a CA's")
    purposes = _extension(leaf, x509.ExtendedKeyUsage)
    if purposes is None or EK_PURPOSE not in purposes:
        raise UntrustedEkError(f"{who} is not meant for an EK (purpose {EK_PURPOSE.dotted_string})")
    usage = _extension(leaf, x509.KeyUsage)
    if usage is not None and (
        usage.key_cert_sign or not (usage.key_encipherment or usage.key_agreement)
    ):
        raise UntrustedEkError(f"{who} has a key usage that no EK has")
    _extension(leaf, x509.SubjectAlternativeName)  # the TPM's maker; readable, where it is there


def _check_authority(authority: x509.Certificate, at: datetime, intermediates: int) -> None:
    who = _named(authority)
    _check_common(authority, at, who)
    constraints = _extension(authority, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise UntrustedEkError(f"{who} may not sign certificates (basicConstraints)")
    if constraints.path_length is not None and constraints.path_length < intermediates:
        raise UntrustedEkError(f"{who} may not have so many CAs below it (pathlen)")
    usage = _extension(authority, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        raise UntrustedEkError(f"{who} may not sign certificates (keyUsage)")
    purposes = _extension(authority, x509.ExtendedKeyUsage)
    if purposes is not None and not (
        EK_PURPOSE in purposes or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in purposes
    ):
        raise UntrustedEkError(f"{who} is for other purposes than EKs")


def _check_common(certificate: x509.Certificate, at: datetime, who: str) -> None:
    if certificate.version is not x509.Version.v3:
        raise UntrustedEkError(f"{who} is not of version 3")
    if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
        raise UntrustedEkError(
            f"{who} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} "
            f"to {certificate.not_valid_after_utc:%Y-%m-%d} only"
        )
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in MAY_BE_CRITICAL:
            raise UntrustedEkError(
                f"{who} has the critical extension {extension.oid.dotted_string}"
            )
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        strong = key.key_size >= MIN_RSA_BITS
    else:
        strong = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in GOOD_CURVES
    if not strong:
        raise UntrustedEkError(f"{who} has a weak or unknown key")


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


# --- the tenant's directory -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a directory held."""

    state: object
    authorities: tuple[x509.Certificate, ...]


def utc_now() -> datetime:
    """The time of day."""
    return datetime.now(UTC)


class EkStore:
    """A directory of TPM vendors' CAs, read again when it changes; remembers good chains.

    A verdict is remembered by the certificate's SHA-256 together with the key, for as long as every
    certificate of the chain is valid and the directory stays as it is.

    Args:
        directory: files `*.pem`, `*.crt`, `*.cer` (PEM, one or more in a file, or DER) and `*.der`.
        now: the time of day, for validity.
        clock: monotonic seconds, for looking at the directory again.

    Raises:
        HostError: it cannot be read, or everybody can write it or what is in it.
        UsageError: no CA in it, one that is no certificate, or too many.
    """

    def __init__(
        self,
        directory: Path,
        *,
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._now = now
        self._clock = clock
        self._verdicts: OrderedDict[bytes, datetime] = OrderedDict()
        self._looked_at_s = clock()
        self._loaded = _load(directory)

    def check(self, ek: EndorsementKey) -> None:
        """Check an EK's certificate; cheap where it was found good before.

        Raises:
            UntrustedEkError: it leads to no CA of the directory, or there is none.
            HostError, UsageError: the directory is no longer readable; nothing passes.
        """
        if ek.cert is None:
            raise UntrustedEkError("the registrar has no EK certificate of this host")
        self._look_again()
        now = self._now()
        until = self._verdicts.get(ek.digest)
        if until is not None and now <= until:
            return
        self._verdicts.pop(ek.digest, None)
        self._verdicts[ek.digest] = check_chain(ek.cert, ek.key, self._loaded.authorities, now)
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)

    def _look_again(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_at_s < LOOK_AGAIN_S:
            return
        if _state_of(_files(self._directory)) != self._loaded.state:
            self._verdicts.clear()
            self._loaded = _load(self._directory)
        self._looked_at_s = now_s


def _files(directory: Path) -> list[Path]:
    try:
        if directory.stat().st_mode & stat.S_IWOTH:
            raise HostError(f"{directory}: everybody can write it; see chmod o-w")
        found = sorted(path for path in directory.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as exc:
        raise HostError(f"cannot read the CAs in {directory}: {exc.strerror}") from exc
    if len(found) > MAX_FILES:
        raise UsageError(f"{directory} has more than {MAX_FILES} files")
    return found


def _state_of(files: Iterable[Path]) -> object:
    """Changes whenever a file's content does, short of somebody who sets clocks back."""
    state = []
    for path in files:
        try:
            now = path.stat()
        except OSError as exc:
            raise HostError(f"cannot read {path}: {exc.strerror}") from exc
        state.append((path.name, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))
    return state


def _load(directory: Path) -> _Loaded:
    files = _files(directory)
    state = _state_of(files)
    authorities: dict[bytes, x509.Certificate] = {}
    for path in files:
        for certificate in _read_certificates(path):
            authorities[certificate.fingerprint(hashes.SHA256())] = certificate
    if not authorities:
        raise UsageError(f"{directory} has no CA certificate (*.pem, *.crt, *.cer, *.der)")
    if len(authorities) > MAX_CERTIFICATES:
        raise UsageError(f"{directory} has more than {MAX_CERTIFICATES} certificates")
    return _Loaded(state, tuple(authorities.values()))


def _read_certificates(path: Path) -> list[x509.Certificate]:
    data = read_trusted(path, MAX_FILE_BYTES)
    try:
        if b"-----BEGIN" in data:
            found = x509.load_pem_x509_certificates(data)
        else:
            found = [x509.load_der_x509_certificate(data)]
        for certificate in found:
            _named(certificate)  # parsed when it is looked at: now
        return found
    except UNREADABLE as exc:
        raise UsageError(f"{path} is no certificate, PEM or DER") from exc
