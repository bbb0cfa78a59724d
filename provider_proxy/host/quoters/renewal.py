"""`tpm ak renew`: after a compromise, gives the same keys new authValues.

Changes the authValues of the AK, of the vTPM CA's key if there is one, and of the endorsement hierarchy,
which is needed to load an old private part. Each step is written to the key's file before the TPM changes
anything: if a run is interrupted, the next one continues. No daemon may serve meanwhile.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from tpm2_pytss import ESAPI

from provider_proxy.common.files import read_secret
from provider_proxy.errors import HostError, UsageError
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.quoters.ak_store import AUTH_BYTES, AkStore, Renewal
from provider_proxy.host.quoters.ca_signer import ca_key_store
from provider_proxy.host.quoters.tpm_opener import TpmOpener
from provider_proxy.host.tpm import chip, keys, renewal
from provider_proxy.host.tpm.ek import OwnFiles, find_or_make_ek

MIN_ENDORSEMENT_BYTES, MAX_ENDORSEMENT_BYTES = 16, 32  # not guessable; every TPM accepts it


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """The result.

    Attributes:
        ak_name: the AK's name, unchanged.
        copies: handles from which copies of the keys were removed.
        ca_key: whether there was a vTPM CA's key.
    """

    ak_name: bytes
    copies: tuple[int, ...]
    ca_key: bool


def renew(
    opener: TpmOpener, settings: Tpm, state_dir: Path, ca_handle: int, endorsement: bytes
) -> Renewed:
    """Renew; blocks for as long as the TPM takes.

    Args:
        endorsement: the hierarchy's new authValue.

    Raises:
        UsageError: it is too short, too long, or the present one.
        HostError: a key is missing or not ours, or the TPM refuses.
    """
    if not MIN_ENDORSEMENT_BYTES <= len(endorsement) <= MAX_ENDORSEMENT_BYTES:
        raise UsageError(
            f"the endorsement hierarchy's new authValue must have {MIN_ENDORSEMENT_BYTES} to "
            f"{MAX_ENDORSEMENT_BYTES} bytes; make one with `openssl rand -hex 16`"
        )
    before = read_secret("tpm.endorsement_auth_file", settings.endorsement_auth_file)
    if before == endorsement:
        raise UsageError(
            "the new authValue is already in tpm.endorsement_auth_file: make another one"
        )
    owner = read_secret("tpm.owner_auth_file", settings.owner_auth_file)
    context = opener.connect()
    try:
        with opener.alone():
            now = _endorsement_now(context, before, endorsement)
            auths = keys.Auths(owner=owner, endorsement=now)
            ek = _ek(context, settings.ek_handle, auths)
            stores = [("AK", settings.ak_handle, AkStore(state_dir))]
            ca_store = ca_key_store(state_dir)
            if ca_store.known is not None:
                stores.append(("vTPM CA's key", ca_handle, ca_store))
            names = [
                _renew_key(context, store, what, handle, ek, auths)
                for what, handle, store in stores
            ]
            if now != endorsement:
                renewal.change_endorsement(context, now, endorsement)
            # Only now: before this, a new copy could be loaded.
            copies = [
                copy
                for name, (_, handle, _) in zip(names, stores, strict=True)
                for copy in renewal.copies_of(context, handle, name)
            ]
            for copy in copies:
                renewal.evict(context, copy, auths)
    finally:
        chip.close_context(context)
    return Renewed(ak_name=names[0], copies=tuple(copies), ca_key=len(names) > 1)


def _endorsement_now(context: ESAPI, before: bytes, after: bytes) -> bytes:
    """Which of the two authValues is set; an earlier run may have changed it. Raises: HostError."""
    for auth in (before, after):
        if renewal.takes_endorsement(context, chip.EkAuth(endorsement=auth)):
            return auth
    raise HostError(
        "the endorsement hierarchy's authValue is not the one in tpm.endorsement_auth_file. If it is "
        "lost, `tpm2_clear` resets it, which also destroys the AK"
    )


def _ek(context: ESAPI, handle: int, auths: keys.Auths) -> keys.EkInfo:
    """Raises: HostError if there is no EK, or one for which a renewal does not help."""
    if keys.find(context, handle) is None:
        raise HostError(f"tpm.ek_handle {handle:#x} holds no EK, so no AK was made under it")
    ek = find_or_make_ek(context, handle, auths, OwnFiles())
    renewal.demand_policy(ek)
    return ek


def _renew_key(
    context: ESAPI,
    store: AkStore,
    what: str,
    handle: int,
    ek: keys.EkInfo,
    auths: keys.Auths,
) -> bytes:
    """The key's name. Raises: HostError."""
    if store.known is None:
        raise HostError(
            f"there is no {what} to renew: state_dir has no file of one that has signed"
        )
    auth, name = store.known
    found = keys.find(context, handle)
    if found is not None and keys.name_of(context, found) != name:
        raise HostError(f"handle {handle:#x} no longer holds the {what} {name.hex()}")
    begun = store.renewal
    if begun is not None and found is not None:
        if renewal.change_auth(context, found, ek.handle, begun.auth, begun.auth) is None:
            begun = None  # the handle still has the old one: start again
    elif begun is not None:
        renewal.keep(context, handle, ek, auths, begun.public, begun.private)
    if begun is None:
        if found is None:
            raise HostError(f"handle {handle:#x} is empty: the TPM was cleared or replaced")
        new = secrets.token_bytes(AUTH_BYTES)
        private = renewal.change_auth(context, found, ek.handle, auth, new)
        if private is None:
            raise HostError(
                f"the {what} does not accept the authValue in state_dir: it was changed. Make a "
                "new key"
            )
        begun = Renewal(auth=new, public=keys.read_public(context, found), private=private)
        store.begin(begun)
        renewal.keep(context, handle, ek, auths, begun.public, begun.private)
    store.finish()
    return name
