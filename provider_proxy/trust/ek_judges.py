"""What vouches for an EK: the makers' CAs, a person, or nothing; and for which EK.

A judge answers for one EK at a time. `vouch` asks it for the registrar's record first, and for the
host's own copy of the certificates where that fails.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from provider_proxy.errors import EvidenceFormatError, ReplyError, UntrustedEkError
from provider_proxy.evidence.tpm_keys import (
    DECRYPT,
    FIXED_PARENT,
    FIXED_TPM,
    RESTRICTED,
    SENSITIVE_DATA_ORIGIN,
    SIGN,
    TpmPublic,
    parse_public,
)
from provider_proxy.trust.ek_certificate import parse_certificate
from provider_proxy.trust.ek_chain import EndorsementKey, Verdict
from provider_proxy.trust.expected_eks import demand_ek

log = logging.getLogger(__name__)

EK_MUST_HAVE = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | RESTRICTED | DECRYPT


class EkJudge(Protocol):
    """Says whether an EK is to be trusted: `ek_store.EkStore`, `KnownEk`, or `UnsafeAnyEk`."""

    def check(self, ek: EndorsementKey) -> Verdict | None:
        """The chain that vouches for it; None where no certificate does.

        Raises:
            UntrustedEkError: it is not to be trusted.
        """
        ...

    async def freshen(self) -> None:
        """Read again, off the event loop, what `check` uses."""
        ...


class UnsafeAnyEk:
    """Accepts any EK. Unsafe: a hostile host's software TPM is taken for its chip."""

    def __init__(self) -> None:
        log.warning("no EK certificate is checked: a software TPM is accepted as a hardware TPM")

    def check(self, ek: EndorsementKey) -> None:
        """Nothing is refused."""

    async def freshen(self) -> None:
        """There is nothing to read."""


class KnownEk:
    """Accepts one EK, which a person vouches for.

    Args:
        ek_public: TPM2B_PUBLIC, from the host itself and not from the registrar.
    """

    def __init__(self, ek_public: bytes) -> None:
        self._ek_public = ek_public

    def check(self, ek: EndorsementKey) -> None:
        """Raises: UntrustedEkError for any other."""
        if not hmac.compare_digest(ek.public, self._ek_public):
            raise UntrustedEkError(
                "the registrar recorded another EK than the one that a person vouched for"
            )

    async def freshen(self) -> None:
        """There is nothing to read."""


class KnownEkDigest:
    """Accepts the EK of one digest, which a person vouches for.

    Args:
        expected: SHA-256 of its SubjectPublicKeyInfo.
    """

    def __init__(self, expected: bytes) -> None:
        self._expected = expected

    def check(self, ek: EndorsementKey) -> None:
        """Raises: UntrustedEkError for any other."""
        demand_ek(ek.key, self._expected, "the host")

    async def freshen(self) -> None:
        """There is nothing to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCertificates:
    """What a host itself shows for its EK: its own copy. Untrusted.

    Attributes:
        ek_cert: None where it shows none.
        ek_chain: CAs between it and the maker's, in any order.
    """

    ek_cert: bytes | None
    ek_chain: tuple[bytes, ...] = ()


AskHost = Callable[[], Awaitable[HostCertificates]]
"""Asks the host for its own copy. Raises: ProviderProxyError."""


async def vouch(
    judge: EkJudge, ek: EndorsementKey, ask_host: AskHost | None
) -> tuple[EndorsementKey, Verdict | None]:
    """Judge an EK by the record's certificate, and by the host's own copy where that fails.

    The copy is as good: a certificate is for a key, and the registrar has challenged this key.

    Raises:
        UntrustedEkError: neither leads to a CA of the tenant's.
    """
    try:
        return ek, judge.check(ek)
    except UntrustedEkError as exc:
        if ask_host is None:
            raise
        refused = exc
    try:
        shown = await ask_host()
    except ReplyError as exc:
        log.warning("the host did not give its own copy of its EK certificate: %s", exc)
        raise refused from exc
    for cert in dict.fromkeys((shown.ek_cert, ek.cert)):
        if cert is None:
            continue
        again = EndorsementKey(ek.public, cert, ek.key, shown.ek_chain)
        try:
            return again, judge.check(again)
        except UntrustedEkError as exc:
            refused = exc if cert is shown.ek_cert else refused
    raise refused


def check_ek(ek: TpmPublic) -> None:
    """Check that an EK opens credentials and nothing else (TCG EK Credential Profile, annex B).

    Raises:
        UntrustedEkError: it has other attributes.
    """
    if ek.attributes & EK_MUST_HAVE != EK_MUST_HAVE or ek.attributes & SIGN:
        raise UntrustedEkError("the key does not have the attributes of an EK")
    if not ek.has_symmetric:
        raise UntrustedEkError("the EK is not a storage key")


def is_for_ek(
    shown: bytes | None, recorded: bytes | None, ek_public: bytes, *, by_hand: bool
) -> bool:
    """True where a host shows the certificate that it registered, or one for the same key.

    Compares the keys, because registrars up to Keylime 7.12 re-encode what is not strict DER.

    Args:
        shown, recorded: certificates; None where one is missing.
        ek_public: TPM2B_PUBLIC of the EK that was challenged.
        by_hand: a person vouches for the EK.
    """
    if shown is None or recorded is None or hmac.compare_digest(shown, recorded):
        return shown == recorded
    try:
        key = parse_certificate(shown).parsed.public_key()
    except EvidenceFormatError:
        # It cannot be read, so its key is not known. Where a person vouches for the key, that is enough.
        return by_hand
    return key == parse_public(ek_public).public_key
