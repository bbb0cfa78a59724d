"""The vTPM CA's signing key in the host's TPM: found at its persistent handle, or made there once; used.

P-256, ECDSA with SHA-256, made under the EK like the AK, but not restricted: it signs outside digests
and is used for certificates only. Not subject to the dictionary-attack lockout, with a random
authValue of its own. A handle that holds something else is refused, never overwritten. Synchronous: only
the gate's thread may call it. Needs no session to sign, and leaves no transient object.
Source: TPM 2.0 Part 3, sections 18.2 (TPM2_Certify) and 20.2 (TPM2_Sign).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_RH, TPM2_ST, TPMA_OBJECT
from tpm2_pytss.types import TPMT_SIG_SCHEME, TPMT_TK_HASHCHECK

from provider_proxy.errors import AkChangedError, EvidenceFormatError, HostError
from provider_proxy.evidence import tpm_keys
from provider_proxy.evidence.vtpm_ca import CA_MUST_HAVE
from provider_proxy.host.tpm import keys
from provider_proxy.host.tpm.chip import Chip, tss_errors

CA_TEMPLATE = "ecc:ecdsa-sha256:null"
CA_ATTRIBUTES = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.SIGN_ENCRYPT
)
_OWN_SCHEME = TPM2_ALG.NULL  # the key's own


@dataclass(frozen=True, slots=True, kw_only=True)
class CaKeyAt:
    """The key at its persistent handle.

    Attributes:
        public: TPM2B_PUBLIC.
        name: its TPM name; what is used later must have it.
    """

    handle: int
    public: bytes
    name: bytes
    auth: bytes


def find_or_make(
    chip: Chip, handle: int, auths: keys.Auths, auth_for: Callable[[bool], bytes]
) -> CaKeyAt:
    """The key at `handle`; made under the EK if the handle is empty.

    Args:
        auth_for: gives the key's authValue; called with True before the key is made.

    Raises:
        HostError: the handle holds another kind of key.
        TpmError: the TPM refused.
    """
    found = keys.find(chip.context, handle)
    auth = auth_for(found is None)
    if found is None:
        with tss_errors("making the vTPM CA's key"):
            found = keys.make_under_ek(
                chip.context,
                handle,
                chip.ek,
                CA_TEMPLATE,
                CA_ATTRIBUTES,
                ek_auth=chip.ek_auth,
                auths=auths,
                auth=auth,
            )
    public = keys.read_public(chip.context, found)
    try:
        parsed = tpm_keys.parse_public(public)
    except EvidenceFormatError as exc:
        raise HostError(f"handle {handle:#x} does not hold an RSA or EC key: {exc}") from exc
    wanted = sum(CA_MUST_HAVE.values())
    unwanted = tpm_keys.RESTRICTED | tpm_keys.DECRYPT
    is_ours = parsed.attributes & (wanted | unwanted) == wanted
    if not is_ours or parsed.scheme != tpm_keys.TPM_ALG_ECDSA:
        raise HostError(
            f"handle {handle:#x} holds a key that is not a vTPM CA's; it was left unchanged"
        )
    return CaKeyAt(handle=handle, public=public, name=parsed.name, auth=auth)


def sign(chip: Chip, key: CaKeyAt, digest: bytes) -> bytes:
    """TPM2_Sign of a SHA-256 digest: TPMT_SIGNATURE.

    Raises:
        AkChangedError: the handle no longer holds this key.
        TpmError: the TPM refused.
    """
    found = _find_again(chip.context, key)
    with tss_errors("TPM2_Sign"):
        # No ticket: an unrestricted key signs any digest.
        ticket = TPMT_TK_HASHCHECK(tag=TPM2_ST.HASHCHECK, hierarchy=TPM2_RH.NULL)
        signature = chip.context.sign(found, digest, TPMT_SIG_SCHEME(scheme=_OWN_SCHEME), ticket)
        return bytes(signature.marshal())


def certify(chip: Chip, key: CaKeyAt, qualifying: bytes) -> tuple[bytes, bytes]:
    """TPM2_Certify of the key by the AK: TPMS_ATTEST and TPMT_SIGNATURE.

    Raises:
        AkChangedError: the handle no longer holds this key.
        TpmError: the TPM refused.
    """
    found = _find_again(chip.context, key)
    with tss_errors("TPM2_Certify"):
        attest, signature = chip.context.certify(
            found, chip.ak, qualifying, TPMT_SIG_SCHEME(scheme=_OWN_SCHEME)
        )
        return bytes(attest), bytes(signature.marshal())


def _find_again(context: ESAPI, key: CaKeyAt) -> ESYS_TR:
    """Find the key again, in a context that may have been reopened since."""
    found = keys.find(context, key.handle)
    if found is None or keys.name_of(context, found) != key.name:
        raise AkChangedError(f"handle {key.handle:#x} no longer holds the vTPM CA's key")
    keys.set_auth(context, found, key.auth)
    return found
