"""The listener for a front: a proxy of the provider's that terminates the tenants' TLS and passes each
tenant's certificate on, in RFC 9440's `Client-Cert`.

The front is trusted only to have checked that the client has the certificate's private key. Chain,
dates, CRL and tenant are checked here, for each request, because a front sends many tenants over one
connection. Who the front is follows from its uid or its own certificate.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from provider_proxy.common.tls import load_certificates
from provider_proxy.errors import ClientCertError, UnknownTenantError
from provider_proxy.host.api.identity import TenantDirectory
from provider_proxy.host.api.tenant import Count, TurnAway
from provider_proxy.host.config.tables import Listen
from provider_proxy.host.http.messages import Handler, Peer, Request, Response
from provider_proxy.host.status.recent import STRANGERS

MAX_HELPERS = 8  # of a request; OpenSSL and RFC 5280's usual chains have three at most
MAX_CERTIFICATE_BYTES = 8 * 1024  # a head of 16 kB holds no more
MAX_REMEMBERED = 16_384  # certificates whose chain was found good; 10,000 tenants and some more
REMEMBERED_S = 60.0  # a CA that has expired meanwhile is noticed this late at most


def parse_client_cert(values: Sequence[str]) -> bytes:
    """The certificate in the `Client-Cert` headers of a request: RFC 9440, section 2.2.

    Args:
        values: of all headers of that name; untrusted.

    Returns:
        DER, not looked into yet.

    Raises:
        ClientCertError: none, several, or not one byte sequence of RFC 8941.
    """
    if len(values) != 1:
        count = "no" if not values else "more than one"
        raise ClientCertError(f"the front sent {count} Client-Cert header")
    return _byte_sequence("Client-Cert", values[0])


def parse_client_chain(values: Sequence[str]) -> tuple[bytes, ...]:
    """The certificates in the `Client-Cert-Chain` headers of a request: RFC 9440, section 2.3.

    Args:
        values: of all headers of that name, may be empty; untrusted.

    Returns:
        DER, not looked into yet: helpers on the way to a CA, trusted for nothing.

    Raises:
        ClientCertError: not a list of byte sequences of RFC 8941, or a long one.
    """
    listed = ",".join(values)
    if not listed.strip(" \t"):
        return ()
    parts = listed.split(",")
    if len(parts) > MAX_HELPERS:
        raise ClientCertError(f"Client-Cert-Chain must hold {MAX_HELPERS} certificates at most")
    return tuple(_byte_sequence("each of Client-Cert-Chain", part) for part in parts)


def _byte_sequence(name: str, text: str) -> bytes:
    value = text.strip(" \t")
    if len(value) < 3 or value[0] != ":" or value[-1] != ":":
        raise ClientCertError(f"{name} must be a base64 text between two colons (RFC 9440)")
    try:
        der = base64.b64decode(value[1:-1], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ClientCertError(f"{name} is not base64") from exc
    if not der or len(der) > MAX_CERTIFICATE_BYTES:
        raise ClientCertError(f"{name} must hold 1 to {MAX_CERTIFICATE_BYTES} bytes")
    return der


class ClientChain:
    """Checks that certificates lead to `listen.client_ca`, as the TLS of the other listeners does.

    Args:
        authorities: of that file; a chain may end at the self-signed ones.
        now: for the dates of the whole chain.
        monotonic: seconds; for how long a good chain is remembered.
    """

    def __init__(
        self,
        authorities: Collection[x509.Certificate],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        roots = [ca for ca in authorities if ca.issuer == ca.subject]
        self._between = [ca for ca in authorities if ca.issuer != ca.subject]
        self._store = verification.Store(roots) if roots else None
        self._now = now
        self._monotonic = monotonic
        self._good: OrderedDict[bytes, tuple[float, tuple[bytes, ...]]] = OrderedDict()

    def check(self, der: bytes, helpers: Sequence[bytes] = ()) -> tuple[bytes, ...]:
        """The chain from a client's certificate to this CA, DER.

        Args:
            helpers: certificates that may be between the two, DER, untrusted.

        Does not check: the CRL, and who it is; see `TenantDirectory.find`.

        Raises:
            ClientCertError: it is not a certificate.
            UnknownTenantError: it does not lead to the CA.
        """
        now = self._monotonic()
        seen = self._good.get(der)
        if seen is not None and now - seen[0] < REMEMBERED_S:
            return seen[1]
        chain = self._verify(der, helpers)
        self._good[der] = now, chain
        self._good.move_to_end(der)
        if len(self._good) > MAX_REMEMBERED:
            self._good.popitem(last=False)
        return chain

    def _verify(self, der: bytes, helpers: Sequence[bytes]) -> tuple[bytes, ...]:
        certificate = _load("Client-Cert", der)
        between = [*self._between, *(_load("Client-Cert-Chain", helper) for helper in helpers)]
        if self._store is None:
            raise UnknownTenantError("listen.client_ca holds no self-signed CA")
        verifier = (
            verification.PolicyBuilder()
            .store(self._store)
            .time(self._now())
            .extension_policies(ca_policy=_ca_policy(), ee_policy=_client_policy())
            .build_client_verifier()
        )
        try:
            verified = verifier.verify(certificate, between)
        except (verification.VerificationError, ValueError, UnsupportedAlgorithm) as exc:
            raise UnknownTenantError(
                "your certificate was not issued by a CA in listen.client_ca"
            ) from exc
        return tuple(part.public_bytes(Encoding.DER) for part in verified.chain)


def _load(name: str, der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ClientCertError(f"{name} holds no certificate") from exc


def _ca_policy() -> verification.ExtensionPolicy:
    def is_ca(_: object, __: object, constraints: x509.BasicConstraints) -> None:
        if not constraints.ca:
            raise ValueError("not a CA")

    def signs(_: object, __: object, usage: x509.KeyUsage | None) -> None:
        if usage is not None and not usage.key_cert_sign:
            raise ValueError("may not sign certificates")

    either = verification.Criticality.AGNOSTIC
    return (
        verification.ExtensionPolicy.permit_all()
        .require_present(x509.BasicConstraints, either, is_ca)
        .may_be_present(x509.KeyUsage, either, signs)
    )


def _client_policy() -> verification.ExtensionPolicy:
    def for_clients(_: object, __: object, usage: x509.ExtendedKeyUsage | None) -> None:
        good = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE)
        if usage is not None and not any(oid in usage for oid in good):
            raise ValueError("not for TLS clients")

    def signs(_: object, __: object, usage: x509.KeyUsage | None) -> None:
        if usage is not None and not (usage.digital_signature or usage.key_agreement):
            raise ValueError("its key usage does not allow digital signatures")

    either = verification.Criticality.AGNOSTIC
    return (
        verification.ExtensionPolicy.permit_all()
        .may_be_present(x509.ExtendedKeyUsage, either, for_clients)
        .may_be_present(x509.KeyUsage, either, signs)
    )


class FrontJudge:
    """Finds the tenant for whom a front asks. Immutable: a reload makes a new one.

    Args:
        directory: the tenants.
        peers: who the front may be, as identities ("uid:…", "dns:…").
        chain: of the tenants' certificates.
    """

    def __init__(
        self, directory: TenantDirectory, peers: Collection[str], chain: ClientChain
    ) -> None:
        self._directory = directory
        self._peers = frozenset(peers)
        self._chain = chain

    def is_front(self, peer: Peer) -> bool:
        """Whether a connection is the front's, by its uid or its own certificate."""
        return not self._peers.isdisjoint(self._directory.identities(peer))

    def admit(self, request: Request) -> Request:
        """The request as if its tenant had connected directly.

        Raises:
            UnknownTenantError: the peer is not a front, or the certificate is not valid.
            ClientCertError: the front did not pass on one certificate.
        """
        if not self.is_front(request.peer):
            raise UnknownTenantError("only the provider's front may use this listener")
        der = parse_client_cert(request.client_certs)
        chain = self._chain.check(der, parse_client_chain(request.client_chains))
        peer = dataclasses.replace(request.peer, certificate=der, chain=chain, uid=None)
        return dataclasses.replace(request, peer=peer, client_certs=(), client_chains=())


def load_front_judge(listen: Listen, directory: TenantDirectory) -> FrontJudge | None:
    """The judge that the configuration describes; None without a front.

    Raises:
        HostError: `listen.client_ca` cannot be read.
    """
    if not listen.front or listen.client_ca is None:
        return None
    authorities = load_certificates("listen.client_ca", listen.client_ca)
    return FrontJudge(directory, listen.front_peers, ClientChain(authorities))


class FrontApi:
    """The handler of a front's listeners, before the tenants' own.

    Args:
        count: told of each request that goes no further.
        turned_away: told of the same: why, the front's address, and the certificate that it passed on.

    Attributes:
        judge: may be replaced, for the requests that come after.
    """

    def __init__(
        self,
        handler: Handler,
        judge: FrontJudge,
        count: Count,
        turned_away: TurnAway = lambda reason, address, certificate: None,
    ) -> None:
        self._handler = handler
        self._count = count
        self._turned_away = turned_away
        self.judge = judge

    async def __call__(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            RequestError, ServiceError: see the handler's, and `FrontJudge.admit`.
        """
        try:
            admitted = self.judge.admit(request)
        except (UnknownTenantError, ClientCertError) as exc:
            self._count(STRANGERS, type(exc).__name__)
            self._turned_away(str(exc), request.peer.name, self._certificate(request))
            raise
        return await self._handler(admitted)

    def _certificate(self, request: Request) -> bytes | None:
        """The client's certificate: the front passed it on, or a peer that is not a front showed it."""
        if not self.judge.is_front(request.peer):
            return request.peer.certificate
        with contextlib.suppress(ClientCertError):
            return parse_client_cert(request.client_certs)
        return None


def make_front_api(
    listen: Listen,
    handler: Handler,
    directory: TenantDirectory,
    count: Count,
    turned_away: TurnAway,
) -> FrontApi | None:
    """The front's API; None where no front is configured.

    Raises:
        HostError: see `load_front_judge`.
    """
    judge = load_front_judge(listen, directory)
    return None if judge is None else FrontApi(handler, judge, count, turned_away)
