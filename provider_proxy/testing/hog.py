"""A client that takes every session of a TPM, as a busy host's other programs can: for tests and
benchmarks only."""

from __future__ import annotations

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE
from tpm2_pytss.types import TPMT_SYM_DEF

MAX_SESSIONS = 256  # more than any TPM has


def take_all_sessions(context: ESAPI) -> int:
    """Start sessions until the TPM has none left; how many there were."""
    for count in range(MAX_SESSIONS):
        try:
            context.start_auth_session(
                ESYS_TR.NONE,
                ESYS_TR.NONE,
                TPM2_SE.POLICY,
                TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL),
                TPM2_ALG.SHA256,
            )
        except TSS2_Exception:
            return count
    return MAX_SESSIONS
