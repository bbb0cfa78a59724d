"""Plans that disturb a TPM, and chips' profiles: for tests, the demo and benchmarks only.

A plan looks at each command and says what happens to it; `faulty` (inside a process) and `broker`
(for several processes) carry it out in front of a real TPM.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from provider_proxy.host.tpm.times import ChipTimes

# TPM_CC: TPM 2.0 Part 2, section 6.5.2
CC_PCR_EVENT = 0x13C
CC_QUOTE = 0x158
CC_PCR_READ = 0x17E
CC_PCR_EXTEND = 0x182
HEADER_BYTES = 10  # tag, size, code
TAG_NO_SESSIONS = 0x8001
TRANSIENT_CODES = (0x922, 0x90A, 0x908, 0x909)  # RETRY, TESTING, YIELDED, CANCELED


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What happens to one command; the parts apply in this order.

    Attributes:
        drop: the connection breaks, now and until it is opened again.
        hold: the answer comes only after this event (a hang, if nobody sets it).
        delay_s: the answer comes so late, at the soonest.
        code: the chip answers this response code and does nothing.
        garble: changes the chip's answer.
    """

    drop: bool = False
    hold: threading.Event | None = None
    delay_s: float = 0.0
    code: int = 0
    garble: Callable[[bytes], bytes] | None = None


Plan = Callable[[int], Action | None]
"""Called with the TPM_CC of each command; None lets it through."""

CHIP_QUOTE_MS = {
    "amd-rsa": 11,
    "amd-p256": 6,
    "infineon-rsa": 188,
    "infineon-p256": 71,
    "intel-rsa": 229,
    "intel-p256": 105,
    "nuvoton-rsa": 552,
    "nuvoton-p256": 194,
    "stm-rsa": 250,
    "stm-p256": 49,
    "worst-rsa": 1236,
    "worst-p256": 442,
}
"""Median milliseconds of a signature, RSA-2048 or P-256, by vendor: TPMScan data set, CHES 2024."""

SMALL_COMMAND_MS = {
    "amd": 3.0,
    "infineon": 5.8,
    "intel": 2.7,
    "nuvoton": 4.0,
    "stm": 6.0,
    "worst": 8.0,
}
"""Median milliseconds of a small command, TPM2_Hash, by vendor; TPMScan has neither TPM2_PCR_Read nor
TPM2_PCR_Extend. "worst" is what 9 of 10 chips keep: the slowest of all, 206 ms, is another chip than
the one with the slowest signature."""

CHIPS = {
    name: ChipTimes(quote_s=quote_ms / 1000, read_s=small_s, extend_s=small_s, other_s=small_s)
    for name, quote_ms in CHIP_QUOTE_MS.items()
    for small_s in (SMALL_COMMAND_MS[name.partition("-")[0]] / 1000,)
}
"""A vendor's median chip, all commands."""


def refusal(code: int) -> bytes:
    """A TPM response that holds nothing but a code."""
    return struct.pack(">HII", TAG_NO_SESSIONS, HEADER_BYTES, code)


def delay_quotes(seconds: float) -> Plan:
    """A slow chip: every TPM2_Quote takes so much longer."""
    action = Action(delay_s=seconds)
    return lambda command: action if command == CC_QUOTE else None


def slow_down(times: ChipTimes) -> Plan:
    """A chip of these times: each command takes as long as there."""
    actions = {
        CC_QUOTE: Action(delay_s=times.quote_s),
        CC_PCR_READ: Action(delay_s=times.read_s),
        CC_PCR_EXTEND: Action(delay_s=times.extend_s),
        CC_PCR_EVENT: Action(delay_s=times.extend_s),
    }
    other = Action(delay_s=times.other_s)
    return lambda command: actions.get(command, other)


def together(*plans: Plan) -> Plan:
    """The first plan that has something to say about a command says it."""

    def plan(command: int) -> Action | None:
        return next((a for p in plans if (a := p(command)) is not None), None)

    return plan


def refuse_some(share: float, seed: int, codes: Sequence[int] = TRANSIENT_CODES) -> Plan:
    """A share of all commands is answered by one of the codes, at random by seed."""
    dice = random.Random(seed)  # noqa: S311  # faults are repeatable, not secret
    return lambda command: Action(code=dice.choice(codes)) if dice.random() < share else None
