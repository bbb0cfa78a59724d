"""What packages bring beside the code: manual pages and completion hold every command and option, and
the programs that read them have no complaint."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from places import ROOT
from scripts import load_script

from provider_proxy.cli import main as cli
from provider_proxy.host.config import load as config
from provider_proxy.host.config import tables
from provider_proxy.host.config.chip_tables import Tpm

LIMIT_S = 60


PAGES: dict[str, str] = load_script("packaging/manpages").pages()
SCRIPTS: dict[str, str] = load_script("packaging/completion").scripts()


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command and group of commands."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from commands(sub, (*words, name))


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {
        flag
        for action in parser._actions
        for flag in action.option_strings
        if not isinstance(action, argparse._HelpAction)
    }


COMMANDS = dict(commands(cli.build_parser()))


def run(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, words)),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


# --- manual pages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """The pages as man shows them, without its warnings: there are none."""
    found = {}
    for name, text in PAGES.items():
        done = run(*("man", "--warnings=w", "--no-hyphenation", "-l", "-P", "cat", "-"), stdin=text)
        assert (done.returncode, done.stderr) == (0, ""), name
        found[name] = done.stdout
    return found


def page_of(words: tuple[str, ...]) -> str:
    return "-".join(["provider-proxy", *words[:1]]) + ".1"


@pytest.mark.real
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_its_page(
    words: tuple[str, ...], shown: dict[str, str]
) -> None:
    text = shown[page_of(words)]
    assert " ".join(["provider-proxy", *words]) in " ".join(text.split())
    for flag in options(COMMANDS[words]):
        assert re.search(rf"^ +{flag}( |$)", text, re.MULTILINE), flag
    if words:
        assert f"provider-proxy-{words[0]}(1)" in shown["provider-proxy.1"]


@pytest.mark.real
def test_every_key_is_on_the_configuration_s_page(shown: dict[str, str]) -> None:
    text = shown["provider-proxy.toml.5"]
    registrars = {"registrars.NAME": tables.NAMED_TABLES["registrars"]}
    for table, kind in (tables.TABLES | registrars).items():
        section = re.split(r"^\S", text.partition(f"TABLE [{table}]")[2], flags=re.MULTILINE)[0]
        for name in kind.__dataclass_fields__:
            assert re.search(rf"^ +{name}( |$)", section, re.MULTILINE), f"{table}.{name}"


@pytest.mark.real
@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
@pytest.mark.parametrize("name", PAGES)
def test_mandoc_has_no_complaint(name: str) -> None:
    done = run("mandoc", "-T", "lint", "-W", "warning", stdin=PAGES[name])
    assert (done.returncode, done.stdout) == (0, "")


def test_nothing_of_a_text_is_taken_for_roff() -> None:
    escape = load_script("packaging/manpages").escape
    assert escape(".SH x") == r"\&.SH x"
    assert escape("'x") == r"\(aqx"
    assert escape(r"a\fBb") == r"a\efBb"


def examples() -> list[str]:
    found = []
    for path in sorted((ROOT / "packaging/man").glob("*.txt")):
        found += re.findall(r"^    (provider-proxy .*)$", path.read_text(), re.MULTILINE)
    return found


@pytest.mark.parametrize("line", examples())
def test_examples_parse(line: str) -> None:
    words = shlex.split(line)[1:]
    assert cli.build_parser(words[0]).parse_args(words).command == words[0]


def test_pages_prose_belongs_to_a_page() -> None:
    pages = {name.rpartition(".")[0] for name in PAGES}
    assert {path.stem for path in (ROOT / "packaging/man").glob("*.txt")} <= pages


# --- completion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SCRIPTS)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_option_is_completed(shell: str, words: tuple[str, ...]) -> None:
    text = SCRIPTS[shell]
    for flag in options(COMMANDS[words]):
        spelt = {"fish": rf"-l {flag[2:]}\b", "bash": rf"\b{flag[2:]}\b"}.get(
            shell, re.escape(flag)
        )
        assert re.search(spelt, text), flag
    for word in words:
        assert re.search(rf"\b{re.escape(word)}\b", text)


BASH = """
source /dev/stdin
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
COMP_WORDS=($1); [[ $1 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
$(complete -p provider-proxy | sed 's/.*-F \\([^ ]*\\).*/\\1/') provider-proxy "${COMP_WORDS[-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(line: str) -> set[str]:
    done = run("bash", "--norc", "-c", BASH, "bash", line, stdin=SCRIPTS["bash"])
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.real
def test_bash_completes() -> None:
    assert completed("provider-proxy fe") == {"fetch"}
    assert completed("provider-proxy pin ") >= {"add", "list", "remove"}
    assert completed("provider-proxy fetch --pc") == {"--pcrs"}
    assert completed("provider-proxy tpm ak export --form") == {"--format"}


@pytest.mark.real
@pytest.mark.parametrize(
    ("shell", "words"), [("bash", ["-n"]), ("zsh", ["-n"]), ("fish", ["--no-execute"])]
)
def test_shells_can_read_their_scripts(shell: str, words: list[str], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(SCRIPTS[shell])
    done = run(shell, *words, path)
    assert (done.returncode, done.stderr) == (0, "")


# --- the Debian package -----------------------------------------------------------------------------


def test_the_configuration_that_the_package_brings_is_one() -> None:
    text = (ROOT / "packaging/debian/provider-proxy.toml").read_text()
    found = config.parse_config(tomllib.loads(text))
    assert found.listen.address == tables.Listen().address
    assert found.tpm == Tpm()
    commented = re.sub(r"^#(?=[\[a-z])", "", text, flags=re.MULTILINE)
    assert "acme" in config.parse_config(tomllib.loads(commented)).tenants


@pytest.mark.parametrize(
    "name",
    [
        "packaging/assemble.sh",
        "packaging/build-deb.sh",
        "packaging/debian/postrm",
        "packaging/debian/prerm",
        "tests/system/test-deb.sh",
    ],
)
def test_scripts_are_well_formed(name: str) -> None:
    path = ROOT / name
    shell = path.read_text().splitlines()[0].removeprefix("#!")
    done = run(shell, "-n", path)
    assert (done.returncode, done.stderr) == (0, "")


def test_replay_of_an_ima_list() -> None:
    """Entries of both templates, a name with blanks, and a violation; a list that grew meanwhile."""
    ima = load_script("tests/system/kvm/ima")
    digest = "sha256:" + "ab" * 32
    lines = [
        f"10 {'11' * 20} ima-ng {digest} /bin/a b",
        f"10 {'11' * 20} ima-sig {digest} /bin/a b ",
        f"10 {'11' * 20} ima-sig {digest} /bin/a 0302",
        f"10 {'00' * 20} ima-sig sha256:{'00' * 32} /var/log/x ",
    ]
    value = bytes(32)
    for line in lines:
        value = sha256(value + ima.extended(line)).digest()
    log = "\n".join([*lines, lines[0], ""])
    assert ima.matching_prefix(log, value) == (4, 5)
    assert ima.matching_prefix(log, sha256(value).digest()) is None
    assert ima.extended(lines[3]) == b"\xff" * 32
    field = b"sha256:\0" + b"\xab" * 32
    own = b"\x28\0\0\0" + field + b"\x09\0\0\0/bin/a b\0"
    assert ima.extended(lines[0]) == sha256(own).digest()
    assert ima.extended(lines[1]) == sha256(own + bytes(4)).digest()
    assert ima.extended(lines[2]) != ima.extended(lines[1])
