"""Who was turned away leaves a line with reason, subject, fingerprint and address, and not too many."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from helpers import FakeQuoter, daemon_with, make_certs

from provider_proxy.host.config.tables import Admin, Config, Listen, TenantRules
from provider_proxy.host.status.turned_away import KEPT, LINES_A_MINUTE, TurnedAway


def test_lines_are_few_and_the_last_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    time = [600.0]
    away = TurnedAway(now=lambda: time[0])
    for number in range(100):
        away.shaken("protocol", f"192.0.2.{number}")
    assert len(caplog.records) == LINES_A_MINUTE
    assert len(away.values()) == KEPT
    assert away.values()[0]["address"] == "192.0.2.99"
    time[0] += 60
    away.shaken("no_certificate", "192.0.2.7")
    assert "it did not show a client certificate" in caplog.records[-1].getMessage()
    assert "(90 more were not written)" in caplog.records[-1].getMessage()


def test_nobody_was_turned_away_who_went(caplog: pytest.LogCaptureFixture) -> None:
    away = TurnedAway()
    for reason in ("ok", "silent", "client_gone"):
        away.shaken(reason, "192.0.2.1")
    assert away.values() == []
    assert not caplog.records


def test_bytes_that_are_no_certificate() -> None:
    away = TurnedAway()
    away.note("x\n\x1b[2J", "192.0.2.1", b"nonsense")
    (one,) = away.values()
    assert (one["subject"], one["fingerprint"]) == (None, None)
    assert str(one["reason"]).isprintable()


@pytest.mark.real
async def test_the_daemon_says_whom_it_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certs = make_certs(tmp_path)
    config = Config(
        state_dir=tmp_path,
        listen=Listen(
            address=("127.0.0.1:0",),
            tls_cert=certs.cert,
            tls_key=certs.key,
            client_ca=certs.ca_file,
        ),
        admin=Admin(address=("127.0.0.1:0",)),
        tenant_defaults=TenantRules(accept_unlisted=False),
    )
    own = x509.load_pem_x509_certificate(certs.client_cert.read_bytes())
    async with daemon_with(FakeQuoter(), config) as started:
        url = f"https://{started.addresses[0]}/version"
        async with httpx.AsyncClient(verify=certs.client(with_cert=True)) as http:
            assert (await http.get(url)).status_code == 403
        async with httpx.AsyncClient(verify=certs.client()) as http:
            with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                await http.get(url)
        expired = ssl.create_default_context(cafile=str(certs.ca_file))
        old = certs.ca.issue_cert(
            "old@example.org", not_after=datetime.now(UTC) - timedelta(days=1)
        )
        old.configure_cert(expired)
        async with httpx.AsyncClient(verify=expired) as http:
            with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                await http.get(url)
        async with httpx.AsyncClient() as http:
            status = await http.get(f"http://{started.admin_addresses[0]}/status")
    late, stranger, known = status.json()["results"]["turned_away"]
    assert known["fingerprint"] == own.fingerprint(hashes.SHA256()).hex()
    assert known["subject"] == own.subject.rfc4514_string()
    assert known["reason"] == "not a tenant of this provider"
    assert known["address"].startswith("127.0.0.1")
    assert stranger["reason"] == "it did not show a client certificate"
    assert late["reason"] == "its certificate was refused: certificate has expired"
    assert known["fingerprint"] in caplog.text
