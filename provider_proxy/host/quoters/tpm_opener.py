"""Opens a TPM with its EK and AK, and proves with a test quote that they work.

Synchronous: runs in the gate's thread, once at the start (when it may make keys, which can take a minute)
and again whenever the connection to the chip has to be reopened (when it makes none).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tpm2_pytss import ESAPI

from provider_proxy.common.files import FileLock, read_secret, read_trusted
from provider_proxy.errors import (
    AkChangedError,
    HostError,
    TpmError,
    UsageError,
    VerificationError,
)
from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import AttestationKey, HashAlg, Quote
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.config.load import EMBEDDED
from provider_proxy.host.quoters.ak_store import AkStore
from provider_proxy.host.tpm import capabilities, chip, keys, progress, renewal
from provider_proxy.host.tpm.ek import OwnFiles, find_or_make_ek
from provider_proxy.host.tpm.embedded import EmbeddedTpm
from provider_proxy.trust.ek_files import read_certificates

log = logging.getLogger(__name__)

OPEN_LOCK = "open.lock"  # below state_dir
LOCK_POLL_S = 0.1
MAX_EK_FILE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HostIdentity:
    """The facts of the host's TPM in `GET /verifier/identity`. Unsigned: a tenant pins them, or asks its
    registrar.

    Attributes:
        ak_public, ek_public: TPM2B_PUBLIC.
        ek_cert: DER; None without a certificate.
        ek_chain: CAs above it, from the chip or the operator; untrusted.
        software: True if the TPM is software.
    """

    ak_public: bytes
    ek_public: bytes
    ek_cert: bytes | None
    host_uuid: uuid.UUID
    software: bool
    ek_chain: tuple[bytes, ...] = ()


def is_software(tcti: str) -> bool:
    """True if a tpm2-tss string leads to a software TPM."""
    return tcti == EMBEDDED or tcti.startswith(("swtpm", "mssim"))


class TpmOpener:
    """Opens the TPM for the first time and again.

    Args:
        open_context: opens a tpm2-tss string; tests and benchmarks pass a disturbed one.
        count: called with each command of a quote.

    Attributes:
        ak: known after `open`.
        identity: likewise.
    """

    ak: AttestationKey
    identity: HostIdentity

    def __init__(
        self,
        settings: Tpm,
        state_dir: Path,
        *,
        host_uuid: uuid.UUID | None,
        open_context: chip.OpenContext,
        count: chip.CountCommand = lambda command: None,
    ) -> None:
        self._settings = settings
        self._count = count
        self._host_uuid = host_uuid
        self._open_context = open_context
        self._state_dir = state_dir
        self._store = AkStore(state_dir)
        self._embedded: EmbeddedTpm | None = None
        self._ak_auth = b""
        self._ek_auth = chip.EkAuth()
        if settings.tcti == EMBEDDED:
            log.warning(
                "the TPM is an embedded swtpm: software, NOT a hardware TPM; use it for trials only"
            )
            self._embedded = EmbeddedTpm(state_dir / "swtpm")

    def connect(self) -> ESAPI:
        """Open a context; starts the embedded TPM if it does not run.

        Raises:
            HostError: there is no TPM.
        """
        tcti = self._settings.tcti
        if self._embedded is not None:
            self._embedded.ensure_running()
            tcti = self._embedded.tcti
        return self._open_context(tcti)

    def stop(self) -> None:
        """Stop the embedded TPM, if there is one."""
        if self._embedded is not None:
            self._embedded.stop()

    def open(self) -> chip.Chip:
        """Open the TPM; find its keys or make them, one process of this state directory at a time.

        Raises:
            HostError: no TPM, no PCR bank, another key at a handle, or a wrong authorisation.
        """
        with progress.announced("opening the TPM"):
            context = self.connect()
        try:
            with chip.tss_errors("reading the PCR banks"):
                active = capabilities.banks(context)
            _check_banks(active, self._settings.banks)
            with self.alone():
                # Another process may just have made the key and stored its authValue.
                self._store = AkStore(self._state_dir)
                return self._open(context)
        except HostError:
            context.close()
            raise

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A lock: only one process of this state directory may find, make or change keys at a time.

        Raises:
            HostError: another process does not release the lock.
        """
        lock = FileLock(self._state_dir / OPEN_LOCK)
        with progress.announced(f"another process holds {self._state_dir / OPEN_LOCK}"):
            while not lock.take():
                time.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            lock.release()

    def _open(self, context: ESAPI) -> chip.Chip:
        settings = self._settings
        auths = keys.Auths(
            owner=read_secret("tpm.owner_auth_file", settings.owner_auth_file),
            endorsement=read_secret("tpm.endorsement_auth_file", settings.endorsement_auth_file),
        )
        files = OwnFiles(
            cert=_read_own("tpm.ek_cert_file", settings.ek_cert_file),
            chain=read_certificates(_read_own("tpm.ek_chain_file", settings.ek_chain_file) or b""),
        )
        ek = find_or_make_ek(context, settings.ek_handle, auths, files)
        ak = keys.find_or_make_ak(
            context, settings.ak_handle, settings.ak_algorithm, ek, auths, self._ak_auth_for
        )
        for what, made, handle in (
            ("EK", ek.made, settings.ek_handle),
            ("AK", ak.made, settings.ak_handle),
        ):
            log.info("%s %s at %#x", what, "made" if made else "found", handle)
        self._ek_auth = ek.auth
        self.ak = ak.key
        self.identity = HostIdentity(
            ak_public=ak.public,
            ek_public=ek.public,
            ek_cert=ek.cert,
            ek_chain=ek.chain,
            host_uuid=self._host_uuid or uuid_of_ek(ek.public),
            software=is_software(settings.tcti),
        )
        opened = chip.Chip(context, ek=ek.handle, ak=ak.handle, ek_auth=ek.auth, count=self._count)
        for bank in settings.banks:
            self._try_quote(opened, bank)
        self._store.confirm(ak.key.name)
        for copy in renewal.copies_of(context, settings.ak_handle, ak.key.name):
            log.error(
                "handle %#x holds a copy of the AK. If others know that copy's authValue, they can "
                "sign for this host: see `provider-proxy tpm ak renew`",
                copy,
            )
        return opened

    def read_ak_public(self) -> bytes | None:
        """TPM2B_PUBLIC at the AK's handle; None if it is empty. Makes nothing.

        Raises:
            HostError: there is no TPM.
        """
        context = self.connect()
        try:
            handle = keys.find(context, self._settings.ak_handle)
            return keys.read_public(context, handle) if handle is not None else None
        finally:
            chip.close_context(context)

    def _ak_auth_for(self, is_new: bool) -> bytes:
        self._ak_auth = self._store.auth_for(is_new)
        return self._ak_auth

    def reopen(self) -> chip.Chip:
        """Open the TPM again and find the same keys.

        Raises:
            AkChangedError: the AK's handle is empty or holds another key: nothing may be served.
            TpmError: the TPM cannot be opened, or refuses.
        """
        context = self.connect()
        try:
            ek = keys.find(context, self._settings.ek_handle)
            ak = keys.find(context, self._settings.ak_handle)
            name = keys.name_of(context, ak) if ak is not None else None
            if ek is None or ak is None or name != self.ak.name:
                raise AkChangedError(
                    f"tpm.ak_handle held the AK {self.ak.name.hex()} and now holds "
                    f"{name.hex() if name else 'none'}: the TPM was cleared or replaced"
                )
            keys.set_auth(context, ak, self._ak_auth)
        except HostError:
            with contextlib.suppress(TpmError):
                chip.close_context(context)
            raise
        return chip.Chip(context, ek=ek, ak=ak, ek_auth=self._ek_auth, count=self._count)

    def quote(self, opened: chip.Chip, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        """Quote, and check that the answer was not damaged on the bus.

        Raises:
            TpmError: the chip failed, or its answer does not verify.
        """
        quote = opened.quote(qualifying, bank, mask, self.ak.signature_hash)
        try:
            attest = attestation.check_quote(quote, self.ak)
        except VerificationError as exc:
            opened.forget_pcrs()  # values without a valid signature are not kept
            raise TpmError(f"TPM2_Quote returned a quote that does not verify: {exc}") from exc
        if attest.extra_data != qualifying:
            raise TpmError("TPM2_Quote returned a quote over other data than requested")
        return quote

    def _try_quote(self, opened: chip.Chip, bank: HashAlg) -> None:
        """Quote PCR 0 before the first request.

        Raises:
            HostError: the quote failed; the message names a wrong authValue.
        """
        try:
            self.quote(opened, secrets.token_hex(16).encode("ascii"), bank, 1)
        except TpmError as exc:
            if keys.is_auth_error(exc):
                raise HostError(
                    "the AK does not accept the authValue in the state directory: another key is at "
                    "tpm.ak_handle"
                ) from exc
            raise


def _read_own(key: str, path: Path | None) -> bytes | None:
    """A file of the operator's with certificates. Raises: HostError."""
    if path is None:
        return None
    try:
        return read_trusted(path, MAX_EK_FILE_BYTES)
    except (HostError, UsageError) as exc:
        raise HostError(f"{key}: {exc}") from exc


def _check_banks(active: Collection[str], wanted: Collection[HashAlg]) -> None:
    """Check, before any key is made, that the PCR banks to offer are active.

    Raises:
        HostError: one is not; the message says what to do.
    """
    missing = [bank.label for bank in wanted if bank.label not in active]
    if not missing:
        return
    usable = [bank.label for bank in HashAlg if bank.label in active]
    text = (
        f"the TPM has no active PCRs in the bank {', '.join(missing)} (tpm.banks); active: "
        f"{', '.join(active) or 'none'}. Activate it: tpm2_pcrallocate {missing[0]}:all, then reboot "
        "(or the PCR banks in the firmware's set-up)"
    )
    good = [label for label in usable if label != "sha1"]
    if good:
        text += f'; or offer an active bank: tpm.banks = ["{good[0]}"]'
    elif "sha1" in usable:
        text += (
            "; SHA-1 alone is too weak to prove a state, and is served only with "
            'tpm.insecure_sha1_bank = true and tpm.banks = ["sha1"]'
        )
    raise HostError(text)


def uuid_of_ek(ek_public: bytes) -> uuid.UUID:
    """A host id derived from the EK alone: the same after a reinstallation."""
    digest = hashlib.sha256(ek_public).hexdigest()
    return uuid.uuid5(uuid.NAMESPACE_OID, "provider-proxy/host/1/" + digest)
