"""Writes the shells' completion scripts from the parsers: bash, zsh and fish, by shtab.

    python packaging/completion.py DIRECTORY

Files are named as each shell wants them in its own directory: provider-proxy, _provider-proxy and
provider-proxy.fish.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import shtab

from provider_proxy.cli import main as cli

NAMES = {"bash": "provider-proxy", "zsh": "_provider-proxy", "fish": "provider-proxy.fish"}


def main() -> int:
    """Write all scripts."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for shell, text in scripts().items():
        (folder / NAMES[shell]).write_text(text, encoding="utf-8")
    return 0


def scripts() -> dict[str, str]:
    """Each shell's script."""
    parser = cli.build_parser()
    for action in actions_of(parser):
        if action.type is Path:
            kind = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
            action.complete = kind  # type: ignore[attr-defined]  # where shtab looks for it
    return {shell: shtab.complete(parser, shell=shell) for shell in NAMES}


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every action of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from actions_of(sub)


if __name__ == "__main__":
    sys.exit(main())
