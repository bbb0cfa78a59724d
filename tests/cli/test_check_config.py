"""`check-config`, for each of the files that the programs read."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from provider_proxy.cli import main as cli

WATCH = '[hosts.a]\nprovider_ip = "192.0.2.7"\ninsecure_any_state = true\n'
AGENT = "00000000-0000-0000-0000-000000000001"
TENANT = (
    'pins = "p"\n[hosts.a]\nurl = "https://a"\ninsecure_any_state = true\n'
    f'[agents.{AGENT}]\nhosts = ["a"]\n'
)


@pytest.mark.parametrize(
    ("program", "text", "key", "value", "line"),
    [
        ("watch", WATCH, "hosts.a.provider_ip", "192.0.2.7", 2),
        ("ek-check", TENANT, "hosts.a.url", "https://a", 3),
        ("ek-check", TENANT, f"agents.{AGENT}.hosts", ["a"], 6),
    ],
)
def test_each_program_s_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    program: str,
    text: str,
    key: str,
    value: Any,
    line: int,
) -> None:
    path = tmp_path / "file.toml"
    path.write_text(text)
    argv = ["check-config", "--for", program, "--config", str(path)]
    assert cli.run([*argv, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["keys"][key]
    assert shown == {"value": value, "from": "file", "file": str(path), "line": line}
    assert cli.run(argv) == 0
    document = tomllib.loads(capsys.readouterr().out)
    for name in key.split("."):
        document = document[name]
    assert document == value
    path.write_text(text + "provider_prot = 1\n")
    assert cli.run(argv) == 2
    assert f"{path}:{text.count(chr(10)) + 1}: " in capsys.readouterr().err
