"""docs/reference.md: each key of each file and each option of each command, from the program itself.

    python packaging/reference.py > docs/reference.md        (`make docs`)

A key's meaning is the `doc` of its field, its values what its reader takes; an option's meaning is its
help. `test_docs` holds the page against what this gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from manpages import EXIT_STATUS, help_of, leaves, name_of, sentence

from provider_proxy.cli import main as cli
from provider_proxy.common.settings import values
from provider_proxy.host.config import chip_tables, tables
from provider_proxy.tenant.watch import tables as watch_tables

HEAD = """\
# Reference: keys and options

<!-- Made from the program by `make docs`: change the `doc` of a key, or the help of an option. -->

"none" as a default means that the key is not set. A path may be written `credential:NAME`: see
[configuration.md](configuration.md#secrets-as-credentials). Lists of PCRs hold numbers from 0 to 23.
"""
COMMANDS_HEAD = """\
## Commands

`--log-level` comes before the name of the command. Results go to stdout, the log and messages to stderr.
"""
WORDS = {
    values.read_flag: "`true` or `false`",
    values.read_path: "path",
    values.read_paths: "path or list of paths",
    values.read_uuid: "UUID",
    values.read_uuids: "list of UUIDs",
    values.read_pcrs: "list of PCRs",
    values.read_text: "text",
    values.read_label: "name",
    values.read_addresses: "address or list of addresses",
    values.read_networks: "list of IP addresses and networks",
    values.read_identities: "list of identities",
    values.read_handle: "persistent handle",
    values.read_banks: "list of PCR banks",
    values.read_duty: "number, above 0, at most 1",
    values.read_url: "URL",
    values.read_safe_url: "URL",
    values.read_webhook_url: "URL",
    values.read_host: "name or IP address",
    values.read_agent_id: "agent id",
    values.read_contact: "IP address and port",
    chip_tables.read_tcti: "tpm2-tss string",
}
LOCAL_WORDS = {
    "_read_ip": "IP address",
    "_read_admin": "loopback address and port",
    "_read_argv": "list of words",
    "_read_bank": "PCR bank",
}


def value_words(reader: Any) -> str:
    """What a reader takes, in words."""
    if reader in WORDS:
        return WORDS[reader]
    if reader.__name__ in LOCAL_WORDS:
        return LOCAL_WORDS[reader.__name__]
    inside = inspect.getclosurevars(reader).nonlocals
    if "inner" in inside and "least" not in inside:
        inner = value_words(inside["inner"])
        return "whole " + inner if inner.startswith("number") else inner
    if "least" in inside:
        return f"number, {inside['least']:g} to {inside['most']:g}"
    choices = [values.as_toml(reader, choice) for choice in inside["choices"]]
    return " or ".join(f"`{choice}`" for choice in choices)


def keys(kind: type[Any], prefix: str) -> Iterator[str]:
    """The rows of a table's keys."""
    for field in dataclasses.fields(kind):
        if "doc" not in field.metadata:
            continue
        read = field.metadata["read"]
        default = "none" if field.default is None else f"`{values.as_toml(read, field.default)}`"
        meaning = cell(field.metadata["doc"])
        yield f"| `{prefix}{field.name}` | {value_words(read)} | {default} | {meaning} |"


def key_table(title: str, parts: list[tuple[type[Any], str]]) -> Iterator[str]:
    """A section with one table of keys."""
    yield from (title, "", "| Key | Values | Default | Meaning |", "|---|---|---|---|")
    for kind, prefix in parts:
        yield from keys(kind, prefix)
    yield ""


def daemon_keys() -> Iterator[str]:
    """The daemon's file."""
    yield from (
        "## The daemon's file",
        "",
        "`provider-proxy.toml`: [configuration.md](configuration.md).",
        "",
    )
    yield from key_table("### Outside a table", [(tables.Config, "")])
    for name, kind in tables.TABLES.items():
        yield from key_table(f"### [{name}]", [(kind, f"{name}.")])
    yield from key_table(
        "### [registrars.NAME]", [(tables.NAMED_TABLES["registrars"], "registrars.NAME.")]
    )


def watch_keys() -> Iterator[str]:
    """The file of the watcher and the bridge."""
    yield from (
        "## The watcher's and the bridge's file",
        "",
        "`watch.toml`: [watch.md](watch.md); `[bridge]`: [bridge.md](bridge.md).",
        "",
    )
    yield from key_table("### Outside a table", [(watch_tables.WatchConfig, "")])
    hosts = "hosts.NAME."
    yield from key_table(
        "### [hosts.NAME], and [defaults] for all hosts", [(watch_tables.HostRules, hosts)]
    )
    yield from key_table(
        "### [registrars.NAME]", [(watch_tables.RegistrarTable, "registrars.NAME.")]
    )
    for name, kind in watch_tables.TABLES.items():
        if name != "defaults":
            yield from key_table(f"### [{name}]", [(kind, f"{name}.")])


def option_table(title: str, text: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """The section of a command: what it does, its arguments and options."""
    yield from ("", f"### {title}")
    if text:
        yield from ("", sentence(text))
    yield from ("", "| Option | Meaning |", "|---|---|")
    yield from option_rows(parser)


def option_rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The rows of a command's arguments and options."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        name = max(action.option_strings, key=len) if action.option_strings else name_of(action)
        yield f"| `{name.replace('|', ' or ')}` | {cell(help_of(action))} |"


def commands() -> Iterator[str]:
    """The section on commands."""
    yield COMMANDS_HEAD
    yield from ("| Exit code | Meaning |", "|---|---|")
    yield from (f"| {code} | {meaning} |" for code, meaning in EXIT_STATUS)
    parser = cli.build_parser()
    yield from option_table("Options of all commands", "", parser)
    for words, leaf, text in leaves(parser, ""):
        yield from option_table(f"`{words}`", text, leaf)


def cell(text: str) -> str:
    """Text as a cell of a table."""
    return " ".join(text.split()).replace("|", " or ")


def page() -> str:
    """The page."""
    return "\n".join([HEAD, *daemon_keys(), *watch_keys(), *commands()]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
