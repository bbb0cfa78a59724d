"""`provider-proxy check-config`: every value that the daemon would use, and where it came from.

Reads what the program reads, in the same way, and starts nothing. What it prints is TOML again. Then it
opens every file that the configuration names, and reports what a start would report: wrong files, keys
that do not match certificates, dates, addresses in use. Secrets appear as the paths that name them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from provider_proxy.cli.arguments import add_config_argument
from provider_proxy.common.findings import ERROR, Finding
from provider_proxy.common.settings.document import Loaded, Origin
from provider_proxy.common.settings.values import as_toml
from provider_proxy.errors import ProviderProxyError
from provider_proxy.host import preflight
from provider_proxy.host.config.load import load
from provider_proxy.tenant import hosts_file
from provider_proxy.tenant.hosts_file import load_hosts_file
from provider_proxy.tenant.watch.config import load_watch
from provider_proxy.tenant.watch.tables import WatchConfig

SERVE, WATCH, BRIDGE, EK_CHECK = "serve", "watch", "bridge", "ek-check"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program with a file of settings.

    Attributes:
        load: reads the file.
        find: looks at what it names.
    """

    load: Callable[[Path], Loaded[Any]]
    find: Callable[[Any], Iterator[Finding]]


def _find_watch(config: WatchConfig, *, for_bridge: bool) -> Iterator[Finding]:
    from provider_proxy.tenant.watch import (
        preflight as of_watch,
    )  # brings trio, which serve's needs not

    return of_watch.find(config, for_bridge=for_bridge)


PROGRAMS = {
    SERVE: Program(load=load, find=preflight.find),
    WATCH: Program(load=load_watch, find=partial(_find_watch, for_bridge=False)),
    BRIDGE: Program(
        load=partial(load_watch, for_bridge=True),
        find=partial(_find_watch, for_bridge=True),
    ),
    EK_CHECK: Program(load=load_hosts_file, find=hosts_file.find),
}
EXIT_ENVIRONMENT = 3
BARE_KEY_RE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
MAX_COLUMN = 60  # where the origins stand, unless a value is longer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_argument(parser)
    parser.add_argument(
        "--for",
        dest="program",
        choices=PROGRAMS,
        default=SERVE,
        help="the command that reads the file (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Read, print, and look at what the settings name; 3 where a start would fail.

    Raises:
        HostError: a file cannot be read.
        ConfigError: a value is wrong; the message names its file and line, or its variable.
    """
    program = PROGRAMS[args.program]
    try:
        loaded = program.load(args.config)
    except ProviderProxyError as exc:
        if args.json:
            print(json.dumps({"ok": False, "error": str(exc)}))
        raise
    found = list(dict.fromkeys(program.find(loaded.config)))  # two may need one file
    good = all(finding.level != ERROR for finding in found)
    if args.json:
        findings = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({**_as_json(loaded), "ok": good, "findings": findings}))
    else:
        _print(loaded)
    for finding in found:
        place = loaded.document.origin(finding.text.partition(":")[0])
        where = f"{place}: " if place is not None else ""
        print(f"provider-proxy: {finding.level}: {where}{finding.text}", file=sys.stderr)
    return 0 if good else EXIT_ENVIRONMENT


def effective(loaded: Loaded[Any]) -> Iterator[tuple[tuple[str, ...], str | None, Origin]]:
    """Each key's parts, its value as TOML (None where it is not set), and where it came from."""

    def table(
        value: object, names: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], str | None]]:
        assert dataclasses.is_dataclass(value)
        for field in dataclasses.fields(value):
            inner, key = getattr(value, field.name), (*names, field.name)
            if field.metadata.get("hidden"):
                continue
            if "read" in field.metadata:
                read = field.metadata["read"]
                yield key, None if inner is None else as_toml(read, inner)
            elif isinstance(inner, Mapping):  # tables with names of the operator's
                for name in sorted(inner):
                    yield from table(inner[name], (*key, name))
            else:
                yield from table(inner, key)

    for key, text in table(loaded.config, ()):
        if key[0] != "tenants" or key[-1] != "accept_unlisted":  # the defaults' alone
            yield key, text, loaded.origin(".".join(key))


def _as_json(loaded: Loaded[Any]) -> dict[str, object]:
    keys: dict[str, object] = {}
    for key, text, origin in effective(loaded):
        value = None if text is None else tomllib.loads(f"value = {text}")["value"]
        place: dict[str, object] = {"from": "default"}
        if origin.file is not None:
            place = {"from": "file", "file": str(origin.file), "line": origin.line}
        elif origin.variable is not None:
            place = {"from": "environment", "variable": origin.variable}
        keys[".".join(key)] = {"value": value, **place}
    return {"ok": True, "files": [str(path) for path in loaded.document.files], "keys": keys}


def _print(loaded: Loaded[Any]) -> None:
    for line in lines_of(loaded):
        print(line)


def lines_of(loaded: Loaded[Any]) -> Iterator[str]:
    """The configuration as TOML, each line with the place that it came from."""
    lines = []
    for key, text, origin in effective(loaded):
        name = ".".join(part if BARE_KEY_RE.fullmatch(part) else json.dumps(part) for part in key)
        shown = f"# {name} is not set" if text is None else f"{name} = {text}"
        lines.append((shown, "" if text is None else f"# {origin}"))
    width = max(len(shown) for shown, _ in lines if len(shown) <= MAX_COLUMN)
    yield "# read: " + ", ".join(str(path) for path in loaded.document.files)
    for shown, place in lines:
        yield f"{shown:{width}}  {place}".rstrip()
