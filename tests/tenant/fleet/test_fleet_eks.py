"""`ek_dir` in a fleet: the EKs of all hosts of all members; none longer than its proof lives."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from needs_postgres import needs_postgres
from soft_ek import rsa_ek

from provider_proxy.evidence.tpm_keys import parse_public
from provider_proxy.evidence.tpm_writer import encode_public
from provider_proxy.evidence.vtpm_link import spire_name
from provider_proxy.tenant.fleet import imports, leases, rows, schema
from provider_proxy.tenant.fleet.database import Database
from provider_proxy.tenant.fleet.eks import FleetEks
from provider_proxy.tenant.fleet.hosts import ImportedFleet, ImportedHost, PolicyCache, digest_of
from provider_proxy.tenant.watch.ek_directory import EkDirectory
from provider_proxy.tenant.watch.reports import Verdict
from provider_proxy.tenant.watch.states import State
from provider_proxy.testing.postgres import postgres

pytestmark = [needs_postgres, pytest.mark.real]

EKS = {name: encode_public(rsa_ek(number).public_key()) for number, name in enumerate(("a", "b"))}
MEMBER = leases.Member(id=uuid.uuid4(), name="other", version="1", lease_s=60)


@pytest.fixture
def connection() -> Iterator[psycopg.Connection[Any]]:
    with postgres() as server, psycopg.connect(server.dsn, autocommit=True) as opened:
        schema.migrate(opened, shards=1)
        hosts = tuple(
            ImportedHost(
                name=name,
                rules={"interval_s": 5.0, "timeout_s": 3.0},
                files={"vm_ek": digest_of(ek)},
                pin=b"",
            )
            for name, ek in EKS.items()
        )
        fleet = ImportedFleet(hosts=hosts, policies={digest_of(ek): ek for ek in EKS.values()})
        imports.apply(opened, fleet, remove=False)
        yield opened


def judge(
    connection: psycopg.Connection[Any], host: str, state: State, *, age_s: float = 0
) -> None:
    epochs = leases.renew(connection, MEMBER).epochs
    update = rows.Update(host=host, shard=0, verdict=Verdict(state), good_for_s=60, age_s=age_s)
    assert rows.write(connection, MEMBER, epochs, [update]) == {0}


async def test_the_directory_holds_what_anybody_has_proven(
    connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    database = Database(connection.info.dsn)
    now = 1000.0
    directory = EkDirectory(tmp_path / "eks", now=lambda: now)
    directory.open()
    own: dict[str, Any] = {}
    eks = FleetEks(database, PolicyCache(tmp_path / "cache"), directory, lambda: own)

    def shown() -> set[str]:
        directory.remove_old()
        return {path.name for path in (tmp_path / "eks").iterdir()}

    try:
        names = {name: spire_name(parse_public(ek).public_key) for name, ek in EKS.items()}
        await eks.look()
        assert shown() == set()
        judge(connection, "a", State.TRUSTED)
        judge(connection, "b", State.TRUSTED, age_s=7)
        await eks.look()
        assert shown() == set(names.values())
        now += 2  # b's proof lives for 8.5 s, and is 9 s old
        assert shown() == {names["a"]}
        judge(connection, "b", State.TRUSTED)
        judge(connection, "a", State.INVALID_QUOTE)
        await eks.look()
        assert shown() == {names["b"]}
        own["b"] = object()  # ours by now: what the database says of it is older than what we know
        judge(connection, "b", State.INVALID_QUOTE)
        await eks.look()
        assert shown() == {names["b"]}
        now += 20
        assert shown() == set()
    finally:
        database.close()
