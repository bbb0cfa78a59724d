"""`tpm ak renew`: after a compromise, the same keys under authValues that nobody has read.

Changes the authValues of the AK, of the vTPM CA's key where there is one, and of the endorsement
hierarchy, without which no old private part loads. What has begun is in the key's file before the TPM
changes anything: whenever this ends before its time, the next run goes on. No daemon may serve meanwhile.
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

MIN_ENDORSEMENT_BYTES, MAX_ENDORSEMENT_BYTES = 16, 32  # nobody guesses it; every TPM takes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """What was done.

    Attributes:
        ak_name: as before.
        copies: handles from which the same keys were removed.
        ca_key: whether the vTPM CA's key was there.
    """

    ak_name: bytes
    copies: tuple[int, ...]
    ca_key: bool


def renew(
    opener: TpmOpener, settings: Tpm, state_dir: Path, ca_handle: int, endorsement: bytes
) -> Renewed:
    """Renew; blocks for as long as the TPM takes.

    Args:
        endorsement: the hierarchy's authValue from now on.

    Raises:
        UsageError: it is too short or too long, or what it is already.
        HostError: a key is missing or another one's; the TPM refuses.
    """
    if not MIN_ENDORSEMENT_BYTES <= len(endorsement) <= MAX_ENDORSEMENT_BYTES:
        raise UsageError(
            f"the endorsement hierarchy's new authValue must have {MIN_ENDORSEMENT_BYTES} to "
            f"{MAX_ENDORSEMENT_BYTES} bytes, for example of `openssl rand -hex 16`"
        )
    before = read_secret("tpm.endorsement_auth_file", settings.endorsement_auth_file)
    if before == endorsement:
        raise UsageError("the new authValue is that of tpm.endorsement_auth_file: make another one")
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
            # Only now: before, a new copy could be loaded.
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
    """Which of the two the hierarchy has: an earlier run may have changed it. Raises: HostError."""
    for auth in (before, after):
        if renewal.takes_endorsement(context, chip.EkAuth(endorsement=auth)):
            return auth
    raise HostError(
        "the endorsement hierarchy has another authValue than tpm.endorsement_auth_file says; where "
        "nobody knows it, tpm2_clear takes it away, and the AK with it"
    )


def _ek(context: ESAPI, handle: int, auths: keys.Auths) -> keys.EkInfo:
    """Raises: HostError where there is none, or one that this is no help for."""
    if keys.find(context, handle) is None:
        raise HostError(f"there is no EK at tpm.ek_handle {handle:#x}, so no AK was made under it")
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
            f"there is no {what} to renew: no file in state_dir names one that has signed"
        )
    auth, name = store.known
    found = keys.find(context, handle)
    if found is not None and keys.name_of(context, found) != name:
        raise HostError(f"handle {handle:#x} no longer holds the {what} {name.hex()}")
    begun = store.renewal
    if begun is not None and found is not None:
        if renewal.change_auth(context, found, ek.handle, begun.auth, begun.auth) is None:
            begun = None  # the handle still has the old one: begin again
    elif begun is not None:
        renewal.keep(context, handle, ek, auths, begun.public, begun.private)
    if begun is None:
        if found is None:
            raise HostError(f"handle {handle:#x} is empty: the TPM was cleared or replaced")
        new = secrets.token_bytes(AUTH_BYTES)
        private = renewal.change_auth(context, found, ek.handle, auth, new)
        if private is None:
            raise HostError(
                f"the {what} does not take the authValue in state_dir: somebody has changed it. Make a "
                "new key"
            )
        begun = Renewal(auth=new, public=keys.read_public(context, found), private=private)
        store.begin(begun)
        renewal.keep(context, handle, ek, auths, begun.public, begun.private)
    store.finish()
    return name
