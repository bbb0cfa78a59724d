"""The support bundle: everything that helps, nothing secret, no names unless somebody wants them."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import run_here
from hypothesis import given
from hypothesis import strategies as st
from status_helpers import HOSTILE, Site, address_of, busy

from provider_proxy.cli.redaction import HIDDEN, Redactor

VM = "0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b"
SECRETS = {
    "a key": "MIIEvgIBADANBgkqhkiG9w0BAQEFAASC",
    "a password of a URL": "hunter2-of-the-registrar",
    "a token in a query": "tok-4711-in-a-query",
    "a token in a header": "eyJhbGciOiJIUzI1NiJ9.e30.abc",
    "an authValue": "5f1b0c9d8e7a6f5e4d3c2b1a09182736",
    "a nonce": "nonce-that-nobody-may-see-0123",
    "a file's content": "content-of-a-secret-file",
}
NAMES = ("acme", "globex", "initech", "verifier.acme.example", "registrar.acme.example", VM)
LOG = f"""2026-11-28T07:00:00 INFO tenant acme asked, nonce={SECRETS["a nonce"]} mask=0x1
2026-11-28T07:00:01 WARNING https://me:{SECRETS["a password of a URL"]}@registrar.acme.example/v2 fails
2026-11-28T07:00:02 DEBUG GET https://registrar.acme.example/x?key={SECRETS["a token in a query"]}
2026-11-28T07:00:03 DEBUG Authorization: Bearer {SECRETS["a token in a header"]}
2026-11-28T07:00:04 ERROR {{"auth_value": "{SECRETS["an authValue"]}", "vm": "{VM.upper()}"}} globex
-----BEGIN EC PRIVATE KEY-----
{SECRETS["a key"]}
-----END EC PRIVATE KEY-----
2026-11-28T07:00:05 INFO the last line; the acmes of this world are not a tenant
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


class Host:
    """A host's files, with secrets where they belong and where they do not."""

    def __init__(self, folder: Path, site: Site) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.state.mkdir(mode=0o700)
        (self.state / "ak.json").write_text(json.dumps({"auth": SECRETS["an authValue"]}))
        owner_auth = folder / "owner"
        owner_auth.write_text(SECRETS["a file's content"])
        owner_auth.chmod(0o600)
        self.log = folder / "daemon.log"
        self.log.write_text(LOG)
        self.config = folder / "c.toml"
        self.config.write_text(
            f'state_dir = "{self.state}"\n[listen]\ninsecure_plaintext = true\n'
            f'[admin]\naddress = "{address_of(site)}"\n'
            f'[tpm]\ntcti = "embedded"\nowner_auth_file = "{owner_auth}"\n'
            f'[tenants.acme]\nidentities = ["dns:verifier.acme.example"]\nvms = ["{VM}"]\n'
            '[registrars.initech]\nurl = "http://registrar.acme.example:8890"\n'
            "insecure_plaintext = true\n"
        )

    def make(self, *more: str, code: int = 0) -> dict[str, str]:
        """The parts of a new bundle."""
        out = self.folder / "bundle.tar.gz"
        out.unlink(missing_ok=True)
        words = [
            "--config",
            str(self.config),
            "--log",
            str(self.log),
            "--out",
            str(out),
            "--no-tpm",
        ]
        done = run_here("support-bundle", *words, *more, cwd=self.folder)
        assert done.returncode == code, done.stderr
        if code:
            return {"stderr": done.stderr}
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        with tarfile.open(out) as archive:
            found = {}
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name.removeprefix("provider-proxy-support/")] = file.read().decode()
        return {**found, "stdout": done.stdout}


@pytest.fixture
def host(tmp_path: Path, site: Site) -> Host:
    site.status = busy
    return Host(tmp_path, site)


def test_nothing_secret_and_no_name_is_in_it(host: Host) -> None:
    parts = host.make()
    everything = "\n".join(parts[name] for name in parts if name != "stdout")
    for what, secret in SECRETS.items():
        assert secret not in everything, what
    for name in NAMES:
        assert name not in everything.lower().replace("acmes", ""), name
    assert "[a private key]" in parts["log.txt"]


def test_what_helps_is_in_it(host: Host) -> None:
    parts = host.make()
    assert set(parts) >= {
        "versions.txt",
        "configuration.txt",
        "files.txt",
        "status.json",
        "log.txt",
    }
    assert parts["versions.txt"].startswith("provider-proxy ")
    assert "trio " in parts["versions.txt"]
    assert 'tpm.tcti = "embedded"' in parts["configuration.txt"]
    assert "owner_auth_file" in parts["configuration.txt"]  # its path says nothing
    assert "tenants.tenant-1.identities" in parts["configuration.txt"]
    assert "-rw" in parts["files.txt"]
    assert "ak.json" in parts["files.txt"]
    assert json.loads(parts["status.json"])["version"] == 1
    assert "tenant tenant-1 asked" in parts["log.txt"]
    assert "the acmes of this world" in parts["log.txt"]  # a part of a word is not a name
    assert f"nonce={HIDDEN} mask=0x1" in parts["log.txt"]
    assert "unit.txt" in parts["stdout"]
    assert "check its contents" in parts["stdout"]


def test_names_are_one_in_all_parts(host: Host) -> None:
    parts = host.make()
    listed = {each["name"] for each in json.loads(parts["status.json"])["tenants"]["listed"]}
    assert "tenant-1" in listed
    assert all(name.startswith("tenant-") for name in listed)
    assert len(listed) == len(busy()["tenants"]["listed"])


def test_names_stay_where_somebody_wants_them(host: Host) -> None:
    parts = host.make("--with-names")
    assert "tenants.acme.identities" in parts["configuration.txt"]
    for what, secret in SECRETS.items():
        assert secret not in parts["log.txt"], what


def test_a_daemon_that_does_not_answer_is_no_obstacle(host: Host) -> None:
    text = host.config.read_text().splitlines()
    host.config.write_text("\n".join(line for line in text if "address = " not in line) + "\n")
    parts = host.make()
    assert "not here" in parts["status.json"]
    assert "tenant-1" in parts["log.txt"]


def test_a_broken_configuration_is_told_and_no_log_goes_with_it(host: Host) -> None:
    """What names to hide is not known then."""
    host.config.write_text(host.config.read_text() + "[batch]\nwindow_ms = -1\n")
    parts = host.make()
    assert "batch.window_ms" in parts["configuration.txt"]
    assert "acme" not in parts["log.txt"]
    assert "--with-names" in parts["log.txt"]
    assert "acme" in host.make("--with-names")["log.txt"]


def test_an_archive_is_not_replaced(host: Host) -> None:
    out = host.folder / "mine"
    out.write_text("mine")
    words = ("--config", str(host.config), "--out", str(out), "--no-tpm")
    done = run_here("support-bundle", *words, cwd=host.folder)
    assert done.returncode == 2
    assert "name another file" in done.stderr
    assert out.read_text() == "mine"


def test_its_json(host: Host) -> None:
    values: dict[str, Any] = json.loads(host.make("--json")["stdout"].splitlines()[-1])
    assert values["file"] == str(host.folder / "bundle.tar.gz")
    assert "log.txt" in values["parts"]
    assert set(values["missing"]) <= {"unit.txt"}


# --- the redactor -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        'password = "s3cret"',
        "db_password: s3cret",
        "{'token': 's3cret'}",
        '{"authValue":"s3cret"}',
        "api-key=s3cret",
        "https://me:s3cret@host/",
        "postgresql://me:s3cret@db/fleet",
        "https://host/path?x=s3cret",
        "authorization: s3cret",
        "Basic s3cretAA",
        "-----BEGIN PRIVATE KEY-----\ns3cret",
    ],
)
def test_what_looks_secret_is_hidden(line: str) -> None:
    assert "s3cret" not in Redactor({}).hide(line)


@pytest.mark.parametrize(
    "line",
    [
        'owner_auth_file = "/etc/provider-proxy/owner"',
        'tls_key = "credential:secret_tls.key"',
        'webhook_secret_file = "/run/secret"',
        "https://host:8890/verifier/identity",
        "batch=812 leaves=143 quote_ms=187.0",
        "-----BEGIN CERTIFICATE-----",
    ],
)
def test_what_is_not_secret_stays(line: str) -> None:
    assert Redactor({}).hide(line) == line


@pytest.mark.parametrize("name", ["acme", "spiffe://acme/verifier", 'a"b', "büro", "a b", HOSTILE])
def test_a_name_is_found_however_it_is_written(name: str) -> None:
    redactor = Redactor({"tenant": [(name,)]})
    for text in (name, json.dumps({"name": name}), json.dumps({"name": name}, ensure_ascii=False)):
        assert name not in redactor.hide(text)
        assert json.dumps(name)[1:-1] not in redactor.hide(text)


@given(st.text(max_size=300))
def test_whatever_a_log_holds_is_read(text: str) -> None:
    Redactor({"tenant": [("a", "b"), ("0",)]}).hide(text)


def test_it_takes_no_longer_for_hostile_text() -> None:
    """No pattern looks at one place again and again: a log's lines are as others want them."""
    for piece in (
        "password=",
        "://",
        "-----BEGIN PRIVATE KEY-----",
        "nonce=",
        "token" * 3,
        '\\"',
        "secret.",
    ):
        Redactor({"tenant": [("acme",)]}).hide(piece * 20_000)


def test_the_journal_is_asked_where_no_log_is_named(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = host.folder / "bin"
    tools.mkdir()
    tool = tools / "journalctl"
    tool.write_text('#!/bin/sh\necho "$*"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    out = host.folder / "b.tar.gz"
    words = ("--config", str(host.config), "--out", str(out), "--no-tpm")
    assert run_here("support-bundle", *words, cwd=host.folder).returncode == 0
    with tarfile.open(out) as archive:
        file = archive.extractfile("provider-proxy-support/log.txt")
        assert file is not None
        assert file.read().decode().startswith("-u provider-proxy.service -n 2000")


@pytest.mark.real
def test_the_tpm_is_examined(host: Host) -> None:
    (host.state / "ak.json").unlink()  # it holds nothing real
    out = host.folder / "b.tar.gz"
    words = ("--config", str(host.config), "--log", str(host.log), "--out", str(out))
    assert run_here("support-bundle", *words, cwd=host.folder).returncode == 0
    with tarfile.open(out) as archive:
        file = archive.extractfile("provider-proxy-support/doctor.json")
        assert file is not None
        assert "sha256" in json.loads(file.read())["pcr_banks"]
