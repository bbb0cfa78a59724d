"""The watcher's file: keys, bounds, what belongs together, drop-ins, any bytes; and the state file."""

from __future__ import annotations

import dataclasses
import json
import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider_proxy.common.settings import document
from provider_proxy.errors import ConfigError, HostError, ProviderProxyError
from provider_proxy.evidence.model import AkName, ClockState, HashAlg
from provider_proxy.tenant.watch.config import (
    load_watch,
    load_watch_config,
    parse_watch_config,
)
from provider_proxy.tenant.watch.store import FILE_NAME, StateStore, parse_state
from provider_proxy.tenant.watch.tables import (
    OWN_KEYS,
    TABLES,
    HostRules,
    RegistrarTable,
    WatchConfig,
)

HOST: dict[str, Any] = {"provider_ip": "192.0.2.7", "insecure_any_state": True}
AK = AkName(b"\0\x0b" + bytes(32))


def parse(host: dict[str, Any] | None = None, **top: Any) -> WatchConfig:
    return parse_watch_config({"hosts": {"h": HOST if host is None else host}, **top})


def test_a_small_file() -> None:
    config = parse()
    rules = config.hosts["h"]
    assert (rules.provider_ip, rules.provider_port) == ("192.0.2.7", 8890)
    assert rules.need_provider_quote
    assert rules.interval_s == 10


def test_defaults_are_the_hosts_and_a_host_s_own_word_counts() -> None:
    config = parse_watch_config(
        {
            "defaults": {"interval_s": 5, "insecure_any_state": True, "bank": "sha384"},
            "hosts": {
                "a": {"provider_ip": "192.0.2.1"},
                "b": {"provider_ip": "host.example", "interval_s": 7, "need_provider_quote": False},
            },
        }
    )
    assert config.hosts["a"].interval_s == 5
    assert config.hosts["a"].bank is HashAlg.SHA384
    assert config.hosts["b"].interval_s == 7
    assert not config.hosts["b"].need_provider_quote


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hosts": {}}, "hosts must be"),
    ({"hosts": 1}, "hosts must be"),
    ({"hosts": {"a b": HOST}}, "hosts.a b must be a name"),
    ({"hosts": {"../x": HOST}}, "must be a name"),
    ({"hosts": {"h": 1}}, "hosts.h must be a table"),
    ({"hosts": {"h": {**HOST, "ip": "x"}}}, "hosts.h.ip is not a key"),
    ({"hosts": {"h": {"insecure_any_state": True}}}, "hosts.h.provider_ip is missing"),
    ({"hosts": {"h": {"provider_ip": "192.0.2.1"}}}, "hosts.h has no policy"),
    ({"hosts": {"h": {**HOST, "ima": True}}}, "must not be set together with a policy"),
    ({"hosts": {"h": {**HOST, "provider_ip": "a b"}}}, "provider_ip must be"),
    ({"hosts": {"h": {**HOST, "provider_ip": ""}}}, "provider_ip must be"),
    ({"hosts": {"h": {**HOST, "provider_port": 0}}}, "provider_port must be >= 1"),
    ({"hosts": {"h": {**HOST, "provider_port": "8890"}}}, "a whole number"),
    ({"hosts": {"h": {**HOST, "need_provider_quote": "True"}}}, "true or false"),
    ({"hosts": {"h": {**HOST, "insecure_plaintext": True}}}, "on loopback only"),
    ({"hosts": {"h": {**HOST, "tls_cert": "x"}}}, "belong together"),
    ({"hosts": {"h": {**HOST, "tls_key": "x"}}}, "belong together"),
    (
        {"hosts": {"h": {**HOST, "provider_ip": "::1", "insecure_plaintext": True, "tls_ca": "x"}}},
        "must not be set together with TLS files",
    ),
    ({"hosts": {"h": {**HOST, "first_use_pcrs": [0]}}}, "belong together"),
    ({"hosts": {"h": {**HOST, "insecure_trust_on_first_use": True}}}, "belong together"),
    ({"hosts": {"h": {**HOST, "runtime_policy": "x"}}}, "runtime_policy needs ima"),
    ({"hosts": {"h": {**HOST, "boot_policy": "x"}}}, "boot_policy needs uefi"),
    (
        {"hosts": {"h": {"provider_ip": "192.0.2.1", "uefi": True, "uefi_pcrs": []}}},
        "uefi_pcrs must name",
    ),
    ({"hosts": {"h": {**HOST, "timeout_s": 61}}}, "timeout_s must be <= max_age_s"),
    ({"hosts": {"h": {**HOST, "interval_s": 0}}}, "interval_s must be >= 0.1"),
    ({"hosts": {"h": {**HOST, "jitter": 0.6}}}, "jitter must be <= 0.5"),
    ({"hosts": {"h": {**HOST, "on_invalid": "ignore"}}}, "on_invalid must be one of"),
    ({"hosts": {"h": {**HOST, "bank": "md5"}}}, "bank must be one of"),
    ({"hosts": {"h": {**HOST, "pin": "../x"}}}, "pin must be a name"),
    ({"hosts": {"h": {**HOST, "vm": "x"}}}, "vm must be a UUID"),
    ({"hosts": {"h": HOST}, "defaults": {"provider_ip": "192.0.2.1"}}, "belongs in"),
    ({"hosts": {"h": HOST}, "defaults": {"pin": "x"}}, "defaults.pin belongs in"),
    ({"hosts": {"h": HOST}, "webhook": {"url": "ftp://x"}}, "webhook.url must be"),
    ({"hosts": {"h": HOST}, "webhook": {"url": "https://x"}}, "secret_file is missing"),
    (
        {"hosts": {"h": HOST}, "webhook": {"url": "http://x.example/", "secret_file": "s"}},
        "webhook.url must be an https URL",
    ),
    (
        {
            "hosts": {"h": HOST},
            "webhook": {"url": "http://127.0.0.1@x.example/", "secret_file": "s"},
        },
        "webhook.url must be an https URL",
    ),
    (
        {
            "hosts": {"h": HOST},
            "webhook": {"url": "http://x.example?@127.0.0.1/", "secret_file": "s"},
        },
        "webhook.url must be an https URL",
    ),
    ({"hosts": {"h": HOST}, "command": {"argv": []}}, "command.argv must be"),
    ({"hosts": {"h": HOST}, "command": {"argv": ["mail"]}}, "absolute path"),
    ({"hosts": {"h": HOST}, "command": {"argv": "mail x"}}, "command.argv must be"),
    ({"hosts": {"h": HOST}, "metrics": 1}, "metrics must be a table"),
    ({"hosts": {"h": HOST | {"round_limit_s": 0}}}, "hosts.h.round_limit_s must be >= 0.1"),
    ({"hosts": {"h": HOST}, "intervall": 1}, "intervall is not a key"),
]


@pytest.mark.parametrize(("data", "why"), BAD)
def test_what_is_wrong_is_named(data: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_watch_config(data)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "http://[::1]:1/", "http://localhost/"])
def test_a_webhook_on_loopback_may_do_without_tls(url: str) -> None:
    assert parse(webhook={"url": url, "secret_file": "s"}).webhook.url == url


def test_what_is_a_host_s_own_is_not_in_the_defaults() -> None:
    assert set(OWN_KEYS) <= {f.name for f in dataclasses.fields(HostRules)}


def test_drop_ins_add_hosts(tmp_path: Path) -> None:
    path = tmp_path / "watch.toml"
    path.write_text('[defaults]\ntpm_policy = "p.json"\n')
    extra = tmp_path / "hosts.d"
    extra.mkdir()
    (extra / "a.toml").write_text('[hosts.a]\nprovider_ip = "192.0.2.1"\n')
    (extra / "b.toml").write_text('[hosts.b]\nprovider_ip = "192.0.2.2"\n')
    config = load_watch_config(path)
    assert sorted(config.hosts) == ["a", "b"]
    assert config.hosts["a"].tpm_policy == tmp_path / "p.json"  # beside the file that names it
    for text, why in (
        ('[hosts.a]\nprovider_ip = "192.0.2.3"\n', "hosts.a is defined in another file already"),
        ("state_dir = 'x'\n", "may hold only"),
        ("[hosts", "c.toml"),
    ):
        (extra / "c.toml").write_text(text)
        with pytest.raises(ConfigError, match=why):
            load_watch_config(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        load_watch_config(tmp_path / "none.toml")


KINDS: list[type[Any]] = [WatchConfig, RegistrarTable, *TABLES.values()]
KEYS = st.sampled_from(
    [
        *("hosts", "registrars", "h", "x", "", *TABLES),
        *(f.name for kind in KINDS for f in dataclasses.fields(kind)),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_document_gives_typed_errors_alone(data: dict[str, Any]) -> None:
    try:
        config = parse_watch_config(data)
    except ConfigError:
        return
    assert config.hosts


# --- the state file -----------------------------------------------------------------------------------


def state(clock_ms: int) -> ClockState:
    return ClockState(reset_count=1, restart_count=0, clock_ms=clock_ms)


def is_dirty(store: StateStore) -> bool:
    return store.is_dirty


def test_what_was_accepted_is_there_after_a_restart(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.open()
    assert not is_dirty(store)
    store.history("h", AK, None).accept(state(5))
    store.trust_first_use("h", AK, {0: bytes(32)})
    assert is_dirty(store)
    store.write(store.snapshot())
    assert not is_dirty(store)
    store.close()
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o077 == 0
    again = StateStore(tmp_path)
    again.open()
    assert again.history("h", AK, None).newest() == state(5)
    assert again.first_use("h", AK) == {0: bytes(32)}
    assert again.history("h", AkName(AK[:-1] + b"x"), None).newest() is None
    assert again.first_use("h", AkName(AK[:-1] + b"x")) is None
    again.close()


def test_an_older_state_changes_nothing(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    history = store.history("h", AK, state(9))
    history.accept(state(5))
    assert history.newest() == state(9)
    assert not is_dirty(store)
    assert store.history("h", AK, state(12)) is history
    assert history.newest() == state(12)


def test_a_host_that_is_not_watched_for_a_while_is_not_forgotten(tmp_path: Path) -> None:
    for name in ("a", "b"):
        store = StateStore(tmp_path)
        store.open()
        store.history(name, AK, None).accept(state(5))
        store.write(store.snapshot())
        store.close()
    records = parse_state((tmp_path / FILE_NAME).read_bytes(), tmp_path)
    assert sorted(records) == ["a", "b"]


def test_one_watcher_a_directory(tmp_path: Path) -> None:
    first, second = StateStore(tmp_path), StateStore(tmp_path)
    first.open()
    with pytest.raises(HostError, match="another watcher"):
        second.open()
    first.close()
    second.open()
    second.close()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"format":"provider-proxy/watch-state/2","hosts":{}}',
        b'{"format":"provider-proxy/watch-state/1"}',
        b'{"format":"provider-proxy/watch-state/1","hosts":{"h":1}}',
        b'{"format":"provider-proxy/watch-state/1","hosts":{"h":{"ak_name":"zz"}}}',
        b'{"format":"provider-proxy/watch-state/1","hosts":{"h":{"ak_name":"00","newest":{}}}}',
    ],
)
def test_a_damaged_state_is_no_fresh_start(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)
    store = StateStore(tmp_path)
    with pytest.raises(HostError, match="is damaged"):
        store.open()
    store.close()


def test_a_state_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError):
        StateStore(tmp_path / "file" / "x").open()


@given(st.binary(max_size=80) | st.dictionaries(KEYS, VALUES).map(lambda v: json.dumps(v).encode()))
def test_any_state_gives_typed_errors_alone(data: bytes) -> None:
    try:
        parse_state(data, Path(os.devnull))
    except ProviderProxyError:
        return


# --- the files ----------------------------------------------------------------------------------------

PLAIN_HOST = 'provider_ip = "192.0.2.7"\ninsecure_any_state = true\n'


@pytest.fixture
def main(tmp_path: Path) -> Path:
    path = tmp_path / "watch.toml"
    path.write_text(f"[hosts.a]\n{PLAIN_HOST}")
    (tmp_path / "hosts.d").mkdir()
    return path


def drop_in(main: Path, name: str, text: str) -> Path:
    path = main.parent / "hosts.d" / name
    path.write_text(text)
    return path


def test_a_refusal_names_the_file_and_the_line(main: Path) -> None:
    """Among 20,000 files."""
    drop_in(main, "b.toml", f"[hosts.b]\n{PLAIN_HOST}")
    bad = drop_in(main, "c.toml", f"[hosts.c]\n{PLAIN_HOST}provider_port = 65536\n")
    with pytest.raises(ConfigError) as caught:
        load_watch_config(main)
    assert str(caught.value) == f"{bad}:4: hosts.c.provider_port must be <= 65535"
    bad.write_text("[hosts.c]\nprovider_ip = '192.0.2.7'\n")  # what no key alone can tell
    with pytest.raises(ConfigError, match=f"^{bad}:1: hosts.c has no policy"):
        load_watch_config(main)
    bad.write_text("[hosts.c]\nprovider_ip = '192.0.2.7\n")
    with pytest.raises(ConfigError, match=f"^{bad}:2: a quote is opened and not closed"):
        load_watch_config(main)
    bad.write_bytes(b"\xef\xbb\xbf[hosts.c]\n")
    with pytest.raises(ConfigError, match=f"^{bad}:1: begins with a byte order mark"):
        load_watch_config(main)
    bad.write_text(f"[hosts.a]\n{PLAIN_HOST}")
    with pytest.raises(ConfigError, match=f"^{bad}:1: hosts.a is defined in another file already"):
        load_watch_config(main)


def test_where_a_value_came_from(main: Path) -> None:
    main.write_text(f"[defaults]\n\ntimeout_s = 6\n[hosts.a]\n{PLAIN_HOST}")
    loaded = load_watch(main)
    assert str(loaded.origin("hosts.a.provider_ip")) == f"{main}:5"
    assert str(loaded.origin("hosts.a.timeout_s")) == f"{main}:3"
    assert str(loaded.origin("hosts.a.bank")) == "default"


def test_what_an_editor_leaves_is_not_read(main: Path) -> None:
    (main.parent / "hosts.d" / ".#b.toml").symlink_to("me@here.4711")  # Emacs' lock
    for name in ("b.toml~", "#b.toml#", ".b.toml.swp", "b.toml.rpmsave", ".hidden.toml"):
        drop_in(main, name, "nonsense")
    assert list(load_watch_config(main).hosts) == ["a"]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(main: Path) -> None:
    folder = main.parent / "hosts.d"
    drop_in(main, "b.toml", f"[hosts.b]\n{PLAIN_HOST}")
    folder.chmod(0)
    try:
        if os.geteuid() != 0:  # who reads it all the same
            with pytest.raises(HostError, match=f"^cannot read {folder}: Permission denied"):
                load_watch_config(main)
    finally:
        folder.chmod(0o755)
    (folder / "b.toml").unlink()
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(HostError, match=f"^cannot read {folder}: Not a directory"):
        load_watch_config(main)


def test_a_file_that_cannot_be_read_is_an_error(main: Path) -> None:
    gone = main.parent / "hosts.d" / "b.toml"
    gone.symlink_to("nowhere")
    with pytest.raises(HostError, match=f"^cannot read {gone}: No such file"):
        load_watch_config(main)


def test_what_everybody_can_write_is_refused(main: Path) -> None:
    extra = drop_in(main, "b.toml", f"[hosts.b]\n{PLAIN_HOST}")
    for path in (main, extra, extra.parent):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(HostError, match=f"^{path}: everybody can write it"):
            load_watch_config(main)
        path.chmod(mode)
    assert sorted(load_watch_config(main).hosts) == ["a", "b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_stranger_s_hosts_are_refused(main: Path) -> None:
    extra = drop_in(main, "b.toml", f"[hosts.b]\n{PLAIN_HOST}")
    for path in (extra, extra.parent):
        os.chown(path, 12345, -1)
        with pytest.raises(
            HostError, match=f"^{path} is owned by uid 12345: it must be owned by root"
        ):
            load_watch_config(main)
        os.chown(path, 0, -1)


def test_twenty_thousand_hosts_are_read_without_their_lines(
    main: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines cost a parse each; they are looked for where a message needs them."""
    monkeypatch.setattr(document, "statements", pytest.fail)
    drop_in(main, "b.toml", f"[hosts.b]\n{PLAIN_HOST}")
    assert sorted(load_watch_config(main).hosts) == ["a", "b"]
