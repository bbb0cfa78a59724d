"""The link of a VM's vTPM to its host, as the tenant judges it: claims in, `VtpmLink` says yes or raises.

The host's claims came through the leaf, so the host's AK has signed them for this very nonce. They are
still only what the host's software says: give this policy together with one for the host's PCRs. Each
cause of a refusal has an error class of its own. Reads no files and knows no clock.

Invariants: anything missing, mistyped or out of bounds is refused; an unknown key is ignored, as
everywhere in the results, because a change of a known key's meaning needs another format.
"""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.errors import (
    EkNotLinkedError,
    EvidenceFormatError,
    LinkClaimsError,
    LinkIssuerError,
    NotConfirmedError,
    UsageError,
    VmNotRunningError,
    WrongVmError,
)
from provider_proxy.evidence.model import HASH_BYTES, VerifiedQuote
from provider_proxy.evidence.strict_json import Fields
from provider_proxy.evidence.tpm_keys import PublicKey, parse_public

ISSUERS = ("tpm", "delegate")
STATES = ("claimed", "registered", "confirmed")
"""What is known of a VM's EKs, the least first. A state that is not here is refused."""
MAX_STATE_CHARS = 32
MAX_EKS = 16  # swtpm_setup makes two; a vTPM has room for a few more persistent keys
MAX_ALG_CHARS = 32
MAX_ISSUER_CHARS = 32
MAX_GENERATION = (1 << 53) - 1  # what every JSON reader has exactly
_DIGEST_RE = re.compile(r"[0-9a-f]{64}", re.ASCII)


def spki_digest(key: PublicKey) -> bytes:
    """SHA-256 of a key's SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7), DER: 32 bytes."""
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def spire_name(ek: PublicKey) -> str:
    """What spire-tpm-plugin calls an EK: hex SHA-256 of an RSA key's RSAPublicKey (RFC 8017, A.1.1), DER.

    It knows no other keys; those are named by their SubjectPublicKeyInfo here.
    """
    form = PublicFormat.PKCS1 if isinstance(ek, RSAPublicKey) else PublicFormat.SubjectPublicKeyInfo
    return sha256(ek.public_bytes(Encoding.DER, form)).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkedEk:
    """One EK of a vTPM as the host claims it.

    Attributes:
        alg: "rsa2048" or "p384" for example; for people, the digest decides.
        spki_sha256: 32 bytes, see `spki_digest`.
    """

    alg: str
    spki_sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkClaims:
    """What a host claims about a VM. Signed through the leaf, and worth what the host's PCRs are worth.

    Attributes:
        running: the VM runs on this host now.
        state: what is known of the EKs, one of `STATES`: "confirmed" where they were read from the
            running VM's own vTPM, "registered" where they came while root created it.
        issuer: who certified the EKs when they were made: "delegate", "tpm" or "unknown".
        migrated: the VM came from another host.
        generation: rises each time that a vTPM was made, or came in, under this UUID.
        registered_at: when the EKs became known, seconds since the epoch by the host's clock.
    """

    vm: uuid.UUID
    eks: tuple[LinkedEk, ...]
    running: bool
    state: str
    issuer: str
    migrated: bool
    generation: int
    registered_at: float


def parse_claims(values: Mapping[str, object] | None) -> LinkClaims:
    """Read the claims of a verified quote, strictly.

    Args:
        values: `VerifiedQuote.claims`; None where no VM was asked for.

    Raises:
        LinkClaimsError: there are none, or a key is missing, mistyped or out of bounds.
    """
    if values is None:
        raise LinkClaimsError("the quote carries no claims: no VM was asked for")
    fields = Fields(values, "claims")
    try:
        return LinkClaims(
            vm=_parse_vm(fields.text("vm", 36)),
            eks=_parse_eks(values.get("eks")),
            running=_flag(values, "running"),
            state=_parse_state(values, fields),
            issuer=fields.text("issuer", MAX_ISSUER_CHARS),
            migrated=_flag(values, "migrated"),
            generation=fields.integer("generation", MAX_GENERATION),
            registered_at=fields.number("registered_at"),
        )
    except EvidenceFormatError as exc:
        raise LinkClaimsError(str(exc)) from exc


def _parse_vm(text: str) -> uuid.UUID:
    try:
        vm = uuid.UUID(text)
    except ValueError:
        raise LinkClaimsError("claims.vm is not a UUID") from None
    if str(vm) != text:  # uuid.UUID takes braces, urn: and capitals too
        raise LinkClaimsError("claims.vm is not a UUID in lower case with hyphens")
    return vm


def _flag(values: Mapping[str, object], key: str) -> bool:
    value = values.get(key)
    if not isinstance(value, bool):
        raise LinkClaimsError(f"claims.{key} is not true or false")
    return value


def _parse_state(values: Mapping[str, object], fields: Fields) -> str:
    """An older host sends `confirmed` only; where both are sent they must agree."""
    confirmed = _flag(values, "confirmed")
    if "state" not in fields:
        return "confirmed" if confirmed else "claimed"
    state = fields.text("state", MAX_STATE_CHARS)
    if state not in STATES:
        raise LinkClaimsError(f"claims.state is not one of {', '.join(STATES)}")
    if confirmed != (state == "confirmed"):
        raise LinkClaimsError("claims.state and claims.confirmed contradict each other")
    return state


def _parse_eks(value: object) -> tuple[LinkedEk, ...]:
    if not isinstance(value, list) or len(value) > MAX_EKS:
        raise LinkClaimsError(f"claims.eks is not a list of at most {MAX_EKS} EKs")
    eks = []
    for item in value:
        if not isinstance(item, dict):
            raise LinkClaimsError("an entry of claims.eks is not an object")
        fields = Fields(item, "claims.eks")
        digest = fields.text("spki_sha256", 2 * HASH_BYTES)
        if not _DIGEST_RE.fullmatch(digest):
            raise LinkClaimsError("claims.eks.spki_sha256 is not 64 hex digits in lower case")
        eks.append(
            LinkedEk(alg=fields.text("alg", MAX_ALG_CHARS), spki_sha256=bytes.fromhex(digest))
        )
    if len({ek.spki_sha256 for ek in eks}) != len(eks):
        raise LinkClaimsError("claims.eks names an EK twice")
    return tuple(eks)


class VtpmLink:
    """A policy: this VM, with this EK, runs on the host now.

    Does not check: the host's PCRs. Combine it with a policy that does (`AllOf`), or the claims are
    the word of a host that may run anything.

    Args:
        vm: the VM that was ordered (the cuckoo attack shows another).
        ek: SHA-256 of the SPKI of the EK that the tenant's own registrar activated.
        least: the least that must be known of the EKs, one of `STATES`.
        issuer: demand that this one certified the EKs: "tpm" or "delegate".
    """

    needed_mask = 0

    def __init__(
        self, *, vm: uuid.UUID, ek: bytes, least: str = "claimed", issuer: str | None = None
    ) -> None:
        if len(ek) != HASH_BYTES:
            raise UsageError("an EK must be given as the SHA-256 of its SPKI: 32 bytes")
        if least not in STATES:
            raise UsageError(f"the least state of an EK must be one of {', '.join(STATES)}")
        self.vm = vm
        self.ek = ek
        self._least = least
        self._issuer = issuer

    def check(self, quote: VerifiedQuote) -> None:
        """Raises: LinkError; its class says the first cause, in the order of docs/vtpm.md."""
        self.judge(parse_claims(quote.claims))

    def judge(self, claims: LinkClaims) -> None:
        """The same for claims that were read already. Raises: LinkError."""
        if claims.vm != self.vm:
            raise WrongVmError(f"the claims are about the VM {claims.vm}, not about {self.vm}")
        if not any(hmac.compare_digest(ek.spki_sha256, self.ek) for ek in claims.eks):
            raise EkNotLinkedError(
                f"the EK {self.ek.hex()} is not one that the host claims for this VM"
            )
        if not claims.running:
            raise VmNotRunningError("the VM does not run on this host")
        if STATES.index(claims.state) < STATES.index(self._least):
            raise NotConfirmedError(
                f"the EK is {claims.state} on the host, and must be at least {self._least}"
            )
        if self._issuer is not None and claims.issuer != self._issuer:
            raise LinkIssuerError(
                f"the host's issuer of EK certificates is {claims.issuer!r}, not {self._issuer!r}"
            )


def ek_digest(ek_public: bytes) -> bytes:
    """The digest that `VtpmLink` wants, of an EK's TPM2B_PUBLIC.

    Raises:
        EkNotLinkedError: not the public part of an RSA or EC key.
    """
    try:
        return spki_digest(parse_public(ek_public).public_key)
    except EvidenceFormatError as exc:
        raise EkNotLinkedError(f"the EK is not a TPM2B_PUBLIC: {exc}") from exc
