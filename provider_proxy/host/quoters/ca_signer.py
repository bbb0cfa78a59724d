"""Signs for the vTPM CA with its key in the host's TPM, behind the same gate as the quotes.

Each signature is one command of the chip: it waits for its turn, counts in the duty, and is retried.
Knows nothing of certificates; `vtpm.ca` makes them. The key's authValue is stored beside the AK's.
"""

from __future__ import annotations

from pathlib import Path

import trio

from provider_proxy.common.files import FileLock, read_secret
from provider_proxy.errors import HostError, QuoteError
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.quoters.ak_store import AkStore
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.quoters.tpm_opener import LOCK_POLL_S, OPEN_LOCK
from provider_proxy.host.tpm import ca_key, keys

KEY_FILE = "vtpm-ca-key.json"
OPEN_LIMIT_S = 120.0  # making an EC key takes a second or two, after other users of the chip


class CaSigner:
    """A `vtpm.ca.Signer` over the host's TPM. Made by `open_ca_signer`.

    Attributes:
        public: the key's TPM2B_PUBLIC.
    """

    def __init__(self, quoter: EsysQuoter, key: ca_key.CaKeyAt) -> None:
        self._quoter = quoter
        self._key = key
        self.public = key.public

    async def sign(self, digest: bytes) -> bytes:
        """A TPMT_SIGNATURE over a SHA-256 digest; cancel it at your deadline.

        Raises:
            QuoteError, HostError: it is not available now.
        """
        return await self._quoter.on_chip(lambda chip: ca_key.sign(chip, self._key, digest))

    async def certify(self, qualifying: bytes) -> tuple[bytes, bytes]:
        """TPM2_Certify of the key by the AK: TPMS_ATTEST and TPMT_SIGNATURE.

        Raises:
            QuoteError, HostError: it is not available now.
        """
        return await self._quoter.on_chip(lambda chip: ca_key.certify(chip, self._key, qualifying))


def ca_key_store(state_dir: Path) -> AkStore:
    """The file with the key's authValue. Raises: HostError."""
    return AkStore(
        state_dir,
        key="vTPM CA's key",
        handle="vtpm.ca_handle",
        file=KEY_FILE,
        after="tenants must then trust the new vTPM CA",
    )


async def open_ca_signer(
    quoter: EsysQuoter, settings: Tpm, state_dir: Path, handle: int
) -> CaSigner:
    """Find the CA's key at its handle, or make it there.

    Raises:
        HostError: a foreign key at the handle, a wrong authorisation, a TPM that refuses.
    """
    auths = keys.Auths(
        owner=read_secret("tpm.owner_auth_file", settings.owner_auth_file),
        endorsement=read_secret("tpm.endorsement_auth_file", settings.endorsement_auth_file),
    )
    lock = FileLock(state_dir / OPEN_LOCK)
    waits_for = f"another process holds {state_dir / OPEN_LOCK}"
    try:
        with trio.fail_after(OPEN_LIMIT_S):
            while not lock.take():  # noqa: ASYNC110  # another process holds it
                await trio.sleep(LOCK_POLL_S)
            waits_for = "the TPM does not answer, or other programs are using it"
            # Read under the lock: another start may just have made the key.
            store = ca_key_store(state_dir)
            key = await quoter.on_chip(
                lambda chip: ca_key.find_or_make(chip, handle, auths, store.auth_for)
            )
            store.confirm(key.name)
    except trio.TooSlowError as exc:
        raise HostError(
            f"gave up waiting for the vTPM CA's key after {OPEN_LIMIT_S:g} s: {waits_for}"
        ) from exc
    except QuoteError as exc:
        raise HostError(f"the vTPM CA's key: {exc.__cause__ or exc}") from exc
    finally:
        lock.release()
    return CaSigner(quoter, key)
