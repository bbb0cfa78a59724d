"""Checks of alert rules and dashboards: what they name exists, and each rule fires when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from prometheus_client import CollectorRegistry

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
PROMTOOL = shutil.which("promtool") or shutil.which(ROOT / ".promtool/usr/bin/promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")


def series(*registries: CollectorRegistry) -> dict[str, set[str]]:
    """Each name that Prometheus can ask for, and its labels."""
    found = {}
    for collector in [each for one in registries for each in list(one._collector_to_names)]:
        for family in collector.describe():  # type: ignore[attr-defined]
            for suffix in SUFFIXES[family.type]:
                labels = set(getattr(collector, "_labelnames", ()))
                found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


OF_PROMETHEUS = {"instance", "job"}


def check_names(expr: str, known_series: Mapping[str, set[str]]) -> None:
    """Raises: AssertionError where an expression names what does not exist."""
    names = re.findall(r"provider_proxy_\w+", expr)
    assert names
    known: set[str] = set()
    for name in names:
        assert name in known_series, name
        known |= known_series[name]
    used = {
        label
        for part in re.findall(r"\{([^}]*)\}", expr)
        for label in re.findall(r"(\w+)[=!]", part)
    }
    used |= {label for part in re.findall(r"by \(([^)]*)\)", expr) for label in part.split(", ")}
    assert used <= known | OF_PROMETHEUS, used


def promtool(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PROMTOOL), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=cwd,
    )


LABELS = 'instance="a", job="provider-proxy"'


def labelled(name: str) -> str:
    bare, _, labels = name.rstrip("}").partition("{")
    return f"{bare}{{{LABELS}{', ' + labels if labels else ''}}}"


def rule_test(values: dict[str, str], alert: str, expected: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "interval": "1m",
        "input_series": [
            {"series": labelled(name), "values": points} for name, points in values.items()
        ],
        "alert_rule_test": [{"eval_time": "119m", "alertname": alert, "exp_alerts": expected}],
    }


def check_alerts(
    folder: Path,
    path: Path,
    rules: Sequence[Mapping[str, Any]],
    fires: Mapping[str, tuple[dict[str, str], dict[str, str]]],
    well: dict[str, str],
) -> None:
    """Each rule fires, and none where all is well.

    Args:
        folder: for the test's own files.
        path: of the rules.
        fires: of each alert the series that make it fire, and the labels that it has beside `instance`
            (empty for one that it has not).
    """
    cases = []
    for rule in rules:
        alert = rule["alert"]
        values, labels = fires[alert]
        own = {"instance": "a", **labels, **rule["labels"]}
        own = {label: value for label, value in own.items() if value}
        summary = rule["annotations"]["summary"].replace("{{ $labels.instance }}", "a")
        for label, value in labels.items():
            summary = summary.replace(f"{{{{ $labels.{label} }}}}", value)
        annotations = {**rule["annotations"], "summary": summary}
        cases.append(
            rule_test(values, alert, [{"exp_labels": own, "exp_annotations": annotations}])
        )
        cases.append(rule_test(well, alert, []))
    shutil.copy(path, folder)
    document = {"rule_files": [path.name], "evaluation_interval": "1m", "tests": cases}
    (folder / "test.yml").write_text(json.dumps(document))  # YAML, too
    done = promtool("test", "rules", "test.yml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def check_dashboard(dashboard: Mapping[str, Any]) -> None:
    """Grafana can import it, and no panel lies over another."""
    panels = dashboard["panels"]
    assert dashboard["schemaVersion"] >= 36
    assert "id" not in dashboard  # another instance's number would overwrite a dashboard there
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(panels))) - {"__rate_interval"}
    assert used == variables == {"datasource", "instance"}
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in own) < 24
        assert not own & cells, f"{panel['title']} lies over another panel"
        cells |= own


def check_panels(folder: Path, targets: Sequence[tuple[str, str]]) -> None:
    """Prometheus can read each panel's question."""
    rules = [
        {
            "record": f"panel:{number}",
            "expr": expr.replace("$__rate_interval", "5m").replace("$instance", ".*"),
        }
        for number, (_, expr) in enumerate(targets)
    ]
    path = folder / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
