"""The CAs that a tenant trusts, each for one purpose: hardware TPMs or virtual ones, never both.

Every CA in the tenant's store is an anchor, self-signed or not: a chain may end there, and nothing above
it is asked for. What makes an anchor virtual holds for its key under any name and for every CA of the
store below it: another certificate cannot remove the mark of the first. Values only: nothing
is read here.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.errors import UntrustedEkError
from provider_proxy.evidence.names import ComparableName
from provider_proxy.trust.ek_certificate import GOOD_HASHES, TpmCertificate, check_signature
from provider_proxy.trust.ek_makers import UNKNOWN, maker_of_ca, why_virtual_ca

MARKED = "the store marks it as virtual"


class Purpose(enum.Enum):
    """Which TPMs an anchor vouches for."""

    HARDWARE = "hardware"
    VIRTUAL = "virtual"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A CA's certificate and where it was found.

    Attributes:
        source: for people: the file.
        is_marked: the tenant says that it is for virtual TPMs.
    """

    certificate: TpmCertificate
    source: str = ""
    is_marked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A CA that is trusted.

    Attributes:
        why_virtual: why it vouches for virtual TPMs; None where it vouches for hardware.
    """

    certificate: TpmCertificate
    source: str
    why_virtual: str | None = None

    @property
    def purpose(self) -> Purpose:
        """Hardware unless something says virtual."""
        return Purpose.HARDWARE if self.why_virtual is None else Purpose.VIRTUAL

    @property
    def maker(self) -> str:
        """The maker whose CA it is."""
        known = maker_of_ca(self.certificate.name)
        return maker_of_ca(self.certificate.issuer_name) if known == UNKNOWN else known

    @property
    def sha256(self) -> str:
        """The certificate's fingerprint, in hex."""
        return sha256(self.certificate.der).hexdigest()


class Anchors:
    """All anchors of a tenant, found by name.

    Args:
        found: CAs in any order; one that is there twice counts once, and as virtual where either is.
    """

    def __init__(self, found: Iterable[Found]) -> None:
        unique: dict[bytes, Found] = {}
        for one in found:
            known = unique.get(one.certificate.der)
            if known is None or one.is_marked:
                unique[one.certificate.der] = one
        self._virtual_keys = _virtual_keys(list(unique.values()))
        self.all = tuple(
            Anchor(
                certificate=one.certificate,
                source=one.source,
                why_virtual=self._virtual_keys.get(key_digest(one.certificate)),
            )
            for one in unique.values()
        )
        self._by_name: defaultdict[ComparableName, list[Anchor]] = defaultdict(list)
        self._by_issuer: defaultdict[ComparableName, list[Anchor]] = defaultdict(list)
        for anchor in self.all:
            self._by_name[anchor.certificate.subject].append(anchor)
            self._by_issuer[anchor.certificate.issuer].append(anchor)

    def __len__(self) -> int:
        return len(self.all)

    def named(self, name: ComparableName) -> Sequence[Anchor]:
        """The anchors of this subject."""
        return self._by_name.get(name, ())

    def without(self, fingerprints: Collection[str]) -> Anchors:
        """The anchors without those of these SHA-256 fingerprints; the others keep their purposes."""
        return Anchors(
            Found(
                certificate=anchor.certificate,
                source=anchor.source,
                is_marked=anchor.why_virtual is not None,
            )
            for anchor in self.all
            if anchor.sha256 not in fingerprints
        )

    def why_virtual(self, authority: TpmCertificate) -> str | None:
        """Why a CA that is not an anchor is for virtual TPMs; None where nothing says so."""
        return self._virtual_keys.get(key_digest(authority)) or why_virtual_ca(authority)

    def below(self, anchor: Anchor) -> tuple[Anchor, ...]:
        """The other anchors that this one's key has signed: they stay when it is removed."""
        return tuple(
            other
            for other in self._by_issuer.get(anchor.certificate.subject, ())
            if other is not anchor and is_issued(other.certificate, anchor.certificate)
        )


def key_digest(certificate: TpmCertificate) -> bytes:
    """SHA-256 of the public key, which two certificates of one CA have in common."""
    key = certificate.parsed.public_key()
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def is_issued(child: TpmCertificate, authority: TpmCertificate) -> bool:
    """True where one CA has issued another; by the names alone where the signature's hash is weak."""
    if child.issuer != authority.subject:
        return False
    if not isinstance(child.parsed.signature_hash_algorithm, GOOD_HASHES):
        return True
    try:
        check_signature(child, authority)
    except UntrustedEkError:
        return False
    return True


def _virtual_keys(found: Sequence[Found]) -> dict[bytes, str]:
    """Digest of each key that is for virtual TPMs, and why."""
    why: dict[bytes, str] = {}
    todo: list[TpmCertificate] = []
    by_key: defaultdict[bytes, list[TpmCertificate]] = defaultdict(list)
    by_issuer: defaultdict[ComparableName, list[TpmCertificate]] = defaultdict(list)
    for one in found:
        by_key[key_digest(one.certificate)].append(one.certificate)
        by_issuer[one.certificate.issuer].append(one.certificate)
    for one in found:
        reason = MARKED if one.is_marked else why_virtual_ca(one.certificate)
        if reason is not None and key_digest(one.certificate) not in why:
            why[key_digest(one.certificate)] = reason
            todo += by_key[key_digest(one.certificate)]
    while todo:
        authority = todo.pop()
        for child in by_issuer[authority.subject]:
            key = key_digest(child)
            if key not in why and is_issued(child, authority):
                why[key] = f"a CA for virtual TPMs has issued it: {authority.name!r}"
                todo += by_key[key]
    return why
