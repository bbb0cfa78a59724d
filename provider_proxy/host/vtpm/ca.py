"""The host's vTPM CA, with `vtpm.issuer = "tpm"`: its key lies in the host's TPM and signs certificates.

`open_host_ca` finds or makes the CA's own certificate, which carries the AK's certification of the key;
`HostCa.issue` certifies a vTPM's EK. It issues no certificate that the tenants' own check would refuse.
Makes no key, uses the chip only through its `Signer`, and does not decide which VM may have one.
"""

from __future__ import annotations

import datetime
import logging
import secrets
import uuid
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from provider_proxy.common.files import is_there, read_file, write_private
from provider_proxy.errors import (
    HostError,
    SelfCheckError,
    UntrustedCaError,
    UsageError,
    VerificationError,
)
from provider_proxy.evidence import attestation, tpm_keys
from provider_proxy.evidence.model import AttestationKey
from provider_proxy.evidence.vtpm_ca import (
    CA_QUALIFYING,
    MAX_CA_BYTES,
    VtpmCa,
    check_ca_certificate,
    check_vtpm_certificate,
)
from provider_proxy.host.vtpm import profile
from provider_proxy.host.vtpm.requests import MAX_CERTIFICATE_BYTES, CertificateRequest

log = logging.getLogger(__name__)

CERTIFICATE_FILE = "vtpm-ca.der"
BACKDATED = datetime.timedelta(minutes=5)  # for a tenant whose clock is slower than the host's

Now = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """The wall clock."""
    return datetime.datetime.now(datetime.UTC)


class Signer(Protocol):
    """The CA's key: P-256, in the host's TPM."""

    @property
    def public(self) -> bytes:
        """Its TPM2B_PUBLIC."""
        ...

    async def sign(self, digest: bytes) -> bytes:
        """A TPMT_SIGNATURE over a SHA-256 digest.

        Raises:
            HostError, ServiceError: it is not available now.
        """
        ...

    async def certify(self, qualifying: bytes) -> tuple[bytes, bytes]:
        """TPM2_Certify of the key by the AK: TPMS_ATTEST and TPMT_SIGNATURE.

        Raises:
            HostError, ServiceError: it is not available now.
        """
        ...


class HostCa:
    """A `vtpm.requests.Issuer`. Made by `open_host_ca`.

    Args:
        ca: its certificate, checked.
        now: the wall clock.
    """

    def __init__(self, signer: Signer, ca: VtpmCa, *, now: Now = utc_now) -> None:
        self._signer = signer
        self._ca = ca
        self._now = now

    @property
    def certificate(self) -> bytes:
        """The CA's own certificate, DER."""
        return self._ca.certificate.public_bytes(Encoding.DER)

    async def issue(self, request: CertificateRequest) -> bytes:
        """An EK or platform certificate, DER; cancel it at your deadline.

        Raises:
            HostError, ServiceError: the TPM gives no signature now.
            SelfCheckError: the certificate would not pass the tenants' check.
        """
        builder = profile.vtpm_builder(
            request,
            self._ca.certificate,
            not_before=self._now() - BACKDATED,
            serial=_new_serial(),
        )
        made = await _sign(self._signer, builder)
        try:
            if len(made) > MAX_CERTIFICATE_BYTES:
                raise SelfCheckError(f"the certificate has {len(made)} bytes, must be at most 2048")
            check_vtpm_certificate(
                made, self._ca, key=request.public_key, vm=request.vm, kind=request.kind
            )
        except VerificationError as exc:
            raise SelfCheckError("the certificate failed the proxy's own verification") from exc
        log.info("vtpm: certified the %s of VM %s", request.kind, request.vm)
        return made


async def open_host_ca(
    signer: Signer,
    ak: AttestationKey,
    state_dir: Path,
    *,
    host_uuid: uuid.UUID,
    now: Now = utc_now,
) -> HostCa:
    """The CA whose certificate is in the state directory; a new certificate if that one does not fit.

    A certificate that is damaged, for another key, or certified by an earlier AK is replaced.

    Raises:
        HostError, ServiceError: the TPM gives no signature, or the file cannot be written.
        SelfCheckError: the certificate would not pass the tenants' check.
    """
    path = state_dir / CERTIFICATE_FILE
    if is_there(path):
        try:
            found = check_ca_certificate(read_file(path, MAX_CA_BYTES), ak)
            subject = profile.ca_subject(host_uuid, found.public_key)
            is_own = found.name == tpm_keys.parse_public(signer.public).name
            if is_own and found.certificate.subject == subject:
                return HostCa(signer, found, now=now)
            log.warning("vtpm: %s is for another key or host; making a new certificate", path)
        except (UntrustedCaError, UsageError) as exc:
            log.warning("vtpm: %s cannot be used (%s); making a new certificate", path, exc)
    made = await _make_certificate(signer, host_uuid, now)
    try:
        ca = check_ca_certificate(made, ak)
    except VerificationError as exc:
        raise SelfCheckError("the CA's certificate failed the proxy's own verification") from exc
    write_private(path, made)
    log.info("vtpm: the CA is %s", ca.subject)
    return HostCa(signer, ca, now=now)


async def _make_certificate(signer: Signer, host_uuid: uuid.UUID, now: Now) -> bytes:
    key = tpm_keys.parse_public(signer.public).public_key
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise HostError("the vTPM CA's key is not an EC key")
    attest, signature = await signer.certify(CA_QUALIFYING)
    builder = profile.ca_builder(
        key,
        host_uuid=host_uuid,
        not_before=now() - BACKDATED,
        serial=_new_serial(),
        attest=attest,
        signature=signature,
        public_area=signer.public[2:],
    )
    return await _sign(signer, builder)


async def _sign(signer: Signer, builder: x509.CertificateBuilder) -> bytes:
    signature = await signer.sign(sha256(profile.tbs_of(builder)).digest())
    try:
        value = attestation.parse_signature(signature)
    except VerificationError as exc:
        raise HostError(f"TPM2_Sign did not return a signature: {exc}") from exc
    return profile.signed(builder, value.value)


def _new_serial() -> int:
    """20 octets, positive and never 0."""
    return secrets.randbits(profile.SERIAL_BITS) | 1 << (profile.SERIAL_BITS - 1)
