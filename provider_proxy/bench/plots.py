"""Draws the sweeps: PNG to look at, SVG for documents. The only user of matplotlib (extra `plot`).

Colours are Okabe and Ito's, which people with any kind of colour vision can tell apart, and no line
differs by its colour alone. Lines are predictions, marks are measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from provider_proxy.bench.sweeps import EAGER, EAGER_S, FEW, MANY, TICK_S, Curve, Sweeps
from provider_proxy.errors import HostError

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#222222",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "provider-proxy",  # the same figures give the same file
}
DPI = 160
DEFAULT_TIMEOUT_MS = 30_000


def draw(sweeps: Sweeps, directory: Path) -> list[Path]:
    """Write all plots into a directory; the files.

    Raises:
        HostError: they cannot be written.
    """
    with mpl.rc_context(STYLE):
        figures = {
            "latency-by-tenants": _by_tenants(sweeps),
            "by-window": _by_window(sweeps),
        }
        written = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, figure in figures.items():
                for kind in ("png", "svg"):
                    path = directory / f"{name}.{kind}"
                    metadata = {"Date": None} if kind == "svg" else {}
                    figure.savefig(path, dpi=DPI, metadata=metadata)
                    written.append(path)
        except OSError as exc:
            raise HostError(f"cannot write plots to {directory}: {exc.strerror}") from exc
    return written


def _curve(
    axes: Axes,
    curve: Curve,
    name: str,
    *,
    color: str,
    dashed: bool,
    mark: str,
    factor: Callable[[float], float] = float,
) -> None:
    """A figure of a curve: the prediction as a line, the measurements as marks."""
    xs = sorted(curve.predicted)
    axes.plot(
        [factor(x) for x in xs],
        [getattr(curve.predicted[x], name) for x in xs],
        color=color,
        linestyle=(0, (4, 2)) if dashed else "-",
        linewidth=1.2 if dashed else 1.8,
    )
    measured = sorted(curve.measured)
    axes.plot(
        [factor(x) for x in measured],
        [getattr(curve.measured[x], name) for x in measured],
        color=color,
        linestyle="none",
        marker=mark,
        markersize=5.5,
        markerfacecolor="white" if dashed else color,
        markeredgewidth=1.2,
    )


def _numbers(axis: object, ticks: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))  # type: ignore[attr-defined]
    axis.set_minor_locator(NullLocator())  # type: ignore[attr-defined]
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))  # type: ignore[attr-defined]


def _heading(figure: Figure, title: str, text: str) -> None:
    height = figure.get_figheight()
    at: dict[str, Any] = {"ha": "left", "va": "top"}
    figure.text(0.012, 1 - 0.08 / height, title, fontsize=11.5, fontweight="bold", **at)
    figure.text(0.012, 1 - 0.33 / height, text, fontsize=8.5, color=GREY, **at)


def _key(axes: Axes, where: Literal["lower right", "upper left"]) -> None:
    """What lines and marks mean, in grey: it holds for all colours."""
    handles = [
        Line2D(
            [], [], color=GREY, linewidth=1.8, marker="o", markersize=5,
            label="p99: 99 of 100 answers are faster",
        ),
        Line2D(
            [], [], color=GREY, linewidth=1.2, linestyle=(0, (4, 2)), marker="o", markersize=5,
            markerfacecolor="white", label="p50: half of the answers are faster",
        ),
        Line2D([], [], color=GREY, linewidth=1.8, label="line: predicted"),
        Line2D([], [], color=GREY, linestyle="none", marker="o", markersize=5, label="mark: measured"),
    ]  # fmt: skip
    axes.legend(handles=handles, loc=where, frameon=False, fontsize=8, ncols=2, handlelength=2.4)


def _by_tenants(sweeps: Sweeps) -> Figure:
    figure = Figure(figsize=(7.2, 4.6))
    axes = figure.add_axes((0.115, 0.115, 0.865, 0.745))
    looks = (
        ("one by one", ORANGE, "s"),
        ("tick", GREEN, "^"),
        ("rule", BLUE, "o"),
    )
    for name, color, mark in looks:
        curve = sweeps.by_tenants[name]
        _curve(axes, curve, "p99_ms", color=color, dashed=False, mark=mark)
        _curve(axes, curve, "p50_ms", color=color, dashed=True, mark=mark)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.9, 1100)
    axes.set_ylim(110, 60_000)
    _numbers(axes.xaxis, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))
    _numbers(axes.yaxis, (200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000))
    axes.set_xlabel("number of tenants, each asking every 2 s (logarithmic axis)")
    axes.set_ylabel("latency in ms (logarithmic axis)")
    axes.axhline(DEFAULT_TIMEOUT_MS, color=GREY, linewidth=0.8, linestyle=":")
    axes.text(1, DEFAULT_TIMEOUT_MS * 1.06, "30 s: the default timeout", fontsize=8, color=GREY)
    bold: dict[str, Any] = {"fontweight": "bold", "ha": "right"}
    axes.text(27, 12_500, "one quote per request", color=ORANGE, **bold)
    axes.text(1000, 1400, f"one batch every {TICK_S:g} s, by the clock", color=GREEN, **bold)
    axes.text(1000, 680, "provider-proxy: batch while the chip is busy", color=BLUE, **bold)
    _key(axes, "lower right")
    _heading(
        figure,
        "Latency by number of tenants",
        f"A chip that takes {sweeps.quote_ms:.0f} ms a quote (an Infineon TPM's RSA-2048, median), "
        f"duty at most {sweeps.max_duty:g}, window {sweeps.window_ms:g} ms",
    )
    return figure


def _by_window(sweeps: Sweeps) -> Figure:
    figure = Figure(figsize=(7.2, 7.4))
    height, left, width = 0.235, 0.1, 0.875
    boxes = [(left, bottom, width, height) for bottom in (0.69, 0.38, 0.07)]
    top, middle, low = (figure.add_axes(box) for box in boxes)
    few, many, eager = (sweeps.by_window[name] for name in ("few", "many", "eager"))
    for axes, name in ((top, "p99_ms"), (top, "p50_ms"), (middle, "duty")):
        for curve, color, mark in ((few, ORANGE, "s"), (many, BLUE, "o")):
            _curve(axes, curve, name, color=color, dashed=name == "p50_ms", mark=mark)
    _curve(low, eager, "answered_per_s", color=GREEN, dashed=False, mark="^")
    for axes in (top, middle, low):
        axes.set_xscale("symlog", linthresh=10, linscale=0.4)
        axes.set_xlim(-1.5, 1150)
        _numbers(axes.xaxis, (0, 10, 20, 50, 100, 200, 500, 1000))
        axes.axvline(sweeps.window_ms, color=GREY, linewidth=0.8, linestyle=":")
    top.set_yscale("log")
    top.set_ylim(150, 2700)
    _numbers(top.yaxis, (200, 300, 500, 1000, 2000))
    top.set_ylabel("latency in ms (log. axis)")
    top.text(sweeps.window_ms * 1.05, 165, "default", fontsize=8, color=GREY)
    _key(top, "upper left")
    top.text(0.5, 625, "p99, the same for both", fontsize=8, color=GREY)
    middle.set_ylim(0, 0.62)
    middle.set_ylabel("share of the chip's time used")
    low.set_ylabel("answers per second")
    low.set_xlabel("batch.window_ms (logarithmic axis, with 0)")
    low.set_ylim(0, 300)
    middle.text(0.5, 0.53, f"{MANY} tenants, every 2 s", color=BLUE, fontweight="bold")
    middle.text(0.5, 0.30, f"{FEW} tenants, every 2 s", color=ORANGE, fontweight="bold")
    low.text(
        0.5,
        150,
        f"{EAGER} tenants, every {EAGER_S * 1000:.0f} ms or as soon as they can, duty 1",
        color=GREEN,
        fontweight="bold",
    )
    figure.align_ylabels((top, middle, low))
    _heading(
        figure,
        "What the window changes",
        f"A chip that takes {sweeps.quote_ms:.0f} ms a quote (an Infineon TPM's RSA-2048, median), "
        f"duty at most {sweeps.max_duty:g}",
    )
    return figure
