"""How many commands a quote takes, while PCRs rest and while they move, against the rule that reads
all PCRs before each quote. The TPM is a fake that counts, with real structures and signatures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tpm2_pytss.constants import ESYS_TR
from tpm2_pytss.types import (
    TPM2B_ATTEST,
    TPM2B_DIGEST,
    TPML_DIGEST,
    TPML_PCR_SELECTION,
    TPMT_SIGNATURE,
)

from provider_proxy.errors import TpmError, VerificationError
from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import ALL_PCRS, HashAlg, PcrValues, pcrs_of
from provider_proxy.host.tpm.chip import Chip
from provider_proxy.host.tpm.known_pcrs import STILL_QUOTES, KnownPcrs
from provider_proxy.testing.soft_tpm import SoftTpm

QUALIFYING = b"abcdefghijklmnopqrstuvwxyz234567"
SHA256 = HashAlg.SHA256
EIGHT = 0xFF
IMA = 1 << 10
READ, QUOTE = "TPM2_PCR_Read", "TPM2_Quote"


@dataclass
class CountingTpm:
    """An ESAPI context as far as `Chip` uses one, over a `SoftTpm`.

    Attributes:
        at_once: values that one reading returns at most.
        after: called with each command that was answered.
    """

    at_once: int = 8
    soft: SoftTpm = field(default_factory=SoftTpm)
    seen: list[str] = field(default_factory=list)
    after: Callable[[str], None] = lambda command: None
    counter: int = 0

    def extend(self, pcr: int) -> None:
        self.soft.extend(pcr, b"event")
        self.counter += 1

    def _done(self, command: str) -> None:
        self.seen.append(command)
        self.after(command)

    def pcr_read(self, selection: TPML_PCR_SELECTION) -> Any:
        bank = HashAlg(int(selection[0].hash))
        wanted = int.from_bytes(bytes(selection[0].pcrSelect)[:3], "little")
        pcrs = tuple(pcrs_of(wanted))[: self.at_once]
        values = self.soft.read(bank, sum(1 << pcr for pcr in pcrs))
        got = TPML_PCR_SELECTION.parse(f"{bank.label}:{','.join(map(str, pcrs))}")
        digests = TPML_DIGEST([TPM2B_DIGEST(value) for _, value in values.values])
        answer = (self.counter, got, digests)
        self._done(READ)
        return answer

    def quote(
        self, _ak: object, selection: TPML_PCR_SELECTION, qualifying: bytes, _: object
    ) -> Any:
        bank = HashAlg(int(selection[0].hash))
        mask = int.from_bytes(bytes(selection[0].pcrSelect)[:3], "little")
        made = self.soft.quote(qualifying, bank, mask)
        self._done(QUOTE)
        return TPM2B_ATTEST(made.attest), TPMT_SIGNATURE.unmarshal(made.signature)[0]


def chip_on(tpm: CountingTpm) -> Chip:
    return Chip(tpm, ek=ESYS_TR.NONE, ak=ESYS_TR.NONE)


def commands_of(tpm: CountingTpm, chip: Chip, mask: int, bank: HashAlg = SHA256) -> list[str]:
    """Take a quote whose values are the signed ones; what it took."""
    tpm.seen.clear()
    quote = chip.quote(QUALIFYING, bank, mask, SHA256)
    attest = attestation.parse_attest(quote.attest)
    attestation.check_pcrs(attest, quote.pcrs, SHA256)
    assert attest.mask == mask == quote.pcrs.mask
    return list(tpm.seen)


class ReadsAlways(Chip):
    """The rule that reads all PCRs before each quote: the measure for "never more commands"."""

    def quote(self, qualifying: bytes, bank: HashAlg, mask: int, signature_hash: HashAlg) -> Any:
        self.forget_pcrs()
        return super().quote(qualifying, bank, mask, signature_hash)


@pytest.mark.parametrize("mask", [1, EIGHT, ALL_PCRS])
def test_a_quote_is_one_command_while_the_pcrs_rest(mask: int) -> None:
    tpm = CountingTpm()
    chip = chip_on(tpm)
    readings = -(-mask.bit_count() // 8)
    assert commands_of(tpm, chip, mask) == [READ] * readings + [QUOTE]
    for _ in range(3 * STILL_QUOTES):
        assert commands_of(tpm, chip, mask) == [QUOTE]


def test_only_pcrs_that_are_not_known_are_read() -> None:
    tpm = CountingTpm()
    chip = chip_on(tpm)
    commands_of(tpm, chip, EIGHT)
    assert commands_of(tpm, chip, ALL_PCRS) == [READ, READ, QUOTE]
    assert commands_of(tpm, chip, EIGHT) == [QUOTE]
    assert commands_of(tpm, chip, 1 << 23 | 1) == [QUOTE]


def test_each_bank_is_known_by_itself() -> None:
    tpm = CountingTpm()
    chip = chip_on(tpm)
    commands_of(tpm, chip, EIGHT)
    assert commands_of(tpm, chip, EIGHT, HashAlg.SHA1) == [READ, QUOTE]
    assert commands_of(tpm, chip, EIGHT, HashAlg.SHA1) == [QUOTE]


@pytest.mark.parametrize("mask", [IMA, IMA | EIGHT, ALL_PCRS])
def test_a_pcr_that_moves_before_each_quote_is_read_first(mask: int) -> None:
    """The first move is seen after a quote; from then on there is one reading, and no second quote."""
    tpm = CountingTpm()
    chip = chip_on(tpm)
    commands_of(tpm, chip, mask)
    tpm.extend(10)
    readings = -(-mask.bit_count() // 8)
    assert commands_of(tpm, chip, mask) == [QUOTE] + [READ] * readings
    for _ in range(20):
        tpm.extend(10)
        assert commands_of(tpm, chip, mask) == [READ, QUOTE]


def test_a_pcr_that_moved_is_read_first_for_some_quotes_only() -> None:
    tpm = CountingTpm()
    chip = chip_on(tpm)
    commands_of(tpm, chip, EIGHT)
    tpm.extend(3)
    commands_of(tpm, chip, EIGHT)
    for _ in range(STILL_QUOTES):
        assert commands_of(tpm, chip, EIGHT) == [READ, QUOTE]
    assert commands_of(tpm, chip, EIGHT) == [QUOTE]


@pytest.mark.parametrize("mask", [1, EIGHT, EIGHT | IMA, 0xFFFF, ALL_PCRS])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.7])
def test_never_more_commands_than_with_reading_always(mask: int, share: float) -> None:
    """Whatever moves between two quotes: at most all readings and one quote, each time."""
    dice = random.Random(f"{mask} {share}")
    tpm = CountingTpm()
    chip = chip_on(tpm)
    most = -(-mask.bit_count() // 8) + 1
    total = 0
    for _ in range(300):
        for pcr in pcrs_of(mask):
            if dice.random() < share / mask.bit_count():
                tpm.extend(pcr)
        taken = len(commands_of(tpm, chip, mask))
        assert taken <= most
        total += taken
    assert total < 300 * most


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_pcrs_that_move_at_any_time_cost_no_more_than_with_reading_always(rate: float) -> None:
    """IMA extends while our commands run, too: over many quotes both rules meet the same storm."""
    spent = {}
    for kind in (Chip, ReadsAlways):
        dice = random.Random(rate)
        tpm = CountingTpm()

        def moves(command: str, tpm: CountingTpm = tpm, dice: random.Random = dice) -> None:
            if dice.random() < rate * (10 if command == QUOTE else 1) / 10:
                tpm.extend(10)

        tpm.after = moves
        chip = kind(tpm, ek=ESYS_TR.NONE, ak=ESYS_TR.NONE)
        commands = [one for _ in range(600) for one in commands_of(tpm, chip, IMA | 0x7F)]
        spent[kind] = (commands.count(QUOTE), len(commands))
    assert spent[Chip][0] <= spent[ReadsAlways][0] * 1.02
    assert spent[Chip][1] <= spent[ReadsAlways][1] * 1.02


def test_a_pcr_that_moves_between_reading_and_quote_costs_no_second_quote() -> None:
    tpm = CountingTpm()
    chip = chip_on(tpm)
    moved: list[str] = []

    def once(command: str) -> None:
        if command == READ and not moved:
            moved.append(command)
            tpm.extend(3)

    tpm.after = once
    assert commands_of(tpm, chip, EIGHT) == [READ, QUOTE, READ]


def test_a_pcr_that_moves_on_both_sides_of_a_quote_costs_a_second_one() -> None:
    tpm = CountingTpm()
    chip = chip_on(tpm)
    commands_of(tpm, chip, EIGHT)
    tpm.extend(3)
    moved: list[str] = []

    def once(command: str) -> None:
        if command == QUOTE and not moved:
            moved.append(command)
            tpm.extend(3)

    tpm.after = once
    assert commands_of(tpm, chip, EIGHT) == [QUOTE, READ, QUOTE]


def test_pcrs_that_never_rest_are_an_error() -> None:
    tpm = CountingTpm()
    chip = chip_on(tpm)
    tpm.after = lambda command: tpm.extend(3)
    with pytest.raises(TpmError, match="PCRs changed during"):
        commands_of(tpm, chip, EIGHT)
    assert len(tpm.seen) <= 11


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_a_chip_that_returns_fewer_values_at_once(at_once: int) -> None:
    tpm = CountingTpm(at_once=at_once)
    chip = chip_on(tpm)
    assert commands_of(tpm, chip, EIGHT) == [READ] * -(-8 // at_once) + [QUOTE]
    assert commands_of(tpm, chip, EIGHT) == [QUOTE]


def test_values_that_nobody_signed_are_not_kept() -> None:
    """A reading that does not hash to the digest teaches nothing."""
    tpm = CountingTpm()
    chip = chip_on(tpm)
    tpm.after = lambda command: tpm.extend(3)
    with pytest.raises(TpmError):
        commands_of(tpm, chip, EIGHT)
    tpm.after = lambda command: None
    assert commands_of(tpm, chip, EIGHT) == [READ, QUOTE]


def test_what_was_forgotten_is_read() -> None:
    tpm = CountingTpm()
    chip = chip_on(tpm)
    commands_of(tpm, chip, EIGHT)
    chip.forget_pcrs()
    assert commands_of(tpm, chip, EIGHT) == [READ, QUOTE]


def test_each_command_is_counted() -> None:
    tpm = CountingTpm()
    told: list[str] = []
    chip = Chip(tpm, ek=ESYS_TR.NONE, ak=ESYS_TR.NONE, count=told.append)
    for _ in range(3):
        chip.quote(QUALIFYING, SHA256, ALL_PCRS, SHA256)
        tpm.extend(10)
    assert told == tpm.seen
    assert told.count(READ) == 3 + 3 + 1  # at first, after the first move, before the next quote


def test_a_set_of_old_values_does_not_pass() -> None:
    """The check that decides: values of before a move do not hash to what was signed after it."""
    soft = SoftTpm()
    old = soft.read(SHA256, EIGHT)
    soft.extend(3, b"event")
    quote = soft.quote(QUALIFYING, SHA256, EIGHT)
    with pytest.raises(VerificationError):
        attestation.check_pcrs(attestation.parse_attest(quote.attest), old, SHA256)


def test_the_room_of_a_reading_is_filled_with_what_moved_last() -> None:
    known = KnownPcrs()

    def values(**moved: int) -> PcrValues:
        contents = {f"p{pcr}": 0 for pcr in range(24)} | moved
        return PcrValues(
            bank=SHA256,
            values=tuple((pcr, SHA256.digest(b"%d" % contents[f"p{pcr}"])) for pcr in range(24)),
        )

    known.learn(values())
    known.learn(values(p20=1))
    for _ in range(STILL_QUOTES):
        known.learn(values(p20=1))
    assert known.to_read(SHA256, ALL_PCRS) == 0
    known.learn(values(p20=1, p10=1))
    part = known.to_read(SHA256, ALL_PCRS)
    assert part.bit_count() == 8
    assert part >> 10 & 1
    assert part >> 20 & 1
