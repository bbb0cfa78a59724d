"""A TCTI that wraps a real one and disturbs it by plan: for tests, the demo and benchmarks only.

Sits where tpm2-tss talks to the chip, so that everything above it, ESYS included, is the real thing.
A plan looks at each command and says what happens to it; without one the command goes through.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import TSS2_RC
from tpm2_pytss.TCTI import PyTCTI
from tpm2_pytss.TCTILdr import TCTILdr

from provider_proxy.tpm.chip import tss_errors

CC_QUOTE = 0x158  # TPM2_Quote; TPM 2.0 Part 2, section 6.5.2
HEADER_BYTES = 10  # tag, size, code
TAG_NO_SESSIONS = 0x8001


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What happens to one command; the parts apply in this order.

    Attributes:
        hold: the answer comes only after this event (a hang, if nobody sets it).
        delay_s: the answer comes so much later.
        drop: the connection breaks, now and until it is opened anew.
        code: the chip answers this response code and does nothing.
        garble: changes the chip's answer.
    """

    hold: threading.Event | None = None
    delay_s: float = 0.0
    drop: bool = False
    code: int = 0
    garble: Callable[[bytes], bytes] | None = None


Plan = Callable[[int], Action | None]
"""Called with the TPM_CC of each command."""


def delay_quotes(seconds: float) -> Plan:
    """The plan of a slow chip: every TPM2_Quote takes so much longer."""
    action = Action(delay_s=seconds)
    return lambda command: action if command == CC_QUOTE else None


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
            return b"".join(
                part.to_bytes(size, "big")
                for part, size in ((TAG_NO_SESSIONS, 2), (HEADER_BYTES, 4), (action.code, 4))
            )
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
