"""The real daemon's server beyond TLS: users of a unix socket as tenants, and the audit log."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import (
    NO_LOGS,
    Asker,
    connect,
    plain_toml,
    quote_over,
    quote_target,
    run_command,
    serving,
    trusted_ak,
)

pytestmark = pytest.mark.real

CLOSED = "[tenant_defaults]\naccept_unlisted = false\n"


def unix_toml(folder: Path, more: str) -> str:
    return (
        f'state_dir = "{folder / "s"}"\n[listen]\naddress = "unix:{folder / "server"}"\n'
        f'insecure_plaintext = true\n[tpm]\ntcti = "embedded"\n{NO_LOGS}{more}'
    )


async def test_a_unix_user_is_known_by_its_credentials(tmp_path: Path) -> None:
    own = f'[tenants.agent]\nidentities = ["uid:{os.getuid()}"]\npcr_allow = [0]\n'
    async with serving(tmp_path, unix_toml(tmp_path, CLOSED + own)) as daemon:
        asker = Asker(await trusted_ak(daemon.address))
        async with connect(daemon.address) as wire:
            await quote_over(wire, asker, 0b01)
            refused = await wire.get(quote_target(asker.challenge(0b10)))
            assert refused.status == 400  # the rules of its table hold
            assert refused.results()["parameter"] == "mask"


async def test_another_unix_user_stays_outside(tmp_path: Path) -> None:
    other = f'[tenants.agent]\nidentities = ["uid:{os.getuid() + 1}"]\n'
    async with serving(tmp_path, unix_toml(tmp_path, CLOSED + other)) as daemon:
        async with connect(daemon.address) as wire:
            assert (await wire.get("/version")).status == 403


async def test_a_tenants_nonce_is_proven_in_the_audit_log(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    audit = f'[audit]\nenabled = true\npath = "{log}"\n'
    async with serving(tmp_path, plain_toml(tmp_path / "s", tables=audit)) as daemon:
        asker = Asker(await trusted_ak(daemon.address))
        challenge = asker.challenge(0b11)
        async with connect(daemon.address) as wire:
            reply = await wire.get(quote_target(challenge))
        asker.verify(reply.body, challenge)
        await daemon.stop(15)
    nonce = challenge.request.nonce.decode()
    assert nonce not in log.read_text()
    assert log.stat().st_mode & 0o077 == 0
    evidence = tmp_path / "evidence.json"
    evidence.write_bytes(reply.body)
    words = ["audit", "prove", "--log", str(log), "--json"]
    found = run_command(*words, "--nonce", nonce, "--mask", "0x3", "--evidence", str(evidence))
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["found"] is True
    missing = run_command(*words, "--nonce", nonce[::-1], "--mask", "0x3")
    assert missing.returncode == 1
