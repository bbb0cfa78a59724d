"""TLS, certificates and passwords towards PostgreSQL, as libpq does them, on a real server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from fleet_helpers import LIMIT_S, command
from needs_postgres import needs_postgres

from provider_proxy.errors import UsageError
from provider_proxy.tenant.fleet.database import DatabaseError, connect, read_address
from provider_proxy.testing.postgres import Postgres, postgres

pytestmark = [needs_postgres, pytest.mark.real]

PORT = 5432  # of a loopback address of its own: no other test's server is there
HOST = "127.21.0.1"
PASSWORD = "a-password-that-nobody-must-see"
HBA = """
local all postgres trust
hostssl all bycert all cert
hostssl all byword all scram-sha-256
hostnossl all all all reject
"""


class Site:
    """A server with TLS, and the files of its clients."""

    def __init__(self, server: Postgres, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.ca, other = trustme.CA(), trustme.CA()
        certificate = self.ca.issue_cert(HOST)
        cert, key = server.folder / "server.pem", server.folder / "server.key"
        certificate.cert_chain_pems[0].write_to_path(cert)
        certificate.private_key_pem.write_to_path(key)
        key.chmod(0o600)
        server_ca = server.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(server_ca)
        server.give(cert, key, server_ca)
        self.ca_file, self.other_ca = folder / "ca.pem", folder / "other.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        other.cert_pem.write_to_path(self.other_ca)
        self.cert, self.key = self._client(self.ca, "bycert")
        self.stranger = self._client(other, "bycert", "stranger")
        with connect(read_address(server.dsn)) as connection:
            connection.execute("create role bycert login")
            connection.execute(f"create role byword login password '{PASSWORD}'")
        (server.data / "pg_hba.conf").write_text(HBA)
        server.stop("fast")
        server.start(
            *(f"listen_addresses={HOST}", f"port={PORT}", "ssl=on", f"ssl_cert_file={cert}"),
            *(f"ssl_key_file={key}", f"ssl_ca_file={server_ca}"),
        )

    def _client(self, ca: trustme.CA, user: str, name: str = "") -> tuple[Path, Path]:
        issued = ca.issue_cert(f"{user}.example", common_name=user)
        cert, key = (self.folder / f"{name or user}.{kind}" for kind in ("pem", "key"))
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        key.chmod(0o600)
        return cert, key

    def address(self, user: str = "bycert", host: str = HOST, **more: str | Path) -> str:
        values = {"sslmode": "verify-full", "sslrootcert": self.ca_file, **more}
        query = "&".join(f"{key}={value}" for key, value in values.items())
        return f"postgresql://{user}@{host}:{PORT}/postgres?{query}"

    def with_certificate(self, host: str = HOST, **more: str | Path) -> str:
        return self.address("bycert", host, sslcert=self.cert, sslkey=self.key, **more)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with postgres() as server:
        yield Site(server, tmp_path_factory.mktemp("clients"))


def test_a_certificate_is_enough(site: Site) -> None:
    with connect(read_address(site.with_certificate())) as connection:
        row = connection.execute(
            "select ssl, client_dn from pg_stat_ssl where pid = pg_backend_pid()"
        ).fetchone()
    assert row is not None
    assert row[0] is True
    assert "CN=bycert" in row[1]


def test_a_server_that_is_somebody_else_is_refused(site: Site) -> None:
    with pytest.raises(DatabaseError, match="certificate verify failed"):
        connect(read_address(site.with_certificate(sslrootcert=site.other_ca)))
    with pytest.raises(DatabaseError, match="does not match host name"):
        connect(read_address(site.with_certificate(host="localhost", hostaddr=HOST)))


def test_a_client_without_its_certificate_is_refused(site: Site) -> None:
    with pytest.raises(DatabaseError, match="certificate"):
        connect(read_address(site.address()))
    cert, key = site.stranger
    with pytest.raises(DatabaseError, match=r"unknown ca|certificate|SSL"):
        connect(read_address(site.address(sslcert=cert, sslkey=key)))
    with pytest.raises(DatabaseError, match="pg_hba"):
        connect(read_address(site.address(sslmode="disable")))


def test_a_password_is_in_its_file(site: Site, tmp_path: Path) -> None:
    passfile = tmp_path / "passwords"
    passfile.write_text(f"{HOST}:{PORT}:postgres:byword:{PASSWORD}\n")
    passfile.chmod(0o600)
    with connect(read_address(site.address("byword", passfile=passfile))) as connection:
        assert connection.execute("select current_user").fetchone() == ("byword",)
    passfile.write_text(f"{HOST}:{PORT}:postgres:byword:wrong-{PASSWORD}\n")
    with pytest.raises(DatabaseError) as caught:
        connect(read_address(site.address("byword", passfile=passfile)))
    assert "password authentication failed" in str(caught.value)
    assert PASSWORD not in repr(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://byword:{PASSWORD}@{HOST}/postgres",
        f"postgresql://byword@{HOST}/postgres?password={PASSWORD}",
        f"postgresql://byword@{HOST}/postgres?password={PASSWORD}&nonsense=1",
        f"postgresql://byword:{PASSWORD}@[{HOST}/postgres",
        f"postgresql://byword:{PASSWORD}%zz@{HOST}/postgres",
        f"postgresql://byword@{HOST}/postgres?{PASSWORD}",
        f"postgresql://byword@{HOST}/postgres?sslpassword={PASSWORD}",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_said(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_address(address)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("words", [("fleet", "status"), ("watch",)])
def test_no_command_says_a_password(words: tuple[str, ...], tmp_path: Path) -> None:
    config = tmp_path / "watch.toml"
    config.write_text(f'state = "postgresql://byword:{PASSWORD}@[{HOST}/postgres"\n')
    done = subprocess.run(
        command(*words, "--config", config), capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 2
    assert "not a PostgreSQL address" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr


def test_a_service_file_names_everything(site: Site, tmp_path: Path) -> None:
    """The commands themselves: nothing but the service's name stands in the watcher's file."""
    service = tmp_path / "services"
    passfile = tmp_path / "passwords"
    passfile.write_text(f"{HOST}:{PORT}:postgres:byword:{PASSWORD}\n")
    passfile.chmod(0o600)
    service.write_text(
        f"[fleet]\nhost={HOST}\nport={PORT}\ndbname=postgres\nuser=byword\nsslmode=verify-full\n"
        f"sslrootcert={site.ca_file}\npassfile={passfile}\n"
    )
    config = tmp_path / "watch.toml"
    config.write_text('state = "postgresql:///?service=fleet"\n')
    done = subprocess.run(
        command("fleet", "status", "--config", config),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={"PGSERVICEFILE": str(service), "PATH": "/usr/bin"},
    )
    assert done.returncode == 3
    assert "run `provider-proxy fleet migrate`" in done.stderr  # it came in, and found no tables
    assert PASSWORD not in done.stderr
