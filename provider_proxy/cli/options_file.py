"""A command's options from a TOML file, for commands that need many of them.

A key of the file is the name of an option without its dashes, or of an argument:
`registrar-ca = "ca.crt"`. A switch takes `true`, an option that may be repeated takes a list. Relative
paths begin at the file's folder. What the command line says comes later and wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from provider_proxy.common.settings.document import Document, Layout, read_document
from provider_proxy.common.settings.values import fail
from provider_proxy.errors import ConfigError

OPTION = "--options"
LAYOUT = Layout(max_bytes=64 * 1024)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the option on a command's parser; `expanded` acts on it."""
    parser.add_argument(
        OPTION,
        metavar="FILE",
        help="a TOML file with options of this command, named without dashes; "
        "the command line overrides it",
    )


def expanded(
    argv: Sequence[str], command: str, parser: argparse.ArgumentParser | None
) -> Sequence[str]:
    """The command line with the words of the file that it names, right after the command.

    Args:
        parser: the command's; None where there is no such command.

    Raises:
        HostError: the file cannot be read, or everybody can write it.
        ConfigError: it is not TOML, or has an unknown key or a wrong value; the message names its line.
    """
    if parser is None or OPTION not in parser._option_string_actions:
        return argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(OPTION, type=Path)
    path: Path | None = finder.parse_known_args(argv)[0].options
    if path is None:
        return argv
    at = list(argv).index(command) + 1
    document = read_document(path, LAYOUT)
    return [*argv[:at], *_words(parser, document, path.parent), *argv[at:]]


def _words(parser: argparse.ArgumentParser, document: Document, folder: Path) -> Iterator[str]:
    """What the file says, as words of a command line."""
    actions = {
        (action.option_strings[-1].lstrip("-") if action.option_strings else action.dest): action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction) and OPTION not in action.option_strings
    }
    for key, value in document.data.items():
        try:
            action = actions.get(key)
            if action is None:
                known = ", ".join(sorted(actions))
                raise ConfigError(f"{key} is not an option; the known options are {known}", key=key)
            yield from _words_of(action, key, value, folder)
        except ConfigError as exc:
            raise document.located(exc) from exc


def _words_of(action: argparse.Action, key: str, value: object, folder: Path) -> Iterator[str]:
    """One option's words."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise fail(key, "true or false")
        if value:
            yield action.option_strings[-1]
        return
    several = isinstance(action, argparse._AppendAction)
    values = value if several and isinstance(value, list) else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise fail(key, "text or a number" + (", or a list of them" if several else ""))
        word = str(folder / str(item)) if action.type is Path else str(item)
        # One word, so that a value that begins with a dash is still a value.
        yield f"{action.option_strings[-1]}={word}" if action.option_strings else word
