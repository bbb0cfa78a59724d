"""The dates of a daemon: of all that its configuration names; it is not ready where a vital one ended."""

from __future__ import annotations

import re
import ssl
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from cryptography.x509.oid import ExtendedKeyUsageOID
from dated_place import Place
from helpers import LIMIT_S, FakeQuoter, daemon_with

from provider_proxy.cli import status_view
from provider_proxy.common import dates
from provider_proxy.errors import HostError
from provider_proxy.host.config.chip_tables import KeylimeAgent, QuoterTable
from provider_proxy.host.config.material import read_dates
from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.host.config.tables import Config
from provider_proxy.host.metrics import Metrics

pytestmark = pytest.mark.real


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_one_place_knows_every_date(place: Place) -> None:
    ca, cert, key = (place.folder / name for name in ("ca.crt", "client.crt", "client.key"))
    table = RegistrarTable(url="https://r", ca=ca, client_cert=cert, client_key=key)
    agent = KeylimeAgent(registrar_ca=ca, client_cert=cert, client_key=key)
    config = place.config(
        registrars={"acme": table}, keylime_agent=agent, quoter=QuoterTable(kind="keylime-agent")
    )
    found = {dated.name: dated for dated in read_dates(config)}
    assert set(found) == {
        *("listen.client_ca", "listen.tls_cert", "listen.client_crl"),
        *("registrars.acme.ca", "registrars.acme.client_cert"),
        *("keylime_agent.registrar_ca", "keylime_agent.client_cert"),
    }
    vital = {name for name, dated in found.items() if dated.vital}
    assert vital == {"listen.client_ca", "listen.tls_cert"}
    metrics = Metrics()
    metrics.show_dates(found.values())
    name = "provider_proxy_not_after_seconds"
    end = metrics.registry.get_sample_value(name, {"what": "listen.tls_cert"})
    assert end == found["listen.tls_cert"].not_after.timestamp()
    metrics.show_dates([])
    assert metrics.registry.get_sample_value(name, {"what": "listen.tls_cert"}) is None


def test_a_file_that_cannot_be_read_is_named(place: Place) -> None:
    table = RegistrarTable(url="https://r", ca=place.folder / "none")
    with pytest.raises(HostError, match=r"^registrars\.acme\.ca: cannot read "):
        read_dates(place.config(registrars={"acme": table}))


async def look(config: Config) -> tuple[int, dict[str, Any], str]:
    """What a started daemon says: readiness, status and metrics."""
    async with daemon_with(FakeQuoter(), config) as started:
        (admin,) = started.admin_addresses
        async with httpx.AsyncClient(base_url=f"http://{admin}") as http:
            ready = await http.get("/readyz")
            status = (await http.get("/status")).json()["results"]
            metrics = (await http.get("/metrics")).text
    return ready.status_code, status, metrics


async def test_all_is_well(place: Place) -> None:
    code, status, metrics = await look(place.config())
    assert code == 200
    assert [one["state"] for one in status["dates"]] == ["good"] * 3
    assert 'provider_proxy_not_after_seconds{what="listen.client_crl"}' in metrics
    assert "the first to expire is listen.client_crl" in status_view._dates(status["dates"]).plain


async def test_an_expired_server_certificate_is_not_ready(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, /readyz said 200 while every tenant failed."""
    place.pair("server", ExtendedKeyUsageOID.SERVER_AUTH, days=-1)
    code, status, _ = await look(place.config())
    assert code == 503
    assert status["state"] == "trouble"
    assert "listen.tls_cert" in status["why"]
    assert "no tenant can connect" in status["why"]
    assert "no tenant can connect" in caplog.text
    assert "expired on" in status_view._dates(status["dates"]).plain


async def test_a_crl_that_ran_out_does_not_stop_a_reboot(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.crl(until_days=-1)
    code, status, _ = await look(place.config())
    assert code == 200
    assert {one["what"]: one["state"] for one in status["dates"]}["listen.client_crl"] == "expired"
    assert "revocation is unknown" in caplog.text


@pytest.mark.parametrize("strict", [False, True])
async def test_a_crl_that_runs_out_while_the_daemon_runs(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: bool
) -> None:
    """Before, nothing mentioned it, and the next restart failed."""
    monkeypatch.setattr(dates, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(dates, "WARN_EVERY", timedelta(0))
    place.crl(until_days=3 / 86_400)  # three seconds
    config = place.config(crl_strict=strict)
    async with daemon_with(FakeQuoter(), config) as started:
        admin = httpx.AsyncClient(base_url=f"http://{started.admin_addresses[0]}")
        context = ssl.create_default_context(cafile=str(place.folder / "ca.crt"))
        context.load_cert_chain(place.folder / "client.crt", place.folder / "client.key")
        port = started.addresses[0].rpartition(":")[2]
        tenant = httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=context)
        async with admin, tenant:
            assert (await tenant.get("/version")).status_code in (200, 403)  # on a connection kept
            with trio.fail_after(LIMIT_S):
                while True:
                    status = (await admin.get("/status")).json()["results"]
                    states = {one["what"]: one["state"] for one in status["dates"]}
                    if states["listen.client_crl"] == "expired" and "expired on" in caplog.text:
                        break
                    await trio.sleep(0.1)
            ready = await admin.get("/readyz")
            metrics = (await admin.get("/metrics")).text
            answer = await tenant.get("/version")
            async with httpx.AsyncClient(verify=context) as fresh:
                again = await fresh.get(f"https://localhost:{port}/version")
    found = re.search(r'not_after_seconds\{what="listen.client_crl"\} (\S+)', metrics)
    assert found is not None
    assert float(found[1]) < time.time()
    if strict:
        assert (ready.status_code, status["state"]) == (503, "trouble")
        assert "listen.crl_strict refuses every client" in caplog.text
        assert (answer.status_code, again.status_code) == (403, 403)
    else:
        assert (ready.status_code, status["state"]) == (200, "ready")
        assert "revocation is unknown" in caplog.text
        assert (answer.status_code, again.status_code) == (200, 200)


def test_a_strict_crl_is_vital(place: Place) -> None:
    found = {dated.name: dated for dated in read_dates(place.config(crl_strict=True))}
    assert found["listen.client_crl"].vital
