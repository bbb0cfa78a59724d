"""`--options FILE`: the file says what the command line would say, and the command line wins."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from provider_proxy.cli import options_file
from provider_proxy.cli.main import EXIT_ENVIRONMENT, EXIT_USAGE, build_parser, run, sub_parser
from provider_proxy.errors import ConfigError, HostError

FILE = """\
url = "https://host-17.provider.example:8890"
ca = "provider-ca.crt"
pinned = "host-17"
pins = "/var/lib/pins"
registrar = "https://registrar.acme.example:8891"
verifier = "https://verifier.acme.example:8881"
tpm-policy = "policy.json"
ek-ca = ["one", "/two"]
insecure-virtual-ek = true
json = false
max-age = 7.5
"""


def parsed(text: str, folder: Path, *words: str) -> argparse.Namespace:
    file = folder / "host-17.toml"
    file.write_text(text, encoding="utf-8")
    argv = ["keylime-check", "--options", str(file), *words]
    parser = build_parser("keylime-check")
    sub = sub_parser(parser, "keylime-check")
    return parser.parse_args(options_file.expanded(argv, "keylime-check", sub))


def test_the_file_says_what_the_command_line_would_say(tmp_path: Path) -> None:
    args = parsed(FILE, tmp_path)
    assert str(args.url) == "https://host-17.provider.example:8890"
    assert args.ca == tmp_path / "provider-ca.crt"  # beside the file, wherever the command runs
    assert args.pins == Path("/var/lib/pins")
    assert args.ek_ca == [tmp_path / "one", Path("/two")]
    assert args.insecure_virtual_ek is True
    assert args.json is False
    assert args.max_age == 7.5


def test_the_command_line_wins(tmp_path: Path) -> None:
    args = parsed(FILE, tmp_path, "--max-age", "3", "--json", "--tpm-policy", "other.json")
    assert (args.max_age, args.json, args.tpm_policy) == (3, True, Path("other.json"))


def test_a_value_that_begins_with_a_dash_is_a_value(tmp_path: Path) -> None:
    args = parsed(FILE.replace('"host-17"', '"-host"'), tmp_path)
    assert args.pinned == "-host"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("registar = 1", "host-17.toml:12: registar is not an option; the known options are "),
        ("options = 'x'", "host-17.toml:12: options is not an option"),
        ("help = true", "host-17.toml:12: help is not an option"),
        ("insecure-no-ek = 1", "insecure-no-ek must be true or false"),
        ("agent-id = true", "agent-id must be text or a number"),
        ("agent-id = ['a']", "agent-id must be text or a number"),
        ("[agent-id]\nx = 1", "agent-id must be text or a number"),
        ("agent-id = 'x", "a quote is opened and not closed"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why.replace(".", r"\.")):
        parsed(FILE + text, tmp_path)


def test_a_file_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    parsed(FILE, tmp_path)
    (tmp_path / "host-17.toml").chmod(0o666)
    parser = build_parser("keylime-check")
    argv = ["keylime-check", "--options", str(tmp_path / "host-17.toml")]
    with pytest.raises(HostError, match="chmod o-w"):
        options_file.expanded(argv, "keylime-check", sub_parser(parser, "keylime-check"))


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keylime-check", "--options", str(tmp_path / "none.toml")]) == EXIT_ENVIRONMENT
    (tmp_path / "bad.toml").write_text("x = 1")
    assert run(["keylime-check", f"--options={tmp_path}/bad.toml"]) == EXIT_USAGE
    assert "bad.toml:1: x is not an option" in capsys.readouterr().err
