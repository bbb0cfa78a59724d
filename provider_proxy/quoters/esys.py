"""The host's TPM as a quoter: opens it, finds or makes its keys, quotes through the gate.

Every command runs in the gate's thread. Opening ends with a quote of its own, verified by the
tenants' code: a TPM, an AK or an authValue that does not work is found before the first tenant is.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tpm2_pytss import ESAPI

from provider_proxy import attestation
from provider_proxy.config import EMBEDDED, Tpm, read_secret
from provider_proxy.errors import HostError, TpmError, VerificationError
from provider_proxy.model import AttestationKey, HashAlg, Quote
from provider_proxy.quoters.ak_store import AkStore
from provider_proxy.tpm import chip, keys
from provider_proxy.tpm.embedded import EmbeddedTpm
from provider_proxy.tpm.gate import Gate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostIdentity:
    """What `GET /verifier/identity` tells of the host's TPM. Unsigned: a tenant pins, or asks its
    registrar.

    Attributes:
        ak_public, ek_public: TPM2B_PUBLIC.
        ek_cert: DER; None where the TPM has none.
        software: True where the TPM is a program.
    """

    ak_public: bytes
    ek_public: bytes
    ek_cert: bytes | None
    host_uuid: uuid.UUID
    software: bool


class EsysQuoter:
    """A `batcher.Quoter` over an open TPM. Made by `open_quoter`."""

    def __init__(
        self, open_chip: chip.Chip, gate: Gate, ak: AttestationKey, identity: HostIdentity
    ) -> None:
        self._chip = open_chip
        self._gate = gate
        self.ak = ak
        self.identity = identity
        self.enc_alg = "ecc" if ak.sign_alg == "ecdsa" else "rsa"

    @property
    def expected_s(self) -> float:
        """Learnt time of a quote, in seconds."""
        return self._gate.expected_s

    @property
    def pause_s(self) -> float:
        """Rest after a quote, in seconds."""
        return self._gate.pause_s

    async def ready(self) -> None:
        """Return when the chip is free and rested."""
        await self._gate.ready()

    async def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        """Read and quote the PCRs.

        Raises:
            TpmError: the chip failed.
        """
        hash_alg = self.ak.signature_hash
        return await self._gate.run(
            lambda: self._chip.quote(qualifying, bank, mask, hash_alg), learn=True
        )


@asynccontextmanager
async def open_quoter(
    settings: Tpm,
    state_dir: Path,
    *,
    host_uuid: uuid.UUID | None = None,
    open_context: chip.OpenContext = chip.open_context,
) -> AsyncIterator[EsysQuoter]:
    """Open the TPM, with its EK and AK, for as long as the context lasts.

    Args:
        open_context: opens a tpm2-tss string; tests and benchmarks put a disturbed one there.

    Raises:
        HostError: no TPM, no keys, a wrong authorisation; the message says which.
    """
    embedded: EmbeddedTpm | None = None
    tcti = settings.tcti
    gate = Gate(settings.max_duty)
    if tcti == EMBEDDED:
        log.warning("the TPM is an embedded swtpm: software, NOT a hardware TPM; for trials only")
        embedded = EmbeddedTpm(state_dir / "swtpm")
        embedded.start()
        tcti = embedded.tcti
    try:
        software = embedded is not None or tcti.startswith(("swtpm", "mssim"))
        quoter = await gate.run(
            lambda: _open(settings, open_context(tcti), state_dir, gate, host_uuid, software)
        )
        for bank in settings.banks:
            await _try_quote(quoter, bank)
        AkStore(state_dir).confirm(quoter.ak.name)
        try:
            yield quoter
        finally:
            await gate.close()
            quoter._chip.close()
    finally:
        if embedded is not None:
            embedded.stop()


def _open(
    settings: Tpm,
    context: ESAPI,
    state_dir: Path,
    gate: Gate,
    host_uuid: uuid.UUID | None,
    software: bool,
) -> EsysQuoter:
    """Find or make the keys (in the gate's thread; blocks, a minute where keys are made)."""
    try:
        store = AkStore(state_dir)
        auths = keys.Auths(
            owner=read_secret("tpm.owner_auth_file", settings.owner_auth_file),
            endorsement=read_secret("tpm.endorsement_auth_file", settings.endorsement_auth_file),
        )
        ek = keys.find_or_make_ek(context, settings.ek_handle, auths)
        ak = keys.find_or_make_ak(
            context, settings.ak_handle, settings.ak_algorithm, ek, auths, store.auth_for
        )
    except HostError:
        context.close()
        raise
    for what, made, handle in (
        ("EK", ek.made, settings.ek_handle),
        ("AK", ak.made, settings.ak_handle),
    ):
        log.info("%s %s at %#x", what, "made" if made else "found", handle)
    identity = HostIdentity(
        ak_public=ak.public,
        ek_public=ek.public,
        ek_cert=ek.cert,
        host_uuid=host_uuid or uuid_of_ek(ek.public),
        software=software,
    )
    return EsysQuoter(chip.Chip(context, ak.handle), gate, ak.key, identity)


async def _try_quote(quoter: EsysQuoter, bank: HashAlg) -> None:
    """Quote PCR 0 and verify it as a tenant would."""
    qualifying = secrets.token_hex(16).encode("ascii")
    try:
        quote = await quoter.quote(qualifying, bank, 1)
    except TpmError as exc:
        if keys.check_auth_error(exc):
            raise HostError(
                "the AK does not take the authValue in the state directory: another key is at "
                "tpm.ak_handle"
            ) from exc
        raise
    try:
        attest = attestation.parse_attest(quote.attest)
        signature = attestation.parse_signature(quote.signature)
        attestation.check_signature(quote.attest, signature, quoter.ak)
        attestation.check_pcrs(attest, quote.pcrs, quoter.ak.signature_hash)
    except VerificationError as exc:
        raise HostError(f"the TPM's first quote does not verify: {exc}") from exc
    if attest.extra_data != qualifying:
        raise HostError("the TPM's first quote is over other data than it was given")


def uuid_of_ek(ek_public: bytes) -> uuid.UUID:
    """A host id that follows from the EK alone: the same after a reinstallation."""
    digest = hashlib.sha256(ek_public).hexdigest()
    return uuid.uuid5(uuid.NAMESPACE_OID, "provider-proxy/host/1/" + digest)
