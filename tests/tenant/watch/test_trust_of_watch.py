"""Whom the watcher trusts: a registrar's record, checked and pinned; and the link of a VM's vTPM."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from binding_directories import FakeBook, register
from fake_registrar import FakeRegistrar
from helpers import make_answer
from soft_ek import Authority, SoftHost, ek_certificate, rsa_ek
from watch_helpers import FakeProxy, Rig, response

from provider_proxy.errors import ConfigError, HostError
from provider_proxy.evidence.model import QuoteRequest
from provider_proxy.evidence.vtpm_link import ek_digest
from provider_proxy.host.api.tenant import identity_results
from provider_proxy.tenant.fleet.hosts import parse_trust, read_fleet
from provider_proxy.tenant.fleet.registrars import pin_from_registrars
from provider_proxy.tenant.watch.config import parse_watch_config
from provider_proxy.tenant.watch.registrars import KnownAks, Registrars
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.tables import HostRules
from provider_proxy.testing.soft_tpm import SoftTpm

VENDOR = Authority("vendor")
AGENT = "host-17.example"
VM = "0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b"


def config(directory: Path, **table: Any) -> dict[str, Any]:
    made = {"url": FakeRegistrar.url, "ek_ca": str(directory / "cas")} | table
    return {
        "pins": str(directory / "pins"),
        "registrars": {"mine": {k: v for k, v in made.items() if v is not None}},
        "hosts": {
            "h": {
                "provider_ip": "192.0.2.1",
                "insecure_any_state": True,
                "registrar": "mine",
                "uuid": AGENT,
            }
        },
    }


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeBook:
    """A registrar that is reached through any client of the watcher's."""
    made = FakeBook()
    (tmp_path / "cas").mkdir()
    (tmp_path / "cas" / "vendor.pem").write_bytes(VENDOR.pem())

    def client(**_settings: Any) -> httpx.AsyncClient:
        return made.client()

    monkeypatch.setattr("provider_proxy.tenant.watch.registrars.open_client", client)
    return made


def host_of(tpm: SoftTpm, number: int = 0, *, vouched: bool = True) -> SoftHost:
    ek = rsa_ek(number)
    return SoftHost(tpm=tpm, ek=ek, ek_cert=ek_certificate(VENDOR, ek) if vouched else None)


async def judged(rig: Rig, directory: Path) -> State:
    """One round, by a new watcher."""
    registrars = Registrars(parse_watch_config(config(directory)))
    rig.aks = KnownAks(registrars)  # type: ignore[assignment]
    try:
        return await rig.host(registrar="mine", uuid=AGENT, max_retries=0).round()
    finally:
        await registrars.aclose()


async def test_a_registered_host_is_trusted_and_pinned(
    tmp_path: Path, nursery: trio.Nursery, directory: FakeBook
) -> None:
    rig = Rig(tmp_path)
    rig.proxy.serve_in(nursery)
    assert await judged(rig, tmp_path) is State.INVALID_QUOTE  # not registered
    assert rig.reports[-1]["error"] == "NotRegisteredError"
    assert not rig.proxy.asked
    register(directory, AGENT, host_of(rig.proxy.tpm))
    assert await judged(rig, tmp_path) is State.TRUSTED
    assert rig.reports[-1]["uuid"] == AGENT
    assert (tmp_path / "pins" / "h.json").exists()
    # A stranger replaces the record by that of a genuine TPM of his own.
    directory.ask("DELETE", f"/v2.6/agents/{AGENT}")
    stranger = SoftTpm()
    register(directory, AGENT, host_of(stranger, 1))
    rig.proxy.tpm = stranger
    assert await judged(rig, tmp_path) is State.INVALID_QUOTE
    assert rig.reports[-1]["error"] == "PinChangedError"


async def test_an_import_into_a_fleet_pins_what_the_registrar_recorded(
    tmp_path: Path, nursery: trio.Nursery, directory: FakeBook
) -> None:
    """Checked as a watcher does, against the pin that is there; or nothing is imported."""
    rig = Rig(tmp_path)
    rig.proxy.serve_in(nursery)
    read = parse_watch_config(config(tmp_path))
    with pytest.raises(HostError, match="nothing is imported: no pin from the registrar for h: "):
        await pin_from_registrars(read)
    register(directory, AGENT, host_of(rig.proxy.tpm))
    assert await pin_from_registrars(read) == 1
    (host,) = read_fleet(read).hosts
    assert parse_trust("h", host.pin).host.ak.name == rig.proxy.tpm.ak.name
    assert await pin_from_registrars(read) == 1  # and again
    directory.ask("DELETE", f"/v2.6/agents/{AGENT}")
    register(directory, AGENT, host_of(SoftTpm(), 1))
    with pytest.raises(HostError, match="h: "):
        await pin_from_registrars(read)
    assert read_fleet(read).hosts == (host,)


async def test_an_ek_that_nobody_vouches_for_is_refused(
    tmp_path: Path, nursery: trio.Nursery, directory: FakeBook
) -> None:
    rig = Rig(tmp_path)
    rig.proxy.serve_in(nursery)
    register(directory, AGENT, host_of(rig.proxy.tpm, vouched=False))
    assert await judged(rig, tmp_path) is State.INVALID_QUOTE
    assert rig.reports[-1]["error"] == "UntrustedEkError"


async def test_the_chip_s_own_chain_comes_from_the_host_and_the_report_names_the_anchor(
    tmp_path: Path, nursery: trio.Nursery, directory: FakeBook, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    rig.proxy.serve_in(nursery)
    chip_ca, ek = Authority("chip's own", VENDOR), rsa_ek()
    host = SoftHost(tpm=rig.proxy.tpm, ek=ek, ek_cert=ek_certificate(chip_ca, ek))
    register(directory, AGENT, host)
    assert await judged(rig, tmp_path) is State.INVALID_QUOTE  # the proxy shows no identity
    assert rig.reports[-1]["error"] == "UntrustedEkError"
    assert [report["ek_anchor"] for report in rig.reports] == [None]
    shown = identity_results(
        ak_public=host.ak_public,
        ak_pem=b"",
        ak_name=host.ak_name,
        ek_public=host.ek_public,
        ek_cert=host.ek_cert,
        ek_chain=(chip_ca.der(),),
        host_uuid=VM,
        software=False,
    )
    for body in (b"{}", b"no JSON", json.dumps({"results": {**shown, "ek_chain": [1]}}).encode()):
        rig.proxy.identity = response(200, body)
        assert await judged(rig, tmp_path) is State.INVALID_QUOTE
    rig.proxy.identity = response(200, json.dumps({"results": shown}).encode())
    with caplog.at_level(logging.INFO):
        assert await judged(rig, tmp_path) is State.TRUSTED
    assert [report["ek_anchor"] for report in rig.reports[-1:]] == ["CN=vendor"]
    assert "the maker of its TPM is Infineon, proven under CN=vendor" in caplog.text


async def test_a_registrar_that_is_away_fails_the_host(
    tmp_path: Path, nursery: trio.Nursery, directory: FakeBook
) -> None:
    rig = Rig(tmp_path)
    rig.proxy.serve_in(nursery)

    async def broken() -> None:
        raise httpx.ConnectError("no route")

    directory.fake.before = broken
    assert await judged(rig, tmp_path) is State.FAILED
    assert rig.reports[-1]["error"] == "ReplyError"


async def test_hosts_without_a_registrar_have_their_pins(
    tmp_path: Path, directory: FakeBook
) -> None:
    registrars = Registrars(parse_watch_config(config(tmp_path)))
    tpm = SoftTpm()
    registrars.pins.pin("other", tpm.ak_public)
    aks = KnownAks(registrars)
    trust = await aks.trusted("other", HostRules(provider_ip="192.0.2.2"))
    assert trust.host.ak.name == tpm.ak.name
    assert not directory.fake.calls
    await registrars.aclose()


@pytest.mark.parametrize(
    ("table", "host", "why"),
    [
        ({"url": None}, {}, "url is missing"),
        ({"url": "http://registrar.example:8891"}, {}, "url must be an https URL"),
        ({"ek_ca": None}, {}, "needs ek_ca, the CAs that vouch for EKs"),
        ({"insecure_no_ek": True}, {}, "needs ek_ca, the CAs that vouch for EKs"),
        ({"cert": "x"}, {}, "belong together"),
        ({"x": 1}, {}, "is not a key"),
        ({}, {"registrar": "yours"}, "must name a"),
        ({}, {"registrar": "mine", "uuid": "a/b"}, "uuid must be"),
        ({}, {"vm": VM}, "vm and vm_ek belong together"),
        ({}, {"vm_ek": "x"}, "vm and vm_ek belong together"),
        ({}, {"vm_least": "confirmed"}, "vm_least needs vm"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, table: dict[str, Any], host: dict[str, Any], why: str
) -> None:
    data = config(tmp_path, **table)
    data["hosts"]["h"] |= host
    with pytest.raises(ConfigError, match=why):
        parse_watch_config(data)


def test_a_registrar_needs_the_host_s_id_there(tmp_path: Path) -> None:
    data = config(tmp_path)
    del data["hosts"]["h"]["uuid"]
    with pytest.raises(ConfigError, match="registrar needs uuid"):
        parse_watch_config(data)


def test_a_bad_tls_file_of_a_registrar(tmp_path: Path) -> None:
    (tmp_path / "cas").mkdir()
    (tmp_path / "cas" / "vendor.pem").write_bytes(VENDOR.pem())
    with pytest.raises(HostError, match=r"registrars\.mine"):
        Registrars(parse_watch_config(config(tmp_path, ca=str(tmp_path / "none.pem"))))


# --- the link -----------------------------------------------------------------------------------------


def claims(**changes: Any) -> bytes:
    values = {
        "vm": VM,
        "eks": [{"alg": "rsa2048", "spki_sha256": ek_digest(vm_ek()).hex()}],
        "running": True,
        "confirmed": False,
        "issuer": "delegate",
        "migrated": False,
        "generation": 1,
        "registered_at": 1.0,
    }
    return json.dumps(values | changes).encode()


def vm_ek() -> bytes:
    return SoftHost(ek=rsa_ek(3)).ek_public


@pytest.mark.parametrize(
    ("changes", "rules", "error"),
    [
        ({}, {}, None),
        ({"confirmed": True}, {"vm_least": "confirmed"}, None),
        ({}, {"vm_least": "confirmed"}, "NotConfirmedError"),
        ({"running": False}, {}, "VmNotRunningError"),
        ({"eks": []}, {}, "EkNotLinkedError"),
        ({"vm": "6f1d2c3b-4a5e-4c7d-8e9f-0a1b2c3d4e5f"}, {}, "ClaimsError"),
        ({"running": 1}, {}, "LinkClaimsError"),
    ],
)
async def test_the_link_is_judged(
    tmp_path: Path,
    nursery: trio.Nursery,
    changes: dict[str, Any],
    rules: dict[str, Any],
    error: str | None,
) -> None:
    rig = Rig(tmp_path, proxy=FakeProxy())
    rig.proxy.serve_in(nursery)

    def answer(request: QuoteRequest) -> bytes:
        assert str(request.vm) == VM
        made = make_answer(rig.proxy.tpm, request, claims=claims(**changes))
        return response(200, b"".join(made.body()))

    rig.proxy.answer = answer
    (tmp_path / "ek").write_bytes(vm_ek())
    data = {"provider_ip": "192.0.2.1", "insecure_any_state": True, "vm": VM}
    parsed = parse_watch_config({"hosts": {"h": {**data, "vm_ek": str(tmp_path / "ek"), **rules}}})
    host = rig.host(vm=parsed.hosts["h"].vm, vm_ek=parsed.hosts["h"].vm_ek, **rules)
    expected = State.TRUSTED if error is None else State.INVALID_QUOTE
    assert await host.round() is expected
    assert rig.reports[-1]["error"] == error
