"""`registrations` ends with 1 where a person must act, whatever the daemon has it beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from provider_proxy.cli import main as cli
from provider_proxy.cli.ask_admin import AdminClient
from provider_proxy.trust.registration.state import State

NEEDS_YOU = {"conflict", "unread", "refused", "wrong_challenge"}


def ask(states: list[object], folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    listed: list[dict[str, Any]] = [
        {"registrar": "acme", "url": "https://r", "agent_id": "h", "tenant": "acme", "state": state}
        for state in states
    ]
    monkeypatch.setattr(AdminClient, "get", lambda *_: {"registrations": listed})
    path = folder / "proxy.toml"
    listen = '[listen]\naddress = "127.0.0.1:0"\ninsecure_plaintext = true\n'
    path.write_text(listen + '[admin]\naddress = "127.0.0.1:8895"\n')
    return cli.run(["registrations", "--config", str(path), *words])


@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_the_exit_code_says_whether_a_person_must_act(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = 1 if state.value in NEEDS_YOU else 0
    assert ask([state.value], tmp_path, monkeypatch) == expected
    assert f"acme: {state.value}, since" in capsys.readouterr().out
    assert ask(["registered", state.value], tmp_path, monkeypatch, "--json") == expected
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["state"] for each in last["registrations"]] == ["registered", state.value]


@pytest.mark.parametrize("odd", [None, 7, ["conflict"], {"a": 1}])
def test_a_state_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: object) -> None:
    assert ask([odd], tmp_path, monkeypatch) == 0
