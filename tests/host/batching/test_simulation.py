"""The model of the batching rule: known figures, bounds, and the batcher itself on a mock clock."""

from __future__ import annotations

import functools
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import FakeQuoter
from places import DOCS
from scripts import load_script

from provider_proxy.bench.plan import POINTS, SHOWN
from provider_proxy.cli import main as cli
from provider_proxy.errors import UsageError
from provider_proxy.evidence.model import Nonce, PcrMask, QuoteRequest, Tenant, mask_of
from provider_proxy.host.batching import simulation as module
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.batching.simulation import (
    Costs,
    Scenario,
    Simulation,
    choose,
    draw_polls,
    predict,
    quantile,
)
from provider_proxy.host.config.tables import DEFAULT_ISOLATED
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.tpm import pace

ISOLATED = mask_of(DEFAULT_ISOLATED)

FREE = Costs(request_s=0, answer_s=0, batch_s=0)
CROWD = Scenario(tenants=100, interval_s=2, quote_s=0.188, window_s=0)


# --- against the batcher ----------------------------------------------------------------------------


async def inline(function: Callable[..., Any], *args: Any) -> Any:
    """Instead of a worker thread, which the mock clock does not see."""
    await trio.lowlevel.checkpoint()
    return function(*args)


async def played(scenario: Scenario, polls: list[tuple[float, int]]) -> tuple[list[float], int]:
    """The same polls at the real batcher: latencies and quotes of those after the first interval."""
    quoter = FakeQuoter(delay_s=scenario.quote_s, pause_s=scenario.rest_s)
    settings = BatchSettings(
        isolate_mask=ISOLATED, window_s=scenario.window_s, max_leaves=scenario.max_leaves
    )
    batcher = Batcher(quoter, settings, Metrics(), in_worker=inline)
    begin = trio.current_time()
    latencies: list[tuple[float, float]] = []
    waits: set[int] = set()

    async def ask(number: int, tenant: int) -> None:
        asked = trio.current_time()
        isolated = (0, 1 << 11, 1 << 12, 1 << 13)[tenant % scenario.keys]
        request = QuoteRequest(nonce=Nonce(b"nonce-%016d" % number), mask=PcrMask(1 | isolated))
        await batcher.submit(request, Tenant(name=str(tenant), pcr_allow=0xFFFFFF), timeout_s=1e6)
        latencies.append((trio.current_time() - scenario.quote_s, trio.current_time() - asked))
        waits.remove(tenant)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(batcher.run)
        async with trio.open_nursery() as asking:
            for number, (at, tenant) in enumerate(polls):
                await trio.sleep_until(begin + at)
                if tenant not in waits:
                    waits.add(tenant)
                    asking.start_soon(ask, number, tenant)
        nursery.cancel_scope.cancel()
    counted = [pair for pair in latencies if pair[0] - begin >= scenario.interval_s - 1e-9]
    return sorted(took for _, took in counted), len({round(sealed, 6) for sealed, _ in counted})


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(tenants=1, interval_s=1, quote_s=0.1),
        Scenario(tenants=8, interval_s=1, quote_s=0.1),
        Scenario(tenants=8, interval_s=1, quote_s=0.1, window_s=0.3, max_duty=1),
        Scenario(tenants=30, interval_s=1, quote_s=0.05, window_s=0, max_duty=1),
        Scenario(tenants=20, interval_s=1, quote_s=0.1, max_leaves=3, window_s=0.2),
        Scenario(tenants=20, interval_s=2, quote_s=0.1, keys=4),
        Scenario(tenants=12, interval_s=1, quote_s=0.1, keys=3, max_leaves=2, max_duty=0.9),
        Scenario(tenants=6, interval_s=1, quote_s=0.1, max_leaves=1, window_s=0, max_duty=1),
        Scenario(tenants=6, interval_s=0.3, quote_s=0.1, max_leaves=1, window_s=0),  # too much
    ],
    ids=lambda s: f"{s.tenants}x{s.keys}w{s.window_s:g}m{s.max_leaves}d{s.max_duty:g}",
)
async def test_the_model_is_the_batcher_s_rule(
    autojump_clock: trio.testing.MockClock, scenario: Scenario
) -> None:
    """Request by request: the same polls have the same latencies."""
    polls = draw_polls(scenario, 25, random.Random(7))
    simulation = Simulation(scenario, FREE, random.Random(7))
    simulation.play(polls)
    latencies, quotes = await played(scenario, polls)
    assert sorted(simulation.latencies) == pytest.approx(latencies, abs=1e-6)
    assert simulation.quotes == quotes


# --- known figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "p50_ms", "p99_ms"),
    [
        (replace(CROWD, max_duty=1), 282, 374),
        (CROWD, 376, 560),
        (replace(CROWD, tick_s=1.0, max_duty=1), 679, 1177),
    ],
)
def test_figures_of_the_first_model(scenario: Scenario, p50_ms: float, p99_ms: float) -> None:
    """ADR 0001's, which came from another program."""
    prediction = predict(scenario, FREE)
    assert prediction.p50_ms == pytest.approx(p50_ms, rel=0.02)
    assert prediction.p99_ms == pytest.approx(p99_ms, rel=0.02)


def test_a_lone_tenant_waits_for_window_and_quote() -> None:
    scenario = Scenario(tenants=1, interval_s=2, quote_s=0.188, window_s=0.05)
    assert predict(scenario, FREE).p50_ms == pytest.approx(238)
    costs = Costs(request_s=1e-3, answer_s=2e-3, batch_s=4e-3)
    assert predict(scenario, costs).p50_ms == pytest.approx(238 + 1 + 2 + 4 / 2, abs=0.1)


def test_one_by_one_everybody_waits_for_everybody() -> None:
    prediction = predict(replace(CROWD, max_leaves=1, max_duty=1), FREE)
    assert prediction.p50_ms > 0.9 * 100 * 188 - 2000
    assert prediction.answered_per_s == pytest.approx(1 / 0.188, rel=0.02)
    assert prediction.leaves == 1


def test_the_duty_is_kept_and_used() -> None:
    for duty in (0.1, 0.5, 1.0):
        crowd = replace(CROWD, tenants=500, max_duty=duty)
        assert predict(crowd, FREE).duty == pytest.approx(duty, rel=0.02)
    assert replace(CROWD, quote_s=60, max_duty=0.1).rest_s == pytest.approx(9)  # as the gate's
    assert module.DUTY_SPAN_S == pace.DUTY_SPAN_S


def test_what_goes_in_comes_out() -> None:
    prediction = predict(CROWD)
    assert prediction.leaves * prediction.quotes_per_s == pytest.approx(prediction.answered_per_s)
    assert prediction.answered_per_s == pytest.approx(50, rel=0.05)
    assert predict(replace(CROWD, max_leaves=7, max_duty=1), FREE).leaves <= 7


def test_a_window_saves_quotes_while_few_ask() -> None:
    few = replace(CROWD, tenants=5, interval_s=1)
    rates = [predict(replace(few, window_s=w)).quotes_per_s for w in (0, 0.2, 0.5, 1)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0] / 2


def test_kinds_of_requests_take_turns() -> None:
    one, four = (predict(replace(CROWD, keys=keys)) for keys in (1, 4))
    assert four.p99_ms > 2 * one.p99_ms
    assert four.leaves < one.leaves


def test_the_same_seed_predicts_the_same() -> None:
    assert predict(CROWD) == predict(CROWD)
    assert predict(CROWD, seed=2) != predict(CROWD)


def test_cpu_and_memory_grow_with_the_tenants() -> None:
    costs = Costs(request_s=1e-4, answer_s=1e-4, batch_s=1e-3, base_mb=50, tenant_kb=100)
    prediction = predict(CROWD, costs)
    assert prediction.memory_mb == pytest.approx(60)
    rate, quotes = prediction.answered_per_s, prediction.quotes_per_s
    assert prediction.cpu == pytest.approx(rate * 2e-4 + quotes * 1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tenants": 0},
        {"tenants": module.MAX_TENANTS + 1},
        {"interval_s": 0},
        {"quote_s": 0},
        {"window_s": -1},
        {"keys": 0},
        {"keys": 101},
        {"max_duty": 0},
        {"max_duty": 1.1},
        {"max_leaves": 0},
        {"interval_s": math.nan},
    ],
)
def test_impossible_scenarios(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(CROWD, **wrong)


def test_quantiles() -> None:
    assert quantile([], 0.5) == math.inf
    assert quantile([1, 2, 3], 0.5) == 2
    assert quantile([1, 2, 3], 1) == 3


# --- the window to set ------------------------------------------------------------------------------


def test_a_longer_window_only_where_it_frees_the_chip() -> None:
    few = Scenario(tenants=3, interval_s=30, quote_s=0.1)
    best, found = choose(few, 2.0)
    assert best is not None
    assert best.window_ms == 0  # nothing to share
    assert [choice.window_ms for choice in found] == [
        *(0, 10, 20, 50, 100, 200, 300, 500, 700, 1000)
    ]
    best, _ = choose(replace(few, tenants=30, interval_s=2, quote_s=0.3), 1.5)
    assert best is not None
    assert best.window_ms >= 500
    assert best.prediction.duty < 0.45


def test_the_deadline_holds() -> None:
    for deadline_s in (0.7, 0.8, 1.5):
        best, found = choose(CROWD, deadline_s)
        assert best is not None
        assert best.prediction.p99_ms * module.RESERVE <= deadline_s * 1000
        assert all(
            c.fits == (c.prediction.p99_ms * module.RESERVE <= deadline_s * 1000) for c in found
        )
    assert choose(CROWD, 0.2)[0] is None
    assert choose(CROWD, predict(CROWD).p99_ms / 1000 + 0.01)[0] is None  # nothing in reserve


def test_later_than_the_interval_does_not_fit() -> None:
    assert choose(replace(CROWD, interval_s=0.4), 10.0)[0] is None


def test_a_core_that_is_full_does_not_fit() -> None:
    assert choose(replace(CROWD, max_duty=1), 1.0, Costs(answer_s=17e-3))[0] is None


# --- the command ------------------------------------------------------------------------------------

plan = functools.partial(lambda *words: cli.run(["plan", *words]))


def test_plan_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--tenants", "100", "--chip", "infineon-rsa") == 0
    output = capsys.readouterr().out
    assert "100 tenants, each every 2 s; a quote takes 188 ms" in output
    assert output.splitlines()[-1] == "Set batch.window_ms = 500"


def test_the_document_s_plan_is_what_it_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "sizing.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"^provider-proxy plan (.*)$", text, re.MULTILINE)
    (block,) = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("COLUMNS", "80")
    assert plan(*words.split()) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert block.splitlines() == printed


def test_what_a_run_measured_gets_into_its_places() -> None:
    """`packaging/sizing.py` finds each place once, and changes nothing where nothing has changed."""
    script = load_script("packaging/sizing")
    page = (DOCS / "sizing.md").read_text(encoding="utf-8")
    source = Path(module.__file__).read_text(encoding="utf-8")
    costs = Costs()
    told = {
        "request_us": costs.request_s * 1e6,
        "answer_us": costs.answer_s * 1e6,
        "batch_us": costs.batch_s * 1e6,
        "base_mb": costs.base_mb,
        "tenant_kb": costs.tenant_kb,
    }
    assert script.with_costs(source, told) == source
    assert "request_s: float = 777e-6\n" in script.with_costs(source, told | {"request_us": 777})
    row = {f"{name}_{what}": 1.0 for name in SHOWN for what in ("measured", "ratio")}
    figures = {"points": 10, "points_within_15_percent": 3, **{at.name: row for at in POINTS}}
    changed = script.with_points(page, figures)
    assert "15 %: 3 of 10 here" in changed
    assert changed.count("| 1 (1.00) | 1 (1.00) | 1.00 (1.00) | 100.0% (1.00) |") == len(POINTS)
    assert changed.count("\n") == page.count("\n")
    assert script.with_points(changed, figures) == changed
    (block,) = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert script.with_example(page, block) == page
    assert script.EXAMPLE in page


def test_plan_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--tenants", "9", "--quote-ms", "50", "--max-duty", "0.25", "--keys", "2", "--json")
    assert plan(*words) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (got["tenants"], got["quote_s"], got["max_duty"], got["keys"]) == (9, 0.05, 0.25, 2)
    assert got["window_ms"] in [row["window_ms"] for row in got["windows"] if row["fits"]]
    scenario = Scenario(tenants=9, interval_s=2, quote_s=0.05, max_duty=0.25, keys=2, window_s=0)
    assert got["windows"][0]["p99_ms"] == pytest.approx(predict(scenario).p99_ms, abs=0.001)


def test_plan_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--tenants", "100", "--chip", "worst-rsa") == 0
    output = capsys.readouterr().out
    assert "No window answers 99 of 100 within 1000 ms." in output
    assert "too slow" in output


@pytest.mark.parametrize(
    "words",
    [
        "--tenants 0 --quote-ms 1",
        "--tenants 1.5 --quote-ms 1",
        "--tenants 1",
        "--tenants 1 --quote-ms 0",
        "--tenants 1 --quote-ms inf",
        "--tenants 1 --quote-ms nan",
        "--tenants 1 --quote-ms 1 --chip stm-rsa",
        "--tenants 1 --chip unknown",
        "--tenants 1 --quote-ms 1 --interval-s -1",
    ],
)
def test_a_wrong_command_line(words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        plan(*words.split())
    assert caught.value.code == cli.EXIT_USAGE


@pytest.mark.parametrize("words", ["--max-duty 2", "--keys 5", "--tenants 100001"])
def test_an_impossible_plan(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--tenants", "1", "--quote-ms", "1", *words.split()) == cli.EXIT_USAGE
    assert capsys.readouterr().out == ""


@pytest.mark.real
@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
def test_the_chip_of_the_configuration_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        f'state_dir = "{tmp_path}/state"\n[listen]\ninsecure_plaintext = true\n'
        '[tpm]\ntcti = "embedded"\nmax_duty = 0.2\n'
    )
    assert plan("--tenants", "3", "--measure", "--config", str(path), "--json") == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < got["quote_s"] < 1
    assert got["max_duty"] == 0.2
