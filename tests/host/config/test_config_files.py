"""The configuration's sources: files beside each other, the environment, and who said what where."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider_proxy.cli import main as cli
from provider_proxy.common.settings import lines as module
from provider_proxy.common.settings.document import Origin, read_document
from provider_proxy.errors import ConfigError, HostError
from provider_proxy.host.config import load as loading
from provider_proxy.host.config.environment import known_keys, variable_of
from provider_proxy.host.config.load import LAYOUT, load, load_config

PLAIN = "[listen]\ninsecure_plaintext = true\n"
ALICE = '[tenants.alice]\nidentities = ["dns:alice.example.org"]\n'
NO_ENVIRONMENT: Mapping[str, str] = {}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    main = tmp_path / "c.toml"
    main.write_text(PLAIN)
    return main


def drop_in(path: Path, name: str, text: str, folder: str = "conf.d") -> Path:
    """A file in a folder beside the configuration."""
    (path.parent / folder).mkdir(exist_ok=True)
    extra = path.parent / folder / name
    extra.write_text(text)
    return extra


# --- one file ---------------------------------------------------------------------------------------


def test_load(path: Path) -> None:
    path.write_text(PLAIN + "[batch]\nwindow_ms = 7\n")
    assert load_config(path).batch.window_ms == 7.0


def test_a_missing_file_is_the_hosts_fault(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(HostError) as caught:
        load_config(path)
    assert str(caught.value) == f"cannot read {path}: No such file or directory"


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")  # nobody writes to it: reading would wait for ever
    for path in (tmp_path, tmp_path / "fifo.toml"):
        with pytest.raises(HostError, match=r"^cannot read .*: (not a plain file|Is a directory)$"):
            load_config(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = 1\n[listen", ":2: "),
        (b"a = 1\na = 2", ":2: "),
        (b"a = 1\na = 2\n\n", ":2: Cannot overwrite a value$"),
        (b"a = 1\n\n# \xff", ":3: not UTF-8$"),
        (b"a = " + b"[" * 5000, ":( arrays nested too deep$|1: )"),
    ],
)
def test_what_is_no_toml_names_file_and_line(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"^{path}{message}"):
        load_config(path)


def test_a_huge_file_is_refused(path: Path) -> None:
    path.write_bytes(b"#" * (LAYOUT.max_bytes + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load_config(path)


# --- lines ------------------------------------------------------------------------------------------

LINES = '''# a comment
state_dir = "/x"  # [batch]

[ listen ] # ]
address = [
  "127.0.0.1:1",  # ]
  # "127.0.0.1:2"]
  "unix:/run/a",
]
insecure_plaintext = true
"tls_cert" = """
[tpm]
tcti = "no"
"""
[tpm]
tcti = \'\'\'
window_ms = 1\'\'\'
[batch]\r
window_ms = 1\r
[tenants]
alice.rate = 1
bob = { rate = 2, identities = ["uid:1"] }
[tenants."c.d"]
identities = ["uid:2"]
[[limits]]
max_queue = 1
'''


def test_the_line_of_each_key(path: Path) -> None:
    path.write_bytes(LINES.encode())
    document = read_document(path, LAYOUT)
    lines = {key: origin.line for key, origin in document.values.items()}
    assert lines == {
        "state_dir": 2,
        "listen.address": 5,
        "listen.insecure_plaintext": 10,
        "listen.tls_cert": 11,
        "tpm.tcti": 16,
        "batch.window_ms": 19,
        "tenants.alice.rate": 21,
        "tenants.bob.rate": 22,
        "tenants.bob.identities": 22,
        "tenants.c.d.identities": 24,
        "limits": 25,
    }
    assert document.tables["tenants.c.d"].line == 23
    assert document.data == tomllib.loads(LINES.replace("\r", ""))


VALUES = (
    *("1", "1979-05-27T07:32:00Z # ]", '"a # ]"', r'"\""', "'\\'", "{ a = 1, b.c = [] }", "[]  "),
    *("[1,\n 2, # ]\n]", "[[\n], [ # [\n]\n]", "[{ x = 1 },\n { x = '''\n]''' }]"),
    *("'''x\n[y]\nz = 1\n'''", '"""\n\\"""\n= ]\n"""', '"""a\n""""', '"""\\\n\n  b"""'),
)
BETWEEN = ("", "# k0 = 1", "   ", "[t{n}]", "  [ t{n} . 'a.b' ] # ]", "[[l{n}]]", "#[\n#]")


@given(st.lists(st.tuples(st.sampled_from(BETWEEN), st.sampled_from(VALUES)), max_size=12))
def test_lines_of_any_document(pieces: list[tuple[str, str]]) -> None:
    """Whatever stands between them and in them, each key has its line, and none is invented."""
    text, wanted = "", {}
    for number, (between, value) in enumerate(pieces):
        text += between.replace("{n}", str(number)) + "\n"
        wanted[f"k{number}"] = text.count("\n") + 1
        text += f"k{number} = {value}\n"
    tomllib.loads(text)  # it is TOML
    found = {}
    for line, header, keys in module.statements(text):
        if not header:
            found[next(key for key in keys if key.startswith("k"))] = line
    assert found == wanted


def test_a_value_of_very_many_lines_costs_only_its_line(path: Path) -> None:
    long = "x = [\n" + "[1],\n" * (module.MAX_STATEMENT_TRIES + 1) + "]\n"
    path.write_text(f"state_dir = '/x'\n{long}[batch]\nwindow_ms = 1\n")
    document = read_document(path, LAYOUT)
    assert document.values["state_dir"] == Origin(file=path, line=1)
    assert document.values["batch.window_ms"] == Origin(file=path)
    assert document.data["batch"] == {"window_ms": 1}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[batch]\n\nwindow_ms = -1\n", 5, "batch.window_ms must be >= 0"),
        ("[batch]\nwindow = 1\n", 4, "batch.window is not a key; the known keys are "),
        ("\n[batches]\nx = 1\n", 4, "batches is not a key; the known keys are "),
        (
            "[limits]\ndefault_timeout_ms = 60001\n",
            4,
            "limits.default_timeout_ms must be <= limits.",
        ),
        (ALICE + "rate = 0\n", 5, "tenants.alice.rate must be >= 0.001"),
        ("[tenants.bob]\nrate = 1\n", 3, "tenants.bob.identities must name at least one"),
        ('[tenants."a:b c"]\nrate = 1\n', 3, "tenants.a:b c must be a name of letters"),
        ('[tenant_defaults]\nidentities = ["uid:1"]\n', 4, "tenant_defaults.identities belongs in"),
        ("[admin]\naddress = '0.0.0.0:1'\n", 4, "admin.address is for loopback"),
        ("tls_key = '/k'\n", 2, "listen.insecure_plaintext must not stand beside TLS files"),
    ],
)
def test_a_refusal_names_file_and_line(path: Path, text: str, line: int, message: str) -> None:
    path.write_text(PLAIN + text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, NO_ENVIRONMENT)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")


# --- conf.d -----------------------------------------------------------------------------------------


def test_tables_merge_key_by_key_and_a_later_file_wins(path: Path) -> None:
    path.write_text(PLAIN + '[batch]\nwindow_ms = 1\nmax_leaves = 2\n[tpm]\nbanks = ["sha512"]\n')
    later = drop_in(path, "20.toml", 'tpm.banks = ["sha256", "sha384"]\nbatch.max_leaves = 4\n')
    first = drop_in(path, "10.toml", "[batch]\nmax_leaves = 3\n\nwindow_ms = 9\n")
    empty = drop_in(
        path, "15.toml", ""
    )  # neither made first nor last, whatever a folder's order is
    drop_in(path, "30.toml~", "nonsense")
    drop_in(path, ".#40.toml", "nonsense")
    loaded = load(path, NO_ENVIRONMENT)
    assert loaded.config.batch.window_ms == 9.0
    assert loaded.config.batch.max_leaves == 4
    assert [bank.label for bank in loaded.config.tpm.banks] == ["sha256", "sha384"]
    assert loaded.document.files == (path, first, empty, later)
    assert loaded.origin("batch.window_ms") == Origin(file=first, line=4)
    assert loaded.origin("batch.max_leaves") == Origin(file=later, line=2)
    assert loaded.origin("listen.insecure_plaintext") == Origin(file=path, line=2)
    assert loaded.origin("state_dir") == Origin()


def test_a_refusal_names_the_file_that_won(path: Path) -> None:
    path.write_text(PLAIN + "[batch]\nwindow_ms = 1\n")
    extra = drop_in(path, "10.toml", "\n[batch]\nwindow_ms = -1\n")
    with pytest.raises(ConfigError, match=f"^{extra}:3: batch.window_ms must be >= 0$"):
        load_config(path)


@pytest.mark.parametrize(
    ("main", "extra", "message"),
    [
        ("[batch]\nwindow_ms = 1\n", "\nbatch = 1\n", "2: batch is a table in {path}:4"),
        ("", "[[batch]]\nwindow_ms = 1\n", None),
        ("", "[tpm.tcti]\n", "1: tpm.tcti is not a table in {path}:1"),
    ],
)
def test_a_table_and_a_value_do_not_merge(
    path: Path, main: str, extra: str, message: str | None
) -> None:
    path.write_text("tpm.tcti = 'x'\n" + PLAIN + main)
    file = drop_in(path, "10.toml", extra)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    wanted = f"{file}:1: batch must be a table" if message is None else f"{file}:{message}"
    assert str(caught.value) == wanted.replace("{path}", str(path))


def test_a_tenant_may_be_changed_in_conf_d(path: Path) -> None:
    path.write_text(PLAIN + "[tenant_defaults]\nburst = 5\n" + ALICE + "rate = 1\n")
    extra = drop_in(path, "10.toml", "[tenants.alice]\nrate = 9\n")
    loaded = load(path, NO_ENVIRONMENT)
    assert loaded.config.tenants["alice"].rate == 9.0
    assert loaded.origin("tenants.alice.rate") == Origin(file=extra, line=2)
    assert loaded.origin("tenants.alice.burst") == Origin(file=path, line=4)
    assert loaded.origin("tenants.alice.vms") == Origin()


@pytest.mark.parametrize("folder", ["conf.d", "tenants.d"])
def test_drop_ins_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    small = dataclasses.replace(LAYOUT, max_changes=2, max_adds=2)
    monkeypatch.setattr(loading, "LAYOUT", small)
    for number in range(3):
        text = f'[tenants.t{number}]\nidentities = ["uid:{number}"]'
        drop_in(path, f"{number}.toml", text, folder)
        if number < 2:
            assert len(load_config(path).tenants) == number + 1
    with pytest.raises(ConfigError, match=f"{folder}: more than 2 files"):
        load_config(path)


# --- tenants.d --------------------------------------------------------------------------------------


def test_tenants_are_read_beside_the_file(path: Path) -> None:
    path.write_text(PLAIN + ALICE)
    bob = drop_in(path, "bob.toml", '[tenants.bob]\nidentities = ["uid:1"]\n', "tenants.d")
    drop_in(path, "carol.toml", '[tenants.carol]\nidentities = ["uid:2"]\n', "tenants.d")
    drop_in(path, "ignored.toml~", "nonsense", "tenants.d")
    drop_in(path, ".hidden.toml", "nonsense", "tenants.d")
    loaded = load(path)
    assert sorted(loaded.config.tenants) == ["alice", "bob", "carol"]
    assert loaded.origin("tenants.bob.identities") == Origin(file=bob, line=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALICE, ":1: tenants.alice is defined in another file already"),
        ("\ntenants.alice.rate = 1", ": tenants.alice is defined in another file already"),
        ("[limits]\nmax_queue = 1", ": may hold only [tenants.NAME] tables"),
        ("", ": may hold only [tenants.NAME] tables"),
        ("tenants = 1", ": may hold only [tenants.NAME] tables"),
        ("[tenants", ":1: "),
    ],
)
def test_tenants_files_that_are_refused_are_named(path: Path, text: str, message: str) -> None:
    path.write_text(PLAIN + ALICE)
    extra = drop_in(path, "x.toml", text, "tenants.d")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{extra}{message}")


# --- who may write ----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["conf.d", "tenants.d"])
def test_what_everybody_can_write_is_refused(path: Path, folder: str) -> None:
    extra = drop_in(path, "a.toml", '[tenants.bob]\nidentities = ["uid:1"]\n', folder)
    load_config(path)
    for place in (path, extra, extra.parent):
        mode = place.stat().st_mode
        place.chmod(mode | 0o002)
        with pytest.raises(HostError, match=f"^{place}: everybody can write it"):
            load_config(path)
        place.chmod(mode)
    load_config(path)


@pytest.mark.parametrize("folder", ["conf.d", "tenants.d"])
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(path: Path, folder: str) -> None:
    place = path.parent / folder
    place.write_text("")
    with pytest.raises(HostError, match=f"^cannot read {place}: Not a directory"):
        load_config(path)
    place.unlink()
    place.mkdir(mode=0)
    if os.geteuid() == 0:  # reads it all the same
        load_config(path)
    else:
        with pytest.raises(HostError, match=f"^cannot read {place}: Permission denied"):
            load_config(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_strangers_drop_in_is_refused(path: Path) -> None:
    extra = drop_in(path, "a.toml", "")
    for place in (extra, extra.parent):
        os.chown(place, 12345, -1)
        with pytest.raises(
            HostError, match=f"^{place} is owned by uid 12345: it must be owned by root"
        ):
            load_config(path)
        os.chown(path, 12345, -1)  # who writes the main file decides anyway
        load_config(path)
        for mine in (path, place):
            os.chown(mine, 0, -1)


# --- the environment --------------------------------------------------------------------------------


def test_no_two_keys_share_a_variable() -> None:
    keys = [key for key, _ in known_keys()]
    assert len({variable_of(key) for key in keys}) == len(keys) > 40
    assert variable_of("batch.window_ms") == "PROVIDER_PROXY_BATCH_WINDOW_MS"
    assert variable_of("state_dir") == "PROVIDER_PROXY_STATE_DIR"


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("STATE_DIR", "/srv/x", "state_dir", Path("/srv/x")),
        ("STATE_DIR", '"/srv/x y"', "state_dir", Path("/srv/x y")),
        ("STATE_DIR", "7", "state_dir", Path("7")),  # a path that looks like a number is one
        ("BATCH_WINDOW_MS", "12.5", "batch.window_ms", 12.5),
        ("BATCH_MAX_LEAVES", "0x10", "batch.max_leaves", 16),
        ("BATCH_ISOLATE_PCRS", "[0, 23]", "batch.isolate_pcrs", 1 | 1 << 23),
        ("LISTEN_ADDRESS", "unix:/run/p", "listen.address", ("unix:/run/p",)),
        ("LISTEN_ADDRESS", '["[::1]:1"]', "listen.address", ("[::1]:1",)),
        ("LISTEN_ADDRESS", "[::1]:1", "listen.address", ("[::1]:1",)),
        ("TPM_AK_ALGORITHM", "rsa", "tpm.ak_algorithm", "rsa"),
        ("TENANT_DEFAULTS_ACCEPT_UNLISTED", "false", "tenant_defaults.accept_unlisted", False),
    ],
)
def test_the_environment_wins(path: Path, name: str, text: str, key: str, value: object) -> None:
    path.write_text("state_dir = '/y'\n" + PLAIN + "[batch]\nwindow_ms = 1\n")
    variable = f"PROVIDER_PROXY_{name}"
    loaded = load(path, {variable: text, "HOME": "/", "provider_proxy_x": "1"})
    got: Any = loaded.config
    for part in key.split("."):
        got = getattr(got, part)
    assert got == value
    assert loaded.origin(key) == Origin(variable=variable)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("BATCH_WINDOW_MS", "-1", "batch.window_ms must be >= 0"),
        ("BATCH_WINDOW_MS", "", "batch.window_ms must be a number"),
        ("BATCH_WINDOW_MS", "fast", "batch.window_ms must be a number"),
        (
            "BATCH_WINDOW_MS",
            "1\n[tpm]\ntcti = 'x'",
            "batch.window_ms must be one line of printable text",
        ),
        ("TPM_TCTI", "a\nb", "tpm.tcti must be one line of printable text"),
        ("TPM_TCTI", "\udcff", "tpm.tcti must be one line of printable text"),
        ("TPM_TCTI", "a" * 4097, "longer than 4096 characters"),
        ("STATE_DIR", "", "state_dir must be a path"),
        ("LISTEN_INSECURE_PLAINTEXT", "yes", "listen.insecure_plaintext must be true or false"),
        ("ADMIN_ADDRESS", "0.0.0.0:1", "admin.address is for loopback"),
        ("BATCH_WINDOW_MS", "[" * 4000, "batch.window_ms must be a number"),
        ("BATCH__WINDOW_MS", "1", "is not a known variable"),
        (
            "TENANTS_ALICE_RATE",
            "1",
            "is not a known variable (named tables, such as tenants, can be set in files only)",
        ),
        ("TENANTS", "{}", "is not a known variable"),
        ("LISTEN", "{}", "is not a known variable"),
        ("", "1", "is not a known variable"),
        ("batch_window_ms", "1", "is not a known variable"),
    ],
)
def test_a_hostile_environment(path: Path, name: str, text: str, message: str) -> None:
    path.write_text(PLAIN + ALICE)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {f"PROVIDER_PROXY_{name}": text})
    joint = " " if message.startswith("is not") else ": "
    assert str(caught.value).startswith(f"PROVIDER_PROXY_{name}{joint}{message}")


def test_a_misspelt_variable_is_told_its_neighbour(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"; did you mean PROVIDER_PROXY_BATCH_WINDOW_MS\?$"):
        load_config(path, {"PROVIDER_PROXY_BATCH_WINDOW": "1"})
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"PROVIDER_PROXY_\x1b[2J" + "X" * 1000: "1"})
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


# --- check-config -----------------------------------------------------------------------------------


def test_check_config_prints_what_could_be_its_own_input(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(PLAIN + '[tenants."a.b"]\nidentities = ["uid:1"]\nrate = 1\n')
    drop_in(path, "1.toml", "[logs]\nima = '/ima'\n")
    monkeypatch.setenv("PROVIDER_PROXY_TPM_TCTI", "embedded")
    assert cli.run(["check-config", "--config", str(path)]) == 0
    output = capsys.readouterr().out
    lines = [re.sub("  +", "  ", line) for line in output.splitlines()]
    assert f"listen.insecure_plaintext = true  # {path}:2" in lines
    assert f'logs.ima = "/ima"  # {path.parent}/conf.d/1.toml:2' in lines
    assert 'tpm.tcti = "embedded"  # PROVIDER_PROXY_TPM_TCTI' in lines
    assert "tpm.ek_handle = 0x81010001  # default" in lines
    assert "# tpm.owner_auth_file is not set" in lines
    copy = path.parent / "other" / "c.toml"
    copy.parent.mkdir()
    copy.write_text(output)
    assert load_config(copy, NO_ENVIRONMENT) == load_config(path)


def test_check_config_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check-config", "--json", "--config", str(path)]) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert got["ok"] is True
    assert got["files"] == [str(path)]
    assert set(got["keys"]) == {key for key, _ in known_keys()}
    assert got["keys"]["tpm.banks"] == {"value": ["sha256"], "from": "default"}
    assert got["keys"]["listen.tls_key"] == {"value": None, "from": "default"}
    assert got["keys"]["tpm.ek_handle"]["value"] == 0x81010001
    assert got["keys"]["listen.insecure_plaintext"] == {
        "value": True,
        "from": "file",
        "file": str(path),
        "line": 2,
    }


def test_check_config_refuses_with_the_exit_codes_of_all(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text("x = 1\n")
    assert cli.run(["check-config", "--json", "--config", str(path)]) == cli.EXIT_USAGE
    output, error = capsys.readouterr()
    assert f"{path}:1: x is not a key" in error
    got = json.loads(output.splitlines()[-1])
    assert got["ok"] is False
    assert got["error"].startswith(f"{path}:1: x is not a key")
    path.unlink()
    assert cli.run(["check-config", "--config", str(path)]) == cli.EXIT_ENVIRONMENT
