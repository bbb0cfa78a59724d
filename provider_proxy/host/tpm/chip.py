"""One open TPM: reads PCRs and quotes. Synchronous; only the gate's thread may call it.

Never creates a key (`keys` does, before serving starts) and leaves no transient object. A quote needs no
session, only the persistent AK and a plain password (TPM 2.0 Part 3, 18.4), so that programs that hold
all sessions of the chip cannot stop it. While the PCRs do not change it takes one command.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_CC,
    TPM2_PT,
    TPM2_RH,
    TPM2_SE,
)
from tpm2_pytss.types import (
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPML_PCR_SELECTION,
    TPMS_PCR_SELECTION,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
)

from provider_proxy.errors import EvidenceFormatError, HostError, TpmError, VerificationError
from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import HashAlg, PcrValues, Quote, pcrs_of
from provider_proxy.evidence.tpm_keys import USER_WITH_AUTH, TpmPublic
from provider_proxy.host.tpm import device, progress
from provider_proxy.host.tpm.known_pcrs import KnownPcrs
from provider_proxy.host.tpm.response_codes import Step, hint_for, step_for, wait_s

RC_VALUE = 0x84  # TPM_RC_VALUE: a parameter is out of range
PCR_READS = 8  # calls after which a selection must be covered: 24 PCRs at 8 a call need 3
FLUSH_TRIES = 8  # about two seconds
QUOTE_TRIES = 5  # IMA extends PCR 10 between read and quote; Keylime's agent tries 5 times too


@contextlib.contextmanager
def tss_errors(doing: str) -> Iterator[None]:
    """The boundary to tpm2_pytss: its errors become `TpmError`.

    Raises:
        TpmError: with the response code and the step that failed.
    """
    with progress.announced(doing):
        try:
            yield
        except TSS2_Exception as exc:
            code = int(exc.error)
            hint = hint_for(code)
            raise TpmError(f"{doing}: {exc} ({code:#06x}){hint}", code=code) from exc


def flush(context: ESAPI, handle: ESYS_TR) -> None:
    """Flush a session or a transient object; tries again while the chip is busy.

    Never raises: if the chip does not know the handle, nothing is left to flush.
    """
    for tries in range(1, FLUSH_TRIES + 1):
        try:
            context.flush_context(handle)
        except TSS2_Exception as exc:
            step = step_for(TpmError("TPM2_FlushContext", code=int(exc.error)))
            if step is not Step.AGAIN:
                return
            time.sleep(wait_s(step, tries))
        else:
            return


@dataclass(frozen=True, slots=True)
class EkAuth:
    """How an EK is authorised.

    Attributes:
        by_policy: True for PolicySecret(endorsement), as in templates of the low range; False for the
            EK's empty authValue, as in those of the high range.
        name_alg: the hash of its policy.
        endorsement: the authValue of the endorsement hierarchy, which its policy needs.
    """

    by_policy: bool = True
    name_alg: HashAlg = HashAlg.SHA256
    endorsement: bytes = field(default=b"", repr=False)


def ek_auth_of(key: TpmPublic, what: str, endorsement: bytes = b"") -> EkAuth:
    """How to use this EK.

    Args:
        endorsement: the authValue of the endorsement hierarchy.

    Raises:
        HostError: its policy is not supported.
    """
    name_alg = HashAlg(int.from_bytes(key.name[:2], "big"))
    if key.attributes & USER_WITH_AUTH:
        return EkAuth(False, name_alg)
    if key.auth_policy != endorsement_policy(name_alg):
        raise HostError(
            f"{what} has a policy ({key.auth_policy.hex()[:16]}…) that this program does not "
            "support; set tpm.ek_handle to a free handle, where an EK of the TCG profile is made"
        )
    return EkAuth(True, name_alg, endorsement)


def endorsement_policy(name_alg: HashAlg) -> bytes:
    """The digest of PolicySecret(endorsement) with an empty policyRef: policy A of the profile."""
    command, endorsement = TPM2_CC.PolicySecret, TPM2_RH.ENDORSEMENT
    start = bytes(name_alg.digest_bytes)
    named = int(command).to_bytes(4, "big") + int(endorsement).to_bytes(4, "big")
    return name_alg.digest(name_alg.digest(start + named))


@contextlib.contextmanager
def ek_session(context: ESAPI, auth: EkAuth) -> Iterator[ESYS_TR]:
    """A session that is allowed to use the EK.

    The TPM ends a policy session at its first use; an unused session is flushed.
    """
    if not auth.by_policy:
        yield ESYS_TR.PASSWORD
        return
    session = context.start_auth_session(
        ESYS_TR.NONE,
        ESYS_TR.NONE,
        TPM2_SE.POLICY,
        TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL),
        TPM2_ALG(auth.name_alg),
    )
    try:
        # Each time, because a reopened context does not have it.
        context.tr_set_auth(ESYS_TR.ENDORSEMENT, auth.endorsement)
        context.policy_secret(ESYS_TR.ENDORSEMENT, session, b"", b"", b"", 0)
        yield session
    finally:
        flush(context, session)  # does nothing if the session was used


def close_context(context: ESAPI) -> None:
    """Close a context. Raises: TpmError."""
    with tss_errors("close"):
        context.close()


OpenContext = Callable[[str], ESAPI]
"""Opens a tpm2-tss string."""


def open_context(tcti: str) -> ESAPI:
    """Open a tpm2-tss connection ("device:/dev/tpmrm0", "swtpm:path=…").

    Raises:
        TpmError: the TCTI is unknown, or no TPM answers.
    """
    problem = device.problem(tcti)
    if problem is not None:
        raise TpmError(f"cannot open the TPM at {tcti!r}: {problem}")
    with tss_errors(f"cannot open the TPM at {tcti!r}"):
        try:
            return ESAPI(tcti)
        except (ValueError, RuntimeError, OSError) as exc:
            if isinstance(exc, TSS2_Exception):
                raise
            raise TpmError(f"cannot open the TPM at {tcti!r}: {exc}") from exc


CountCommand = Callable[[str], None]
"""Called with each command of a quote, "TPM2_Quote" or "TPM2_PCR_Read", in the gate's thread."""


class Chip:
    """An open TPM with its EK and AK.

    Args:
        context: an open ESAPI context; the chip closes it.
        ek: ESYS_TR of the persistent EK.
        ak: ESYS_TR of the persistent AK, its authValue set.
        ek_auth: how the EK is used.
        count: called with each command of a quote.
    """

    def __init__(
        self,
        context: ESAPI,
        *,
        ek: ESYS_TR,
        ak: ESYS_TR,
        ek_auth: EkAuth = EkAuth(),  # frozen
        count: CountCommand = lambda command: None,
    ) -> None:
        self._context = context
        self._ek = ek
        self._ak = ak
        self.ek_auth = ek_auth
        self._count = count
        self._known = KnownPcrs()

    @property
    def context(self) -> ESAPI:
        """The open context, for `ca_key`, in the gate's thread only."""
        return self._context

    @property
    def ek(self) -> ESYS_TR:
        """The persistent EK."""
        return self._ek

    @property
    def ak(self) -> ESYS_TR:
        """The persistent AK, its authValue set."""
        return self._ak

    def close(self) -> None:
        """Close the context; the persistent keys stay. Raises: TpmError."""
        close_context(self._context)

    def activate_credential(self, credential: bytes, secret: bytes) -> bytes:
        """TPM2_ActivateCredential. The session that it needs is flushed, whatever happens.

        Raises:
            TpmError: the credential is not for these keys, no session is free, or the chip failed.
        """
        with tss_errors("TPM2_ActivateCredential"):
            try:
                blob, _ = TPM2B_ID_OBJECT.unmarshal(credential)
                wrapped, _ = TPM2B_ENCRYPTED_SECRET.unmarshal(secret)
            except (ValueError, RuntimeError) as exc:
                raise TpmError(f"not a valid credential: {exc}", code=RC_VALUE) from exc
            with ek_session(self._context, self.ek_auth) as session:
                return bytes(
                    self._context.activate_credential(
                        self._ak,
                        self._ek,
                        blob,
                        wrapped,
                        session1=ESYS_TR.PASSWORD,
                        session2=session,
                    )
                )

    def read_pcrs(self, bank: HashAlg, mask: int) -> tuple[PcrValues, int]:
        """TPM2_PCR_Read, repeated until the mask is covered: a call returns at most 8 PCRs.

        Returns:
            The values, and the pcrUpdateCounter of the last call.

        Raises:
            TpmError: the chip failed, does not have the bank, or its PCRs change all the time.
        """
        counter = -1
        values: dict[int, bytes] = {}
        for _ in range(PCR_READS):
            left = mask & ~sum(1 << pcr for pcr in values)
            self._count("TPM2_PCR_Read")
            with tss_errors("TPM2_PCR_Read"):
                seen, selection, digests = self._context.pcr_read(_selection(bank, left))
            if seen != counter and values:
                values = {}  # PCRs changed between two calls: the parts belong to different states
            elif len(selection) == 1 and int(selection[0].hash) == bank:
                got = pcrs_of(int.from_bytes(bytes(selection[0].pcrSelect)[:3], "little"))
                if len(got) != len(digests):
                    raise TpmError("TPM2_PCR_Read returned a wrong number of values")
                values.update(zip(got, (bytes(digest) for digest in digests), strict=True))
            counter = seen
            if all(pcr in values for pcr in pcrs_of(mask)):
                try:
                    return PcrValues(bank=bank, values=tuple(sorted(values.items()))), counter
                except EvidenceFormatError as exc:
                    raise TpmError(f"TPM2_PCR_Read returned invalid values: {exc}") from exc
            if not values and seen == counter and not len(digests):
                raise TpmError(f"the TPM has no active PCRs in the {bank.label} bank")
        raise TpmError("the PCRs changed during every attempt to read them")

    def quote(self, qualifying: bytes, bank: HashAlg, mask: int, signature_hash: HashAlg) -> Quote:
        """Quote some PCRs, with the values that were quoted.

        Values that earlier quotes confirmed are used again if they hash to the digest that this
        quote signs. PCRs that are unknown or changed lately are read before the quote. If the digest
        differs, the PCRs that were not read before the quote are read, then the others again; then
        the quote is repeated.

        Does not check: the signature; call `forget_pcrs` if it is not valid.

        Raises:
            TpmError: the chip failed, or the PCRs changed during every attempt.
        """
        fresh = self._known.to_read(bank, mask)  # read since the last quote
        values = self._known.values(bank, mask) | self._read(bank, fresh)
        for _ in range(QUOTE_TRIES):
            quoted, signature, digest = self._take_quote(qualifying, bank, mask)
            for part in (0, mask & ~fresh, fresh):  # until the digest matches
                values |= self._read(bank, part)
                pcrs = PcrValues(bank=bank, values=tuple(sorted(values.items())))
                if signature_hash.digest(pcrs.concatenated()) == digest:
                    self._known.learn(pcrs)
                    return Quote(attest=quoted, signature=signature, pcrs=pcrs)
            fresh = mask
        raise TpmError("the PCRs changed during every quote")

    def forget_pcrs(self) -> None:
        """Read all PCRs again before the next quote."""
        self._known.forget()

    def _read(self, bank: HashAlg, mask: int) -> dict[int, bytes]:
        """The values of a mask, which may be empty, and of no other PCRs. Raises: TpmError."""
        read = self.read_pcrs(bank, mask)[0].values if mask else ()
        return {pcr: value for pcr, value in read if mask >> pcr & 1}

    def _take_quote(
        self, qualifying: bytes, bank: HashAlg, mask: int
    ) -> tuple[bytes, bytes, bytes]:
        """TPM2_Quote.

        Returns:
            TPMS_ATTEST, TPMT_SIGNATURE, and the pcrDigest.

        Raises:
            TpmError: the chip failed, or its answer is not a quote.
        """
        self._count("TPM2_Quote")
        with tss_errors("TPM2_Quote"):
            attest, signature = self._context.quote(
                self._ak, _selection(bank, mask), qualifying, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
            )
        quoted = bytes(attest)
        try:
            digest = attestation.parse_attest(quoted).pcr_digest
        except VerificationError as exc:
            raise TpmError(f"TPM2_Quote did not return a valid quote: {exc}") from exc
        return quoted, signature.marshal(), digest

    def manufacturer(self) -> str:
        """The chip's vendor code, "IBM" for swtpm."""
        with tss_errors("TPM2_GetCapability"):
            _, data = self._context.get_capability(TPM2_CAP.TPM_PROPERTIES, TPM2_PT.MANUFACTURER, 1)
        value: int = data.data.tpmProperties[0].value
        return value.to_bytes(4, "big").decode("ascii", "replace").rstrip("\0 ")


def _selection(bank: HashAlg, mask: int) -> TPML_PCR_SELECTION:
    pcrs = TPMS_PCR_SELECTION(
        hash=TPM2_ALG(bank), sizeofSelect=3, pcrSelect=mask.to_bytes(3, "little")
    )
    return TPML_PCR_SELECTION([pcrs])
