"""Measures the small commands of a TPM. Reads only: no PCR, no key and no state changes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_PT

from provider_proxy.errors import TpmError
from provider_proxy.host.tpm.chip import tss_errors
from provider_proxy.host.tpm.response_codes import LAYER_SHIFT, SOFTWARE_LAYERS

TIMES = 5  # one chip's times hardly vary (TPMScan: p99/p50 = 1.02)
DATA = bytes(64)  # an extend hashes two digests of 32 bytes


def measure_small_commands(context: ESAPI) -> dict[str, float]:
    """Median milliseconds of "pcr_read" (8 PCRs), "extend" and "other".

    TPM2_Hash is measured instead of an extend, which would change a PCR. A command that the TPM refuses
    is left out.

    Raises:
        TpmError: the TPM does not answer.
    """
    commands: dict[str, Callable[[], object]] = {
        "pcr_read": lambda: context.pcr_read("sha256:0,1,2,3,4,5,6,7"),
        "extend": lambda: context.hash(DATA, TPM2_ALG.SHA256, ESYS_TR.NULL),
        "other": lambda: context.get_capability(TPM2_CAP.TPM_PROPERTIES, TPM2_PT.MANUFACTURER, 1),
    }
    found = {}
    for name, command in commands.items():
        times = []
        try:
            with tss_errors(f"measuring {name}"):
                for _ in range(TIMES):
                    begin = time.monotonic()
                    command()
                    times.append((time.monotonic() - begin) * 1000)
        except TpmError as exc:
            if exc.code >> LAYER_SHIFT in SOFTWARE_LAYERS:
                raise
            continue
        found[name] = statistics.median(times)
    return found
