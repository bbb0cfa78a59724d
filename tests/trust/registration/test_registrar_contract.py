"""One contract for the real Keylime registrar, over TLS and without, and for the fake one.

A real TPM (swtpm) solves the challenges, with a P-256 and with an RSA AK.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from keylime_helpers import Registrar, running_registrar
from registrar_helpers import certificate
from simulated_registrar import FakeRegistrar, wrap
from tpm_helpers import Swtpm, open_quoter

from provider_proxy.errors import RegistrarError
from provider_proxy.evidence.tpm_keys import parse_public
from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.registration.client import (
    Record,
    RegistrarClient,
    http_client,
    tls_context,
)
from provider_proxy.trust.registration.credential import auth_tag, parse_challenge

pytestmark = pytest.mark.real

IDS = itertools.count()


@pytest.fixture(scope="module")
def registrar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registrar]:
    with running_registrar(tmp_path_factory.mktemp("registrar")) as running:
        yield running


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Swtpm, Path]]]:
    """A TPM for each kind of AK, and where its AK's authValue is."""
    made = {
        kind: (Swtpm(folder / "chip"), folder / "s")
        for kind, folder in ((kind, tmp_path_factory.mktemp(kind)) for kind in ("ecc", "rsa"))
    }
    for swtpm, _ in made.values():
        swtpm.start()
    yield made
    for swtpm, _ in made.values():
        swtpm.close()


@dataclass(slots=True)
class Side:
    """A registrar that is asked, and the TPM that is registered in it."""

    http: httpx.AsyncClient
    url: str
    quoter: EsysQuoter
    can_read: bool

    def client(self, agent_id: str | None = None) -> RegistrarClient:
        return RegistrarClient(self.http, self.url, agent_id or f"agent-{next(IDS)}")

    @property
    def record(self) -> Record:
        keys = self.quoter.identity
        return Record(
            ek_public=keys.ek_public, ak_public=keys.ak_public, contact=("192.0.2.7", 8890)
        )

    async def solve(self, blob: bytes, agent_id: str) -> str:
        key = await self.quoter.activate_credential(*parse_challenge(blob))
        assert len(key) == 32
        return auth_tag(key, agent_id)


def table_of(registrar: Registrar, kind: str) -> RegistrarTable:
    """How a registrar is reached."""
    if kind == "plain":
        return RegistrarTable(url=registrar.http_url, insecure_plaintext=True)
    table = RegistrarTable(url=registrar.https_url, ca=registrar.ca)
    if kind == "tls":
        return replace(table, client_cert=registrar.client_cert, client_key=registrar.client_key)
    return table


@asynccontextmanager
async def made(
    kind: str, algorithm: str, registrar: Registrar, chips: dict[str, tuple[Swtpm, Path]]
) -> AsyncIterator[Side]:
    swtpm, state = chips[algorithm]
    async with AsyncExitStack() as stack:
        quoter = await stack.enter_async_context(
            open_quoter(swtpm.tcti, state, ak_algorithm=algorithm)
        )
        if kind.startswith("fake"):
            fake = FakeRegistrar(wrap=wrap, has_cert=kind == "fake")
            http = await stack.enter_async_context(fake.open_http())
            yield Side(http, "http://fake", quoter, kind == "fake")
        else:
            table = table_of(registrar, kind)
            http = await stack.enter_async_context(http_client(tls_context("r", table)))
            yield Side(http, table.url, quoter, kind == "tls")


@pytest.fixture(params=["fake", "tls"])
async def side(
    request: pytest.FixtureRequest, registrar: Registrar, chips: dict[str, tuple[Swtpm, Path]]
) -> AsyncIterator[Side]:
    async with made(request.param, "ecc", registrar, chips) as it:
        yield it


@pytest.mark.parametrize("algorithm", ["ecc", "rsa"])
@pytest.mark.parametrize("kind", ["fake", "fake-no-cert", "tls", "tls-no-cert", "plain"])
async def test_a_host_is_registered_in_two_steps(
    kind: str, algorithm: str, registrar: Registrar, chips: dict[str, tuple[Swtpm, Path]]
) -> None:
    async with made(kind, algorithm, registrar, chips) as it:
        agent_id = f"agent-{next(IDS)}"
        client = it.client(agent_id)
        assert await client.negotiate() == "2.6"
        if it.can_read:
            assert await client.read() is None
        blob = await client.register(it.record)
        if it.can_read:
            assert await client.read() is None
        await client.activate(await it.solve(blob, agent_id))
        if it.can_read:
            assert await client.read() == it.record
        else:
            with pytest.raises(RegistrarError) as caught:
                await client.read()
            assert caught.value.status in (400, 403)


async def test_registering_again_takes_the_record_back_until_it_is_activated(side: Side) -> None:
    client = side.client("again")
    await client.activate(await side.solve(await client.register(side.record), "again"))
    assert await client.read() == side.record
    moved = replace(side.record, contact=("192.0.2.8", 1))
    blob = await client.register(moved)
    assert await client.read() is None
    await client.activate(await side.solve(blob, "again"))
    assert await client.read() == moved


async def test_an_answer_that_was_good_before_is_a_wrong_one_now(side: Side) -> None:
    client = side.client("stale")
    tag = await side.solve(await client.register(side.record), "stale")
    await client.register(side.record)
    with pytest.raises(RegistrarError) as caught:
        await client.activate(tag)
    assert caught.value.status == 400


async def test_a_wrong_answer_deletes_an_active_record(side: Side) -> None:
    client = side.client("wrong")
    await client.activate(await side.solve(await client.register(side.record), "wrong"))
    with pytest.raises(RegistrarError) as caught:
        await client.activate("00" * 48)
    assert caught.value.status == 400
    assert await client.read() is None
    with pytest.raises(RegistrarError) as caught:
        await client.activate("00" * 48)
    assert caught.value.status == 404


async def test_another_tpm_is_refused_and_the_record_stays(side: Side) -> None:
    client = side.client("taken")
    await client.activate(await side.solve(await client.register(side.record), "taken"))
    other = SoftTpm().ak_public
    for record in (
        replace(side.record, ak_public=other),
        replace(side.record, ek_public=other),
    ):
        with pytest.raises(RegistrarError) as caught:
            await client.register(record)
        assert caught.value.status == 403
    assert await client.read() == side.record


async def test_a_record_that_was_never_activated_is_another_tpms_too(side: Side) -> None:
    client = side.client("half")
    await client.register(replace(side.record, ak_public=SoftTpm().ak_public))
    with pytest.raises(RegistrarError) as caught:
        await client.register(side.record)
    assert caught.value.status == 403


async def test_keys_that_are_none_and_a_foreign_certificate_are_refused(side: Side) -> None:
    foreign = certificate(ec.generate_private_key(ec.SECP256R1()))
    assert parse_public(side.record.ek_public)
    for record, status in (
        (replace(side.record, ek_cert=foreign), 400),
        (replace(side.record, ek_public=b"\0\x04none"), 500),
    ):
        client = side.client()
        with pytest.raises(RegistrarError) as caught:
            await client.register(record)
        assert caught.value.status == status
        assert await client.read() is None


async def test_a_record_without_contact(side: Side) -> None:
    client = side.client("no-contact")
    bare = replace(side.record, contact=None)
    await client.activate(await side.solve(await client.register(bare), "no-contact"))
    assert await client.read() == bare


async def test_a_registrar_under_another_ca_is_not_talked_to(
    registrar: Registrar, tmp_path: Path
) -> None:
    for table in (
        RegistrarTable(url=registrar.https_url),  # the system's CAs
        RegistrarTable(url=registrar.https_url.replace("127.0.0.1", "127.0.0.2"), ca=registrar.ca),
    ):
        async with http_client(tls_context("r", table)) as http:
            with pytest.raises(RegistrarError, match="no answer"):
                await RegistrarClient(http, table.url, "x").negotiate()
