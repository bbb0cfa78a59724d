"""Checks that an endorsement key is a genuine TPM's: walks its certificate's chain, issuer by issuer.

A chain ends at the first anchor: a CA that the tenant has put into its store, self-signed or not.
Between the EK's certificate and the anchor there may be helpers: certificates from the chip or
the host, which are trusted only where a chain from an anchor proves them. Nothing is ever fetched.
`cryptography`'s own path building is for web servers: it refuses a critical subjectAltName of a
directory name and the purpose 2.23.133.8.1, which is what EK certificates have. So this module walks the
chain itself: bounded, and it refuses what it does not know. Revocation is not checked, because vendors
publish almost none; remove a CA from the store instead.
Source: TCG EK Credential Profile 2.5; RFC 5280, section 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, ObjectIdentifier

from provider_proxy.errors import EvidenceFormatError, UntrustedEkError
from provider_proxy.evidence.tpm_keys import CURVES, MIN_RSA_BITS, PublicKey
from provider_proxy.trust.ek_anchors import Anchor, Anchors
from provider_proxy.trust.ek_certificate import TpmCertificate, check_signature, parse_certificate
from provider_proxy.trust.ek_makers import maker_of_chip, why_virtual_chip
from provider_proxy.trust.roca import has_fingerprint

EK_PURPOSE = ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate
MAX_ISSUERS = 8  # CAs above the EK's certificate; vendors have two to five
MAX_HELPERS = 8  # certificates that a chip carries; Intel's have four
MAX_HELPER_BYTES = 16 * 1024  # all of them together; Intel's have 4 kB
MAX_SIGNATURE_CHECKS = 64  # many CAs of one name must not take unbounded work
GOOD_CURVES = frozenset(curve.name for curve in CURVES.values())
# What this module reads, or may ignore: a policy's name, a key's identifier or an address changes
# nothing here. Any other critical extension (a name constraint, for example) is refused.
MAY_BE_CRITICAL = frozenset(
    (
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.CERTIFICATE_POLICIES,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_INFORMATION_ACCESS,
    )
)
VIRTUAL_HINT = "a virtual TPM is accepted only with --insecure-virtual-ek"

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """An EK as a registrar recorded it, parsed and not yet trusted.

    Attributes:
        public: TPM2B_PUBLIC, of which `key` is the key.
        cert: what came as its certificate; None without one.
        helpers: certificates that may stand between `cert` and an anchor; untrusted, in any order.
        digest: SHA-256 of certificate, helpers and public area; verdicts are remembered by it.
    """

    public: bytes
    cert: bytes | None
    key: PublicKey
    helpers: tuple[bytes, ...] = ()
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        # TPM2B_PUBLIC begins with its own length, each other part follows its own.
        parts = (self.cert or b"", *self.helpers)
        joined = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        object.__setattr__(self, "digest", sha256(self.public + joined).digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A chain that is good.

    Attributes:
        anchor: where it ends.
        chain: the EK's certificate and the helpers that lead to the anchor, in this order.
        until: when the first certificate of the chain, the anchor's included, expires.
        maker: of the chip, as its certificate names it.
    """

    anchor: Anchor
    chain: tuple[TpmCertificate, ...]
    until: datetime
    maker: str


def check_chain(
    ek_cert: bytes,
    ek_key: PublicKey,
    anchors: Anchors,
    at: datetime,
    *,
    helpers: Sequence[bytes] = (),
    insecure_virtual: bool = False,
) -> Verdict:
    """Check that an EK certificate is for this key and leads to an anchor for hardware TPMs.

    Args:
        ek_cert: as an NV index or a registrar has it, untrusted bytes.
        ek_key: the EK as the registrar challenged it.
        at: the time at which all certificates must be valid, with its zone.
        helpers: certificates of CAs, untrusted; those that cannot be read are ignored.
        insecure_virtual: virtual TPMs are accepted, too.

    Raises:
        UntrustedEkError: anything else; the message says what.
    """
    try:
        leaf = parse_certificate(ek_cert)
    except EvidenceFormatError as exc:
        raise UntrustedEkError(f"the EK certificate cannot be read: {exc}") from exc
    _check_leaf(leaf, ek_key, at)
    why = None if insecure_virtual else why_virtual_chip(leaf)
    if why is not None:
        raise UntrustedEkError(
            f"the EK certificate is that of a virtual TPM: {why}; {VIRTUAL_HINT}"
        )
    walk = _Walk(anchors, _read_helpers(helpers), at, insecure_virtual=insecure_virtual)
    return walk.from_leaf(leaf)


def _read_helpers(helpers: Sequence[bytes]) -> tuple[TpmCertificate, ...]:
    """Those that can be read, within the limits.

    Raises:
        UntrustedEkError: there are more of them than any chip carries.
    """
    if len(helpers) > MAX_HELPERS or sum(map(len, helpers)) > MAX_HELPER_BYTES:
        raise UntrustedEkError(
            f"the EK's chain has more than {MAX_HELPERS} certificates or {MAX_HELPER_BYTES} bytes"
        )
    found = []
    for data in helpers:
        try:
            found.append(parse_certificate(data))
        except EvidenceFormatError:
            continue  # a missing certificate is reported where it is needed
    return tuple(found)


class _Walk:
    """One search for a path to an anchor; remembers the most informative reason."""

    def __init__(
        self,
        anchors: Anchors,
        helpers: tuple[TpmCertificate, ...],
        at: datetime,
        *,
        insecure_virtual: bool,
    ) -> None:
        self._anchors = anchors
        self._helpers = helpers
        self._at = at
        self._insecure_virtual = insecure_virtual
        self._checks_left = MAX_SIGNATURE_CHECKS
        self._why: list[str] = []
        self._missing = ""

    def from_leaf(self, leaf: TpmCertificate) -> Verdict:
        found = self._up(leaf, (leaf,), leaf.parsed.not_valid_after_utc)
        if found is None:
            why = self._why[0] if self._why else self._missing
            raise UntrustedEkError(f"the EK certificate does not lead to a trusted CA: {why}")
        return found

    def _up(
        self, child: TpmCertificate, below: tuple[TpmCertificate, ...], until: datetime
    ) -> Verdict | None:
        """The chain from `child` to an anchor; None without one.

        Args:
            below: the EK's certificate and the CAs up to `child`, which is the last of them.
        """
        if len(below) > MAX_ISSUERS:
            self._why.append(f"the chain is longer than {MAX_ISSUERS} CAs")
            return None
        for anchor in self._anchors.named(child.issuer):
            if self._is_issuer(anchor.certificate, child, below[1:], anchor.why_virtual):
                ends = min(until, anchor.certificate.parsed.not_valid_after_utc)
                return Verdict(
                    anchor=anchor, chain=below, until=ends, maker=maker_of_chip(below[0])
                )
        helpers = [h for h in self._helpers if h.subject == child.issuer and h not in below]
        if not self._anchors.named(child.issuer) and not helpers:
            self._missing = f"the store has no CA named {child.issuer_name!r}"
        for helper in helpers:
            why_virtual = self._anchors.why_virtual(helper)
            if self._is_issuer(helper, child, below[1:], why_virtual):
                ends = min(until, helper.parsed.not_valid_after_utc)
                found = self._up(helper, (*below, helper), ends)
                if found is not None:
                    return found
        return None

    def _is_issuer(
        self,
        authority: TpmCertificate,
        child: TpmCertificate,
        below: Sequence[TpmCertificate],
        why_virtual: str | None,
    ) -> bool:
        if self._checks_left == 0:
            self._why.insert(0, f"too many CAs have the name of {_named(authority)}")
            return False
        self._checks_left -= 1
        try:
            check_signature(child, authority)
        except UntrustedEkError as exc:
            # Another CA of that name may have signed it; any other problem is more informative.
            self._why.append(str(exc))
            return False
        try:
            if why_virtual is not None and not self._insecure_virtual:
                raise UntrustedEkError(
                    f"{_named(authority)} is for virtual TPMs: {why_virtual}; {VIRTUAL_HINT}"
                )
            _check_authority(authority, self._at, _not_self_issued(below))
        except UntrustedEkError as exc:
            self._why.insert(0, str(exc))
            return False
        return True


def _not_self_issued(below: Iterable[TpmCertificate]) -> int:
    """What pathlen counts (RFC 5280, section 6.1.4 (l))."""
    return sum(authority.subject != authority.issuer for authority in below)


def _named(authority: TpmCertificate) -> str:
    return f"the CA {authority.name!r}"


def _check_leaf(leaf: TpmCertificate, ek_key: PublicKey, at: datetime) -> None:
    who = "the EK certificate"
    key = leaf.parsed.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey) or key != ek_key:
        raise UntrustedEkError(f"{who} is for another key than the EK")
    _check_common(leaf, at, who)
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise UntrustedEkError(f"{who} is a CA certificate")
    purposes = _extension(leaf, x509.ExtendedKeyUsage)
    if purposes is None or EK_PURPOSE not in purposes:
        raise UntrustedEkError(
            f"{who} is not for an EK (it lacks the purpose {EK_PURPOSE.dotted_string})"
        )
    usage = _extension(leaf, x509.KeyUsage)
    if usage is not None and (
        usage.key_cert_sign or not (usage.key_encipherment or usage.key_agreement)
    ):
        raise UntrustedEkError(f"{who} has a key usage that no EK has")


def why_no_ca(certificate: TpmCertificate) -> str | None:
    """Why a certificate cannot be an anchor, at any time; None where it can."""
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        return "it may not sign certificates (basicConstraints)"
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return "it may not sign certificates (keyUsage)"
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    if purposes is not None and not (
        EK_PURPOSE in purposes or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in purposes
    ):
        return "its purposes do not include EK certificates"
    return None


def _check_authority(authority: TpmCertificate, at: datetime, intermediates: int) -> None:
    who = _named(authority)
    why = why_no_ca(authority)
    if why is not None:
        raise UntrustedEkError(f"{who}: {why}")
    _check_common(authority, at, who)
    constraints = _extension(authority, x509.BasicConstraints)
    assert constraints is not None
    if constraints.path_length is not None and constraints.path_length < intermediates:
        raise UntrustedEkError(f"{who} has more CAs below it than its pathlen allows")


def _check_common(certificate: TpmCertificate, at: datetime, who: str) -> None:
    parsed = certificate.parsed
    if parsed.version is not x509.Version.v3:
        raise UntrustedEkError(f"{who} is not of version 3")
    for extension in parsed.extensions:
        if extension.critical and extension.oid not in MAY_BE_CRITICAL:
            raise UntrustedEkError(
                f"{who} has the critical extension {extension.oid.dotted_string}, which is not supported"
            )
    why = weakness_of(certificate)
    if why is not None:
        raise UntrustedEkError(f"{who}: {why}")
    if at > parsed.not_valid_after_utc:
        raise UntrustedEkError(f"{who} expired on {parsed.not_valid_after_utc:%Y-%m-%d}")
    if at < parsed.not_valid_before_utc:
        raise UntrustedEkError(f"{who} is not valid before {parsed.not_valid_before_utc:%Y-%m-%d}")


def weakness_of(certificate: TpmCertificate) -> str | None:
    """What is wrong with a certificate's own key; None where nothing is."""
    key = certificate.parsed.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return (
            None if key.curve.name in GOOD_CURVES else f"its curve {key.curve.name} is not accepted"
        )
    if not isinstance(key, rsa.RSAPublicKey):
        return "its key is neither RSA nor EC"
    if key.key_size < MIN_RSA_BITS:
        return f"its RSA key of {key.key_size} bits is too weak"
    if has_fingerprint(key.public_numbers().n):
        return "its RSA key has the ROCA fingerprint (CVE-2017-15361) and can be factored"
    return None


def _extension(certificate: TpmCertificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.parsed.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
