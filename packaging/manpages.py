"""Writes the manual pages: one for each command from its parser, and one for the configuration's keys.

    python packaging/manpages.py DIRECTORY

What a parser cannot say, examples above all, stands in `packaging/man/PAGE.txt`: sections begin with
"# TITLE", paragraphs are parted by empty lines, and indented lines are kept as they are. Nothing of
roff's own language is needed there, and nothing of it gets through.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from provider_proxy.cli import main as cli
from provider_proxy.common.settings.values import as_toml
from provider_proxy.common.version import program_version
from provider_proxy.host.config import tables

PROSE = Path(__file__).with_name("man")
PROGRAM = "provider-proxy"
CONFIG_PAGE = "provider-proxy.toml"
ESCAPES = {
    "\\": r"\e",
    "-": r"\-",
    "'": r"\(aq",
    "`": r"\(ga",
    "^": r"\(ha",
    "~": r"\(ti",
    "|": r"|\:",  # a line may end there
    "\u2026": "...",
}
EXIT_STATUS = (
    ("0", "good"),
    ("1", "refused: the evidence, the host or the record did not pass a check"),
    ("2", "usage: a wrong option, file content or configuration"),
    (
        "3",
        "environment: no TPM, no reply, a file missing, an extra not installed, a bug, or output that "
        "cannot be written (a full disk, a closed stdout; without a message if its reader has gone)",
    ),
)


def main() -> int:
    """Write all pages."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


def pages() -> dict[str, str]:
    """Each page's text by its file's name."""
    parser = cli.build_parser()
    commands = subparsers(parser)
    found = {f"{PROGRAM}.1": overview(parser, commands)}
    for name, sub in commands.items():
        found[f"{PROGRAM}-{name}.1"] = command_page(name, sub)
    found[f"{CONFIG_PAGE}.5"] = config_page()
    return found


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


# --- pages ------------------------------------------------------------------------------------------


def overview(parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser]) -> str:
    """provider-proxy(1)."""
    out = [
        *head(PROGRAM, 1, "one TPM quote for many tenants"),
        *synopsis(parser, PROGRAM),
        *prose(PROGRAM, "DESCRIPTION"),
        ".SH OPTIONS",
        *options(parser),
        ".SH COMMANDS",
    ]
    for name in commands:
        out += [".TP", rf".BR {escape(f'{PROGRAM}-{name}')} (1)", escape(cli.SUBCOMMANDS[name])]
    others = [f"{PROGRAM}-{name}(1)" for name in commands]
    return finish(out, PROGRAM, [*others, f"{CONFIG_PAGE}(5)"])


def command_page(name: str, parser: argparse.ArgumentParser) -> str:
    """The page of one command, its subcommands included."""
    page = f"{PROGRAM}-{name}"
    out = [*head(page, 1, cli.SUBCOMMANDS[name]), *synopsis(parser, f"{PROGRAM} {name}")]
    out += prose(page, "DESCRIPTION") or [".SH DESCRIPTION", escape(parser.description or "")]
    if rows := options(parser):
        out += [".SH OPTIONS", *rows]
    for words, leaf, help_text in leaves(parser, name):
        out += [f".SH {escape(words.upper())}", escape(sentence(help_text)), *usage(leaf, words)]
        out += options(leaf)
    return finish(out, page, [f"{PROGRAM}(1)", f"{CONFIG_PAGE}(5)"])


def config_page() -> str:
    """provider-proxy.toml(5)."""
    out = [*head(CONFIG_PAGE, 5, "configuration of provider-proxy(1)")]
    out += prose(CONFIG_PAGE, "DESCRIPTION")
    out += [".SH KEYS OUTSIDE A TABLE", *keys(tables.Config)]
    named = {f"{name}.NAME": kind for name, kind in tables.NAMED_TABLES.items()}
    del named["tenants.NAME"]  # the keys of [tenant_defaults]
    for table, kind in (tables.TABLES | named).items():
        out += [f".SH TABLE [{escape(table)}]"]
        out += keys(kind)
    return finish(out, CONFIG_PAGE, [f"{PROGRAM}(1)", f"{PROGRAM}-serve(1)"])


def keys(kind: type) -> Iterator[str]:
    """The keys of a table: name, default, meaning."""
    for field in dataclasses.fields(kind):
        if "doc" in field.metadata:
            yield from (".TP", rf"\fB{escape(field.name)}\fR")
            text = field.metadata["doc"]
            if field.default is not None:
                text += f" Default: {as_toml(field.metadata['read'], field.default)}."
            yield escape(text)


# --- parts of a page --------------------------------------------------------------------------------


def head(page: str, section: int, what: str) -> Iterator[str]:
    """The title and NAME. The day is SOURCE_DATE_EPOCH's, so that a build can be repeated."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    day = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d")
    title = escape(page.upper())
    yield f'.TH "{title}" "{section}" "{day}" "provider-proxy {program_version()}"'
    yield from (".nh", ".ad l", ".SH NAME", rf"{escape(page)} \- {escape(what)}")


def synopsis(parser: argparse.ArgumentParser, words: str) -> Iterator[str]:
    """How it is called: one line a command that runs."""
    yield ".SH SYNOPSIS"
    found = list(leaves(parser, words.partition(" ")[2]))
    if not found or words == PROGRAM:
        yield from usage(parser, words.partition(" ")[2])
    else:
        for each, leaf, _ in found:
            yield from usage(leaf, each)


def usage(parser: argparse.ArgumentParser, words: str) -> Iterator[str]:
    """A command's words, options and arguments."""
    yield ".PP"
    parts = [rf"\fB{escape(f'{PROGRAM} {words}'.strip())}\fR"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        text = escape(name_of(action))
        if action.option_strings:
            text = rf"\fB{escape(action.option_strings[-1])}\fR"
            text += rf" \fI{escape(name_of(action))}\fR" if action.nargs != 0 else ""
            parts.append(text if action.required else f"[{text}]")
        else:
            parts.append(rf"\fI{text}\fR" if action.nargs not in ("?", "*") else rf"[\fI{text}\fR]")
    yield " ".join(parts)


def options(parser: argparse.ArgumentParser) -> list[str]:
    """Arguments and options with their help."""
    out: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        if action.option_strings:
            flags = ", ".join(rf"\fB{escape(flag)}\fR" for flag in action.option_strings)
            value = rf" \fI{escape(name_of(action))}\fR" if action.nargs != 0 else ""
        else:
            flags, value = rf"\fI{escape(name_of(action))}\fR", ""
        out += [".TP", flags + value, escape(help_of(action))]
    return out


def name_of(action: argparse.Action) -> str:
    """What stands for an action's value."""
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    return action.dest.upper()


def help_of(action: argparse.Action) -> str:
    """An action's help, as `--help` shows it, and what it may be."""
    text = (action.help or "") % {**vars(action), "prog": PROGRAM}
    if action.choices is not None and isinstance(action.metavar, str):
        text += f" ({', '.join(map(str, action.choices))})"
    return sentence(text)


def leaves(
    parser: argparse.ArgumentParser, words: str
) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """The subcommands below a command that run: words, parser, help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, sub in action.choices.items():
                below = list(leaves(sub, f"{words} {name}".strip()))
                yield from below or [(f"{words} {name}".strip(), sub, helps.get(name, ""))]


def prose(page: str, *only: str, but: tuple[str, ...] = ()) -> list[str]:
    """Sections of a page's text file as roff; none where there is no file."""
    path = PROSE / f"{page}.txt"
    if not path.exists():
        return []
    out: list[str] = []
    for section in re.split(r"^# ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if title in but or (only and title not in only):
            continue
        out.append(f".SH {escape(title)}")
        for block in re.split(r"\n{2,}", body.strip("\n")):
            if block.startswith("    "):
                lines = [escape(line.removeprefix("    ")) for line in block.splitlines()]
                out += [".PP", ".nf", ".RS 4", *lines, ".RE", ".fi"]
            else:
                out += [".PP", *map(escape, block.splitlines())]
    return out


def finish(out: list[str], page: str, see: list[str]) -> str:
    """The sections that every page ends with."""
    out += prose(page, but=("DESCRIPTION",))
    if page != CONFIG_PAGE:
        out.append(".SH EXIT STATUS")
        for code, meaning in EXIT_STATUS:
            out += [".TP", rf"\fB{code}\fR", escape(sentence(meaning))]
    out.append(".SH SEE ALSO")
    for number, name in enumerate(see):
        base, _, section = name.partition("(")
        comma = "," if number < len(see) - 1 else ""
        out.append(rf".BR {escape(base)} ({section}{comma}")
    lines = [
        line
        for before, line in zip(["", *out], out, strict=False)
        if not (line == ".PP" and before.startswith(".SH"))
    ]
    return "\n".join(lines) + "\n"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if not text or text[-1] in ".:" else ".")


def escape(text: str) -> str:
    """Text that roff shows as it is: options keep their hyphens, and no line is a request."""
    text = "".join(ESCAPES.get(char, char) for char in text)
    return rf"\&{text}" if text.startswith(".") else text


if __name__ == "__main__":
    sys.exit(main())
