"""Puts what `bench plan` measured into docs/sizing.md and into the simulation's `Costs`.

    provider-proxy bench plan --json > plan.json
    python packaging/sizing.py plan.json

The table and its count, the five figures of `Costs`, and then the plan that the page shows as an example,
which follows from them. To be run where nothing else is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from provider_proxy.bench.plan import POINTS, SHOWN, Point

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sizing.md"
SIMULATION = ROOT / "provider_proxy" / "host" / "batching" / "simulation.py"
EXAMPLE = "plan --tenants 30 --interval-s 2 --chip stm-p256 --deadline-ms 1000"
COLUMNS = "80"

HEAD = """\
| Point | Chip | Tenants, interval | Window, duty | p50 | p99 | Duty | CPU |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Rewrite both files."""
    figures = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()[-1])
    SIMULATION.write_text(with_costs(SIMULATION.read_text(encoding="utf-8"), figures["costs"]))
    text = with_points(PAGE.read_text(encoding="utf-8"), figures)
    environment = {**os.environ, "COLUMNS": COLUMNS, "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "provider_proxy.cli.main", *EXAMPLE.split()],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    PAGE.write_text(with_example(text, done.stdout), encoding="utf-8")


def with_costs(text: str, costs: Mapping[str, float]) -> str:
    """simulation.py with these defaults, as `bench plan` has them."""
    for name, shown in (
        ("request_s", f"{costs['request_us']:.0f}e-6"),
        ("answer_s", f"{costs['answer_us']:.0f}e-6"),
        ("batch_s", f"{costs['batch_us'] / 1000:.1f}e-3"),
        ("base_mb", f"{costs['base_mb']:.1f}"),
        ("tenant_kb", f"{costs['tenant_kb']:.1f}"),
    ):
        text = _replaced(rf"(?<=^    {name}: float = ).*$", shown, text)
    return text


def with_points(text: str, figures: Mapping[str, object]) -> str:
    """sizing.md with the table of these figures, and how many points are within 15 %."""
    rows = "".join(_row(at, figures[at.name]) for at in POINTS)  # type: ignore[arg-type]
    text = _replaced(r"^\| Point \|.*\n(?:\|.*\n)+", HEAD + rows, text)
    count = f"{figures['points_within_15_percent']} of {figures['points']} here"
    return _replaced(r"[0-9]+ of [0-9]+ here", count, text)


def with_example(text: str, output: str) -> str:
    """sizing.md with what the example's command prints."""
    lines = "".join(line.rstrip() + "\n" for line in output.strip("\n").splitlines())
    return _replaced(r"(?<=```text\n)(?s:.*?)(?=```)", lines, text)


def _row(at: Point, row: Mapping[str, float]) -> str:
    scenario = at.scenario
    rule = f"{scenario.window_s * 1000:g} ms, {scenario.max_duty:g}"
    if scenario.keys > 1:
        rule += f", {scenario.keys} kinds"
    if scenario.max_leaves < 1024:
        rule += f", at most {scenario.max_leaves} a batch"
    cells = [
        f"{row[f'{name}_measured']:{form}} ({row[f'{name}_ratio']:.2f})"
        for name, form in SHOWN.items()
    ]
    asked = f"{scenario.tenants}, {scenario.interval_s:g} s"
    return f"| {at.name} | `{at.chip}` | {asked} | {rule} | {' | '.join(cells)} |\n"


def _replaced(pattern: str, new: str, text: str) -> str:
    """Raises: ValueError where the text has not exactly one place for it."""
    text, count = re.subn(pattern, lambda _: new, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{count} places, not one, for {pattern}")
    return text


if __name__ == "__main__":
    main()
