"""Who is admitted: from a peer's certificate, or its unix credentials, to a tenant and its rules.

Asked on every request, not at the handshake alone: a resumed TLS session passes OpenSSL after its
certificate has expired or was revoked, and a kept-alive connection must be refused once its tenant
is removed. A certificate is parsed once; what is looked up each time is its dates, the CRL, the tenant.

A directory is never changed: a reload makes a new one.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from provider_proxy.common.crl import Crl, Issued, key_of
from provider_proxy.errors import UnknownTenantError
from provider_proxy.evidence.model import Tenant
from provider_proxy.host.config.material import listen_crls
from provider_proxy.host.config.tables import Listen, TenantRules
from provider_proxy.host.http.messages import Peer

MAX_CERTS_REMEMBERED = 16_384  # with more tenants than that, certificates are parsed again
ALL_REFUSED = "not a tenant of this provider"
CRL_EXPIRED = (
    "the provider's revocation list has expired; all clients are refused until it is renewed"
)

CRL_MISSING = "the provider has no revocation list of a CA in your certificate's chain"
_URI_RE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*", re.ASCII)

log = logging.getLogger(__name__)

Now = Callable[[], datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """The facts used from a client's certificate and its CAs' certificates, which TLS has verified.

    Attributes:
        identities: "spiffe://…", "dns:…", "email:…", "cn:…", "sha256:…", in the order in which they
            are looked up; the CN counts only where there is no alternative name of any kind.
        not_before, not_after: between them all certificates of the chain are valid.
        issued: each certificate by its issuer's key and its number, the client's own first.
    """

    identities: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    issued: tuple[Issued, ...]


@functools.lru_cache(maxsize=MAX_CERTS_REMEMBERED)
def parse_chain(chain: tuple[bytes, ...]) -> Client:
    """Read a client's certificate and those above it, DER, up to the CA that is trusted.

    Raises:
        UnknownTenantError: one cannot be read.
    """
    try:
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        leaf = certificates[0]
        names = _names(leaf)
        fingerprint = leaf.fingerprint(hashes.SHA256()).hex()
        return Client(
            identities=(*names, f"sha256:{fingerprint}"),
            not_before=max(each.not_valid_before_utc for each in certificates),
            not_after=min(each.not_valid_after_utc for each in certificates),
            issued=tuple(
                (key_of(issuer), each.serial_number) for each, issuer in pairwise(certificates)
            ),
        )
    except (
        ValueError,
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as exc:
        raise UnknownTenantError("your certificate cannot be read") from exc


def _names(leaf: x509.Certificate) -> list[str]:
    """Raises: ValueError for a name that another parser could read differently."""
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return [f"cn:{name.value}" for name in common if isinstance(name.value, str)]
    uris = [_folded_uri(uri) for uri in found.get_values_for_type(x509.UniformResourceIdentifier)]
    names = [uri for uri in uris if uri.startswith("spiffe://")]
    if len(names) > 1:
        raise ValueError("an X.509-SVID has exactly one SPIFFE ID")
    names += [f"dns:{_folded(name)}" for name in found.get_values_for_type(x509.DNSName)]
    for name in found.get_values_for_type(x509.RFC822Name):
        mailbox, at, domain = _ascii(name).rpartition("@")
        names.append(f"email:{mailbox}{at}{_folded(domain)}")
    return names


def _ascii(name: str) -> str:
    if not name.isascii() or not name.isprintable():
        raise ValueError("a name that is not printable ASCII")
    return name


def _folded(name: str) -> str:
    """Letters A to Z in lower case, RFC 4343; Unicode's lower() makes a "k" of the Kelvin sign."""
    return _ascii(name).lower()


def _folded_uri(uri: str) -> str:
    """Scheme and authority in lower case, RFC 3986, section 6.2.2.1."""
    match = _URI_RE.match(_ascii(uri))
    return uri if match is None else match[0].lower() + uri[match.end() :]


class TenantDirectory:
    """The tenants, by their identities.

    Args:
        defaults: rules for a tenant without a table of its own.
        tenants: name to rules.
        certificates: True where clients have one (`listen.client_ca` is set).
        crls: the revocation list of each CA.
        crl_strict: refuse all clients while a CA's list has expired or is missing.
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
            UnknownTenantError: not a tenant, or its certificate has expired or was revoked.
        """
        if peer.uid is None and not self._certificates:
            return self._by_default(peer.name)
        return self._lookup(self.identities(peer))

    def identities(self, peer: Peer) -> tuple[str, ...]:
        """All identities that a peer has as of now, by its uid or its certificate.

        Raises:
            UnknownTenantError: it has neither, or its certificate has expired or was revoked.
        """
        if peer.uid is not None:
            return (f"uid:{peer.uid}",)
        if peer.certificate is None:
            raise UnknownTenantError("this listener requires a client certificate")
        client = parse_chain(peer.chain or (peer.certificate,))
        if not client.not_before <= self._now() <= client.not_after:
            raise UnknownTenantError("your certificate, or a CA above it, is not valid now")
        if self._crls:
            self._check_revocation(client, is_whole=bool(peer.chain))
        return client.identities

    def _check_revocation(self, client: Client, *, is_whole: bool) -> None:
        """Look at every certificate of the chain.

        Raises:
            UnknownTenantError: one is revoked, or that is unknown and `crl_strict` is set.
        """
        if not is_whole:
            raise UnknownTenantError(
                "connect again with a full TLS handshake, without session resumption"
            )
        for depth, issued in enumerate(client.issued):
            if any(crl.holds(issued) for crl in self._crls):
                whose = "a CA above your certificate" if depth else "your certificate"
                raise UnknownTenantError(f"{whose} was revoked")
        if not self._crl_strict:
            return
        if any(crl.next_update < self._now() for crl in self._crls):
            raise UnknownTenantError(CRL_EXPIRED)
        known = {crl.issuer for crl in self._crls}
        if any(issuer not in known for issuer, _ in client.issued):
            raise UnknownTenantError(CRL_MISSING)

    def _lookup(self, identities: tuple[str, ...]) -> Tenant:
        for identity in identities:
            tenant = self._by_identity.get(identity)
            if tenant is not None:
                return tenant
        if not self._defaults.accept_unlisted:
            raise UnknownTenantError(ALL_REFUSED)
        # Identities contain a ':' and tenants' names do not, so no identity can be taken for a name.
        return self._by_default(identities[0])

    def _by_default(self, name: str) -> Tenant:
        """A tenant without a table of its own; cached, because it will ask again."""
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


def load_tenant_directory(
    listen: Listen, defaults: TenantRules, tenants: Mapping[str, TenantRules]
) -> TenantDirectory:
    """The directory of a configuration, its CRL read.

    Raises:
        HostError: the CRL is missing or not the CA's, or has expired and `listen.crl_strict` is set.
    """
    return TenantDirectory(
        defaults,
        tenants,
        certificates=listen.client_ca is not None,
        crls=listen_crls(listen),
        crl_strict=listen.crl_strict,
    )
