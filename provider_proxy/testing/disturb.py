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

CC_QUOTE = 0x158  # TPM2_Quote; TPM 2.0 Part 2, section 6.5.2
HEADER_BYTES = 10  # tag, size, code
TAG_NO_SESSIONS = 0x8001
TRANSIENT_CODES = (0x922, 0x90A, 0x908, 0x909)  # RETRY, TESTING, YIELDED, CANCELED


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What happens to one command; the parts apply in this order.

    Attributes:
        drop: the connection breaks, now and until it is opened anew.
        hold: the answer comes only after this event (a hang, if nobody sets it).
        delay_s: the answer comes so much later.
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


def refusal(code: int) -> bytes:
    """A TPM response that holds nothing but a code."""
    return struct.pack(">HII", TAG_NO_SESSIONS, HEADER_BYTES, code)


def delay_quotes(seconds: float) -> Plan:
    """A slow chip: every TPM2_Quote takes so much longer."""
    action = Action(delay_s=seconds)
    return lambda command: action if command == CC_QUOTE else None


def together(*plans: Plan) -> Plan:
    """The first plan that has something to say about a command says it."""

    def plan(command: int) -> Action | None:
        return next((a for p in plans if (a := p(command)) is not None), None)

    return plan


def refuse_some(share: float, seed: int, codes: Sequence[int] = TRANSIENT_CODES) -> Plan:
    """A share of all commands is answered by one of the codes, at random by seed."""
    dice = random.Random(seed)  # noqa: S311  # faults are repeatable, not secret
    return lambda command: Action(code=dice.choice(codes)) if dice.random() < share else None
