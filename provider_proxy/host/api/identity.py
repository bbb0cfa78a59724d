"""Who may come in: from a peer's certificate, or its unix credentials, to a tenant and its rules.

Asked on every request, not at the handshake alone: a resumed TLS session passes OpenSSL after its
certificate has expired or was revoked, and a kept-alive connection must lose its right when its tenant
is removed. A certificate is parsed once; what is looked up each time is its dates, the CRL, the tenant.

A book is never changed: a reload makes a new one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from provider_proxy.common.crl import Crl, load_crls
from provider_proxy.common.tls import load_certificates
from provider_proxy.errors import HostError, UnknownTenantError
from provider_proxy.evidence.model import Tenant
from provider_proxy.host.config.tables import Listen, TenantRules
from provider_proxy.host.http.messages import Peer

MAX_CERTS_REMEMBERED = 4096
ALL_REFUSED = "no tenant of this provider"
CRL_EXPIRED = (
    "the provider's revocation list has run out, and nobody is let in before it is renewed"
)

Now = Callable[[], datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What counts of a client's certificate, which TLS has verified against `listen.client_ca`.

    Attributes:
        identities: "spiffe://…", "dns:…", "email:…", "cn:…", "sha256:…", in the order in which they
            are looked up; the CN counts only where there is no other name.
    """

    identities: tuple[str, ...]
    issuer: x509.Name
    serial: int
    not_before: datetime
    not_after: datetime


@functools.lru_cache(maxsize=MAX_CERTS_REMEMBERED)
def parse_certificate(der: bytes) -> Certificate:
    """Read a client's certificate.

    Raises:
        UnknownTenantError: it cannot be read.
    """
    try:
        cert = x509.load_der_x509_certificate(der)
        names = _names(cert)
        fingerprint = cert.fingerprint(hashes.SHA256()).hex()
        return Certificate(
            identities=(*names, f"sha256:{fingerprint}"),
            issuer=cert.issuer,
            serial=cert.serial_number,
            not_before=cert.not_valid_before_utc,
            not_after=cert.not_valid_after_utc,
        )
    except (
        ValueError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as exc:
        raise UnknownTenantError("your certificate cannot be read") from exc


def _names(cert: x509.Certificate) -> list[str]:
    try:
        found = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        found = x509.SubjectAlternativeName([])
    uris = found.get_values_for_type(x509.UniformResourceIdentifier)
    names = [uri for uri in uris if uri.startswith("spiffe://")]
    names += [f"dns:{name.lower()}" for name in found.get_values_for_type(x509.DNSName)]
    names += [f"email:{name}" for name in found.get_values_for_type(x509.RFC822Name)]
    if not names:
        common = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        names = [f"cn:{name.value}" for name in common if isinstance(name.value, str)]
    return names


class TenantBook:
    """The tenants, by their identities.

    Args:
        defaults: rules of who has no table of its own.
        tenants: name to rules.
        certificates: True where clients have one (`listen.client_ca` is set).
        crls: who was revoked, of each CA.
        crl_strict: a list that has run out lets nobody in.
    """

    def __init__(
        self,
        defaults: TenantRules,
        tenants: Mapping[str, TenantRules],
        *,
        certificates: bool,
        crls: Sequence[Crl] = (),
        crl_strict: bool = False,
        now: Now = lambda: datetime.now(UTC),
    ) -> None:
        self._defaults = defaults
        self._certificates = certificates
        self._crls = tuple(crls)
        self._crl_strict = crl_strict
        self._now = now
        self._by_identity = {
            identity: _tenant(name, rules)
            for name, rules in tenants.items()
            for identity in rules.identities
        }
        self._unlisted: dict[str, Tenant] = {}

    def find(self, peer: Peer) -> Tenant:
        """The tenant at the other end of a connection, as of now.

        Raises:
            UnknownTenantError: none, or its certificate has expired or was revoked.
        """
        if peer.uid is not None:
            return self._lookup((f"uid:{peer.uid}",))
        if not self._certificates:
            return self._by_default(peer.name)
        if peer.certificate is None:
            raise UnknownTenantError("a client certificate is needed here")
        certificate = parse_certificate(peer.certificate)
        if not certificate.not_before <= self._now() <= certificate.not_after:
            raise UnknownTenantError("your certificate is not valid now")
        if any(crl.holds(certificate.issuer, certificate.serial) for crl in self._crls):
            raise UnknownTenantError("your certificate was revoked")
        if self._crl_strict and any(crl.next_update < self._now() for crl in self._crls):
            raise UnknownTenantError(CRL_EXPIRED)
        return self._lookup(certificate.identities)

    def _lookup(self, identities: tuple[str, ...]) -> Tenant:
        for identity in identities:
            tenant = self._by_identity.get(identity)
            if tenant is not None:
                return tenant
        if not self._defaults.accept_unlisted:
            raise UnknownTenantError(ALL_REFUSED)
        # Identities hold a ':', which no tenant's name does: nobody takes another's name.
        return self._by_default(identities[0])

    def _by_default(self, name: str) -> Tenant:
        """A tenant with no table of its own; remembered, for it asks again."""
        tenant = self._unlisted.get(name)
        if tenant is None:
            if len(self._unlisted) >= MAX_CERTS_REMEMBERED:
                self._unlisted.clear()
            tenant = self._unlisted[name] = _tenant(name, self._defaults)
        return tenant


def _tenant(name: str, rules: TenantRules) -> Tenant:
    return Tenant(
        name=name,
        pcr_allow=rules.pcr_allow,
        rate=rules.rate,
        burst=rules.burst,
        max_inflight=rules.max_inflight,
        vms=rules.vms,
    )


def load_book(
    listen: Listen, defaults: TenantRules, tenants: Mapping[str, TenantRules]
) -> TenantBook:
    """The book of a configuration, its CRL read.

    Raises:
        HostError: the CRL is missing or not the CA's, or has run out and `listen.crl_strict` is set.
    """
    crls: tuple[Crl, ...] = ()
    if listen.client_crl is not None and listen.client_ca is not None:
        authorities = load_certificates("listen.client_ca", listen.client_ca)
        crls = load_crls("listen.client_crl", listen.client_crl, authorities)
        if listen.crl_strict and any(crl.next_update < datetime.now(UTC) for crl in crls):
            raise HostError(
                f"listen.client_crl: {listen.client_crl} has run out, and listen.crl_strict is set: get "
                "the CA's newest list (provider-proxy pki crl makes one)"
            )
    return TenantBook(
        defaults,
        tenants,
        certificates=listen.client_ca is not None,
        crls=crls,
        crl_strict=listen.crl_strict,
    )
