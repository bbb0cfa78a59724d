"""The bridge in push mode with the real parts: Keylime 7.14.3's verifier, `keylime_tenant`, swtpm."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from keylime_rig import Keylime, Running, ak_of, running_bridge, running_tenant
from keylime_scenes import (
    FILES,
    FIRMWARE,
    LIES,
    MORE,
    make_refstate,
    runtime_policy,
    start,
    until_said,
)
from plain_proxy import plain_proxies
from real_host import RealHost

from provider_proxy.evidence.model import ClockState

pytestmark = pytest.mark.real

PUSHED = {"measured_boot_policy_name": "example", "mode": "push", "quote_interval": "1"}
PUSH = "--push-model"


@pytest.fixture(scope="module")
def keylime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keylime]:
    with running_tenant(tmp_path_factory.mktemp("keylime"), settings=PUSHED) as made:
        yield made


async def until(
    keylime: Keylime, agent_id: str, wanted: str, *, more: int = 0, limit_s: float = 40.0
) -> None:
    """Wait for an attestation status, and for so many more good attestations."""
    goal = more and int(keylime.status(agent_id).get("attestation_count", 0)) + more
    end = time.monotonic() + limit_s
    while True:
        status = await trio.to_thread.run_sync(keylime.status, agent_id)
        if status.get("attestation_status") == wanted and status["attestation_count"] >= goal:
            return
        assert time.monotonic() < end, (status, keylime.log[-4000:])
        await trio.sleep(0.2)


def latest(keylime: Keylime, agent_id: str) -> Mapping[str, Any]:
    """The verifier's latest attestation of an agent, as its administrator sees it."""
    answer = keylime.http.get(f"{keylime.verifier.url}/v3.0/agents/{agent_id}/attestations/latest")
    found: Mapping[str, Any] = answer.raise_for_status().json()["data"]["attributes"]
    return found


def policy_of(files: list[Any], generator: int) -> str:
    made = json.loads(runtime_policy(files))
    made["meta"]["generator"] = generator
    return json.dumps(made)


async def until_status(bridge: Running, name: str, key: str, wanted: str) -> Mapping[str, Any]:
    end = time.monotonic() + 40
    while True:
        host: Mapping[str, Any] = bridge.status()["hosts"][name]
        if wanted in str(host[key]):
            return host
        assert time.monotonic() < end, (host, bridge.log[-3000:])
        await trio.sleep(0.1)


@pytest.mark.skipif("TEST_KEYLIME_BRIDGE" not in os.environ, reason="make test-keylime-bridge")
async def test_a_host_is_attested_by_posting_until_it_runs_an_unknown_file(
    keylime: Keylime, tmp_path: Path
) -> None:
    """TPM, runtime and measured-boot policy; a growing list, restarts of the bridge, a reboot."""
    host = RealHost(tmp_path / "host")
    policy = tmp_path / "runtime.json"
    policy.write_text(policy_of(FILES + MORE, 2))
    refstate = tmp_path / "refstate.json"
    words = ("--runtime-policy", str(policy), "--mb_refstate", str(refstate))
    debug = ("--tpm_policy", json.dumps({"23": ["00" * 32]}))
    try:
        async with AsyncExitStack() as stack:
            up = await stack.enter_async_context(AsyncExitStack())
            await up.enter_async_context(host.up(FILES))
            make_refstate(keylime, host.folder / "uefi", refstate)
            rules = {"host": host.rules | {"mode": "push"}}
            bridge = stack.enter_context(running_bridge(keylime, tmp_path / "bridge", rules))
            bridge.pin("host", await ak_of(host))
            agent_id = (await start(bridge))["host"]
            assert bridge.status()["hosts"]["host"]["port"] is None
            await until_status(bridge, "host", "push_error", "does not know agent")
            await keylime.add(agent_id, PUSH, *debug, *words)
            await until(keylime, agent_id, "PASS", more=3)
            for file in MORE[:3]:
                await trio.to_thread.run_sync(host.run, file)
                await until(keylime, agent_id, "PASS", more=1)
            await until_status(bridge, "host", "verdict", "pass")
            for kill in (False, True):
                await trio.to_thread.run_sync(partial(bridge.stop, kill=kill))
                await trio.to_thread.run_sync(bridge.start)
                await until(keylime, agent_id, "PASS", more=2)
            await up.aclose()
            await until_said(bridge, "host", "no answer")
            await stack.enter_async_context(host.up(FILES))
            # Keylime 7.14.3 begins the new boot's list at the old boot's PCR 10: docs/bridge.md.
            await until(keylime, agent_id, "FAIL")
            assert "IMA measurement list does not match TPM PCR" in keylime.log
            code, said = await keylime.tenant("-c", "delete", "-u", agent_id, PUSH)
            assert code == 0, said
            await keylime.add(agent_id, PUSH, *debug, *words)
            await until(keylime, agent_id, "PASS", more=2)
            print(f"push: {keylime.status(agent_id)['attestation_count']} good attestations")
            assert {e["evidence_type"] for e in latest(keylime, agent_id)["evidence"]} == {
                "tpm_quote",
                "ima_log",
                "uefi_log",
            }
            await trio.to_thread.run_sync(host.run, ("/tmp/evil", b"evil"))
            await until(keylime, agent_id, "FAIL")
            await until_status(bridge, "host", "verdict", "fail")
            assert "/tmp/evil" in keylime.log
    finally:
        host.close()


async def test_what_is_refused_fails_with_the_reason(keylime: Keylime, tmp_path: Path) -> None:
    """Lies of hosts, another state, silence; and a policy that push mode would ignore."""
    names = ("pcr", "ak", "clock", "away", "blind")
    async with plain_proxies(len(names)) as made:
        proxies = dict(zip(names, made, strict=True))
        hosts = {name: proxy.rules | {"mode": "push"} for name, proxy in proxies.items()}
        quick = {"retry_interval_s": 0.5, "max_retry_s": 1.0}
        hosts = {name: rules | quick for name, rules in hosts.items()}
        with running_bridge(keylime, tmp_path / "bridge", hosts) as bridge:
            for name, proxy in proxies.items():
                bridge.pin(name, proxy.fake.tpm.ak_public)
            ids = await start(bridge)
            policy = tmp_path / "ignored.json"
            policy.write_text(policy_of(FILES, 0))
            for name in names:
                words = ("--runtime-policy", str(policy)) if name == "blind" else ()
                await keylime.add(ids[name], PUSH, "--tpm_policy", FIRMWARE, *words)
            for name in names[:-1]:
                await until(keylime, ids[name], "PASS", more=2)
            host = await until_status(bridge, "blind", "push_error", "meta.generator is 0 or 1")
            assert keylime.status(ids["blind"])["attestation_count"] == 0
            assert host["last"] in (None, "good")  # it is the policy, not the host
            clock = proxies["away"].fake.tpm.clock  # a reboot
            proxies["away"].fake.tpm.clock = ClockState(
                reset_count=clock.reset_count + 1, restart_count=0, clock_ms=1000
            )
            await until(keylime, ids["away"], "PASS", more=2)
            LIES["pcr"].tell(proxies["pcr"])
            await until(keylime, ids["pcr"], "FAIL")
            for name in ("ak", "clock"):
                LIES[name].tell(proxies[name])
                await until(keylime, ids[name], "FAIL")
                quote = latest(keylime, ids[name])["evidence"][0]
                said = quote["capabilities"]["evidence_version"]
                print(f"push, {name}: {said}")
                assert said.startswith(LIES[name].reason)
                assert bridge.status()["hosts"][name]["last"] == "refused"
            async with trio.open_nursery() as nursery:
                await proxies["away"].close()
                await until(keylime, ids["away"], "TIMEOUT")
                await proxies["away"].serve(nursery)
                await until(keylime, ids["away"], "PASS", more=1)
                nursery.cancel_scope.cancel()
