"""SIGHUP on the real daemon: tenants, certificates and CRL change; nothing in flight is lost."""

from __future__ import annotations

import signal
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from helpers import (
    LIMIT_S,
    NO_LOGS,
    Certs,
    Serving,
    connect,
    get_bytes,
    make_certs,
    serving,
    until,
)

pytestmark = pytest.mark.real

TENANT = '[tenants.acme]\nidentities = ["email:tenant@example.org"]\n'
CLOSED = "[tenant_defaults]\naccept_unlisted = false\n"


def toml(folder: Path, certs: Certs, *, more: str = "", listen: str = "") -> str:
    return (
        f'state_dir = "{folder / "s"}"\n'
        f'[listen]\naddress = "127.0.0.1:0"\n{certs.toml()}{listen}'
        f'[tpm]\ntcti = "embedded"\n[batch]\nwindow_ms = 300\n{NO_LOGS}{more}'
    )


def write_crl(certs: Certs, path: Path, *serials: int) -> None:
    now = datetime.now(UTC)
    ca = x509.load_pem_x509_certificate(certs.ca_file.read_bytes())
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now)
        .next_update(now + timedelta(days=1))
    )
    for serial in serials:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        )
    key = load_pem_private_key(certs.ca.private_key_pem.bytes(), None)
    crl = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    path.write_bytes(crl.public_bytes(Encoding.PEM))


async def hup(daemon: Serving, config: Path, text: str) -> None:
    """Write a new configuration and wait until the daemon has read it."""
    config.write_text(text)
    before = daemon.log.count("reload")
    daemon.process.send_signal(signal.SIGHUP)
    await until(lambda: daemon.log.count("reload") > before, "the reload")


async def test_a_removed_tenant_loses_its_open_connection(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    good = toml(tmp_path, certs, more=CLOSED + TENANT)
    context = certs.client(with_cert=True)
    async with serving(tmp_path, good) as daemon:
        config = tmp_path / "d0.toml"
        async with connect(daemon.address, context) as kept:
            assert (await kept.get("/version")).status == 200
            await hup(daemon, config, toml(tmp_path, certs, more=CLOSED))
            reply = await kept.get("/version")
            assert reply.status == 403
            assert reply.closes
        await hup(daemon, config, good)
        async with connect(daemon.address, context) as again:
            assert (await again.get("/version")).status == 200


async def test_a_revoked_certificate_loses_its_open_connection(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    crl = tmp_path / "crl.pem"
    write_crl(certs, crl)
    text = toml(tmp_path, certs, listen=f'client_crl = "{crl}"\n')
    serial = x509.load_pem_x509_certificate(certs.client_cert.read_bytes()).serial_number
    async with serving(tmp_path, text) as daemon:
        async with connect(daemon.address, certs.client(with_cert=True)) as kept:
            assert (await kept.get("/version")).status == 200
            write_crl(certs, crl, serial)
            await hup(daemon, tmp_path / "d0.toml", text)
            assert (await kept.get("/version")).status == 403


async def test_a_resumed_session_is_looked_at_as_any_other(tmp_path: Path) -> None:
    """OpenSSL passes a resumed session after its certificate was revoked; we do not."""
    certs = make_certs(tmp_path)
    crl = tmp_path / "crl.pem"
    write_crl(certs, crl)
    text = toml(tmp_path, certs, listen=f'client_crl = "{crl}"\n')
    serial = x509.load_pem_x509_certificate(certs.client_cert.read_bytes()).serial_number
    context = certs.client(with_cert=True)
    async with serving(tmp_path, text) as daemon:
        host, _, port = daemon.address.rpartition(":")

        def ask(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool, bytes]:

            with (
                socket.create_connection((host, int(port)), LIMIT_S) as plain,
                context.wrap_socket(plain, server_hostname="localhost", session=session) as tls,
            ):
                tls.sendall(get_bytes("/version"))
                first = tls.recv(65536)
                return tls.session, bool(tls.session_reused), first

        session, _, first = await trio.to_thread.run_sync(ask, None)
        assert first.startswith(b"HTTP/1.1 200")
        write_crl(certs, crl, serial)
        # The old TLS context goes on where the certificates stay: only the directory says no.
        await hup(daemon, tmp_path / "d0.toml", text)
        _, _, second = await trio.to_thread.run_sync(ask, session)
        assert second.startswith(b"HTTP/1.1 403")


async def test_a_bad_configuration_is_refused_as_a_whole(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    good = toml(tmp_path, certs, more=CLOSED + TENANT)
    async with serving(tmp_path, good) as daemon:
        async with connect(daemon.address, certs.client(with_cert=True)) as kept:
            for bad in (
                "not toml at all [",
                toml(tmp_path, certs, more=CLOSED + "[batch2]\n"),
                toml(tmp_path, certs, more=CLOSED, listen='client_crl = "/nonexistent"\n'),
            ):
                await hup(daemon, tmp_path / "d0.toml", bad)
                assert "reload refused" in daemon.log
                assert (await kept.get("/version")).status == 200


async def test_what_waits_at_a_reload_is_answered(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    text = toml(tmp_path, certs)
    async with serving(tmp_path, text) as daemon:
        async with connect(daemon.address, certs.client(with_cert=True)) as wire:
            await wire.send(get_bytes("/verifier/quote?nonce=abcdefghijklmnop&mask=0x1"))
            for _ in range(5):
                await hup(daemon, tmp_path / "d0.toml", text)
            assert (await wire.reply()).status == 200


async def test_new_connections_get_the_new_certificate(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    old, new = make_certs(tmp_path), make_certs(tmp_path / "new")
    async with serving(tmp_path, toml(tmp_path, old)) as daemon:
        async with connect(daemon.address, old.client(with_cert=True)) as kept:
            await hup(daemon, tmp_path / "d0.toml", toml(tmp_path, new))
            async with connect(daemon.address, new.client(with_cert=True)) as wire:
                assert (await wire.get("/version")).status == 200
            assert (await kept.get("/version")).status == 200  # its handshake was good
            with pytest.raises(trio.BrokenResourceError):
                async with connect(daemon.address, old.client(with_cert=True)) as wire:
                    await wire.get("/version")


async def test_a_closing_tls_connection_ends_at_once(tmp_path: Path) -> None:
    """Who reads to the end must not wait for us to linger."""
    certs = make_certs(tmp_path)
    async with serving(tmp_path, toml(tmp_path, certs)) as daemon:
        began = trio.current_time()
        for _ in range(5):
            async with connect(daemon.address, certs.client(with_cert=True)) as wire:
                await wire.send(get_bytes("/version", "Connection: close"))
                assert (await wire.reply()).status == 200
                assert await wire.is_closed()
        assert trio.current_time() - began < 4  # five lingers are five seconds


async def test_drop_ins_are_read(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    text = toml(tmp_path, certs, more=CLOSED)
    async with serving(tmp_path, text) as daemon:
        context = certs.client(with_cert=True)
        async with connect(daemon.address, context) as wire:
            assert (await wire.get("/version")).status == 403
        folder = tmp_path / "tenants.d"
        folder.mkdir()
        (folder / "acme.toml").write_text(TENANT)
        await hup(daemon, tmp_path / "d0.toml", text)
        async with connect(daemon.address, context) as wire:
            assert (await wire.get("/version")).status == 200


async def test_a_key_that_needs_a_restart_is_named(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    async with serving(tmp_path, toml(tmp_path, certs)) as daemon:
        await hup(
            daemon, tmp_path / "d0.toml", toml(tmp_path, certs, more="[limits]\nmax_queue = 9\n")
        )
        await until(lambda: "limits.max_queue has changed" in daemon.log)
