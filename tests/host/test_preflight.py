"""What a start would say, before it: `check-config` and the first steps of `serve`."""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from dated_place import Place
from helpers import Certs, make_certs

from provider_proxy.cli import main as cli
from provider_proxy.common.findings import ERROR, WARNING
from provider_proxy.errors import HostError
from provider_proxy.host import preflight
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.config.tables import Admin, AuditTable, Config, Limits, Listen
from provider_proxy.host.tpm import device


def plain(folder: Path, **more: object) -> Config:
    listen = Listen(address=("127.0.0.1:0",), insecure_plaintext=True)
    config = Config(state_dir=folder / "state", listen=listen, tpm=Tpm(tcti="embedded"))
    return replace(config, **more)  # type: ignore[arg-type]


def texts(config: Config) -> list[str]:
    return [f"{finding.level}: {finding.text}" for finding in preflight.find(config)]


def test_nothing_is_wrong(tmp_path: Path) -> None:
    assert texts(plain(tmp_path)) == []
    assert texts(replace(Place(tmp_path).config(), tpm=Tpm(tcti="embedded"))) == []


def test_a_credential_is_there_only_while_the_unit_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check before the first start does not call it missing; while the unit runs it does."""
    folder = tmp_path / "credentials"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    good = replace(Place(tmp_path).config(), tpm=Tpm(tcti="embedded"))
    config = replace(good, listen=replace(good.listen, tls_key=folder / "secret_server.key"))
    assert texts(config) == [
        "warning: listen.tls_key: the credential secret_server.key exists only while the unit runs: "
        "not checked"
    ]
    folder.mkdir()
    (found,) = texts(config)
    assert found.startswith("error: listen.tls_key: cannot read ")


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("/usr/lib/provider-proxy/bin/python3 /usr/bin/provider-proxy serve", True),
        ("/usr/bin/provider-proxy serve --config x", True),
        ("python3 -m provider_proxy serve", True),
        ("/home/admin/provider-proxy/.venv/bin/python other.py", False),
        ("nginx: master process /etc/provider-proxy/nginx.conf", False),
        ("", False),
    ],
)
def test_which_command_lines_are_a_daemon_of_ours(line: str, ours: bool) -> None:
    """One that is restarted gives its ports back; a program beside it does not."""
    assert preflight._is_ours(line.split()) is ours


def test_a_port_that_is_in_use_is_said_before_the_chip_makes_a_key(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        config = plain(tmp_path, admin=Admin(address=(address,)))
        (found,) = texts(config)
        assert found.startswith(f"error: admin.address: {address} is in use: ")
        assert "pytest" in found  # who has it
        with pytest.raises(HostError, match=f"admin.address: cannot listen on {address}"):
            preflight.check_start(config)
    assert texts(config) == []  # nothing was left open


def test_the_tenants_sockets_of_systemd_are_not_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = (f"127.0.0.1:{server.getsockname()[1]}",)
        config = plain(tmp_path, listen=Listen(address=address, insecure_plaintext=True))
        preflight.check_start(config, inherited=("listen.address",))
        with pytest.raises(HostError, match=r"listen\.address: cannot listen"):
            preflight.check_start(config)


@pytest.mark.parametrize(
    ("listen", "admin", "is_conflict"),
    [
        ("127.0.0.1:7", "127.0.0.1:7", True),
        ("0.0.0.0:7", "127.0.0.1:7", True),
        ("0.0.0.0:7", "localhost:7", True),
        ("[::]:7", "localhost:7", True),
        ("[::]:7", "127.0.0.1:7", False),
        ("0.0.0.0:7", "[::1]:7", False),
        ("192.0.2.1:7", "127.0.0.1:7", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("127.0.0.1:7", "127.0.0.1:8", False),
        ("unix:/run/a", "unix:/run/a", True),
        ("unix:/run/a", "unix:/run/b", False),
    ],
)
def test_two_listeners_of_one_address(
    tmp_path: Path, listen: str, admin: str, is_conflict: bool
) -> None:
    config = plain(
        tmp_path,
        listen=Listen(address=(listen,), insecure_plaintext=True),
        admin=Admin(address=(admin,)),
    )
    if not is_conflict:
        preflight.check_conflicts(config)
        return
    with pytest.raises(HostError, match=r"^admin\.address: .* is already used by listen\.address"):
        preflight.check_conflicts(config)


def test_an_audit_log_that_cannot_be_written_stops_a_start(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "audit.log"
    config = plain(tmp_path, audit=AuditTable(enabled=True, path=missing))
    words = f"audit.path: the directory {missing.parent} does not exist: make it"
    assert texts(config) == [f"error: {words}"]
    with pytest.raises(HostError, match=words):
        preflight.check_start(config)
    missing.parent.mkdir()
    missing.mkdir()
    with pytest.raises(HostError, match="is not a regular file"):
        preflight.check_start(config)
    missing.rmdir()
    preflight.check_start(config)
    assert not missing.exists()  # nothing is made
    if os.geteuid() != 0:
        missing.parent.chmod(0o500)
        with pytest.raises(HostError, match="this user cannot write to"):
            preflight.check_start(config)
    preflight.check_start(plain(tmp_path, audit=AuditTable(path=missing)))


def test_connections_need_descriptors(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = plain(tmp_path, limits=Limits(max_connections=hard))
    (found,) = texts(config)
    assert found.startswith("warning: limits.max_connections: ")
    assert "LimitNOFILE" in found
    assert preflight.allow_connections(plain(tmp_path)) is None


def test_the_state_directory(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert texts(plain(tmp_path)) == [f"error: state_dir: {tmp_path}/state is not a directory"]


# --- the TPM's device -----------------------------------------------------------------------------------


def test_why_a_device_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.problem("swtpm:path=/x") is None
    assert device.problem("embedded") is None
    missing = device.problem(f"device:{tmp_path}/tpmrm0") or ""
    assert "tpmrm0 does not exist: is a TPM enabled in the firmware" in missing
    assert device.problem("device:/dev/null") is None
    real = os.open
    for number, words in (
        (13, "may not open"),
        (16, "in use by another program"),
    ):

        def refused(path: object, *rest: object, number: int = number) -> int:
            if str(path) == "/dev/tpm0":
                raise OSError(number, os.strerror(number))
            return real(path, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", refused)
        assert words in (device.problem("device:/dev/tpm0") or "")


# --- check-config ---------------------------------------------------------------------------------------

Spoil = Callable[[Path, Certs], object]


def wrong_key(folder: Path, certs: Certs) -> None:
    certs.key.write_bytes(certs.client_key.read_bytes())


def swapped(folder: Path, certs: Certs) -> None:
    cert, key = certs.cert.read_bytes(), certs.key.read_bytes()
    certs.cert.write_bytes(key)
    certs.key.write_bytes(cert)


def expired(folder: Path, certs: Certs) -> None:
    place = Place(folder)
    place.pair("server", ExtendedKeyUsageOID.SERVER_AUTH, days=-1)
    certs.cert.write_bytes((folder / "server.crt").read_bytes())
    certs.key.write_bytes((folder / "server.key").read_bytes())


MISTAKES: dict[str, tuple[Spoil, str, str]] = {
    "no certificate": (lambda f, c: c.cert.unlink(), ERROR, "listen.tls_cert: cannot read"),
    "empty": (lambda f, c: c.cert.write_text(""), ERROR, "is empty"),
    "key of another": (wrong_key, ERROR, "is not the key of the certificate"),
    "swapped": (swapped, ERROR, "are the two files swapped?"),
    "0644": (lambda f, c: c.key.chmod(0o644), ERROR, "must not be readable by others"),
    "CA is a key": (lambda f, c: c.ca_file.write_bytes(c.key.read_bytes()), ERROR, "client_ca"),
    "expired": (expired, ERROR, "listen.tls_cert: "),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_check_config_finds_wrong_tls_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """All of these passed before."""
    certs = make_certs(tmp_path)
    path = tmp_path / "c.toml"
    path.write_text(
        f'state_dir = "{tmp_path}/state"\n[tpm]\ntcti = "embedded"\n'
        f'[listen]\naddress = "127.0.0.1:0"\n{certs.toml()}'
    )
    argv = ["check-config", "--config", str(path), "--json"]
    assert cli.run(argv) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    spoil, level, words = MISTAKES[name]
    spoil(tmp_path, certs)
    code = cli.run(argv)
    out, err = capsys.readouterr()
    values = json.loads(out)
    found = [finding for finding in values["findings"] if words in finding["text"]]
    assert found
    assert found[0]["level"] == level
    assert code == (3 if level == ERROR else 0)
    assert values["ok"] == (level != ERROR)
    assert f"{level}: {path}:" in err  # and the line of the key
    assert words in err


def test_what_ends_soon_is_a_warning(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.pair("server", ExtendedKeyUsageOID.SERVER_AUTH, days=5)
    place.crl(until_days=-1)
    config = replace(place.config(), tpm=Tpm(tcti="embedded"))
    found = {finding.text.partition(":")[0]: finding.level for finding in preflight.find(config)}
    assert found == {"listen.tls_cert": WARNING, "listen.client_crl": WARNING}
