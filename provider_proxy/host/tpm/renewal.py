"""Makes a leaked authValue of a key in the host's TPM useless, while the key stays the same.

A key's authValue can be changed, but a private part with the old one can still be loaded under the EK.
Loading needs the authValue of the endorsement hierarchy (policy A of the EK profile): once both are
changed, an old authValue or private part is useless, and the key keeps the name that tenants have pinned.
TPM2_Clear, which needs only the lockout's authValue, resets the hierarchy's authValue to empty and gives
the hierarchy a new secret: keys made under the EK before can no longer be loaded, and the key is lost.
Synchronous, while no daemon serves. Source: TPM 2.0 Part 3, sections 12.8, 24.6, 24.8 and 28.5.
"""

from __future__ import annotations

import logging

from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR
from tpm2_pytss.types import TPM2B_AUTH, TPM2B_PRIVATE, TPM2B_PUBLIC

from provider_proxy.errors import HostError, TpmError
from provider_proxy.host.tpm import capabilities, keys
from provider_proxy.host.tpm.chip import EkAuth, ek_session, tss_errors

log = logging.getLogger(__name__)


def takes_endorsement(context: ESAPI, auth: EkAuth) -> bool:
    """Whether the hierarchy has this authValue. Raises: TpmError."""
    try:
        with tss_errors("TPM2_PolicySecret"), ek_session(context, auth):
            return True
    except TpmError as exc:
        if keys.is_auth_error(exc):
            return False
        raise


def change_auth(context: ESAPI, key: ESYS_TR, ek: ESYS_TR, old: bytes, new: bytes) -> bytes | None:
    """TPM2_ObjectChangeAuth: changes nothing in the TPM.

    Returns:
        TPM2B_PRIVATE of the same key with the new authValue; None where `old` is not the key's.

    Raises:
        TpmError: the TPM refused.
    """
    keys.set_auth(context, key, old)
    try:
        with tss_errors("TPM2_ObjectChangeAuth"):
            return bytes(context.object_change_auth(key, ek, TPM2B_AUTH(new)).marshal())
    except TpmError as exc:
        if keys.is_auth_error(exc):
            return None
        raise


def keep(
    context: ESAPI, handle: int, ek: keys.EkInfo, auths: keys.Auths, public: bytes, private: bytes
) -> None:
    """Replace the key at a persistent handle.

    Raises:
        TpmError: the TPM refused. If it failed in between, the handle is empty.
    """
    private_part, _ = TPM2B_PRIVATE.unmarshal(private)
    public_part, _ = TPM2B_PUBLIC.unmarshal(public)
    context.tr_set_auth(ESYS_TR.OWNER, auths.owner)
    with tss_errors("loading the key's new private part"), ek_session(context, ek.auth) as session:
        loaded = context.load(ek.handle, private_part, public_part, session1=session)
    with keys.transient(context, loaded), tss_errors(f"keeping the key at handle {handle:#x}"):
        before = keys.find(context, handle)
        if before is not None:
            context.evict_control(ESYS_TR.OWNER, before, handle)
        context.evict_control(ESYS_TR.OWNER, loaded, handle)


def copies_of(context: ESAPI, handle: int, name: bytes) -> tuple[int, ...]:
    """Other persistent handles with the same key, where its authValue may be known to others.

    Handles that cannot be read are logged and skipped.

    Raises:
        TpmError: the TPM does not list its handles.
    """
    found = []
    with tss_errors("looking at persistent handles"):
        others = capabilities.handles(context, capabilities.FIRST_PERSISTENT)
    for other in others:
        try:
            at = keys.find(context, other) if other != handle else None
            if at is not None and _name_in_tpm(context, at) == name:
                found.append(other)
        except TpmError as exc:
            log.warning("cannot check whether handle %#x holds a copy of the key: %s", other, exc)
    return tuple(found)


def _name_in_tpm(context: ESAPI, key: ESYS_TR) -> bytes:
    with tss_errors("TPM2_ReadPublic"):
        return bytes(context.read_public(key)[1])


def evict(context: ESAPI, handle: int, auths: keys.Auths) -> None:
    """Empty a persistent handle. Raises: TpmError."""
    found = keys.find(context, handle)
    if found is not None:
        context.tr_set_auth(ESYS_TR.OWNER, auths.owner)
        with tss_errors(f"emptying handle {handle:#x}"):
            context.evict_control(ESYS_TR.OWNER, found, handle)


def change_endorsement(context: ESAPI, old: bytes, new: bytes) -> None:
    """Give the endorsement hierarchy another authValue. Raises: TpmError."""
    with tss_errors("TPM2_HierarchyChangeAuth"):
        context.tr_set_auth(ESYS_TR.ENDORSEMENT, old)
        context.hierarchy_change_auth(ESYS_TR.ENDORSEMENT, TPM2B_AUTH(new))


def demand_policy(ek: keys.EkInfo) -> None:
    """Check that loading a key under this EK needs the hierarchy's authValue.

    Raises:
        HostError: it does not.
    """
    if not ek.auth.by_policy:
        raise HostError(
            "the EK at tpm.ek_handle is of the high range: any user of the TPM can load old private "
            'parts under it, so a new authValue does not help. Make a new AK instead: see "After a '
            'compromise" in operating.md'
        )
