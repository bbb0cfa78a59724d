"""The plots: drawn from sweeps, the same each time, small, and good to read without their colours."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from places import DOCS

pytest.importorskip("matplotlib", reason="the extra plot is not installed")

from provider_proxy.bench import plots, sweeps
from provider_proxy.bench.plan import POINTS, Measured, compare, median_of, point
from provider_proxy.cli import main as cli
from provider_proxy.errors import HostError
from provider_proxy.host.batching.simulation import Prediction

IMAGES = DOCS / "img"
PREDICTION = Prediction(
    p50_ms=300,
    p99_ms=600,
    quotes_per_s=2,
    duty=0.4,
    leaves=3,
    answered_per_s=200,
    cpu=0.1,
    memory_mb=60,
)


def measured(**changed: float) -> Measured:
    values = {"p50_ms": 310.0, "p99_ms": 640.0, "duty": 0.41, "leaves": 3.0, "cpu": 0.2}
    return Measured(
        **(values | changed),
        memory_mb=61.0,
        answered_per_s=200.0,
        quote_ms=71.2,
        machine_ms=0.4,
        quotes=9,
        requests=27,
    )


def curve(*xs: float) -> sweeps.Curve:
    return sweeps.Curve(
        predicted=dict.fromkeys(xs, PREDICTION), measured={xs[0]: measured()} if xs else {}
    )


@pytest.fixture
def found() -> sweeps.Sweeps:
    return sweeps.Sweeps(
        quote_ms=190,
        max_duty=0.5,
        window_ms=50,
        by_tenants={name: curve(1, 10, 1000) for name in ("one by one", "tick", "rule")},
        by_window={name: curve(0, 50, 1000) for name in ("few", "many", "eager")},
    )


def words(svg: Path) -> str:
    return " ".join("".join(node.itertext()) for node in ElementTree.parse(svg).getroot())


def test_each_plot_as_png_and_svg_and_the_same_each_time(
    tmp_path: Path, found: sweeps.Sweeps
) -> None:
    first, again = (plots.draw(found, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [
        *("latency-by-tenants.png", "latency-by-tenants.svg"),
        *("by-window.png", "by-window.svg"),
    ]
    for one, other in zip(first, again, strict=True):
        data = one.read_bytes()
        if one.suffix == ".png":
            assert data.startswith(b"\x89PNG\r\n")
        else:
            assert data == other.read_bytes()


def test_axes_have_names_and_units(tmp_path: Path, found: sweeps.Sweeps) -> None:
    plots.draw(found, tmp_path)
    text = words(tmp_path / "latency-by-tenants.svg")
    for label in (
        "latency in ms (logarithmic axis)",
        "number of tenants, each asking every 2 s",
        "190 ms a quote",
        "p99",
        "p50",
    ):
        assert label in text
    text = words(tmp_path / "by-window.svg")
    for label in (
        "latency in ms",
        "share of the chip's time",
        "answers per second",
        "batch.window_ms",
    ):
        assert label in text


def test_a_folder_that_cannot_be_made(tmp_path: Path, found: sweeps.Sweeps) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write plots"):
        plots.draw(found, tmp_path / "file")


@pytest.mark.parametrize("name", ["latency-by-tenants.svg", "by-window.svg"])
def test_the_documents_pictures(name: str) -> None:
    """They are `bench plan --plot`'s, small, and hold nothing of the machine that drew them."""
    data = (IMAGES / name).read_text(encoding="utf-8")
    assert len(data) < 60_000
    assert "line: predicted" in words(IMAGES / name)
    assert not re.search(r"<dc:date>|/home/|/tmp/|href=\"http", data)
    assert f"(img/{name})" in (IMAGES.parent / "sizing.md").read_text(encoding="utf-8")


# --- the comparison ---------------------------------------------------------------------------------


def test_a_point_is_within_or_not() -> None:
    at = point("x", "infineon-rsa", 5, 2)
    row = compare(at, PREDICTION, measured())
    assert row["within_15_percent"] is True
    assert (row["p50_ms_predicted"], row["p50_ms_measured"]) == (300, 310)
    assert row["p50_ms_ratio"] == pytest.approx(1.033)
    assert compare(at, PREDICTION, measured(cpu=9.0))["within_15_percent"] is True
    for name, factor in (("p50_ms", 1.16), ("p99_ms", 0.84), ("duty", 1.16)):
        worse = measured(**{name: getattr(PREDICTION, name) * factor})
        assert compare(at, PREDICTION, worse)["within_15_percent"] is False


def test_rounds_give_their_median() -> None:
    rounds = [measured(p50_ms=p50, cpu=cpu) for p50, cpu in ((300, 0.3), (900, 0.1), (310, 0.2))]
    one = median_of(rounds)
    assert (one.p50_ms, one.cpu, one.p99_ms) == (310, 0.2, 640)
    assert (one.quotes, one.requests) == (27, 81)


def test_points_are_many_and_differ() -> None:
    assert len({at.name for at in POINTS}) == len(POINTS) >= 6
    assert len({(at.chip, at.scenario) for at in POINTS}) == len(POINTS)
    assert all(at.scenario.tenants * at.seconds / at.scenario.interval_s >= 50 for at in POINTS)


def test_plot_goes_with_plan_alone(tmp_path: Path) -> None:
    assert cli.run(["bench", "quotes", "--plot", str(tmp_path)]) == cli.EXIT_USAGE
