"""What to do about each response code of a TPM, and how long to wait before the next try.

    AGAIN   the chip is busy: send the same command again
    CLEAN   our context is broken, or sessions and objects are used up: reopen, then try again
    SLOW    the chip asks for fewer commands: try again much later
    FATAL   a retry cannot help: fail at once, open the circuit, probe until the chip works again

All tries stay within the caller's deadline; nothing here sleeps or uses a chip.
Source: TPM 2.0 Library Part 2, section 6.6, and the classes of fielded chips in tpm-facts.
"""

from __future__ import annotations

import enum

from provider_proxy.common.backoff import backoff_s
from provider_proxy.errors import TpmError


class Step(enum.Enum):
    """What to do after a failed command."""

    AGAIN = "again"
    CLEAN = "clean"
    SLOW = "slow"
    FATAL = "fatal"


RC_NAMES = {
    0x100: "INITIALIZE",
    0x101: "FAILURE",
    0x130: "REBOOT",
    0x901: "CONTEXT_GAP",
    0x902: "OBJECT_MEMORY",
    0x903: "SESSION_MEMORY",
    0x904: "MEMORY",
    0x905: "SESSION_HANDLES",
    0x906: "OBJECT_HANDLES",
    0x908: "YIELDED",
    0x909: "CANCELED",
    0x90A: "TESTING",
    0x920: "NV_RATE",
    0x921: "LOCKOUT",
    0x922: "RETRY",
    0x923: "NV_UNAVAILABLE",
}
_AGAIN = (0x908, 0x909, 0x90A, 0x922)
_CLEAN = (0x901, 0x902, 0x903, 0x904, 0x905, 0x906)
_SLOW = (0x920, 0x923)
_TABLE = {
    **dict.fromkeys(_AGAIN, Step.AGAIN),
    **dict.fromkeys(_CLEAN, Step.CLEAN),
    **dict.fromkeys(_SLOW, Step.SLOW),
}
LAYER_SHIFT = 16
RESMGR_LAYER = 0xB  # the kernel's resource manager answers for the TPM, with the TPM's codes
SOFTWARE_LAYERS = (0x6, 0x7, 0x8, 0x9, 0xA)  # tpm2-tss: FAPI, ESYS, SYS, MU, TCTI

FIRST_WAIT_S = {Step.AGAIN: 0.02, Step.CLEAN: 0.02, Step.SLOW: 0.5}
LONGEST_WAIT_S = {Step.AGAIN: 0.5, Step.CLEAN: 0.5, Step.SLOW: 5.0}


HINTS = {
    0x100: "the TPM was not started: reset the host",
    0x101: "the TPM is in failure mode: power the host off and on; if it stays so, replace the TPM",
    0x12E: "the owner has disabled this command",
    0x143: "the chip does not support this command",
    0x14B: "the TPM's NV memory is full: list it with tpm2_getcap handles-persistent and "
    "tpm2_getcap handles-nv-index, and remove what is no longer needed",
    0x14C: "another program has just put a key or an index there: start again",
    0x902: "the TPM has no room for another object: other programs hold them all",
    0x903: "the TPM has no room for another session: other programs hold them all",
    0x921: "the TPM is in lockout after wrong authorisations: wait, or tpm2_dictionarylockout "
    "--clear-lockout",
    0x923: "the chip cannot write to its NV memory now: try again later",
    0x081: "the chip does not support the algorithm: see provider-proxy tpm doctor, tpm.ak_algorithm",
    0x084: "the chip does not support a requested value: see provider-proxy tpm doctor",
    0x085: "the hierarchy is disabled: enable owner and endorsement hierarchy in the firmware's set-up",
    0x08E: "an authorisation is wrong: check tpm.owner_auth_file and tpm.endorsement_auth_file",
    0x0A2: "an authorisation is wrong: check tpm.owner_auth_file and tpm.endorsement_auth_file",
    0x0A6: "the chip does not support the curve: see provider-proxy tpm doctor, tpm.ak_algorithm",
    0x09D: "the EK's policy is not that of the TCG profile: set tpm.ek_handle to a free handle",
    0x126: "the EK's policy is not that of the TCG profile: set tpm.ek_handle to a free handle",
}
"""What the operator can do about a code: Part 2, section 6.6; without the bits that name a parameter."""


def hint_for(code: int) -> str:
    """What to do about a code, to append to a message; empty for other codes."""
    layer = code >> LAYER_SHIFT
    if layer in SOFTWARE_LAYERS:
        return ""
    hint = HINTS.get(code & 0xFFFF)
    return f"; {hint}" if hint else ""


def step_for(error: TpmError) -> Step:
    """The step for an error. An error without a code means an answer that we could not read."""
    code = error.code
    layer = code >> LAYER_SHIFT
    if not code or layer in SOFTWARE_LAYERS:
        # ETIME, EIO and EBUSY from the driver, a dropped connection, a garbled answer.
        return Step.CLEAN
    if layer == RESMGR_LAYER:
        code &= 0xFFFF
    return _TABLE.get(code, Step.FATAL)


def is_busy(error: TpmError) -> bool:
    """True if the TPM answers that it is busy; False if it cannot be reached."""
    return (
        error.code != 0
        and error.code >> LAYER_SHIFT not in SOFTWARE_LAYERS
        and (step_for(error) is not Step.FATAL)
    )


def name_of(code: int) -> str:
    """A code for people and metrics, from a bounded set of names."""
    layer = code >> LAYER_SHIFT
    if not code:
        return "UNREADABLE"
    if layer in SOFTWARE_LAYERS:
        return "IO"
    return RC_NAMES.get(code & 0xFFFF, "OTHER")


def wait_s(step: Step, tries: int) -> float:
    """How long to wait before another try: doubling, with jitter.

    Args:
        tries: number of failed tries, from 1.
    """
    return backoff_s(tries, first_s=FIRST_WAIT_S[step], longest_s=LONGEST_WAIT_S[step])
