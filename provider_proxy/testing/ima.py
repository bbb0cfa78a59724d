"""The host's IMA as a TPM sees it: another program that extends PCRs. For tests and benchmarks only."""

from __future__ import annotations

import secrets

from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG
from tpm2_pytss.types import TPML_DIGEST_VALUES, TPMT_HA, TPMU_HA

from provider_proxy.host.tpm.chip import tss_errors

IMA_PCR = 10


def extend(context: ESAPI, pcr: int = IMA_PCR) -> None:
    """TPM2_PCR_Extend of the SHA-256 bank with a random digest.

    Raises:
        TpmError: the TPM refuses.
    """
    digest = TPMU_HA(sha256=secrets.token_bytes(32))
    with tss_errors("TPM2_PCR_Extend"):
        context.pcr_extend(
            ESYS_TR(pcr), TPML_DIGEST_VALUES([TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=digest)])
        )
