"""What other people's programs read of this one: settings, options, exit codes, metrics, JSON, errors.

    python tests/support/interfaces.py > tests/repository/interfaces.txt

One line each, sorted by kind. A line that goes or changes breaks somebody's configuration, script,
dashboard or client: write it into CHANGELOG.md, and then run the
command above again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import status_helpers
from places import PACKAGE
from prometheus_client import CollectorRegistry
from scripts import load_script

from provider_proxy import errors
from provider_proxy.cli import main as cli
from provider_proxy.host.metrics import Metrics
from provider_proxy.tenant.bridge.metrics import BridgeMetrics
from provider_proxy.tenant.fleet.metrics import FleetMetrics
from provider_proxy.tenant.watch.metrics import WatchMetrics

WORDS = ("description", "summary", "title", "example", "examples")


def fleet_registry() -> CollectorRegistry:
    """What a member of a fleet shows beside the watcher's."""
    registry = CollectorRegistry()
    FleetMetrics(registry)
    return registry


REGISTRIES: tuple[tuple[str, CollectorRegistry], ...] = (
    ("daemon", Metrics().registry),
    ("watch", WatchMetrics().registry),
    ("bridge", BridgeMetrics().registry),
    ("fleet", fleet_registry()),
)


def lines() -> Iterator[str]:
    """All of them."""
    yield from settings()
    yield from options(cli.build_parser(), "")
    yield from exit_codes()
    for name, registry in REGISTRIES:
        yield from metrics(name, registry)
    yield from keys("status", status_helpers.busy())
    described = json.loads((PACKAGE / "openapi.json").read_text(encoding="utf-8"))
    yield from (f"openapi {line}" for line in leaves("", described))
    yield from sorted(f"error {name}" for name in vars(errors) if name.endswith("Error"))


def settings() -> Iterator[str]:
    """Keys of all files, with what they take and their defaults."""
    for line in load_script("packaging/reference").page().splitlines():
        cells = line.split(" | ")
        if line.startswith("| `") and len(cells) == 4:
            yield "setting " + " ".join(cells[:3]).removeprefix("| ")


def options(parser: argparse.ArgumentParser, words: str) -> Iterator[str]:
    """Commands, their options, and how many words each takes."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield f"command {words} {name}".replace("  ", " ")
                yield from options(sub, f"{words} {name}".strip())
        else:
            name = "/".join(action.option_strings) or action.dest
            needed = " required" if action.required else ""
            choices = "" if action.choices is None else f" {','.join(map(str, action.choices))}"
            yield f"option {words}: {name} nargs={action.nargs}{needed}{choices}"


def exit_codes() -> Iterator[str]:
    """The exit codes' names and numbers."""
    for name in sorted(vars(cli)):
        if name.startswith("EXIT_"):
            yield f"{name} {getattr(cli, name)}"


def metrics(name: str, registry: CollectorRegistry) -> Iterator[str]:
    """Names and labels of what a process shows."""
    for collector in sorted(
        registry._collector_to_names, key=lambda c: str(registry._collector_to_names[c])
    ):
        for family in collector.describe() if hasattr(collector, "describe") else ():
            labels = ",".join(getattr(collector, "_labelnames", ()))
            yield f"metric {name}: {family.name} {family.type} {{{labels}}}"


def keys(prefix: str, node: Any) -> Iterator[str]:
    """The keys of JSON, whatever the values."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}.{key} {type(value).__name__}"
            yield from keys(f"{prefix}.{key}", value)
    elif isinstance(node, list) and node:
        yield from keys(f"{prefix}[]", node[0])


def leaves(prefix: str, node: Any) -> Iterator[str]:
    """Every value of an OpenAPI description that is not a text for people."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in WORDS or isinstance(value, dict):
                yield from leaves(f"{prefix}/{key}", value)
    elif isinstance(node, list):
        for number, item in enumerate(node):
            yield from leaves(f"{prefix}/{number}", item)
    else:
        yield f"{prefix} {json.dumps(node)}"


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in lines()))
