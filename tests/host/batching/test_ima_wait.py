"""What IMA waits for the chip: the simulation against the formulas, and its ends."""

from __future__ import annotations

import math
import random
import re

import pytest
from places import DOCS

from provider_proxy.host.batching.ima_wait import EXEC_S, NO_IMA, ImaWait, predict_ima
from provider_proxy.host.batching.simulation import DUTY_SPAN_S, Scenario, predict
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.tpm.pace import capped_duty
from provider_proxy.testing.disturb import CHIPS

EXTEND_S = 0.005


def every(turn_s: float, quote_s: float, per_s: float, *, rest_s: float = 0.0) -> ImaWait:
    """A quote each turn."""
    begins = [turn_s * number for number in range(400)]
    dice = random.Random(3)
    return predict_ima(begins, quote_s, rest_s, extend_s=EXTEND_S, extends_per_s=per_s, dice=dice)


@pytest.mark.parametrize("quote_s", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("duty", [0.1, 0.25, 0.5])
def test_the_mean_is_an_extend_and_duty_times_half_a_quote(quote_s: float, duty: float) -> None:
    wait = every(quote_s / duty, quote_s, per_s=0.5)
    assert wait.mean_ms == pytest.approx((EXTEND_S + duty * quote_s / 2) * 1000, rel=0.06)


@pytest.mark.parametrize("duty", [0.1, 0.5])
def test_the_worst_is_one_quote_whatever_the_duty(duty: float) -> None:
    wait = every(0.2 / duty, 0.2, per_s=0.5)
    assert 170 < wait.p99_ms <= 205.1


def test_a_chip_that_quotes_nothing() -> None:
    wait = predict_ima([], 0.1, 0.1, extend_s=EXTEND_S, extends_per_s=1, dice=random.Random(1))
    assert wait.mean_ms == pytest.approx(5, rel=0.01)
    assert wait.execs_per_s == pytest.approx(1 / (EXTEND_S + EXEC_S))


def test_one_shell_has_what_quotes_leave_it() -> None:
    free = 1 / (EXTEND_S + EXEC_S)
    assert every(0.4, 0.2, per_s=1).execs_per_s == pytest.approx(free / 2, rel=0.03)
    assert every(2.0, 0.2, per_s=1).execs_per_s == pytest.approx(free * 0.9, rel=0.03)


def test_between_two_quotes_that_follow_each_other_there_is_one_extend() -> None:
    wait = every(0.2, 0.2, per_s=1)
    assert wait.execs_per_s == pytest.approx(1 / 0.205, rel=0.03)


def test_more_extends_than_the_chip_has_time_for() -> None:
    """Behind one another without end: no figure would be true for long."""
    wait = every(0.2, 0.2, per_s=20)
    assert (wait.mean_ms, wait.p99_ms) == (math.inf, math.inf)


def test_extends_wait_for_each_other_too() -> None:
    busy = every(100.0, 0.001, per_s=100)
    assert busy.mean_ms == pytest.approx(5 + 5 * 0.5 / (2 * (1 - 0.5)), rel=0.1)  # M/D/1


def test_a_host_that_measures_nothing() -> None:
    assert (NO_IMA.mean_ms, NO_IMA.p99_ms) == (0, 0)


def test_a_prediction_has_it() -> None:
    scenario = Scenario(tenants=100, interval_s=2, quote_s=0.071, extend_s=0.0058, extends_per_s=1)
    wait = predict(scenario).ima
    assert wait.mean_ms == pytest.approx(5.8 + 0.5 * 71 / 2, rel=0.06)
    assert wait.p99_ms == pytest.approx(75, rel=0.06)


def test_readings_are_part_of_a_quote() -> None:
    quick = Scenario(tenants=50, interval_s=2, quote_s=0.05, read_s=0.006)
    moving = Scenario(tenants=50, interval_s=2, quote_s=0.05, read_s=0.006, readings=3)
    assert moving.chip_s == pytest.approx(0.068)
    assert moving.rest_s == pytest.approx(0.068)
    assert predict(moving).p50_ms > predict(quick).p50_ms * 1.2


def test_the_table_of_the_decision() -> None:
    """What docs/adr/0022 says of each chip, with the bound and without."""
    text = (DOCS / "adr/0022-the-duty-follows-from-ima-s-wait.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([0-9]+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for name, quote_ms, cells in rows:
        times = CHIPS[name]
        found: list[tuple[float, ...]] = []
        for bound_s in (None, Tpm().ima_wait_ms / 1000):
            scenario = Scenario(
                tenants=30,
                interval_s=2,
                quote_s=times.quote_s,
                extend_s=times.extend_s,
                max_duty=capped_duty(Tpm().max_duty, times.quote_s, bound_s),
            )
            got = predict(scenario)
            turn_s = scenario.turn_s
            found.append((scenario.max_duty, turn_s, got.p99_ms / 1000, got.ima.mean_ms))
        told = [tuple(map(float, cell.split(" → "))) for cell in cells.split(" | ")]
        assert float(quote_ms) == times.quote_s * 1000
        for without, with_bound, said in zip(*found, told, strict=True):
            assert said == pytest.approx((without, with_bound), rel=0.1, abs=0.06)
        assert found[1][1] < DUTY_SPAN_S + 2  # no turn is longer than a tenant waits
