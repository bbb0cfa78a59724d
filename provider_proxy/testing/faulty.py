"""A TCTI that wraps a real one and disturbs it by plan, and a client that takes a TPM's
sessions as other programs of a busy host do: for tests, the demo and benchmarks only.

The TCTI sits where tpm2-tss talks to the chip, so that everything above it, ESYS included, is real.
"""

from __future__ import annotations

import time

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TSS2_RC
from tpm2_pytss.TCTI import PyTCTI
from tpm2_pytss.TCTILdr import TCTILdr
from tpm2_pytss.types import TPMT_SYM_DEF

from provider_proxy.host.tpm.chip import tss_errors
from provider_proxy.testing.disturb import Action, Plan, refusal

MAX_SESSIONS = 256  # more than any TPM has


class FaultyTcti(PyTCTI):  # type: ignore[misc]  # tpm2_pytss has no types
    """Passes commands on to `inner`, disturbed by `plan`."""

    def __init__(self, inner: TCTILdr, plan: Plan) -> None:
        super().__init__()
        self._inner = inner
        self._plan = plan
        self._action = Action()
        self._broken = False

    def do_transmit(self, command: bytes) -> None:
        """Send a command, unless the plan keeps it from the chip."""
        if self._broken:
            raise TSS2_Exception(TSS2_RC.TCTI_RC_IO_ERROR)
        self._action = self._plan(int.from_bytes(command[6:10], "big")) or Action()
        if self._action.drop:
            self._broken = True
            raise TSS2_Exception(TSS2_RC.TCTI_RC_IO_ERROR)
        if not self._action.code:
            self._inner.transmit(command)

    def do_receive(self, timeout: int) -> bytes:
        """Receive the answer, or what the plan makes of it."""
        action = self._action
        if action.hold is not None:
            action.hold.wait()
        if action.delay_s:
            time.sleep(action.delay_s)
        if action.code:
            return refusal(action.code)
        answer: bytes = self._inner.receive(timeout=timeout)
        return action.garble(answer) if action.garble is not None else answer


class FaultyContext(ESAPI):  # type: ignore[misc]
    """An ESAPI context over a `FaultyTcti`, which closes the real TCTI too."""

    def __init__(self, tcti: str, plan: Plan) -> None:
        with tss_errors(f"cannot open the TPM at {tcti!r}"):
            self._real = TCTILdr.parse(tcti)
            super().__init__(FaultyTcti(self._real, plan))

    def close(self) -> None:
        """Close both."""
        super().close()
        self._real.close()


def exhaust_sessions(context: ESAPI) -> int:
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
