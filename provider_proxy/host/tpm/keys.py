"""The host's AK: found at its persistent handle, or made there once; and helpers for all keys.

The AK is made under the EK, as Keylime's agent makes it: restricted, signing, not subject to the
dictionary-attack lockout (otherwise three unclean power-offs would lock it), with a random authValue, so
that other programs with access to the TPM device cannot have a forged root signed. A handle that holds
something else is refused, never overwritten. Runs once, before the daemon serves.
Source: TPM 2.0 Part 3, sections 12.1 and 28.5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPMA_OBJECT
from tpm2_pytss.types import (
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_SENSITIVE_CREATE,
)

from provider_proxy.errors import EvidenceFormatError, HostError, TpmError, UntrustedAkError
from provider_proxy.evidence import tpm_keys
from provider_proxy.evidence.model import AttestationKey
from provider_proxy.host.tpm.chip import EkAuth, ek_session, flush, tss_errors

TPM_RC_HANDLE = 0x8B  # format-one code: no object at that handle
TPM_RC_AUTH_FAIL = 0x8E
TPM_RC_BAD_AUTH = 0xA2
AK_ATTRIBUTES = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.SIGN_ENCRYPT
)
AK_TEMPLATES = {"ecc": "ecc:ecdsa-sha256:null", "rsa": "rsa2048:rsassa-sha256:null"}
AK_SIGN_ALG = {"ecc": "ecdsa", "rsa": "rsassa"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Auths:
    """Authorisation values of the hierarchies; empty if the owner set none."""

    owner: bytes = b""
    endorsement: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class EkInfo:
    """The endorsement key at its persistent handle. Found or made by `ek.find_or_make_ek`.

    Attributes:
        public: TPM2B_PUBLIC.
        auth: how it is used.
        cert: its DER certificate without padding and header; None without a certificate.
        chain: CAs for it from the chip or the operator, DER; not trusted.
        made: True if this call made it.
    """

    handle: ESYS_TR
    public: bytes
    auth: EkAuth
    cert: bytes | None
    chain: tuple[bytes, ...] = ()
    made: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AkInfo:
    """The attestation key at its persistent handle; `made` if this call made it."""

    handle: ESYS_TR
    public: bytes
    key: AttestationKey
    made: bool


def find(context: ESAPI, handle: int) -> ESYS_TR | None:
    """The object at a persistent handle; None if the handle is empty.

    Raises:
        TpmError: the TPM refused.
    """
    with tss_errors(f"looking at handle {handle:#x}"):
        try:
            return context.tr_from_tpmpublic(handle)
        except TSS2_Exception as exc:
            if int(exc.error) == TPM_RC_HANDLE:
                return None
            raise


def name_of(context: ESAPI, handle: ESYS_TR) -> bytes:
    """An object's name, computed from its public area.

    Raises:
        TpmError: the TPM refused, or the object is not an RSA or EC key.
    """
    public = read_public(context, handle)
    try:
        return tpm_keys.parse_public(public).name
    except EvidenceFormatError as exc:
        raise TpmError(f"TPM2_ReadPublic did not return an RSA or EC key: {exc}") from exc


def set_auth(context: ESAPI, handle: ESYS_TR, auth: bytes) -> None:
    """Tell ESYS the authValue of an object. Raises: TpmError."""
    with tss_errors("authValue"):
        context.tr_set_auth(handle, auth)


def read_public(context: ESAPI, handle: ESYS_TR) -> bytes:
    """An object's TPM2B_PUBLIC. Raises: TpmError."""
    with tss_errors("TPM2_ReadPublic"):
        public, _, _ = context.read_public(handle)
        return bytes(public.marshal())


@contextlib.contextmanager
def transient(context: ESAPI, handle: ESYS_TR) -> Iterator[ESYS_TR]:
    """A transient object, flushed afterwards."""
    try:
        yield handle
    finally:
        flush(context, handle)


def find_or_make_ak(
    context: ESAPI,
    handle: int,
    algorithm: str,
    ek: EkInfo,
    auths: Auths,
    ak_auth: Callable[[bool], bytes],
) -> AkInfo:
    """The AK at `handle`; made under the EK if the handle is empty.

    Args:
        algorithm: "ecc" (P-256, ECDSA) or "rsa" (2048, RSASSA), both with SHA-256.
        ak_auth: gives the AK's authValue; called with True before the AK is made.

    Raises:
        HostError: the handle holds another kind of key.
        TpmError: the TPM refused.
    """
    found = find(context, handle)
    made = found is None
    auth = ak_auth(made)
    if found is None:
        with tss_errors("making the AK"):
            found = make_under_ek(
                context,
                handle,
                ek.handle,
                AK_TEMPLATES[algorithm],
                AK_ATTRIBUTES,
                ek_auth=ek.auth,
                auths=auths,
                auth=auth,
            )
    with tss_errors("reading the AK"):
        public = read_public(context, found)
        context.tr_set_auth(found, auth)
    try:
        key = tpm_keys.parse_ak(public)
    except (EvidenceFormatError, UntrustedAkError) as exc:
        raise HostError(
            f"handle {handle:#x} holds a key that is not an AK; it was left unchanged ({exc})"
        ) from exc
    if key.sign_alg != AK_SIGN_ALG[algorithm]:
        raise HostError(
            f"handle {handle:#x} holds an AK for {key.sign_alg}, but tpm.ak_algorithm is "
            f"{algorithm!r}; it was left unchanged"
        )
    return AkInfo(handle=found, public=public, key=key, made=made)


def make_under_ek(
    context: ESAPI,
    handle: int,
    ek: ESYS_TR,
    template: str,
    attributes: TPMA_OBJECT,
    *,
    ek_auth: EkAuth,
    auths: Auths,
    auth: bytes,
) -> ESYS_TR:
    """Make a key under the EK and keep it at a persistent handle.

    Args:
        template: as `TPM2B_PUBLIC.parse` reads it.
        auth: the key's authValue.

    Raises:
        TSS2_Exception: the TPM refused; call it inside `tss_errors`.
    """
    context.tr_set_auth(ESYS_TR.OWNER, auths.owner)
    public_template = TPM2B_PUBLIC.parse(template, objectAttributes=attributes)
    sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=auth))
    with ek_session(context, ek_auth) as session:
        private, public, *_ = context.create(ek, sensitive, public_template, session1=session)
    with ek_session(context, ek_auth) as session:
        loaded = context.load(ek, private, public, session1=session)
    with transient(context, loaded):
        return context.evict_control(ESYS_TR.OWNER, loaded, handle)


def is_auth_error(exc: TpmError) -> bool:
    """True if the TPM says that an authValue is wrong."""
    return exc.code in (TPM_RC_BAD_AUTH, TPM_RC_AUTH_FAIL)
