"""The watcher's file as `bridge` reads it: what it needs beyond `watch`, and what it may leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from provider_proxy.cli.main import run
from provider_proxy.errors import ConfigError
from provider_proxy.tenant.bridge.admin import _host
from provider_proxy.tenant.watch.config import load_watch_config, parse_watch_config

HOST = {"provider_ip": "192.0.2.1"}
MINE = {"url": "https://registrar.example:8891", "insecure_no_ek": True}
BRIDGE = {"registrar": "mine", "client_ca": "ca.crt"}


def parse(bridge: dict[str, Any] | None = None, host: dict[str, Any] | None = None) -> Any:
    values = {
        "bridge": BRIDGE | (bridge or {}),
        "registrars": {"mine": MINE},
        "hosts": {"h": HOST | (host or {})},
    }
    return parse_watch_config(values, for_bridge=True)


def test_a_host_needs_no_policy_here_and_one_for_watch() -> None:
    assert parse().hosts["h"].provider_ip == "192.0.2.1"
    with pytest.raises(ConfigError, match=r"hosts\.h has no policy"):
        parse_watch_config({"hosts": {"h": HOST}})


@pytest.mark.parametrize(
    ("bridge", "host", "message"),
    [
        ({"registrar": "other"}, {}, r"bridge\.registrar must name"),
        ({"client_ca": ""}, {}, r"bridge\.client_ca must be a path"),
        ({"first_port": 30_000}, {}, "first_port must be <= bridge.last_port"),
        ({"first_port": 0}, {}, "first_port must be >= 1"),
        ({"verifier_cert": "x"}, {}, "verifier_cert and verifier_key belong together"),
        ({"verifier_url": "http://127.0.0.1:1"}, {}, "verifier_url must be an https URL"),
        ({"verifier_url": "http://192.0.2.1"}, {}, "verifier_url must be"),
        ({"admin": "192.0.2.1:8897"}, {}, "admin must be a loopback address"),
        ({"listen_ip": "name.example"}, {}, "listen_ip must be an IP address"),
        ({"hold_s": 0}, {}, "hold_s must be >= 0.1"),
        ({"after_crash": "ignore"}, {}, "after_crash must be one of"),
        ({"unknown": 1}, {}, r"bridge\.unknown is not a key"),
        ({}, {"bank": "sha384"}, r'hosts\.h\.bank must be "sha256"'),
    ],
)
def test_what_is_wrong_is_named(bridge: dict[str, Any], host: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(bridge, host)


def test_without_client_ca_nobody_may_ask() -> None:
    with pytest.raises(
        ConfigError, match="set it to the CA of your verifier's client certificates"
    ):
        parse_watch_config(
            {"bridge": {"registrar": "mine"}, "registrars": {"mine": MINE}, "hosts": {"h": HOST}},
            for_bridge=True,
        )


PUSHED = """
state_dir = "state"
[bridge]
registrar = "mine"
verifier_url = "https://127.0.0.1:1"
[registrars.mine]
url = "https://registrar.example:8891"
insecure_no_ek = true
[hosts.h]
provider_ip = "192.0.2.1"
mode = "push"
"""


def test_a_host_that_is_pushed_needs_a_verifier_and_no_client_ca(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"hosts\.h\.mode = push needs bridge\.verifier_url"):
        parse(host={"mode": "push"})
    file = tmp_path / "bridge.toml"
    file.write_text(PUSHED)
    assert load_watch_config(file, for_bridge=True).hosts["h"].mode == "push"
    assert run(["bridge", "reactivate", "h", "--config", str(file)]) == 2
    assert "delete the agent at the verifier and add it again" in capsys.readouterr().err
    file.write_text(PUSHED.replace('mode = "push"', ""))
    with pytest.raises(ConfigError, match=r"bridge\.client_ca"):
        load_watch_config(file, for_bridge=True)


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("127.0.0.1:8897", "127.0.0.1"),
        ("[::1]:8897", "::1"),
        ("evil.example", "evil.example"),
    ],
)
def test_the_admin_listener_reads_its_name(header: str, host: str) -> None:
    assert _host(header) == host


def test_keys_for_a_credential_are_made_once(tmp_path: Path) -> None:

    path = tmp_path / "keys.pem"
    assert run(["bridge", "make-keys", "--out", str(path), "--ip", "192.0.2.5"]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    assert run(["bridge", "make-keys", "--out", str(path), "--ip", "192.0.2.5"]) == 2
    assert path.read_bytes() == before
    assert run(["bridge", "make-keys", "--out", str(tmp_path / "x"), "--ip", "no"]) == 2
