"""Every error that this package raises, split by who is at fault.

    ProviderProxyError
    ├── UsageError                 the caller: wrong arguments, a policy outside the mask   (exit 2)
    │   └── ConfigError            the configuration file says something impossible
    ├── HostError                  the host: no TPM, no AK, a port taken, a file missing    (exit 3)
    │   ├── TpmError               a TPM command failed; `code` is its response code
    │   ├── VtpmError              a VM's vTPM cannot be registered, or a hook's message is wrong
    │   └── AkChangedError         the TPM no longer holds the AK that it held
    ├── RequestError               the tenant's request                                     (HTTP 4xx)
    │   ├── ParameterError         400, names the parameter
    │   ├── UnknownTenantError     403, the connection closes
    │   ├── NotFoundError          404
    │   ├── MethodError            405
    │   ├── WrongHostError         421, the request names another host than the admin server
    │   └── TenantLimitError       429, the tenant's own limit, with Retry-After
    ├── ServiceError               the provider cannot answer now                           (HTTP 5xx)
    │   ├── OverloadedError        503, with Retry-After
    │   ├── DrainingError          503, the connection closes
    │   ├── ClientGoneError        the client closed its connection
    │   ├── QuoteError             503, the TPM did not give a quote
    │   ├── SelfCheckError         502, the quote failed our own verification
    │   └── DeadlineError          504
    ├── ReplyError                 the tenant's side got no answer: network, HTTP status    (exit 3)
    │   └── NotSupportedError      the other side's release does not support the request
    ├── RegistrarError             a registrar gave no usable answer                        (exit 3)
    └── VerificationError          evidence refused; a class for each numbered check        (exit 1)
        └── PolicyError            check 7: the state is proven, and the policy does not allow it
            ├── KeylimeRefusedError  check 7: the tenant's Keylime verifier refused the quote
            └── LinkError          check 7: the link of a VM's vTPM to the host; a class a cause

`str(error)` is the public message: it may be shown to the other side. Details that must stay private
are in its `__cause__`. Errors of other libraries are translated where they are called, `from exc`.
"""

from __future__ import annotations

from typing import Self


class ProviderProxyError(Exception):
    """Root of all errors of this package."""

    def copy(self) -> Self:
        """The same error as another object: tasks that share one would share its traceback.

        Its constructor is not called again, and its cause is not copied: raise it `from` that.
        """
        copied = self.__class__.__new__(self.__class__, *self.args)
        copied.__dict__.update(self.__dict__)
        return copied


def first_of(group: BaseExceptionGroup[ProviderProxyError]) -> ProviderProxyError:
    """One error of a group: the one that a command ends with."""
    inner = group.exceptions[0]
    return first_of(inner) if isinstance(inner, BaseExceptionGroup) else inner


class UsageError(ProviderProxyError):
    """The caller asked for something that can never work."""


class ConfigError(UsageError):
    """A configuration value is wrong; the message names its key.

    Attributes:
        key: the key, "batch.window_ms"; by default the message's first word.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = message.partition(" ")[0].rstrip(":") if key is None else key


class HostError(ProviderProxyError):
    """Something that the program needs on its host is missing."""


class TpmError(HostError):
    """A TPM command failed.

    Attributes:
        code: TPM or TSS response code without handle, parameter or session number; 0 if none came.
    """

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class VtpmError(HostError):
    """A hook's message is malformed, or the registry of vTPMs does not accept it."""


class AkChangedError(HostError):
    """The TPM holds another AK than before, or no AK: nothing may be served under the old name."""


class ReplyError(ProviderProxyError):
    """A proxy or a registrar gave no answer: unreachable, an HTTP error, or too large a reply.

    Attributes:
        status: the HTTP status, where there was one.
        retry_after_s: what the other side asked us to wait, in seconds.
    """

    def __init__(
        self, message: str, *, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class NotSupportedError(ReplyError):
    """The other side's release does not support the request; asking again does not help."""


class RegistrarError(ProviderProxyError):
    """A registrar gave no usable answer: unreachable, an HTTP error, or a malformed reply.

    Attributes:
        status: the HTTP status, where there was one.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RequestError(ProviderProxyError):
    """The request cannot be answered as it stands; `status` is the HTTP status."""

    status = 400
    parameter: str | None = None
    closes = False


class ParameterError(RequestError):
    """A parameter is wrong, missing, repeated or unknown."""

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter


class UnknownTenantError(RequestError):
    """The client is not a tenant, or its certificate is not valid any more."""

    status = 403
    closes = True


class ClientCertError(RequestError):
    """A front did not pass on exactly one certificate of its client."""

    closes = True


class NotFoundError(RequestError):
    """No such path, or no such VM for this tenant."""

    status = 404


class MethodError(RequestError):
    """The path exists, but not with this method."""

    status = 405


class WrongHostError(RequestError):
    """The request names another host than this listener: a web page that rebinds DNS does so."""

    status = 421
    closes = True


class TenantLimitError(RequestError):
    """The tenant is over a limit of its own; asking again makes sense after `retry_after_s`."""

    status = 429

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServiceError(ProviderProxyError):
    """The provider's side cannot answer; `status` is the HTTP status.

    Attributes:
        retry_after_s: when asking again makes sense, in seconds; None where nothing is known.
        closes: True where the connection must not be used again.
    """

    status = 503
    closes = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(ServiceError):
    """The queue is full, or the wait would be longer than the request's deadline."""


class DrainingError(ServiceError):
    """The daemon is stopping and accepts no new requests."""

    closes = True


class ClientGoneError(ServiceError):
    """The client closed its connection before its batch was sealed."""

    closes = True


class QuoteError(ServiceError):
    """The TPM, or the program that quotes in its place, gave no usable quote."""


class SelfCheckError(ServiceError):
    """The proxy's own quote or proof failed the tenants' checks: it is not sent."""

    status = 502


class DeadlineError(ServiceError):
    """The request's own deadline passed before its quote came."""

    status = 504


class VerificationError(ProviderProxyError):
    """Evidence was refused. `check` is the number of the check in docs/evidence-format.md."""

    check = 0


class EvidenceFormatError(VerificationError):
    """Check 0: not evidence of a known format, or over a size limit."""


class StaleEvidenceError(VerificationError):
    """Check 0: the answer came later than `max_age_s` after the nonce was made."""


class NonceSpentError(VerificationError):
    """Check 0: this nonce is not open: it has verified before, or was never sent."""


class UntrustedAkError(VerificationError):
    """The key offered as AK is not one that a TPM restricts to its own quotes."""


class NotRegisteredError(VerificationError):
    """The registrar has no record of this agent that went through credential activation."""


class BindingError(VerificationError):
    """The registrar's record does not match what the host shows, or cannot be read."""


class UntrustedEkError(VerificationError):
    """Nothing that the tenant trusts vouches for the EK."""


class PinChangedError(VerificationError):
    """A host's key is not the pinned one; a person must decide whether the change is right."""


class NotAQuoteError(VerificationError):
    """Check 1: the signed structure is not a TPM quote (magic or type)."""

    check = 1


class SignatureError(VerificationError):
    """Check 2: the trusted AK did not make this signature."""

    check = 2


class ClaimsError(VerificationError):
    """Check 3: claims that were not asked for, are missing or malformed, or are about another VM."""

    check = 3


class InclusionError(VerificationError):
    """Check 3: index, size and path do not lead to any root."""

    check = 3


class QualifyingDataError(VerificationError):
    """Check 4: the quote was not taken over the root that the proof leads to."""

    check = 4


class PcrDigestError(VerificationError):
    """Check 5: the PCR values are not the ones that the TPM signed."""

    check = 5


class PcrSelectionError(VerificationError):
    """Check 5: the PCR values claim another selection than the signed one."""

    check = 5


class MaskNotCoveredError(VerificationError):
    """Check 5: a requested PCR, or the requested bank, is not in the signed selection."""

    check = 5


class ClockError(VerificationError):
    """Check 6: the TPM's clock or counters went back."""

    check = 6


class PolicyError(VerificationError):
    """Check 7: the host's state is proven, and the policy does not allow it."""

    check = 7


class LinkError(PolicyError):
    """Check 7: the link between a VM's vTPM and the host is not what the tenant demands."""


class LinkClaimsError(LinkError):
    """Check 7: there are no claims, or they are not a link's."""


class WrongVmError(LinkError):
    """Check 7: the claims are about another VM than the one that was ordered."""


class EkNotLinkedError(LinkError):
    """Check 7: the host does not claim the EK that the tenant's registrar activated for this VM."""


class VmNotRunningError(LinkError):
    """Check 7: the host knows the VM, and it does not run there now."""


class NotConfirmedError(LinkError):
    """Check 7: the EK was not read back from the VM's own vTPM."""


class LinkIssuerError(LinkError):
    """Check 7: the EK's certificate is not from the issuer that the tenant demands."""


class VtpmQuoteError(LinkError):
    """Check 7: the vTPM's own quote was refused; the cause says by which check."""


class DeepNonceError(LinkError):
    """Check 7: the host's quote was not asked for with the vTPM's quote in its nonce."""


class UntrustedCaError(LinkError):
    """Check 7: the host's CA key is not one that its TPM holds and its AK has certified."""


class EkCertificateError(LinkError):
    """Check 7: the host's CA did not issue a vTPM's certificate, or it does not follow the profile."""


class LogError(PolicyError):
    """Check 7: a log does not replay to the signed PCRs, or holds what the policy does not allow."""


class KeylimeRefusedError(PolicyError):
    """Check 7: the tenant's own Keylime verifier does not accept the quote.

    Attributes:
        reasons: Keylime's own, "pcr_validation.invalid_pcr_0: …" each.
    """

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("Keylime's verifier refuses: " + "; ".join(reasons))
        self.reasons = reasons
